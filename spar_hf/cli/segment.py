"""`spar-hf segment`: masks from words."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from spar_hf.cli.arguments import (
    Device,
    ImageRange,
    Images,
    Labels,
    MaxPixels,
    MaxTokens,
    Model,
    ShortestEdge,
    SkipExisting,
    Templates,
)
from spar_hf.cli.reporting import exit_on_error, finish, report_failure, say
from spar_hf.cli.result_paths import ResultPlan, parse_formats, plan_results
from spar_hf.cli.result_record import ResultRecord
from spar_hf.utils.atomic import write_text
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, RunSummary, interruptible, process_images
from spar_hf.utils.texts import json_text, read_text

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
    max_tokens: MaxTokens = None,
    image_range: ImageRange = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Segment images by words. Exit status: 0 success, 1 something failed, 2 wrong usage."""
    from PIL import Image

    from spar_hf.cli.labels import read_labels, single_class_hint, unknown_hint
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
        "max_tokens": max_tokens,
        "image_range": image_range,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels
    segment_image, pipe = load_segmenter(model, device, vocabulary, options)
    with exit_on_error(failure=()):  # wrong words or options are reported once, not for every image
        class_names = segment_image(Image.new("RGB", (32, 32)))["labels"]
    if len(vocabulary.labels) == 1 and background is None:
        say(f"note: {single_class_hint(labels)}", err=True)
    from spar_hf.model.prompts import unknown_names

    if unknown := unknown_names(pipe.tokenizer, vocabulary.all_names):
        say(f"note: {unknown_hint(unknown)}", err=True)
    with exit_on_error(failure=OSError), interruptible():
        record = open_record(plan, pipe, vocabulary, given, skip_existing)
        summary = segment_all(plan, segment_image, class_names, skip_existing, record, image_range)
    finish(summary, str(summary) if plan.several or summary.skipped else None)


def load_segmenter(
    model: str | None, device: str | None, vocabulary: Any, options: dict[str, Any]
) -> tuple[SegmentImage, Any]:
    """Load the pipeline: as a function of an image, and itself."""
    from spar_hf.cli.pipelines import load_pipeline, segment_timed

    with exit_on_error():
        pipe = load_pipeline(model, device)
    return partial(segment_timed, pipe, candidate_labels=vocabulary, **options), pipe


def open_record(
    plan: ResultPlan, pipe: Any, vocabulary: Any, options: dict[str, Any], skip_existing: bool
) -> ResultRecord | None:
    """
    The record of settings in the output folder. A single file gets one beside it only with `--skip-existing`, which could
    not tell otherwise how the file was made.
    """
    if plan.folder is None and not skip_existing:
        return None
    folder = next(iter(next(iter(plan.paths.values())).values())).parent if plan.folder is None else plan.folder
    settings = {
        "labels": dict(zip(vocabulary.labels, vocabulary.names, strict=True)),
        **{name: value or None for name, value in options.items()},
        "model": pipeline_fingerprint(pipe),
    }
    return ResultRecord(folder, settings, trust_unknown=plan.folder is not None)


def pipeline_fingerprint(pipe: Any) -> str:
    """20 hexadecimal digits of everything in a pipeline that its masks depend on."""
    from spar_hf.model.fingerprints import text_fingerprint, vision_fingerprint, weights_hash

    model = pipe.model
    parts = [
        vision_fingerprint(model.vision_model),
        text_fingerprint(model, pipe.tokenizer),
        weights_hash(model).hexdigest(),  # also what belongs to neither tower
        pipe.image_processor.to_json_string(),
        str((model.config.templates, model.config.dense_logit_scale)),
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:20]


def segment_all(
    plan: ResultPlan,
    segment_image: SegmentImage,
    class_names: list[str],
    skip_existing: bool,
    record: ResultRecord | None = None,
    image_range: tuple[float, float] | None = None,
) -> RunSummary:
    """
    Segment all images and write their results; a folder also gets `classes.txt` and, for COCO, `annotations.json`.

    Raises:
        UsageError: a continued run finds results for other classes, of other settings or another model.
        OSError: the disk is full or read-only.
    """
    from spar_hf.cli.result_files import merge_coco, write_results
    from spar_hf.model.image_input import read_rgb

    def process(item: InputImage) -> None:
        image = read_rgb(item.source, image_range)
        result = segment_image(image)
        write_results(image, result, plan.paths[item], item.source)
        if record is not None:
            record.add(item, list(plan.paths[item].values()))
        if not plan.several:
            show_classes(result)
            for path in plan.paths[item].values():
                say(f"written: {path}")

    done = set()
    if skip_existing and record is not None:  # other settings are refused before anything is written
        done = {item for item in plan.images if record.is_done(item, list(plan.paths[item].values()))}
        if record.trusted:
            say(
                f"note: {record.trusted} results in {record.folder} are of a version that kept no record of its settings; "
                "they are kept unchecked.",
                err=True,
            )
    if plan.folder is not None:
        if skip_existing:
            check_class_list(plan.folder / "classes.txt", class_names)
        # the line number, from 0, is the pixel value in label maps
        write_text(plan.folder / "classes.txt", "".join(f"{name}\n" for name in class_names))
    summary = process_images(plan.images, process, done.__contains__, report_failure, plan.problems)
    if plan.folder is not None and "coco" in plan.formats:
        parts = [paths["coco"] for paths in plan.paths.values() if paths["coco"].is_file()]
        write_text(plan.folder / "annotations.json", json_text(merge_coco(parts)))
    return summary


def check_class_list(path: Path, names: list[str]) -> None:
    """
    Raises:
        UsageError: the folder contains results for other classes.
    """
    if path.is_file() and read_text(path).split("\n") != [*names, ""]:
        raise UsageError(
            f"{path.parent} contains results for other classes ({path.name}). Name another --output, or omit "
            "--skip-existing to replace all results."
        )


def show_classes(result: dict[str, Any]) -> None:
    """Print each class that has pixels with its share of the image and its score, and count the classes without pixels."""
    import numpy as np

    pixels = np.bincount(result["map"].ravel(), minlength=len(result["labels"]))
    for i in pixels.nonzero()[0].tolist():
        share = pixels[i] / result["map"].size
        shown = f"{share:.1%}" if share >= 0.0005 else "<0.1%"
        say(f"{result['labels'][i]:24} {shown:>7} of the image, score {result['scores'][i]:.2f}")
    if absent := int((pixels == 0).sum()):
        say(f"{absent} of {len(pixels)} classes not found")
