"""Sources of training images: folders, lists of files, Hugging Face data sets and WebDataset shards."""

import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spar_hf.data.reading import ReadingOptions
from spar_hf.data.shards import ShardImages, choose_columns
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.fields import option, required
from spar_hf.utils.image_files import URL_PREFIXES
from spar_hf.utils.image_listing import IMAGE_SUFFIXES, describe, images_under, scan_folder
from spar_hf.utils.model_cards import short_name
from spar_hf.utils.options import HELP, require_not_negative, require_positive
from spar_hf.utils.remote_files import is_remote, read_remote, remote_images
from spar_hf.utils.sample_record import same_files
from spar_hf.utils.texts import decode_text, read_text

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
NAME_COLUMNS = ("__key__", "file_name")
SHARDS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}
TABLES = (".parquet", ".arrow")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(kw_only=True)
class ImageSelection(ReadingOptions):
    """Choice of the images that are read, and of those held out."""

    images: list[str] = required(
        "Images without labels: folders, lists (.txt, one path per line), Hugging Face data sets (a folder of "
        "save_to_disk, .arrow and .parquet files, hub ids), WebDataset shards (.tar); also in stores (s3://bucket/photos). "
        "A source named twice counts twice."
    )
    exclude: list[str] = option([], HELP["exclude"])
    holdout_every: int = option(
        20,
        "Every n-th image of each folder (sorted by name) or data set is held out to measure the error on; of a "
        "stream, images whose checksum is a multiple of n.",
    )
    min_side: int = option(32, "Images with a side below this many pixels are skipped and listed.")

    def __post_init__(self):
        super().__post_init__()
        if self.holdout_every < 2:
            raise UsageError(f"--holdout_every {self.holdout_every} must be at least 2.")


@dataclass(kw_only=True)
class ImageOptions(ImageSelection):
    """Choice of the images, and the way they are read from data sets and streams."""

    split: str = option("train", "Split to read of data sets in --images.")
    image_column: str | None = option(
        None,
        "Column of images in data sets, in shards the ending (rgb.jpg, or jpg;png). Default: found by its type; "
        "of several the first that is not named depth, mask, … (a note says which).",
    )
    streaming: bool = option(False, "Read data sets and shards as a stream, without an index or a copy on disk.")
    shuffle: bool = option(True, "Shuffle the images every epoch; the paper keeps one order (--no_shuffle).")
    shuffle_buffer: int = option(1000, "Number of images in the buffer that shuffles a stream.")
    workers: int = option(1, HELP["workers"])

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "shuffle_buffer")
        require_not_negative(self, "workers")


