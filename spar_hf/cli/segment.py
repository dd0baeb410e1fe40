"""`spar-hf segment`: masks from words."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from spar_hf.cli.arguments import Device, Images, Labels, Model, ShortestEdge, SkipExisting, Templates
from spar_hf.cli.reporting import exit_on_error, finish, report_failure
from spar_hf.cli.result_paths import ResultPlan, parse_formats, plan_results
from spar_hf.utils.atomic import write_text
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, RunSummary, process_images

SegmentImage = Callable[..., dict[str, Any]]  # image -> the pipeline's `output="map"`

Output = Annotated[
    Path, typer.Option(help="File for one image, or a folder for several, with the sub-folders of the input.")
]
Formats = Annotated[
    str,
    typer.Option(
        "--format",
        help="overlay (masks over the image), map (class numbers as 8- or 16-bit PNG), coco (run-length masks, needs the "
        "extra coco), json (label, score, share and box per class); several separated by commas.",
    ),
]
Background = Annotated[
    str | None,
    typer.Option(
        help="Class for unsure pixels and tiny classes: one of the labels or a new one, or auto: common stuff words."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Pixels whose highest probability is below it become background.", min=0, max=1),
]
MinArea = Annotated[
    float | None,
    typer.Option(help="Classes below this share of the foreground become background.", min=0, max=1),
]
Refine = Annotated[str | None, typer.Option(help="Sharper masks: lposs, lposs+ or pamr (see spar_hf/model/refine.py).")]
MapOutput = Annotated[
    Path | None, typer.Option("--map", help="For one image: also write the class numbers to this PNG.")
]


def segment(
    images: Images,
    labels: Labels,
    output: Output,
    formats: Formats = "overlay",
    model: Model = None,
    templates: Templates = None,
    shortest_edge: ShortestEdge = None,
    background: Background = None,
    threshold: Threshold = None,
    min_area: MinArea = None,
    refine: Refine = None,
    map_output: MapOutput = None,
    skip_existing: SkipExisting = False,
    device: Device = None,
) -> None:
    """Segment images by words. Exit status: 0 success, 1 something failed, 2 wrong usage."""
    from PIL import Image

    from spar_hf.cli.labels import read_labels, single_class_hint
    from spar_hf.cli.result_files import coco_encoder

    with exit_on_error(usage=(ValueError, ImportError, OSError)):
        plan = plan_results(images, output, parse_formats(formats), map_output)
        vocabulary = read_labels(labels)
        if "coco" in plan.formats:
            coco_encoder()
    if not plan.images:  # nothing to load a model for
        finish(process_images((), lambda image: None, report=report_failure, problems=plan.problems))

    given = {
        "size": None if shortest_edge is None else {"shortest_edge": shortest_edge},
        "templates": templates,
        "background": background,
        "threshold": threshold,
        "min_area": min_area,
        "refine": refine,
    }
    options = {name: value for name, value in given.items() if value is not None}
    segment_image = load_segmenter(model, device, vocabulary, options)
    with exit_on_error(failure=()):  # wrong words or options are reported once, not for every image
        class_names = segment_image(Image.new("RGB", (32, 32)))["labels"]
    if len(vocabulary.labels) == 1 and background is None:
        typer.secho(f"note: {single_class_hint(labels)}", err=True)
    with exit_on_error(failure=OSError):
        summary = segment_all(plan, segment_image, class_names, skip_existing)
    finish(summary, str(summary) if plan.several or summary.skipped else None)


def load_segmenter(model: str | None, device: str | None, vocabulary: Any, options: dict[str, Any]) -> SegmentImage:
    """Load the pipeline as a function of an image."""
    from spar_hf.cli.pipelines import load_pipeline, segment_timed

    with exit_on_error():
        return partial(segment_timed, load_pipeline(model, device), candidate_labels=vocabulary, **options)


def segment_all(
    plan: ResultPlan, segment_image: SegmentImage, class_names: list[str], skip_existing: bool
) -> RunSummary:
    """
    Segment all images and write their results; a folder also gets `classes.txt` and, for COCO, `annotations.json`.

    Raises:
        UsageError: a continued run finds results for other classes.
        OSError: the disk is full or read-only.
    """
    from spar_hf.cli.result_files import merge_coco, write_results
    from spar_hf.model.image_input import read_image, to_rgb

    def process(item: InputImage) -> None:
        image = to_rgb(read_image(item.source))
        result = segment_image(image)
        write_results(image, result, plan.paths[item], item.source)
        if not plan.several:
            show_classes(result)
            for path in plan.paths[item].values():
                typer.echo(f"written: {path}")

    def is_done(item: InputImage) -> bool:
        return skip_existing and all(path.is_file() for path in plan.paths[item].values())

    if plan.folder is not None:
        write_class_list(plan.folder / "classes.txt", class_names, skip_existing)
    summary = process_images(plan.images, process, is_done, report_failure, plan.problems)
    if plan.folder is not None and "coco" in plan.formats:
        parts = [paths["coco"] for paths in plan.paths.values() if paths["coco"].is_file()]
        write_text(plan.folder / "annotations.json", json.dumps(merge_coco(parts), ensure_ascii=False) + "\n")
    return summary


def write_class_list(path: Path, names: list[str], skip_existing: bool) -> None:
    """
    Write a class per line: the line number, from 0, is the pixel value in label maps.

    Raises:
        UsageError: with `skip_existing`, the folder contains results for other classes.
    """
    text = "".join(f"{name}\n" for name in names)
    if skip_existing and path.is_file() and path.read_text(encoding="utf-8") != text:
        raise UsageError(
            f"{path.parent} contains results for other classes ({path.name}). Name another --output, or omit "
            "--skip-existing to replace all results."
        )
    write_text(path, text)


def show_classes(result: dict[str, Any]) -> None:
    """Print each class that has pixels with its share of the image and its score, and count the classes without pixels."""
    import numpy as np

    pixels = np.bincount(result["map"].ravel(), minlength=len(result["labels"]))
    for i in pixels.nonzero()[0].tolist():
        share = pixels[i] / result["map"].size
        shown = f"{share:.1%}" if share >= 0.0005 else "<0.1%"
        typer.echo(f"{result['labels'][i]:24} {shown:>7} of the image, score {result['scores'][i]:.2f}")
    if absent := int((pixels == 0).sum()):
        typer.echo(f"{absent} of {len(pixels)} classes not found")
