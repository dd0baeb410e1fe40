"""Label maps of images that are larger than memory: read by windows, segmented in tiles, written strip by strip."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spar_hf.batch.tiff_files import TiffPixels, georeference, is_tiff, write_label_tiff
from spar_hf.model.image_input import too_many_pixels
from spar_hf.model.image_pixels import token_limit
from spar_hf.model.image_windows import ImageWindows
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.results import check_class_count
from spar_hf.model.segmentation import LabelMap, check_shares, give_to_background
from spar_hf.model.tiling import TiledImage, tiled_blocks
from spar_hf.utils.atomic import write_atomically
from spar_hf.utils.errors import UsageError, as_usage_errors

SUFFIXES = (".tif", ".tiff", ".npy")  # of label maps
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HugeResult:
    """
    What was found in a huge image.

    Attributes:
        labels: the classes, whose numbers are in the label map.
        background: number of the background, -1 if there is none.
        pixels: pixels of each class.
        scores: mean probability of each class over its pixels, 0 where it has none.
        size: height and width of the image.
    """

    labels: list[str]
    background: int
    pixels: list[int]
    scores: list[float]
    size: tuple[int, int]


def open_windows(
    source: str | Path, image_range: tuple[float, float] | None = None, max_pixels: int | None = None
) -> ImageWindows:
    """
    Open an image to be read by windows: a TIFF file (needs the extra `huge`) or an array in a `.npy` file. Other formats,
    such as JPEG and PNG, cannot be read by windows: they are decoded as a whole, within Pillow's limit on pixels.

    Args:
        source: path; of other formats also a URL.
        image_range: see [`ImageWindows`].
        max_pixels: limit on the pixels of an image that is read by windows; none by default, since memory does not depend on
            them.

    Raises:
        ValueError: an image that cannot be read, or that is too large.
        ImportError: a TIFF file without tifffile.
        OSError: the file cannot be opened.
    """
    path = Path(source)
    pixels: Any
    if path.suffix.lower() == ".npy" and path.is_file():
        pixels = map_array(path)
    elif path.is_file() and is_tiff(path):
        pixels = TiffPixels(path)
    else:
        return ImageWindows(str(source), image_range)
    windows = ImageWindows(pixels, image_range)
    height, width = windows.size
    if max_pixels is not None and height * width > max_pixels:
        raise too_many_pixels(repr(str(path)), f"{width} × {height} pixels exceed {max_pixels}.")
    return windows


def map_array(path: Path) -> np.ndarray:
    """
    Map the array of a `.npy` file into memory.

    Raises:
        UsageError: another kind of file, or a damaged one.
    """
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{path} is no array that can be read by windows, or it is damaged: {reason} Write one with `numpy.save`."
        ) from error
    if not isinstance(pixels, np.ndarray):
        pixels.close()
        raise UsageError(f"{path} is an archive of arrays. Write a single one with `numpy.save`.")
    return pixels


class ClassTotals:
    """Pixels and probabilities of each class, summed block by block."""

    def __init__(self, classes: int):
        self.pixels = torch.zeros(classes, dtype=torch.int64)
        self.probability = torch.zeros(classes, dtype=torch.float64)

    def add(self, block: LabelMap) -> None:
        """Add the pixels of a block."""
        flat = block.labels.flatten()
        self.pixels += torch.bincount(flat, minlength=len(self.pixels))
        self.probability += torch.bincount(flat, block.probabilities.flatten().double(), len(self.pixels))

    def give_small(self, background: int, min_area: float) -> torch.Tensor:
        """
        Move classes below a share of the foreground to the background, as [`give_to_background`] does: the new number of
        each class `(classes,)`.
        """
        foreground = self.pixels.clone()
        foreground[background] = 0
        small = foreground < min_area * foreground.sum()
        small[background] = False
        # a moved pixel gets one minus its former probability
        self.probability[background] += (self.pixels - self.probability)[small].sum()
        self.pixels[background] += self.pixels[small].sum()
        self.probability[small], self.pixels[small] = 0, 0
        return torch.arange(len(small)).masked_fill(small, background)

    def scores(self) -> list[float]:
        """Mean probability of each class."""
        return (self.probability / self.pixels.clamp(min=1)).tolist()


def segment_huge(
    segment: Any,
    source: str | Path | ImageWindows,
    target: str | Path,
    candidate_labels: Any,
    tile: Any,
    *,
    templates: Any = None,
    background: Any = None,
    threshold: float = 0.0,
    min_area: float = 0.0,
    max_tokens: int | None = None,
    image_range: tuple[float, float] | None = None,
    max_pixels: int | None = None,
    colours: Callable[[int, int], np.ndarray] | None = None,
    progress: Progress | None = None,
) -> HugeResult:
    """
    Segment an image of any size into a label map on disk. Peak memory is that of one tile, plus, per pixel of the width, the
    rows of features that two rows of tiles share and the rows of labels of one row of tiles.

    Args:
        segment ([`OpenVocabSegmentationPipeline`]): the pipeline.
        source: path, see [`open_windows`], or an open image.
        target: file of the label map, replaced when all of it is written, uint8 up to 256 classes, else uint16. `.tif` is
            tiled and compressed and has the georeference of `source`; `.npy` is an array for `numpy.load(mmap_mode="r")`.
        candidate_labels, tile, templates, background, threshold, min_area, max_tokens: as in the pipeline. With `min_area`
            the map is first written without compression beside `target`, since the rule counts the pixels of all the image.
        image_range: see [`open_windows`]; that of the pipeline's image processor by default.
        max_pixels: see [`open_windows`].
        colours: for TIFF label maps of up to 256 classes: colours `(classes, 3)` uint8, which viewers show, from the number
            of classes and that of the background (-1: none).
        progress: called after each tile with the number of tiles done and of all.

    Raises:
        ValueError: an option, label or image that the pipeline refuses too.
        ImportError: TIFF files without tifffile.
        OSError: the disk is full, or a file cannot be opened.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> np.save("aerial.npy", np.zeros((96, 160, 3), np.uint8))
    >>> segment = pipeline("open-vocab-segmentation")
    >>> tile = {"size": 64, "overlap": 16}
    >>> found = segment_huge(segment, "aerial.npy", "map.npy", ["road", "roof"], tile, templates="plain")
    >>> sum(found.pixels), np.load("map.npy", mmap_mode="r").shape
    (15360, (96, 160))
    ```"""
    check_shares(threshold=threshold, min_area=min_area)
    target = Path(target)
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"The label map {target} must end in {', '.join(SUFFIXES)}.")
    image_range = segment.image_processor.image_range if image_range is None else image_range
    windows = source if isinstance(source, ImageWindows) else open_windows(source, image_range, max_pixels)
    segment.texts.refresh()  # reads the weights of the text tower
    rules = bool(threshold or min_area)
    vocabulary, labels, background_class = segment.classes(
        Vocabulary.parse(candidate_labels), background, rules, templates
    )
    with as_usage_errors():
        check_class_count(len(labels))
    limit = token_limit(max_tokens, segment.image_processor.max_tokens)
    tiled = TiledImage.make(windows, tile, segment.model.config.patch_size, limit)
    blocks = tiled_blocks(segment, tiled, vocabulary, templates, progress)
    size, dtype = tiled.plan.size, np.uint8 if len(labels) <= 256 else np.uint16
    totals = ClassTotals(len(labels))
    strips = label_strips(blocks, size[1], dtype, totals, background_class, threshold)

    def write(temporary: Path) -> None:
        with contextlib.ExitStack() as stack:
            rows = strips
            if min_area:
                rows = stack.enter_context(after_all(strips, size, dtype, target.parent))
                numbers = totals.give_small(background_class, min_area).numpy().astype(dtype)
                rows = (numbers[strip] for strip in rows)
            if target.suffix.lower() == ".npy":
                write_label_array(temporary, rows, size, dtype)
            else:
                path = None if isinstance(source, ImageWindows) else Path(source)
                tags = georeference(path) if path is not None and path.is_file() else []
                shown = None if colours is None else colours(len(labels), background_class)
                write_label_tiff(temporary, rows, size, dtype, labels, tags, shown)

    if target.suffix.lower() == ".npy":
        check_space(target.parent, size, dtype, "The label map")
    try:
        write_atomically(target, write)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
            error.filename = str(target)  # so that the message says what does not fit
        raise
    return HugeResult(labels, background_class, totals.pixels.tolist(), totals.scores(), size)


def check_space(folder: Path, size: tuple[int, int], dtype: Any, what: str) -> None:
    """
    Raises:
        UsageError: the disk has no room for a label map without compression.
    """
    needed = size[0] * size[1] * np.dtype(dtype).itemsize
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    if shutil.disk_usage(there).free < needed:
        raise UsageError(
            f"{what} takes {needed / 2**30:.1f} GiB in {folder}, and less is free. Write to another disk, or a compressed "
            "TIFF without `min_area`."
        )


def label_strips(
    blocks: Iterator[tuple[slice, slice, LabelMap]],
    width: int,
    dtype: Any,
    totals: ClassTotals,
    background: int,
    threshold: float,
) -> Iterator[np.ndarray]:
    """Rows of the label map, `(rows, width)` for each row of tiles; `totals` counts them."""
    strip: np.ndarray | None = None
    for rows, columns, block in blocks:
        block = LabelMap(block.labels.cpu(), block.probabilities.cpu())
        if threshold:
            give_to_background(block, background, threshold)
        totals.add(block)
        if strip is None:
            strip = np.empty((rows.stop - rows.start, width), dtype)
        strip[:, columns] = block.labels.numpy()
        if columns.stop == width:
            yield strip
            strip = None


@contextlib.contextmanager
def after_all(
    strips: Iterator[np.ndarray], size: tuple[int, int], dtype: Any, folder: Path
) -> Iterator[Iterator[np.ndarray]]:
    """
    The strips once more, after the last one has been computed, from a temporary file in `folder`.

    Raises:
        UsageError, OSError: the disk is full, before the first strip or later.
    """
    check_space(folder, size, dtype, "The first version of the label map, which `min_area` needs,")
    with tempfile.TemporaryFile(dir=folder) as file:  # a file without a name, which no killed run leaves behind
        heights = []
        for strip in strips:
            file.write(strip.data)
            heights.append(len(strip))
        file.seek(0)
        yield (
            np.frombuffer(file.read(height * size[1] * np.dtype(dtype).itemsize), dtype).reshape(height, size[1])
            for height in heights
        )


def write_label_array(path: Path, strips: Iterator[np.ndarray], size: tuple[int, int], dtype: Any) -> None:
    """
    Write strips as a `.npy` file. They are written to a plain file: a full disk under a memory map would end the process.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": size}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for strip in strips:
            file.write(np.ascontiguousarray(strip).data)


__all__ = ["HugeResult", "open_windows", "segment_huge"]
