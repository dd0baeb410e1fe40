"""
The order of training images, and the choice of held-out images.

The main process makes the order and passes [`Sample`]s to the workers, which read and decode. So order and augmentation do
not depend on the number of workers, and a resumed run can start at any sample. Images differ in size, so each process
takes one at a time; gradient accumulation makes the batch.
"""

import itertools
import random
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from spar_hf.data.sources import Files, ImageOptions, image_entry, undecoded
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_listing import is_image_name
from spar_hf.utils.sample_record import split_as_before


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
    Split the images of all sources into those to train on and those held out by [`is_held_out`], source by source. An image
    that several sources name, such as a folder and one within it or a list of its files, is held out of all of them.

    Args:
        sources: see `open_sources`.
        exclude: patterns of images that are in neither part, see [`is_excluded`].
        holdout_every: group size of the hold-out rule, counted after exclusion.

    Raises:
        UsageError: no image is left to train on.
    """
    kept = [not_excluded(source, exclude) for source in sources]
    names = {
        source.name(rows[i])
        for source, rows in zip(sources, kept, strict=True)
        for i in split_held_out(len(rows), holdout_every)[1]
    }
    train, held_out = split_by_name(sources, kept, names)
    if not len(train):
        raise UsageError("No image is left to train on; check --images, --exclude and --holdout_every.")
    return train, held_out


def not_excluded(source: Any, exclude: list[str]) -> np.ndarray:
    """Numbers of the images of a source that no pattern of `--exclude` matches."""
    rows = np.arange(len(source))
    return rows[[not is_excluded(source.key(i), exclude) for i in range(len(source))]] if exclude else rows


def split_by_name(sources: list[Any], kept: list[np.ndarray], held_out: Collection[str]) -> tuple[Listing, Listing]:
    """The images `kept` of each source, without and with those that `held_out` names."""
    parts = [split_as_before(map(source.name, rows), held_out) for source, rows in zip(sources, kept, strict=True)]
    train = [rows[here] for rows, (here, _) in zip(kept, parts, strict=True)]
    rest = [rows[there] for rows, (_, there) in zip(kept, parts, strict=True)]
    return Listing(sources, train), Listing(sources, rest)


def is_excluded(key: str, patterns: list[str]) -> bool:
    """
    Whether a path without the suffix of an image, or the key of a row, matches a shell pattern of `--exclude`.

    Example:

    ```python
    >>> is_excluded("streets/0016E5_01.png", ["0016E5_*"]), is_excluded("streets/a.png", ["b"])
    (True, False)
    ```"""
    path = PurePath(key)
    stem = path.with_suffix("") if is_image_name(path.name) else path
    return any(stem.match(pattern) for pattern in patterns)


class MapOrder(Sampler):
    """
    The endless stream of a [`Listing`], shuffled again every epoch. Its i-th image depends on the seed and `i` only.
    Each of n processes takes every n-th sample, so that together they see what one process would see.

    Args:
        images: the images.
        seed: of the order.
        process: number of this process.
        processes: how many there are.
        start: `after` of the last sample of an interrupted run, or what [`MapOrder.share`] makes of those of all processes.
        shuffle: `False` keeps the order of the images in every epoch.

    Example:

    ```python
    >>> images, _ = split_images([Files([f"{i}.jpg" for i in range(6)])], exclude=[], holdout_every=0)
    >>> [sample.index for sample in itertools.islice(MapOrder(images, 0, process=1, processes=2), 3)]
    [1, 3, 5]
    ```"""

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

    @staticmethod
    def share(after: list[list[int]], processes: int) -> list[int]:
        """
        Where each of another number of processes starts. First come the samples that some of the earlier processes had not
        reached yet, since images that cannot be read put others ahead; then the stream goes on. So each is seen once.

        Args:
            after: of the last sample of each earlier process.
            processes: how many there are now.

        Example:

        ```python
        >>> MapOrder.share([[3], [1]], 1)  # 0, 2 and 4 were seen, and 1: left are 3 and 5, and all from 6 on
        [0, 6, 3, 5]
        ```"""
        (_, first, *left), earlier = [*after[0], 0] if len(after[0]) == 1 else after[0], len(after)
        turns = [turn for turn, *_ in after]
        end = max(max(turns) * earlier, len(left))
        missed = [place for place in range(min(turns) * earlier, end) if place // earlier >= turns[place % earlier]]
        return [0, first + end - len(left), *(index_at(place, first, left) for place in missed)]

    def __iter__(self) -> Iterator[Sample]:
        order = ShuffledStream(len(self.images), f"order-{self.seed}")
        begun, *shared = self.start
        first, *left = shared or [0]
        for turn in itertools.count(begun):
            index = index_at(turn * self.processes + self.process, first, left)
            number = order[index] if self.shuffle else index % len(self.images)
            yield self.images.sample(number, index, [turn + 1, *shared])


def index_at(place: int, first: int, left: list[int]) -> int:
    """The number at a place of the samples `left`, `first`, `first + 1`, …"""
    return left[place] if place < len(left) else first + place - len(left)


class StreamOrder(Sampler):
    """
    The endless stream of an iterable table. Every epoch shuffles the shards, and the images within a buffer, if asked to.

    Each process takes its own shards of an epoch if their number is a multiple of the number of processes, otherwise every
    n-th image. One whose shards hold fewer images begins its next epoch earlier, so that none waits.
    A resumed run reads the interrupted epoch from its beginning without decoding, because only that restores the buffer.

    Args:
        table: iterable data set, see `open_sources`.
        options: `shuffle_buffer`, `holdout_every`, `exclude` and `image_column` are used.
        seed: of the order.
        process: number of this process.
        processes: how many there are.
        start: `after` of the last sample of an interrupted run, or what [`StreamOrder.share`] makes of those of all
            processes.

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
        self.part_of = partial(split_dataset_by_node, table)
        self.process, self.processes, self.start = process, processes, start or [0, 0]

    @staticmethod
    def share(after: list[list[int]], process: int, processes: int) -> list[int]:
        """
        Where one of another number of processes starts. What each of the earlier ones had left of the epochs until the last
        one begun is read by one process, in the order it had; then the stream is split anew. So each image is seen once an
        epoch.

        Args:
            after: of the last sample of each earlier process.
            process: number of this process.
            processes: how many there are now.

        Example:

        ```python
        >>> StreamOrder.share([[4, 7], [4, 8]], 0, 1)  # epoch 5; before it parts 0 and 1 of 2 of epoch 4, from 7 and 8 on
        [5, 0, 4, 0, 2, 7, 4, 1, 2, 8]
        ```"""
        end = max(epoch for epoch, *_ in after) + 1
        unfinished = []
        for number, (begun, taken, *earlier) in enumerate(after):
            unfinished += [*parts_of(earlier), (begun, number, len(after), taken)]
            unfinished += [(epoch, number, len(after), 0) for epoch in range(begun + 1, end)]
        return [end, 0, *itertools.chain.from_iterable(sorted(unfinished)[process::processes])]

    def read(self, row: dict[str, Any]) -> tuple[Any, str, bool]:
        """A row's image, its name, and whether it is held out: by its checksum, because a stream has no fixed positions."""
        source: Any = image_entry(row, self.columns)
        checksum = zlib.crc32(source if isinstance(source, bytes) else str(source).encode())
        # the position of an image differs from epoch to epoch, its checksum does not
        name = str(row[self.names]) if self.names else f"image with checksum {checksum:08x}"
        if isinstance(source, str) and not source.startswith("hf://"):  # what an image folder on the hub has
            source = Path(source)  # no other URL that a row names is fetched
        return source, name, checksum % self.options.holdout_every == 0

    def held_out(self) -> Iterator[Sample]:
        """The held-out images in the order of the table."""
        for number, row in enumerate(self.plain):
            source, name, held_out = self.read(row)
            if held_out and not is_excluded(name, self.options.exclude):
                yield Sample(number, name, source, [])

    def samples(self, epoch: int, part: int, parts: int, taken: int) -> Iterator[tuple[int, Sample]]:
        """The training images of one of the parts of an epoch, but for its first `taken` rows, with the rows until then."""
        table = self.part_of(part, parts)
        table.set_epoch(epoch)
        for number, row in enumerate(table):
            source, name, held_out = self.read(row)
            if held_out or is_excluded(name, self.options.exclude):
                continue
            # the length of a stream is unknown, so each epoch gets 2 ** 40 numbers: more than any stream needs
            index = (epoch << 40) + number * parts + part
            if number >= taken:
                yield number + 1, Sample(index, name, source, [])

    def __iter__(self) -> Iterator[Sample]:
        begun, taken, *earlier = self.start
        unfinished = parts_of(earlier)
        for i, (epoch, part, parts, read) in enumerate(unfinished):
            later = [*itertools.chain.from_iterable(unfinished[i + 1 :])]
            for rows, sample in self.samples(epoch, part, parts, read):
                yield replace(sample, after=[begun, taken, epoch, part, parts, rows, *later])
        for epoch in itertools.count(begun):
            found = taken > 0
            for rows, sample in self.samples(epoch, self.process, self.processes, taken):
                found = True
                yield replace(sample, after=[epoch, rows])
            if not found:
                raise UsageError(
                    "The stream has no image to train on for this process; check --images, --exclude, --holdout_every."
                )
            taken = 0


def parts_of(numbers: list[int]) -> list[tuple[int, int, int, int]]:
    """The parts of epochs in a list of their numbers: epoch, part, how many parts, rows that were read."""
    return list(zip(numbers[0::4], numbers[1::4], numbers[2::4], numbers[3::4], strict=True))
