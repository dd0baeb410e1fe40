"""Images with masks: one reader for folders, published benchmarks and Hugging Face data sets."""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from spar_hf.data.sources import list_images
from spar_hf.model.image_input import read_image, to_rgb
from spar_hf.model.image_processing_spar import MIN_SIDE
from spar_hf.utils.errors import MissingFiles, UsageError

IGNORE_INDEX = 255  # label of pixels that do not count
INVALID = -1  # in a table: a mask value that must not occur
MASK_MODES = ("L", "P", "I", "I;16")  # one channel of whole numbers; palette images by their index


@dataclass(frozen=True)
class SegmentationSet:
    """
    Images with masks, read one at a time.

    Attributes:
        title: what reports call the set.
        rows: columns `image` and `mask` of undecoded files.
        names: a name per image, the file stem where there are files.
        labels: the classes; several mask values may be one class.
        table: class of every mask value, `IGNORE_INDEX` for pixels that do not count and `INVALID` for values that must not
            occur; `(256,)` int16.
        source: its name among the benchmarks or on the Hugging Face hub, else its folder's.
        split: which part of it this is, where that is known.
        subset: which configuration of a Hugging Face data set, where it was chosen.
    """

    title: str
    rows: datasets.Dataset
    names: tuple[str, ...]
    labels: tuple[str, ...]
    table: np.ndarray
    source: str
    split: str | None = None
    subset: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def select(self, numbers: Sequence[int]) -> "SegmentationSet":
        """The images of these numbers, in this order."""
        return replace(self, rows=self.rows.select(numbers), names=tuple(self.names[i] for i in numbers))

    def filter(self, include: Sequence[str] = ("*",), exclude: Sequence[str] | None = None) -> "SegmentationSet":
        """
        The images whose stem matches one of the shell patterns `include` and none of `exclude`.

        Raises:
            MissingFiles: no image is left.
        """
        stems = [Path(name).name for name in self.names]
        kept = [i for i, stem in enumerate(stems) if matches(stem, include) and not matches(stem, exclude or ())]
        if not kept:
            raise MissingFiles(f"No image of {self.source} passes include={list(include)}, exclude={exclude}.")
        return self.select(kept)

    @property
    def stamp(self) -> str:
        """
        Changes when images or masks change, without decoding any: hash of the files' sizes and times, or the fingerprint
        that `datasets` keeps of a data set whose images are stored in it.
        """
        entries = [entry for name in ("image", "mask") for entry in self.rows[name]]
        paths = [entry["path"] for entry in entries if entry and entry["bytes"] is None]
        if not paths:
            return self.rows._fingerprint
        found = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]
        return hashlib.sha256(repr(found).encode()).hexdigest()

    def file(self, number: int, column: str = "image") -> str | bytes:
        """
        The path of an image or mask, or its bytes where they are stored in the data set.

        Raises:
            UsageError: the row holds none.
        """
        entry = self.rows[number][column]
        if entry is None or not (entry["bytes"] or entry["path"]):
            raise UsageError(f"{self.names[number]} of {self.source} has no {column}.")
        return entry["bytes"] or entry["path"]

    def read_image(self, number: int) -> Image.Image:
        """
        An image in RGB, upright.

        Raises:
            UsageError: it cannot be read.
        """
        try:
            return to_rgb(read_image(self.file(number)))
        except UsageError:
            raise
        except (ValueError, OSError) as error:
            raise self._unreadable(number, error) from error

    def read_mask(self, number: int, image_size: tuple[int, int] | None = None) -> np.ndarray:
        """
        A mask in the classes of the set, `(height, width)` uint8.

        Args:
            number: which one.
            image_size: height and width of its image, which the mask must have.

        Raises:
            UsageError: a mask that cannot be read, that is no map of class numbers, that has another size than its image, or
                that holds a value which is no class.
        """
        name, source = self.names[number], self.file(number, "mask")
        try:
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as mask:
                mode, values = mask.mode, np.array(mask)
        except Exception as error:  # Pillow raises many kinds for damaged files, and one of its own for huge ones
            raise self._unreadable(number, error) from error
        if mode not in MASK_MODES:
            raise UsageError(
                f"The mask of {name} has mode {mode}; a mask is a PNG of class numbers (mode L or P, one channel)."
            )
        if image_size is not None and values.shape != tuple(image_size):
            raise UsageError(
                f"The mask of {name} has {values.shape[0]}×{values.shape[1]} pixels (height × width), its image "
                f"{image_size[0]}×{image_size[1]}. Resize the mask to the image by nearest neighbour."
            )
        wrong = [int(v) for v in np.unique(values) if not 0 <= v <= 255 or self.table[v] == INVALID]
        if wrong:
            raise UsageError(
                f"The mask of {name} holds the values {wrong}, which {self.title} ({len(self.labels)} classes) does not "
                f"have; ignored are {[int(v) for v in np.flatnonzero(self.table == IGNORE_INDEX)]}."
            )
        return self.table[values].astype(np.uint8)

    def read(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """An image and its mask, see `read_image` and `read_mask`."""
        image = self.read_image(number)
        return image, self.read_mask(number, (image.height, image.width))

    def _unreadable(self, number: int, error: Exception) -> UsageError:
        return UsageError(
            f"Cannot read {self.names[number]} of {self.source} ({type(error).__name__}: {error}). Copy or download it "
            "again, or leave it out with --exclude."
        )


def matches(stem: str, patterns: Sequence[str]) -> bool:
    """Whether a file stem matches one of the shell patterns."""
    return any(fnmatch.fnmatch(stem, pattern) for pattern in patterns)


def make_table(values: dict[int, int] | range, ignored: Sequence[int] = (IGNORE_INDEX,)) -> np.ndarray:
    """
    The table of a set, from `{mask value: class}` or from a range whose values are the classes, and the ignored values.

    Example:

    ```python
    >>> make_table(range(2))[[0, 1, 2, 255]].tolist()
    [0, 1, -1, 255]
    ```"""
    table = np.full(256, INVALID, np.int16)
    for value, label in values.items() if isinstance(values, dict) else enumerate(values):
        table[value] = label
    table[list(ignored)] = IGNORE_INDEX
    return table


def from_files(images: Sequence[str], masks: Sequence[str]) -> datasets.Dataset:
    """The rows of a set from the paths of its images and masks."""
    column = datasets.Image(decode=False)
    features = datasets.Features({"image": column, "mask": column})
    return datasets.Dataset.from_dict({"image": list(images), "mask": list(masks)}, features=features)


def read_classes(file: Path) -> list[str]:
    """
    The lines of a `classes.txt`; the number of a line, from 0, is its class's value in masks.

    Raises:
        UsageError: an empty line before the last one. Passing over it would shift all classes that follow.
    """
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    if not all(lines):
        raise UsageError(
            f"Line {lines.index('') + 1} of {file} is empty. The number of a line, from 0, is its class's value in masks: "
            "name every class up to the last."
        )
    return lines


def read_merged_classes(lines: Sequence[str], file: str | Path) -> dict[str, list[str]]:
    """
    A JSON file `{class: [line of classes.txt, ...]}` that merges classes.

    Raises:
        UsageError: the file has another form, a name is no line, or stands in two classes.
    """
    try:
        merged = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is no JSON ({error}).") from error
    if not isinstance(merged, dict) or not merged or not all(isinstance(names, list) for names in merged.values()):
        raise UsageError(f"{file} must hold {{class: [line of classes.txt, ...], ...}}.")
    names = [name for group in merged.values() for name in group]
    if unknown := [name for name in names if name not in lines]:
        raise UsageError(f"{file}: {', '.join(map(str, unknown))}: no such line among the {len(lines)} of classes.txt.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{file}: {', '.join(twice)}: named more than once.")
    return merged


def readable_name(name: str) -> str:
    """
    A data set's class name as a person would write it.

    Example:

    ```python
    >>> readable_name("floor-other-merged"), readable_name("Sign_Symbol")
    ('floor', 'sign symbol')
    ```"""
    name = re.sub(r"-(merged|other|stuff)\b", "", name)
    return re.sub(r"[-_]+", " ", name).strip().lower()


def class_label(name: str) -> str:
    """A class as a person would call it; `null` says nothing, `background` does."""
    word = readable_name(name)
    return "background" if word == "null" else word


def table_of_lines(lines: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """
    Readable labels and table of a list of classes in the order of the mask values. Lines that read alike (`wall-merged`,
    `wall-other`) are one class: no word could tell them apart.

    Raises:
        UsageError: more classes than 8-bit masks hold.
    """
    if len(lines) > IGNORE_INDEX:
        raise UsageError(
            f"There are {len(lines)} classes, but 8-bit masks hold {IGNORE_INDEX} and the ignored value {IGNORE_INDEX}."
        )
    words = [class_label(line) for line in lines]
    labels = tuple(dict.fromkeys(words))
    return labels, make_table({value: labels.index(word) for value, word in enumerate(words)})


def open_folder(folder: str | Path, classes: str | Path | None = None, readable: bool = False) -> SegmentationSet:
    """
    A folder with `images/`, `masks/` (8-bit PNG of the same stem, 255 ignored) and `classes.txt`, which may also stand in
    the parent, so that splits of one set share it.

    Args:
        folder: the folder.
        classes: JSON file that merges lines of `classes.txt`, see [`read_merged_classes`]; lines that it does not name are
            ignored.
        readable: use class names as words: `floor-other-merged` becomes `floor`, and lines that read alike one class.

    Raises:
        MissingFiles: a part of the layout is missing, or an image has no mask.
        UsageError: two images of one stem, an empty line in `classes.txt`, or a wrong file `classes`.
    """
    folder = Path(folder)
    layout = (
        f"{folder} must hold `images/`, `masks/` (PNG of the same stem) and `classes.txt` (also in its parent). "
        "evaluate.py reads a benchmark's own layout with --benchmark."
    )
    classes_file = next((d / "classes.txt" for d in (folder, folder.parent) if (d / "classes.txt").is_file()), None)
    if classes_file is None or not (folder / "images").is_dir() or not (folder / "masks").is_dir():
        raise MissingFiles(layout)
    lines = read_classes(classes_file)
    if classes is not None:
        merged = read_merged_classes(lines, classes)
        group_of = {line: number for number, group in enumerate(merged.values()) for line in group}
        labels = tuple(merged)
        table = make_table({value: group_of.get(line, IGNORE_INDEX) for value, line in enumerate(lines)})
    elif readable:
        labels, table = table_of_lines(lines)
    else:
        labels, table = tuple(lines), make_table(range(min(len(lines), IGNORE_INDEX)))
    images, masks = zip(*_pairs(folder, layout), strict=True)
    place = folder.resolve()
    name, split = (place.name, None) if (place / "classes.txt").is_file() else (place.parent.name, place.name)
    names = tuple(image.stem for image in images)
    rows = from_files([*map(str, images)], [*map(str, masks)])
    return SegmentationSet(name, rows, names, labels, table, name, split)


def _pairs(folder: Path, layout: str) -> Iterator[tuple[Path, Path]]:
    """Paths of every image and its mask, sorted."""
    last = None
    for image in list_images(folder / "images"):
        mask = folder / "masks" / f"{image.stem}.png"
        if not mask.is_file():
            raise MissingFiles(f"{image} has no mask {mask}. {layout}")
        if last is not None and last[1] == mask:
            raise UsageError(f"{last[0]} and {image} would share the mask {mask}. Rename or remove one of them.")
        last = image, mask
        yield last


def check_readable(data: SegmentationSet, accelerator: Accelerator) -> list[int]:
    """
    Read all images and masks once, each process its share, so that a damaged file ends a run before its work begins.

    Returns:
        The numbers of the images that have a labelled pixel, in order, on every process.

    Raises:
        UsageError: a file cannot be read, an image is too small for the image processor, or a mask does not fit.
    """
    labelled: list[Any] = []
    share = range(accelerator.process_index, len(data), accelerator.num_processes)
    for number in tqdm(share, desc=f"checking {data.title}", disable=not accelerator.is_main_process):
        image, mask = data.read(number)
        if min(image.size) < MIN_SIDE:
            raise UsageError(
                f"{data.names[number]} has {image.height}×{image.width} pixels (height × width), but an image needs "
                f"at least {MIN_SIDE} a side. Leave it out with --exclude."
            )
        if (mask != IGNORE_INDEX).any():
            labelled.append(number)
    return sorted(gather_object(labelled))


def labelled_images(data: SegmentationSet, accelerator: Accelerator) -> SegmentationSet:
    """
    The images that have a labelled pixel, after [`check_readable`].

    Raises:
        UsageError: there is none.
    """
    numbers = check_readable(data, accelerator)
    if not numbers:
        raise UsageError(f"All pixels of {data.title} are ignored ({IGNORE_INDEX}). Check the masks' values.")
    return data.select(numbers)
