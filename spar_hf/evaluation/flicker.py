"""Flicker of label maps: pixels that change their class from one frame to the next although the image does not change."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import PurePath

import numpy as np
from PIL import Image

from spar_hf.utils.errors import UsageError

TOLERANCE = 8  # levels of 255, about what noise and JPEG change


def is_next_frame(before: str, file: str) -> bool:
    """
    Whether two neighbours in the order of names are frames of one video: they lie in one folder, and their names differ in
    one number only.

    Example:

    ```python
    >>> is_next_frame("val/0016E5_07959.png", "val/0016E5_07961.png"), is_next_frame("a/clip1_99.png", "a/clip2_00.png")
    (True, False)
    >>> is_next_frame("clip1/0001.png", "clip2/0002.png"), is_next_frame("row9", "row10")
    (False, True)
    ```"""
    one, other = PurePath(before), PurePath(file)
    if one.parent != other.parent:
        return False
    parts, others = (re.split(r"(\d+)", path.stem) for path in (one, other))  # every second one is a number
    if parts[::2] != others[::2]:
        return False
    return sum(then != now for then, now in zip(parts[1::2], others[1::2], strict=True)) == 1


def check_frames(places: Iterable[str]) -> None:
    """
    Refuse images of which no two are neighbouring frames: their flicker would be the share of no pixels.

    Args:
        places: paths or names of the images, in the order of their names.

    Raises:
        UsageError: there are no such two.

    Example:

    ```python
    >>> check_frames(["street.png", "clip_1.png", "clip_2.png"])
    ```"""
    if not any(is_next_frame(before, place) for before, place in pairwise(places)):
        raise UsageError(
            "--flicker: no two images are frames of one video: neighbours in the order of names that lie in one folder and "
            "differ in one number, such as clip_001 and clip_002. Rename the frames, or leave out --flicker."
        )


def count_changes(
    before: Image.Image, image: Image.Image, maps: Sequence[tuple[np.ndarray, np.ndarray]], tolerance: int = TOLERANCE
) -> tuple[int, list[int]]:
    """
    Count pixels that stand still between two frames, and those of them that change their class.

    Args:
        before, image: the frames, of any mode; of different sizes no pixel stands still.
        maps: pairs of label maps `(height, width)` of the two frames.
        tolerance: as for [`Flicker`].

    Example:

    ```python
    >>> grey, black = Image.new("L", (2, 1), 100), Image.new("L", (2, 1))
    >>> maps = [(np.array([[0, 1]]), np.array([[0, 0]]))]
    >>> count_changes(grey, grey, maps), count_changes(grey, black, maps)
    ((2, [1]), (0, [0]))
    ```"""
    if before.size != image.size:
        return 0, [0 for _ in maps]
    pixels, earlier = (np.asarray(frame.convert("RGB")).astype(np.int16) for frame in (image, before))
    still = np.abs(pixels - earlier).max(-1) <= tolerance
    return int(still.sum()), [int((still & (then != now)).sum()) for then, now in maps]


class Flicker:
    """
    Counts over the frames of a video, in their order; `begin` separates one from the next.

    A pixel stands still if none of its three channels differs by more than `tolerance` from the frame before. The value is
    the share of the pixels that stand still and yet change their class, over all pairs of neighbouring frames.

    Args:
        tolerance: largest difference of a pixel that stands still, in levels from 0 to 255.

    Example:

    ```python
    >>> flicker, frame = Flicker(), Image.new("RGB", (2, 1))
    >>> for labels in ([[0, 0]], [[0, 1]], [[0, 1]]):
    ...     flicker.add(frame, np.array(labels))
    >>> flicker.value
    0.25
    ```"""

    def __init__(self, tolerance: int = TOLERANCE):
        self.tolerance, self.still, self.changed = tolerance, 0, 0
        self._before: tuple[Image.Image, np.ndarray] | None = None

    def add(self, image: Image.Image, label_map: np.ndarray) -> None:
        """
        The next frame.

        Args:
            image: of any mode, in the size of the frame before; another size begins a new sequence.
            label_map: class numbers `(height, width)` in the size of the image.

        Raises:
            ValueError: image and label map differ in size.
        """
        if label_map.shape != (image.height, image.width):
            raise ValueError(f"The label map is {label_map.shape}, height first, but the image {image.size[::-1]}.")
        if self._before is not None:
            still, (changed,) = count_changes(self._before[0], image, [(self._before[1], label_map)], self.tolerance)
            self.still, self.changed = self.still + still, self.changed + changed
        self._before = image, label_map

    def begin(self) -> None:
        """The next frame is the first one of another video."""
        self._before = None

    @property
    def value(self) -> float:
        """The share, from 0 to 1; NaN if no pixel has stood still."""
        return self.changed / self.still if self.still else float("nan")
