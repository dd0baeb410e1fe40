"""
Features of a pre-trained image model that the vision tower imitates beside its labels.

A tower that starts from scratch on a few thousand images learns outlines, and knows few things it has not seen. A model
trained on many more images knows them; its features, read at the patches of a crop, are a target at every pixel, named or
not. They are computed once per image, without augmentation, and kept in few dimensions.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from spar_hf.pretraining.crops import CropSet
from spar_hf.pretraining.model import TEACHER_DIM
from spar_hf.utils.atomic import write_atomically
from spar_hf.utils.errors import UsageError, as_usage_errors

logger = logging.getLogger(__name__)

SAMPLE = 256  # images that the axes are found on
CELLS = 20_000  # features that they are found on
FILE = "image_teacher.safetensors"  # in the folder of the run
STRIDE = 32  # pixels per feature of convolutional models, whose configuration does not say it


class ImageTeacher:
    """
    A vision model of transformers, for its feature maps: `last_hidden_state` of a convolutional model, or the patches of a
    ViT without a class token or registers.

    Args:
        folder: of the model and its image processor, whose mean and standard deviation are used.
        dtype: of its weights.
        device: where it runs.

    Raises:
        UsageError: the folder holds no such model.
    """

    def __init__(self, folder: str, dtype: torch.dtype, device: torch.device):
        with as_usage_errors():
            processor = AutoImageProcessor.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder, dtype=dtype)
        self.model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.dtype, self.device = dtype, device
        self.mean, self.std = (
            torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std)
        )
        self.stride = getattr(model.config, "patch_size", STRIDE)

    @torch.no_grad()
    def __call__(self, image: np.ndarray, longest_edge: int) -> torch.Tensor:
        """
        The feature map of an image.

        Args:
            image: `(height, width, 3)` uint8.
            longest_edge: of the image as the model sees it, in pixels; sides are rounded to whole features.

        Returns:
            `(channels, height / stride, width / stride)`, in float32.

        Raises:
            UsageError: the model returns neither a feature map nor one token per patch.
        """
        height, width = image.shape[:2]
        scale = longest_edge / max(height, width) / self.stride
        rows, columns = (max(1, round(side * scale)) for side in (height, width))
        size = (columns * self.stride, rows * self.stride)
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1).float() / 255  # (3, height, width)
        pixels = ((pixels - self.mean) / self.std)[None].to(self.device, self.dtype)
        output = self.model(pixels.contiguous(memory_format=torch.channels_last)).last_hidden_state
        if output.ndim == 3:  # (1, prefix + rows * columns, channels) -> (1, channels, rows, columns)
            output = output[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        if output.shape[-2:] != (rows, columns):
            raise UsageError(f"The image teacher has no feature per {self.stride} × {self.stride} pixels.")
        return output[0].float()


def add_teacher_maps(sets: list[CropSet], folder: str, output: Path, accelerator: Accelerator) -> None:
    """
    Give every set the teacher's features of its images (`CropSet.teacher_maps`). They are computed once and kept in the
    folder of the run; of several processes the first one does it.

    Raises:
        UsageError: the folder holds no image model, or the file of the run belongs to another teacher or other images.
    """
    path = output / FILE
    names = [name for crops in sets for name in crops.files]
    with accelerator.main_process_first():
        if not path.is_file():
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            maps = compute_maps(sets, ImageTeacher(folder, dtype, accelerator.device))
            metadata = {"teacher": folder, "images": "\n".join(names)}
            tensors = {str(number): map_ for number, map_ in enumerate(maps)}
            write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    with safe_open(path, "pt") as file:
        if file.metadata() != {"teacher": folder, "images": "\n".join(names)}:
            raise UsageError(f"{path} has features of another image teacher or of other images. Delete it.")
        numbers = iter(range(len(names)))
        for crops in sets:
            crops.teacher_maps = [file.get_tensor(str(next(numbers))) for _ in crops.files]


def compute_maps(sets: list[CropSet], teacher: Any) -> Iterator[torch.Tensor]:
    """
    Feature maps of all images in few dimensions `(TEACHER_DIM, rows, columns)`, float16.

    Args:
        sets: whose images are read.
        teacher: an [`ImageTeacher`].
    """
    images = [(image, crops.teacher_edge or max(image.shape[:2])) for crops in sets for image in crops.images]
    mean, axes = principal_axes(teacher(*image) for image in tqdm(images[:: max(1, len(images) // SAMPLE)], "axes"))
    for image in tqdm(images, "image teacher"):
        centred = teacher(*image) - mean[:, None, None]
        yield torch.einsum("chw,dc->dhw", centred, axes).half().cpu()


def principal_axes(maps: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The mean of features `(channels,)` and their first principal axes `(TEACHER_DIM, channels)`, all divided by one number,
    so that projected features have a mean square of 1. Axes that there are too few channels for are 0.

    Raises:
        UsageError: all features are the same.
    """
    found = torch.cat([map_.flatten(1).T for map_ in maps])  # (cells, channels)
    mean = found.mean(0)
    found = found - mean
    _, _, axes = torch.linalg.svd(found[:: max(1, len(found) // CELLS)], full_matrices=False)
    kept = found @ axes[:TEACHER_DIM].T
    scale = (kept.square().sum(1).mean() / TEACHER_DIM).sqrt()
    if not scale > 0:
        raise UsageError("The image teacher has the same features everywhere. Does its folder hold its weights?")
    logger.info("The axes keep %.0f %% of the variance.", 100 * kept.square().sum() / found.square().sum())
    axes = axes[:TEACHER_DIM] / scale
    return mean, nn.functional.pad(axes, (0, 0, 0, TEACHER_DIM - len(axes)))
