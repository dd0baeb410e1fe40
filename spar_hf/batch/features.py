"""What `spar-hf features` writes: dense features of images as safetensors, one file per image or shards with an index."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spar_hf.cli.commands import quiet_transformers
from spar_hf.model.image_processing_spar import SparImageProcessorPil
from spar_hf.model.modeling_spar import SparVisionModel
from spar_hf.model.pipeline import check_device
from spar_hf.registration import SPAR_TINY
from spar_hf.teacher import SlidingWindowTeacher
from spar_hf.utils.atomic import write_atomically, write_json
from spar_hf.utils.fingerprint import fingerprint
from spar_hf.utils.image_files import InputImage

KEY = "feature_map"  # of the tensor in a file of one image
INDEX = "features.safetensors.index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class FeatureExtractor:
    """
    Dense features of images by a model's one pass or its sliding window.

    Args:
        model (`str`, *optional*): folder or hub id of a SPAR model, with or without text tower, or of an untouched backbone;
            the embedded model by default.
        shortest_edge (`int`, *optional*): shorter side of the working image in pixels; the checkpoint's by default.
        normalize (`bool`, *optional*, defaults to `False`): whether every patch's feature gets unit length.
        dtype (`str`, *optional*, defaults to `"float32"`): of the features: `"float16"`, `"bfloat16"` or `"float32"`.
        stride (`int`, *optional*): step of the sliding window in pixels; one pass by default.
        window_size (`int`, *optional*): side of the window in pixels; the model's own by default.
        device (`str`, *optional*): where the model runs; a graphics card by default where there is one.

    Raises:
        ValueError: an unknown dtype or device, a window without a stride, or a stride that misses pixels.
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
    name: str = field(init=False, repr=False)
    encoder: Any = field(init=False, repr=False)
    image_processor: Any = field(init=False, repr=False)

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"Unknown dtype {self.dtype!r}; use {', '.join(DTYPES)}.")
        if self.window_size is not None and self.stride is None:
            raise ValueError("A window needs a step: give a stride, 24 pixels say.")
        quiet_transformers()
        check_device(self.device)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder = SPAR_TINY if self.model is None else self.model
        model: Any = SparVisionModel.from_backbone(folder)
        model = model.to(device).eval()
        self.name = Path(folder).resolve().name if Path(folder).is_dir() else str(folder)
        self.encoder = model
        if self.stride is not None:
            self.encoder = SlidingWindowTeacher(model, window_size=self.window_size, stride=self.stride).eval()
            self.window_size = self.encoder.window_size
        self.image_processor = SparImageProcessorPil.from_backbone(folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """
        What the features of all images share; files of other settings are not to be mixed with. A folder of the same name
        may hold other weights: `fingerprint` tells.
        """
        model = self.encoder if self.stride is None else self.encoder.model
        parts = fingerprint(model) + self.image_processor.to_json_string()
        return {
            "model": self.name,
            "fingerprint": hashlib.sha256(parts.encode()).hexdigest()[:20],
            "patch_size": self.encoder.config.patch_size,
            "normalized": self.normalize,
            "dtype": self.dtype,
            "shortest_edge": self.shortest_edge,
            "stride": self.stride,
            "window_size": self.window_size,
        }

    @torch.no_grad()
    def __call__(self, source: str) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        Args:
            source (`str`): file or URL.

        Returns:
            Features `(dim, ceil(height / patch), ceil(width / patch))` of the working image, on the CPU, and a record with
            `image`, `original_size` and `working_size`, both `[height, width]` in pixels.

        Raises:
            ValueError: an image that cannot be read, or features beyond the numbers of half precision.
        """
        options = {} if self.shortest_edge is None else {"size": {"shortest_edge": self.shortest_edge}}
        inputs = self.image_processor(source, return_tensors="pt", **options)
        weight = next(self.encoder.parameters())
        pixel_values = inputs["pixel_values"].to(weight.device, weight.dtype)
        features = self.encoder(pixel_values).feature_map[0].float()  # (1, dim, h, w) -> (dim, h, w)
        if self.normalize:
            features = torch.nn.functional.normalize(features, dim=0)
        if self.dtype == "float16" and features.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"The features of {source} exceed float16. Use bfloat16 or float32, or normalise them.")
        record = {
            "image": source if len(source) < 1000 else f"{source[:80]}…",  # a data: URL is as long as its image
            "original_size": list(inputs["original_sizes"][0]),
            "working_size": list(pixel_values.shape[-2:]),
        }
        return features.to(DTYPES[self.dtype]).cpu().contiguous(), record


def as_metadata(values: dict[str, Any]) -> dict[str, str]:
    """safetensors' metadata are strings: each value as JSON, a string as it is."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def check_settings(file: Path, settings: dict[str, Any]) -> list[str]:
    """
    The tensors of a file written before, if it was written with the same settings.

    Raises:
        ValueError: with other settings, or the file cannot be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata, keys = opened.metadata() or {}, list(opened.keys())
    except Exception as error:  # safetensors has an error class of its own in every version
        raise ValueError(f"{file} is no safetensors file ({error}). Remove it, or name another folder.") from error
    for key, value in as_metadata(settings).items():
        if metadata.get(key) != value:
            raise ValueError(
                f"{file} was written with {key}={metadata.get(key)}, not {value}. Name another folder, or repeat the "
                "options of the earlier run."
            )
    return keys


class FileWriter:
    """One file per image: `sub/street.safetensors` with the tensor `feature_map`, everything else in its metadata."""

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.output, self.settings = output, settings

    def target(self, image: InputImage) -> Path:
        return self.output / f"{image.name}.safetensors"

    def is_done(self, image: InputImage) -> bool:
        """Whether the image's file is there, with these settings."""
        return self.target(image).is_file() and bool(check_settings(self.target(image), self.settings))

    def add(self, image: InputImage, features: torch.Tensor, record: dict[str, Any]) -> None:
        metadata = as_metadata({**self.settings, **record})
        write_atomically(self.target(image), lambda path: save_file({KEY: features}, path, metadata))

    def close(self) -> None:
        """Nothing is open."""


class ShardWriter:
    """
    Files of about `shard_bytes` with a tensor per image, named as the image (`sub/street`); the metadata hold the settings
    and under `images` the records of all, by name, as JSON. Every process writes files of its own number.
    """

    def __init__(self, output: Path, settings: dict[str, Any], shard_bytes: int, process: int = 0):
        self.output, self.settings, self.shard_bytes, self.process = output, settings, shard_bytes, process
        self.written = {name for shard in list_shards(output) for name in check_settings(shard, settings)}
        mine = [shard.stem for shard in list_shards(output) if shard.stem.startswith(f"features-{process:03d}-")]
        self.number = 1 + max((int(stem.rpartition("-")[2]) for stem in mine), default=-1)
        self.tensors: dict[str, torch.Tensor] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def is_done(self, image: InputImage) -> bool:
        """Whether a shard of an earlier run holds the image."""
        return image.name in self.written

    def add(self, image: InputImage, features: torch.Tensor, record: dict[str, Any]) -> None:
        self.tensors[image.name], self.records[image.name] = features, record
        if sum(tensor.nbytes for tensor in self.tensors.values()) >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Write what is held."""
        if not self.tensors:
            return
        metadata = as_metadata({**self.settings, "photos": self.records})
        tensors = self.tensors
        target = self.output / f"features-{self.process:03d}-{self.number:05d}.safetensors"
        write_atomically(target, lambda path: save_file(tensors, path, metadata))
        self.number += 1
        self.tensors, self.records = {}, {}


def list_shards(output: Path) -> list[Path]:
    return sorted(output.glob("features-[0-9]*-[0-9]*.safetensors"))


def write_index(output: Path, settings: dict[str, Any]) -> int:
    """
    The index of all shards, in the form of transformers: `weight_map` from the image's name to its file.

    Returns:
        Number of images in it.
    """
    weight_map, size = {}, 0
    for shard in list_shards(output):
        size += shard.stat().st_size
        weight_map.update(dict.fromkeys(check_settings(shard, settings), shard.name))
    index = {"metadata": {**settings, "total_size": size}, "weight_map": weight_map}
    write_json(output / INDEX, index)
    return len(weight_map)


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int, str | None, Any]]:
    """
    This process among those that `accelerate launch` has started: its number, how many there are, its device (`None`: not
    chosen) and a function that waits for all. One process alone needs no accelerate.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1, None, lambda: None
        return
    from accelerate import PartialState

    # without `cpu` accelerate takes every process for the only one where there is no graphics card
    cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true") or not torch.accelerator.is_available()
    # whoever has the small images waits for the others, and the default patience is minutes
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))
    try:
        yield state.process_index, state.num_processes, str(state.device), state.wait_for_everyone
    finally:
        state.destroy_process_group()


def share(images: Sequence[InputImage], process: int, count: int) -> Sequence[InputImage]:
    """Every `count`-th image: each belongs to one process, whatever was written before."""
    return images[process::count]
