"""Inputs of the pipeline: one image, or many from a list, a dataset or a stream, read when needed."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .image_input import read_image


@dataclass(repr=False)
class EncodedImage:
    """
    The features of an image, to be compared with any number of vocabularies.

    Attributes:
        feature_map: dense features `(dim, ceil(height / patch), ceil(width / patch))`, not normalised.
        pixel_values: the normalised image that the model saw `(3, height, width)`.
        original_size: height and width of the image, and of its masks.
    """

    feature_map: torch.Tensor
    pixel_values: torch.Tensor
    original_size: tuple[int, int]

    def __repr__(self) -> str:
        dim, *grid = self.feature_map.shape  # not the tensors, which are too long to print
        return (
            f"{type(self).__name__}(grid={tuple(grid)}, dim={dim}, working_size={self.working_size}, "
            f"original_size={tuple(self.original_size)}, device={str(self.feature_map.device)!r})"
        )

    @property
    def working_size(self) -> tuple[int, int]:
        """Height and width of the image the model saw, before its padding."""
        return self.pixel_values.shape[-2], self.pixel_values.shape[-1]

    def to(self, device: torch.device | str) -> "EncodedImage":
        """A copy on another device."""
        return replace(self, feature_map=self.feature_map.to(device), pixel_values=self.pixel_values.to(device))


def guarded(skip: bool, work: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call `work`; with `skip`, return `{"error": message}` instead of raising."""
    try:
        return work(*args, **kwargs)
    except Exception as error:
        if not skip:
            raise
        return {"error": f"{type(error).__name__}: {error}"}


def is_error(item: Any) -> bool:
    """Whether an item is an error returned by `guarded`."""
    return isinstance(item, dict) and "error" in item


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
            f"A row with the columns {list(row)} has no `image`. Select the column with `KeyDataset(dataset, 'image')` of "
            "transformers.pipelines.pt_utils, or rename it."
        )
    return image


class ImageSequence(Dataset):
    """A list or dataset of known length. Each image is prepared when it is read, possibly in a worker process."""

    def __init__(self, source: Any, prepare: Callable[[Callable[[], Any]], Any] | None = None):
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Any:
        return self.prepare(lambda: self.source[index]) if self.prepare else self.source[index]


class ImageStream(IterableDataset):
    """A generator or streamed dataset. Each image is prepared when it is read."""

    def __init__(self, source: Iterable, prepare: Callable[[Callable[[], Any]], Any] | None = None):
        self.source, self.prepare = source, prepare

    def __iter__(self) -> Iterator[Any]:
        for image in self.source:
            yield self.prepare(partial(next, iter([image]))) if self.prepare else image


class Results:
    """Results in the order of the images, computed during iteration. Has a length if the number of images is known."""

    def __init__(self, loader: DataLoader, run: Callable[[list], Iterator[Any]]):
        self.loader, self.run = loader, run

    def __len__(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]  # a stream's raises TypeError, as it should

    def __iter__(self) -> Iterator[Any]:
        for items in self.loader:
            yield from self.run(items)


def as_images(inputs: Any) -> ImageSequence | ImageStream | None:
    """Many images as a dataset; `None` for a single image."""
    if isinstance(inputs, (np.ndarray, torch.Tensor)):
        return ImageSequence(inputs) if inputs.ndim == 4 else None
    if isinstance(inputs, (str, bytes, os.PathLike, Mapping, Image.Image, EncodedImage)):
        return None
    column: Any = (getattr(inputs, "features", None) or {}).get("image")
    if getattr(column, "decode", None) and hasattr(inputs, "cast_column"):
        # a dataset of `datasets`: we decode image by image, so that a damaged file does not end the iteration
        column = copy.copy(column)
        column.decode = False
        inputs = inputs.cast_column("image", column)
    if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__"):
        return ImageSequence(inputs)
    return ImageStream(inputs) if isinstance(inputs, Iterable) else None
