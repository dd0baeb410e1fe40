"""
The measurement behind `evaluate.py`, `figures.py` and `strength.py`: models, settings, and the loop over images.

The runs take turns image by image, so that whatever else the machine does slows all of them alike.
"""

import hashlib
import json
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from rich.console import Console
from tqdm.auto import tqdm

from spar_hf.data.benchmarks import SegmentationSet
from spar_hf.data.segmentation_sets import VOID, check_sides
from spar_hf.evaluation.counts import PartialCounts, Tally, refuse_others
from spar_hf.evaluation.inference import Candidate, PeakMemory, Rules, Run, parse_models, parse_runs, predict
from spar_hf.evaluation.metrics import BoundaryIoU, MeanIoU
from spar_hf.evaluation.options import Options, build_vocabulary, check_options, choose_images, indices, resize_options
from spar_hf.evaluation.protocols import PROTOCOLS, Protocol
from spar_hf.evaluation.reports import card_block, find_gaps, make_row, show
from spar_hf.model.backbone_sources import load_source_config
from spar_hf.model.prompts import Vocabulary, resolve_templates
from spar_hf.model.refine import resolve_refinement
from spar_hf.teacher import SlidingWindowTeacher
from spar_hf.utils.atomic import write_json, write_text
from spar_hf.utils.usage import check_precision, work_begins

# what changes neither counts nor times
FREE_OPTIONS = {"output", "card_folder", "save_seconds"}


def find_protocol(options: Options, readout: str) -> Protocol | None:
    """
    The published evaluation for a data set and a model.

    Raises:
        ValueError: there is none of this name.
    """
    if options.protocol is None:
        return None
    if options.protocol not in PROTOCOLS:
        raise ValueError(f"There is no protocol {options.protocol!r}; use one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[options.protocol](options.benchmark, readout)


def first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def load_candidates(
    options: Options, runs: list[Run], folders: dict[str, str], vocabulary: Vocabulary, device: torch.device
) -> dict[str, Candidate]:
    """
    The models that runs need, each with the words and its settings: an option's, the protocol's, the checkpoint's.

    Raises:
        ValueError: background rules for a set without a class called background, or a stride above a model's window.
    """
    candidates = {}
    for name in dict.fromkeys(run.model for run in runs):
        candidate, tokenizer = Candidate.load(folders[name], device)
        protocol = find_protocol(options, candidate.model.config.readout)
        resize = {} if protocol is None else {"do_resize": True, "size": protocol.size}
        candidate.resize = first_given(resize_options(options), resize)
        candidate.rules = Rules(
            first_given(options.scale, protocol and protocol.scale),
            first_given(options.threshold, protocol and protocol.threshold, 0.0),
            first_given(options.min_area, protocol and protocol.min_area, 0.0),
        )
        if (candidate.rules.threshold or candidate.rules.min_area) and "background" not in vocabulary.labels:
            raise ValueError(
                "--threshold and --min_area give pixels to the class background, but there is none among "
                f"{', '.join(vocabulary.labels)}."
            )
        candidate.learn(tokenizer, vocabulary, first_given(options.templates, protocol and protocol.templates))
        candidates[name] = candidate
        for run in runs:
            if run.model == name and run.stride is not None:  # made only to refuse a stride that does not fit
                SlidingWindowTeacher(candidate.model.vision_model, stride=run.stride)
    return candidates


def files_of(folder: str) -> list[list[Any]]:
    """
    Name, size and time of a local model's files: a student that was trained again is another one. Of a hub model its commit.

    Raises:
        OSError: neither a folder nor a model that the hub gives.
    """
    if not Path(folder).is_dir():
        load_source_config(folder)  # says in one line what is wrong
        return [["commit", Path(hf_hub_download(folder, "config.json")).parent.name]]
    found = [path for pattern in ("*.safetensors", "*.json") for path in Path(folder).glob(pattern)]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(found)]


