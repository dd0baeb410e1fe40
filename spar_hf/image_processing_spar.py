"""Photos in, tensors out: the only place that reads, converts and resizes images."""

# transformers calls its hooks by keyword; ours name the keywords they use and take the rest as **kwargs
# mypy: disable-error-code="override"

import math
import os
import urllib.parse
import urllib.request
from fractions import Fraction
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, logging

from .segmentation import decide

logger = logging.get_logger(__name__)

URL_PREFIXES = ("http://", "https://", "data:image/")
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
MIN_SIDE = 2  # pixels: what is thinner is a line, most often an array with its axes in the wrong order
CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGBA
FLOAT_TOLERANCE = 1e-3  # how far rounding may carry float pixels beyond 0 and 1
PUBLISHED_SIZE = {"shortest_edge": 672, "longest_edge": 2048}  # SPAR's evaluation of its backbones
SIZE_KEYS = ({"shortest_edge"}, {"longest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"})


def read_image(source: str | os.PathLike | bytes) -> Image.Image:
    """
    Open a file, an `http(s)` URL, a `data:image/` URL or the bytes of a file, in its own mode and turned as its EXIF
    orientation says.

    Like `load_image` of transformers, which converts to RGB at once and so loses transparency and clips 16-bit
    photos.

    Raises:
        FileNotFoundError: `source` is neither a file nor a URL.
        ConnectionError: the URL gives no answer.
        ValueError: empty, truncated, not an image, or of more pixels than Pillow trusts.
    """
    name: str | bytes
    if isinstance(source, bytes):
        name, data = "the given bytes", source
    elif isinstance(name := os.fspath(source), str) and name.startswith(URL_PREFIXES):
        data = download(name)
    elif os.path.isfile(name):
        data = Path(os.fsdecode(name)).read_bytes()
    elif os.path.isdir(name):
        raise ValueError(f"{name!r} is a folder. Pass the images in it: `sorted(Path({name!r}).glob('*.jpg'))`.")
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
            f"{name[:200]!r} is refused: {error} If you trust it, raise `PIL.Image.MAX_IMAGE_PIXELS`, else make it smaller."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{name[:200]!r} is no image that Pillow can read. Copy or download it again if it is damaged, "
            "else convert it to PNG or JPEG."
        ) from error
    return turn_upright(image, repr(name[:200]))


