"""
Features in Parquet: a folder of files with a fixed number of images each, locally or in a store (`s3://`, …).

Which images a file holds follows from the list of images alone, so that any job can make any file, and a file that exists
needs not be made again. `datasets.load_dataset("parquet", …)` reads the files; see `spar_hf.batch.arrays`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spar_hf.batch.ahead import Work
from spar_hf.batch.callables import SparFeatures
from spar_hf.batch.extractor import PreparedImage
from spar_hf.batch.features import ReadSource
from spar_hf.model.file_modes import follow_umask
from spar_hf.utils.atomic import write_atomically
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, stamp
from spar_hf.utils.remote_files import is_remote, open_store
from spar_hf.utils.texts import json_text, storable

SUFFIX = ".parquet"
MANIFEST = "spar-hf.json"
GROUP_BYTES = 32 * 2**20  # of features in a row group, which bounds the memory of writer and reader


def import_pyarrow() -> tuple[Any, Any]:
    """
    `pyarrow` and `pyarrow.parquet`.

    Raises:
        UsageError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow: pip install 'spar-hf[parquet]'.") from error
    return pyarrow, pyarrow.parquet


def feature_schema(features: SparFeatures, settings: Mapping[str, Any]) -> Any:
    """The schema of Arrow: `id`, `image`, `source` and `stamp`, and the columns of [`SparFeatures`]."""
    pa, _ = import_pyarrow()
    sizes = pa.list_(pa.int64())
    columns = {"id": pa.int64(), "image": pa.string(), "source": pa.string(), "stamp": pa.string()}
    for values, shape in features.names.values():
        columns |= {values: pa.binary(), shape: sizes}
    columns |= {"dtype": pa.string(), "original_size": sizes, "working_size": sizes}
    columns |= {"fingerprint": pa.string(), "error": pa.string()}
    return pa.schema(list(columns.items()), metadata={"spar_hf": json.dumps(settings)})


