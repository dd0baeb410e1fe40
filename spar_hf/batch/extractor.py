"""Dense features of images: reading an image, and one forward pass for images of one size."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from spar_hf.model.devices import check_device
from spar_hf.model.fingerprints import vision_fingerprint
from spar_hf.model.image_input import has_more_frames, is_encoded, open_image, turn_upright
from spar_hf.model.image_pixels import token_limit
from spar_hf.model.image_processing_spar import SparImageProcessorPil
from spar_hf.model.modeling_spar import SparVisionModel
from spar_hf.registration import SPAR_TINY
from spar_hf.teacher import SlidingWindowTeacher
from spar_hf.utils.errors import UsageError
from spar_hf.utils.remote_files import is_remote, read_remote

FEATURES = "features"  # the layer that SPAR trains
# settings that a file states only if they were set, so that folders of earlier versions can be continued
ONLY_IF_SET = ("max_tokens", "image_range", "layers", "pool", "size")
KEY = "feature_map"  # name of its tensor in files
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
POOLS = ("mean", "head")
GROUP_TOKENS = 16_384  # patches of the images that share a forward pass, which bounds its memory


@dataclass
class PreparedImage:
    """
    What the model sees of an image.

    Attributes:
        pixel_values: normalised pixels `(1, 3, height, width)`, on the CPU.
        record: `image` (its name), `original_size` and `working_size`, both `[height, width]` in pixels.
        only_first: the name of a file with several frames or pages, of which the first was read; else empty.
    """

    pixel_values: torch.Tensor
    record: dict[str, Any]
    only_first: str = ""


@dataclass
class ImagePreparation:
    """
    Reads and preprocesses images. It is small, so that processes that read ahead of the model have a copy each.

    Args:
        image_processor ([`SparImageProcessorPil`]): of the model.
        patch_size: of the model, in pixels.
        size: working size as the pipeline takes it: a number is the shorter side, `"native"` the image's own; the
            checkpoint's by default.
        max_tokens: limit on the patches of an image, see [`FeatureExtractor`].
        image_range: see [`FeatureExtractor`].
    """

    image_processor: Any
    patch_size: int
    size: Any = None
    max_tokens: int | None = None
    image_range: Sequence[float] | None = None

    def __call__(self, source: Any) -> PreparedImage:
        """
        Args:
            source: file, URL (`s3://` and others of fsspec too), the bytes of an image file, an open one, or an image.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        limit = token_limit(self.max_tokens, self.image_processor.max_tokens)
        options: dict[str, Any] = {"max_tokens": limit, "patch_size": self.patch_size}
        options |= {} if self.size is None else {"size": self.size}
        options |= {} if self.image_range is None else {"image_range": self.image_range}
        image, more = read_remote(source) if is_remote(source) else source, False
        if is_encoded(image):
            opened, file = open_image(image)
            image, more = turn_upright(opened, file), has_more_frames(opened)
        inputs = self.image_processor(image, return_tensors="pt", **options)
        name = str(source) if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None) or "image"
        shown = name if len(name) < 1000 else f"{name[:80]}…"  # a data: URL is as long as its image
        record = {
            "image": shown,
            "original_size": list(inputs["original_sizes"][0]),
            "working_size": list(inputs["pixel_values"].shape[-2:]),
        }
        return PreparedImage(inputs["pixel_values"], record, shown if more else "")


def parse_layers(layers: str | Sequence[str | int]) -> tuple[str | int, ...]:
    """
    The layers of `"3,6,features"` or of a sequence, each once.

    Raises:
        UsageError: something else than numbers and `features`.

    Example:

    ```python
    >>> parse_layers("3, 6, features"), parse_layers([12])
    ((3, 6, 'features'), (12,))
    ```"""
    parts = layers.split(",") if isinstance(layers, str) else layers
    names = [str(part).strip().lower() for part in parts]
    if not names or not all(name == FEATURES or name.isdecimal() for name in names):
        raise UsageError(f"--layers {layers!r} must be numbers of blocks and {FEATURES!r}, such as 3,6,9,{FEATURES}.")
    return tuple(dict.fromkeys(name if name == FEATURES else int(name) for name in names))


def layer_key(layer: str | int) -> str:
    """Name of the tensor of a layer in files: `feature_map`, `layer_3`."""
    return KEY if layer == FEATURES else f"layer_{layer}"


