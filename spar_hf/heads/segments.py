"""The segments of a class mask, and images with their segments as a panoptic head is trained on them."""

from typing import Any

import numpy as np
from PIL import ImageOps
from scipy import ndimage
from torch.utils.data import Dataset

from spar_hf import SparUniversalImageProcessorPil
from spar_hf.data.augmentation import view_generator
from spar_hf.data.order import ShuffledStream
from spar_hf.data.segmentation_sets import IGNORE_INDEX, SegmentationSet
from spar_hf.heads.panoptic_options import PanopticViews
from spar_hf.utils.errors import UsageError


def thing_classes(things: list[str], classes: tuple[str, ...]) -> set[int]:
    """
    Numbers of the countable classes.

    Args:
        things: their names, or one number N for the first N classes.
        classes: the names of all classes.

    Raises:
        UsageError: a name that is no class, or more than there are.

    Example:

    ```python
    >>> thing_classes(["car"], ("sky", "car")), thing_classes(["1"], ("person", "sky"))
    ({1}, {0})
    ```"""
    if len(things) == 1 and things[0].isdecimal() and int(things[0]) <= len(classes):
        return set(range(int(things[0])))
    unknown = [name for name in things if name not in classes]
    if unknown:
        raise UsageError(f"--things {' '.join(unknown)}: no such class among the {len(classes)}.")
    return {classes.index(name) for name in things}


def find_segments(
    mask: np.ndarray, things: set[int], min_area: float, most: int | None = None
) -> tuple[np.ndarray, dict[int, int]]:
    """
    The segments of a class mask: each region of a countable class (its pixels connected over sides or corners), and each
    other class as a whole.

    Args:
        mask: classes, `(height, width)`; 255 is ignored.
        things: the countable classes.
        min_area: regions of countable classes below this share of the image are ignored.
        most: keep only so many segments, the largest; the rest is ignored.

    Returns:
        Segment numbers from 0 `(height, width)` int32, -1 where pixels are ignored; and the class of every number.

    Example:

    ```python
    >>> segments, classes = find_segments(np.array([[0, 1, 0], [1, 1, 1]]), things={0}, min_area=0)
    >>> segments.tolist(), classes
    ([[0, 2, 1], [2, 2, 2]], {0: 0, 1: 0, 2: 1})
    ```"""
    segments = np.full(mask.shape, -1, np.int32)
    classes: dict[int, int] = {}
    for class_id in np.unique(mask[mask != IGNORE_INDEX]).tolist():
        regions = mask == class_id
        if class_id in things:
            regions, _ = ndimage.label(regions, np.ones((3, 3)))
        areas = np.bincount(regions.ravel().astype(np.int64))
        for region in range(1, len(areas)):
            if class_id in things and areas[region] < min_area * mask.size:
                continue
            segments[regions == region] = len(classes)
            classes[len(classes)] = class_id
    if most is not None and len(classes) > most:
        areas = np.bincount(segments[segments >= 0], minlength=len(classes))
        kept = sorted(np.argsort(-areas, kind="stable")[:most].tolist())
        renumber = np.full(len(classes) + 1, -1, np.int32)  # the last entry is read by index -1
        renumber[kept] = np.arange(most)
        segments, classes = renumber[segments], {i: classes[old] for i, old in enumerate(kept)}
    return segments, classes


def has_segment(data: SegmentationSet, things: set[int], min_area: float) -> bool:
    """Whether any mask of a set has a segment."""
    return any(find_segments(data.read_mask(i), things, min_area)[1] for i in range(len(data)))


class PanopticImages(Dataset):
    """
    Training images of an endless shuffled stream. Item i is a function of the seed and i, whatever the worker:
    `pixel_values`, `mask_labels` and `class_labels` as [`SparForUniversalSegmentation`] takes them. An image without a
    segment is replaced by the next of its epoch.

    Args:
        data: images and masks, one of them at least with a segment.
        things, min_area, most: see [`find_segments`].
        image_processor: makes tensors of an image and its segments.
        views: how images are resized and flipped.
        seed: of order and views.
    """

    def __init__(
        self,
        data: SegmentationSet,
        things: set[int],
        min_area: float,
        most: int,
        image_processor: SparUniversalImageProcessorPil,
        views: PanopticViews,
        seed: int,
    ):
        self.data, self.things, self.min_area, self.most = data, things, min_area, most
        self.image_processor: Any = image_processor  # its keywords are unknown to the types of transformers
        self.views, self.seed = views, seed
        self.order = ShuffledStream(len(data), f"order-{seed}")

    def __getitem__(self, index: int) -> dict:
        position = index % len(self.data)
        for step in range(len(self.data)):
            in_epoch = index - position + (position + step) % len(self.data)
            item = self.load(self.order[in_epoch], index)
            if len(item["class_labels"][0]):
                return item
        raise ValueError(f"No mask of {self.data.title} has a segment.")

    def load(self, number: int, index: int) -> dict:
        """An image and its segments, in the view of stream position `index`."""
        rng = view_generator(self.seed, index)
        image, mask = self.data.read(number)
        if rng.random() < self.views.flip_probability:
            image, mask = ImageOps.mirror(image), mask[:, ::-1]
        segments, classes = find_segments(mask, self.things, self.min_area, self.most)
        scale = rng.uniform(self.views.min_scale, self.views.max_scale)
        return dict(
            self.image_processor(
                image,
                segments,
                instance_id_to_semantic_id=classes,
                ignore_index=-1,
                size={"shortest_edge": max(16, round(self.views.shortest_edge * scale))},
                return_tensors="pt",
            )
        )


def first_item(batch: list[dict]) -> dict:
    """Collate function for batches of one: images differ in size and in their number of segments."""
    return batch[0]
