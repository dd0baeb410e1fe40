"""`spar-hf features`: dense features of images as safetensors."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spar_hf.cli.arguments import Device, ImageRange, Images, MaxPixels, MaxTokens, ShortestEdge, SkipExisting
from spar_hf.cli.reporting import exit_on_error, fail, finish, quiet_transformers, report_failure
from spar_hf.utils.image_files import find_images, interruptible, process_images
from spar_hf.utils.options import HELP

Output = Annotated[Path, typer.Option(help="Folder to write, with the sub-folders of the input.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of a SPAR model or of a pretrained backbone of transformers. Default: the embedded spar-tiny."
    ),
]
Normalize = Annotated[bool, typer.Option("--normalize", help="Scale the feature of every patch to unit length.")]
Dtype = Annotated[str, typer.Option(help="float16, bfloat16 or float32.")]
Stride = Annotated[int | None, typer.Option(help=HELP["stride"], min=1)]
WindowSize = Annotated[int | None, typer.Option(help=HELP["window_size"], min=1)]
ShardSize = Annotated[
    float | None,
    typer.Option(help="Write shards of about this many MB and an index instead of a file per image.", min=0.001),
]


def features(
    images: Images,
    output: Output,
    model: Model = None,
    normalize: Normalize = False,
    dtype: Dtype = "float32",
    shortest_edge: ShortestEdge = None,
    stride: Stride = None,
    window_size: WindowSize = None,
    shard_size: ShardSize = None,
    skip_existing: SkipExisting = False,
    device: Device = None,
    max_tokens: MaxTokens = None,
    image_range: ImageRange = None,
    max_pixels: MaxPixels = None,
) -> None:
    """
    Write the dense features of images as safetensors. Exit status: 0 success, 1 something failed, 2 wrong usage, 130 Ctrl-C,
    143 SIGTERM; what was computed until then is written.

    Several processes share the images: accelerate launch -m spar_hf.cli.main features …
    """
    if output.is_file():
        fail(f"--output {output} is a file; features need a folder.", 2)
    with exit_on_error(failure=()):
        found, problems = find_images(images, exclude=output)
    if not found:  # nothing to load a model for
        finish(process_images((), lambda image: None, report=report_failure, problems=problems))

    from spar_hf.batch.features import FeatureExtractor, launched_processes, open_writer
    from spar_hf.model.image_input import check_range, set_pixel_limit

    set_pixel_limit(max_pixels)

    quiet_transformers()
    with launched_processes() as processes:
        first = processes.index == 0
        with exit_on_error():
            device = device or processes.device
            limits: dict[str, Any] = {"max_tokens": max_tokens, "image_range": check_range(image_range)}
            extract = FeatureExtractor(model, shortest_edge, normalize, dtype, stride, window_size, device, **limits)
        with exit_on_error(failure=()):
            writer = open_writer(output, extract.settings, shard_size, skip_existing, processes)
            share = processes.share(found)
            done = {image for image in share if skip_existing and writer.is_done(image)}
        with exit_on_error(usage=(), failure=OSError), interruptible():
            summary = process_images(
                share,
                lambda image: writer.add(image, *extract(image.source)),
                done.__contains__,
                report_failure,
                problems if first else (),
                progress_bar=first,
            )
            writer.close()
            if summary.interrupted:  # the other processes may go on, or end at any time: nobody waits for them
                writer.write_index()
            else:
                processes.wait()
                if first:
                    writer.write_index()
                processes.wait()  # a process that exits with status 1 makes the launcher stop the others
    several = processes.count > 1
    finish(summary, f"process {processes.index + 1} of {processes.count}: {summary}" if several else str(summary))
