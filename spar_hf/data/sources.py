"""
Where images come from, in which order, and how they are changed.

The order is made in the main process, which hands tickets to the workers; they read and decode. So neither order nor
augmentation depends on how many workers there are, and a run that goes on somewhere starts at that ticket.

Images have unequal sizes, and each process takes one at a time; `--gradient_accumulation_steps` makes the batch. Batches of
equal sizes were measured against that on the CPU (spar-tiny, forward and backward of four images): they save 3 % at 468
patches an image and 16 % at 192, of the student's share of a step only, and tie the order to the sizes. So there are none.
"""

import itertools
import json
import logging
import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from spar_hf.data.segmentation_sets import ShuffledStream, jitter_image, list_images
from spar_hf.distillation.options import Options, TeacherViews
from spar_hf.distillation.student import short_name
from spar_hf.model.image_input import to_rgb, turn_upright
from spar_hf.utils.checkpoints import cut_log

logger = logging.getLogger("distill")

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
NAME_COLUMNS = ("__key__", "file_name")
SHARDS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass
class Ticket:
    """
    One image of the endless stream.

    Attributes:
        index: its place in the stream over all processes; augmentation and windows are drawn from it.
        name: what a message calls it.
        source: its path, its bytes, or (number of the table, row).
        after: where to go on after it, for [`MapOrder`] or [`StreamOrder`].
    """

    index: int
    name: str
    source: Any
    after: list[int]


@dataclass
class Sample:
    """An image for the model: `pixel_values` `(1, 3, height, width)`, sides multiples of the patch; ticket's place."""

    index: int
    pixel_values: torch.Tensor
    after: list[int]
    target: torch.Tensor | None = None  # where it was computed before


@dataclass
class Skipped:
    """An image that could not be read, and why."""

    name: str
    reason: str


class SkippedList:
    """`skipped.jsonl`: the images of a run that could not be read, each once, from any process."""

    def __init__(self, path: Path):
        self.path = path
        self.listed: set[str] = set()

    def start(self, resume: bool) -> None:
        """Begin anew, or mend the line that a killed run was writing."""
        if resume:
            cut_log(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def names(self) -> set[str]:
        if not self.path.is_file():
            return set()
        return {json.loads(line)["image"] for line in self.path.read_text(encoding="utf-8").splitlines()}

    def count(self) -> int:
        return len(self.names())

    def add(self, skipped: Skipped) -> None:
        if skipped.name not in self.listed and skipped.name not in (names := self.names()):
            self.listed |= names
            with self.path.open("a", encoding="utf-8") as file:  # a line in one write
                file.write(json.dumps({"image": skipped.name, "reason": skipped.reason}) + "\n")
        self.listed.add(skipped.name)


class Files:
    """Images in files, named by their paths."""

    def __init__(self, paths: list[str]):
        self.names = paths

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def key(self, i: int) -> str:
        return self.names[i]

    def source(self, i: int) -> Any:
        return self.names[i]


class Rows:
    """Images in a table of `datasets` (map-style), undecoded: they are decoded as those in files are."""

    def __init__(self, table, label: str, options: Options):
        self.table, self.columns, self.names = undecoded(table, label, options)
        self.label = label
        if options.exclude and self.names is None:
            raise ValueError(f"--exclude needs names, and {label} has none ({' or '.join(NAME_COLUMNS)}).")
        # pictures apart from names, so that reading the names of all rows reads no picture
        self.keys = None if self.names is None else self.table[self.names]

    def __len__(self) -> int:
        return len(self.table)

    def name(self, i: int) -> str:
        return f"{self.label} row {i}" if self.keys is None else f"{self.label} {self.keys[i]}"

    def key(self, i: int) -> str:
        return "" if self.keys is None else str(self.keys[i])

    def source(self, i: int) -> Any:
        return picture(self.table[i], self.columns)


def undecoded(table, label: str, options: Options) -> tuple[Any, list[str], str | None]:
    """A table with its pictures as bytes, which columns they are, and the column of names."""
    from datasets import Image as ImageColumn

    features = table.features
    if features is None:
        raise ValueError(f"The columns of {label} cannot be told; read it without --streaming.")
    if options.image_column is not None:
        columns = [options.image_column] if options.image_column in features else []
    else:
        columns = [name for name, kind in features.items() if isinstance(kind, ImageColumn)]
        columns = columns or [name for name in IMAGE_COLUMNS if name in features]
    if not columns:
        raise ValueError(f"{label} has no images among its columns {', '.join(features)}; name it with --image_column.")
    names = next((name for name in NAME_COLUMNS if name in features), None)
    table = table.select_columns([*columns, *([names] if names else [])])
    for column in columns:
        table = table.cast_column(column, ImageColumn(decode=False))
    return table, columns, names


def picture(row: dict[str, Any], columns: list[str]) -> bytes | str | None:
    """The bytes of a row's picture, else its path; the first column that holds one."""
    for column in columns:
        value = row[column]
        if value is not None and (value["bytes"] or value["path"]):
            return value["bytes"] or value["path"]
    return None


def list_files(entry: str) -> list[str] | None:
    """The images of a folder, or those that a list names (relative to itself); None where `entry` is something else."""
    path = Path(entry)
    if path.suffix == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"{entry}: there is no such list.")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        paths = [str(path.parent / line) for line in lines if line and not line.startswith("#")]
        if not paths:
            raise FileNotFoundError(f"{entry} names no image. Write a path a line.")
        return paths
    if not path.is_dir():
        return None
    try:
        return [str(found) for found in list_images(path)]
    except FileNotFoundError:
        # no images, but maybe the tables of a data set
        if is_saved_table(path) or any(found.suffix in SHARDS for found in path.rglob("*")):
            return None
        raise


