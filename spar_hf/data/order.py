"""
The order of training images, and the choice of held-out images.

The main process makes the order and passes [`Sample`]s to the workers, which read and decode. So order and augmentation do
not depend on the number of workers, and a resumed run can start at any sample. Images differ in size, so each process
takes one at a time; gradient accumulation makes the batch.
"""

import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from spar_hf.data.sources import Files, ImageOptions, image_entry, undecoded
from spar_hf.utils.errors import UsageError


@dataclass
class Sample:
    """
    One image of the endless stream, not yet read.

    Attributes:
        index: its number in the stream over all processes. It seeds augmentation and the draw of teacher windows.
        name: name of the image in messages.
        source: path, bytes, or (number of the source, row).
        after: position from which [`MapOrder`] or [`StreamOrder`] continues after this sample.
    """

    index: int
    name: str
    source: Any
    after: list[int]


class SampleList(Protocol):
    """Images with a known length that make [`Sample`]s."""

    def __len__(self) -> int: ...

    def sample(self, i: int, index: int, after: list[int]) -> Sample:
        """Image `i` as the `index`-th of the stream."""


def is_held_out(position: int, every: int) -> bool:
    """
    The hold-out rule of the library: of images sorted by name, the last of every group of `every` is held out; 0 holds out
    none.

    Example:

    ```python
    >>> [i for i in range(10) if is_held_out(i, 5)]
    [4, 9]
    ```"""
    return every > 0 and position % every == every - 1


def split_held_out(count: int, every: int) -> tuple[list[int], list[int]]:
    """
    Split the numbers below `count` into those to train on and those held out by [`is_held_out`].

    Example:

    ```python
    >>> split_held_out(6, every=3)
    ([0, 1, 3, 4], [2, 5])
    ```"""
    held_out = [i for i in range(count) if is_held_out(i, every)]
    return [i for i in range(count) if not is_held_out(i, every)], held_out


class ShuffledStream:
    """
    An endless stream of the numbers below `count`, shuffled again every epoch. `stream[i]` depends on the seed and `i` only,
    not on earlier calls. The order of the last epoch is cached.

    Example:

    ```python
    >>> stream = ShuffledStream(4, seed="order-0")
    >>> sorted(stream[i] for i in range(4)) == sorted(stream[i] for i in range(4, 8)) == [0, 1, 2, 3]
    True
    ```"""

    def __init__(self, count: int, seed: str | int):
        self.count, self.seed = count, seed
        self.epoch, self.order = -1, [0]

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self.count)
        if epoch != self.epoch:
            order = list(range(self.count))
            random.Random(f"{self.seed}-{epoch}").shuffle(order)
            self.epoch, self.order = epoch, order
        return self.order[position]


class Listing:
    """Images of several sources with consecutive numbers. It holds no object per image, so millions fit into memory."""

    def __init__(self, sources: list[Any], kept: list[np.ndarray]):
        self.sources, self.kept = sources, kept
        self.ends = np.cumsum([len(part) for part in kept])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, i: int) -> tuple[int, int]:
        """Number of the source of image `i`, and its number in that source."""
        number = int(np.searchsorted(self.ends, i, side="right"))
        return number, int(self.kept[number][i - (self.ends[number - 1] if number else 0)])

    def name(self, i: int) -> str:
        """Name of image `i` in messages."""
        number, row = self.locate(i)
        return self.sources[number].name(row)

    def sample(self, i: int, index: int, after: list[int]) -> Sample:
        """Image `i` as the `index`-th of the stream."""
        number, row = self.locate(i)
        files = isinstance(self.sources[number], Files)
        source = self.sources[number].source(row) if files else (number, row)
        return Sample(index, self.sources[number].name(row), source, after)


def split_images(sources: list[Any], exclude: list[str], holdout_every: int) -> tuple[Listing, Listing]:
    """
    Split the images of all sources into those to train on and those held out by [`is_held_out`], source by source.

    Args:
        sources: see `open_sources`.
        exclude: patterns of images that are in neither part, see [`is_excluded`].
        holdout_every: group size of the hold-out rule, counted after exclusion.

    Raises:
        UsageError: no image is left to train on.
    """
    train, held_out = [], []
    for source in sources:
        kept = np.arange(len(source))
        if exclude:
            kept = kept[[not is_excluded(source.key(i), exclude) for i in range(len(source))]]
        here, there = split_held_out(len(kept), holdout_every)
        train.append(kept[here])
        held_out.append(kept[there])
    if not sum(map(len, train)):
        raise UsageError("No image is left to train on; check --images, --exclude and --holdout_every.")
    return Listing(sources, train), Listing(sources, held_out)


