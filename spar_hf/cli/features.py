"""`spar-hf features`: dense features of images as safetensors."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spar_hf.cli.arguments import Device, ImageRange, Images, MaxPixels, MaxTokens, ShortestEdge, SkipExisting
from spar_hf.cli.reporting import exit_on_error, fail, finish, quiet_transformers, report_failure
from spar_hf.utils.image_files import InputImage, find_images, interruptible, process_images
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
Layers = Annotated[
    str,
    typer.Option(
        help="What to write of each image: features (what the model gives) and numbers of blocks, whose patch tokens are "
        "written as layer_3, …: 3,6,9,features. Blocks count from 1; 0 are the embeddings."
    ),
]
Pool = Annotated[
    str | None,
    typer.Option(
        help="One vector per image in place of a map: mean (of all patches) or head (the image embedding of the backbone)."
    ),
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
    layers: Layers = "features",
    pool: Pool = None,
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

    from spar_hf.batch.extractor import FeatureExtractor
    from spar_hf.batch.features import launched_processes, open_writer
    from spar_hf.model.image_input import check_range, set_pixel_limit

    set_pixel_limit(max_pixels)

    quiet_transformers()
    with launched_processes() as processes:
        first = processes.index == 0
        with exit_on_error():
            device = device or processes.device
            given: dict[str, Any] = {"max_tokens": max_tokens, "image_range": check_range(image_range)}
            given |= {"layers": layers, "pool": pool}
            extract = FeatureExtractor(model, shortest_edge, normalize, dtype, stride, window_size, device, **given)
        with exit_on_error(failure=()):
            writer = open_writer(output, extract.settings, shard_size, skip_existing, processes)
            share = processes.share(found)
            done = {image for image in share if skip_existing and writer.is_done(image)}

        def process(image: InputImage) -> None:
            prepared = extract.prepare(image.source)
            writer.add(image, extract.encode([prepared])[0], prepared.record)

        with exit_on_error(usage=(), failure=OSError), interruptible():
            summary = process_images(
                share,
                process,
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