def download(url: str) -> bytes:
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(quoted, headers={"User-Agent": "spar-hf"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            return response.read()
    except (OSError, HTTPException, ValueError) as error:
        raise ConnectionError(f"Cannot download {url[:200]!r}: {error}. Check the address and the network.") from error


def turn_upright(image: Image.Image, name: str = "the image") -> Image.Image:
    """Decode an image and apply its EXIF orientation; the copy has no orientation left to apply again."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # each of Pillow's decoders raises its own kind
        raise ValueError(
            f"Cannot decode {name}: {error}. A file that is truncated or damaged must be copied or downloaded "
            "again; a PIL image must not be closed yet."
        ) from error


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit levels to the nearest 8-bit level: 65535 -> 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """
    8-bit RGB of any Pillow mode except `"F"`: transparent pixels over white, 16-bit levels scaled.

    Raises:
        ValueError: 32-bit integers that are not 16-bit levels, or a mode that Pillow cannot convert.
    """
    mode = image.mode
    if mode.startswith("I"):
        values = np.asarray(image)
        if mode == "I" and (values.min() < 0 or values.max() > 65535 or 0 < values.max() < 256):
            raise ValueError(
                "An image of mode 'I' (32-bit integers) is read as 16-bit levels (0 to 65535), but its values "
                f"lie in {values.min()} to {values.max()}. Scale them and make a uint8 or uint16 array of it."
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
            f"An image array has two axes (height, width) or three (with channels), this one has shape {shape}. "
            "Pass several images as a list or as one array with four axes."
        )
    if input_data_format is not None:
        first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
        last = not first
    else:
        first, last = shape[0] in CHANNEL_COUNTS, shape[2] in CHANNEL_COUNTS
    if first and last:
        raise ValueError(
            f"Shape {shape} is ambiguous: its first or its last axis may be the channels. Pass "
            "`input_data_format='channels_first'` or `input_data_format='channels_last'`."
        )
    if first and shape[0] in CHANNEL_COUNTS:
        return np.moveaxis(array, 0, -1)  # (channels, height, width) -> (height, width, channels)
    if last and shape[2] in CHANNEL_COUNTS:
        return array
    raise ValueError(
        f"Shape {shape} has no axis of 1, 3 or 4 channels where they are expected. An image is (height, width), "
        "(height, width, channels) or (channels, height, width)."
    )


def float_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """
    Float pixels in 0–1, `(height, width, 1 or 3 or 4)` -> `(height, width, 3)` float32, transparent ones over
    white.

    Raises:
        ValueError: NaN or infinite values, or values beyond 0–1.
    """
    if not np.isfinite(pixels).all():
        raise ValueError("The image has NaN or infinite pixels. Replace them first, e.g. with `numpy.nan_to_num`.")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -FLOAT_TOLERANCE or high > 1 + FLOAT_TOLERANCE:
        raise ValueError(
            f"Float pixels must lie in 0–1, these lie in {low:.4g} to {high:.4g}. Divide levels of 0–255 by 255 "
            "or make them uint8; do not normalise images beforehand; clip what a resampling filter has overshot."
        )
    pixels = pixels.astype(np.float32).clip(0, 1)
    if pixels.shape[2] == 4:
        alpha = pixels[:, :, 3:]
        return pixels[:, :, :3] * alpha + (1 - alpha)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def array_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """`(height, width, 1 or 3 or 4)` of any supported dtype -> `(height, width, 3)`, uint8 or float32."""
    if np.issubdtype(pixels.dtype, np.floating):
        return float_to_rgb(pixels)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype == np.uint16:
        pixels = to_eight_bits(pixels)
    elif pixels.dtype != np.uint8:
        raise ValueError(
            f"Image arrays are uint8 (0–255), uint16 (0–65535), bool or float (0–1), this one is {pixels.dtype}. "
            "Convert it to the one it means, e.g. `array.astype('uint8')`."
        )
    pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(pixels))))


def resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """
    The `(height, width)` that `size` asks for. Where the aspect ratio is kept, each side is rounded to its nearest
    pixel on its own (halves up) and is at least 1.
    """
    if size.height is not None and size.width is not None:
        return size.height, size.width
    scales = []
    if size.shortest_edge is not None:
        scales.append(Fraction(size.shortest_edge, min(height, width)))
    if size.longest_edge is not None:
        scales.append(Fraction(size.longest_edge, max(height, width)))
    scale = min(scales)
    new_height, new_width = (max(1, math.floor(side * scale + Fraction(1, 2))) for side in (height, width))
    return new_height, new_width


def limited_size(height: int, width: int, patch_size: int, max_tokens: int) -> tuple[int, int]:
    """
    The working size `(height, width)` where it has at most `max_tokens` patches, partial ones counted; else one that
    has: both sides times `sqrt(max_tokens * patch_size² / (height * width))`, each rounded down to whole patches, at
    least one and at most `max_tokens`.
    """
    if -(-height // patch_size) * -(-width // patch_size) <= max_tokens:
        return height, width
    scale = math.sqrt(max_tokens / (height * width))  # in patches per pixel
    rows, columns = (min(max(1, math.floor(side * scale)), max_tokens) for side in (height, width))
    return rows * patch_size, columns * patch_size


class SparImageKwargs(ImagesKwargs, total=False):
    """What [`SparImageProcessorPil`] takes beyond the options of every image processor."""

    max_tokens: int | None
    patch_size: int | None


class SparImageProcessorPil(PilBackend):
    r"""
    Image processor of SPAR models: resizes (or not), rescales, normalises. It needs Pillow only, no torchvision.

    It never pads and never crops: the model pads right and bottom up to its patch, so a pixel of a mask lies on
    its pixel of the photo. Images of unequal size are never padded to a common one either: group them by size.

    What it reads:
        - a path (`str` or `os.PathLike`), an `http(s)` or `data:image/` URL, a PIL image, a NumPy array or torch
          tensor `(height, width)`, `(height, width, channels)` or `(channels, height, width)` with 1, 3 or 4
          channels; a list of these, or an array or tensor with four axes, is a batch.
        - any Pillow mode. EXIF orientation is applied, transparent pixels lie over white, 16-bit levels are
          scaled to 8 bit (not clipped), of an animation the current frame is taken.
        - numbers by their dtype, never by their range: uint8 is 0–255, uint16 is 0–65535, bool is black and white,
          float is 0–1 and is never rescaled again. Float pixels keep their precision. Everything else is refused.

    Args:
        size (`dict[str, int]`, `int` or `(int, int)`, *optional*):
            Size of the images that the model sees, in pixels. `None` keeps the native size. `{"shortest_edge": n}`
            (or `n`) makes the shorter side n, `{"longest_edge": n}` the longer one; with both, the shorter side is
            n unless that makes the longer one exceed its own n, which then decides. They enlarge as well as
            shrink. The aspect ratio is kept, each side rounded to its nearest pixel. `{"height": h, "width": w}`
            does not keep it. In a call, `"native"` says the same as `None`.
        max_tokens (`int`, *optional*):
            Most patches that an image may have, partial ones counted. A larger working image is made smaller by
            [`limited_size`], with one warning. `None` sets no limit.
        patch_size (`int`, *optional*):
            Side of a patch in pixels; needed where `max_tokens` is set.
        do_resize (`bool`, *optional*, defaults to `True`):
            Whether to resize to `size`, if there is one.
        resample (`PIL.Image.Resampling`, *optional*, defaults to `BICUBIC`):
            Pillow's filter, antialiased when shrinking.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether to multiply integer pixels by `rescale_factor`. Float pixels are in 0–1 already.
        rescale_factor (`float`, *optional*, defaults to `1 / 255`):
            Factor on 8-bit levels.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to subtract `image_mean` and divide by `image_std`.
        image_mean (`float` or `list[float]`, *optional*, defaults to `[0.5, 0.5, 0.5]`):
            Mean per channel, of pixels in 0–1.
        image_std (`float` or `list[float]`, *optional*, defaults to `[0.5, 0.5, 0.5]`):
            Standard deviation per channel, of pixels in 0–1.
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Whether to convert what is not RGB. With `False` it is refused.

    Called with images (and any of the above, `input_data_format` and `return_tensors`), it gives a
    [`~transformers.BatchFeature`]:
        - **pixel_values** (`(batch, 3, height, width)` with `return_tensors="pt"` or `"np"`, else a list of arrays
          `(3, height, width)`), float32.
        - **original_sizes** (`list[tuple[int, int]]`): `(height, width)` of each upright photo before resizing,
          the size to bring a mask back to. It stays a plain list whatever `return_tensors` is, also after
          `.to(device)`.

    Raises:
        ValueError: an image that cannot be read, has a side below 2 pixels, NaN or infinite values, a dtype or
            range that is not listed above, or an ambiguous shape such as `(3, width, 3)`; images of unequal size
            to be stacked; padding or cropping asked for; an impossible `size` or `max_tokens`.
        FileNotFoundError: a string that is neither a file nor a URL.
        ConnectionError: a URL that gives no answer.
        TypeError: an object that is no image.

    Source: `SiglipImageProcessorPil` of transformers for the defaults.

    Example:

    ```python
    >>> from PIL import Image
    >>> from spar_hf import SparImageProcessorPil

    >>> image_processor = SparImageProcessorPil(size={"shortest_edge": 200})
    >>> inputs = image_processor(Image.new("RGB", (640, 480)), return_tensors="pt")
    >>> inputs.pixel_values.shape
    torch.Size([1, 3, 200, 267])
    >>> inputs.original_sizes
    [(480, 640)]
    ```"""

    _auto_class = "AutoImageProcessor"  # saved folders name this class and bring its code
    valid_kwargs: Any = SparImageKwargs
    size = None
    max_tokens = None
    patch_size = None
    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    @classmethod
    def from_backbone(cls, pretrained_model_name_or_path: str, **kwargs) -> "SparImageProcessorPil":
        """
        The image processor for the SPAR model of an untouched backbone: its mean and standard deviation, and SPAR's
        working size (shorter side 672 px, longer at most 2048 px) instead of its square. A SPAR folder keeps its own.

        Raises:
            OSError: the folder or repository has no image processor's configuration.
            ValueError: the configuration lacks mean or standard deviation.
        """
        settings, _ = cls.get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("image_processor_type", "").startswith("Spar"):
            return cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "image_mean" not in settings or "image_std" not in settings:
            raise ValueError(
                f"The image processor of {pretrained_model_name_or_path} names no `image_mean` and `image_std`; build "
                "`SparImageProcessorPil(image_mean=..., image_std=...)` with those of the checkpoint."
            )
        return cls(image_mean=settings["image_mean"], image_std=settings["image_std"], size=dict(PUBLISHED_SIZE))

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        if isinstance(size := kwargs.get("size"), str):
            if size != "native":
                raise ValueError(
                    f"`size` is {size!r}; the only word for a size is 'native'. See the class for numbers."
                )
            kwargs["size"] = None
        return super().preprocess(images, *args, **kwargs)

    def _standardize_kwargs(self, size=None, max_tokens=None, patch_size=None, **kwargs) -> dict[str, Any]:
        for name, number in (("max_tokens", max_tokens), ("patch_size", patch_size)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"`{name}` is {number!r}; it must be a whole number of at least 1, or None.")
        if max_tokens is not None and patch_size is None:
            raise ValueError("`max_tokens` counts patches, so it needs the `patch_size` of the model.")
        if isinstance(size, int):
            size = {"shortest_edge": size}
        elif isinstance(size, (list, tuple)) and len(size) == 2:
            size = {"height": size[0], "width": size[1]}
        if size is not None:
            sides = dict(size) if isinstance(size, (dict, SizeDict)) else {}
            if set(sides) not in SIZE_KEYS or any(not isinstance(n, int) or n < 1 for n in sides.values()):
                raise ValueError(
                    f"`size` is {size}; it must be None (native size) or a dict with one of the key sets "
                    f"{[sorted(keys) for keys in SIZE_KEYS]} and whole numbers of at least 1 pixel."
                )
        kwargs = super()._standardize_kwargs(size=size, **kwargs)
        kwargs["max_tokens"], kwargs["patch_size"] = max_tokens, patch_size
        if kwargs.get("do_pad") or kwargs.get("do_center_crop"):
            raise ValueError(
                "SPAR's image processor neither pads nor crops: the model pads to its patch by itself. Leave "
                "`do_pad` and `do_center_crop` out, and group images of unequal size."
            )
        if kwargs.get("data_format") not in (None, ChannelDimension.FIRST):
            raise ValueError("`pixel_values` are always (batch, channels, height, width). Leave `data_format` out.")
        return kwargs

    def _validate_preprocess_kwargs(self, do_resize=None, size=None, **kwargs):
        super()._validate_preprocess_kwargs(do_resize=bool(do_resize and size is not None), size=size, **kwargs)

    def fetch_images(self, image_url_or_urls):
        """Read the paths and URLs among one image or a list of images, as PIL images in their own mode."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return read_image(image_url_or_urls)
        return image_url_or_urls

    def _prepare_image_like_inputs(self, images, expected_ndims: int = 3, **kwargs) -> list[np.ndarray]:
        images = self.fetch_images(images)
        if not isinstance(images, list):
            images = list(images) if getattr(images, "ndim", None) == expected_ndims + 1 else [images]
        if not images:
            raise ValueError("There is no image. Pass one or a list of at least one.")
        return [self.process_image(image, **kwargs) for image in images]

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        One image, upright and as RGB: `(3, height, width)`, uint8 levels or float32 in 0–1.

        Raises:
            TypeError, ValueError: see the class.
        """
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
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
                "An image is a path, a URL, a PIL image, a NumPy array or a torch tensor, not "
                f"{type(image).__name__}. A batch is a flat list of them."
            )
        if min(height, width) < MIN_SIDE:
            raise ValueError(
                f"The image is {height} × {width} pixels (height × width); each side must have at least "
                f"{MIN_SIDE}. Check that it is not empty and that its axes are in order."
            )
        if do_convert_rgb is False and not is_rgb:
            raise ValueError("The image is not RGB and `do_convert_rgb` is False. Set it to True or convert the image.")
        if isinstance(image, np.ndarray):
            pixels = array_to_rgb(image)
        elif image.mode == "F":
            pixels = float_to_rgb(np.asarray(image)[:, :, None])
        else:
            pixels = np.asarray(to_rgb(image))
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))  # (height, width, 3) -> (3, height, width)

    def working_size(
        self, height: int, width: int, size: SizeDict | None, max_tokens: int | None, patch_size: int | None
    ) -> tuple[int, int]:
        """The `(height, width)` that a photo is resized to: that of `size` (`None`: its own), within `max_tokens`."""
        wanted = (height, width) if size is None else resized_size(height, width, size)
        if max_tokens is None or patch_size is None:
            return wanted
        allowed = limited_size(*wanted, patch_size, max_tokens)
        if allowed != wanted:
            logger.warning_once(
                f"Images of more than {max_tokens} patches (`max_tokens`) are made smaller. For more detail allow more, "
                "if memory and time do; a smaller `size` avoids this message."
            )
        return allowed

    def resize(self, image: np.ndarray, size: SizeDict, resample: int | None = None, **kwargs) -> np.ndarray:
        """Resize `(3, height, width)` as a PIL image; float pixels by channel, clipped to 0–1 as levels are."""
        _, old_height, old_width = image.shape
        height, width = resized_size(old_height, old_width, size)
        if (height, width) == (old_height, old_width):
            return image
        if image.dtype == np.uint8:
            photo = Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1)))
            return np.ascontiguousarray(np.moveaxis(np.asarray(photo.resize((width, height), resample)), -1, 0))
        channels = [np.asarray(Image.fromarray(channel).resize((width, height), resample)) for channel in image]
        return np.stack(channels).clip(0, 1)

    def rescale(self, image: np.ndarray, scale: float, **kwargs) -> np.ndarray:
        """Levels to float32; float pixels are in 0–1 already and stay as they are."""
        return image.astype(np.float32) * np.float32(scale) if image.dtype == np.uint8 else image

    def normalize(self, image: np.ndarray, mean, std, **kwargs) -> np.ndarray:
        """Subtract the mean and divide by the standard deviation of each channel: `(3, height, width)` float32."""
        mean, std = (np.asarray(values, dtype=np.float32).reshape(-1, 1, 1) for values in (mean, std))
        if mean.size not in (1, 3) or std.size not in (1, 3) or (std <= 0).any():
            raise ValueError("`image_mean` and `image_std` must be one or three numbers, and the latter positive.")
        return (image - mean) / std

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool | None = None,
        size: Any = None,
        resample: Any = None,
        max_tokens: int | None = None,
        patch_size: int | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        size = size if do_resize else None
        resized = []
        for image in images:
            height, width = self.working_size(image.shape[1], image.shape[2], size, max_tokens, patch_size)
            resized.append(self.resize(image, SizeDict(height=height, width=width), resample))
        output = super()._preprocess(
            resized, do_resize=False, size=SizeDict(), resample=resample, return_tensors=None, **kwargs
        )
        sizes = sorted({image.shape[1:] for image in output["pixel_values"]})
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"Images of unequal size (height, width) cannot be stacked: {sizes[:5]}. Group them by size, call "
                "the image "
                'processor once per image, set `size={"height": …, "width": …}`, or take a list with '
                "`return_tensors=None`."
            )
        output["original_sizes"] = [image.shape[1:] for image in images]
        output.skip_tensor_conversion = ["original_sizes"]
        return output.convert_to_tensors(return_tensors)

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """
        Label maps of [`SparSemanticSegmenterOutput`]: logits upsampled p-fold, cropped to the image that the model saw and
        resized to the photo, in one step and in bounded memory (see [`~spar_hf.segmentation.decide`]).

        Args:
            outputs ([`SparSemanticSegmenterOutput`]): of a batch.
            target_sizes (`list[tuple[int, int]]`, *optional*):
                `(height, width)` of each photo, the image processor's `original_sizes`. By default the size that the
                model saw.

        Returns:
            Per image, the class of every pixel: `(height, width)` int32.

        Raises:
            ValueError: not one size per image.
        """
        logits = outputs["logits"] if outputs.get("name_logits") is None else outputs["name_logits"]
        geometry = outputs["geometry"].tolist()
        sizes = [(height, width) for height, width, _ in geometry] if target_sizes is None else target_sizes
        if len(sizes) != len(logits):
            raise ValueError(f"There are {len(logits)} images but {len(sizes)} `target_sizes`; give one for each.")
        classes = outputs.get("name_to_class")
        return [
            decide(
                logits[i],
                torch.arange(logits.shape[1]) if classes is None else classes[i],
                patch,
                working_size=(height, width),
                output_size=(int(sizes[i][0]), int(sizes[i][1])),
            ).labels
            for i, (height, width, patch) in enumerate(geometry)
        ]

    def to_dict(self) -> dict[str, Any]:
        # the whole name: where it is cut, as PilBackend does, Auto classes warn that there is no torchvision twin
        # no video processor: without the second entry, `pipeline` takes this file's code for that of one, and asks for trust
        # in it (and waits) even where this library is installed
        return {**super().to_dict(), "image_processor_type": type(self).__name__, "video_processor_type": "none"}


__all__ = ["SparImageProcessorPil"]
