"""
Features or masks in WebDataset shards: a folder of tar files with a fixed number of images each, see
`spar_hf.batch.part_files`.

An image is the files `KEY.npy`, `KEY.json`, …, which readers put together by their key. `datasets.load_dataset("webdataset",
…)`, webdataset and `tarfile` read the shards. Beside each lies a record with its checksum and the images that failed, which
are in no shard.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from spar_hf.batch.arrays import read_array
from spar_hf.batch.callables import SparFeatures
from spar_hf.batch.part_files import OpenPart, PartFolder, PartWriter
from spar_hf.model.file_modes import follow_umask
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage
from spar_hf.utils.texts import json_text

SUFFIX = ".tar"
RECORD = ".json"  # beside each shard

Members = Callable[[Mapping[str, Any]], Mapping[str, bytes]]  # of a row: contents by ending


def sample_key(name: str) -> str:
    """
    The key of an image: its name with escapes for dots, which end a key in WebDataset, and for backslashes. Sub-folders
    stay. No two names have the same key.

    Example:

    ```python
    >>> sample_key("2024.05/street"), sample_key("street.v2"), sample_key("100%")
    ('2024%2E05/street', 'street%2Ev2', '100%25')
    ```"""
    for letter in "%.\\":  # the percent sign first
        name = name.replace(letter, f"%{ord(letter):02X}")
    return name


def failures(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and error of each image that a record lists as failed."""
    return [(one["image"], one["error"]) for one in record["failed"]]


class TarFolder(PartFolder):
    """A folder of WebDataset shards, with a record beside each, which is written last."""

    suffix = SUFFIX
    kind = "WebDataset shards"

    def record_name(self, name: str) -> str:
        """Name of the record of a shard."""
        return f"{name}{RECORD}"

    def record(self, name: str) -> dict[str, Any] | None:
        """
        The record of a shard: `bytes` and `sha256` of it, number of `images`, and `failed`, name and error of those that are
        not in it. `None` if it is not there or no record.
        """
        try:
            found = json.loads(self.read(self.record_name(name)))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and {"bytes", "sha256", "images", "failed"} <= found.keys() else None

    def files(self) -> list[str]:
        """Names of the shards that are there, or of which a record is."""
        found = {name.removesuffix(RECORD) for name in self.names() if name.startswith("part-")}
        return sorted(name for name in found if name.endswith(SUFFIX))

    def finished(self, number: int) -> list[tuple[str, str]] | None:
        record = self.record(self.file(number))
        if record is None or record["images"] != len(self.images_of(number)):
            return None
        return failures(record) if record["bytes"] == (self.size(self.file(number)) or 0) else None

    def check(self, name: str) -> tuple[list[int], list[tuple[str, str]]]:
        record = self.record(name)
        if record is None:
            raise ValueError("it has no record: its run was stopped.")
        if record["bytes"]:
            if self.size(name) is None:
                raise ValueError("it is gone; its record is there.")
            with self.open(name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                    raise ValueError("its checksum is not the one in its record.")
        number = int(name.removesuffix(SUFFIX).removeprefix("part-"))
        return list(self.images_of(number)), failures(record)

    def retry_name(self, name: str) -> str:
        return self.record_name(name)

    def delete(self, name: str) -> None:
        """Remove a shard and its record."""
        super().delete(self.record_name(name))
        super().delete(name)

    def finish(self, part: OpenPart, number: int) -> None:
        assert isinstance(part, OpenTar)
        name, path = self.file(number), part.complete()
        size = path.stat().st_size if part.samples else 0  # readers refuse shards without a sample
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        record = {"bytes": size, "sha256": digest, "images": part.rows, "failed": part.failed}
        self.delete(name)
        if part.samples:
            self.put(path, name)
        self.write(self.record_name(name), json_text(record, indent=1).encode())


class OpenTar(OpenPart):
    """A shard that is being written. Images that failed are listed, and not in it."""

    suffix = SUFFIX

    def __init__(self, beside: Path | None, members: Members):
        super().__init__(beside)
        self.members, self.samples = members, 0
        self.failed: list[dict[str, str]] = []
        self.tar = tarfile.TarFile(self.path, "w")

    def add(self, row: dict[str, Any]) -> None:
        if row["error"]:
            self.failed.append({"image": row["image"], "error": row["error"]})
            return
        self.samples += 1
        for ending, data in self.members(row).items():
            entry = tarfile.TarInfo(f"{sample_key(row['image'])}.{ending}")
            entry.size = len(data)
            self.tar.addfile(entry, BytesIO(data))

    def complete(self) -> Path:
        self.close()
        follow_umask(self.path)
        return self.path

    def close(self) -> None:
        self.tar.close()


def feature_members(row: Mapping[str, Any], names: Mapping[str, tuple[str, str]]) -> dict[str, bytes]:
    """
    The files of an image's features: `npy`, or `layer_3.npy` of a block, and `json` with everything else.

    Args:
        row: of [`SparFeatures`].
        names: see [`SparFeatures.names`].
    """
    files: dict[str, bytes] = {}
    others = {name: value for name, value in row.items() if name != "error"}
    for values, shape in names.values():
        buffer = BytesIO()
        np.save(buffer, read_array(row, values), allow_pickle=False)
        files["npy" if values == "features" else f"{values}.npy"] = buffer.getvalue()
        del others[values], others[shape]
    return {**files, "json": json_text(others).encode()}


def tar_features(folder: TarFolder, features: SparFeatures, images: Sequence[InputImage]) -> PartWriter:
    """
    Writes the rows of a callable whose model is loaded.

    Raises:
        UsageError: bfloat16, which NumPy has not.
    """
    check_dtype(features.options["dtype"])
    members = partial(feature_members, names=features.names)
    return PartWriter(folder, partial(OpenTar, members=members), images)


def check_dtype(dtype: str) -> None:
    """
    Raises:
        UsageError: bfloat16.
    """
    if dtype == "bfloat16":
        raise UsageError(
            "WebDataset shards hold arrays of NumPy, which has no bfloat16: use --dtype float16 or float32."
        )


def tar_masks(folder: TarFolder, images: Sequence[InputImage]) -> PartWriter:
    """Writes rows whose `members` are the files of an image by ending."""
    return PartWriter(folder, partial(OpenTar, members=lambda row: row["members"]), images)
