"""
From an image to the pixels a model sees: size rule, resizing with Pillow, rescaling, normalisation. The image processor and
the runtime without torch both use it, so this file imports neither torch nor transformers.
"""

import math
import operator
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from .image_input import ImageRange, array_to_rgb, is_tensor, to_channels_last, to_rgb, turn_upright

MAX_TOKENS = 16_384  # 2048 × 2048 pixels at a patch of 16
MIN_SIDE = 2  # pixels; thinner inputs are mostly arrays with their axes in the wrong order
SIZE_KEYS = ({"shortest_edge"}, {"longest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"})
TOO_MANY_PATCHES = (
    "Images of more than {} patches are made smaller. For more detail raise `max_tokens`, if memory and time allow; to "
    "avoid this message set a smaller `size`."
)

Size = Any  # a dict of one of `SIZE_KEYS`, or transformers' SizeDict


def as_whole(number: Any) -> Any:
    """
    An integer of NumPy or torch as `int`; anything else as it is.

    Example:

    ```python
    >>> as_whole(np.int64(384)), as_whole("native"), as_whole(0.5)
    (384, 'native', 0.5)
    ```"""
    # an array of several numbers has `__index__` too, and is one of the other things
    single = not isinstance(number, bool) and hasattr(number, "__index__") and getattr(number, "ndim", 0) == 0
    try:
        return operator.index(number) if single else number
    except TypeError:  # a tensor or an array of one float
        return number


