"""`spar-hf segment`: masks from words."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar_hf.cli.arguments import as_command
from spar_hf.cli.huge import segment_to_map, writes_strips
from spar_hf.cli.reporting import exit_on_error, finish, report_failure, say
from spar_hf.cli.result_paths import ResultPlan, parse_formats, plan_results
from spar_hf.cli.result_sinks import FileSink, ShardSink
from spar_hf.cli.segment_options import SegmentOptions
from spar_hf.cli.video import is_video, refuse_video_options, segment_video
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, RunSummary, interruptible, process_images
from spar_hf.utils.locks import one_writer
from spar_hf.utils.processes import Processes, launched_processes
from spar_hf.utils.remote_files import is_remote

if TYPE_CHECKING:
    from spar_hf.cli.frames import ImageReader
    from spar_hf.model.prompts import Vocabulary

SegmentImage = Callable[..., dict[str, Any]]  # image -> the pipeline's `output="map"`


@as_command(SegmentOptions)
def segment(options: SegmentOptions) -> None:
    """
    Segment images by words. Exit status: 0 success, 1 something failed, 2 wrong usage.

    Several processes share the images: accelerate launch -m spar_hf.cli.main segment …
    """
    from PIL import Image

    if is_video(options.path) or any(map(is_video, options.images)):
        segment_video(options)
    with exit_on_error():
        refuse_video_options(options)
    if options.max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = options.max_pixels
    if writes_strips(options.path):
        given = (
            "background",
            "threshold",
            "min_area",
            "templates",
            "support",
            "max_tokens",
            "max_pixels",
            "image_range",
        )
        settings = {"tile": options.tiles, **{name: getattr(options, name) for name in given}}
        segment_to_map(options.images, options.labels, options.path, options.model, options.device, settings)
    plan, vocabulary = plan_work(options)
    if not (plan.images if options.to_shards else options.job.pick(plan.images)):  # nothing to load a model for
        summary = process_images((), lambda image: None, report=report_failure, problems=plan.problems)
        finish(summary, str(summary) if options.job.is_part else None)
    with launched_processes() as processes:
        summary = segment_plan(options, plan, vocabulary, processes)
    several = processes.count > 1
    line = f"process {processes.index + 1} of {processes.count}: {summary}" if several else str(summary)
    finish(summary, line if several or plan.several or summary.skipped else None)


def segment_plan(
    options: SegmentOptions, plan: ResultPlan, vocabulary: "Vocabulary", processes: Processes
) -> RunSummary:
    """Load the model and segment the images of this process."""
    from PIL import Image

    from spar_hf.cli.frames import ImageReader
    from spar_hf.utils.labels import parse_background, single_class_hint

    with exit_on_error():
        rules = options.rules(parse_background(options.background, vocabulary, options.has_rules))
    asked = {**rules, **options.presences, "tile": options.tiles, "heat": "heatmap" in plan.formats}
    asked["image_range"] = options.image_range
    device = options.device or processes.device
    segment_image, pipe = load_segmenter(options.model, device, vocabulary, asked, options.support)
    with exit_on_error(failure=()):  # wrong words or options are reported once, not for every image
        probe = segment_image(Image.new("RGB", (32, 32)))
        heat_classes = class_numbers(options.heatmap, probe) if options.heatmap else None
    if (hint := single_class_hint(options.labels, vocabulary)) and processes.index == 0:
        say(f"note: {hint}", err=True)
    reader = ImageReader(options.image_range or pipe.image_processor.image_range)
    folder = None if is_remote(options.output) else plan.folder
    with exit_on_error(failure=OSError), interruptible():
        settings = result_settings(options, pipe, vocabulary, rules)
        open_sink = ShardSink if options.to_shards else FileSink
        with one_writer(folder, settings, options.job.name, processes.index):
            sink = open_sink(options, plan, settings, probe["labels"], processes, heat_classes)
            summary = segment_all(options, plan, sink, segment_image, reader, processes)
    if only_first := reader.only_first or summary.only_first:  # the reader of a worker is another one
        say(f"note: {only_first} has several frames or pages; the first was taken (see --frames).", err=True)
    return summary


def plan_work(options: SegmentOptions) -> tuple[ResultPlan, "Vocabulary"]:
    """The images, the files to write for each, and the classes; exits where they do not fit."""
    from spar_hf.cli.result_files import coco_encoder
    from spar_hf.utils.labels import read_labels

    with exit_on_error(usage=(ValueError, ImportError, OSError)):
        formats = parse_formats(options.chosen_formats + (",heatmap" if options.heatmap else ""))
        if options.to_shards and options.path.is_file():
            raise UsageError(f"--output {options.output} is a file; shards need a folder.")
        where = (options.output, formats, options.map_output, options.frames, options.to_shards)
        plan = plan_results(options.images, *where)
        vocabulary = read_labels(options.labels)
        # a class may be called none, and a rule makes a background without words
        no_background = options.background == "none" and "none" not in vocabulary.labels and not options.has_rules
        if options.keep_background and no_background:
            raise UsageError("--background none leaves no background to list: leave out --keep-background.")
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
    model: str | None, device: str | None, vocabulary: Any, options: dict[str, Any], support: Path | None = None
) -> tuple[SegmentImage, Any]:
    """Load the pipeline: as a function of an image, and itself."""
    from spar_hf.cli.pipelines import load_pipeline, segment_with_heat

    with exit_on_error():
        pipe = load_pipeline(model, device, support=support)
    given = {name: value for name, value in options.items() if value is not None}
    return partial(segment_with_heat, pipe, candidate_labels=vocabulary, **given), pipe


def result_settings(
    options: SegmentOptions, pipe: Any, vocabulary: "Vocabulary", rules: dict[str, Any]
) -> dict[str, Any]:
    """
    What results depend on beside the image. New options have an entry only if they are used, so that records of earlier
    versions stay valid.
    """
    from spar_hf.batch.callables import pipeline_fingerprint
    from spar_hf.model.templates import TemplateChoice, read_templates

    new = {**options.presences, "keep_background": options.keep_background, "heatmap": options.heatmap}
    new["tile"] = options.tiles
    if options.support is not None:
        new["support"] = hashlib.sha256(options.support.read_bytes()).hexdigest()[:20]
    choice = read_templates(options.templates)
    if isinstance(choice, TemplateChoice):  # a file, which may say something else later
        new["template_choice"] = hashlib.sha256(repr(choice).encode()).hexdigest()[:20]
    settings = {
        "labels": dict(zip(vocabulary.labels, vocabulary.names, strict=True)),
        **{name: value or None for name, value in {**rules, "image_range": options.image_range}.items()},
        **{name: value for name, value in new.items() if value},
        "model": pipeline_fingerprint(pipe),
    }
    if len(vocabulary.all_names) > len(vocabulary.labels) or rules["background"] == "auto":
        settings["scores"] = "softmax over classes"  # earlier versions took it over all names
    return settings


def segment_all(
    options: SegmentOptions,
    plan: ResultPlan,
    sink: FileSink | ShardSink,
    segment_image: SegmentImage,
    reader: "ImageReader",
    processes: Processes,
) -> RunSummary:
    """
    Segment the images of this job that this process takes, and write their results.

    Raises:
        OSError: the disk is full or read-only.
    """

    def write(item: InputImage, image: Any, result: dict[str, Any]) -> None:
        sink.write(item, image, result)
        if not plan.several:
            show_classes(result)
            for path in [options.output] if options.to_shards else plan.paths[item].values():
                say(f"written: {path}")

    def process(item: InputImage) -> None:
        try:
            image = reader.read(item)
            result = segment_image(image)
        except Exception as error:
            sink.fail(item, str(error) or type(error).__name__)
            raise
        write(item, reader.rgb(image), result)

    problems = plan.problems if processes.index == 0 else []
    try:
        if options.tiles is None:
            summary = segment_ahead(options, sink, segment_image, reader, write, problems, processes)
        else:  # an image is many passes: nothing is gained by reading ahead of it
            images: Iterable[InputImage] = (sink.images[i] for i in processes.hand_out(sink.units))
            images = images if processes.count > 1 else list(images)
            summary = process_images(images, process, sink.is_done, report_failure, problems, processes.index == 0)
    finally:
        sink.close()
    sink.count_earlier_failures(summary)
    if not summary.interrupted:  # the other processes may go on, or end at any time: nobody waits for them
        processes.wait()
    sink.finish()
    if not summary.interrupted:
        processes.wait()  # a process that exits with status 1 makes the launcher stop the others
    return summary


def segment_ahead(
    options: SegmentOptions,
    sink: FileSink | ShardSink,
    segment_image: SegmentImage,
    reader: "ImageReader",
    write: Callable[[InputImage, Any, dict[str, Any]], None],
    problems: Sequence[tuple[str, str]],
    processes: Processes,
) -> RunSummary:
    """[`process_ahead`] with the pipeline: the vision tower here, decisions and files in the thread that writes."""
    from spar_hf.batch.ahead import Work, process_ahead
    from spar_hf.batch.extractor import ImagePreparation
    from spar_hf.cli.frames import ReadPicture, ReadWithPixels

    pipe = segment_image.args[0]  # type: ignore[attr-defined]
    size = None if options.shortest_edge is None else {"shortest_edge": options.shortest_edge}
    patch = pipe.model.config.patch_size
    prepare = ImagePreparation(pipe.image_processor, patch, size, options.max_tokens, options.image_range)
    read = ReadWithPixels(reader, prepare)

    def compute(items: list[ReadPicture]) -> list[Any]:
        return pipe._encode(
            [{"pixel_values": item.pixel_values, "original_size": item.original_size} for item in items]
        )

    def finish_image(image: InputImage, item: ReadPicture, encoded: Any) -> None:
        write(image, item.image, segment_image(encoded))

    # frames of an animation build on the one before, which one process has read
    workers = 0 if options.frames is not None else options.workers
    work = Work(read, compute, finish_image, patch, sink.fail)
    given = (report_failure, problems, True, workers, options.batch_size, sink.units, processes)
    with pipe.texts.unchanged():  # else all weights of the text tower would be read for every image
        return process_ahead(sink.images, work, sink.is_done, *given)


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
