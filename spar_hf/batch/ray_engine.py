"""
`spar-hf features --engine ray`: Ray Data reads and decodes images on all CPUs of a cluster, a pool of actors computes,
Parquet files are written.

Rows are numbered as in [`ParquetFolder`], and the numbers in the files that are there say what is left to do: a run whose
driver was killed is continued by the same command with `--skip-existing`. A killed worker's rows are computed again by
another one, under the same file names.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from spar_hf.batch.callables import SparFeatures
from spar_hf.batch.columns import Columns, as_column, image_of_cell
from spar_hf.batch.extractor import ImagePreparation, PreparedImage
from spar_hf.batch.parquet_files import ParquetFolder, feature_schema
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, RunSummary, stamp
from spar_hf.utils.texts import storable

OWN = ("id", "image", "source", "stamp")  # columns of a row that are not of [`SparFeatures`]
PREPARED = ("pixel_values", "pixel_shape", "original_size", "working_size", "error")


def import_ray() -> tuple[Any, Any]:
    """
    `ray` and `ray.data`.

    Raises:
        UsageError: Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install 'spar-hf[ray]'.") from error
    return ray, ray.data


def prepare_batch(batch: Mapping[str, Any], prepare: ImagePreparation, max_pixels: int | None) -> Columns:
    """
    Read, decode and resize images: the stage on CPUs.

    Args:
        batch: with the column `source`: paths or URLs, as bytes of file names.
        prepare: reads one.
        max_pixels: Pillow's limit on the pixels of an image; `None` for no limit.

    Returns:
        The columns of `batch`, the pixels of each image as bytes of float32 with their shape, its sizes and `error`.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels  # here, since Ray's processes inherit nothing
    rows: list[list[Any]] = []
    for source in map(os.fsdecode, batch["source"]):
        try:
            image = prepare(image_of_cell(source))
        except Exception as error:  # each decoder raises its own kind
            rows.append([b"", [0] * 4, [0, 0], [0, 0], str(error) or type(error).__name__])
        else:
            sizes = [image.record[name] for name in ("original_size", "working_size")]
            rows.append([image.pixel_values.numpy().tobytes(), list(image.pixel_values.shape), *sizes, ""])
    return {**batch, **{name: as_column([row[i] for row in rows]) for i, name in enumerate(PREPARED)}}


class PreparedFeatures:
    """
    [`SparFeatures`] of images that [`prepare_batch`] has read: the stage of actors, each of which loads the model once.

    Args:
        options: of [`SparFeatures`].
        schema: of the files, so that every block has the same types.
    """

    def __init__(self, options: Mapping[str, Any], schema: Any):
        self.features, self.schema = SparFeatures(**options), schema
        self.features.start()

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        prepared: list[PreparedImage | str] = []
        for i, error in enumerate(batch["error"]):
            if error:
                prepared.append(str(error))
                continue
            shape = [int(side) for side in batch["pixel_shape"][i]]
            pixels = torch.from_numpy(np.frombuffer(batch["pixel_values"][i], np.float32).copy()).view(shape)
            sizes = {name: [int(side) for side in batch[name][i]] for name in ("original_size", "working_size")}
            prepared.append(PreparedImage(pixels, {"image": os.fsdecode(batch["source"][i]), **sizes}))
        rows = self.features.rows_of(prepared)
        for i, row in enumerate(rows):
            row |= {name: batch[name][i] for name in OWN}
            row["source"] = storable(os.fsdecode(row["source"]))
            row["id"] = int(row["id"])
        import pyarrow

        return pyarrow.Table.from_pylist(rows, schema=self.schema)


def run_on_ray(
    folder: ParquetFolder,
    images: Sequence[InputImage],
    features: SparFeatures,
    numbers: Sequence[int],
    address: str | None = None,
    actors: int | None = None,
) -> RunSummary:
    """
    Compute what is missing in a folder.

    Args:
        folder: that [`ParquetFolder.begin`] was called on, on a disk that all machines see, or in a store.
        images: all images of the folder.
        features: with its model loaded, for the settings.
        numbers: of the images to compute, if they are not there.
        address: of a Ray cluster; `auto` is that of this machine. Default: Ray is started here and stopped at the end.
        actors: models at the same time at most. Default: one per GPU, else one less than there are CPUs.

    Returns:
        [`RunSummary`]; `failed` are the images of rows with an error, also of an earlier run.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """
    ray, ray_data = import_ray()
    start = time.perf_counter()
    drop_unreadable(folder)
    present = folder.present()
    todo = [number for number in numbers if not present[number]]
    summary = RunSummary(skipped=len(numbers) - len(todo))
    if todo:
        started = not ray.is_initialized()
        if started:
            connect(ray, address)
        try:
            compute(ray, ray_data, folder, images, features, todo, actors)
        finally:
            if started:
                ray.shutdown()
    wanted, own = set(todo), set(numbers)
    for name in folder.files():
        numbers_there, failed = folder.check(name)
        found = own & set(numbers_there)
        if not found:  # of another job
            continue
        if found <= wanted:
            summary.done += len(found) - len(failed)
            summary.failed += failed
        else:  # of an earlier run; what failed then is not tried again
            summary.skipped -= len(failed)
            hint = f"(in an earlier run; remove {folder.retry_name(name)} to try it again)"
            summary.failed += [(source, f"{reason} {hint}") for source, reason in failed]
    summary.seconds = time.perf_counter() - start
    return summary


def connect(ray: Any, address: str | None) -> None:
    """Start Ray here, or connect to a cluster."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        raise UsageError(f"--address {address}: {error}") from error


