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
from spar_hf.heads.linear_probe_options import FeatureOptions
from spar_hf.model.fingerprints import vision_fingerprint
from spar_hf.utils.atomic import write_atomically
from spar_hf.utils.devices import clock
from spar_hf.utils.errors import NotFinite, as_usage_errors

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
        options: the model, how it reads images, and where features are kept.
        accelerator: its processes share the work of making features.

    Attributes:
        made: number of images whose features this process made.
        seconds: time that it took for them.

    Raises:
        UsageError: the model cannot be loaded, or the stride does not fit its window.
    """

    def __init__(self, options: FeatureOptions, accelerator: Accelerator):
        self.accelerator = accelerator
        self.encoder: Any
        with as_usage_errors():
            model = SparVisionModel.from_backbone(options.model)
            self.image_processor = SparImageProcessorPil.from_backbone(options.model)
        if options.size:
            settings = self.image_processor.to_dict() | {"do_resize": True, "size": options.size}
            self.image_processor = SparImageProcessorPil.from_dict(settings)
        self.model = self.encoder = model.eval().requires_grad_(False).to(accelerator.device)
        if options.stride is not None:
            with as_usage_errors():
                self.encoder = SlidingWindowTeacher(self.model, None, options.stride, options.window_batch_size)
        self.folder: Path | None = None
        if options.cache is not None:
            self.folder = Path(options.cache) / self.fingerprint(options.inference)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.hashes: dict[str, str] = {}  # path -> hash of the file
        self.made, self.seconds = 0, 0.0

    def fingerprint(self, inference: str) -> str:
        """A name for all that features depend on except the image."""
        processor, precision = self.image_processor.to_json_string(), self.accelerator.mixed_precision
        parts = (vision_fingerprint(self.model), inference, processor, precision)
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
        """
        The features of one image of a set.

        Raises:
            NotFinite: the features are no numbers.
            UsageError: the image is too large for the stride.
        """
        if self.folder is None:
            return self._make(data, number)
        values = "".join(f"-{value:g}" for value in data.reading.image_range or ())  # black and white
        path = self.folder / f"{self._hash(data.file(number))}{values}.safetensors"
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
        with self.accelerator.autocast(), as_usage_errors():
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
