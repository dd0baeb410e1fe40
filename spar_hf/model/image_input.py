"""Reads images from files, URLs, bytes and arrays and converts them to upright RGB. All reading goes through here."""

import os
import urllib.parse
import urllib.request
from http.client import HTTPException
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.image_utils import ChannelDimension

URL_PREFIXES = ("http://", "https://", "data:image/")
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGBA
FLOAT_TOLERANCE = 1e-3  # how far rounding may carry float pixels beyond 0 and 1


def read_image(source: str | os.PathLike | bytes) -> Image.Image:
    """
    Open a file, an `http(s)` URL, a `data:image/` URL or the bytes of a file. The image keeps its mode; its EXIF
    orientation is applied.

    Unlike `load_image` of transformers it does not convert to RGB, which would drop transparency and clip 16-bit images.

    Raises:
        FileNotFoundError: `source` is neither a file nor a URL.
        ConnectionError: the URL does not answer.
        ValueError: the image is empty, truncated, of an unknown format, or has more pixels than Pillow allows.
    """
    name: str | bytes
    if isinstance(source, bytes):
        name, data = "the given bytes", source
    elif isinstance(name := os.fspath(source), str) and name.startswith(URL_PREFIXES):
        data = download(name)
    elif os.path.isfile(name):
        data = Path(os.fsdecode(name)).read_bytes()
    elif os.path.isdir(name):
        raise ValueError(f"{name!r} is a folder. Pass its images: `sorted(Path({name!r}).glob('*.jpg'))`.")
    else:
        raise FileNotFoundError(
            f"{name[:200]!r} is neither a file nor a URL (http://, https:// or data:image/). Check the spelling "
            "and, for a relative path, the working directory."
        )
    if not data:
        raise ValueError(f"{name[:200]!r} is empty (0 bytes). Copy or download it again.")
    try:
        image = Image.open(BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name[:200]!r} is refused: {error} If you trust the file, raise `PIL.Image.MAX_IMAGE_PIXELS`."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{name[:200]!r} is no image that Pillow can read. Copy or download it again if it is damaged, "
            "else convert it to PNG or JPEG."
        ) from error
    return turn_upright(image, repr(name[:200]))


def download(url: str) -> bytes:
    """The content of a URL. Raises `ConnectionError` without an answer."""
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(quoted, headers={"User-Agent": "spar-hf"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            return response.read()
    except (OSError, HTTPException, ValueError) as error:
        raise ConnectionError(f"Cannot download {url[:200]!r}: {error}. Check the address and the network.") from error


def turn_upright(image: Image.Image, name: str | None = None) -> Image.Image:
    """Decode an image of the file `name` and apply its EXIF orientation. The returned copy has no orientation any more."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise various types
        if name is None:
            raise ValueError(f"Cannot decode the image: {error}. Its file is damaged or has been closed.") from error
        raise ValueError(f"Cannot decode {name}: {error}. Copy or download it again: the file is damaged.") from error


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Map 16-bit levels to the nearest 8-bit levels: 65535 -> 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Convert any Pillow mode except `"F"` to 8-bit RGB. Transparent pixels are blended with white, 16-bit levels scaled.

    Raises:
        ValueError: 32-bit integers outside the 16-bit levels, or a mode that Pillow cannot convert.
    """
    mode = image.mode
    if mode.startswith("I"):
        values = np.asarray(image)
        if mode == "I" and (values.min() < 0 or values.max() > 65535 or 0 < values.max() < 256):
            raise ValueError(
                "An image of mode 'I' (32-bit integers) is read as 16-bit levels (0 to 65535), but its values "
                f"lie in {values.min()} to {values.max()}. Scale them and pass a uint8 or uint16 array."
            )
        image = Image.fromarray(to_eight_bits(values))
    try:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"Pillow cannot convert mode {mode!r} to RGB. Convert the image to RGB first.") from error


def to_channels_last(array: np.ndarray, input_data_format: str | ChannelDimension | None = None) -> np.ndarray:
    """
    `(height, width)`, `(height, width, channels)` or `(channels, height, width)` -> `(height, width, channels)`.

    Raises:
        ValueError: another number of axes, no axis of 1, 3 or 4 channels, or two of them.
    """
    shape = tuple(array.shape)
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise ValueError(
            f"An image array must have two axes (height, width) or three (with channels), got shape {shape}. "
            "Pass several images as a list or as one array with four axes."
        )
    if input_data_format is not None:
        first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
        last = not first
    else:
        first, last = shape[0] in CHANNEL_COUNTS, shape[2] in CHANNEL_COUNTS
    if first and last:
        raise ValueError(
            f"Shape {shape} is ambiguous: the first or the last axis may be the channels. Pass "
            "`input_data_format='channels_first'` or `input_data_format='channels_last'`."
        )
    if first and shape[0] in CHANNEL_COUNTS:
        return np.moveaxis(array, 0, -1)  # (channels, height, width) -> (height, width, channels)
    if last and shape[2] in CHANNEL_COUNTS:
        return array
    raise ValueError(
        f"Shape {shape} has no axis of 1, 3 or 4 channels where expected. An image is (height, width), "
        "(height, width, channels) or (channels, height, width)."
    )


def float_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """
    Float pixels from 0 to 1, `(height, width, 1 or 3 or 4)` -> `(height, width, 3)` float32. Transparent pixels are blended
    with white.

    Raises:
        ValueError: NaN or infinite values, or values outside 0 to 1.
    """
    if not np.isfinite(pixels).all():
        raise ValueError("The image has NaN or infinite pixels. Replace them first, e.g. with `numpy.nan_to_num`.")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -FLOAT_TOLERANCE or high > 1 + FLOAT_TOLERANCE:
        raise ValueError(
            f"Float pixels must lie in 0 to 1, got {low:.4g} to {high:.4g}. Divide levels of 0–255 by 255 or convert "
            "them to uint8; do not normalise images beforehand; clip values that a resampling filter overshot."
        )
    pixels = pixels.astype(np.float32).clip(0, 1)
    if pixels.shape[2] == 4:
        alpha = pixels[:, :, 3:]
        return pixels[:, :, :3] * alpha + (1 - alpha)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def array_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Array of any supported dtype, `(height, width, 1 or 3 or 4)` -> `(height, width, 3)`, uint8 or float32."""
    if np.issubdtype(pixels.dtype, np.floating):
        return float_to_rgb(pixels)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype == np.uint16:
        pixels = to_eight_bits(pixels)
    elif pixels.dtype != np.uint8:
        raise ValueError(
            f"Image arrays must be uint8 (0–255), uint16 (0–65535), bool or float (0–1); this one is {pixels.dtype}. "
            "Convert it, e.g. with `array.astype('uint8')`."
        )
    pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(pixels))))
