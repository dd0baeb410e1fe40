"""Image processor: reads, resizes and normalises images. All resizing of images goes through here."""

# transformers calls these hooks by keyword; ours name the keywords they use and take the others as **kwargs
# mypy: disable-error-code="override"

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, logging

from .image_input import as_list, check_range, is_encoded, read_image
from .image_pixels import (
    TOO_MANY_PATCHES,
    as_whole,
    check_count,
    check_size,
    normalise_pixels,
    rescale_pixels,
    resize_pixels,
    resized_size,
    rgb_pixels,
    working_size,
)
from .segmentation import class_probabilities, decide

logger = logging.get_logger(__name__)

PUBLISHED_SIZE = {"shortest_edge": 672, "longest_edge": 2048}  # of SPAR's published evaluation


def grids(outputs: Any, target_sizes: list[tuple[int, int]] | None) -> Iterator[tuple]:
    """
    The arguments of [`decide`] for every image of [`SparSemanticSegmenterOutput`].

    Raises:
        ValueError: another number of sizes than of images.
    """
    logits = outputs["logits"] if outputs.get("name_logits") is None else outputs["name_logits"]
    geometry = outputs["geometry"].tolist()
    sizes = [(height, width) for height, width, _ in geometry] if target_sizes is None else target_sizes
    if len(sizes) != len(logits):
        raise ValueError(f"There are {len(logits)} images but {len(sizes)} `target_sizes`; give one for each.")
    classes = outputs.get("name_to_class")
    for i, (height, width, patch) in enumerate(geometry):
        name_to_class = torch.arange(logits.shape[1]) if classes is None else classes[i]
        yield logits[i], name_to_class, patch, (height, width), (int(sizes[i][0]), int(sizes[i][1]))


def with_scores(labels: torch.Tensor, scores: torch.Tensor | None) -> Any:
    """A result of semantic post-processing: the label map, or with scores transformers' output of both."""
    if scores is None:
        return labels
    return SemanticSegmentationPostProcessorOutput({"segmentation": labels, "segmentation_scores": scores})


class SparImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of [`SparImageProcessorPil`] beyond those of every image processor."""

    max_tokens: int | None
    patch_size: int | None
    image_range: Any  # two numbers or None; checked by `check_range`


class SparImageProcessorPil(PilBackend):
    r"""
    Image processor of SPAR models: resizes (optionally), rescales and normalises. It uses Pillow, not torchvision.

    It never pads or crops. The model pads right and bottom to a multiple of its patch, so every mask pixel lies on its
    image pixel. Images of unequal size are not padded to a common size either: group them by size.

    Inputs:
        - A path (`str` or `os.PathLike`), an `http(s)` or `data:image/` URL, the bytes of an image file or an open
          binary file, a PIL image, a NumPy array or torch tensor `(height, width)`, `(height, width, channels)` or
          `(channels, height, width)` with 1, 3 or 4 channels. A list, tuple, pandas Series or array of these, or an
          array or tensor with four axes, is a batch.
        - Any Pillow mode. EXIF orientation is applied, transparent pixels are blended with white, 16-bit levels are
          scaled (not clipped) to 8 bit, and the current frame of an animation is used.
        - The dtype of an array decides its range: uint8 is 0–255, uint16 is 0–65535, bool is black and white, float
          is 0–1 and is not rescaled again. Float pixels keep their precision. Other dtypes are refused, and so are
          16-bit pixels that are all below 16384 (but not all 0): they may have 8, 10, 12 or 14 bits. `image_range`
          states what is meant.

    Args:
        size (`dict[str, int]`, `int` or `(int, int)`, *optional*):
            Working size: that of the images the model sees, in pixels. `None` keeps the native size.
            `{"shortest_edge": n}` (or `n`) sets the shorter side, `{"longest_edge": n}` the longer side; with both, the
            smaller of the two images is made. Both may enlarge, and keep the aspect ratio, each side rounded to the
            nearest pixel. `{"height": h, "width": w}` does not keep it. In a call, `"native"` means `None`.
        max_tokens (`int`, *optional*):
            Limit on the patches of an image, counting partial ones. A larger working image is made smaller by
            [`limited_size`], with one warning. `None` sets no limit.
        patch_size (`int`, *optional*):
            Side of a patch in pixels; required with `max_tokens`.
        image_range (`(float, float)`, *optional*):
            Values of black and white of images that have floats or more than 8 bits: `(0, 4095)` for 12 bits. Values
            outside are clipped; a range that most pixels lie outside of is refused. It does not apply to 8-bit images.
        do_resize (`bool`, *optional*, defaults to `True`):
            Whether to resize to `size`, if it is set.
        resample (`PIL.Image.Resampling`, *optional*, defaults to `BICUBIC`):
            Pillow's filter, antialiased when shrinking.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether to multiply integer pixels by `rescale_factor`. Float pixels are not rescaled.
        rescale_factor (`float`, *optional*, defaults to `1 / 255`):
            Factor for 8-bit levels.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to subtract `image_mean` and divide by `image_std`.
        image_mean (`float` or `list[float]`, *optional*, defaults to `[0.5, 0.5, 0.5]`):
            Mean per channel, of pixels in 0–1.
        image_std (`float` or `list[float]`, *optional*, defaults to `[0.5, 0.5, 0.5]`):
            Standard deviation per channel, of pixels in 0–1.
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Whether to convert other modes to RGB. With `False` they are refused.

    A call takes images (and any of the above, `input_data_format` and `return_tensors`) and returns a
    [`~transformers.BatchFeature`]:
        - **pixel_values** (`(batch, 3, height, width)` with `return_tensors="pt"` or `"np"`, else a list of arrays
          `(3, height, width)`), float32.
        - **original_sizes** (`list[tuple[int, int]]`): `(height, width)` of each upright image before resizing,
          the size of its masks. It is always a plain list, whatever `return_tensors` is, also after `.to(device)`.

    Raises:
        ValueError: an image that cannot be read, has a side below 2 pixels, NaN or infinite values, a dtype or
            range not listed above, or an ambiguous shape such as `(3, width, 3)`; images of unequal size with
            `return_tensors`; padding or cropping; an impossible `size` or `max_tokens`.
        FileNotFoundError: a string that is neither a file nor a URL.
        ConnectionError: a URL that does not answer.
        TypeError: an object that is no image.

    Source: the defaults are those of `SiglipImageProcessorPil` in transformers.

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

    _auto_class = "AutoImageProcessor"  # saved folders name this class and carry its code
    valid_kwargs: Any = SparImageProcessorKwargs
    model_input_names = ["pixel_values", "original_sizes"]
    size = None
    max_tokens = None
    patch_size = None
    image_range = None
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
        The image processor for the SPAR model of a backbone of transformers: its mean and standard deviation, with SPAR's
        working size (shorter side 672 px, longer at most 2048 px). A SPAR folder loads as by `from_pretrained`.

        Raises:
            OSError: the folder or repository has no image processor's configuration.
            ValueError: the configuration lacks mean or standard deviation.
        """
        settings, _ = cls.get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("image_processor_type", "").startswith("Spar"):
            return cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if settings.get("do_normalize") is False:  # TIPSv2 reads pixels from 0 to 1, and C-RADIO normalises them itself
            settings["image_mean"], settings["image_std"] = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
        if "image_mean" not in settings or "image_std" not in settings:
            raise ValueError(
                f"The image processor of {pretrained_model_name_or_path} lacks `image_mean` or `image_std`; build "
                "`SparImageProcessorPil(image_mean=..., image_std=...)` with those of the checkpoint."
            )
        return cls(image_mean=settings["image_mean"], image_std=settings["image_std"], size=dict(PUBLISHED_SIZE))

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        # before transformers compares types: "native" is no size to it, and NumPy's integers are no integers
        if not isinstance(size := kwargs.get("size"), SizeDict | None):
            kwargs["size"] = check_size(size)
        for name in ("max_tokens", "patch_size"):
            if name in kwargs:
                kwargs[name] = as_whole(kwargs[name])
                check_count(name, kwargs[name])
        return super().preprocess(images, *args, **kwargs)

    def _standardize_kwargs(
        self, size=None, max_tokens=None, patch_size=None, image_range=None, **kwargs
    ) -> dict[str, Any]:
        check_count("max_tokens", max_tokens)
        check_count("patch_size", patch_size)
        if max_tokens is not None and patch_size is None:
            raise ValueError("`max_tokens` counts patches: set `patch_size` to that of the model too.")
        size = check_size(dict(size) if isinstance(size, SizeDict) else size)
        kwargs = super()._standardize_kwargs(size=size, **kwargs)
        kwargs["max_tokens"], kwargs["patch_size"] = max_tokens, patch_size
        kwargs["image_range"] = check_range(image_range)
        if kwargs.get("do_pad") or kwargs.get("do_center_crop"):
            raise ValueError(
                "SPAR's image processor neither pads nor crops: the model pads to its patch. Leave `do_pad` and "
                "`do_center_crop` out, and group images of unequal size."
            )
        if kwargs.get("data_format") not in (None, ChannelDimension.FIRST):
            raise ValueError("`pixel_values` are always (batch, channels, height, width). Leave `data_format` out.")
        return kwargs

    def _validate_preprocess_kwargs(self, do_resize=None, size=None, **kwargs):
        super()._validate_preprocess_kwargs(do_resize=bool(do_resize and size is not None), size=size, **kwargs)

    def fetch_images(self, image_url_or_urls):
        """Replace paths, URLs, bytes and open files, in a list or alone, by PIL images in their own mode."""
        images = image_url_or_urls
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        return read_image(images) if is_encoded(images) else images

    def _prepare_image_like_inputs(self, images, expected_ndims: int = 3, **kwargs) -> list[np.ndarray]:
        several = as_list(images)
        images = self.fetch_images([images] if several is None else several)
        if not images:
            raise ValueError("There is no image. Pass at least one.")
        return [self.process_image(image, **kwargs) for image in images]

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        image_range: tuple[float, float] | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Convert an image to upright RGB: `(3, height, width)`, uint8 levels or float32 from 0 to 1.

        Raises:
            TypeError, ValueError: as the class.
        """
        return rgb_pixels(image, image_range, input_data_format, do_convert_rgb is not False)

    def working_size(
        self, height: int, width: int, size: SizeDict | None, max_tokens: int | None, patch_size: int | None
    ) -> tuple[int, int]:
        """The `(height, width)` an image is resized to: as `size` says (`None`: its own), within `max_tokens`."""
        asked, allowed = working_size(height, width, size, max_tokens, patch_size)
        if allowed != asked:
            logger.warning_once(TOO_MANY_PATCHES.format(max_tokens))
        return allowed

    def resize(self, image: np.ndarray, size: SizeDict, resample: int | None = None, **kwargs) -> np.ndarray:
        """Resize `(3, height, width)` with Pillow; float pixels by channel, clipped to 0–1 as Pillow clips levels."""
        return resize_pixels(image, resized_size(image.shape[1], image.shape[2], size), resample)

    def rescale(self, image: np.ndarray, scale: float, **kwargs) -> np.ndarray:
        """Convert levels to float32; float pixels are in 0–1 already and are returned unchanged."""
        return rescale_pixels(image, scale)

    def normalize(self, image: np.ndarray, mean, std, **kwargs) -> np.ndarray:
        """Subtract the mean and divide by the standard deviation of each channel: `(3, height, width)` float32."""
        return normalise_pixels(image, mean, std)

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
                f"Images of unequal size (height, width) cannot be stacked: {sizes[:5]}. Group them by size, call the image "
                'processor once per image, set `size={"height": …, "width": …}`, or get a list with '
                "`return_tensors=None`."
            )
        output["original_sizes"] = [image.shape[1:] for image in images]
        output.skip_tensor_conversion = ["original_sizes"]
        return output.convert_to_tensors(return_tensors)

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None, return_segmentation_scores: bool = False
    ) -> list[Any]:
        """
        Label maps from [`SparSemanticSegmenterOutput`]: logits upsampled to the patch size, cropped to the image the model
        saw and resized to the original image, in one step and in bounded memory (see
        [`~spar_hf.model.segmentation.decide`]).

        Args:
            outputs ([`SparSemanticSegmenterOutput`]): outputs of a batch.
            target_sizes (`list[tuple[int, int]]`, *optional*):
                `(height, width)` of each image: the image processor's `original_sizes`. Defaults to the size the model
                saw.
            return_segmentation_scores (`bool`, *optional*, defaults to `False`):
                Whether to return the probabilities of all classes too.

        Returns:
            Per image, the class of every pixel: `(height, width)` int32. With scores, an output with this `segmentation`
            and `segmentation_scores` `(classes, height, width)` (see
            [`~spar_hf.model.segmentation.class_probabilities`]).

        Raises:
            ValueError: another number of sizes than of images; scores of more than 1 GiB.
        """
        results = []
        for image in grids(outputs, target_sizes):
            scores = class_probabilities(*image)[1] if return_segmentation_scores else None
            results.append(with_scores(decide(*image).labels, scores))
        return results

    def post_process_panoptic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None, **thresholds: Any
    ) -> list[dict[str, Any]]:
        """
        Label maps with a score per class, which `pipeline("image-segmentation")` asks for first.

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            thresholds: of that pipeline, for models that predict segments; ignored.

        Returns:
            Per image the label map `segmentation`, and `segments_info` with `id`, `label_id` (both the class) and `score`
            (mean probability over its pixels) of every class that has pixels.
        """
        results = []
        for image in grids(outputs, target_sizes):
            decision = decide(*image)
            pixels, scores = decision.class_scores(int(image[1].max()) + 1)
            found = pixels.nonzero()[:, 0].tolist()
            segments = [{"id": label, "label_id": label, "score": float(scores[label])} for label in found]
            results.append({"segmentation": decision.labels, "segments_info": segments})
        return results

    def to_dict(self) -> dict[str, Any]:
        # "image_processor_type": the whole name. PilBackend drops its "Pil", and Auto classes then warn of a missing twin.
        # "video_processor_type": without it, `pipeline` takes this code for that of a video processor and asks to trust it,
        # although the library is installed.
        return {**super().to_dict(), "image_processor_type": type(self).__name__, "video_processor_type": "none"}


__all__ = ["SparImageProcessorPil"]
