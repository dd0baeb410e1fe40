"""Frames of animations and pages of TIFF files: which are chosen, and how they are read one after the other."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from spar_hf.model.image_input import ImageRange, has_more_frames, open_image, to_rgb, turn_upright
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage
from spar_hf.utils.remote_files import is_remote, read_remote


def parse_frames(text: str) -> slice:
    """
    Parse the option `--frames`: a number, a range `FIRST:END:STEP` as in Python, or `all`. Negative numbers count from the
    end.

    Raises:
        UsageError: anything else.

    Example:

    ```python
    >>> parse_frames("3"), parse_frames("-1"), parse_frames("0:10:2"), parse_frames("all")
    (slice(3, 4, None), slice(-1, None, None), slice(0, 10, 2), slice(None, None, None))
    ```"""
    text = text.strip().lower()
    if text == "all":
        return slice(None)
    if re.fullmatch(r"-?\d+", text):
        return slice(int(text), int(text) + 1 or None)
    parts = text.split(":")
    if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"(-?\d+)?", part) for part in parts) or parts[2:] == ["0"]:
        raise UsageError(f"--frames {text!r} must be a number, FIRST:END, FIRST:END:STEP or all. Frames count from 0.")
    return slice(*(int(part) if part else None for part in parts))


def choose_frames(images: Sequence[InputImage], frames: slice) -> tuple[list[InputImage], list[tuple[str, str]]]:
    """
    The chosen frames of each file, in their order. Names of their results get the number of the frame: `clip-0003`; those of
    a file with a single frame do not.

    Returns:
        The frames; and every file that cannot be read or has none of them, with the reason.
    """
    found: list[InputImage] = []
    problems = []
    for image in images:
        try:
            opened, _ = open_source(image.source)
            count = getattr(opened, "n_frames", 1)
        except (ValueError, OSError, EOFError) as error:
            problems.append((image.source, str(error)))
            continue
        numbers = range(count)[frames]
        if not numbers:
            problems.append((image.source, f"{image.source} has {count} frames, none of them chosen by --frames."))
        path = PurePosixPath(image.name)
        for number in numbers:
            name = path if count == 1 else path.with_name(f"{path.name}-{number:04}")
            found.append(InputImage(image.source, str(name), number))
    return found, problems


def open_source(source: str) -> tuple[Image.Image, str]:
    """[`open_image`], also of files in stores such as `s3://`."""
    if is_remote(source):
        opened, _ = open_image(read_remote(source))
        return opened, source
    return open_image(source)


class ImageReader:
    """
    Reads images and frames. A file stays open for its next frame, since frames of animations build on earlier ones.

    Attributes:
        image_range: values of black and white of images of floats or more than 8 bits, see [`to_rgb`].
        only_first: a file with several frames of which just the first was read, because none was chosen.
    """

    def __init__(self, image_range: ImageRange | None = None):
        self.image_range, self.only_first = image_range, ""
        self._source, self._opened, self._name = "", Image.new("L", (1, 1)), ""

    def rgb(self, image: Image.Image) -> Image.Image:
        """What was read, in 8-bit RGB, for pictures of it."""
        return to_rgb(image, self.image_range)

    def read(self, image: InputImage) -> Image.Image:
        """
        Read one, the first frame of a plain file: upright, in the mode of the file, since the model sees more than 8 bits.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        if image.source != self._source:
            self._source = ""
            self._opened, self._name = open_source(image.source)
            self._source = image.source if image.frame is not None else ""
        if image.frame is not None:
            name = f"frame {image.frame} of {self._name}"
            try:
                self._opened.seek(image.frame)
            except (EOFError, OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"Cannot read {name}: {error}. The file is damaged.") from error
            return turn_upright(self._opened, name)
        if has_more_frames(self._opened):
            self.only_first = self.only_first or image.source
        return turn_upright(self._opened, self._name)


@dataclass
class ReadPicture:
    """
    An image that was read for the model and for its results.

    Attributes:
        image: in RGB.
        pixel_values: normalised pixels `(1, 3, height, width)`.
        original_size: height and width of `image`.
        only_first: the file, if it has several frames of which just the first was read.
    """

    image: Image.Image
    pixel_values: Any
    original_size: tuple[int, int]
    only_first: str


@dataclass
class ReadWithPixels:
    """Reads an image of a run, in the processes that read ahead of the model."""

    reader: ImageReader
    prepare: Callable[[Any], Any]

    def __call__(self, image: InputImage) -> ReadPicture:
        read = self.reader.read(image)
        prepared = self.prepare(read)
        height, width = prepared.record["original_size"]
        return ReadPicture(self.reader.rgb(read), prepared.pixel_values, (height, width), self.reader.only_first)
