"""Images that are read window by window: memory maps, arrays of zarr or HDF5, TIFF files, or decoded images in memory."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from .image_input import (
    CHANNEL_COUNTS,
    UPPER_BYTES,
    ImageRange,
    array_to_rgb,
    check_range,
    float_to_rgb,
    is_encoded,
    native_order,
    read_image,
    to_channels_last,
    to_rgb,
    turn_upright,
)
from .image_levels import AMBIGUOUS_LEVELS, check_sixteen_bits, round_to_eight_bits, scale_range, to_eight_bits

STRIP_PIXELS = 2**22  # that are read at once to find the range of values
SAMPLES = 16  # rows of pixels that tell whether a stated range fits


class ImageWindows:
    """
    An image that is read in windows, as RGB. Only the window is converted, and for arrays that lie on a disk only the window
    is read, so that memory does not depend on the size of the image.

    Args:
        source:
            An array `(height, width)` or `(height, width, channels)` with `shape`, `dtype` and slices: NumPy's memory maps,
            zarr, h5py. NumPy arrays may have their channels first. A PIL image, path, URL, bytes or open file is decoded as
            a whole, since JPEG and PNG cannot be read by windows; Pillow's limit on pixels applies.
        image_range (`(float, float)`, *optional*):
            Black and white of floats and of more than 8 bits, as in the pipeline. Values outside become 0 or 1, also where
            all of a window lies outside. Without it, 16-bit arrays are read until a value shows that all 16 bits are used.

    Raises:
        ValueError: an image or range that [`SparImageProcessorPil`] refuses too.

    Example:

    ```python
    >>> windows = ImageWindows(np.zeros((300, 400, 3), np.uint8))
    >>> windows.size, windows.read(0, 100, 200, 400).shape
    ((300, 400), (200, 300, 3))
    ```"""

    def __init__(self, source: Any, image_range: ImageRange | None = None):
        self.image_range = check_range(image_range)
        self.image: Image.Image | None = None
        self.size: tuple[int, int]
        if is_encoded(source):
            source = read_image(source)
        if isinstance(source, torch.Tensor):
            source = source.detach().cpu()
            source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
        if isinstance(source, Image.Image):
            source = self._of_pillow(turn_upright(source))
        if self.image is not None:
            self.size = self.image.height, self.image.width
            return
        self.pixels: Any = to_channels_last(source) if isinstance(source, np.ndarray) else source
        shape = tuple(getattr(self.pixels, "shape", ()))
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in CHANNEL_COUNTS):
            raise ValueError(
                f"Windows are read from an image or an array (height, width) or (height, width, channels) with 1, 3 or 4 "
                f"channels, not from {type(source).__name__} of shape {shape}."
            )
        self.size = shape[0], shape[1]
        if self.image_range is not None:
            self._check_range(self.image_range)
        elif self.pixels.dtype.newbyteorder("=") == np.uint16:
            self._check_levels()

    def _of_pillow(self, image: Image.Image) -> np.ndarray | None:
        """Keep an image of 8 bits as it is; the array of one with more, whose range is that of all its pixels."""
        if UPPER_BYTES in image.info or (image.mode.startswith("I") and "transparency" in image.info):
            image = to_rgb(image, self.image_range)
        if not (image.mode == "F" or image.mode.startswith("I")):
            self.image = image
            return None
        values = np.asarray(image)
        return values if image.mode == "F" or self.image_range is not None else to_eight_bits(values)

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """
        A window in RGB: `(bottom - top, right - left, 3)`, uint8 or float32 from 0 to 1.

        Raises:
            ValueError: pixels that cannot be converted, such as NaN.
        """
        if self.image is not None:
            return np.asarray(to_rgb(self.image.crop((left, top, right, bottom))))
        window = self._array(top, left, bottom, right)
        if window.dtype in (np.uint8, bool):
            return array_to_rgb(window)
        if self.image_range is not None:
            alpha = window.shape[2] == 4 and np.issubdtype(window.dtype, np.floating)  # 0 to 1, whatever the range is
            colours = window[:, :, :3] if alpha else window
            inside = colours.clip(*self.image_range)  # NaN stays, and is refused
            scaled = scale_range(inside, self.image_range)
            return float_to_rgb(np.concatenate([scaled, window[:, :, 3:]], 2) if alpha else scaled)
        return array_to_rgb(round_to_eight_bits(window) if window.dtype == np.uint16 else window)

    def _array(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """A window as it is stored, `(height, width, channels)`."""
        window = native_order(np.asarray(self.pixels[top:bottom, left:right]))
        return window[:, :, None] if window.ndim == 2 else window

    def _check_levels(self) -> None:
        """Refuse 16-bit levels that may have fewer bits."""
        height, width = self.size
        rows, highest = max(1, STRIP_PIXELS // width), 0
        for top in range(0, height, rows):
            colours = self._array(top, 0, min(top + rows, height), width)[:, :, :3]
            highest = max(highest, int(colours.max(initial=0)))
            if highest >= AMBIGUOUS_LEVELS:
                return
        check_sixteen_bits(0, highest)

    def _check_range(self, image_range: tuple[float, float]) -> None:
        """Refuse a range that most of the pixels lie outside of."""
        if self.pixels.dtype not in (np.uint8, bool):
            height, width = self.size
            rows = np.linspace(0, height - 1, min(SAMPLES, height)).astype(int).tolist()
            sample = np.concatenate([self._array(row, 0, row + 1, width)[:, :, :3] for row in rows])
            scale_range(sample, image_range)


__all__ = ["ImageWindows"]
