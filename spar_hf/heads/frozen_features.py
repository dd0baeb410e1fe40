"""Dense features of images by a frozen vision model, made once and kept on disk, or made each time."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from spar_hf import SlidingWindowTeacher, SparImageProcessorPil, SparVisionModel
from spar_hf.data.segmentation_sets import SegmentationSet
from spar_hf.model.fingerprints import vision_fingerprint
from spar_hf.utils.atomic import write_atomically
from spar_hf.utils.devices import clock
from spar_hf.utils.errors import NotFinite, UsageError, as_usage_errors

logger = logging.getLogger(__name__)


@dataclass
class ImageFeatures:
    """
    The features of one image.

    Attributes:
        features: `(dim, h, w)` bfloat16.
        working_size: height and width of the resized image that the model saw, in pixels.
        image_size: height and width of the image itself.
    """

    features: torch.Tensor
    working_size: tuple[int, int]
    image_size: tuple[int, int]

    def save(self, path: Path) -> None:
        """Write a safetensors file; its key "photo_size" is that of files written by version 0.1."""
        sizes = {"working_size": self.working_size, "photo_size": self.image_size}
        save_file({"features": self.features, **{key: torch.tensor(size) for key, size in sizes.items()}}, path)

    @classmethod
    def load(cls, path: Path) -> "ImageFeatures":
        """
        Read what [`ImageFeatures.save`] wrote.

        Raises:
            SafetensorError: the file is damaged.
        """
        tensors = load_file(path)
        working_size, image_size = (tuple(tensors[key].tolist()) for key in ("working_size", "photo_size"))
        return cls(tensors["features"], working_size, image_size)


class FrozenFeatures:
    """
    Features of the images of a [`SegmentationSet`], read from the disk where they are there already.

    Args:
        model: hub id or folder of a SPAR model or a backbone of transformers.
        accelerator: its processes share the work of making features.
        inference: `single` (one pass) or `sliding:STRIDE` (sliding window, stride in pixels).
        size: of the image processor, in place of the model's own.
        window_batch_size: windows per forward pass of a sliding window.
        cache: folder to keep features in; `None` makes them each time.

    Attributes:
        made: number of images whose features this process made.
        seconds: time that it took for them.

    Raises:
        UsageError: another form of `inference`, or the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        accelerator: Accelerator,
        inference: str = "single",
        size: dict[str, int] | None = None,
        window_batch_size: int = 16,
        cache: str | None = None,
    ):
        stride = parse_inference(inference)
        self.accelerator = accelerator
        self.encoder: Any
        with as_usage_errors():
            vision_model = SparVisionModel.from_backbone(model)
        with as_usage_errors():
            self.image_processor = SparImageProcessorPil.from_backbone(model)
        if size:
            self.image_processor = SparImageProcessorPil.from_dict({**self.image_processor.to_dict(), "size": size})
        self.model = self.encoder = vision_model.eval().requires_grad_(False).to(accelerator.device)
        if stride is not None:
            with as_usage_errors():
                self.encoder = SlidingWindowTeacher(self.model, stride=stride, window_batch_size=window_batch_size)
        self.folder: Path | None = None
        if cache is not None:
            self.folder = Path(cache) / self.fingerprint(inference)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.hashes: dict[str, str] = {}  # path -> hash of the file
        self.made, self.seconds = 0, 0.0

    def fingerprint(self, inference: str) -> str:
        """A name for all that features depend on except the image."""
        parts = [vision_fingerprint(self.model), inference, self.image_processor.to_json_string()]
        parts.append(self.accelerator.mixed_precision)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]

    def fill(self, data: SegmentationSet) -> None:
        """Make the features of all images that the disk lacks; every process makes its share."""
        if self.folder is None:
            return
        share = range(self.accelerator.process_index, len(data), self.accelerator.num_processes)
        for number in tqdm(share, desc=f"features of {data.title}", disable=not self.accelerator.is_main_process):
            self(data, number)
        self.accelerator.wait_for_everyone()

    def __call__(self, data: SegmentationSet, number: int) -> ImageFeatures:
        """The features of one image of a set."""
        if self.folder is None:
            return self._make(data, number)
        path = self.folder / f"{self._hash(data.file(number))}.safetensors"
        if path.is_file():
            try:
                return ImageFeatures.load(path)
            except SafetensorError:
                logger.warning("%s is damaged and is made again.", path)
        made = self._make(data, number)
        write_atomically(path, made.save)
        return made

    def _hash(self, image: str | bytes) -> str:
        """Hash of an encoded image, read once where it is a file."""
        if isinstance(image, bytes):
            return hashlib.sha256(image).hexdigest()[:32]
        if image not in self.hashes:
            self.hashes[image] = hashlib.sha256(Path(image).read_bytes()).hexdigest()[:32]
        return self.hashes[image]

    @torch.no_grad()
    def _make(self, data: SegmentationSet, number: int) -> ImageFeatures:
        start = clock(self.accelerator.device)
        inputs = self.image_processor(data.read_image(number), return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.accelerator.device)
        with self.accelerator.autocast():
            features = self.encoder(pixel_values).feature_map[0]
        if not features.isfinite().all():
            raise NotFinite(
                f"Features of image {number} of {data.title} are not finite. Use another --mixed_precision."
            )
        # in the precision of the disk, so that a probe is the same with and without a cache
        features = features.bfloat16().cpu().contiguous()
        self.made, self.seconds = self.made + 1, self.seconds + clock(self.accelerator.device) - start
        height, width = pixel_values.shape[-2:]
        return ImageFeatures(features, (height, width), tuple(inputs["original_sizes"][0]))


def parse_inference(text: str) -> int | None:
    """
    The stride of `sliding:STRIDE`, and `None` for `single`.

    Raises:
        UsageError: another form.

    Example:

    ```python
    >>> parse_inference("sliding:24"), parse_inference("single")
    (24, None)
    ```"""
    kind, _, stride = text.partition(":")
    if text == "single":
        return None
    if kind == "sliding" and stride.isdecimal() and int(stride) > 0:
        return int(stride)
    raise UsageError(f"--inference {text}: write single or sliding:STRIDE, e.g. sliding:24.")
