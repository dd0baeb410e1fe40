"""Random views of images: drawn and applied, they are those of earlier versions, pixel by pixel."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from spar_hf.data.augmentation import Crop, Views, draw_crop, jitter, jitter_image, view_generator
from spar_hf.utils.errors import UsageError

SIZES = [(64, 48), (301, 200), (97, 640), (20, 20)]


def image_of(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def augment(image, window, patch_size, views, rng):
    """`augment` of version 0.1, which drew random numbers while it changed the image, as it stood there."""
    scale = rng.uniform(views.min_scale, 1.0)
    long_side, short_side = max(image.size), min(image.size)
    factor = scale * min(views.long_side_windows * window / long_side, views.short_side_windows * window / short_side)
    sides = [side * factor for side in image.size]
    if rng.random() < views.crop_probability:
        cropped = [min(side, max(side * rng.uniform(0.4, 1.0), window)) for side in sides]
    else:
        cropped = sides
    width, height = (max(patch_size, math.floor(side / patch_size + 1e-6) * patch_size) for side in cropped)
    left, top = (rng.uniform(0, max(0.0, side - kept)) for side, kept in zip(sides, (width, height), strict=True))
    box = tuple(value / factor for value in (left, top, left + width, top + height))
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if rng.random() < views.flip_probability:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < views.jitter_probability:  # by the caller in that version
        image = jitter_image(image, rng.getrandbits(32))
    return image


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "views", [Views(), Views(jitter_probability=0.5, min_scale=0.3, long_side_windows=3, short_side_windows=1)]
)
def test_view_is_that_of_the_function_that_it_replaces(size, views):
    image, kinds = image_of(size), set()
    for index in range(12):
        crop = draw_crop(size, 64, 16, views, view_generator(3, index))
        ours = np.asarray(crop.apply(image))
        np.testing.assert_array_equal(ours, augment(image, 64, 16, views, random.Random(f"photo-3-{index}")))
        assert crop.size == ours.shape[1::-1] and not any(side % 16 for side in crop.size)
        kinds.add((crop.flip, crop.jitter is not None))
    assert {flip for flip, _ in kinds} == {False, True}  # the views differ in everything that is drawn
    assert any(jittered for _, jittered in kinds) == (views.jitter_probability > 0)


def test_crop_is_a_part_of_the_image_resized_and_flipped():
    image = image_of((64, 48))
    part = image.crop((8, 4, 40, 36))
    np.testing.assert_array_equal(Crop((32, 32), (8, 4, 40, 36), False).apply(image), part)
    np.testing.assert_array_equal(Crop((32, 32), (8, 4, 40, 36), True).apply(image), np.asarray(part)[:, ::-1])
    changed = Crop((32, 32), (8, 4, 40, 36), False, jitter=5).apply(image)
    np.testing.assert_array_equal(changed, jitter_image(part, 5))


def test_jitter__same_seed_same_light():
    image = image_of((40, 30))
    once, again, other = (np.asarray(jitter_image(image, seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert (once != other).mean() > 0.5 and (once != np.asarray(image)).mean() > 0.5
    pixels = jitter(torch.rand(3, 8, 9), random.Random(0))
    assert pixels.shape == (3, 8, 9) and pixels.min() >= 0 and pixels.max() <= 1


@pytest.mark.parametrize(
    "wrong",
    [{"min_scale": 0}, {"min_scale": 1.5}, {"long_side_windows": 0}, {"short_side_windows": -1}, {"crop_probability": 1.1},
     {"flip_probability": -0.1}, {"jitter_probability": float("nan")}],
)  # fmt: skip
def test_views_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=f"--{name} "):
        Views(**wrong)