def list_images(folder: str | Path) -> list[Path]:
    """
    The image files of a folder and its sub-folders, sorted, without hidden ones.

    Raises:
        MissingFiles: there is no such folder, or no image in it.

    Example:

    ```python
    >>> Path("street.png").touch()
    >>> list_images(".")
    [PosixPath('street.png')]
    ```"""
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFiles(f"{folder} is no folder. Name a folder of images.")
    images = images_under(folder)
    if not images:
        _, others = scan_folder(folder)
        found = f" but {describe(others)}" if others else ""
        raise MissingFiles(f"{folder} holds no image{found}. Supported are {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return images


class Files:
    """Image files, named by their paths."""

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
    """
    Images in a map-style data set of `datasets`. It gives bytes or paths, so that every image is decoded by the same code.

    Raises:
        UsageError: see [`undecoded`].
    """

    def __init__(self, table, label: str, options: ImageOptions):
        self.table, self.columns, self.names = undecoded(table, label, options)
        self.label = label
        # a table of its own, so that listing the names reads no images
        self.keys = None if self.names is None else self.table[self.names]
        # hold-out sets and records of runs go by names, so rows of one key must not share theirs
        self.repeated = {key for key, count in Counter(self.keys or ()).items() if count > 1}

    def __len__(self) -> int:
        return len(self.table)

    def name(self, i: int) -> str:
        """Label and key, with the number of the row if there is no key or several rows have it."""
        if self.keys is None:
            return f"{self.label} row {i}"
        key = self.keys[i]
        return f"{self.label} row {i} {key}" if key in self.repeated else f"{self.label} {key}"

    def key(self, i: int) -> str:
        return "" if self.keys is None else str(self.keys[i])

    def source(self, i: int) -> Any:
        return image_entry(self.table[i], self.columns)


def undecoded(table, label: str, options: ImageOptions) -> tuple[Any, list[str], str | None]:
    """
    A table that gives images as bytes or paths, the columns of images, and the column of names.

    Raises:
        UsageError: no column of images is found, or none of names for `--exclude`.
    """
    from datasets import Image as ImageColumn

    features = table.features
    if features is None:
        raise UsageError(f"The columns of {label} are unknown while streaming; read it without --streaming.")
    images = [name for name, kind in features.items() if isinstance(kind, ImageColumn)]
    images = images or [name for name in IMAGE_COLUMNS if name in features]
    if options.streaming and "__key__" in features and images == ["image"]:
        columns = images  # shards, whose column was chosen when they were opened
    elif options.image_column in features:
        columns = [options.image_column]  # also one of bytes
    else:
        columns = choose_columns(images, options.image_column, label)
    if not columns:
        raise UsageError(
            f"{label} has no images among its columns {', '.join(features)}; name one with --image_column."
        )
    names = next((name for name in NAME_COLUMNS if name in features), None)
    if options.exclude and names is None:
        raise UsageError(f"--exclude needs names, but {label} has no column {' or '.join(NAME_COLUMNS)}.")
    table = table.select_columns([*columns, *([names] if names else [])])
    for column in columns:
        table = table.cast_column(column, ImageColumn(decode=False))
    return table, columns, names


def image_entry(row: dict[str, Any], columns: list[str]) -> bytes | str | None:
    """Bytes or path of the first image among the columns of a row; `None` if there is none."""
    for column in columns:
        value = row[column]
        if value is not None and (value["bytes"] or value["path"]):
            return value["bytes"] or value["path"]
    return None


def list_files(entry: str) -> list[str] | None:
    """
    Paths of the images in a folder or in a list (relative to the list, or URLs), or URLs of those in a store, where a list
    may be too; `None` if `entry` is something else.

    Raises:
        MissingFiles: the list does not exist or is empty, or the folder holds nothing that can be read.
        UsageError: the list names web addresses.
    """
    if is_remote(entry):
        if PurePosixPath(entry).suffix == ".txt":
            folder = entry.rpartition("/")[0]
            return listed(entry, read_remote_list(entry), lambda line: posixpath.join(folder, line))
        return None if PurePosixPath(entry).suffix in TABLES else [url for url, _ in remote_images(entry)]
    path = Path(entry)
    if path.suffix == ".txt":
        if not path.is_file():
            raise MissingFiles(f"There is no list {entry}.")
        return listed(entry, read_text(path), lambda line: str(path.parent / line))
    if not path.is_dir():
        return None
    try:
        return [str(found) for found in list_images(path)]
    except MissingFiles:
        # the folder may hold a data set instead
        if is_saved_table(path) or any(found.suffix in SHARDS for found in path.rglob("*")):
            return None
        raise


def listed(entry: str, text: str, locate: Callable[[str], str]) -> list[str]:
    """What a list names: URLs of stores as they are, paths as `locate` completes them. Raises as [`list_files`]."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if web := [line for line in lines if line.startswith(URL_PREFIXES)]:
        raise UsageError(f"{entry} names {web[0][:200]}. Training reads files and stores: download the images first.")
    found = [line if is_remote(line) else locate(line) for line in lines]
    if not found:
        raise MissingFiles(f"{entry} names no image. Write one path per line.")
    return found


def read_remote_list(url: str) -> str:
    """The text of a list in a store. Raises as [`list_files`]."""
    try:
        return decode_text(read_remote(url), url)
    except FileNotFoundError as error:
        raise MissingFiles(f"There is no list {url}.") from error


def is_saved_table(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def split_of(file: Path) -> str | None:
    """
    The split that a file name begins with, in the words that `datasets` knows; `None` if it begins with another word.

    Example:

    ```python
    >>> split_of(Path("train-00000-of-00002.parquet")), split_of(Path("val_3.tar")), split_of(Path("trainers.tar"))
    ('train', 'validation', None)
    ```"""
    word = re.split(r"[^a-z]", file.name.lower(), maxsplit=1)[0]
    return next((split for split, words in SPLIT_WORDS.items() if word in words), None)


def list_shards(entry: str, split: str) -> list[str]:
    """
    `entry` itself if it is a shard, or the shards in it if it is a folder; those of `split` if their names tell several
    splits apart.

    Raises:
        MissingFiles: the shard does not exist.
        UsageError: there is no shard of this split.
    """
    path = Path(entry)
    if path.suffix in SHARDS:
        if not is_remote(entry) and not path.is_file():
            raise MissingFiles(f"There is no file {entry}.")
        return [entry]
    if not path.is_dir() or is_saved_table(path):
        return []
    files = (file for file in path.iterdir() if not file.name.startswith("."))  # macOS puts ._000.tar beside 000.tar
    shards = sorted(file for file in files if file.suffix in SHARDS)
    splits = {split_of(shard) for shard in shards} - {None}
    wanted = next((name for name, words in SPLIT_WORDS.items() if split in words), split)
    # a folder of one split was named for it, so that the default of --split says nothing
    if len(splits) > 1 or (splits and wanted not in splits and wanted != "train"):
        if wanted not in splits:
            names = ", ".join(sorted(filter(None, splits)))
            raise UsageError(f"{entry} has no shards of the split {split!r}; choose one of {names} with --split.")
        shards = [shard for shard in shards if split_of(shard) == wanted]
    return [str(shard) for shard in shards]


def open_table(entry: str, options: ImageOptions) -> Any:
    """
    Open a folder of `save_to_disk`, or anything that `load_dataset` can load, as a table of `datasets`.

    Raises:
        UsageError: it cannot be read, or has no such split.
    """
    import datasets  # takes a second to import, so only when a table is read

    if is_saved_table(Path(entry)):
        table = datasets.load_from_disk(entry)
        if isinstance(table, datasets.DatasetDict):
            if options.split not in table:
                raise UsageError(
                    f"{entry} has no split {options.split!r}; choose one of {', '.join(table)} with --split."
                )
            table = table[options.split]
        return table.to_iterable_dataset(num_shards=max(1, len(table.cache_files))) if options.streaming else table
    try:
        return datasets.load_dataset(entry, split=options.split, streaming=options.streaming)
    except Exception as error:  # hub, network and file formats each raise their own kind
        raise UsageError(
            f"--images {entry} is neither a folder of images, a list (.txt), a shard ({', '.join(SHARDS)}) nor a data set "
            f"that can be loaded ({type(error).__name__}: {error})."
        ) from error


def stream_contents(options: ImageOptions) -> list[str]:
    """
    What a stream consists of, as far as that is known without reading it: shards and other files with their sizes, the
    fingerprint of a saved table, or the files of a commit on the hub.

    Example:

    ```python
    >>> size = Path("a.tar").write_bytes(b"images")
    >>> stream_contents(ImageOptions(images=["a.tar"], streaming=True))
    ['a.tar (6 bytes)']
    ```"""
    contents = []
    for entry in options.images:
        if is_saved_table(Path(entry)):
            found = (Path(entry, part, "state.json") for part in ("", options.split))
            state = next(path for path in found if path.is_file())
            contents.append(f"{entry} with fingerprint {json.loads(state.read_text(encoding='utf-8'))['_fingerprint']}")
            continue
        files = list_shards(entry, options.split)
        if not files:
            import datasets  # as above

            parts = datasets.load_dataset_builder(entry).config.data_files or {}
            files = [str(file) for part in parts.values() for file in part]
        contents += [f"{file} ({Path(file).stat().st_size} bytes)" if Path(file).is_file() else file for file in files]
    return contents


def distinct_labels(entries: list[str]) -> dict[str, str]:
    """
    What the images of each entry of `--images` are named after: its short name, or the whole entry where another one has
    that, since hold-out sets and records of runs go by names.

    Example:

    ```python
    >>> distinct_labels(["day/street/train", "dusk/street/train", "data/photos"])
    {'day/street/train': 'day/street/train', 'dusk/street/train': 'dusk/street/train', 'data/photos': 'data/photos'}
    ```"""
    places = dict(zip(entries, same_files(entries), strict=True))
    counts = Counter(short_name(entry) for entry in {place: entry for entry, place in places.items()}.values())
    return {entry: entry if counts[short_name(entry)] > 1 else short_name(entry) for entry in entries}


def open_sources(options: ImageOptions) -> list[Any]:
    """
    Open the sources that `--images` names, in its order. All shards of one kind become one table, in the place of the first.

    Returns:
        [`Files`], [`Rows`] and [`ShardImages`], or one iterable table if streaming.

    Raises:
        UsageError: a folder has no images, `datasets` cannot read a source, or several sources are streamed.

    Example:

    ```python
    >>> from PIL import Image
    >>> Image.new("RGB", (64, 64)).save("street.png")
    >>> (source,) = open_sources(ImageOptions(images=["."]))
    >>> source.name(0)
    'street.png'
    ```"""
    labels = distinct_labels(options.images)
    opened: list[tuple[str, Any]] = []  # name in messages, and the files, the table, or the kind of shards
    shards: dict[str, list[str]] = {}
    for entry in options.images:
        paths = list_files(entry)
        found = list_shards(entry, options.split) if paths is None else []
        for shard in found:
            kind = SHARDS[Path(shard).suffix]
            if kind not in shards:
                shards[kind] = []
                opened.append((labels[entry], kind))
            shards[kind].append(shard)
        if not found:
            opened.append((labels[entry], open_table(entry, options) if paths is None else Files(paths)))
    if options.streaming and (len(opened) > 1 or isinstance(opened[0][1], Files)):
        raise UsageError(
            "--streaming reads one data set or shards of one kind. Omit it for folders and lists of images."
        )
    sources: list[Any] = []
    for label, source in opened:
        if source == "webdataset":
            images = ShardImages(shards[source], label, options.image_column)
            source = images.stream() if options.streaming else images
        elif isinstance(source, str):
            import datasets  # as above

            files = shards[source]
            source = datasets.load_dataset(source, data_files=files, split="train", streaming=options.streaming)
        ready = options.streaming or isinstance(source, (Files, ShardImages))
        sources.append(source if ready else Rows(source, label, options))
    return sources
