"""
Reads images from files, URLs, bytes and arrays and converts them to upright RGB. All reading goes through here, also that of
`spar_hf.runtime`, so this file imports neither torch nor transformers.
"""

import importlib
import importlib.util
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .downloads import download
from .image_levels import AMBIGUOUS_LEVELS, check_finite_pixels, scale_range, to_eight_bits

URL_PREFIXES = ("http://", "https://", "data:image/")
# the formats that are opened, whatever a file is called; EPS is not one of them: Pillow hands it to Ghostscript
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "TGA", "JPEG2000", "AVIF", "HEIF")
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
MAX_BYTES = 2**31  # of a file
CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGBA
CHANNEL_FORMATS = ("channels_first", "channels_last")  # the values of transformers' ChannelDimension
FLOAT_TOLERANCE = 1e-3  # how far rounding may carry float pixels beyond 0 and 1
UPPER_BYTES = "upper_bytes"  # entry in the `info` of a Pillow image: the name of its file, which has colours of 16 bits

ImageRange = Sequence[float]


class TooManyPixels(ValueError):
    """An image above the limit on pixels."""


def is_file_object(source: Any) -> bool:
    """Whether a source is an open file, also one in memory or in an archive."""
    return callable(getattr(source, "read", None)) and not isinstance(source, (str, bytes, os.PathLike, Image.Image))


def is_tensor(source: Any) -> bool:
    """Whether a source is a tensor. While torch is not imported, nothing is."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def is_encoded(source: Any) -> bool:
    """Whether a source is an image that [`read_image`] opens: a path, a URL, the bytes of a file or an open file."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or is_file_object(source)


def check_container(inputs: Any) -> None:
    """
    Refuse containers that have no order or no clear column of images, by name.

    Raises:
        ValueError: a data frame, a table or a set; the message names the fix.
    """
    kind = type(inputs).__name__
    if kind in ("DataFrame", "LazyFrame", "Table", "RecordBatch"):
        raise ValueError(f'A {kind} has several columns. Pass the one of images or paths, such as `table["path"]`.')
    if isinstance(inputs, (set, frozenset)):
        raise ValueError(f"A {kind} has no order, so results would have none. Pass a list: `sorted(paths)`.")


def as_list(inputs: Any) -> list | None:
    """
    The images of a list, tuple, array with four axes, array of paths or objects, or pandas Series, in their order,
    whatever its labels are; `None` if `inputs` is something else.

    Example:

    ```python
    >>> as_list(("a.png", "b.png")), as_list("a.png")
    (['a.png', 'b.png'], None)
    ```"""
    check_container(inputs)
    if isinstance(inputs, np.ndarray) and (inputs.dtype.kind in "OUS" or inputs.ndim == 4):
        return list(inputs) if inputs.ndim else None
    if is_tensor(inputs):
        return list(inputs) if inputs.ndim == 4 else None
    root = type(inputs).__module__.partition(".")[0]
    if isinstance(inputs, (list, tuple)) or (root in ("pandas", "polars") and hasattr(inputs, "__iter__")):
        return list(inputs)  # iterated: `series[i]` is the row with the label i
    if root == "pyarrow" and hasattr(inputs, "to_pylist"):
        return inputs.to_pylist()
    return None


def image_of_row(row: Mapping) -> Any:
    """
    The image of a row of `datasets`: its column `"image"`, decoded or not (`bytes` or `path`).

    Raises:
        ValueError: the row has no image.
    """
    image = row.get("image", row if "bytes" in row or "path" in row else None)
    if isinstance(image, Mapping):
        image = read_image(image["bytes"]) if image.get("bytes") else image.get("path")
    if image is None:
        raise ValueError(
            f"A row with the columns {list(row)} has no `image`. Pass the column: `dataset[NAME]`, or `KeyDataset(dataset, "
            "NAME)` of transformers.pipelines.pt_utils; or rename it."
        )
    return image


def image_of_item(item: Any) -> Any:
    """
    The image of an item of a list, dataset or stream.

    Raises:
        ValueError: the item is a tuple, as of datasets of torch, in which any part may be the image.
    """
    if isinstance(item, Mapping):
        return image_of_row(item)
    if isinstance(item, (list, tuple)):
        raise ValueError(
            f"An item is a {type(item).__name__} of {len(item)} parts ({', '.join(type(part).__name__ for part in item)}), "
            "not an image. Pass the images alone: `(item[0] for item in dataset)`; a list of lists must be flat."
        )
    return item


