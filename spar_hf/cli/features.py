"""`spar-hf features`: dense features of images as safetensors, Parquet or WebDataset shards."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spar_hf.cli.arguments import (
    BatchSize,
    Device,
    ImageRange,
    Images,
    MaxPixels,
    MaxTokens,
    Shard,
    ShardRange,
    ShortestEdge,
    SkipExisting,
    Workers,
    as_command,
)
from spar_hf.cli.parts import PARQUET, TAR, check_store, open_parts, part_suffix
from spar_hf.cli.reporting import exit_on_error, finish, quiet_transformers, report_failure, say
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, RunSummary, find_images, interruptible, process_images
from spar_hf.utils.locks import one_writer
from spar_hf.utils.options import HELP
from spar_hf.utils.processes import Processes, launched_processes
from spar_hf.utils.remote_files import is_remote
from spar_hf.utils.shards import ShardChoice

if TYPE_CHECKING:
    from spar_hf.batch.callables import SparFeatures
    from spar_hf.batch.parquet_files import ParquetFolder


@dataclass(kw_only=True)
class FeatureOptions:
    """
    What the command line of `spar-hf features` says, in the order of `--help`.

    Attributes:
        job: the shards of this job.

    Raises:
        UsageError: options that do not go together.
    """

    images: Images
    output: Annotated[
        str,
        typer.Option(
            help="Folder to write, with the sub-folders of the input; or a folder of files with many images each: "
            "DIR.parquet, or DIR.tar for WebDataset shards, also in a store: s3://bucket/DIR.parquet."
        ),
    ]
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a SPAR model or of a pretrained backbone of transformers. Default: the embedded "
            "spar-tiny."
        ),
    ] = None
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale the feature of every patch to unit length.")] = (
        False
    )
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float32"
    shortest_edge: ShortestEdge = None
    stride: Annotated[int | None, typer.Option(help=HELP["stride"], min=1)] = None
    window_size: Annotated[int | None, typer.Option(help=HELP["window_size"], min=1)] = None
    layers: Annotated[
        str,
        typer.Option(
            help="What to write of each image: features (what the model gives) and numbers of blocks, whose patch tokens "
            "are written as layer_3, …: 3,6,9,features. Blocks count from 1; 0 are the embeddings."
        ),
    ] = "features"
    pool: Annotated[
        str | None,
        typer.Option(
            help="One vector per image in place of a map: mean (of all patches) or head (the image embedding of the "
            "backbone)."
        ),
    ] = None
    shard_size: Annotated[
        float | None,
        typer.Option(help="Write shards of about this many MB and an index instead of a file per image.", min=0.001),
    ] = None
    shard_images: Annotated[int, typer.Option(help="Images in a file of DIR.parquet or DIR.tar.", min=1)] = 100
    shard: Shard = None
    shard_range: ShardRange = None
    skip_existing: SkipExisting = False
    engine: Annotated[
        str,
        typer.Option(help="local, or ray: Ray Data on one machine or a cluster (extra ray), to DIR.parquet."),
    ] = "local"
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster; auto for that of this machine. Default: Ray is started for this run."
        ),
    ] = None
    device: Device = None
    workers: Workers = None
    batch_size: BatchSize = 8
    max_tokens: MaxTokens = None
    image_range: ImageRange = None
    max_pixels: MaxPixels = None
    job: ShardChoice = field(init=False)

    def __post_init__(self):
        self.job = ShardChoice(self.shard, self.shard_range)
        self.skip_existing = self.skip_existing or self.job.is_part
        if self.engine not in ("local", "ray"):
            raise UsageError(f"--engine {self.engine!r} must be local or ray.")
        if self.engine == "ray" and part_suffix(self.output) != PARQUET:
            raise UsageError(f"--engine ray writes Parquet: --output {self.output.rstrip('/')}{PARQUET}.")
        if self.engine == "local" and self.address is not None:
            raise UsageError("--address is that of a Ray cluster: add --engine ray.")
        if self.engine == "ray" and (self.device is not None or self.workers is not None):
            raise UsageError(
                "--device and --workers are not for --engine ray, which uses all GPUs and CPUs: omit them."
            )
        if self.to_parts and self.shard_size is not None:
            raise UsageError("--shard-size is for safetensors; the size of files with many images is --shard-images.")
        if not self.to_parts and self.shard_images != type(self).shard_images:
            raise UsageError(f"--shard-images is for --output DIR{PARQUET} and DIR{TAR}, files with many images each.")
        check_store(self.output, f"features{PARQUET}")
        if not is_remote(self.output) and self.folder.is_file():
            raise UsageError(f"--output {self.output} is a file; features need a folder.")

    @property
    def to_parts(self) -> bool:
        """Whether the output is a folder of files with many images each."""
        return part_suffix(self.output) is not None

    @property
    def folder(self) -> Path:
        """The output as a local folder."""
        return Path(self.output)

    def of_extractor(self, device: str | None) -> dict[str, Any]:
        """What [`FeatureExtractor`] takes."""
        from spar_hf.model.image_input import check_range

        names = (
            "model",
            "normalize",
            "dtype",
            "shortest_edge",
            "stride",
            "window_size",
            "layers",
            "pool",
            "max_tokens",
        )
        given = {name: getattr(self, name) for name in names}
        return {**given, "image_range": check_range(self.image_range), "device": self.device or device}


@as_command(FeatureOptions)
def features(options: FeatureOptions) -> None:
    """
    Write the dense features of images. Exit status: 0 success, 1 something failed, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM;
    what was computed until then is written.

    Several processes share the images, each taking the next ones that nobody has taken: accelerate launch -m
    spar_hf.cli.main features …
    """
    with exit_on_error(failure=()):
        found, problems = find_images(options.images, exclude=options.output)
    if not found or not (options.to_parts or options.job.pick(found)):  # nothing to load a model for
        finish(process_images((), lambda image: None, report=report_failure, problems=problems), "0 done")

    from spar_hf.model.image_input import set_pixel_limit

    set_pixel_limit(options.max_pixels)
    quiet_transformers()
    with launched_processes() as processes, ExitStack() as held:
        run = write_parts if options.to_parts else write_safetensors
        summary = run(options, found, problems if processes.index == 0 else (), processes, held)
    if summary.only_first:
        say(
            f"note: {summary.only_first} has several frames or pages; features are of the first. Save the others as files "
            "of their own to have theirs.",
            err=True,
        )
    several = processes.count > 1
    finish(summary, f"process {processes.index + 1} of {processes.count}: {summary}" if several else str(summary))


def write_safetensors(
    options: FeatureOptions,
    found: Sequence[InputImage],
    problems: Sequence[tuple[str, str]],
    processes: Processes,
    held: ExitStack,
) -> RunSummary:
    """Write files of safetensors, one per image or shards with an index. `held` gets the lock of the folder."""
    from spar_hf.batch.ahead import process_ahead
    from spar_hf.batch.extractor import FeatureExtractor
    from spar_hf.batch.features import feature_work, open_writer

    with exit_on_error():
        extract = FeatureExtractor(**options.of_extractor(processes.device))
        job, process = options.job.name, processes.index
        if options.shard_size is not None:  # two that give their shards the same number would replace them
            job, process = f"features-{options.job.number * processes.count + process:03d}", 0
        held.enter_context(one_writer(options.folder, extract.settings, job, process))
        processes.wait()  # no process writes before all have their lock
    with exit_on_error(failure=()):
        how = (options.shard_size, options.skip_existing, processes, options.job.number)
        writer = open_writer(options.folder, extract.settings, *how)
        images = options.job.pick(found)
        # other settings are refused before anything is written, by the process that sees them
        done = {image for image in processes.share(images) if options.skip_existing and writer.is_done(image)}
    with exit_on_error(usage=(), failure=OSError), interruptible():
        summary = process_ahead(
            images,
            feature_work(extract, writer),
            lambda image: image in done or (processes.count > 1 and options.skip_existing and writer.is_done(image)),
            report_failure,
            problems,
            workers=options.workers,
            batch_size=options.batch_size,
            processes=processes,
        )
        writer.close()
        if summary.interrupted:  # the other processes may go on, or end at any time: nobody waits for them
            writer.write_index()
        else:
            processes.wait()
            if processes.index == 0:
                writer.write_index()
            processes.wait()  # a process that exits with status 1 makes the launcher stop the others
    return summary


def write_on_ray(
    options: FeatureOptions,
    found: Sequence[InputImage],
    problems: Sequence[tuple[str, str]],
    folder: "ParquetFolder",
    features: "SparFeatures",
) -> RunSummary:
    """Let Ray Data write the files of this job. `problems` are arguments that are no images."""
    from spar_hf.batch.ray_engine import run_on_ray

    numbers = [i for number in options.job.pick(range(folder.count)) for i in folder.images_of(number)]
    features.batch_size = options.batch_size
    summary = run_on_ray(folder, found, features, numbers, options.address)
    failed, summary.failed = [*problems, *summary.failed], []
    for source, reason in failed:
        summary.add_failure(source, reason, report_failure)
    return summary


def write_parts(
    options: FeatureOptions,
    found: Sequence[InputImage],
    problems: Sequence[tuple[str, str]],
    processes: Processes,
    held: ExitStack,
) -> RunSummary:
    """
    Write files of `--shard-images` images each: Parquet or WebDataset shards. `held` gets the lock of the folder; the folder
    itself states its settings.
    """
    from spar_hf.batch.ahead import process_ahead
    from spar_hf.batch.parquet_files import ParquetFolder, parquet_writer
    from spar_hf.batch.part_files import open_features_for, part_work
    from spar_hf.batch.tar_files import TarFolder, check_dtype, tar_features

    with exit_on_error():
        where = None if is_remote(options.output) else options.folder
        held.enter_context(one_writer(where, {}, options.job.name, processes.index))
        folder = open_parts(options.output)
        if isinstance(folder, TarFolder):
            check_dtype(options.dtype)
        processes.wait()  # all have seen what is there before one writes
        given = (options.shard_images, options.skip_existing, options.of_extractor(processes.device))
        features = open_features_for(folder, found, *given)
        if options.engine == "ray":
            assert isinstance(folder, ParquetFolder)
            return write_on_ray(options, found, problems, folder, features)
        if isinstance(folder, TarFolder):
            writer = tar_features(folder, features, found)
        else:
            assert isinstance(folder, ParquetFolder)
            writer = parquet_writer(folder, features, found)
        units = [folder.images_of(number) for number in options.job.pick(range(folder.count))]
    with exit_on_error(usage=(), failure=OSError), interruptible():
        try:
            summary = process_ahead(
                found,
                part_work(features, writer),
                writer.is_done,
                report_failure,
                problems,
                workers=options.workers,
                batch_size=options.batch_size,
                units=units,
                processes=processes,
            )
        finally:
            writer.close()
        writer.count_earlier_failures(summary, report_failure)
        if not summary.interrupted:
            processes.wait()
    return summary
