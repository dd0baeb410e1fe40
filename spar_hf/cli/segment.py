"""`spar-hf segment`: masks from words."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar_hf.cli.arguments import as_command
from spar_hf.cli.huge import segment_to_map, writes_strips
from spar_hf.cli.reporting import exit_on_error, finish, report_failure, say
from spar_hf.cli.result_paths import ResultPlan, parse_formats, plan_results
from spar_hf.cli.result_record import ResultRecord
from spar_hf.cli.segment_options import SegmentOptions
from spar_hf.cli.video import is_video, refuse_video_options, segment_video
from spar_hf.utils.atomic import write_text
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, RunSummary, interruptible, process_images
from spar_hf.utils.texts import json_text, read_text

if TYPE_CHECKING:
    from spar_hf.cli.frames import ImageReader
    from spar_hf.model.prompts import Vocabulary

SegmentImage = Callable[..., dict[str, Any]]  # image -> the pipeline's `output="map"`


@as_command(SegmentOptions)
def segment(options: SegmentOptions) -> None:
    """Segment images by words. Exit status: 0 success, 1 something failed, 2 wrong usage."""
    from PIL import Image

    from spar_hf.cli.frames import ImageReader
    from spar_hf.cli.labels import parse_background, single_class_hint

    if is_video(options.output) or any(map(is_video, options.images)):
        segment_video(options)
    with exit_on_error():
        refuse_video_options(options)
    if options.max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = options.max_pixels
    if writes_strips(options.output):
        given = ("background", "threshold", "min_area", "templates", "max_tokens", "max_pixels", "image_range")
        settings = {"tile": options.tiles, **{name: getattr(options, name) for name in given}}
        segment_to_map(options.images, options.labels, options.output, options.model, options.device, settings)
    plan, vocabulary = plan_work(options)
    own = options.job.pick(plan.images)
    if not own:  # nothing to load a model for
        finish(process_images((), lambda image: None, report=report_failure, problems=plan.problems))
    rules = options.rules(parse_background(options.background, vocabulary))
    asked = {**rules, **options.presences, "tile": options.tiles, "heat": "heatmap" in plan.formats}
    segment_image, pipe = load_segmenter(options.model, options.device, vocabulary, asked)
    with exit_on_error(failure=()):  # wrong words or options are reported once, not for every image
        probe = segment_image(Image.new("RGB", (32, 32)))
        heat_classes = class_numbers(options.heatmap, probe) if options.heatmap else None
    if hint := single_class_hint(options.labels, vocabulary):
        say(f"note: {hint}", err=True)
    reader = ImageReader(options.image_range)
    with exit_on_error(failure=OSError), interruptible():
        record = open_record(options, plan, pipe, vocabulary, rules)
        summary = segment_all(options, plan, own, segment_image, probe["labels"], record, reader, heat_classes)
    if reader.only_first:
        say(f"note: {reader.only_first} has several frames or pages; the first was taken (see --frames).", err=True)
    finish(summary, str(summary) if plan.several or summary.skipped else None)


def plan_work(options: SegmentOptions) -> tuple[ResultPlan, "Vocabulary"]:
    """The images, the files to write for each, and the classes; exits where they do not fit."""
    from spar_hf.cli.labels import read_labels
    from spar_hf.cli.result_files import coco_encoder

    with exit_on_error(usage=(ValueError, ImportError, OSError)):
        formats = parse_formats(options.formats + (",heatmap" if options.heatmap else ""))
        plan = plan_results(options.images, options.output, formats, options.map_output, options.frames)
        vocabulary = read_labels(options.labels)
        if "coco" in plan.formats:
            coco_encoder()
    return plan, vocabulary


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
    options: SegmentOptions, plan: ResultPlan, pipe: Any, vocabulary: "Vocabulary", rules: dict[str, Any]
) -> ResultRecord | None:
    """
    The record of settings in the output folder. A single file gets one beside it only with `--skip-existing`, which could
    not tell otherwise how the file was made. New options have an entry only if they are used, so that records of earlier
    versions stay valid.
    """
    from spar_hf.batch.callables import pipeline_fingerprint

    if plan.folder is None and not options.skip_existing:
        return None
    folder = next(iter(next(iter(plan.paths.values())).values())).parent if plan.folder is None else plan.folder
    new = {**options.presences, "keep_background": options.keep_background, "heatmap": options.heatmap}
    new["tile"] = options.tiles
    settings = {
        "labels": dict(zip(vocabulary.labels, vocabulary.names, strict=True)),
        **{name: value or None for name, value in {**rules, "image_range": options.image_range}.items()},
        **{name: value for name, value in new.items() if value},
        "model": pipeline_fingerprint(pipe),
    }
    if len(vocabulary.all_names) > len(vocabulary.labels) or rules["background"] == "auto":
        settings["scores"] = "softmax over classes"  # earlier versions took it over all names
    return ResultRecord(folder, settings, trust_unknown=plan.folder is not None, job=options.job.name)


def segment_all(
    options: SegmentOptions,
    plan: ResultPlan,
    images: Sequence[InputImage],
    segment_image: SegmentImage,
    class_names: list[str],
    record: ResultRecord | None,
    reader: "ImageReader",
    heat_classes: list[int] | None,
) -> RunSummary:
    """
    Segment the images of this job and write their results; a folder also gets `classes.txt` and, for COCO,
    `annotations.json`.

    Raises:
        UsageError: a continued run finds results for other classes, of other settings or another model.
        OSError: the disk is full or read-only.
    """
    from spar_hf.cli.result_files import merge_coco, write_results

    def write(item: InputImage, image: Any, result: dict[str, Any]) -> None:
        write_results(image, result, plan.paths[item], item, options.keep_background, heat_classes)
        if record is not None:
            record.add(item, list(plan.paths[item].values()))
        if not plan.several:
            show_classes(result)
            for path in plan.paths[item].values():
                say(f"written: {path}")

    done = set()
    if options.skip_existing and record is not None:  # other settings are refused before anything is written
        done = {item for item in images if record.is_done(item, list(plan.paths[item].values()))}
        if record.trusted:
            say(
                f"note: {record.trusted} results in {record.folder} are of a version that kept no record of its settings; "
                "they are kept unchecked.",
                err=True,
            )
    if plan.folder is not None:
        if options.skip_existing:
            check_class_list(plan.folder / "classes.txt", class_names)
        # the line number, from 0, is the pixel value in label maps
        write_text(plan.folder / "classes.txt", "".join(f"{name}\n" for name in class_names))
    if options.tiles is None:
        summary = segment_ahead(options, images, segment_image, reader, write, done, plan.problems)
    else:  # an image is many passes: nothing is gained by reading ahead of it

        def process(item: InputImage) -> None:
            image = reader.read(item)
            write(item, image, segment_image(image))

        summary = process_images(images, process, done.__contains__, report_failure, plan.problems)
    if plan.folder is not None and "coco" in plan.formats:
        parts = [paths["coco"] for paths in plan.paths.values() if paths["coco"].is_file()]
        write_text(plan.folder / "annotations.json", json_text(merge_coco(parts)))
    return summary


def segment_ahead(
    options: SegmentOptions,
    images: Sequence[InputImage],
    segment_image: SegmentImage,
    reader: "ImageReader",
    write: Callable[[InputImage, Any, dict[str, Any]], None],
    done: Collection[InputImage],
    problems: Sequence[tuple[str, str]],
) -> RunSummary:
    """[`process_ahead`] with the pipeline: the vision tower here, decisions and files in the thread that writes."""
    from spar_hf.batch.ahead import Work, process_ahead
    from spar_hf.batch.extractor import ImagePreparation
    from spar_hf.cli.frames import ReadPicture, ReadWithPixels

    pipe = segment_image.args[0]  # type: ignore[attr-defined]
    size = None if options.shortest_edge is None else {"shortest_edge": options.shortest_edge}
    patch = pipe.model.config.patch_size
    read = ReadWithPixels(reader, ImagePreparation(pipe.image_processor, patch, size, options.max_tokens))

    def compute(items: list[ReadPicture]) -> list[Any]:
        return pipe._encode(
            [{"pixel_values": item.pixel_values, "original_size": item.original_size} for item in items]
        )

    def finish_image(image: InputImage, item: ReadPicture, encoded: Any) -> None:
        reader.only_first = reader.only_first or item.only_first  # the reader of a worker is another one
        write(image, item.image, segment_image(encoded))

    # frames of an animation build on the one before, which one process has read
    workers = 0 if options.frames is not None else options.workers
    work = Work(read, compute, finish_image, patch)
    return process_ahead(images, work, done.__contains__, report_failure, problems, True, workers, options.batch_size)


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
