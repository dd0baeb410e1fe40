"""Dense features of images by a frozen vision model, made once and kept on disk, or made each time."""

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from spar_hf import SlidingWindowTeacher, SparImageProcessorPil, SparVisionModel
from spar_hf.data.segmentation_sets import read_image
from spar_hf.utils.atomic import write_atomically
from spar_hf.utils.fingerprint import fingerprint

logger = logging.getLogger("frozen_features")


def parse_inference(text: str) -> int | None:
    """
    `single` -> `None`, `sliding:STRIDE` -> the stride.

    Raises:
        ValueError: another form.
    """
    kind, _, stride = text.partition(":")
    if text == "single":
        return None
    if kind == "sliding" and stride.isdecimal() and int(stride) > 0:
        return int(stride)
    raise ValueError(f"Cannot read --inference {text}: write single or sliding:STRIDE, e.g. sliding:24.")


class FrozenFeatures:
    """
    Features of images by path, from the disk where they are there: a dict of `features` `(dim, h, w)` bfloat16,
    `working_size` (the image that the model saw) and `image_size`, both (height, width) as tensors.

    Args:
        model: hub id or folder of a SPAR model or a backbone of transformers.
        accelerator: processes share the making out among them.
        inference: `single` (one pass) or `sliding:STRIDE`.
        size: of the image processor, in place of the model's own.
        window_batch_size: windows per forward pass of a sliding window.
        cache: folder to keep features in; `None` makes them each time.

    Attributes:
        made: images whose features this process made, in `seconds`.

    Raises:
        ValueError: another form of `inference`.
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
        self.model = SparVisionModel.from_backbone(model).eval().requires_grad_(False).to(accelerator.device)
        self.image_processor = SparImageProcessorPil.from_backbone(model)
        if size:
            self.image_processor = SparImageProcessorPil.from_dict({**self.image_processor.to_dict(), "size": size})
        self.encoder: Any = self.model
        if stride is not None:
            self.encoder = SlidingWindowTeacher(self.model, stride=stride, window_batch_size=window_batch_size)
        self.folder: Path | None = None
        if cache is not None:
            self.folder = Path(cache) / self.fingerprint(inference)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.names: dict[Path, str] = {}
        self.made, self.seconds = 0, 0.0

    def fingerprint(self, inference: str) -> str:
        """A name for all that features depend on but the image."""
        parts = [fingerprint(self.model), inference, self.image_processor.to_json_string()]
        parts.append(self.accelerator.mixed_precision)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]

    def file(self, path: Path) -> Path:
        assert self.folder is not None
        if path not in self.names:
            self.names[path] = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        return self.folder / f"{self.names[path]}.safetensors"

    def fill(self, paths: list[Path]) -> None:
        """Make what the disk does not hold yet; every process its share."""
        if self.folder is None:
            return
        share = paths[self.accelerator.process_index :: self.accelerator.num_processes]
        for path in tqdm(share, desc="features", disable=not self.accelerator.is_main_process):
            self(path)
        self.accelerator.wait_for_everyone()

    def __call__(self, path: Path) -> dict[str, torch.Tensor]:
        if self.folder is None:
            return self.make(path)
        file = self.file(path)
        if file.is_file():
            try:
                return load_file(file)
            except SafetensorError:
                logger.warning("%s is damaged and made again", file)
        made = self.make(path)
        write_atomically(file, lambda temporary: save_file(made, temporary))
        return made

    @torch.no_grad()
    def make(self, path: Path) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        inputs = self.image_processor(read_image(path), return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.accelerator.device)
        with self.accelerator.autocast():
            features = self.encoder(pixel_values).feature_map[0]
        # rounded as on the disk, so that both ways give the same probe
        made = {
            "features": features.bfloat16().cpu().contiguous(),
            "working_size": torch.tensor(pixel_values.shape[-2:]),
            "photo_size": torch.tensor(inputs["original_sizes"][0]),
        }
        self.made, self.seconds = self.made + 1, self.seconds + time.perf_counter() - start
        return made
