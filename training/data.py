"""Photos on disk: the folder layouts that the training scripts read, checked before any work starts."""

import fnmatch
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from spar_hf.files import IMAGE_SUFFIXES
from spar_hf.image_input import read_image as read_upright
from spar_hf.image_input import to_rgb

VOID = 255  # the mask value of pixels without a label


@dataclass(frozen=True)
class SegmentationFolder:
    """
    `images/`, `masks/` (8-bit PNG of the same stem, pixel value = line number in `classes.txt`, 255 = void).

    Attributes:
        path: the folder.
        classes: the lines of `classes.txt`.
        pairs: (image, mask) paths, sorted by name.
    """

    path: Path
    classes: tuple[str, ...]
    pairs: tuple[tuple[Path, Path], ...]


def list_images(folder: str | Path) -> list[Path]:
    """
    All image files of a folder and its sub-folders, sorted.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Name a folder of images.")
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return images


def open_segmentation_folder(
    folder: str | Path, include: str = "*", exclude: list[str] | None = None
) -> SegmentationFolder:
    """
    Open a folder of photos with masks; `include` and `exclude` are shell patterns on the file stem.

    `classes.txt` may stand in the folder or in its parent (splits of one set share it).

    Raises:
        FileNotFoundError: a part of the layout is missing, or an image has no mask.
    """
    folder = Path(folder)
    layout = f"{folder} must hold `images/`, `masks/` (PNG of the same stem) and `classes.txt` (also in its parent)."
    classes_file = next((d / "classes.txt" for d in (folder, folder.parent) if (d / "classes.txt").is_file()), None)
    if classes_file is None or not (folder / "images").is_dir() or not (folder / "masks").is_dir():
        raise FileNotFoundError(layout)
    classes = tuple(line.strip() for line in classes_file.read_text(encoding="utf-8").splitlines() if line.strip())
    pairs = []
    for image in list_images(folder / "images"):
        if not fnmatch.fnmatch(image.stem, include) or any(fnmatch.fnmatch(image.stem, p) for p in exclude or ()):
            continue
        mask = folder / "masks" / f"{image.stem}.png"
        if not mask.is_file():
            raise FileNotFoundError(f"{image} has no mask {mask}. {layout}")
        pairs.append((image, mask))
    if not pairs:
        raise FileNotFoundError(f"No image of {folder} passes include={include!r}, exclude={exclude!r}.")
    return SegmentationFolder(folder, classes, tuple(pairs))


def read_image(path: Path) -> Image.Image:
    """An RGB image as the library reads it: upright, transparency on white, 16 bits scaled."""
    return to_rgb(read_upright(path))


def read_mask(path: Path) -> np.ndarray:
    """A label map `(height, width)` uint8, palette images by their index."""
    with Image.open(path) as mask:
        if mask.mode not in ("L", "P"):
            raise ValueError(f"{path} has mode {mask.mode}; a mask is an 8-bit PNG of class numbers (mode L or P).")
        return np.array(mask)


def readable_name(name: str) -> str:
    """A data set's class name as a person would write it: `floor-other-merged` -> `floor`."""
    name = re.sub(r"-(merged|other|stuff)\b", "", name)
    return re.sub(r"[-_]+", " ", name).strip().lower()


def jitter(pixels: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Light, contrast, colour and white balance of another hour and camera; `(3, height, width)` in 0 to 1."""
    pixels = pixels.clamp(1e-4, 1) ** math.exp(rng.uniform(-0.5, 0.5))
    pixels = pixels * rng.uniform(0.5, 1.3)
    pixels = pixels * torch.tensor([rng.uniform(0.85, 1.15) for _ in range(3)])[:, None, None]
    pixels = (pixels - pixels.mean()) * rng.uniform(0.7, 1.3) + pixels.mean()
    grey = pixels.mean(0, keepdim=True)
    saturation = 0.0 if rng.random() < 0.08 else rng.uniform(0.4, 1.5)
    pixels = grey + (pixels - grey) * saturation
    if rng.random() < 0.2:  # a photo that was enlarged, or is out of focus
        small = nn.functional.avg_pool2d(pixels[None], 2)
        pixels = nn.functional.interpolate(small, size=pixels.shape[-2:], mode="bilinear")[0]
    return pixels.clamp(0, 1)
