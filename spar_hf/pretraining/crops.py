"""Training crops of the pre-training: sets held in memory, and batches that depend on the seed and the step alone."""

import math
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from spar_hf.data.augmentation import jitter
from spar_hf.data.order import split_held_out
from spar_hf.data.reading import ReadingOptions
from spar_hf.data.segmentation_sets import IGNORE_INDEX, SegmentationSet, open_folder, readable_name
from spar_hf.data.sources import list_images
from spar_hf.model.image_input import read_rgb, set_pixel_limit
from spar_hf.pretraining.options import BALANCE, UNNAMED_WEIGHT
from spar_hf.utils.errors import UsageError, as_usage_errors
from spar_hf.utils.sample_record import split_as_before

LABEL_GRID = 4  # pixels of a crop per label, along each side
MASK_STRIDE = 4  # masks are searched for a class at each so-many-th pixel


class CropSet:
    """
    A set of images in memory, and square crops of it.

    Args:
        images: `(height, width, 3)` uint8 each.
        masks: classes `(height, width)` uint8 each, 255 ignored; `None` for tagged images, which have a name and no mask.
        names: words of each class, or of each tagged image; empty for classes that no word may stand for.
        spec: the set's entry in the recipe: `weight`, `crop` (smallest and largest side in pixels), `even_classes`,
            `balance` (power of a class's share of the pixels that its weight falls with), `unnamed_weight` (of a
            pixel of the unnamed class).
        unnamed: class of the pixels that belong to none of the other classes, and
        unnamed_word: the set's word for it, such as "background".
        files: names of the images, and
        held_out: of those of the same folder that are held out; for the record of a run.
    """

    def __init__(
        self,
        images: list[np.ndarray],
        masks: list[np.ndarray] | None,
        names: list[list[str]],
        spec: dict[str, Any],
        unnamed: int | None = None,
        unnamed_word: str | None = None,
        files: Sequence[str] = (),
        held_out: Sequence[str] = (),
    ):
        self.files, self.held_out = files, held_out
        self.images, self.masks, self.names = images, masks, names
        self.unnamed, self.unnamed_word = unnamed, unnamed_word
        self.unnamed_weight = spec.get("unnamed_weight", UNNAMED_WEIGHT)
        self.weight, self.crop = spec["weight"], spec["crop"]
        self.images_of: dict[int, list[int]] = {}  # class -> numbers of the images that hold it
        if masks is not None:
            counts = np.stack([np.bincount(mask.ravel(), minlength=256)[: len(names)] for mask in masks])
            if spec.get("even_classes"):
                holding = {c: np.flatnonzero(counts[:, c]).tolist() for c, words in enumerate(names) if words}
                self.images_of = {c: numbers for c, numbers in holding.items() if numbers}
            pixels = counts.sum(0)
            share = np.maximum(pixels / max(pixels.sum(), 1), 1e-5)
            weights = share ** -spec.get("balance", BALANCE)
            self.class_weights = torch.tensor(weights / (weights * share).sum(), dtype=torch.float32).clamp(max=8)

    def __len__(self) -> int:
        return len(self.images)

    def draw_image(self, rng: random.Random) -> int:
        """
        Number of an image. With `even_classes` a class is drawn first, by the square root of the number of its images, and
        then one that holds it: rare classes are not crowded out, and a class of five images is not half of what is seen.
        """
        if self.images_of:
            odds = [math.sqrt(len(numbers)) for numbers in self.images_of.values()]
            (images,) = rng.choices(list(self.images_of.values()), odds)
            return rng.choice(images)
        return rng.randrange(len(self.images))

    def cut(self, rng: random.Random, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        A crop and its labels.

        Returns:
            Pixels `(3, window, window)` in -1 to 1; and labels `(grid, grid)` int64, where `grid` is `window / LABEL_GRID`,
            or the number of a tagged image.
        """
        index = self.draw_image(rng)
        source = self.images[index]
        box = self._draw_box(rng, index)
        flip = rng.random() < 0.5
        image = np.asarray(Image.fromarray(source).resize((window, window), Image.Resampling.BICUBIC, box=box))
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255  # (3, window, window)
        pixels = jitter(pixels, rng)
        if self.masks is None:
            label = torch.tensor(index)
        else:
            grid = window // LABEL_GRID
            mask = Image.fromarray(self.masks[index]).resize((grid, grid), Image.Resampling.NEAREST, box=box)
            label = torch.from_numpy(np.asarray(mask).astype(np.int64))  # (grid, grid)
        if flip:
            pixels, label = pixels.flip(-1), label.flip(-1) if label.ndim else label
        return pixels * 2 - 1, label

    def _draw_box(self, rng: random.Random, index: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a crop; half of them hold a pixel of a class drawn from those in the image."""
        height, width = self.images[index].shape[:2]
        low, high = self.crop
        side = min(math.exp(rng.uniform(math.log(low), math.log(high))), height, width)
        aspect = math.exp(rng.uniform(-0.15, 0.15))
        crop_height, crop_width = min(side * aspect, height), min(side / aspect, width)
        top, left = rng.uniform(0, height - crop_height), rng.uniform(0, width - crop_width)
        if self.masks is not None and rng.random() < 0.5:  # small classes, poles and riders, would be seen too rarely
            mask = self.masks[index][::MASK_STRIDE, ::MASK_STRIDE]
            present = [c for c in np.unique(mask) if c not in (IGNORE_INDEX, self.unnamed)]
            rows, columns = np.nonzero(mask == rng.choice(present or [IGNORE_INDEX]))
            if len(rows):
                k = rng.randrange(len(rows))
                top = min(max(rows[k] * MASK_STRIDE - crop_height * rng.random(), 0), height - crop_height)
                left = min(max(columns[k] * MASK_STRIDE - crop_width * rng.random(), 0), width - crop_width)
        return left, top, left + crop_width, top + crop_height


class CropBatches(Dataset):
    """
    Item i is batch i: a list with pixels and labels of every set. It depends on the seed and i, whatever the worker.

    The sets share the `batch_size` crops of a batch by their weights; each gets at least one. Crops are squares of one of
    `sides` in pixels: the same in a batch, and in the batches that `processes` take for one step, so that none waits.

    Raises:
        UsageError: a batch has fewer crops than there are sets.
    """

    def __init__(
        self, sets: list[CropSet], batch_size: int, sides: Sequence[int], steps: int, seed: int, processes: int = 1
    ):
        self.sets, self.sides, self.steps, self.seed, self.processes = sets, sides, steps, seed, processes
        if batch_size < len(sets):
            raise UsageError(f"--batch_size {batch_size} is less than a crop of each of the recipe's {len(sets)} sets.")
        total = sum(s.weight for s in sets)
        self.counts = [1] * len(sets)
        while sum(self.counts) < batch_size:  # the next crop is of the set that lacks most of its share
            lacking = [batch_size * s.weight / total - count for s, count in zip(sets, self.counts, strict=True)]
            self.counts[lacking.index(max(lacking))] += 1

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rng = random.Random(f"{self.seed}-{step}")
        side = random.Random(f"side-{self.seed}-{step // self.processes}").choice(self.sides)
        groups = []
        for crop_set, count in zip(self.sets, self.counts, strict=True):
            crops = [crop_set.cut(rng, side) for _ in range(count)]
            pixels, labels = (torch.stack(parts) for parts in zip(*crops, strict=True))
            if crop_set.masks is not None and rng.random() < 0.3:
                pixels, labels = paste_box(pixels, labels, rng)
            groups.append((pixels, labels))
        return groups


def paste_box(pixels: torch.Tensor, labels: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """CutMix (Yun et al., 2019) for label maps: every crop gets a box of its neighbour in the batch."""
    grid = labels.shape[-1]
    height, width = (rng.randint(grid // 4, grid // 2) for _ in range(2))
    top, left = rng.randint(0, grid - height), rng.randint(0, grid - width)
    labels, pixels, scale = labels.clone(), pixels.clone(), LABEL_GRID
    labels[:, top : top + height, left : left + width] = labels.roll(1, 0)[:, top : top + height, left : left + width]
    rows = slice(top * scale, (top + height) * scale)
    columns = slice(left * scale, (left + width) * scale)
    pixels[:, :, rows, columns] = pixels.roll(1, 0)[:, :, rows, columns]
    return pixels, labels


def load_sets(
    root: Path,
    recipe: dict[str, Any],
    held_out: Collection[str] | None = None,
    reading: ReadingOptions | None = None,
) -> list[CropSet]:
    """
    Read every set of a recipe into memory. Held-out words are removed from every label, held-out images from every set.

    Args:
        root: folder that the paths of the recipe are relative to.
        recipe: sets and words.
        held_out: names of the images that an earlier run held out, in place of the rule of the recipe.
        reading: how image files are read.

    Raises:
        UsageError: images or masks do not fit, or the recipe names a class that a set does not have.
    """
    reading = reading or ReadingOptions()
    folders = [
        open_folder(root / spec["path"]).filter(exclude=spec.get("exclude")).read_as(reading) for spec in recipe["sets"]
    ]
    if held_out is None:  # an image of several sets is held out of all of them
        held_out = {
            file
            for data, spec in zip(folders, recipe["sets"], strict=True)
            for file in data.select(split_held_out(len(data), spec.get("holdout_every", 0))[1]).files
        }
    sets = [
        load_masked_set(root, spec, recipe, data, held_out) for spec, data in zip(recipe["sets"], folders, strict=True)
    ]
    return sets + [load_tagged_set(root, spec, recipe, reading, held_out) for spec in recipe.get("tagged", [])]


def load_masked_set(
    root: Path, spec: dict[str, Any], recipe: dict[str, Any], data: SegmentationSet, held_out_files: Collection[str]
) -> CropSet:
    """Images with masks; pixels of held-out classes are ignored, and with `labels: false` those of all classes."""
    files = data.files
    train, rest = split_as_before(files, held_out_files)
    data = data.select(train)
    words, unnamed = [readable_name(name) for name in data.labels], spec.get("unnamed")
    if unnamed is not None and unnamed not in words:
        raise UsageError(f"{root / spec['path']}: unnamed: {unnamed!r} is no class. Use one of: {', '.join(words)}.")
    held_out = {word.lower() for word in recipe["held_out"]}
    if not len(data):
        raise UsageError(f"{root / spec['path']} leaves no image to train on: all are held out or excluded.")
    labels = np.full(256, IGNORE_INDEX, np.uint8)
    names = []
    for number, word in enumerate(words):
        # "null" says nothing to a reader; its synonyms do
        alike = [name for name in (word, *recipe["synonyms"].get(word, [])) if name.lower() not in held_out | {"null"}]
        names.append([] if word in held_out or word == unnamed else alike)
        if spec.get("labels", True) and (names[number] or word == unnamed) and word not in held_out:
            labels[number] = number
    images, masks = [], []
    for number in tqdm(range(len(data)), desc=spec["path"]):
        image, mask = data.read(number)
        images.append(np.asarray(image))
        masks.append(labels[mask])
    rest_class = None if unnamed is None else words.index(unnamed)
    own, held = ([files[number] for number in numbers] for numbers in (train, rest))
    return CropSet(images, masks, names, spec, rest_class, unnamed, own, held)


def load_tagged_set(
    root: Path, spec: dict[str, Any], recipe: dict[str, Any], reading: ReadingOptions, held_out_files: Collection[str]
) -> CropSet:
    """
    Images without masks that are named in their file names, `PREFIX_NAME.jpg`; those of held-out names and the held-out
    images of the other sets are left out.
    """
    held_out = {word.lower() for word in recipe["held_out_tags"]}
    images, names, files = [], [], []
    set_pixel_limit(reading.max_pixels)
    paths = list_images(root / spec["path"])
    kept, _ = split_as_before(map(str, paths), held_out_files)
    for path in tqdm([paths[number] for number in kept], desc=spec["path"]):
        prefix, _, name = path.stem.partition("_")
        if not name:
            raise UsageError(f"{path} has no name after a prefix. Call it PREFIX_NAME, such as n01_{path.name}.")
        if readable_name(name) in held_out:
            continue
        groups = [
            word for first, last, word in recipe["groups"] if first <= prefix <= last and word.lower() not in held_out
        ]
        with as_usage_errors():
            images.append(np.asarray(read_rgb(path, reading.image_range, urls=False)))
        names.append([readable_name(name), *groups])
        files.append(str(path))
    if not images:
        raise UsageError(f"{root / spec['path']} leaves no image to train on: the names of all are held out.")
    return CropSet(images, None, names, spec, files=files)
