"""Where training images come from: folders, lists of files, Hugging Face data sets and WebDataset shards."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.image_files import IMAGE_SUFFIXES, images_under
from spar_hf.utils.model_cards import short_name

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
NAME_COLUMNS = ("__key__", "file_name")
SHARDS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(kw_only=True)
class ImageSelection:
    """Which images are read, and which of them are held out."""

    images: list[str] = field(
        metadata={
            "help": "Images, no labels needed: folders, lists (.txt, a path a line), data sets of `datasets` (a folder of "
            "save_to_disk, .arrow and .parquet files, hub ids), WebDataset shards (.tar). One named twice counts twice."
        }
    )
    exclude: list[str] = field(default_factory=list, metadata={"help": "Shell patterns of file stems never read."})
    holdout_every: int = field(
        default=20,
        metadata={
            "help": "Each n-th image of every folder (sorted by name) or data set is held out to measure the error on; of a "
            "stream those whose checksum is a multiple of n."
        },
    )

    def __post_init__(self):
        if self.holdout_every < 2:
            raise UsageError(f"--holdout_every {self.holdout_every} must be at least 2.")


@dataclass(kw_only=True)
class ImageOptions(ImageSelection):
    """How images are read from data sets and streams."""

    split: str = field(default="train", metadata={"help": "Split of the data sets among --images that have several."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images in data sets; found by its type by default."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read data sets and shards as a stream, without an index or a copy on disk."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Images among which a stream is shuffled."})
    min_side: int = field(default=32, metadata={"help": "Images with a shorter side in pixels are skipped and listed."})
    workers: int = field(default=1, metadata={"help": "Processes that decode images."})

    def __post_init__(self):
        super().__post_init__()
        if self.shuffle_buffer < 1:
            raise UsageError(f"--shuffle_buffer {self.shuffle_buffer} must be above 0.")
        if self.workers < 0:
            raise UsageError(f"--workers {self.workers} must be 0 or above.")


def list_images(folder: str | Path) -> list[Path]:
    """
    All image files of a folder and its sub-folders, sorted, without hidden ones.

    Raises:
        MissingFiles: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFiles(f"{folder} is no folder. Name a folder of images.")
    images = images_under(folder)
    if not images:
        raise MissingFiles(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return images


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

    def __init__(self, table, label: str, options: ImageOptions):
        self.table, self.columns, self.names = undecoded(table, label, options)
        self.label = label
        if options.exclude and self.names is None:
            raise UsageError(f"--exclude needs names, and {label} has none ({' or '.join(NAME_COLUMNS)}).")
        # pictures apart from names, so that reading the names of all rows reads no picture
        self.keys = None if self.names is None else self.table[self.names]

    def __len__(self) -> int:
        return len(self.table)

    def name(self, i: int) -> str:
        return f"{self.label} row {i}" if self.keys is None else f"{self.label} {self.keys[i]}"

    def key(self, i: int) -> str:
        return "" if self.keys is None else str(self.keys[i])

    def source(self, i: int) -> Any:
        return image_entry(self.table[i], self.columns)


def undecoded(table, label: str, options: ImageOptions) -> tuple[Any, list[str], str | None]:
    """A table with its pictures as bytes, which columns they are, and the column of names."""
    from datasets import Image as ImageColumn

    features = table.features
    if features is None:
        raise UsageError(f"The columns of {label} cannot be told; read it without --streaming.")
    if options.image_column is not None:
        columns = [options.image_column] if options.image_column in features else []
    else:
        columns = [name for name, kind in features.items() if isinstance(kind, ImageColumn)]
        columns = columns or [name for name in IMAGE_COLUMNS if name in features]
    if not columns:
        raise UsageError(f"{label} has no images among its columns {', '.join(features)}; name it with --image_column.")
    names = next((name for name in NAME_COLUMNS if name in features), None)
    table = table.select_columns([*columns, *([names] if names else [])])
    for column in columns:
        table = table.cast_column(column, ImageColumn(decode=False))
    return table, columns, names


def image_entry(row: dict[str, Any], columns: list[str]) -> bytes | str | None:
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
            raise MissingFiles(f"{entry}: there is no such list.")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        paths = [str(path.parent / line) for line in lines if line and not line.startswith("#")]
        if not paths:
            raise MissingFiles(f"{entry} names no image. Write a path a line.")
        return paths
    if not path.is_dir():
        return None
    try:
        return [str(found) for found in list_images(path)]
    except MissingFiles:
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
            raise MissingFiles(f"{entry}: there is no such file.")
        return [entry]
    if not path.is_dir() or is_saved_table(path):
        return []
    return sorted(str(shard) for shard in path.iterdir() if shard.suffix in SHARDS)


def open_table(entry: str, options: ImageOptions) -> Any:
    """
    A table of `datasets`: a folder of `save_to_disk`, or what `load_dataset` makes of a folder or an id of the hub.

    Raises:
        UsageError: neither, or without the split.
    """
    import datasets  # a second of import, and only where a table is read

    if is_saved_table(Path(entry)):
        table = datasets.load_from_disk(entry)
        if isinstance(table, datasets.DatasetDict):
            if options.split not in table:
                raise UsageError(f"{entry} has no split {options.split!r} but {', '.join(table)}; see --split.")
            table = table[options.split]
        return table.to_iterable_dataset(num_shards=max(1, len(table.cache_files))) if options.streaming else table
    try:
        return datasets.load_dataset(entry, split=options.split, streaming=options.streaming)
    except Exception as error:  # of the hub, the network, the file formats: each its own
        raise UsageError(
            f"--images {entry}: neither a folder, a list, shards ({', '.join(SHARDS)}) nor a data set that can be read "
            f"({type(error).__name__}: {error})."
        ) from error


def open_sources(options: ImageOptions) -> list[Any]:
    """
    What --images names, in its order: [`Files`], [`Rows`], or (streaming) one iterable table. All shards of one kind are
    one table, at the place of the first.

    Raises:
        UsageError: a folder without images, something that `datasets` cannot read, a mixed stream.
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
        raise UsageError(
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
