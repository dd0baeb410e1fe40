"""Inputs of the pipeline that once gave a wrong result or a wrong message: features, tables, byte orders, options."""

import datasets
import numpy as np
import pytest
import torch

LABELS = ["road", "sky"]


def test_features_that_are_not_finite_are_no_mask(segment, picture):
    """Half precision overflows without an error, and the largest of NaN is some class."""
    weight = segment.model.vision_model.backbone.encoder.layers[0].mlp.fc2.weight
    with torch.no_grad():
        weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        segment(picture, candidate_labels=LABELS)
    with pytest.raises(ValueError, match="not finite"):
        segment(picture, candidate_labels=LABELS, tile=64)
    found = segment([picture, picture], candidate_labels=LABELS, on_error="skip")
    assert ["not finite" in result["error"] for result in found] == [True, True]


@pytest.mark.parametrize(
    ("dtype", "image_range"), [(np.uint16, (0, 65535)), (np.uint16, (0, 4095)), (np.uint32, (0, 4000))]
)
def test_tiles_read_four_channels_of_more_bits_as_the_whole_image_is_read(segment, dtype, image_range):
    image = np.random.default_rng(0).integers(0, image_range[1] + 1, (64, 64, 4)).astype(dtype)
    options = {"candidate_labels": LABELS, "output": "map", "image_range": image_range}
    whole, tiled = segment(image, **options, size="native"), segment(image, **options, tile=64)
    assert (whole["map"] == tiled["map"]).all()
    assert whole["scores"] == pytest.approx(tiled["scores"], abs=1e-6)


@pytest.mark.parametrize("tile", [None, 64])
def test_the_byte_order_of_an_array_is_no_matter(segment, tile):
    image = np.random.default_rng(0).integers(0, 65536, (64, 96, 3)).astype(np.uint16)
    options = {"candidate_labels": LABELS, "output": "map", "size": "native", "tile": tile}
    assert (segment(image, **options)["map"] == segment(image.astype(">u2"), **options)["map"]).all()


def test_a_table_keeps_its_transform(segment, picture):
    """It expects decoded images, and is applied to those."""
    table = datasets.Dataset.from_dict(
        {"image": [picture, picture]}, features=datasets.Features(image=datasets.Image())
    )
    turned = table.with_transform(lambda rows: {"image": [image.convert("L").rotate(90) for image in rows["image"]]})
    expected = segment(picture.convert("L").rotate(90), candidate_labels=LABELS, output="map")["map"]
    for images in (turned, turned["image"]):
        found = list(segment(images, candidate_labels=LABELS, output="map"))
        assert all((result["map"] == expected).all() for result in found) and len(found) == 2


@pytest.mark.parametrize(
    "options", [{"refine": "lpos"}, {"tile": 8}, {"size": -3}, {"size": 384.0}, {"upsampler": "any"}]
)
def test_wrong_options_are_no_fault_of_an_image(segment, picture, forwards, options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        segment([picture], candidate_labels=LABELS, on_error="skip", **options)
    assert forwards == []
