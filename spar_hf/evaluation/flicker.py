"""Flicker of label maps: pixels that change their class from one frame to the next although the image does not change."""

import numpy as np
from PIL import Image

TOLERANCE = 8  # levels of 255, about what noise and JPEG change


class Flicker:
    """
    Counts over the frames of a sequence, in their order.

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
        self._before: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, image: Image.Image, label_map: np.ndarray) -> None:
        """
        The next frame.

        Args:
            image: of any mode, in the size of the frame before; another size begins a new sequence.
            label_map: class numbers `(height, width)` in the size of the image.

        Raises:
            ValueError: image and label map differ in size.
        """
        pixels = np.asarray(image.convert("RGB")).astype(np.int16)
        if pixels.shape[:2] != label_map.shape:
            raise ValueError(f"The label map is {label_map.shape}, height first, but the image {pixels.shape[:2]}.")
        if self._before is not None and self._before[0].shape == pixels.shape:
            still = np.abs(pixels - self._before[0]).max(-1) <= self.tolerance
            self.still += int(still.sum())
            self.changed += int((still & (label_map != self._before[1])).sum())
        self._before = pixels, label_map

    @property
    def value(self) -> float:
        """The share, from 0 to 1; NaN if no pixel has stood still."""
        return self.changed / self.still if self.still else float("nan")
