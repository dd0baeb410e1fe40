"""Images on disk: the folder layouts that the training scripts read, checked before any work starts."""

import fnmatch
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from spar_hf.model.image_input import read_image as read_upright
from spar_hf.model.image_input import to_rgb
from spar_hf.model.image_processing_spar import MIN_SIDE
from spar_hf.utils.files import IMAGE_SUFFIXES, images_under

VOID = 255  # the mask value of pixels without a label


@dataclass(frozen=True)
class SegmentationFolder:
    """
    `images/`, `masks/` (8-bit PNG of the same stem, pixel value = line number in `classes.txt`, 255 = void).

    Attributes:
        path: the folder.
        classes: the classes told apart: the lines of `classes.txt`, or what is made of them.
        pairs: (image, mask) paths, sorted by name.
        table: the class of every mask value, `(256,)` int16: 255 for void, -1 for values that must not occur.
    """

    path: Path
    classes: tuple[str, ...]
    pairs: tuple[tuple[Path, Path], ...]
    table: np.ndarray

    def read_mask(self, path: Path, image_size: tuple[int, int]) -> np.ndarray:
        """
        A mask of the folder in its classes, `(height, width)` uint8.

        Raises:
            ValueError: a value that is no line of `classes.txt`, or another size than the image's.
        """
        mask = read_mask(path)
        if mask.shape != image_size:
            raise ValueError(
                f"{path} has {mask.shape} pixels (height, width), its image {image_size}. Resize the mask by nearest "
                "neighbour."
            )
        labels = self.table[mask]
        if labels.min() < 0:
            wrong, lines = np.unique(mask[labels < 0]).tolist(), int((self.table[:VOID] >= 0).sum())
            raise ValueError(f"{path} holds the values {wrong}, but classes.txt has {lines} lines; void is {VOID}.")
        return labels.astype(np.uint8)


def list_images(folder: str | Path) -> list[Path]:
    """
    All image files of a folder and its sub-folders, sorted, without hidden ones.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Name a folder of images.")
    images = images_under(folder)
    if not images:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return images


def read_classes(file: Path) -> list[str]:
    """
    The lines of a `classes.txt`; the number of a line, from 0, is its class's value in masks.

    Raises:
        ValueError: an empty line before the last one; passed over, it would shift all that follow.
    """
    lines = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]
    if not all(lines):
        raise ValueError(
            f"Line {lines.index('') + 1} of {file} is empty. The number of a line, from 0, is its class's value in masks: "
            "name every class up to the last."
        )
    return lines


def merge_classes(lines: tuple[str, ...], file: str | Path) -> dict[str, list[str]]:
    """
    A JSON file {class: [line of `classes.txt`, ...]} of the classes to tell apart.

    Raises:
        ValueError: something else, a name that is no line, or one that stands in two classes.
    """
    try:
        merged = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}).") from error
    if not isinstance(merged, dict) or not merged or not all(isinstance(names, list) for names in merged.values()):
        raise ValueError(f"{file} must hold {{class: [line of classes.txt, ...], ...}}.")
    names = [name for group in merged.values() for name in group]
    if unknown := [name for name in names if name not in lines]:
        raise ValueError(f"{file}: {', '.join(map(str, unknown))}: no such line among the {len(lines)} of classes.txt.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file}: {', '.join(twice)}: named more than once.")
    return merged


def open_segmentation_folder(
    folder: str | Path, include: str = "*", exclude: list[str] | None = None, classes: str | Path | None = None
) -> SegmentationFolder:
    """
    Open a folder of images with masks.

    `classes.txt` may stand in the folder or in its parent (splits of one set share it).

    Args:
        folder: the folder.
        include: shell pattern of the file stems taken.
        exclude: shell patterns of those left out.
        classes: JSON file {class: [line of `classes.txt`, ...]}: these classes in place of the lines; a line that none of
            them names is void.

    Raises:
        FileNotFoundError: a part of the layout is missing, or an image has no mask.
        ValueError: two images of one stem; an empty line in `classes.txt`; `classes` is no JSON, or names something that is
            no line, or a line twice.
    """
    folder = Path(folder)
    layout = (
        f"{folder} must hold `images/`, `masks/` (PNG of the same stem) and `classes.txt` (also in its parent). For "
        "a benchmark's own layout, evaluate.py has --benchmark."
    )
    classes_file = next((d / "classes.txt" for d in (folder, folder.parent) if (d / "classes.txt").is_file()), None)
    if classes_file is None or not (folder / "images").is_dir() or not (folder / "masks").is_dir():
        raise FileNotFoundError(layout)
    lines = tuple(read_classes(classes_file))
    names, number_of = lines, list(range(len(lines)))
    if classes is not None:
        merged = merge_classes(lines, classes)
        group_of = {line: number for number, group in enumerate(merged.values()) for line in group}
        names, number_of = tuple(merged), [group_of.get(line, VOID) for line in lines]
    table = np.full(256, -1, np.int16)
    table[: min(len(lines), VOID)] = number_of[:VOID]
    table[VOID] = VOID
    pairs = []
    for image in list_images(folder / "images"):
        if not fnmatch.fnmatch(image.stem, include) or any(fnmatch.fnmatch(image.stem, p) for p in exclude or ()):
            continue
        mask = folder / "masks" / f"{image.stem}.png"
        if not mask.is_file():
            raise FileNotFoundError(f"{image} has no mask {mask}. {layout}")
        if pairs and pairs[-1][1] == mask:
            raise ValueError(f"{pairs[-1][0]} and {image} would share the mask {mask}. Rename or remove one of them.")
        pairs.append((image, mask))
    if not pairs:
        raise FileNotFoundError(f"No image of {folder} passes include={include!r}, exclude={exclude!r}.")
    return SegmentationFolder(folder, names, tuple(pairs), table)


def read_image(path: Path) -> Image.Image:
    """An RGB image as the library reads it: upright, transparency on white, 16 bits scaled."""
    return to_rgb(read_upright(path))


def check_sides(decoded: Image.Image, name: str | Path) -> None:
    """
    Raises:
        ValueError: an image that the image processor would refuse, without a name.
    """
    if min(decoded.size) < MIN_SIDE:
        raise ValueError(
            f"{name} has {decoded.height}×{decoded.width} pixels (height × width), and an image at least {MIN_SIDE} a side. "
            "Leave it out with --exclude."
        )


def read_mask(path: Path) -> np.ndarray:
    """A label map `(height, width)` uint8, palette images by their index."""
    with Image.open(path) as mask:
        if mask.mode not in ("L", "P"):
            raise ValueError(f"{path} has mode {mask.mode}; a mask is an 8-bit PNG of class numbers (mode L or P).")
        return np.array(mask)


def check_pairs(
    folder: SegmentationFolder, pairs: Sequence[tuple[Path, Path]], accelerator: Accelerator
) -> list[tuple[Path, Path]]:
    """
    Read images and masks once, every process its share: a bad one ends a run before its work, not in the midst of it.

    Returns:
        The pairs whose mask has a labelled pixel, in their order.

    Raises:
        OSError, ValueError: an image or a mask cannot be read, or they do not fit; or all masks are void.
    """
    share = range(accelerator.process_index, len(pairs), accelerator.num_processes)
    labelled = []
    for number in tqdm(share, desc=f"checking {folder.path.name}", disable=not accelerator.is_main_process):
        image, mask = pairs[number]
        decoded = read_image(image)
        check_sides(decoded, image)
        if (folder.read_mask(mask, decoded.size[::-1]) != VOID).any():
            labelled.append(number)
    labelled = sorted(gather_object(labelled))
    if not labelled:
        raise ValueError(f"All {len(pairs)} masks of {folder.path} are void ({VOID}). Check the masks' values.")
    return [pairs[number] for number in labelled]


def readable_name(name: str) -> str:
    """A data set's class name as a person would write it: `floor-other-merged` -> `floor`."""
    name = re.sub(r"-(merged|other|stuff)\b", "", name)
    return re.sub(r"[-_]+", " ", name).strip().lower()


