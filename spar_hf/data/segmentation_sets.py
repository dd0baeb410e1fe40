"""Images with masks: the reader that folders, published benchmarks and Hugging Face data sets share."""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from spar_hf.data.reading import ReadingOptions
from spar_hf.data.sources import list_images
from spar_hf.model.image_input import class_numbers, open_image, read_rgb, set_pixel_limit
from spar_hf.model.image_pixels import MIN_SIDE
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.image_files import check_distinct_masks, turned_image_hint
from spar_hf.utils.texts import read_text

IGNORE_INDEX = 255  # label of ignored pixels, which no score counts
WIDE_IGNORE_INDEX = 65535  # the same in sets of more classes than 8-bit masks hold
INVALID = -1  # entry of a table for mask values that must not occur
MASK_MODES = ("L", "P", "I", "I;16")  # one channel of integers; palette images are read by their index


@dataclass(frozen=True)
class SegmentationSet:
    """
    Images with masks, read one at a time.

    Attributes:
        title: name of the set in reports.
        rows: columns `image` and `mask`, both of type `datasets.Image`.
        names: one name per image: the stem of its file, or `row` and a number.
        labels: the classes. Several mask values may mean one class.
        table: class of every mask value, `ignore_index` for ignored pixels, `INVALID` for values that must not occur;
            `(256,)` int16, or `(65536,)` int32 if there are more classes than 8-bit masks hold.
        source: name of the benchmark, id on the Hugging Face hub, or name of the folder.
        split: split that the images belong to, if known.
        subset: configuration of a Hugging Face data set, if one was chosen.
        reading: how image files are read.

    Example:

    ```python
    >>> Image.new("RGB", (3, 2)).save("street.png")
    >>> Image.fromarray(np.array([[0, 1, 1], [0, 1, 255]], np.uint8)).save("mask.png")
    >>> rows = from_files(["street.png"], ["mask.png"])
    >>> data = SegmentationSet("streets", rows, ("street",), ("road", "sky"), make_table(range(2)), "streets")
    >>> image, mask = data.read(0)
    >>> image.size, mask.tolist()
    ((3, 2), [[0, 1, 1], [0, 1, 255]])
    ```"""

    title: str
    rows: datasets.Dataset
    names: tuple[str, ...]
    labels: tuple[str, ...]
    table: np.ndarray
    source: str
    split: str | None = None
    subset: str | None = None
    reading: ReadingOptions = field(default_factory=ReadingOptions)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def ignore_index(self) -> int:
        """Label of ignored pixels: 255, or 65535 if masks have 16 bits."""
        return ignored_label(len(self.table))

    def select(self, numbers: Sequence[int]) -> "SegmentationSet":
        """The images with these numbers, in this order."""
        return replace(self, rows=self.rows.select(numbers), names=tuple(self.names[i] for i in numbers))

    def read_as(self, options: ReadingOptions) -> "SegmentationSet":
        """The same images, read as the options of a command say."""
        reading = ReadingOptions(image_range=options.image_range, max_pixels=options.max_pixels)
        return replace(self, reading=reading)

    def filter(self, include: Sequence[str] = ("*",), exclude: Sequence[str] | None = None) -> "SegmentationSet":
        """
        The images whose name matches one of the shell patterns `include` and none of `exclude`.

        Raises:
            MissingFiles: no image is left.
        """
        kept = [i for i, name in enumerate(self.names) if passes(name, include, exclude)]
        if not kept:
            raise MissingFiles(f"No image of {self.source} passes --include {list(include)} and --exclude {exclude}.")
        return self.select(kept)

    @cached_property
    def _undecoded(self) -> datasets.Dataset:
        """The rows with paths or bytes instead of decoded images."""
        undecoded = datasets.Image(decode=False)
        return self.rows.cast_column("image", undecoded).cast_column("mask", undecoded)

    @property
    def stamp(self) -> str:
        """
        A hash that changes when images or masks change, made without decoding them: of sizes and times of the files, or
        the fingerprint that `datasets` keeps if the images are stored in the data set.
        """
        entries = [entry for name in ("image", "mask") for entry in self._undecoded[name]]
        paths = [entry["path"] for entry in entries if entry and entry["bytes"] is None]
        if not paths:
            return self.rows._fingerprint
        found = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]
        return hashlib.sha256(repr(found).encode()).hexdigest()

    def file(self, number: int, column: str = "image") -> str | bytes:
        """
        The path of an image or mask, or its bytes if they are stored in the data set.

        Raises:
            UsageError: the row has none.
        """
        entry = self._undecoded[number][column]
        if entry is None or not (entry["bytes"] or entry["path"]):
            raise UsageError(f"{self.names[number]} of {self.source} has no {column}.")
        return entry["bytes"] or entry["path"]

    def place(self, number: int) -> str:
        """The path of an image, or its name if it is stored in the data set."""
        file = self.file(number)
        return self.names[number] if isinstance(file, bytes) else str(file)

    @property
    def files(self) -> list[str]:
        """Paths of the images, for the record of a run; numbers where they are stored in the data set."""
        files = (self.file(number) for number in range(len(self)))
        return [str(number) if isinstance(file, bytes) else str(file) for number, file in enumerate(files)]

    def read_image(self, number: int) -> Image.Image:
        """
        An image in RGB, turned as its EXIF orientation says.

        Raises:
            UsageError: it cannot be read.
        """
        set_pixel_limit(self.reading.max_pixels)
        try:
            return read_rgb(self.file(number), self.reading.image_range, urls=False)
        except UsageError:
            raise
        except (ValueError, OSError) as error:
            raise self._unreadable(number, error) from error

    def read_mask(self, number: int, image_size: tuple[int, int] | None = None) -> np.ndarray:
        """
        A mask as a label map of the set's classes, `(height, width)` uint8, or uint16 if there are more than 255.

        Args:
            number: of the image.
            image_size: height and width of the image, to check the mask's size against.

        Raises:
            UsageError: the mask cannot be read, is not a map of class numbers, has another size than its image, or holds a
                value that is no class.
        """
        name, source = self.names[number], self.file(number, "mask")
        set_pixel_limit(self.reading.max_pixels)
        try:
            mask, _ = open_image(source, urls=False)
            mode, values = mask.mode, class_numbers(mask)
        except Exception as error:  # Pillow raises many kinds of errors for damaged files, and its own for huge ones
            raise self._unreadable(number, error) from error
        if mode not in MASK_MODES:
            raise UsageError(
                f"The mask of {name} has mode {mode}; a mask is a PNG of class numbers (mode L or P, one channel)."
            )
        if image_size is not None and values.shape != tuple(image_size):
            hint = turned_image_hint(self.file(number), image_size, values.shape)
            raise UsageError(
                f"The mask of {name} has {values.shape[0]}×{values.shape[1]} pixels (height × width), its image "
                f"{image_size[0]}×{image_size[1]}. {hint or 'Resize the mask to the image by nearest neighbour.'}"
            )
        wrong = [int(v) for v in np.unique(values) if not 0 <= v < len(self.table) or self.table[v] == INVALID]
        if wrong:
            raise UsageError(
                f"The mask of {name} holds the values {wrong}, which {self.title} ({len(self.labels)} classes) does not "
                f"have. Set pixels without a class to an ignored value "
                f"({', '.join(map(str, np.flatnonzero(self.table == self.ignore_index)))})."
            )
        return self.table[values].astype(np.uint8 if self.ignore_index == IGNORE_INDEX else np.uint16)

    def read(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """An image and its mask, see `read_image` and `read_mask`."""
        image = self.read_image(number)
        return image, self.read_mask(number, (image.height, image.width))

    def _unreadable(self, number: int, error: Exception) -> UsageError:
        return UsageError(
            f"Cannot read {self.names[number]} of {self.source} ({type(error).__name__}: {error}). Copy or download it "
            "again, or leave it out with --exclude."
        )


def passes(name: str, include: Sequence[str] = ("*",), exclude: Sequence[str] | None = None) -> bool:
    """
    Whether the last part of an image's name matches one of the shell patterns `include` and none of `exclude`.

    Example:

    ```python
    >>> passes("munster/munster_01", include=["munster_*"]), passes("a_1", exclude=["a_*"])
    (True, False)
    ```"""
    stem = Path(name).name
    included, excluded = (any(fnmatch.fnmatch(stem, p) for p in patterns or ()) for patterns in (include, exclude))
    return included and not excluded


def ignored_label(mask_values: int) -> int:
    """Label of ignored pixels in a set whose masks can hold this many values: the largest of them."""
    return IGNORE_INDEX if mask_values == 256 else WIDE_IGNORE_INDEX


def make_table(
    values: dict[int, int] | range, ignored: Sequence[int] = (IGNORE_INDEX,), mask_values: int = 256
) -> np.ndarray:
    """
    The class of every mask value, as [`SegmentationSet`] holds it.

    Args:
        values: `{mask value: class}`, or a range if every value is the class of the same number.
        ignored: mask values of ignored pixels. All other values become `INVALID`.
        mask_values: 256 for masks of 8 bits, 65536 for masks of 16 bits.

    Example:

    ```python
    >>> make_table(range(2))[[0, 1, 2, 255]].tolist()
    [0, 1, -1, 255]
    ```"""
    table = np.full(mask_values, INVALID, np.int16 if mask_values == 256 else np.int32)
    for value, label in values.items() if isinstance(values, dict) else enumerate(values):
        table[value] = label
    table[list(ignored)] = ignored_label(mask_values)
    return table


def from_files(images: Sequence[str], masks: Sequence[str]) -> datasets.Dataset:
    """The rows of a [`SegmentationSet`] from the paths of its images and masks."""
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return datasets.Dataset.from_dict({"image": list(images), "mask": list(masks)}, features=features)


def read_classes(file: Path) -> list[str]:
    """
    The lines of a `classes.txt`. The number of a line, counted from 0, is the mask value of its class.

    Raises:
        UsageError: an empty line before the last one, or one that begins with `#`; skipping it would shift the classes that
            follow.

    Example:

    ```python
    >>> characters = Path("classes.txt").write_text("road\\nsky")
    >>> read_classes(Path("classes.txt"))
    ['road', 'sky']
    ```"""
    lines = [line.strip() for line in read_text(file).rstrip().splitlines()]
    if not all(lines):
        raise UsageError(
            f"Line {lines.index('') + 1} of {file} is empty. The number of a line, counted from 0, is the mask value of its "
            "class: write a name on every line up to the last class."
        )
    if comment := next((line for line in lines if line.startswith("#")), None):
        raise UsageError(
            f"Line {lines.index(comment) + 1} of {file} begins with #, but the number of a line, counted from 0, is the "
            "mask value of its class: leave comments out."
        )
    return lines


def read_merged_classes(lines: Sequence[str], file: str | Path) -> dict[str, list[str]]:
    """
    Read a JSON file `{class: [line of classes.txt, ...]}` that merges classes.

    Raises:
        UsageError: the file has another form, or a name is not one of `lines` or is given twice.
    """
    try:
        merged = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is not JSON ({error}).") from error
    if not isinstance(merged, dict) or not merged or not all(isinstance(names, list) for names in merged.values()):
        raise UsageError(f"{file} must hold {{class: [line of classes.txt, ...], ...}}.")
    names = [name for group in merged.values() for name in group]
    if unknown := [name for name in names if name not in lines]:
        raise UsageError(f"{file}: {', '.join(map(str, unknown))}: not among the {len(lines)} lines of classes.txt.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{file}: {', '.join(twice)}: named more than once.")
    return merged


def readable_name(name: str) -> str:
    """
    The class name of a data set in plain words, for a text tower.

    Example:

    ```python
    >>> readable_name("floor-other-merged"), readable_name("Sign_Symbol")
    ('floor', 'sign symbol')
    ```"""
    name = re.sub(r"-(merged|other|stuff)\b", "", name)
    return re.sub(r"[-_]+", " ", name).strip().lower()


def class_label(name: str) -> str:
    """
    The label of a class: its [`readable_name`], and `background` for a class called `null`.

    Example:

    ```python
    >>> class_label("null"), class_label("wall-other")
    ('background', 'wall')
    ```"""
    word = readable_name(name)
    return "background" if word == "null" else word


def table_of_lines(lines: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """
    Labels and table of a list of classes in the order of the mask values. Lines with the same label (`wall-merged` and
    `wall-other`) become one class, because no word could tell them apart.

    Raises:
        UsageError: more classes than 8-bit masks can hold.

    Example:

    ```python
    >>> labels, table = table_of_lines(["wall-merged", "dog", "wall-other"])
    >>> labels, table[:3].tolist()
    (('wall', 'dog'), [0, 1, 0])
    ```"""
    if len(lines) > IGNORE_INDEX:
        raise UsageError(
            f"There are {len(lines)} classes, but 8-bit masks hold at most {IGNORE_INDEX}: value {IGNORE_INDEX} is ignored."
        )
    words = [class_label(line) for line in lines]
    labels = tuple(dict.fromkeys(words))
    return labels, make_table({value: labels.index(word) for value, word in enumerate(words)})


def open_folder(
    folder: str | Path,
    classes: str | Path | None = None,
    readable: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | None = None,
) -> SegmentationSet:
    """
    Open a folder with `images/`, `masks/` (8-bit PNG of the same stem, 255 ignored) and `classes.txt`. That file may also
    lie in the parent folder, so that the splits of one set share it.

    Args:
        folder: the folder.
        classes: JSON file that merges lines of `classes.txt`, see [`read_merged_classes`]. Lines that it does not name are
            ignored.
        readable: turn class names into words, see [`table_of_lines`].
        include, exclude: shell patterns of file stems, see [`passes`]. Images that do not pass need no mask.

    Raises:
        MissingFiles: a part of the layout is missing, an image has no mask, or no image is left.
        UsageError: two images have the same stem, also in two sub-folders, `classes.txt` has an empty line, or the file
            `classes` is wrong.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> for name, mode, value in (("images", "RGB", 0), ("masks", "L", 1)):
    ...     Path("street", name).mkdir(parents=True)
    ...     Image.new(mode, (8, 6), value).save(f"street/{name}/a.png")
    >>> characters = Path("street", "classes.txt").write_text("road\\nsky")
    >>> data = open_folder("street")
    >>> image, mask = data.read(0)
    >>> data.labels, image.size, mask.shape, mask[0, 0].item()
    (('road', 'sky'), (8, 6), (6, 8), 1)
    ```"""
    folder = Path(folder)
    layout = (
        f"{folder} must hold `images/`, `masks/` (PNG of the same stem) and `classes.txt` (also in its parent). "
        "To measure on a benchmark in its published layout, use evaluate.py --benchmark."
    )
    classes_file = next((d / "classes.txt" for d in (folder, folder.parent) if (d / "classes.txt").is_file()), None)
    if classes_file is None or not (folder / "images").is_dir() or not (folder / "masks").is_dir():
        raise MissingFiles(layout)
    lines = read_classes(classes_file)
    if classes is not None:
        merged = read_merged_classes(lines, classes)
        group_of = {line: number for number, group in enumerate(merged.values()) for line in group}
        labels = tuple(merged)
        table = make_table({v: group_of.get(line, IGNORE_INDEX) for v, line in enumerate(lines[:IGNORE_INDEX])})
    elif readable:
        labels, table = table_of_lines(lines)
    elif twice := next((line for line in lines if lines.count(line) > 1), None):
        first, second, *_ = (number for number, line in enumerate(lines, 1) if line == twice)
        raise UsageError(
            f"Lines {first} and {second} of {classes_file} are one class, {twice!r}. Give each value of the masks a "
            "class of its own."
        )
    else:
        labels, table = tuple(lines), make_table(range(min(len(lines), IGNORE_INDEX)))
    pairs = _pairs(folder, layout, include, exclude)
    resolved = folder.resolve()
    in_parent = classes_file.parent != folder
    name, split = (resolved.parent.name, resolved.name) if in_parent else (resolved.name, None)
    names = tuple(image.stem for image, _ in pairs)
    rows = from_files([str(image) for image, _ in pairs], [str(mask) for _, mask in pairs])
    return SegmentationSet(name, rows, names, labels, table, name, split)


def _pairs(folder: Path, layout: str, include: Sequence[str], exclude: Sequence[str] | None) -> list[tuple[Path, Path]]:
    """Paths of every image and its mask, sorted."""
    pairs: list[tuple[Path, Path]] = []
    for image in list_images(folder / "images"):
        if not passes(image.stem, include, exclude):
            continue
        mask = folder / "masks" / f"{image.stem}.png"
        if not mask.is_file():
            raise MissingFiles(f"{image} has no mask {mask}. {layout}")
        pairs.append((image, mask))
    if not pairs:
        raise MissingFiles(f"No image of {folder} passes --include {list(include)} and --exclude {exclude}.")
    check_distinct_masks(pairs)
    return pairs


def check_readable(data: SegmentationSet, accelerator: Accelerator) -> list[int]:
    """
    Read all images and masks once, each process its share, so that a damaged file stops a run before its work begins.

    Returns:
        Numbers of the images that have a labelled pixel, in order; the same on every process.

    Raises:
        UsageError: a file cannot be read, an image is too small for the image processor, or a mask does not fit.
    """
    labelled: list[Any] = []
    share = range(accelerator.process_index, len(data), accelerator.num_processes)
    for number in tqdm(share, desc=f"checking {data.title}", disable=not accelerator.is_main_process):
        image, mask = data.read(number)
        if min(image.size) < MIN_SIDE:
            raise UsageError(
                f"{data.names[number]} has {image.height}×{image.width} pixels (height × width), but each side needs at "
                f"least {MIN_SIDE}. Leave it out with --exclude."
            )
        if (mask != data.ignore_index).any():
            labelled.append(number)
    return sorted(gather_object(labelled))


def labelled_images(data: SegmentationSet, accelerator: Accelerator) -> SegmentationSet:
    """
    The images that have a labelled pixel. Reads all of them, see [`check_readable`].

    Raises:
        UsageError: there is none, or see [`check_readable`].
    """
    numbers = check_readable(data, accelerator)
    if not numbers:
        raise UsageError(
            f"No pixel of {data.title} belongs to a class: all are ignored ({data.ignore_index}). Check the values in its "
            "masks, and which classes are left out."
        )
    return data.select(numbers)
