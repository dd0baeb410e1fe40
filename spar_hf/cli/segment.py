"""`spar-hf segment`: masks from words."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from spar_hf.cli.huge import check_strip_options, parse_tile, segment_to_map, writes_strips
from spar_hf.cli.reporting import exit_on_error, finish, report_failure, say
from spar_hf.cli.result_paths import ResultPlan, parse_formats, plan_results
from spar_hf.cli.result_record import ResultRecord
from spar_hf.utils.atomic import write_text
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, RunSummary, interruptible, process_images
from spar_hf.utils.options import HELP
from spar_hf.utils.texts import json_text, read_text

if TYPE_CHECKING:
    from spar_hf.cli.frames import ImageReader

SegmentImage = Callable[..., dict[str, Any]]  # image -> the pipeline's `output="map"`

Output = Annotated[
    Path, typer.Option(help="File for one image, or a folder for several, with the sub-folders of the input.")
]
Formats = Annotated[
    str,
    typer.Option(
        "--format",
        help="overlay (masks over the image), map (class numbers as PNG: 8-bit palette indices, 16 bits above 256 classes; "
        "read it with Pillow), coco (run-length masks, needs the extra coco), json (label, score, share and box per class), "
        "heatmap (probability, a picture per class found); several separated by commas.",
    ),
]
Background = Annotated[
    str,
    typer.Option(
        help="What surrounds the classes, not painted: auto (common stuff words), none (every pixel gets a class), or one "
        "of the labels or a new one for unsure pixels and tiny classes."
    ),
]
KeepBackground = Annotated[
    bool, typer.Option("--keep-background", help="List the background in COCO and JSON files like a class.")
]
Threshold = Annotated[float | None, typer.Option(help=HELP["threshold"], min=0, max=1)]
MinArea = Annotated[
    float | None,
    typer.Option(help="Classes below this share of the foreground become background.", min=0, max=1),
]
Presence = Annotated[
    bool, typer.Option("--presence", help="Also report for each class how likely the image shows it at all.")
]
MinPresence = Annotated[
    float | None, typer.Option(help="Leave out classes with a lower presence (see --presence).", min=0, max=1)
]
HeatMap = Annotated[
    list[str] | None, typer.Option("--heatmap", help="Draw the probability of this class; may be repeated.")
]
Frames = Annotated[
    str | None,
    typer.Option(
        help="Frames of GIF, APNG and WebP, pages of TIFF: 3, 0:10:2 (as in Python) or all. Default: the first one of each "
        "file."
    ),
]
Refine = Annotated[str | None, typer.Option(help="Sharper masks: lposs, lposs+ or pamr (see spar_hf/model/refine.py).")]
MapOutput = Annotated[
    Path | None, typer.Option("--map", help="For one image: also write the class numbers to this PNG.")
]
Tile = Annotated[
    int | None,
    typer.Option(
        help="For large images: side in pixels of tiles that are one pass each, at the size of the image, with blended "
        "features. With --output FILE.tif or .npy, TIFF images (extra huge) of any size are read and label maps written "
        "tile by tile."
    ),
]
TileOverlap = Annotated[
    int | None, typer.Option(help="Overlap of neighbouring tiles in pixels. Default: a sixth of a tile.", min=0)
]


def segment(
    images: Images,
    labels: Labels,
    output: Output,
    formats: Formats = "overlay",
    model: Model = None,
    templates: Templates = None,
    shortest_edge: ShortestEdge = None,
    background: Background = "auto",
    keep_background: KeepBackground = False,
    threshold: Threshold = None,
    min_area: MinArea = None,
    presence: Presence = False,
    min_presence: MinPresence = None,
    refine: Refine = None,
    heatmap: HeatMap = None,
    map_output: MapOutput = None,
    frames: Frames = None,
    tile: Tile = None,
    tile_overlap: TileOverlap = None,
    skip_existing: SkipExisting = False,
    device: Device = None,
    max_tokens: MaxTokens = None,
    image_range: ImageRange = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Segment images by words. Exit status: 0 success, 1 something failed, 2 wrong usage."""
    from PIL import Image

    from spar_hf.cli.frames import ImageReader
    from spar_hf.cli.labels import parse_background, read_labels, single_class_hint
    from spar_hf.cli.result_files import coco_encoder, write_results

    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels
    with exit_on_error():
        tiles = parse_tile(tile, tile_overlap)
        if strips := writes_strips(output):
            others: dict[str, Any] = {
                "--format": formats not in ("overlay", "map"),
                "--shortest-edge": shortest_edge,
                "--map": map_output,
            }
            others |= {"--keep-background": keep_background, "--presence": presence, "--min-presence": min_presence}
            others |= {"--refine": refine, "--heatmap": heatmap, "--frames": frames, "--skip-existing": skip_existing}
            check_strip_options(tiles, output, others)
    if strips:
        rules = {"background": background, "threshold": threshold, "min_area": min_area, "templates": templates}
        limits = {"max_tokens": max_tokens, "max_pixels": max_pixels, "image_range": image_range}
        segment_to_map(images, labels, output, model, device, {"tile": tiles, **rules, **limits})
    with exit_on_error(usage=(ValueError, ImportError, OSError)):
        asked = parse_formats(formats + (",heatmap" if heatmap else ""))
        plan = plan_results(images, output, asked, map_output, frames)
        vocabulary = read_labels(labels)
        if "coco" in plan.formats:
            coco_encoder()
    if not plan.images:  # nothing to load a model for
        finish(process_images((), lambda image: None, report=report_failure, problems=plan.problems))

    given: dict[str, Any] = {
        "size": None if shortest_edge is None else {"shortest_edge": shortest_edge},
        "templates": templates,
        "background": parse_background(background, vocabulary),
        "threshold": threshold,
        "min_area": min_area,
        "refine": refine,
        "max_tokens": max_tokens,
    }
    shown = {"presence": presence or bool(min_presence), "min_presence": min_presence}
    options = {**given, **shown, "tile": tiles, "heat": "heatmap" in plan.formats}
    segment_image, pipe = load_segmenter(model, device, vocabulary, options)
    with exit_on_error(failure=()):  # wrong words or options are reported once, not for every image
        probe = segment_image(Image.new("RGB", (32, 32)))
        heat_classes = class_numbers(heatmap, probe) if heatmap else None
    if hint := single_class_hint(labels, vocabulary):
        say(f"note: {hint}", err=True)
    reader = ImageReader(image_range)
    write = partial(write_results, keep_background=keep_background, heat_classes=heat_classes)
    new = {**shown, "keep_background": keep_background, "heatmap": heatmap, "tile": tiles}
    with exit_on_error(failure=OSError), interruptible():
        record = open_record(plan, pipe, vocabulary, {**given, "image_range": image_range}, new, skip_existing)
        summary = segment_all(plan, segment_image, probe["labels"], skip_existing, record, reader, write)
    if reader.only_first:
        say(f"note: {reader.only_first} has several frames or pages; the first was taken (see --frames).", err=True)
    finish(summary, str(summary) if plan.several or summary.skipped else None)