class ShuffledStream:
    """
    An endless stream of the numbers below `count`, shuffled anew each epoch: `stream[i]` is a function of the seed and i
    alone, whoever asks and in whatever order. An epoch is shuffled once for as long as it is asked for.
    """

    def __init__(self, count: int, seed: str | int):
        self.count, self.seed = count, seed
        self.epoch, self.order = -1, [0]

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self.count)
        if epoch != self.epoch:
            order = list(range(self.count))
            random.Random(f"{self.seed}-{epoch}").shuffle(order)
            self.epoch, self.order = epoch, order
        return self.order[position]


def jitter(pixels: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Light, contrast, colour and white balance of another hour and camera; `(3, height, width)` in 0 to 1."""
    pixels = pixels.clamp(1e-4, 1) ** math.exp(rng.uniform(-0.7, 0.7))
    pixels = pixels * rng.uniform(0.35, 1.3)
    pixels = pixels * torch.tensor([rng.uniform(0.85, 1.15) for _ in range(3)])[:, None, None]
    pixels = (pixels - pixels.mean()) * rng.uniform(0.7, 1.3) + pixels.mean()
    grey = pixels.mean(0, keepdim=True)
    saturation = 0.0 if rng.random() < 0.08 else rng.uniform(0.4, 1.5)
    pixels = grey + (pixels - grey) * saturation
    if rng.random() < 0.2:  # an image that was enlarged, or is out of focus
        small = nn.functional.avg_pool2d(pixels[None], 2)
        pixels = nn.functional.interpolate(small, size=pixels.shape[-2:], mode="bilinear")[0]
    return pixels.clamp(0, 1)


def jitter_image(decoded: Image.Image, seed: int) -> Image.Image:
    """An RGB image after [`jitter`], the same for the same seed."""
    pixels = torch.from_numpy(np.array(decoded)).permute(2, 0, 1).float() / 255  # (3, height, width)
    pixels = jitter(pixels, random.Random(seed)) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())
