"""Random views of images: drawn and applied, they are those of earlier versions, pixel by pixel."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from spar_hf.data.augmentation import (
    Crop,
    Views,
    cover_part,
    draw_crop,
    jitter,
    jitter_image,
    resize_bilinear,
    view_generator,
)
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
     {"flip_probability": -0.1}, {"jitter_probability": float("nan")}, {"cutmix_probability": 2},
     {"jitter_student_only": True}],
)  # fmt: skip
def test_views_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=f"--{name} "):
        Views(**wrong)


@pytest.mark.parametrize(("size", "other_size"), [((64, 48), (80, 90)), ((64, 48), (10, 200)), ((16, 16), (1, 1))])
def test_cover_part__a_rectangle_of_the_other_view_and_nothing_else(size, other_size):
    """Pixels of the views are numbered, so each pixel of the result says where it comes from."""
    first, second = (np.mgrid[0:height, 0:width].transpose(1, 2, 0) for width, height in (size, other_size))
    view, other = (
        Image.fromarray(np.dstack([p, p[..., 0] * 0 + k]).astype(np.uint8)) for k, p in enumerate((first, second))
    )
    places, shares = set(), []
    for seed in range(40):
        covered = np.array(cover_part(view, other, random.Random(seed)))
        rows, columns = np.nonzero(covered[..., 2])
        box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert covered[box][..., 2].all()
        inside = covered[box][..., :2].astype(int)  # one part of the other view, not resized
        start = inside[0, 0]
        np.testing.assert_array_equal(inside, np.mgrid[: inside.shape[0], : inside.shape[1]].transpose(1, 2, 0) + start)
        outside = covered[..., 2] == 0
        np.testing.assert_array_equal(covered[outside], np.array(view)[outside])
        places.add((rows.min(), columns.min(), *start))
        shares.append(len(rows) / (size[0] * size[1]))
    assert len(places) > 10 or other_size == (1, 1)
    if min(other_size) >= max(size):
        assert 0.06 < min(shares) < 0.2 and 0.5 < max(shares) < 0.95
    assert np.array(view)[..., 2].max() == 0  # it was not changed itself


@pytest.mark.parametrize("views", [{}, {"long_side_pixels": 256, "short_side_pixels": 128, "min_side_pixels": 48}])
def test_views_with_the_same_numbers_for_the_size_differ_in_all_else(views):
    """Images of one shape, whatever their resolution: one size, but other places, flips and light."""
    views, kinds = Views(jitter_probability=0.5, crop_probability=0.9, **views), []
    for index in range(20):
        drawn = [
            draw_crop(size, 64, 16, views, view_generator(0, f"{size} {index}"), view_generator(0, f"size {index}"))
            for size in ((640, 480), (320, 240))
        ]
        assert drawn[0].size == drawn[1].size
        kinds.append(
            [(crop.box[0] / size, crop.flip, crop.jitter) for crop, size in zip(drawn, (640, 320), strict=True)]
        )
    for part in range(3):
        assert any(first[part] != second[part] for first, second in kinds)


# The published draw


PUBLISHED = {"long_side_pixels": 2048, "short_side_pixels": 1024, "min_side_pixels": 512, "resample": "bilinear"}


@pytest.mark.parametrize("size", [(2250, 1500), (1500, 2250), (1024, 1024), (640, 480), (3000, 600), (511, 900)])
def test_views_in_pixels_are_one_set_for_every_family(size):
    """The published rules, checked on many draws: window and family play no part, and each rule occurs."""
    views, kinds = Views(**PUBLISHED), set()
    for index in range(300):
        crop = draw_crop(size, 512, 16, views, view_generator(0, index))
        assert crop == draw_crop(size, 224, 16, views, view_generator(0, index))
        scale = random.Random(f"photo-0-{index}").uniform(0.5, 1.0)  # the first number that is drawn
        factor = scale * min(2048 / max(size), 1024 / min(size))
        fitted = [int(side * factor + 0.5) for side in size]
        whole = crop.box == (0, 0, *size)
        if min(fitted) < 512:
            kinds.add("enlarged")
            enlarged = [side * 512 / min(size) for side in size]
            assert whole and crop.size == tuple(int(side + 1e-6) // 16 * 16 for side in enlarged)
            assert min(crop.size) == 512
        elif whole:
            kinds.add("whole")
            assert crop.size == tuple(side // 16 * 16 for side in fitted)
        else:
            kinds.add("crop")
            for side, kept, start, end, own in zip(fitted, crop.size, crop.box[:2], crop.box[2:], size, strict=True):
                assert kept % 16 == 0 and max(512, 0.4 * side - 16) <= kept <= side
                assert (end - start) * side / own == pytest.approx(kept) and 0 <= start <= end <= own + 1e-6
                assert start * side / own == pytest.approx(round(start * side / own), abs=1e-6)
        kinds.add(crop.flip)
    assert kinds >= {True, False} and (kinds >= {"whole", "crop"} or "enlarged" in kinds)


def test_views_of_the_extended_recipe_reach_2560_pixels():
    views = Views(**PUBLISHED | {"long_side_pixels": 2560, "short_side_pixels": 2560, "min_scale": 0.2})
    sizes = [draw_crop((2000, 1500), 512, 16, views, view_generator(0, index)).size for index in range(300)]
    assert 2400 < max(map(max, sizes)) <= 2560 and min(map(min, sizes)) == 512


@pytest.mark.parametrize("size", [(30, 20), (64, 48), (200, 37)])
def test_bilinear_resizing_is_that_of_torch(size):
    image = image_of((64, 48), seed=4)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    plain = torch.nn.functional.interpolate(
        levels, size=size[::-1], mode="bilinear", align_corners=False, antialias=False
    )
    ours = torch.from_numpy(np.array(resize_bilinear(image, size))).permute(2, 0, 1)
    torch.testing.assert_close(ours.float(), plain[0], atol=0.51, rtol=0)  # rounded to levels
    assert ours.shape[1:] == size[::-1]


def test_a_bilinear_crop_is_a_part_of_the_whole_image_resized():
    image = image_of((90, 60), seed=5)
    whole = np.asarray(resize_bilinear(image, (60, 50)))
    crop = Crop((32, 16), (8 * 1.5, 20 * 1.2, 40 * 1.5, 36 * 1.2), False, resample="bilinear")
    np.testing.assert_allclose(np.asarray(crop.apply(image)), whole[20:36, 8:40], atol=1)  # ties of rounding
    flipped = Crop(crop.size, crop.box, True, resample="bilinear").apply(image)
    np.testing.assert_array_equal(np.asarray(flipped)[:, ::-1], np.asarray(crop.apply(image)))


@pytest.mark.parametrize("wrong", [{"long_side_pixels": 2048}, {"min_side_pixels": 512}, {"resample": "nearest"}])
def test_half_of_the_published_draw_is_refused(wrong):
    with pytest.raises(UsageError, match="|".join(wrong)):
        Views(**wrong)