def same_size_groups(images: Sequence[PreparedImage], patch_size: int, most: int) -> Iterator[list[int]]:
    """
    Positions of images that share a forward pass: equal working sizes, at most `most` images, and 16,384 patches unless a
    single image has more.
    """
    groups: dict[torch.Size, list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(image.pixel_values.shape, []).append(position)
    for shape, positions in groups.items():
        patches = -(-shape[-2] // patch_size) * -(-shape[-1] // patch_size)
        at_once = max(1, min(most, GROUP_TOKENS // patches))
        yield from (positions[start : start + at_once] for start in range(0, len(positions), at_once))


@dataclass
class FeatureExtractor:
    """
    Computes dense features of images with a model in one pass, or with its sliding window.

    Args:
        model: folder or hub id of a SPAR model, with or without text tower, or of a pretrained backbone of transformers; the
            embedded spar-tiny by default.
        shortest_edge: shorter side of the working size in pixels; the checkpoint's by default.
        normalize: whether to scale the feature of every patch, or the pooled vector, to unit length.
        dtype: of the features: `"float16"`, `"bfloat16"` or `"float32"`.
        stride: stride of the sliding window in pixels; one pass by default.
        window_size: side of the window in pixels; the model's by default.
        device: of the model; CUDA by default if available, else the CPU.
        max_tokens: limit on the patches of an image; larger working images are made smaller. By default the image
            processor's, else 16,384 (2048×2048 pixels at a patch of 16), as in the pipeline.
        image_range: values of black and white of images of floats or more than 8 bits, see [`SparImageProcessorPil`].
        layers: `"features"`, what the model gives, and numbers of blocks, from 1; 0 are the embeddings. The output of a
            block is what [`SparBackbone`] gives: after the backbone's last norm, patches only.
        pool: one vector per image in place of a map: `"mean"` of all patches, or `"head"`, the image embedding of the
            backbone's own pooling head.
        size: working size as the pipeline takes it, in place of `shortest_edge`.

    Raises:
        ValueError: an unknown dtype, device, layer or pool, a window without stride, a stride larger than the window, or
            blocks of a sliding window.
        OSError: no such folder or repository.

    Example:

    ```python
    >>> from PIL import Image
    >>> Image.new("RGB", (330, 200)).save("street.png")
    >>> features, record = FeatureExtractor(shortest_edge=96)("street.png")
    >>> features.shape, record["original_size"], record["working_size"]
    (torch.Size([192, 6, 10]), [200, 330], [96, 158])
    ```"""

    model: str | None = None
    shortest_edge: int | None = None
    normalize: bool = False
    dtype: str = "float32"
    stride: int | None = None
    window_size: int | None = None
    device: str | None = None
    max_tokens: int | None = None
    image_range: tuple[float, float] | None = None
    layers: Any = (FEATURES,)
    pool: str | None = None
    size: Any = None
    name: str = field(init=False, repr=False)
    encoder: Any = field(init=False, repr=False)
    image_processor: Any = field(init=False, repr=False)
    prepare: ImagePreparation = field(init=False, repr=False)

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise UsageError(f"Unknown dtype {self.dtype!r}; use one of {', '.join(DTYPES)}.")
        if self.window_size is not None and self.stride is None:
            raise UsageError("A window size needs a stride: give a stride too, for example 24 pixels.")
        self.layers = parse_layers(self.layers)
        if self.pool not in (None, *POOLS):
            raise UsageError(f"Unknown pool {self.pool!r}; use one of {', '.join(POOLS)}.")
        if self.stride is not None and (self.layers != (FEATURES,) or self.pool == "head"):
            raise UsageError(
                "A sliding window averages the features alone: leave out the stride, or the layers and head."
            )
        if self.pool == "head" and self.layers != (FEATURES,):
            raise UsageError(
                f"The pooling head makes one vector of an image: with it, leave the layers at {FEATURES!r}."
            )
        if self.size is not None and self.shortest_edge is not None:
            raise UsageError("`size` and `shortest_edge` both say how images are resized. Leave one out.")
        check_device(self.device)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder = SPAR_TINY if self.model is None else self.model
        model: Any = SparVisionModel.from_backbone(folder)
        blocks = model.config.num_hidden_layers
        if too_high := [layer for layer in self.layers if layer != FEATURES and layer > blocks]:
            raise UsageError(f"The model has no block {too_high[0]}: it has {blocks}.")
        model = model.to(device).eval()
        self.name = Path(folder).resolve().name if Path(folder).is_dir() else str(folder)
        self.encoder = model
        if self.stride is not None:
            self.encoder = SlidingWindowTeacher(model, window_size=self.window_size, stride=self.stride).eval()
            self.window_size = self.encoder.window_size
        self.image_processor = SparImageProcessorPil.from_backbone(folder)
        if self.size is None and self.shortest_edge is not None:
            self.size = {"shortest_edge": self.shortest_edge}
        patch, limits = self.encoder.config.patch_size, (self.max_tokens, self.image_range)
        self.prepare = ImagePreparation(self.image_processor, patch, self.size, *limits)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """
        Settings that all images share and that every file records, so that files of other settings are not mixed with.
        `fingerprint` identifies the weights and the image processing, since folders may have the same name.
        """
        model = self.encoder if self.stride is None else self.encoder.model
        parts = vision_fingerprint(model) + self.image_processor.to_json_string()
        given: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "image_range": self.image_range and list(self.image_range),
        }
        given |= {"layers": None if self.layers == (FEATURES,) else list(self.layers), "pool": self.pool}
        given |= {"size": self.size if self.shortest_edge is None else None}
        return {
            "model": self.name,
            "fingerprint": hashlib.sha256(parts.encode()).hexdigest()[:20],
            "patch_size": self.encoder.config.patch_size,
            "normalized": self.normalize,
            "dtype": self.dtype,
            "shortest_edge": self.shortest_edge,
            "stride": self.stride,
            "window_size": self.window_size,
            **{name: given[name] for name in ONLY_IF_SET if given[name] is not None},
        }

    def __call__(self, source: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        Args:
            source: see [`ImagePreparation`].

        Returns:
            The feature map `(dim, ceil(height / patch), ceil(width / patch))` on the CPU, where height and width are those
            of the working size, or a vector `(dim,)` with `pool`; of the first of several layers. And the record of
            [`PreparedImage`].

        Raises:
            ValueError: an image that cannot be read, or features beyond the range of float16.
        """
        prepared = self.prepare(source)
        return next(iter(self.encode([prepared])[0].values())), prepared.record

    @torch.no_grad()
    def encode(self, images: Sequence[PreparedImage]) -> list[dict[str, torch.Tensor]]:
        """
        One forward pass for images of one working size.

        Returns:
            Per image its tensors on the CPU by name: `feature_map`, `layer_3`, …

        Raises:
            ValueError: features beyond the range of float16, or not finite.
        """
        weight = next(self.encoder.parameters())
        pixel_values = torch.cat([image.pixel_values for image in images]).to(weight.device, weight.dtype)
        found: list[dict[str, torch.Tensor]] = [{} for _ in images]
        for layer, maps in self._layer_maps(pixel_values).items():
            maps = maps.float()
            if self.pool == "mean":
                maps = maps.flatten(2).mean(2)
            if self.normalize:
                maps = torch.nn.functional.normalize(maps, dim=1)
            for image, one, tensors in zip(images, maps, found, strict=True):
                self._check(one, image.record["image"])
                tensors[layer_key(layer)] = one.to(DTYPES[self.dtype]).cpu().contiguous()
        return found

    def _layer_maps(self, pixel_values: torch.Tensor) -> dict[str | int, torch.Tensor]:
        """Maps of the layers in the order asked for: `(batch, channels, h, w)`; with the pooling head `(batch, dim)`."""
        if self.pool == "head":
            return {FEATURES: self.encoder(pixel_values, output_pooled=True).pooler_output}
        if self.layers == (FEATURES,):
            return {FEATURES: self.encoder(pixel_values).feature_map}
        outputs = self.encoder(pixel_values, output_hidden_states=True)
        grid = outputs.feature_map.shape[-2:]
        maps: dict[str | int, torch.Tensor] = {}
        for layer in self.layers:
            if isinstance(layer, str):
                maps[layer] = outputs.feature_map
                continue
            # class and register tokens come first, as in `SparBackbone`
            tokens = self.encoder.backbone.final_norm(outputs.hidden_states[layer])[:, -grid[0] * grid[1] :]
            maps[layer] = tokens.transpose(1, 2).unflatten(2, grid)
        return maps

    def _check(self, features: torch.Tensor, name: str) -> None:
        if not features.isfinite().all():
            raise ValueError(f"The features of {name} are not finite.")
        if self.dtype == "float16" and features.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"The features of {name} exceed float16. Use bfloat16 or float32, or normalise them.")