def measure_settings(
    options: Options, data: SegmentationSet, vocabulary: Vocabulary, folders: dict[str, str], accelerator: Accelerator
) -> dict[str, Any]:
    """What decides the counts: two measurements of equal settings can be joined. As JSON holds it."""
    settings = {f"--{name}": value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    settings["images"] = hashlib.sha256("\n".join(data.names).encode()).hexdigest()
    settings["files of images"] = data.stamp
    # options name files and vocabularies; what was in them counts
    settings["words"] = dict(zip(vocabulary.labels, vocabulary.names, strict=True))
    settings["classes of mask values"] = hashlib.sha256(json.dumps(data.table.tolist()).encode()).hexdigest()
    settings["files"] = {name: files_of(folder) for name, folder in folders.items()}
    settings["mixed precision"] = accelerator.mixed_precision
    settings["device"] = accelerator.device.type
    return json.loads(json.dumps(settings))


def check_readable(data: SegmentationSet, accelerator: Accelerator) -> None:
    """
    Read all images and masks once, every process its share: a bad one ends a measurement before its work, not in the midst.

    Raises:
        ValueError: see [`SegmentationSet.read`] and [`check_sides`].
    """
    share = range(accelerator.process_index, len(data), accelerator.num_processes)
    for number in tqdm(share, desc="checking", disable=not accelerator.is_main_process):
        image, _ = data.read(number)
        check_sides(image, data.names[number])


def evaluate_runs(options: Options, console: Console | None = None, reuse: bool = False) -> dict[str, Any]:
    """
    Measure all runs; every process gets the whole report. The process group stays, for further measurements.

    Args:
        options: what to measure.
        console: where the main process prints the table; `None` prints nothing.
        reuse: where `--output` holds a finished report of the same settings, that one is returned.

    Raises:
        ValueError, FileNotFoundError: options or data that do not fit, before any image is read; see the functions above.
    """
    check_options(options)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    check_precision(accelerator)
    device = accelerator.device
    folders = parse_models(options.model)
    runs = parse_runs(options.runs, folders)
    resize_options(options)  # complain about options before any work
    if options.templates is not None:
        resolve_templates(options.templates)
    for run in runs:
        if run.refinement is not None:
            resolve_refinement(run.refinement)
    protocol = find_protocol(options, readout="")  # what depends on the model comes later
    data = choose_images(options)
    vocabulary, data = build_vocabulary(
        data, options, first_given(options.vocabulary, protocol and protocol.vocabulary)
    )
    labels = vocabulary.labels
    chosen = indices(labels if options.only_classes is None else options.only_classes, labels, "--only_classes")
    for folder in (options.output and Path(options.output).parent, options.card_folder):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    parts = None
    settings = measure_settings(options, data, vocabulary, folders, accelerator)
    if reuse and options.output is not None and Path(options.output).is_file():
        report = json.loads(Path(options.output).read_text(encoding="utf-8"))
        refuse_others(report.get("settings", {}), settings, Path(options.output))
        return report
    # before the partial counts: what is refused here must not leave its settings there
    candidates = load_candidates(options, runs, folders, vocabulary, device)
    is_new = options.output is None or not Path(f"{options.output}.parts").is_dir()
    accelerator.wait_for_everyone()  # all have looked before one makes that folder
    if is_new:
        check_readable(data, accelerator)
    if options.output is not None:
        parts = PartialCounts(Path(f"{options.output}.parts"), settings, accelerator)
    earlier = Tally(len(runs), len(labels)) if parts is None else parts.earlier(len(runs), len(labels))
    left = sorted(set(range(len(data))) - set(earlier.done.tolist()))

    dilation_ratio = first_given(options.dilation_ratio, protocol and protocol.dilation_ratio, 0.02)
    area = MeanIoU(len(labels), ignore_index=VOID)
    boundary = BoundaryIoU(len(labels), VOID, dilation_ratio) if options.boundary else None
    tally, saved = Tally(len(runs), len(labels)), time.monotonic()
    share = left[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(share, desc="images", disable=not accelerator.is_main_process)
    # pixels, and longer over shorter side: what is resized to a shorter side is large if it is long
    largest = (0.0, 0.0)
    work_begins()
    for step, number in enumerate(bar):
        image, reference = data.read(number)
        extent = (image.width * image.height, max(image.size) / min(image.size))
        is_larger = extent[0] > largest[0] or extent[1] > largest[1]
        largest = (max(extent[0], largest[0]), max(extent[1], largest[1]))
        predictions, spent = [], []
        for i, run in enumerate(runs):
            work = (candidates[run.model], run, image, vocabulary, accelerator, options.window_batch_size)
            if options.warmup and step == 0:
                predict(*work)  # what is loaded or compiled once is no memory of an image
            if device.type == "cpu":  # where measuring memory costs time: off the clock, and seldom
                if options.warmup and is_larger:
                    with PeakMemory(device) as peak:
                        predict(*work)
                    tally.note_memory(i, peak.bytes)
                labelled, time_spent = predict(*work)
            else:
                with PeakMemory(device) as peak:
                    labelled, time_spent = predict(*work)
                tally.note_memory(i, peak.bytes)
            predictions.append(labelled)
            spent.append(time_spent)
        tally.add(number, area, boundary, predictions, reference, spent)
        if parts is not None and time.monotonic() - saved >= options.save_seconds:
            tally.save(parts.path)
            saved = time.monotonic()
    if parts is not None and share:
        tally.save(parts.path)

    total = tally.over_processes(accelerator)
    total.absorb(earlier)
    report = make_report(options, data, vocabulary, runs, total, chosen, candidates, accelerator)
    report["settings"] = settings
    if accelerator.is_main_process:
        if options.output is not None:
            write_json(Path(options.output), report)
        if options.card_folder is not None:
            for name in candidates:
                write_text(Path(options.card_folder) / f"{name.replace('/', '-')}.md", card_block(report, name))
        if parts is not None:
            parts.remove()
        if console is not None:
            show(report, console)
    accelerator.wait_for_everyone()
    return report


def make_report(
    options: Options,
    data: SegmentationSet,
    vocabulary: Vocabulary,
    runs: list[Run],
    total: Tally,
    chosen: list[int],
    candidates: dict[str, Candidate],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """All there is to say about a measurement, as JSON holds it but for NaN."""
    labels, device = vocabulary.labels, accelerator.device
    rows = []
    for i, run in enumerate(runs):
        boundary = total.boundary[i] if options.boundary else None
        seconds = total.nanoseconds[i] / 1e9 / len(data)
        row = make_row(run, total.confusion[i], boundary, seconds, total.memory[i], labels, chosen)
        candidate = candidates[run.model]
        how = {"patch_size": candidate.model.config.patch_size, "resize": candidate.resize or None}
        rows.append(row | how | asdict(candidate.rules))
    first = next((row for row in rows if row["stride"] is None), None)
    for row in rows:
        row["time_ratio"] = row["vision_seconds"] / first["vision_seconds"] if first else None
    return {
        "options": asdict(options),
        "title": data.title,
        "dataset": data.source,
        "subset": data.subset,
        "split": data.split,
        "images": len(data),
        "vocabulary": dict(zip(labels, vocabulary.names, strict=True)),
        "scored_classes": [labels[i] for i in chosen],
        "runs": rows,
        "gaps": find_gaps(rows),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("spar-hf", "torch", "transformers", "accelerate", "numpy", "pillow")},
        },
    }
