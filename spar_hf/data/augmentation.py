"""Random views of images: a crop is drawn first, from random numbers alone, and applied to the image later."""

import math
import random
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import nn

from spar_hf.utils.errors import UsageError


@dataclass(kw_only=True)
class Views:
    """How views of the training images are drawn. Sizes are in teacher windows, so that one recipe fits every backbone."""

    long_side: float = field(
        default=4.0, metadata={"help": "Images fit this many teacher windows along their longer side ..."}
    )
    short_side: float = field(default=2.0, metadata={"help": "... and this many along their shorter side,"})
    min_scale: float = field(default=0.5, metadata={"help": "times a factor drawn between this and 1."})
    crop_probability: float = field(
        default=0.5, metadata={"help": "Chance of a random crop to 0.4 or more of each side."}
    )
    flip_probability: float = field(default=0.5, metadata={"help": "Chance of a horizontal flip."})
    jitter_probability: float = field(
        default=0.0,
        metadata={
            "help": "Chance that brightness, contrast and colour of an image are changed at random, for teacher and student "
            "alike (0 in the paper). With few images it keeps the student from memorising their light."
        },
    )

    def __post_init__(self):
        if not 0 < self.min_scale <= 1:
            raise UsageError(f"--min_scale {self.min_scale} must lie above 0 and at most at 1.")
        for name in ("long_side", "short_side"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} {getattr(self, name)} must be above 0.")
        for name in ("crop_probability", "flip_probability", "jitter_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name} {getattr(self, name)} must lie in 0 to 1.")


@dataclass
class Crop:
    """
    One view of an image.

    Attributes:
        size: width and height of the view in pixels.
        box: left, top, right and bottom of the part of the image that is resized to it, in pixels, fractions allowed.
        flip: whether the view is then flipped left to right.
        jitter: seed of the random change of its light, see [`jitter_image`]; `None` leaves it.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    flip: bool
    jitter: int | None = None

    def apply(self, image: Image.Image) -> Image.Image:
        """
        The view of an image.

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
    Draw the view of an image of `image_size` (width, height) as SPAR's recipe does (arXiv 2604.02252, section 4): a random
    size, then perhaps a crop, whose sides become multiples of the patch, and a flip.

    Example:

    ```python
    >>> crop = draw_crop((640, 480), window=192, patch_size=16, views=Views(), rng=random.Random(0))
    >>> crop.size, crop.flip
    ((464, 352), False)
    ```"""
    scale = rng.uniform(views.min_scale, 1.0)
    factor = scale * min(views.long_side * window / max(image_size), views.short_side * window / min(image_size))
    sides = [side * factor for side in image_size]
    cropped = sides
    if rng.random() < views.crop_probability:
        cropped = [min(side, max(side * rng.uniform(0.4, 1.0), window)) for side in sides]
    width, height = (max(patch_size, math.floor(side / patch_size + 1e-6) * patch_size) for side in cropped)
    left, top = (rng.uniform(0, max(0.0, side - kept)) for side, kept in zip(sides, (width, height), strict=True))
    box = [value / factor for value in (left, top, left + width, top + height)]
    right, bottom = min(box[2], image_size[0]), min(box[3], image_size[1])
    flip = rng.random() < views.flip_probability
    jitter = rng.getrandbits(32) if rng.random() < views.jitter_probability else None
    return Crop((width, height), (box[0], box[1], right, bottom), flip, jitter)


def view_generator(seed: int, index: int) -> random.Random:
    """The random numbers of the view of the `index`-th image of a stream: the same on every machine and after a resume."""
    return random.Random(f"photo-{seed}-{index}")


def jitter(pixels: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Brightness, contrast, colour and white balance of another hour and camera; `(3, height, width)` in 0 to 1."""
    pixels = pixels.clamp(1e-4, 1) ** math.exp(rng.uniform(-0.7, 0.7))
    pixels = pixels * rng.uniform(0.35, 1.3)
    pixels = pixels * torch.tensor([rng.uniform(0.85, 1.15) for _ in range(3)])[:, None, None]
    pixels = (pixels - pixels.mean()) * rng.uniform(0.7, 1.3) + pixels.mean()
    grey = pixels.mean(0, keepdim=True)
    saturation = 0.0 if rng.random() < 0.08 else rng.uniform(0.4, 1.5)
    pixels = grey + (pixels - grey) * saturation
    if rng.random() < 0.2:  # as if enlarged or out of focus
        small = nn.functional.avg_pool2d(pixels[None], 2)
        pixels = nn.functional.interpolate(small, size=pixels.shape[-2:], mode="bilinear")[0]
    return pixels.clamp(0, 1)


def jitter_image(image: Image.Image, seed: int) -> Image.Image:
    """An RGB image after [`jitter`], the same for the same seed."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (3, height, width)
    pixels = jitter(pixels, random.Random(seed)) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())
