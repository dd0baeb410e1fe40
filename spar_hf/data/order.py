"""
The order of training images, and which of them are held out.

The main process makes the order and hands [`Sample`]s to the workers, which read and decode. So neither order nor
augmentation depends on how many workers there are, and a resumed run starts at any sample.

Images differ in size, and each process takes one at a time; gradient accumulation makes the batch.
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
        index: its number in the stream over all processes; augmentation and teacher windows are drawn from it.
        name: what a message calls it.
        source: its path, its bytes, or (number of the source, row).
        after: where a resumed run goes on after it, for [`MapOrder`] or [`StreamOrder`].
    """

    index: int
    name: str
    source: Any
    after: list[int]


class SampleList(Protocol):
    """A countable set of images that gives [`Sample`]s."""

    def __len__(self) -> int: ...

    def sample(self, i: int, index: int, after: list[int]) -> Sample:
        """Image `i` as the `index`-th of the stream."""


def is_held_out(position: int, every: int) -> bool:
    """
    The one hold-out rule: of images sorted by name, each `every`-th (the last of every group) is held out; 0 holds out none.

    Example:

    ```python
    >>> [i for i in range(10) if is_held_out(i, 5)]
    [4, 9]
    ```"""
    return every > 0 and position % every == every - 1


def split_held_out(count: int, every: int) -> tuple[list[int], list[int]]:
    """Numbers below `count` to train on, and those held out by [`is_held_out`]."""
    held_out = [i for i in range(count) if is_held_out(i, every)]
    return [i for i in range(count) if not is_held_out(i, every)], held_out


class ShuffledStream:
    """
    An endless stream of the numbers below `count`, shuffled anew each epoch: `stream[i]` depends on the seed and i alone,
    whoever asks and in whatever order. The order of the epoch asked for last is kept.

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
    """Images of several sources under one running number, without an object for each."""

    def __init__(self, sources: list[Any], kept: list[np.ndarray]):
        self.sources, self.kept = sources, kept
        self.ends = np.cumsum([len(part) for part in kept])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, i: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.ends, i, side="right"))
        return number, int(self.kept[number][i - (self.ends[number - 1] if number else 0)])

    def name(self, i: int) -> str:
        number, row = self.locate(i)
        return self.sources[number].name(row)

    def sample(self, i: int, index: int, after: list[int]) -> Sample:
        number, row = self.locate(i)
        files = isinstance(self.sources[number], Files)
        source = self.sources[number].source(row) if files else (number, row)
        return Sample(index, self.sources[number].name(row), source, after)


def split_images(sources: list[Any], exclude: list[str], holdout_every: int) -> tuple[Listing, Listing]:
    """
    Images to train on and held-out images: of every source each n-th that is not excluded.

    Raises:
        ValueError: none is left to train on.
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
    """Whether a path, or a data set's key without a suffix, fits a pattern of --exclude."""
    path = PurePath(key)
    return any(path.match(f"{pattern}.*" if path.suffix else pattern) for pattern in patterns)


class MapOrder(Sampler):
    """
    The endless shuffled stream of a [`Listing`]: image i is a function of seed and i alone. Each process takes every n-th
    sample, so that n processes see together what one sees.
    """

    def __init__(self, images: SampleList, seed: int, process: int, processes: int, start: list[int] | None = None):
        self.images, self.seed, self.process, self.processes = images, seed, process, processes
        self.start = start or [0]

    def __iter__(self) -> Iterator[Sample]:
        order = ShuffledStream(len(self.images), f"order-{self.seed}")
        for turn in itertools.count(self.start[0]):
            index = turn * self.processes + self.process
            yield self.images.sample(order[index], index, [turn + 1])


class StreamOrder(Sampler):
    """
    The endless stream of an iterable table, shuffled anew each epoch: the order of its shards, and images within a buffer.
    Processes take shards where their number divides by the processes, else every n-th image. Going on reads the epoch
    again up to where it was, without decoding: only so is the buffer the same.
    """

    def __init__(
        self, table, options: ImageOptions, seed: int, process: int, processes: int, start: list[int] | None = None
    ):
        from datasets.distributed import split_dataset_by_node

        table, self.columns, self.names = undecoded(table, options.images[0], options)
        self.plain, self.options = table, options
        shuffled = table.shuffle(seed=seed, buffer_size=options.shuffle_buffer)
        self.table = split_dataset_by_node(shuffled, process, processes)
        self.process, self.processes, self.start = process, processes, start or [0, 0]

    def read(self, row: dict[str, Any], number: int) -> tuple[Any, str, bool]:
        """A row's image, its name, and whether it is held out: by checksum, wherever the shuffle put it."""
        source = image_entry(row, self.columns)
        name = str(row[self.names]) if self.names else f"image {number} of the stream"
        content = source if isinstance(source, bytes) else str(source).encode()
        return source, name, zlib.crc32(content) % self.options.holdout_every == 0

    def held_out(self) -> Iterator[Sample]:
        """The held-out images in the stream's own order."""
        for number, row in enumerate(self.plain):
            source, name, held_out = self.read(row, number)
            if held_out and not is_excluded(name, self.options.exclude):
                yield Sample(number, name, source, [])

    def __iter__(self) -> Iterator[Sample]:
        epoch, taken = self.start
        for epoch in itertools.count(self.start[0]):
            self.table.set_epoch(epoch)
            found = False
            for number, row in enumerate(self.table):
                source, name, held_out = self.read(row, number)
                if held_out or is_excluded(name, self.options.exclude):
                    continue
                found = True
                if number >= taken:
                    # an epoch of a stream has no known length: its images are numbered below a bound no stream reaches
                    index = (epoch << 40) + number * self.processes + self.process
                    yield Sample(index, name, source, [epoch, number + 1])
            if not found:
                raise UsageError(
                    "The stream gives this process no image to train on; check --images and --holdout_every."
                )
            taken = 0
