"""
Features in Parquet: a folder of files with a fixed number of images each, see `spar_hf.batch.part_files`.

`datasets.load_dataset("parquet", …)` reads the files; see `spar_hf.batch.arrays`.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spar_hf.batch.callables import SparFeatures
from spar_hf.batch.part_files import OpenPart, PartFolder, PartWriter
from spar_hf.model.file_modes import follow_umask
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage

SUFFIX = ".parquet"
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


class ParquetFolder(PartFolder):
    """A folder of Parquet files, each with the numbers of its images as `id`. Ray writes files of other names into it."""

    suffix = SUFFIX
    kind = "features in Parquet"

    def finished(self, number: int) -> list[tuple[str, str]] | None:
        _, pq = import_pyarrow()
        rows: list[dict[str, Any]] | None = None
        # pyarrow's own errors are ValueErrors
        with contextlib.suppress(OSError, ValueError), self.open(self.file(number)) as file:
            parquet = pq.ParquetFile(file)
            if parquet.metadata.num_rows == len(self.images_of(number)):
                rows = []  # also of damaged values, which `verify` finds
                rows = parquet.read(columns=["image", "error"]).to_pylist()
        return None if rows is None else [(row["image"], row["error"]) for row in rows if row["error"]]

    def is_readable(self, name: str) -> bool:
        """Whether a file is there and was not cut: its end is read."""
        _, pq = import_pyarrow()
        try:
            with self.open(name) as file:
                pq.ParquetFile(file)
        except (OSError, ValueError):
            return False
        return True

    def check(self, name: str) -> tuple[list[int], list[tuple[str, str]]]:
        _, pq = import_pyarrow()
        failed: list[tuple[str, str]] = []
        numbers: list[int] = []
        with self.open(name) as file:
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
            with contextlib.suppress(OSError, ValueError), self.open(name) as file:
                found[pq.read_table(file, columns=["id"])["id"].to_numpy()] = True
        return found


class OpenParquet(OpenPart):
    """A Parquet file that is being written, in groups of rows of about 32 MiB, so that memory does not grow with it."""

    suffix = SUFFIX

    def __init__(self, beside: Path | None, schema: Any):
        pa, pq = import_pyarrow()
        super().__init__(beside)
        self.schema, self.size = schema, 0
        self.group: list[dict[str, Any]] = []
        self.make_table = pa.Table.from_pylist
        self.writer = pq.ParquetWriter(self.path, schema, compression="zstd", write_page_checksum=True)

    def add(self, row: dict[str, Any]) -> None:
        """Take a row, and write a group if it is large enough."""
        self.group.append(row)
        self.size += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if self.size >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows in memory as a group."""
        if self.group:
            self.group.sort(key=lambda row: row["id"])
            self.writer.write_table(self.make_table(self.group, schema=self.schema))
            self.group, self.size = [], 0

    def complete(self) -> Path:
        self.flush()
        self.close()
        follow_umask(self.path)
        return self.path

    def close(self) -> None:
        self.writer.close()


def parquet_writer(folder: ParquetFolder, features: SparFeatures, images: Sequence[InputImage]) -> PartWriter:
    """
    Writes the rows of a callable whose model is loaded.

    Raises:
        UsageError: Ray has written files: they hold any images, which would be written a second time.
    """
    if others := [name for name in folder.files() if not re.fullmatch(r"part-\d{5,}\.parquet", name)]:
        raise UsageError(
            f"{folder.url} was made by Ray ({others[0]}): continue with --engine ray, or name another folder."
        )
    schema = feature_schema(features, features.settings)
    return PartWriter(folder, partial(OpenParquet, schema=schema), images)


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
