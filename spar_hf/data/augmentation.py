"""Random views of training images. A crop is drawn from the image size and random numbers first, and applied later."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from spar_hf.utils.errors import UsageError
from spar_hf.utils.fields import option
from spar_hf.utils.options import HELP, formerly, require_one_of, require_positive, require_share

RESAMPLINGS = ("bicubic", "bilinear")
PIXELS = ("long_side_pixels", "short_side_pixels", "min_side_pixels")


@dataclass(kw_only=True)
class Views:
    """
    Distribution of the random views of training images. Sizes are in teacher windows, so one recipe fits every backbone, or,
    as published, in pixels, the same for every backbone.

    Raises:
        UsageError: an option is out of range.
    """

    long_side_windows: float = option(
        4.0, "Images fit this many teacher windows along their longer side ...", aliases=formerly("long_side")
    )
    short_side_windows: float = option(
        2.0, "... and this many along their shorter side,", aliases=formerly("short_side")
    )
    long_side_pixels: int | None = option(
        None, "Instead of windows: images fit this many pixels along their longer side (2048 in the paper),"
    )
    short_side_pixels: int | None = option(None, "... and this many along their shorter side (1024 in the paper).")
    min_side_pixels: int | None = option(
        None,
        "With sizes in pixels: an image whose shorter side would then be below this is enlarged to it and not cropped, and "
        "crops are at least this large (512 in the paper).",
    )
    min_scale: float = option(0.5, "times a factor drawn between this and 1.")
    crop_probability: float = option(0.5, "Chance of a random crop that keeps at least 0.4 of each side.")
    flip_probability: float = option(0.5, "Chance of a horizontal flip.")
    resample: str = option("bicubic", HELP["resample"])
    fixed_views: bool = option(
        False, "Every image keeps one view in all epochs, as in the paper, instead of a new one in each."
    )
    jitter_probability: float = option(
        0.0,
        "Chance that brightness, contrast and colour of a view are changed, for teacher and student alike (0 in "
        "the paper). With few images it keeps the student from memorising their light.",
    )
    jitter_student_only: bool = option(
        False,
        "The teacher reads views as they were before that change, so the student learns to give the features of good light "
        "in any light. Not with caches.",
    )
    cutmix_probability: float = option(
        0.0,
        "Chance that a rectangle of a view shows another training image, for teacher and student alike (0 in the paper). "
        "What lies beside a place then says less about it, so the student has to look at the place itself. Not with caches "
        "and --streaming.",
    )

    def __post_init__(self):
        if not 0 < self.min_scale <= 1:
            raise UsageError(f"--min_scale {self.min_scale} must lie above 0 and at most at 1.")
        require_positive(self, "long_side_windows", "short_side_windows", *PIXELS)
        require_one_of(self, "resample", RESAMPLINGS)
        require_share(self, "crop_probability", "flip_probability", "jitter_probability", "cutmix_probability")
        if self.jitter_student_only and not self.jitter_probability:
            raise UsageError("--jitter_student_only needs --jitter_probability, for example --jitter_probability 0.8.")
        if len({getattr(self, name) is None for name in PIXELS}) > 1:
            raise UsageError(
                f"Sizes in pixels need {', '.join(f'--{name}' for name in PIXELS)}, for example 2048 1024 512."
            )


@dataclass
class Crop:
    """
    One view of an image: a part of it, resized, perhaps flipped and with other light.

    Attributes:
        size: width and height of the view in pixels.
        box: left, top, right and bottom of the part of the image that becomes the view; in pixels, fractions allowed.
        flip: whether the view is flipped left to right.
        jitter: seed of [`jitter_image`]; `None` keeps the light.
        resample: `"bicubic"` (Pillow's, antialiased) or `"bilinear"` (see [`resize_bilinear`]).
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    flip: bool
    jitter: int | None = None
    resample: str = "bicubic"

    @property
    def record(self) -> dict[str, Any]:
        """The fields as a cache stores them: `resample` only if earlier versions did not have it."""
        values = asdict(self)
        return values if self.resample != "bicubic" else {k: v for k, v in values.items() if k != "resample"}

    def apply(self, image: Image.Image) -> Image.Image:
        """
        Cut the view out of an RGB image.

        Example:

        ```python
        >>> Crop((32, 16), (0, 0, 64, 32), flip=True).apply(Image.new("RGB", (64, 64))).size
        (32, 16)
        ```"""
        view = self.cut(image)
        return view if self.jitter is None else jitter_image(view, self.jitter)

    def whole_size(self, image_size: tuple[int, int]) -> tuple[float, float]:
        """
        Width and height that the whole image would have at the size of the view, in pixels.

        Args:
            image_size: width and height of the image in pixels.

        Example:

        ```python
        >>> Crop((160, 160), (0, 0, 320, 320), flip=False).whole_size((640, 480))  # half as large as the image
        (320.0, 240.0)
        ```"""
        width, height = self.box[2] - self.box[0], self.box[3] - self.box[1]
        return image_size[0] * self.size[0] / width, image_size[1] * self.size[1] / height

    def cut(self, image: Image.Image) -> Image.Image:
        """The view in the light of the image: [`apply`] without `jitter`."""
        size, box = (
            (self.size[0], self.size[1]),
            (self.box[0], self.box[1], self.box[2], self.box[3]),
        )  # lists in caches
        if self.resample == "bilinear":
            image = resize_bilinear(image, size, box)
        else:
            image = image.resize(size, Image.Resampling.BICUBIC, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image


def resize_bilinear(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """
    Resize an RGB image by bilinear interpolation without antialiasing, as OpenCV does and with it the published training and
    evaluation: each pixel is a mean of four pixels of the image, however much smaller it becomes. Equal to
    `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`, with levels rounded to whole numbers.

    Args:
        image: RGB.
        size: width and height of the result.
        box: left, top, right and bottom of the part that is resized, in pixels; by default the whole image. What lies just
            outside takes part, as if the whole image was resized and then cropped.

    Example:

    ```python
    >>> row = Image.fromarray(np.array([[[0] * 3, [100] * 3, [200] * 3, [40] * 3]], np.uint8))
    >>> np.array(resize_bilinear(row, (2, 1)))[0, :, 0].tolist()
    [50, 120]
    ```"""
    left, top, right, bottom = (0, 0, image.width, image.height) if box is None else box
    pixels = torch.from_numpy(np.array(image)).float()  # (height, width, 3)
    for axis, (length, start, end) in enumerate(((size[1], top, bottom), (size[0], left, right))):
        last = pixels.shape[axis] - 1
        centres = start + (torch.arange(length, dtype=torch.float64) + 0.5) * (end - start) / length - 0.5
        centres = centres.clamp(0, last)
        before = centres.long()
        weights = (centres - before).float().view([-1 if dim == axis else 1 for dim in range(3)])
        after = (before + 1).clamp(max=last)
        pixels = torch.lerp(pixels.index_select(axis, before), pixels.index_select(axis, after), weights)
    return Image.fromarray(pixels.round().byte().numpy())


def draw_crop(
    image_size: tuple[int, int],
    window: int,
    patch_size: int,
    views: Views,
    rng: random.Random,
    size_rng: random.Random | None = None,
) -> Crop:
    """
    Draw a view of an image: a random size, perhaps a crop, sides rounded down to multiples of the patch, perhaps a flip.

    Source: the recipe of SPAR (arXiv 2604.02252, section 4). With sizes in pixels it is the published one. With sizes in
    windows a whole image is cut to multiples of the patch instead of resized to them, which keeps its shape.

    Args:
        image_size: width and height of the image in pixels.
        window: side of a teacher window in pixels.
        patch_size: side of a patch in pixels.
        views: distribution of the views.
        rng: random numbers, see [`view_generator`].
        size_rng: those for the size of the view, if not `rng`: with the same ones, images of one shape get one size.

    Example:

    ```python
    >>> crop = draw_crop((640, 480), window=192, patch_size=16, views=Views(), rng=random.Random(0))
    >>> crop.size, crop.flip
    ((464, 352), False)
    ```"""
    size_rng = rng if size_rng is None else size_rng
    if views.min_side_pixels is not None:
        size, box = _draw_in_pixels(image_size, patch_size, views, rng, size_rng)
    else:
        size, box = _draw_in_windows(image_size, window, patch_size, views, rng, size_rng)
    flip = rng.random() < views.flip_probability
    jitter = rng.getrandbits(32) if rng.random() < views.jitter_probability else None
    return Crop(size, box, flip, jitter, views.resample)


Drawn = tuple[tuple[int, int], tuple[float, float, float, float]]  # size and box of a crop


def _draw_in_windows(
    image_size: tuple[int, int],
    window: int,
    patch_size: int,
    views: Views,
    rng: random.Random,
    size_rng: random.Random,
) -> Drawn:
    """A crop of an image that fits a number of windows."""
    scale = size_rng.uniform(views.min_scale, 1.0)
    sides = (views.long_side_windows * window, views.short_side_windows * window)
    factor = scale * min(sides[0] / max(image_size), sides[1] / min(image_size))
    resized = [side * factor for side in image_size]
    cropped = resized
    if size_rng.random() < views.crop_probability:
        cropped = [min(side, max(side * size_rng.uniform(0.4, 1.0), window)) for side in resized]
    width, height = _floored(cropped, patch_size)
    left, top = (rng.uniform(0, max(0.0, side - kept)) for side, kept in zip(resized, (width, height), strict=True))
    box = [value / factor for value in (left, top, left + width, top + height)]
    right, bottom = min(box[2], image_size[0]), min(box[3], image_size[1])
    return (width, height), (box[0], box[1], right, bottom)


def _draw_in_pixels(
    image_size: tuple[int, int], patch_size: int, views: Views, rng: random.Random, size_rng: random.Random
) -> Drawn:
    """A crop of an image that fits a number of pixels, as published: the whole image, or whole pixels of the resized one."""
    scale = size_rng.uniform(views.min_scale, 1.0)
    assert views.long_side_pixels and views.short_side_pixels and views.min_side_pixels  # Views has checked that
    whole = (0.0, 0.0, float(image_size[0]), float(image_size[1]))
    factor = scale * min(views.long_side_pixels / max(image_size), views.short_side_pixels / min(image_size))
    resized = [math.floor(side * factor + 0.5) for side in image_size]
    if min(resized) < views.min_side_pixels:
        factor = views.min_side_pixels / min(image_size)
        return _floored([side * factor for side in image_size], patch_size), whole
    if size_rng.random() >= views.crop_probability:
        return _floored(resized, patch_size), whole
    kept = _floored([max(side * size_rng.uniform(0.4, 1.0), views.min_side_pixels) for side in resized], patch_size)
    starts = [rng.randint(0, side - length) for side, length in zip(resized, kept, strict=True)]
    edges = [*starts, starts[0] + kept[0], starts[1] + kept[1]]
    left, top, right, bottom = (edge * image_size[i % 2] / resized[i % 2] for i, edge in enumerate(edges))
    return kept, (left, top, right, bottom)


def _floored(sides: Sequence[float], patch_size: int) -> tuple[int, int]:
    """Width and height rounded down to multiples of the patch, at least one patch."""
    width, height = (max(patch_size, math.floor(side / patch_size + 1e-6) * patch_size) for side in sides)
    return width, height


def cover_part(view: Image.Image, other: Image.Image, rng: random.Random) -> Image.Image:
    """
    Cover a rectangle of a view with a rectangle of another view. Its sides are those of the view times the root of a share
    between 0.1 and 0.6, each times a factor between 0.8 and 1.25, and at most those of either view.

    Source: CutMix (arXiv 1905.04899), without its labels: the teacher reads the covered view.

    Args:
        view: RGB; it is not changed.
        other: RGB, of any size.
        rng: random numbers, see [`view_generator`].

    Example:

    ```python
    >>> black, white = Image.new("RGB", (64, 48)), Image.new("RGB", (80, 80), "white")
    >>> covered = np.array(cover_part(black, white, random.Random(0)))
    >>> covered.shape, f"{(covered == 255).mean():.0%}"
    ((48, 64, 3), '59%')
    ```"""
    side = math.sqrt(rng.uniform(0.1, 0.6))
    drawn = [max(1, round(length * side * rng.uniform(0.8, 1.25))) for length in view.size]
    width, height = (min(lengths) for lengths in zip(drawn, view.size, other.size, strict=True))
    left, top = rng.randint(0, other.width - width), rng.randint(0, other.height - height)
    part = other.crop((left, top, left + width, top + height))
    covered = view.copy()
    covered.paste(part, (rng.randint(0, view.width - width), rng.randint(0, view.height - height)))
    return covered


def view_generator(seed: int, index: int | str) -> random.Random:
    """
    The random numbers for the view of a stream's `index`-th image, the same on every machine and after a resume. With
    the name of an image instead (`Views.fixed_views`), those for its only view.
    """
    return random.Random(f"photo-{seed}-{index}")


def jitter(pixels: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Change brightness, contrast, saturation, white balance and sharpness of an image `(3, height, width)` in 0 to 1."""
    pixels = pixels.clamp(1e-4, 1) ** math.exp(rng.uniform(-0.7, 0.7))
    pixels = pixels * rng.uniform(0.35, 1.3)
    pixels = pixels * torch.tensor([rng.uniform(0.85, 1.15) for _ in range(3)])[:, None, None]
    pixels = (pixels - pixels.mean()) * rng.uniform(0.7, 1.3) + pixels.mean()
    grey = pixels.mean(0, keepdim=True)
    saturation = 0.0 if rng.random() < 0.08 else rng.uniform(0.4, 1.5)
    pixels = grey + (pixels - grey) * saturation
    if rng.random() < 0.2:  # blur
        small = nn.functional.avg_pool2d(pixels[None], 2)
        pixels = nn.functional.interpolate(small, size=pixels.shape[-2:], mode="bilinear")[0]
    return pixels.clamp(0, 1)


def jitter_image(image: Image.Image, seed: int) -> Image.Image:
    """An RGB image changed by [`jitter`] with random numbers of this seed."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (3, height, width)
    pixels = jitter(pixels, random.Random(seed)) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())
