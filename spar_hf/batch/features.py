"""Dense features of many images as safetensors: one file per image, or shards with an index. Used by `spar-hf features`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spar_hf.batch.ahead import Work
from spar_hf.batch.extractor import KEY, ONLY_IF_SET, FeatureExtractor, PreparedImage
from spar_hf.utils.atomic import write_atomically, write_json
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, result_path, stamp
from spar_hf.utils.processes import Processes
from spar_hf.utils.texts import storable

INDEX = "features.safetensors.index.json"
HEADER_BYTES = 50_000_000  # of names and records in a shard: safetensors refuses headers of more than 100 MB
ENTRY_BYTES = 120  # of a tensor in a header, beside its name


@dataclass
class ReadSource:
    """Reads an image of a run; picklable, for worker processes."""

    prepare: Callable[[Any], PreparedImage]

    def __call__(self, image: InputImage) -> PreparedImage:
        return self.prepare(image.source)


def feature_work(extract: FeatureExtractor, writer: "FileWriter | ShardWriter") -> Work:
    """What [`process_ahead`] does to write features as safetensors."""

    def write(image: InputImage, prepared: PreparedImage, tensors: dict[str, torch.Tensor]) -> None:
        writer.add(image, tensors, prepared.record)

    return Work(ReadSource(extract.prepare), extract.encode, write, extract.encoder.config.patch_size)


def as_metadata(values: dict[str, Any]) -> dict[str, str]:
    """Metadata of safetensors, which are strings: strings as they are (names that are no UTF-8 escaped), others as JSON."""
    return {key: storable(value) if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def read_header(file: Path) -> tuple[list[str], dict[str, str]]:
    """
    Names of the tensors in a file, and its metadata.

    Raises:
        UsageError: it cannot be read; a file that was cut cannot.
    """
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys()), opened.metadata() or {}
    except Exception as error:  # the error class of safetensors depends on its version
        raise UsageError(f"{file} is not a safetensors file ({error}). Remove it, or name another folder.") from error


def check_settings(file: Path, settings: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """
    Names of the tensors in an existing file that was written with the same settings, and its metadata.

    Raises:
        UsageError: it was written with other settings, or cannot be read.
    """
    keys, metadata = read_header(file)
    expected = as_metadata(settings)
    for key in dict.fromkeys((*expected, *ONLY_IF_SET)):
        then, now = metadata.get(key), expected.get(key)
        if then != now:
            raise UsageError(
                f"{file} was written with {key}={then}, not {now}. Name another folder, or repeat the options of the "
                "earlier run."
            )
    return keys, metadata


class FileWriter:
    """
    Writes one file per image: `sub/street.safetensors` with the tensor `feature_map`, or those of several layers; settings
    and record are its metadata.

    Args:
        output: folder to write.
        settings: see [`FeatureExtractor.settings`].
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.output, self.settings = output, settings

    def target(self, image: InputImage) -> Path:
        """File of an image."""
        return result_path(self.output, storable(image.name), ".safetensors")  # safetensors opens UTF-8 names only

    def is_done(self, image: InputImage) -> bool:
        """
        Whether the file exists and was made from the same image. Raises `UsageError` if it was written with other settings.
        """
        if not self.target(image).is_file():
            return False
        keys, metadata = check_settings(self.target(image), self.settings)
        now = as_metadata({"stamp": stamp(image)})["stamp"]
        return bool(keys) and metadata.get("stamp", now) == now  # earlier versions kept none

    def add(self, image: InputImage, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Write the features of an image: its tensors by name, see [`FeatureExtractor.encode`]."""
        metadata = as_metadata({**self.settings, **record, "stamp": stamp(image)})
        write_atomically(self.target(image), lambda path: save_file(tensors, path, metadata))

    def close(self) -> None:
        """Nothing to do: every file is complete when it is written."""

    def write_index(self) -> None:
        """Nothing to do: files of single images need no index."""


class ShardWriter:
    """
    Writes shards with one tensor per image, named after the image (`sub/street`); those of blocks have their number behind
    (`sub/street#layer_3`). The metadata are the settings; under `photos`, the records by image name as JSON; and under
    `round`, how many runs wrote to the folder before. An image that was replaced between two runs is in a shard of each: the
    index names the later one.

    Args:
        output: folder to write; shards of an earlier run in it are continued.
        settings: see [`FeatureExtractor.settings`].
        shard_bytes: size from which a shard is written. One with 50 MB of names and records is written too, however small
            its tensors are.
        process: index of this process, part of the names of its shards.

    Raises:
        UsageError: the folder has shards with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any], shard_bytes: int, process: int = 0):
        self.output, self.settings, self.shard_bytes, self.process = output, settings, shard_bytes, process
        self.written: dict[str, Any] = {}  # name of an image -> its stamp, `None` in shards of earlier versions
        self.round = 0
        for _, names, metadata in open_shards(output, settings):
            records = json.loads(metadata.get("photos", "{}")) or {name: {} for name in names}
            self.written |= {name: record.get("stamp") for name, record in records.items()}
            self.round = 1 + int(metadata.get("round", 0))
        mine = [shard.stem for shard in list_shards(output) if shard.stem.startswith(f"features-{process:03d}-")]
        self.number = 1 + max((int(stem.rpartition("-")[2]) for stem in mine), default=-1)
        self.tensors: dict[str, torch.Tensor] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.tensor_bytes = self.header_bytes = 0  # of those

    def is_done(self, image: InputImage) -> bool:
        """Whether a shard of an earlier run contains the same image."""
        name = storable(image.name)
        return name in self.written and self.written[name] in (None, stamp(image))

    def add(self, image: InputImage, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Keep the features of an image, and write a shard if they are large enough together."""
        name = storable(image.name)
        own = {name if key == KEY else f"{name}#{key}": tensor for key, tensor in tensors.items()}
        self.tensors |= own
        self.records[name] = {**record, "stamp": stamp(image)}
        self.tensor_bytes += sum(tensor.nbytes for tensor in own.values())
        self.header_bytes += sum(ENTRY_BYTES + len(json.dumps(key)) for key in own)
        # the records are JSON within a string of JSON, whose quotes are escaped
        self.header_bytes += len(json.dumps(json.dumps({name: self.records[name]})))
        if self.tensor_bytes >= self.shard_bytes or self.header_bytes >= HEADER_BYTES:
            self.close()

    def close(self) -> None:
        """Write the features that are still in memory."""
        if not self.tensors:
            return
        metadata = as_metadata({**self.settings, "photos": self.records, "round": self.round})
        tensors = self.tensors
        target = self.output / f"features-{self.process:03d}-{self.number:05d}.safetensors"
        write_atomically(target, lambda path: save_file(tensors, path, metadata))
        self.number += 1
        self.tensors, self.records = {}, {}
        self.tensor_bytes = self.header_bytes = 0

    def write_index(self) -> None:
        """Write the index of the shards of all processes, in the format of transformers: `weight_map` from image to file."""
        weight_map, size = {}, 0
        for shard, names, _ in open_shards(self.output, self.settings):
            size += shard.stat().st_size
            weight_map.update(dict.fromkeys(names, shard.name))
        index = {"metadata": {**self.settings, "total_size": size}, "weight_map": weight_map}
        write_json(self.output / INDEX, index)


def list_shards(output: Path) -> list[Path]:
    """The shards in a folder, of all processes."""
    return sorted(output.glob("features-[0-9]*-[0-9]*.safetensors"))


def open_shards(output: Path, settings: dict[str, Any]) -> list[tuple[Path, list[str], dict[str, str]]]:
    """The shards with names of tensors and metadata, in the order of the runs that wrote them; see [`check_settings`]."""
    shards = [(shard, *check_settings(shard, settings)) for shard in list_shards(output)]
    return sorted(shards, key=lambda shard: int(shard[2].get("round", 0)))


def open_writer(
    output: Path,
    settings: dict[str, Any],
    shard_size: float | None,
    skip_existing: bool,
    processes: Processes,
    job: int = 0,
) -> FileWriter | ShardWriter:
    """
    The writer of a run.

    Args:
        output: folder to write.
        settings: see [`FeatureExtractor.settings`].
        shard_size: size of a shard in MB; `None` for a file per image.
        skip_existing: whether to continue the shards of an earlier run.
        processes: the processes of the run, each of which calls this.
        job: number of this job in an array, whose jobs write to the folder at the same time.

    Raises:
        UsageError: the folder has shards, with other settings or without `skip_existing`.
    """
    if shard_size is None:
        return FileWriter(output, settings)
    if list_shards(output) and not skip_existing:
        raise UsageError(
            f"{output} has shards of an earlier run. Use --skip-existing to continue it, or name another folder."
        )
    processes.wait()  # no process writes before all have checked
    return ShardWriter(output, settings, int(shard_size * 1e6), job * processes.count + processes.index)