class ParquetFolder:
    """
    A folder of Parquet files `part-00000.parquet`, …: the N-th holds the images from N × `shard_images` on, and their
    numbers as `id`. `spar-hf.json` states settings and images.

    Args:
        output: folder or URL of one.

    Attributes:
        manifest: `settings`, number of `images`, `shard_images` and a hash of the `names`; empty before the first run.
    """

    def __init__(self, output: str | os.PathLike):
        self.output = os.fspath(output).rstrip("/")
        self.store, self.root = open_store(self.output)
        self.manifest: dict[str, Any] = {}
        if self.store.exists(self._path(MANIFEST)):
            self.manifest = json.loads(self.store.cat_file(self._path(MANIFEST)))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def file(self, number: int) -> str:
        """Name of a file."""
        return f"part-{number:05d}{SUFFIX}"

    @property
    def count(self) -> int:
        """Number of files when all are there."""
        return -(-self.manifest["images"] // self.manifest["shard_images"])

    def images_of(self, number: int) -> range:
        """The numbers of the images in a file."""
        size = self.manifest["shard_images"]
        return range(number * size, min((number + 1) * size, self.manifest["images"]))

    def begin(self, settings: Mapping[str, Any], names: Sequence[str], shard_images: int, may_exist: bool) -> None:
        """
        State what is written, or compare it with what was stated.

        Args:
            settings: see [`FeatureExtractor.settings`].
            names: of all images, in their order.
            shard_images: images in a file.
            may_exist: whether the files of an earlier run or another job are kept.

        Raises:
            UsageError: the folder holds files of another run, of other settings or other images.
        """
        digest = hashlib.sha256("\n".join(map(storable, names)).encode()).hexdigest()
        stated = {"settings": settings, "images": len(names), "shard_images": shard_images, "names": digest}
        stated = json.loads(json.dumps(stated))
        if self.manifest and not may_exist:
            raise UsageError(
                f"{self.output} has features of an earlier run. Use --skip-existing to continue it, or name another folder."
            )
        if self.manifest and self.manifest != stated:
            then, now = ({**one["settings"], **one, "settings": ""} for one in (self.manifest, stated))
            differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
            said = "; ".join(f"{name} {then.get(name)}, now {now.get(name)}" for name in differing)
            raise UsageError(f"{self.output} holds features of other images or settings ({said}). Name another folder.")
        self.manifest = stated
        self._write(MANIFEST, json_text(stated, indent=1).encode())

    def _write(self, name: str, data: bytes) -> None:
        if is_remote(self.output):
            self.store.makedirs(self.root, exist_ok=True)
            self.store.pipe_file(self._path(name), data)
        else:
            write_atomically(Path(self.output, name), lambda path: path.write_bytes(data))

    def is_done(self, number: int) -> bool:
        """Whether a file is there with all its rows. A cut one is not; values are not read."""
        return self.rows(self.file(number)) == len(self.images_of(number))

    def is_readable(self, name: str) -> bool:
        """Whether a file is there and was not cut."""
        return self.rows(name) is not None

    def rows(self, name: str) -> int | None:
        """The number of rows that the end of a file states; `None` for one that is cut or not there."""
        _, pq = import_pyarrow()
        try:
            with self.store.open(self._path(name), "rb") as file:
                return pq.ParquetFile(file).metadata.num_rows
        except (OSError, ValueError):  # pyarrow's own errors are ValueErrors
            return None

    def files(self) -> list[str]:
        """Names of the Parquet files that are there, also those that Ray wrote."""
        found = self.store.ls(self.root, detail=False) if self.store.exists(self.root) else []
        names = (path.rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if name.endswith(SUFFIX) and not name.startswith("."))

    def check(self, name: str) -> tuple[list[int], list[tuple[str, str]]]:
        """
        Read all of a file.

        Returns:
            The numbers of its images; name and error of each that failed.

        Raises:
            ValueError: it is damaged.
        """
        _, pq = import_pyarrow()
        failed: list[tuple[str, str]] = []
        numbers: list[int] = []
        with self.store.open(self._path(name), "rb") as file:
            try:
                for batch in pq.ParquetFile(file, page_checksum_verification=True).iter_batches(batch_size=16):
                    rows = batch.select(["id", "image", "error"]).to_pylist()
                    numbers += [row["id"] for row in rows]
                    failed += [(row["image"], row["error"]) for row in rows if row["error"]]
            except (OSError, KeyError) as error:
                raise ValueError(str(error)) from error
        return numbers, failed

    def present(self) -> np.ndarray:
        """
        Which images are in a file: `(images,)` bool. Nothing but the column of numbers is read. Files that cannot be read
        hold none.
        """
        _, pq = import_pyarrow()
        found = np.zeros(self.manifest["images"], bool)
        for name in self.files():
            with contextlib.suppress(OSError, ValueError), self.store.open(self._path(name), "rb") as file:
                found[pq.read_table(file, columns=["id"])["id"].to_numpy()] = True
        return found

    def delete(self, name: str) -> None:
        """Remove a file, so that the next run makes it anew."""
        self.store.rm_file(self._path(name))

    def put(self, temporary: Path, number: int) -> None:
        """Make a local file that is complete one of the folder."""
        if is_remote(self.output):
            self.store.makedirs(self.root, exist_ok=True)
            self.store.put_file(str(temporary), self._path(self.file(number)))
        else:
            shutil.move(temporary, Path(self.output, self.file(number)))


class ParquetWriter:
    """
    Writes rows to the files of a folder. A file appears when all its rows have been added, in any order; one that lacks rows
    at the end is dropped, and made by the next run.

    Args:
        folder: that [`ParquetFolder.begin`] was called on.
        schema: see [`feature_schema`].
        images: all images of the folder, also those of other jobs.
    """

    def __init__(self, folder: ParquetFolder, schema: Any, images: Sequence[InputImage]):
        self.folder, self.schema = folder, schema
        self.numbers = {image: number for number, image in enumerate(images)}
        self.done: dict[int, bool] = {}
        self.open: dict[int, OpenFile] = {}

    def is_done(self, image: InputImage) -> bool:
        """Whether the file of an image is there. It is compared with its images when it is made, not later."""
        number = self.numbers[image] // self.folder.manifest["shard_images"]
        if number not in self.done:
            self.done[number] = self.folder.is_done(number)
        return self.done[number]

    def add(self, image: InputImage, row: Mapping[str, Any]) -> None:
        """Write the row of an image, one that failed too."""
        identity = self.numbers[image]
        number = identity // self.folder.manifest["shard_images"]
        if number not in self.open:
            local = None if is_remote(self.folder.output) else Path(self.folder.output)
            self.open[number] = OpenFile(local, self.schema)
        file = self.open[number]
        own = {"id": identity, "image": storable(image.name), "source": storable(image.source)}
        file.add({**own, "stamp": json.dumps(stamp(image)), **row})
        if file.rows == len(self.folder.images_of(number)):
            del self.open[number]
            self.folder.put(file.finish(), number)
            file.drop()

    def close(self) -> None:
        """Drop what is not complete."""
        for file in self.open.values():
            file.drop()
        self.open = {}


class OpenFile:
    """
    A Parquet file that is being written, in a folder of its own below `beside`, or of the system for `None`. Rows are
    written in groups of about 32 MiB, so that memory does not grow with the file.
    """

    def __init__(self, beside: Path | None, schema: Any):
        pa, pq = import_pyarrow()
        self.folder = tempfile.TemporaryDirectory(prefix=".partial-", dir=beside)
        self.path = Path(self.folder.name, f"part{SUFFIX}")
        self.schema, self.rows, self.size = schema, 0, 0
        self.group: list[dict[str, Any]] = []
        self.make_table = pa.Table.from_pylist
        self.writer = pq.ParquetWriter(self.path, schema, compression="zstd", write_page_checksum=True)

    def add(self, row: dict[str, Any]) -> None:
        """Take a row, and write a group if it is large enough."""
        self.group.append(row)
        self.rows += 1
        self.size += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if self.size >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows in memory as a group."""
        if self.group:
            self.group.sort(key=lambda row: row["id"])
            self.writer.write_table(self.make_table(self.group, schema=self.schema))
            self.group, self.size = [], 0

    def finish(self) -> Path:
        """Complete the file."""
        self.flush()
        self.writer.close()
        follow_umask(self.path)
        return self.path

    def drop(self) -> None:
        """Remove what is left of it."""
        with contextlib.suppress(OSError, ValueError):
            self.writer.close()
        self.folder.cleanup()


def open_parquet(
    folder: ParquetFolder, images: Sequence[InputImage], shard_images: int, may_exist: bool, options: Mapping[str, Any]
) -> tuple[SparFeatures, ParquetWriter]:
    """
    Load the model, and open the folder for its features.

    Args:
        folder: to write.
        images: all images, also those of other jobs.
        shard_images, may_exist: see [`ParquetFolder.begin`].
        options: of [`FeatureExtractor`].

    Raises:
        ValueError: what [`FeatureExtractor`] and [`ParquetFolder.begin`] refuse.
    """
    options = dict(options)
    edge = options.pop("shortest_edge", None)
    features = SparFeatures(**options, size=None if edge is None else {"shortest_edge": edge})
    features.start()
    folder.begin(features.settings, [image.name for image in images], shard_images, may_exist)
    return features, ParquetWriter(folder, feature_schema(features, features.settings), images)


def parquet_work(features: SparFeatures, writer: ParquetWriter) -> Work:
    """What [`process_ahead`] does to write rows: an image that failed is a row too."""

    def write(image: InputImage, prepared: PreparedImage, row: dict[str, Any]) -> None:
        writer.add(image, {**row, "error": ""})

    def fail(image: InputImage, reason: str) -> None:
        writer.add(image, {**features.error_values, "error": reason})

    return Work(ReadSource(features.loaded.prepare), features.encode, write, features.patch_size, fail)


def open_features(folder: str | os.PathLike, **options: Any) -> Any:
    """
    Features in Parquet as a data set of `datasets`, whose rows have arrays.

    Args:
        folder: that `spar-hf features --output DIR.parquet` or Ray wrote.
        options: of `datasets.load_dataset`, such as `columns` or `streaming`.

    Returns:
        A `datasets.Dataset`, transformed by [`~spar_hf.batch.arrays.as_arrays`].

    Raises:
        UsageError: datasets is not installed, or there is no file.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError("Reading features as a data set needs datasets: pip install datasets.") from error
    from spar_hf.batch.arrays import as_arrays

    files = f"{os.fspath(folder).rstrip('/')}/*{SUFFIX}"
    found = datasets.load_dataset("parquet", data_files=files, split="train", **options)
    return found.map(as_arrays, batched=True) if options.get("streaming") else found.with_transform(as_arrays)