def is_excluded(key: str, patterns: list[str]) -> bool:
    """
    Whether a path without its suffix, or the key of a row, matches a shell pattern of `--exclude`.

    Example:

    ```python
    >>> is_excluded("streets/0016E5_01.png", ["0016E5_*"]), is_excluded("streets/a.png", ["b"])
    (True, False)
    ```"""
    path = PurePath(key)
    return any(path.match(f"{pattern}.*" if path.suffix else pattern) for pattern in patterns)


class MapOrder(Sampler):
    """
    The endless stream of a [`Listing`], shuffled again every epoch. Its i-th image depends on the seed and `i` only.
    Each of n processes takes every n-th sample, so that together they see what one process would see.

    Args:
        images: the images.
        seed: of the order.
        process: number of this process.
        processes: how many there are.
        start: `after` of the last sample of an interrupted run.
        shuffle: `False` keeps the order of the images in every epoch.
    """

    def __init__(
        self,
        images: SampleList,
        seed: int,
        process: int,
        processes: int,
        start: list[int] | None = None,
        shuffle: bool = True,
    ):
        self.shuffle = shuffle
        self.images, self.seed, self.process, self.processes = images, seed, process, processes
        self.start = start or [0]

    def __iter__(self) -> Iterator[Sample]:
        order = ShuffledStream(len(self.images), f"order-{self.seed}")
        for turn in itertools.count(self.start[0]):
            index = turn * self.processes + self.process
            number = order[index] if self.shuffle else index % len(self.images)
            yield self.images.sample(number, index, [turn + 1])


class StreamOrder(Sampler):
    """
    The endless stream of an iterable table. Every epoch shuffles the shards, and the images within a buffer, if asked to.

    Each process takes its own shards if their number is a multiple of the number of processes, otherwise every n-th image. A
    resumed run reads the interrupted epoch from its beginning without decoding, because only that restores the buffer.

    Args:
        table: iterable data set, see `open_sources`.
        options: `shuffle_buffer`, `holdout_every`, `exclude` and `image_column` are used.
        seed: of the order.
        process: number of this process.
        processes: how many there are.
        start: `after` of the last sample of an interrupted run.

    Raises:
        UsageError: the stream has no image for this process.
    """

    def __init__(
        self, table, options: ImageOptions, seed: int, process: int, processes: int, start: list[int] | None = None
    ):
        from datasets.distributed import split_dataset_by_node

        table, self.columns, self.names = undecoded(table, options.images[0], options)
        self.plain, self.options = table, options
        if options.shuffle:
            table = table.shuffle(seed=seed, buffer_size=options.shuffle_buffer)
        self.table = split_dataset_by_node(table, process, processes)
        self.process, self.processes, self.start = process, processes, start or [0, 0]

    def read(self, row: dict[str, Any]) -> tuple[Any, str, bool]:
        """A row's image, its name, and whether it is held out: by its checksum, because a stream has no fixed positions."""
        source = image_entry(row, self.columns)
        checksum = zlib.crc32(source if isinstance(source, bytes) else str(source).encode())
        # the position of an image differs from epoch to epoch, its checksum does not
        name = str(row[self.names]) if self.names else f"image with checksum {checksum:08x}"
        return source, name, checksum % self.options.holdout_every == 0

    def held_out(self) -> Iterator[Sample]:
        """The held-out images in the order of the table."""
        for number, row in enumerate(self.plain):
            source, name, held_out = self.read(row)
            if held_out and not is_excluded(name, self.options.exclude):
                yield Sample(number, name, source, [])

    def __iter__(self) -> Iterator[Sample]:
        epoch, taken = self.start
        for epoch in itertools.count(self.start[0]):
            self.table.set_epoch(epoch)
            found = False
            for number, row in enumerate(self.table):
                source, name, held_out = self.read(row)
                if held_out or is_excluded(name, self.options.exclude):
                    continue
                found = True
                if number >= taken:
                    # the length of a stream is unknown, so each epoch gets 2 ** 40 numbers: more than any stream needs
                    index = (epoch << 40) + number * self.processes + self.process
                    yield Sample(index, name, source, [epoch, number + 1])
            if not found:
                raise UsageError(
                    "The stream has no image to train on for this process; check --images, --exclude, --holdout_every."
                )
            taken = 0
