"""Random views of training images. A crop is drawn from the image size and random numbers first, and applied later."""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from spar_hf.utils.errors import UsageError
from spar_hf.utils.fields import option
from spar_hf.utils.options import formerly, require_positive, require_share


@dataclass(kw_only=True)
class Views:
    """
    Distribution of the random views of training images. Sizes are in teacher windows, so one recipe fits every backbone.

    Raises:
        UsageError: an option is out of range.
    """

    long_side_windows: float = option(
        4.0, "Images fit this many teacher windows along their longer side ...", aliases=formerly("long_side")
    )
    short_side_windows: float = option(
        2.0, "... and this many along their shorter side,", aliases=formerly("short_side")
    )
    min_scale: float = option(0.5, "times a factor drawn between this and 1.")
    crop_probability: float = option(0.5, "Chance of a random crop that keeps at least 0.4 of each side.")
    flip_probability: float = option(0.5, "Chance of a horizontal flip.")
    jitter_probability: float = option(
        0.0,
        "Chance that brightness, contrast and colour of a view are changed, for teacher and student alike (0 in "
        "the paper). With few images it keeps the student from memorising their light.",
    )

    def __post_init__(self):
        if not 0 < self.min_scale <= 1:
            raise UsageError(f"--min_scale {self.min_scale} must lie above 0 and at most at 1.")
        require_positive(self, "long_side_windows", "short_side_windows")
        require_share(self, "crop_probability", "flip_probability", "jitter_probability")


@dataclass
class Crop:
    """
    One view of an image: a part of it, resized, perhaps flipped and with other light.

    Attributes:
        size: width and height of the view in pixels.
        box: left, top, right and bottom of the part of the image that becomes the view; in pixels, fractions allowed.
        flip: whether the view is flipped left to right.
        jitter: seed of [`jitter_image`]; `None` keeps the light.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    flip: bool
    jitter: int | None = None

    def apply(self, image: Image.Image) -> Image.Image:
        """
        Cut the view out of an RGB image.

        Example:

        ```python
        >>> Crop((32, 16), (0, 0, 64, 32), flip=True).apply(Image.new("RGB", (64, 64))).size
        (32, 16)
        ```"""
        width, height = self.size
        left, top, right, bottom = self.box
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image if self.jitter is None else jitter_image(image, self.jitter)


def draw_crop(image_size: tuple[int, int], window: int, patch_size: int, views: Views, rng: random.Random) -> Crop:
    """
    Draw a view of an image: a random size, perhaps a crop, sides rounded down to multiples of the patch, perhaps a flip.

    Source: the recipe of SPAR (arXiv 2604.02252, section 4).

    Args:
        image_size: width and height of the image in pixels.
        window: side of a teacher window in pixels.
        patch_size: side of a patch in pixels.
        views: distribution of the views.
        rng: random numbers, see [`view_generator`].

    Example:

    ```python
    >>> crop = draw_crop((640, 480), window=192, patch_size=16, views=Views(), rng=random.Random(0))
    >>> crop.size, crop.flip
    ((464, 352), False)
    ```"""
    scale = rng.uniform(views.min_scale, 1.0)
    sides = (views.long_side_windows * window, views.short_side_windows * window)
    factor = scale * min(sides[0] / max(image_size), sides[1] / min(image_size))
    resized = [side * factor for side in image_size]
    cropped = resized
    if rng.random() < views.crop_probability:
        cropped = [min(side, max(side * rng.uniform(0.4, 1.0), window)) for side in resized]
    width, height = (max(patch_size, math.floor(side / patch_size + 1e-6) * patch_size) for side in cropped)
    left, top = (rng.uniform(0, max(0.0, side - kept)) for side, kept in zip(resized, (width, height), strict=True))
    box = [value / factor for value in (left, top, left + width, top + height)]
    right, bottom = min(box[2], image_size[0]), min(box[3], image_size[1])
    flip = rng.random() < views.flip_probability
    jitter = rng.getrandbits(32) if rng.random() < views.jitter_probability else None
    return Crop((width, height), (box[0], box[1], right, bottom), flip, jitter)


def view_generator(seed: int, index: int) -> random.Random:
    """The random numbers for the view of a stream's `index`-th image, the same on every machine and after a resume."""
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
