"""The segments of masks that tell classes, and images with their segments for the training of a panoptic head."""

import random
from pathlib import Path

import numpy as np
from PIL import ImageOps
from scipy import ndimage
from torch.utils.data import Dataset

from spar_hf import SparUniversalImageProcessorPil
from spar_hf.data.segmentation_sets import VOID, SegmentationFolder, ShuffledStream, read_image


def thing_classes(things: list[str], classes: tuple[str, ...]) -> set[int]:
    """
    Numbers of the countable classes.

    Raises:
        ValueError: a name that is no class, or a number beyond them.
    """
    if len(things) == 1 and things[0].isdigit() and int(things[0]) <= len(classes):
        return set(range(int(things[0])))
    unknown = [name for name in things if name not in classes]
    if unknown:
        raise ValueError(f"--things {' '.join(unknown)}: no such class among the {len(classes)}.")
    return {classes.index(name) for name in things}


def find_segments(
    mask: np.ndarray, things: set[int], min_area: float, most: int | None = None
) -> tuple[np.ndarray, dict[int, int]]:
    """
    The segments of a mask of classes: each region of a countable class (its pixels connected over sides or corners), each
    other class as a whole.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): classes, 255 is void.
        things: the countable classes.
        min_area: regions of countable classes below this share of the image are void.
        most: only the largest so many are kept; the rest is void.

    Returns:
        `(height, width)` int32 of segment numbers, from 0, -1 is void; the class of every number.
    """
    segments = np.full(mask.shape, -1, np.int32)
    classes: dict[int, int] = {}
    for class_id in np.unique(mask[mask != VOID]).tolist():
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
        renumber = np.full(len(classes) + 1, -1, np.int32)  # the last is void's
        renumber[kept] = np.arange(most)
        segments, classes = renumber[segments], {i: classes[old] for i, old in enumerate(kept)}
    return segments, classes


class PanopticImages(Dataset):
    """
    Item i is the i-th photo of an endless shuffled stream, resized and flipped as (seed, i) says, whatever the worker:
    `pixel_values`, `mask_labels` and `class_labels` as [`SparForUniversalSegmentation`] takes them. Images without a
    segment are passed over.
    """

    def __init__(
        self,
        folder: SegmentationFolder,
        pairs: list[tuple[Path, Path]],
        things: set[int],
        image_processor: SparUniversalImageProcessorPil,
        options,
    ):
        self.folder, self.pairs, self.things = folder, pairs, things
        self.image_processor, self.options = image_processor, options
        self.order = ShuffledStream(len(pairs), f"order-{options.seed}")

    def __getitem__(self, index: int) -> dict:
        position = index % len(self.pairs)
        for step in range(len(self.pairs)):
            turn = index - position + (position + step) % len(self.pairs)  # within the epoch
            item = self.load(self.pairs[self.order[turn]], index)
            if len(item["class_labels"][0]):
                return item
        raise ValueError(f"No mask of {self.options.data} has a segment; check --things and --min_area.")

    def load(self, pair: tuple[Path, Path], index: int) -> dict:
        rng = random.Random(f"photo-{self.options.seed}-{index}")
        image = read_image(pair[0])
        mask = self.folder.read_mask(pair[1], image.size[::-1])
        if rng.random() < self.options.flip_probability:
            image, mask = ImageOps.mirror(image), mask[:, ::-1]
        segments, classes = find_segments(mask, self.things, self.options.min_area, self.options.num_queries)
        scale = rng.uniform(self.options.min_scale, self.options.max_scale)
        return dict(
            self.image_processor(
                image,
                segments,
                instance_id_to_semantic_id=classes,
                ignore_index=-1,
                size={"shortest_edge": max(16, round(self.options.shortest_edge * scale))},
                return_tensors="pt",
            )
        )


def only(batch: list[dict]) -> dict:
    """The image of a batch of one: images differ in size and number of segments."""
    return batch[0]
