"""Inputs of the pipeline: one image, or many from a list, a dataset or a stream, read when needed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .image_columns import rows_of_images
from .image_input import as_list, check_container, is_encoded, is_tensor


@dataclass(repr=False)
class EncodedImage:
    """
    The features of an image, to be compared with any number of vocabularies.

    Attributes:
        feature_map: dense features `(dim, ceil(height / patch), ceil(width / patch))`, not normalised.
        pixel_values: the normalised image that the model saw `(3, height, width)`.
        original_size: height and width of the image, and of its masks, in pixels.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline
    >>> import spar_hf

    >>> segment = pipeline("open-vocab-segmentation")
    >>> encoded = segment.encode(Image.new("RGB", (330, 200), "skyblue"))
    >>> encoded.feature_map.shape, encoded.working_size, encoded.original_size
    (torch.Size([192, 24, 40]), (384, 634), (200, 330))
    >>> segment(encoded, candidate_labels=["road", "sky"], output="map")["map"].shape
    (200, 330)
    ```"""

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


class SizedStream(ImageStream):
    """A stream of known length."""

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]


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
    """
    Many images as a dataset; `None` for a single image.

    Items are taken by position where that is what `[i]` means (lists, datasets), and iterated otherwise.

    Raises:
        ValueError: a container without order or with several columns, see [`check_container`].
    """
    if isinstance(inputs, (Mapping, Image.Image, EncodedImage)) or is_encoded(inputs):
        return None
    if (images := as_list(inputs)) is not None:
        return ImageSequence(images)
    if isinstance(inputs, np.ndarray) or is_tensor(inputs):
        return None
    check_container(inputs)
    is_table = hasattr(inputs, "cast_column")
    inputs = rows_of_images(inputs)
    by_position = isinstance(inputs, (Sequence, Dataset)) or is_table or not isinstance(inputs, Iterable)
    if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__") and by_position:
        return ImageSequence(inputs)
    if not isinstance(inputs, Iterable):
        return None
    return SizedStream(inputs) if isinstance(inputs, Sized) else ImageStream(inputs)


def several_images(inputs: Any, what: str) -> Iterable[Any]:
    """
    As [`as_images`], where a single image makes no sense: its rows would be taken for images.

    Raises:
        ValueError: `inputs` is one image; the message begins with `what`.
    """
    images = as_images(inputs)
    if images is None:
        raise ValueError(
            f"{what} are several images, not one {type(inputs).__name__}: put it in a list. Of a video, give the frames."
        )
    return images
