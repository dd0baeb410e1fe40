"""
Measures runs on a data set: opens it, loads the models, counts image by image, and reports.

The runs take turns on every image, so that other work on the machine slows all of them alike.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from PIL import Image
from rich.console import Console
from tqdm.auto import tqdm

from spar_hf.data.segmentation_sets import SegmentationSet, check_readable
from spar_hf.evaluation.candidates import Candidate, first_given, load_candidates
from spar_hf.evaluation.counts import FREE_SETTINGS, Counts, PartialCounts, check_same_settings
from spar_hf.evaluation.dataset import open_with_words
from spar_hf.evaluation.flicker import check_frames, count_changes, is_next_frame
from spar_hf.evaluation.inference import Prediction, predict
from spar_hf.evaluation.options import EvaluationOptions
from spar_hf.evaluation.protocols import find_protocol
from spar_hf.evaluation.published import show_comparison
from spar_hf.evaluation.reports import card_paths, eval_result_paths, make_report, read_report, write_report
from spar_hf.evaluation.runs import Run, parse_models, parse_runs
from spar_hf.model.backbone_sources import load_source_config
from spar_hf.model.background import ONE_CLASS
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.templates import TemplateChoice, read_templates
from spar_hf.utils.checkpoints import check_replaceable
from spar_hf.utils.devices import PeakMemory
from spar_hf.utils.errors import as_usage_errors
from spar_hf.utils.runs import RunFolder, start_accelerator

logger = logging.getLogger(__name__)


def evaluate_runs(options: EvaluationOptions, console: Console | None = None, reuse: bool = False) -> dict[str, Any]:
    """
    Measure all runs. Every process returns the whole report, and the process group stays for further measurements.

    Args:
        options: what to measure.
        console: where the main process prints the table; `None` prints nothing.
        reuse: return the report in `options.output.output` if there is one with the same settings.

    Returns:
        The report as JSON holds it: data set, classes, a row of scores for each run, settings and versions.

    Raises:
        UsageError: options, files and models do not fit, a report or partial counts have other settings, or a finished
            report is there and `overwrite` is not given. Everything is checked before the first image is measured. Another
            process writes the same report.
        MissingFiles: a folder or file is missing.
    """
    accelerator = start_accelerator(options.run.mixed_precision)
    output = options.output.output
    with nullcontext() if output is None else RunFolder(accelerator, Path(output), file=True):
        return measure_all(options, console, reuse, accelerator)


def measure_all(
    options: EvaluationOptions, console: Console | None, reuse: bool, accelerator: Accelerator
) -> dict[str, Any]:
    """What [`evaluate_runs`] does while its report is locked."""
    folders = parse_models(options.run.model)
    output = None if options.output.output is None else Path(options.output.output)
    if not reuse:
        cards = card_paths(options.output.card_folder, folders).values()
        results = eval_result_paths(options.output.card_folder, folders).values()
        check_replaceable([*cards, *results, *([] if output is None else [output])], options.output.overwrite)
    runs = parse_runs(options.run.runs, folders)
    protocol = partial(find_protocol, options.rules.protocol, options.data.benchmark)
    common = protocol(readout="")  # words and boundaries are the same for every read-out
    data, vocabulary, scored = open_with_words(options.data, options.words, common.vocabulary)
    settings = measurement_settings(options.flat, data, vocabulary, folders, accelerator)
    if options.run.flicker:  # earlier versions also paired the last frame of a video with the first of the next
        settings |= {"flicker_between": "frames of one video"}
    if options.rules.protocol is not None:  # what an earlier version did not set
        windows = protocol(readout="dinov3").window_size
        settings |= {"resample": first_given(options.resolution.resample, common.resample), "windows": windows}
    if reuse and output is not None and output.is_file():
        report = read_report(output)
        check_same_settings(report.get("settings", {}), settings, output)
        return report
    if options.run.flicker:
        check_frames(map(data.place, range(len(data))))
    if len(vocabulary.labels) == 1 and console is not None and accelerator.is_main_process:
        console.print(f"note: {ONE_CLASS} Its IoU is 100 % whatever the model.")
    candidates = load_candidates(
        folders,
        runs,
        vocabulary,
        accelerator.device,
        protocol,
        resize=options.resolution.resize,
        templates=options.words.templates,
        scale=options.rules.dense_logit_scale,
        threshold=options.rules.threshold,
        min_area=options.rules.exclude_area,
        resample=options.resolution.resample,
        window_size=options.run.window_size,
    )
    partial_counts = prepare_counts(data, output, settings, accelerator)
    dilation_ratio = first_given(options.run.dilation_ratio, common.dilation_ratio) if options.run.boundary else None
    predictor = Predictor(runs, candidates, vocabulary, accelerator, options.run.window_batch_size, options.run.warmup)
    measured = {"boundary": options.run.boundary, "flicker": options.run.flicker}
    counts = count_images(
        data, predictor, partial_counts, dilation_ratio, options.output.save_seconds, options.run.flicker
    )
    report = make_report(data, vocabulary, runs, candidates, counts, scored, measured, accelerator)
    report |= {"options": options.flat, "settings": settings}
    if accelerator.is_main_process:
        write_report(report, output, options.output.card_folder, console)
        if options.output.compare and console is not None:
            show_comparison(report, console)
        if partial_counts is not None:
            partial_counts.remove()
    accelerator.wait_for_everyone()
    return report


def model_files(folder: str) -> list[list[Any]]:
    """
    Name, size and time of the files of a local model, which change if it is trained again; of a model on the hub its commit.

    Raises:
        UsageError: it is neither a folder nor a model on the hub.
    """
    if not Path(folder).is_dir():
        with as_usage_errors():
            load_source_config(folder)
            return [["commit", Path(hf_hub_download(folder, "config.json")).parent.name]]
    found = [path for pattern in ("*.safetensors", "*.json") for path in Path(folder).glob(pattern)]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(found)]


def measurement_settings(
    options: dict[str, Any],
    data: SegmentationSet,
    vocabulary: Vocabulary,
    folders: dict[str, str],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """
    Everything that decides the counts, as JSON holds it: measurements with equal settings can be joined. Options name files
    and vocabularies, so their content is included.
    """
    settings = {f"--{name}": value for name, value in options.items() if f"--{name}" not in FREE_SETTINGS}
    settings["images"] = hashlib.sha256("\n".join(data.names).encode()).hexdigest()
    settings["files of images"] = data.stamp
    settings["words"] = dict(zip(vocabulary.labels, vocabulary.names, strict=True))
    settings["classes of mask values"] = hashlib.sha256(json.dumps(data.table.tolist()).encode()).hexdigest()
    if isinstance(choice := read_templates(options.get("templates")), TemplateChoice):
        settings["templates of names"] = asdict(choice)
    settings["files"] = {name: model_files(folder) for name, folder in folders.items()}
    settings["mixed precision"] = accelerator.mixed_precision
    settings["device"] = accelerator.device.type
    if not options.get("flicker"):  # earlier versions did not measure it
        settings.pop("--flicker", None)
    if options.get("threshold") and options.get("protocol") is None:
        settings["scores"] = "classes"  # earlier versions compared the softmax over names with it
    return json.loads(json.dumps(settings))


def prepare_counts(
    data: SegmentationSet, output: Path | None, settings: dict[str, Any], accelerator: Accelerator
) -> PartialCounts | None:
    """
    The partial counts of the report `output`, or `None` without one. A new measurement first reads all images once.

    Raises:
        UsageError: an image or mask cannot be read, or there are partial counts with other settings.
    """
    folder = None if output is None else Path(f"{output}.parts")
    is_new = folder is None or not folder.is_dir()
    accelerator.wait_for_everyone()  # all processes have looked before one creates the folder
    if is_new:
        labelled = check_readable(data, accelerator)
        if not labelled and accelerator.is_main_process:
            logger.warning("No pixel of %s belongs to a class, so nothing is scored.", data.title)
    return None if folder is None else PartialCounts(folder, settings, accelerator)


@dataclass
class Predictor:
    """
    Predicts with all runs, image by image, and measures times and peak memory.

    Attributes:
        runs, candidates, vocabulary: what is run.
        accelerator: device and precision.
        window_batch_size: windows per forward pass.
        warmup: whether each run predicts the first image once before, and whether peak memory is measured on a CPU.
    """

    runs: Sequence[Run]
    candidates: dict[str, Candidate]
    vocabulary: Vocabulary
    accelerator: Accelerator
    window_batch_size: int
    warmup: bool
    # largest so far; a long image becomes large when its shorter side is fixed
    pixels: float = field(default=0.0, init=False)
    aspect: float = field(default=0.0, init=False)

    def __call__(self, image: Image.Image) -> list[tuple[Prediction, int | None]]:
        """
        The prediction of every run, and its peak memory in bytes, if that was measured.

        Raises:
            UsageError: the image is too large for the stride of a run.
        """
        pixels, aspect = image.width * image.height, max(image.size) / min(image.size)
        is_first, is_larger = not self.pixels, pixels > self.pixels or aspect > self.aspect
        self.pixels, self.aspect = max(pixels, self.pixels), max(aspect, self.aspect)
        found = []
        for run in self.runs:
            model = self.candidates[run.model]
            forward = partial(predict, model, run, image, self.vocabulary, self.accelerator, self.window_batch_size)
            with as_usage_errors():
                if self.warmup and is_first:
                    forward()  # what is loaded or compiled once belongs to no image
                found.append(measure(forward, self.accelerator.device, self.warmup and is_larger))
        return found


def measure(
    forward: Callable[[], Prediction], device: torch.device, measure_memory: bool
) -> tuple[Prediction, int | None]:
    """
    A prediction and its peak memory in bytes. On a CPU measuring memory takes time, so there it needs a forward of its own,
    and is done only if `measure_memory`.
    """
    if device.type != "cpu":
        with PeakMemory(device) as peak:
            prediction = forward()
        return prediction, peak.bytes
    memory = None
    if measure_memory:
        with PeakMemory(device) as peak:
            forward()
        memory = peak.bytes
    return forward(), memory


def count_images(
    data: SegmentationSet,
    predictor: Predictor,
    partial_counts: PartialCounts | None,
    dilation_ratio: float | None,
    save_seconds: float,
    flicker: bool = False,
) -> Counts:
    """
    Count all images that were not counted before, each process its share.

    Args:
        data: the images.
        predictor: makes the predictions.
        partial_counts: where counts are kept on disk.
        dilation_ratio: width of boundaries; `None` does not count them.
        save_seconds: time between two writes.
        flicker: whether flicker is counted, between frames of one video; each process takes images that follow one another.

    Returns:
        The counts of all images, on every process.

    Raises:
        UsageError: see [`Predictor`].
    """
    accelerator, size = predictor.accelerator, (len(predictor.runs), len(data.labels))
    earlier = Counts(*size) if partial_counts is None else partial_counts.earlier(*size)
    left = sorted(set(range(len(data))) - set(earlier.done.tolist()))
    process, processes = accelerator.process_index, accelerator.num_processes
    share = left[process::processes]
    if flicker:
        share = left[len(left) * process // processes : len(left) * (process + 1) // processes]
    counts, saved, before = Counts(*size), time.monotonic(), None
    for number in tqdm(share, desc="images", disable=not accelerator.is_main_process):
        follows = flicker and number > 0 and is_next_frame(*map(data.place, (number - 1, number)))
        if follows and (before is None or before[0] != number - 1):
            image, _ = data.read(number - 1)  # another process or an earlier start has counted it
            before = number - 1, image, [prediction.label_map.numpy() for prediction, _ in predictor(image)]
        image, reference = data.read(number)
        found = predictor(image)
        predictions = [prediction for prediction, _ in found]
        if flicker:
            maps = [prediction.label_map.numpy() for prediction in predictions]
            if follows and before is not None:
                still, changed = count_changes(before[1], image, list(zip(before[2], maps, strict=True)))
                counts.flicker += [(still, pixels) for pixels in changed]
            before = number, image, maps
        counts.add(number, reference, predictions, dilation_ratio, data.ignore_index)
        for i, (_, memory) in enumerate(found):
            counts.note_memory(i, memory)
        if partial_counts is not None and time.monotonic() - saved >= save_seconds:
            counts.save(partial_counts.path)
            saved = time.monotonic()
    if partial_counts is not None and share:
        counts.save(partial_counts.path)
    total = counts.over_processes(accelerator)
    total.merge(earlier)
    return total