def read_image(source: Any, urls: bool | str = True) -> Image.Image:
    """
    Open a file, an `http(s)` URL, a `data:image/` URL, the bytes of a file or an open binary file. The image keeps its mode;
    its EXIF orientation is applied.

    Unlike `load_image` of transformers it does not convert to RGB, which would drop transparency and clip 16-bit images.
    Limits: `FORMATS`; regular files of at most 2 GiB; downloads of at most 256 MiB, see [`download`]; and
    `PIL.Image.MAX_IMAGE_PIXELS` (89 million pixels, about 0.3 GB in RGB; set it higher for larger images). Images are always
    decoded at full size, since the reduced decoding of JPEG gives other pixels than resizing does.

    Args:
        source: path, URL, `bytes`, `bytearray`, `memoryview` or open binary file, which stays where it is.
        urls: whether strings may be URLs: `True`, `False`, or `"public"` for URLs outside private networks only. A server
            that reads what its clients name must not pass `True`.

    Raises:
        FileNotFoundError: `source` is neither a file nor a URL.
        ConnectionError: the URL does not answer, or is refused.
        ValueError: the image is empty, truncated, of an unknown format or too large, or the file is no regular one.
        TypeError: a text file.
    """
    return turn_upright(*open_image(source, urls))


def read_rgb(source: Any, image_range: ImageRange | None = None, urls: bool | str = True) -> Image.Image:
    """[`read_image`] and [`to_rgb`]: what every caller that needs an 8-bit RGB image uses."""
    return to_rgb(read_image(source, urls), image_range)


