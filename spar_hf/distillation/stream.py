"""The images of a distillation: what is held out, the order of the others, and what loads them."""

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from spar_hf.data.augmentation import Views
from spar_hf.data.order import (
    Listing,
    MapOrder,
    Sample,
    SampleList,
    StreamOrder,
    not_excluded,
    split_by_name,
    split_images,
)
from spar_hf.data.sources import ImageOptions, stream_contents
from spar_hf.data.training_images import LoadedSample, Skipped, SkippedList, TrainingImages, only_item
from spar_hf.distillation.models import Models
from spar_hf.distillation.targets import CachedImages
from spar_hf.distillation.teacher_cache import TeacherCache, check_setting, read_manifest
from spar_hf.utils.errors import UsageError
from spar_hf.utils.launching import outlive_signals

logger = logging.getLogger(__name__)

MOST_UNREADABLE = 1000  # images in a row that cannot be read, before the run gives up


@dataclass
class ImageStream:
    """
    The endless stream of training images of one process, and the held-out images.

    Attributes:
        order: gives the samples.
        data: loads a sample, from images or from a teacher cache.
        images: loads samples from images.
        count: training images, or views of a cache; `None` for a stream of unknown length.
        different: the same without counting an image again for each of its views in a cache.
        held_out: samples that the error is measured on.
        train: the training images; `None` for a stream.
        views: how views are drawn: what the record of the student says.
        names: of the images, by what they are for, or of what a stream consists of: the record that the run keeps.
    """

    order: MapOrder | StreamOrder
    data: TrainingImages | CachedImages
    images: TrainingImages
    count: int | None
    different: int | None
    held_out: list[Sample]
    train: Listing | None
    views: Views
    names: dict[str, list[str]]

    def choose(self, count: int, seed: int) -> list[Sample]:
        """
        Random training images, fewer if there are fewer.

        Raises:
            UsageError: of a stream, whose images cannot be counted.
        """
        if self.train is None:
            raise UsageError("--streaming reads images in their order; leave it out to draw some of them.")
        return draw_samples(self.train, count, seed)

    def loader(self, workers: int, seed: int) -> DataLoader:
        """Loads the samples in their order."""
        return DataLoader(
            self.data,
            batch_size=None,  # images differ in size: one at a time
            sampler=self.order,
            num_workers=workers,
            collate_fn=only_item,
            worker_init_fn=outlive_signals,
            generator=torch.Generator().manual_seed(seed),  # without it, the run's own random numbers would be used
        )


def open_stream(
    sources: list[Any],
    options: ImageOptions,
    views: Views,
    models: Models,
    *,
    seed: int,
    holdout_images: int,
    same_size: int = 0,
    teacher_cache: str | None = None,
    process: int = 0,
    processes: int = 1,
    start: list[int] | None = None,
    earlier: dict[str, list[str]] | None = None,
) -> ImageStream:
    """
    Open the images of a run.

    Args:
        sources: as [`open_sources`] returned them.
        options: which images are read, and how.
        views: how views of them are drawn.
        models: teacher, student's patch size and image processor.
        seed: of the order and of the views.
        holdout_images: held-out images to measure the error on, at most.
        same_size: see [`TrainingImages`].
        teacher_cache: folder of a cache, whose images and targets are trained on instead.
        process, processes: each process takes every n-th image.
        start: where a resumed run goes on, see [`Sample`].
        earlier: its record, see [`ImageStream`]: what was held out stays held out.

    Raises:
        UsageError: no image is left to train on, or a cache does not fit.
    """
    teacher = models.teacher
    images = TrainingImages(
        sources,
        models.image_processor,
        teacher.window_size,
        models.student.config.patch_size,
        views,
        seed,
        options.min_side,
        options.image_range,
        options.max_pixels,
        same_size,
    )
    order: StreamOrder | MapOrder
    if options.streaming:
        stream = order = StreamOrder(sources[0], options, seed, process, processes, start)
        held_out = list(itertools.islice(stream.held_out(), holdout_images))
        names = {"stream": stream_contents(options)}
        return ImageStream(order, images, images, None, None, held_out, None, views, names)
    if earlier is None:
        train, rest = split_images(sources, options.exclude, options.holdout_every)
        held_out = draw_samples(rest, holdout_images, seed)
    else:
        train, rest = listings_as_before(sources, options.exclude, earlier["held_out"])
        places: dict[str, list[int]] = {}  # a folder that is given twice has each name twice
        for i in range(len(rest)):
            places.setdefault(rest.name(i), []).append(i)
        held_out = [rest.sample(i, i, []) for name in earlier["measured"] for i in places.get(name, [])[:1]]
    names = {
        part: [listing.name(i) for i in range(len(listing))] for part, listing in (("train", train), ("held_out", rest))
    }
    names |= {"cached": cached_names(teacher_cache), "measured": [sample.name for sample in held_out]}
    if teacher_cache is None:
        images.others = train
        order = MapOrder(train, seed, process, processes, start, options.shuffle)
        return ImageStream(order, images, images, len(train), len(train), held_out, train, views, names)
    cache = TeacherCache.open(
        teacher_cache, model=teacher.model, window_size=teacher.window_size, stride=teacher.stride
    )
    check_setting(teacher_cache, cache.setting, {"image_range": options.image_range})
    sources_held_out = (rest.sample(i, i, []).source for i in range(len(rest)))
    files_held_out = [source for source in sources_held_out if isinstance(source, str)]
    cached = CachedImages(cache, files_held_out, options.exclude)
    stored = stored_views(teacher_cache, cache.setting, views)
    order = MapOrder(cached, seed, process, processes, start, options.shuffle)
    return ImageStream(order, cached, images, len(cached), cache.different_images, held_out, train, stored, names)