def is_count(number: Any) -> bool:
    """Whether a value is an integer of at least 1, and not `True`."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def check_count(name: str, number: Any) -> None:
    """Raises ValueError if a number is neither `None` nor an integer of at least 1."""
    if number is not None and not is_count(number):
        raise ValueError(f"`{name}` is {number!r}; it must be an integer of at least 1, or None.")


def token_limit(*limits: int | None) -> int:
    """The most patches of an image: the first limit that is given, or `MAX_TOKENS`."""
    return next((limit for limit in limits if limit is not None), MAX_TOKENS)


def check_size(size: Any) -> dict[str, int] | None:
    """
    A working size as a dict of one of `SIZE_KEYS`; `None` is the image's own size.

    Raises:
        ValueError: anything but `None`, `"native"`, a number, a pair of numbers or such a dict.

    Example:

    ```python
    >>> check_size(384), check_size((480, 640)), check_size("native")
    ({'shortest_edge': 384}, {'height': 480, 'width': 640}, None)
    ```"""
    if size is None or size == "native":
        return None
    sides: Any = as_whole(size)
    if isinstance(sides, int):
        sides = {"shortest_edge": sides}
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        sides = {"height": size[0], "width": size[1]}
    known = isinstance(sides, Mapping) and set(sides) in SIZE_KEYS
    sides = {name: as_whole(side) for name, side in sides.items()} if known else {}
    if not sides or not all(map(is_count, sides.values())):
        raise ValueError(
            f"`size` is {size!r}; it must be None or 'native' (the image's own size), a number (the shorter side), a pair "
            f"(height, width), or a dict with one of the key sets {[sorted(keys) for keys in SIZE_KEYS]}, in integers of at "
            "least 1 pixel."
        )
    return sides


def resized_size(height: int, width: int, size: Size) -> tuple[int, int]:
    """
    The `(height, width)` of an image resized as `size` says. If the aspect ratio is kept, each side is rounded to the
    nearest pixel by itself (halves up) and is at least 1.
    """
    sides = dict(size)
    if "height" in sides and "width" in sides:
        return sides["height"], sides["width"]
    scales = []
    if "shortest_edge" in sides:
        scales.append(Fraction(sides["shortest_edge"], min(height, width)))
    if "longest_edge" in sides:
        scales.append(Fraction(sides["longest_edge"], max(height, width)))
    scale = min(scales)
    new_height, new_width = (max(1, math.floor(side * scale + Fraction(1, 2))) for side in (height, width))
    return new_height, new_width


def limited_size(height: int, width: int, patch_size: int, max_tokens: int) -> tuple[int, int]:
    """
    A working size of at most `max_tokens` patches, counting partial ones: `(height, width)` itself if it fits, else both
    sides times `sqrt(max_tokens * patch_size² / (height * width))`, each rounded down to whole patches, at least one and at
    most `max_tokens`.
    """
    if -(-height // patch_size) * -(-width // patch_size) <= max_tokens:
        return height, width
    scale = math.sqrt(max_tokens / (height * width))  # in patches per pixel
    rows, columns = (min(max(1, math.floor(side * scale)), max_tokens) for side in (height, width))
    return rows * patch_size, columns * patch_size


def working_size(
    height: int, width: int, size: Size | None, max_tokens: int | None, patch_size: int | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """
    The `(height, width)` an image is resized to, as `size` says (`None`: its own), and what `max_tokens` leaves of it. If
    they differ, the caller warns of `TOO_MANY_PATCHES`.
    """
    asked = (height, width) if size is None else resized_size(height, width, size)
    if max_tokens is None or patch_size is None:
        return asked, asked
    return asked, limited_size(*asked, patch_size, max_tokens)


def rgb_pixels(
    image: Any, image_range: ImageRange | None = None, input_data_format: str | None = None, convert: bool = True
) -> np.ndarray:
    """
    A PIL image, an array or a tensor as upright RGB: `(3, height, width)`, uint8 levels or float32 from 0 to 1.

    Raises:
        TypeError: an object that is no image.
        ValueError: an image that cannot be read, see [`SparImageProcessorPil`]; without `convert`, one that is not RGB.
    """
    if is_tensor(image):
        image = image.detach().cpu()
        image = (image.float() if str(image.dtype) == "torch.bfloat16" else image).numpy()
    if isinstance(image, Image.Image):
        image = turn_upright(image)
        height, width = image.height, image.width
        is_rgb = image.mode == "RGB"
    elif isinstance(image, np.ndarray):
        image = to_channels_last(image, input_data_format)
        height, width, channels = image.shape
        is_rgb = channels == 3
    else:
        raise TypeError(
            "An image is a path, a URL, bytes or an open binary file, a PIL image, a NumPy array or a torch tensor, not "
            f"{type(image).__name__}. A batch is a flat list of them."
        )
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"The image has {height} × {width} pixels (height × width); each side must have at least "
            f"{MIN_SIDE}. Check that it is not empty and that its axes are in order."
        )
    if not convert and not is_rgb:
        raise ValueError("The image is not RGB and `do_convert_rgb` is False. Set it to True or convert the image.")
    if isinstance(image, np.ndarray):
        pixels = array_to_rgb(image, image_range)
    elif image.mode == "F" or (image.mode.startswith("I") and image_range and "transparency" not in image.info):
        pixels = array_to_rgb(np.asarray(image)[:, :, None], image_range)  # floats keep their precision
    else:
        pixels = np.asarray(to_rgb(image, image_range))
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))  # (height, width, 3) -> (3, height, width)


def resize_pixels(image: np.ndarray, size: tuple[int, int], resample: int | None) -> np.ndarray:
    """Resize `(3, height, width)` with Pillow; float pixels by channel, clipped to 0–1 as Pillow clips levels."""
    height, width = size
    if size == image.shape[1:]:
        return image
    if image.dtype == np.uint8:
        original = Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1)))
        return np.ascontiguousarray(np.moveaxis(np.asarray(original.resize((width, height), resample)), -1, 0))
    channels = [np.asarray(Image.fromarray(channel).resize((width, height), resample)) for channel in image]
    return np.stack(channels).clip(0, 1)


def rescale_pixels(image: np.ndarray, scale: float) -> np.ndarray:
    """Convert levels to float32; float pixels are in 0–1 already and are returned unchanged."""
    return image.astype(np.float32) * np.float32(scale) if image.dtype == np.uint8 else image


def normalise_pixels(image: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    """
    Subtract the mean and divide by the standard deviation of each channel: `(3, height, width)` float32.

    Raises:
        ValueError: not one or three numbers, or a deviation that is not positive.
    """
    mean, std = (np.asarray(values, dtype=np.float32).reshape(-1, 1, 1) for values in (mean, std))
    if mean.size not in (1, 3) or std.size not in (1, 3) or (std <= 0).any():
        raise ValueError("`image_mean` and `image_std` must be one or three numbers, `image_std` positive.")
    return (image - mean) / std