def open_image(source: Any, urls: bool | str = True) -> tuple[Image.Image, str]:
    """Open an image without decoding it, as [`read_image`] does. Returns it with its name for messages."""
    name, data = read_bytes(source, urls)
    if not data:
        again = "Go to its start with `seek(0)`, or open it" if is_file_object(source) else "Copy or download it"
        raise ValueError(
            f"{name} {'is at its end' if is_file_object(source) else 'is empty (0 bytes)'}. {again} again."
        )
    heif = data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS
    if heif and importlib.util.find_spec("pillow_heif"):  # optional, so it is no import of this file
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    try:
        image = Image.open(BytesIO(data), formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise too_many_pixels(name, str(error)) from error
    except OSError as error:
        if heif and "HEIF" not in Image.OPEN:
            raise ValueError(f"{name} is a HEIC image. Install its decoder: `pip install spar-hf[heif]`.") from error
        raise ValueError(
            f"{name} is no image that Pillow can read ({', '.join(FORMATS)}). Copy or download it again if it is damaged, "
            "else convert it to PNG or JPEG."
        ) from error
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise too_many_pixels(name, f"{image.width} × {image.height} pixels exceed {Image.MAX_IMAGE_PIXELS}.")
    return image, name


def has_more_frames(image: Image.Image) -> bool:
    """Whether an opened file has frames or pages beside its first. The previews in MPO, what cameras write, do not count."""
    return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def set_pixel_limit(max_pixels: int | None) -> None:
    """Set Pillow's limit on the pixels of an image, unless `max_pixels` is `None`."""
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels


def too_many_pixels(name: str, reason: str) -> TooManyPixels:
    """The error for an image above the limit."""
    return TooManyPixels(
        f"{name} is refused: {reason} Make it smaller or cut it into tiles; if you trust it and have the memory, raise "
        "`PIL.Image.MAX_IMAGE_PIXELS` (`--max-pixels` of `spar-hf segment` and `features`)."
    )


def read_bytes(source: Any, urls: bool | str = True) -> tuple[str, bytes]:
    """The name of a source in messages, and its bytes. Raises as [`read_image`]."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "The given image", bytes(source)
    if is_file_object(source):
        start = source.tell() if getattr(source, "seekable", bool)() else None
        data = source.read()
        if start is not None:  # it may be given again, or to another call
            source.seek(start)
        if not isinstance(data, bytes):
            raise TypeError('An image file must be opened in binary mode: `open(path, "rb")`.')
        return f"The open file {getattr(source, 'name', '')!r}", data
    path = os.fspath(source)
    name = repr(path[:200])
    if isinstance(path, str) and path.startswith(URL_PREFIXES):
        if not urls:
            raise ValueError(f"{name} is a URL, and only files are read here. Download it first.")
        return name, download(path, private=urls != "public")
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder. Pass its images: `sorted(Path({name}).glob('*.jpg'))`.")
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is neither a file nor a URL (http://, https:// or data:image/). Check the spelling and, for a "
            "relative path, the working directory."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"{name} is no regular file but a pipe, device or socket. Read it yourself and pass its bytes."
        )
    if status.st_size > MAX_BYTES:
        raise ValueError(f"{name} has {status.st_size} bytes, more than {MAX_BYTES}. Cut it into tiles.")
    with open(path, "rb") as file:
        return name, file.read(MAX_BYTES + 1)


def turn_upright(image: Image.Image, name: str | None = None) -> Image.Image:
    """
    Decode an image of the file `name` and apply its EXIF orientation. The returned copy has no orientation any more. If its
    file has colours of 16 bits, of which Pillow reads the upper 8, the copy says so to [`to_rgb`].

    Raises:
        ValueError: it cannot be decoded.
    """
    sixteen_bits = not image.mode.startswith("I") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise various types
        if name is None:
            raise ValueError(f"Cannot decode the image: {error}. Its file is damaged or has been closed.") from error
        raise ValueError(f"Cannot decode {name}: {error}. Copy or download it again: the file is damaged.") from error
    if sixteen_bits:
        upright.info[UPPER_BYTES] = name or "The image"
    return upright


def scale_upper_bytes(image: Image.Image, image_range: tuple[float, float] | None, name: str) -> Image.Image:
    """
    The upper bytes of colours of 16 bits as levels of 8, scaled by a range of 16-bit values if one is stated. An alpha
    channel stays.

    Raises:
        ValueError: the upper bytes hold too little: all are low and no range is stated, or its range is small.
    """
    image = image.convert("RGBA") if image.has_transparency_data else image  # scaled, its transparent colour is another
    values = np.array(image)
    colours = values[..., :-1] if image.mode == "RGBA" else values
    few = ""
    if image_range is None and 0 < colours.max(initial=0) < AMBIGUOUS_LEVELS // 256:
        few = f"all its values are below {AMBIGUOUS_LEVELS}: they may be 8, 10, 12 or 14 bits"
    elif image_range is not None and image_range[1] - image_range[0] < AMBIGUOUS_LEVELS:
        few = f"a range of {image_range[0]:g} to {image_range[1]:g} is too small for that"
    if few:
        raise ValueError(
            f"{name} has 16 bits per channel, of which Pillow reads the upper 8, and {few}. Read it with another library "
            "and pass a uint16 array with `image_range=(LOW, HIGH)`, or save it with 8 bits."
        )
    if image_range is not None:
        levels = colours * 257.0
        inside = levels.clip(*image_range)
        # the lower bytes are not known: a level this near to the range may lie in it
        levels = np.where(abs(levels - inside) < 256, inside, levels)
        colours[...] = scale_range(levels, image_range) * 255 + 0.5
    return Image.fromarray(values)


def class_numbers(mask: Image.Image, name: str | None = None) -> np.ndarray:
    """
    The numbers in a mask as its file holds them, `(height, width)`, turned upright: the index of palette images, and of grey
    files with 2 or 4 bits the value, which Pillow stretches to 0–255.

    Raises:
        ValueError: it cannot be decoded.
    """
    stored = {str(tile[3]) for tile in getattr(mask, "tile", ())}  # gone once it is decoded
    values = np.array(turn_upright(mask, name))
    step = next((step for bits, step in (("L;2", 85), ("L;4", 17)) if stored == {bits}), None)
    return values if step is None else values // step


def check_range(image_range: Any) -> tuple[float, float] | None:
    """
    The pixel values that mean black and white, as two numbers.

    Raises:
        ValueError: anything else.

    Example:

    ```python
    >>> check_range([0, 4095])
    (0.0, 4095.0)
    ```"""
    if image_range is None:
        return None
    try:
        low, high = map(float, image_range)
    except (TypeError, ValueError):
        low = high = float("nan")
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"`image_range` is {image_range!r}; it must be two numbers LOW < HIGH, such as (0, 4095).")
    return low, high


def to_rgb(image: Image.Image, image_range: ImageRange | None = None) -> Image.Image:
    """
    Convert any Pillow mode to 8-bit RGB. Transparent pixels are blended with white.

    Pixels of 16 bits (`"I;16"`, `"I"`) are 0–65535 and floats (`"F"`) 0–1, each rounded to the nearest of 256 levels, unless
    `image_range` states the values of black and white. Of colours of 16 bits Pillow reads the upper 8, to which the range
    applies too. Images of 8 bits have one range only; `image_range` does not apply.

    Raises:
        ValueError: values that cannot be scaled without guessing (see [`to_eight_bits`] and [`float_to_rgb`]), or a mode
            that Pillow cannot convert.
    """
    mode = image.mode
    if (name := image.info.get(UPPER_BYTES)) is not None:
        image = scale_upper_bytes(image, check_range(image_range), name)
    if mode == "F" or mode.startswith("I"):
        levels = np.asarray(image)
        if mode.startswith("I") and check_range(image_range) is None:
            rgb = np.repeat(to_eight_bits(levels)[:, :, None], 3, axis=2)
        else:
            rgb = (array_to_rgb(levels[:, :, None], image_range) * 255 + 0.5).astype(np.uint8)
        if mode.startswith("I") and (transparent := image.info.get("transparency")) is not None:  # one level of a PNG
            rgb[levels == transparent] = 255
        return Image.fromarray(rgb)
    try:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"Pillow cannot convert mode {mode!r} to RGB. Convert the image to RGB first.") from error


def to_channels_last(array: np.ndarray, input_data_format: str | None = None) -> np.ndarray:
    """
    `(height, width)`, `(height, width, channels)` or `(channels, height, width)` -> `(height, width, channels)`.

    Raises:
        ValueError: another number of axes, no axis of 1, 3 or 4 channels, or two of them; an unknown `input_data_format`.
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
        if input_data_format not in CHANNEL_FORMATS:
            raise ValueError(
                f"`input_data_format` is {input_data_format!r}; use {' or '.join(map(repr, CHANNEL_FORMATS))}."
            )
        first = input_data_format == CHANNEL_FORMATS[0]
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
    check_finite_pixels(pixels)
    low, high = float(pixels.min()), float(pixels.max())
    if low < -FLOAT_TOLERANCE or high > 1 + FLOAT_TOLERANCE:
        raise ValueError(
            f"Float pixels must lie in 0 to 1, got {low:.4g} to {high:.4g}. Divide levels of 0–255 by 255 or convert "
            "them to uint8; do not normalise images beforehand; clip values that a resampling filter overshot. Or state the "
            "range: `image_range=(LOW, HIGH)`, `--image-range LOW HIGH` on the command line."
        )
    pixels = pixels.astype(np.float32).clip(0, 1)
    if pixels.shape[2] == 4:
        alpha = pixels[:, :, 3:]
        return pixels[:, :, :3] * alpha + (1 - alpha)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def native_order(array: np.ndarray) -> np.ndarray:
    """The array in the byte order of this machine; files may have the other one."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def array_to_rgb(pixels: np.ndarray, image_range: ImageRange | None = None) -> np.ndarray:
    """
    Array of any supported dtype, `(height, width, 1 or 3 or 4)` -> `(height, width, 3)`, uint8 or float32.

    With `image_range`, arrays of any number type but uint8 and bool are scaled by it; the alpha channel of floats is 0–1 and
    that of integers has the range too.
    """
    pixels = native_order(pixels)
    numbers = np.issubdtype(pixels.dtype, np.integer) or np.issubdtype(pixels.dtype, np.floating)
    if (known := check_range(image_range)) is not None and numbers and pixels.dtype != np.uint8:
        alpha = np.issubdtype(pixels.dtype, np.floating) and pixels.shape[2] == 4
        colours = scale_range(pixels[:, :, :3] if alpha else pixels, known)
        return float_to_rgb(np.concatenate([colours, pixels[:, :, 3:]], axis=2) if alpha else colours)
    if np.issubdtype(pixels.dtype, np.floating):
        return float_to_rgb(pixels)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype == np.uint16:
        if pixels.shape[2] == 4:  # the alpha channel has 16 bits too; what is opaque says nothing about the colours
            to_eight_bits(pixels[:, :, :3])
        pixels = to_eight_bits(pixels)
    elif pixels.dtype != np.uint8:
        raise ValueError(
            f"Image arrays must be uint8 (0–255), uint16 (0–65535), bool or float (0–1); this one is {pixels.dtype}. "
            "Convert it, e.g. with `array.astype('uint8')`, or state its range: `image_range=(LOW, HIGH)`."
        )
    pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(pixels))))