def class_numbers(labels: Sequence[str], result: dict[str, Any]) -> list[int]:
    """
    Numbers of the classes that `--heatmap` names.

    Raises:
        UsageError: one is no class, or a background without words.
    """
    known = result["labels"][: len(result["heat"])]
    if unknown := [label for label in labels if label not in known]:
        raise UsageError(f"--heatmap {unknown[0]!r} is none of the classes with words: {', '.join(known[:10])}.")
    return [known.index(label) for label in labels]


def load_segmenter(
    model: str | None, device: str | None, vocabulary: Any, options: dict[str, Any]
) -> tuple[SegmentImage, Any]:
    """Load the pipeline: as a function of an image, and itself."""
    from spar_hf.cli.pipelines import load_pipeline, segment_with_heat

    with exit_on_error():
        pipe = load_pipeline(model, device)
    given = {name: value for name, value in options.items() if value is not None}
    return partial(segment_with_heat, pipe, candidate_labels=vocabulary, **given), pipe


def open_record(
    plan: ResultPlan,
    pipe: Any,
    vocabulary: Any,
    options: dict[str, Any],
    new_options: dict[str, Any],
    skip_existing: bool,
) -> ResultRecord | None:
    """
    The record of settings in the output folder. A single file gets one beside it only with `--skip-existing`, which could
    not tell otherwise how the file was made. New options have an entry only if they are used, so that records of earlier
    versions stay valid.
    """
    if plan.folder is None and not skip_existing:
        return None
    folder = next(iter(next(iter(plan.paths.values())).values())).parent if plan.folder is None else plan.folder
    settings = {
        "labels": dict(zip(vocabulary.labels, vocabulary.names, strict=True)),
        **{name: value or None for name, value in options.items()},
        **{name: value for name, value in new_options.items() if value},
        "model": pipeline_fingerprint(pipe),
    }
    if len(vocabulary.all_names) > len(vocabulary.labels) or options["background"] == "auto":
        settings["scores"] = "softmax over classes"  # earlier versions took it over all names
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
    record: ResultRecord | None,
    reader: "ImageReader",
    write: Callable[..., None],
) -> RunSummary:
    """
    Segment all images and `write` their results; a folder also gets `classes.txt` and, for COCO, `annotations.json`.

    Raises:
        UsageError: a continued run finds results for other classes, of other settings or another model.
        OSError: the disk is full or read-only.
    """
    from spar_hf.cli.result_files import merge_coco

    def process(item: InputImage) -> None:
        image = reader.read(item)
        result = segment_image(image)
        write(image, result, plan.paths[item], item)
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
    """[`show_counts`] of the pipeline's `output="map"`."""
    import numpy as np

    from spar_hf.cli.result_files import presence_by_label

    labels, presence = result["labels"], presence_by_label(result) if "presence" in result else {}
    pixels = np.bincount(result["map"].ravel(), minlength=len(labels)).tolist()
    show_counts(labels, pixels, result["scores"], result["background"], presence)


def show_counts(
    labels: Sequence[str],
    pixels: Sequence[int],
    scores: Sequence[float],
    background: int,
    presence: Mapping[str, float] | None = None,
) -> None:
    """
    Print each class that has pixels with its share of the image, score and presence (if asked for), the background last,
    and count the classes without pixels.
    """
    presence = presence or {}
    found = sorted((i for i, count in enumerate(pixels) if count), key=lambda i: i == background)
    for i in found:
        share = pixels[i] / sum(pixels)
        shown = f"{share:.1%}" if share >= 0.0005 else "<0.1%"
        seen = f", presence {presence[labels[i]]:.2f}" if labels[i] in presence else ""
        say(f"{labels[i]:24} {shown:>7} of the image, score {scores[i]:.2f}{seen}")
    absent = [label for i, label in enumerate(labels) if i not in found and i != background]
    if absent:
        listed = [f"{label} (presence {presence[label]:.2f})" for label in absent[:10] if label in presence]
        count = len(labels) - (background >= 0)
        say(f"{len(absent)} of {count} classes not found" + (f": {', '.join(listed)}" if listed else ""))