def stored_views(teacher_cache: str, setting: dict[str, Any], views: Views) -> Views:
    """
    How the views of a cache were drawn.

    Raises:
        UsageError: `views` asks for others.
    """
    stored = {name: setting[name] for name in asdict(views) if name in setting}
    usual = asdict(Views())
    # the jitter is refused with the options; views of a cache are fixed whether --fixed_views is given or not
    others = {
        name: value
        for name, value in asdict(views).items()
        if name in stored and name != "fixed_views" and value not in (usual[name], stored[name])
    }
    if others:
        there = ", ".join(f"--{name} {stored[name]} (not {value})" for name, value in others.items())
        raise UsageError(
            f"--teacher_mode cached trains on the views of {teacher_cache}, which were drawn with {there}. Leave these "
            "options out, or write a cache with those that you want."
        )
    return Views(**stored)


def listings_as_before(sources: list[Any], exclude: list[str], held_out: list[str]) -> tuple[Listing, Listing]:
    """
    Split images into those to train on and those that an earlier run held out; new ones are trained on.

    Raises:
        UsageError: no image is left to train on.
    """
    train, rest = split_by_name(sources, [not_excluded(source, exclude) for source in sources], held_out)
    if not len(train):
        raise UsageError("No image is left to train on: all that are there were held out before.")
    return train, rest


def image_names(sources: list[Any], options: ImageOptions, teacher_cache: str | None) -> Iterator[str]:
    """Names of all images that are there, or of what a stream consists of, to compare with those of an earlier run."""
    if options.streaming:
        yield from stream_contents(options)
        return
    for source in sources:
        yield from map(source.name, not_excluded(source, options.exclude))
    yield from cached_names(teacher_cache)


def cached_names(teacher_cache: str | None) -> list[str]:
    """Names of the images in a teacher cache, once for each of their views."""
    if teacher_cache is None:
        return []
    return [f"cached {entry['image']}" for shard in read_manifest(teacher_cache)["shards"] for entry in shard["maps"]]


def draw_samples(listing: SampleList, count: int, seed: int) -> list[Sample]:
    """Random images of a listing, without replacement; fewer if there are fewer."""
    chosen = random.Random(seed).sample(range(len(listing)), min(count, len(listing)))
    return [listing.sample(i, i, []) for i in chosen]


def readable_samples(loader: Sequence | DataLoader, skipped: SkippedList) -> Iterator[LoadedSample]:
    """
    The samples that can be read; the others are listed in `skipped`.

    Raises:
        UsageError: 1000 images in a row cannot be read.
    """
    failed = 0
    for item in loader:
        if not isinstance(item, Skipped):
            failed = 0
            yield item
            continue
        skipped.add(item)
        failed += 1
        if failed == MOST_UNREADABLE:
            raise UsageError(f"--images: {MOST_UNREADABLE} images in a row cannot be read; {skipped.path} says why.")