def is_saved_table(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def list_shards(entry: str) -> list[str]:
    """`entry` where it is a shard, or the shards that lie in it where it is a folder without images."""
    path = Path(entry)
    if path.suffix in SHARDS:
        if not path.is_file():
            raise FileNotFoundError(f"{entry}: there is no such file.")
        return [entry]
    if not path.is_dir() or is_saved_table(path):
        return []
    return sorted(str(shard) for shard in path.iterdir() if shard.suffix in SHARDS)


def open_table(entry: str, options: Options) -> Any:
    """
    A table of `datasets`: a folder of `save_to_disk`, or what `load_dataset` makes of a folder or an id of the hub.

    Raises:
        ValueError: neither, or without the split.
    """
    import datasets  # a second of import, and only where a table is read

    if is_saved_table(Path(entry)):
        table = datasets.load_from_disk(entry)
        if isinstance(table, datasets.DatasetDict):
            if options.split not in table:
                raise ValueError(f"{entry} has no split {options.split!r} but {', '.join(table)}; see --split.")
            table = table[options.split]
        return table.to_iterable_dataset(num_shards=max(1, len(table.cache_files))) if options.streaming else table
    try:
        return datasets.load_dataset(entry, split=options.split, streaming=options.streaming)
    except Exception as error:  # of the hub, the network, the file formats: each its own
        raise ValueError(
            f"--images {entry}: neither a folder, a list, shards ({', '.join(SHARDS)}) nor a data set that can be read "
            f"({type(error).__name__}: {error})."
        ) from error


def open_sources(options: Options) -> list[Any]:
    """
    What --images names, in its order: [`Files`], [`Rows`], or (streaming) one iterable table. All shards of one kind are
    one table, at the place of the first.

    Raises:
        FileNotFoundError, ValueError: a folder without images, something that `datasets` cannot read, a mixed stream.
    """
    opened: list[tuple[str, Any]] = []  # what a message calls it, and the paths, the table, or the kind of its shards
    shards: dict[str, list[str]] = {}
    for entry in options.images:
        paths = list_files(entry)
        found = list_shards(entry) if paths is None else []
        for shard in found:
            kind = SHARDS[Path(shard).suffix]
            if kind not in shards:
                shards[kind] = []
                opened.append((short_name(entry), kind))
            shards[kind].append(shard)
        if not found:
            opened.append((short_name(entry), open_table(entry, options) if paths is None else Files(paths)))
    if options.streaming and (len(opened) > 1 or isinstance(opened[0][1], Files)):
        raise ValueError(
            "--streaming reads one data set, or shards of one kind. Folders and lists of images are read without it."
        )
    sources: list[Any] = []
    for label, source in opened:
        if isinstance(source, str):
            import datasets  # as above

            files = shards[source]
            source = datasets.load_dataset(source, data_files=files, split="train", streaming=options.streaming)
        sources.append(source if options.streaming or isinstance(source, Files) else Rows(source, label, options))
    return sources


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

    def ticket(self, i: int, index: int, after: list[int]) -> Ticket:
        number, row = self.locate(i)
        files = isinstance(self.sources[number], Files)
        source = self.sources[number].source(row) if files else (number, row)
        return Ticket(index, self.sources[number].name(row), source, after)


def split_images(sources: list[Any], options: Options) -> tuple[Listing, Listing]:
    """
    Images to train on and held-out images: of every source each n-th that is not excluded.

    Raises:
        ValueError: none is left to train on.
    """
    train, held_out = [], []
    for source in sources:
        kept = np.arange(len(source))
        if options.exclude:
            kept = kept[[not excluded(source.key(i), options) for i in range(len(source))]]
        last = np.arange(len(kept)) % options.holdout_every == options.holdout_every - 1
        train.append(kept[~last])
        held_out.append(kept[last])
    if not sum(map(len, train)):
        raise ValueError("No image is left to train on; check --images, --exclude and --holdout_every.")
    return Listing(sources, train), Listing(sources, held_out)


def excluded(key: str, options: TeacherViews) -> bool:
    """Whether a path, or a data set's key without a suffix, fits a pattern of --exclude."""
    path = PurePath(key)
    return any(path.match(f"{pattern}.*" if path.suffix else pattern) for pattern in options.exclude)


class MapOrder(Sampler):
    """
    The endless shuffled stream of a [`Listing`]: image i is a function of seed and i alone. Each process takes every n-th
    ticket, so that n processes see together what one sees.
    """

    def __init__(self, images: Listing, seed: int, process: int, processes: int, start: list[int] | None = None):
        self.images, self.seed, self.process, self.processes = images, seed, process, processes
        self.start = start or [0]

    def __iter__(self) -> Iterator[Ticket]:
        order = ShuffledStream(len(self.images), f"order-{self.seed}")
        for turn in itertools.count(self.start[0]):
            index = turn * self.processes + self.process
            yield self.images.ticket(order[index], index, [turn + 1])


class StreamOrder(Sampler):
    """
    The endless stream of an iterable table, shuffled anew each epoch: the order of its shards, and images within a buffer.
    Processes take shards where their number divides by the processes, else every n-th image. Going on reads the epoch
    again up to where it was, without decoding: only so is the buffer the same.
    """

    def __init__(self, table, options: Options, process: int, processes: int, start: list[int] | None = None):
        from datasets.distributed import split_dataset_by_node

        table, self.columns, self.names = undecoded(table, options.images[0], options)
        self.plain, self.options = table, options
        shuffled = table.shuffle(seed=options.seed, buffer_size=options.shuffle_buffer)
        self.table = split_dataset_by_node(shuffled, process, processes)
        self.process, self.processes, self.start = process, processes, start or [0, 0]

    def read(self, row: dict[str, Any], number: int) -> tuple[Any, str, bool]:
        """A row's picture, its name, and whether it is held out: by checksum, wherever the shuffle put it."""
        source = picture(row, self.columns)
        name = str(row[self.names]) if self.names else f"image {number} of the stream"
        content = source if isinstance(source, bytes) else str(source).encode()
        return source, name, zlib.crc32(content) % self.options.holdout_every == 0

    def held_out(self) -> Iterator[Ticket]:
        """The held-out images in the stream's own order."""
        for number, row in enumerate(self.plain):
            source, name, held_out = self.read(row, number)
            if held_out and not excluded(name, self.options):
                yield Ticket(number, name, source, [])

    def __iter__(self) -> Iterator[Ticket]:
        epoch, taken = self.start
        for epoch in itertools.count(self.start[0]):
            self.table.set_epoch(epoch)
            found = False
            for number, row in enumerate(self.table):
                source, name, held_out = self.read(row, number)
                if held_out or excluded(name, self.options):
                    continue
                found = True
                if number >= taken:
                    # an epoch of a stream has no known length: its images are numbered below a bound no stream reaches
                    index = (epoch << 40) + number * self.processes + self.process
                    yield Ticket(index, name, source, [epoch, number + 1])
            if not found:
                raise ValueError(
                    "The stream gives this process no image to train on; check --images and --holdout_every."
                )
            taken = 0


class TrainingImages(Dataset):
    """
    The image of a ticket, resized, cropped, flipped and jittered as (seed, index) says, whatever the worker; a
    [`Skipped`] where it cannot be read.
    """

    def __init__(self, sources: list[Any], image_processor, window: int, patch_size: int, options: Options):
        self.sources, self.image_processor, self.window = sources, image_processor, window
        self.patch_size, self.options = patch_size, options

    def read(self, ticket: Ticket) -> Image.Image:
        source = ticket.source
        if isinstance(source, tuple):
            source = self.sources[source[0]].source(source[1])
        if source is None:
            raise ValueError("the row holds no image")
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = Image.open(BytesIO(data))
        if min(image.size) < self.options.min_side:
            raise ValueError(f"{image.width}×{image.height} px; --min_side is {self.options.min_side}")
        return to_rgb(turn_upright(image, "the file"))

    def __getitem__(self, ticket: Ticket) -> Sample | Skipped:
        rng = random.Random(f"photo-{self.options.seed}-{ticket.index}")
        try:
            image = self.read(ticket)
        except Exception as error:  # each of Pillow's decoders raises its own kind, and no file may end a training
            return Skipped(ticket.name, str(error) or type(error).__name__)
        image = augment(image, self.window, self.patch_size, self.options, rng)
        if rng.random() < self.options.jitter_probability:
            image = jitter_image(image, rng.getrandbits(32))
        return Sample(ticket.index, self.pixels(image), ticket.after)

    def squares(self, tickets: list[Ticket], side: int) -> Iterator[torch.Tensor]:
        """The images of tickets, those that can be read, as squares of `side` pixels: `(1, 3, side, side)` one by one."""
        for ticket in tickets:
            try:
                image = self.read(ticket)
            except Exception as error:  # as above; training lists the image
                logger.warning("%s is passed over: %s", ticket.name, error)
                continue
            yield self.pixels(image.resize((side, side)))

    def pixels(self, image: Image.Image) -> torch.Tensor:
        return self.image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]


def augment(image: Image.Image, window: int, patch_size: int, options: TeacherViews, rng: random.Random) -> Image.Image:
    """The recipe's random size, crop and flip; sides become multiples of the patch."""
    scale = rng.uniform(options.min_scale, 1.0)
    long_side, short_side = max(image.size), min(image.size)
    factor = scale * min(options.long_side * window / long_side, options.short_side * window / short_side)
    sides = [side * factor for side in image.size]
    if rng.random() < options.crop_probability:
        cropped = [min(side, max(side * rng.uniform(0.4, 1.0), window)) for side in sides]
    else:
        cropped = sides
    width, height = (max(patch_size, math.floor(side / patch_size + 1e-6) * patch_size) for side in cropped)
    left, top = (rng.uniform(0, max(0.0, side - kept)) for side, kept in zip(sides, (width, height), strict=True))
    box = tuple(value / factor for value in (left, top, left + width, top + height))
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if rng.random() < options.flip_probability:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def as_it_is(item: Any) -> Any:
    """For a loader of single items: a function of a module, so that any kind of worker process can be handed it."""
    return item