def compute(
    ray: Any,
    ray_data: Any,
    folder: ParquetFolder,
    images: Sequence[InputImage],
    features: SparFeatures,
    todo: Sequence[int],
    actors: int | None,
) -> None:
    """Run the stages and wait for them."""
    import pyarrow

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    most = actors or gpus or max(1, int(resources.get("CPU", 1)) - 1)  # a CPU is left to decode
    schema = feature_schema(features, features.settings)
    context = ray_data.DataContext.get_current()
    context.enable_progress_bars = False
    table = pyarrow.table(
        {
            "id": pyarrow.array(todo, pyarrow.int64()),
            "image": [storable(images[number].name) for number in todo],
            # bytes, since not every name of a file is UTF-8
            "source": pyarrow.array([os.fsencode(images[number].source) for number in todo], pyarrow.binary()),
            "stamp": [json.dumps(stamp(images[number])) for number in todo],
        }
    )
    # one block would be one task
    rows = ray_data.from_arrow(table).repartition(-(-len(todo) // folder.manifest["shard_images"]))
    # without other resources than those of the actors, Ray would make one stage of both
    given = {"prepare": features.loaded.prepare, "max_pixels": Image.MAX_IMAGE_PIXELS}
    reading: dict[str, Any] = {"fn_kwargs": given, "num_cpus": 1, "memory": 2**28}
    rows = rows.map_batches(prepare_batch, batch_size=8, **reading)
    rows = rows.map_batches(
        PreparedFeatures,
        batch_size=features.batch_size,  # small: maps are large, and blocks have 128 MiB
        fn_constructor_kwargs={"options": {**features.options, "batch_size": features.batch_size}, "schema": schema},
        compute=ray_data.ActorPoolStrategy(min_size=1, max_size=most),
        num_cpus=None if gpus else 1,
        num_gpus=1 if gpus else None,
    )
    where = {"path": folder.root, "filesystem": folder.store} if folder.is_remote else {"path": folder.root}
    rows.write_parquet(**where, compression="zstd", write_page_checksum=True)


def drop_unreadable(folder: ParquetFolder) -> None:
    """Remove files that a killed driver left half written: their numbers are computed again."""
    for name in folder.files():
        if not folder.is_readable(name):
            with contextlib.suppress(FileNotFoundError):
                folder.delete(name)
