"""From counts to results: the rows of a report, the gap that students close, the table, JSON and model cards."""

import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from rich import box
from rich.console import Console
from rich.table import Table

from spar_hf.data.segmentation_sets import SegmentationSet
from spar_hf.evaluation.candidates import Candidate
from spar_hf.evaluation.counts import Counts
from spar_hf.evaluation.iou import area_scores, boundary_scores, mean_of_present
from spar_hf.evaluation.runs import Run
from spar_hf.model.backbone_sources import first_few
from spar_hf.model.prompts import Vocabulary
from spar_hf.utils.atomic import finite_json, write_json, write_text
from spar_hf.utils.checkpoints import check_replaceable
from spar_hf.utils.errors import UsageError
from spar_hf.utils.model_cards import model_card, rows
from spar_hf.utils.texts import json_text

SCORES = {"mean_iou": "mIoU", "mean_boundary_iou": "boundary mIoU", "overall_accuracy": "pixel accuracy"}


def make_report(
    data: SegmentationSet,
    vocabulary: Vocabulary,
    runs: Sequence[Run],
    candidates: dict[str, Candidate],
    counts: Counts,
    scored: Sequence[int],
    measured: dict[str, bool],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """
    The report of a measurement, as JSON holds it but for NaN.

    Args:
        data: the images.
        vocabulary: the classes and their words.
        runs: what was run.
        candidates: the models by name.
        counts: of all images.
        scored: numbers of the classes that are averaged over.
        measured: whether `boundary` and `flicker` were counted.
        accelerator: of the measurement.
    """
    labels, device, table = vocabulary.labels, accelerator.device, []
    for i, run in enumerate(runs):
        seconds = counts.nanoseconds[i] / 1e9 / len(data)
        boundaries = counts.boundary[i] if measured["boundary"] else None
        row = make_row(run, counts.confusion[i], boundaries, seconds, int(counts.memory[i]), labels, scored)
        candidate = candidates[run.model]
        how: dict[str, Any] = {"patch_size": candidate.model.config.patch_size, "resize": candidate.resize or None}
        how |= {"resample": candidate.resample, "window_size": candidate.window_size}
        if measured["flicker"]:
            still, changed = counts.flicker[i].tolist()
            row["flicker"] = changed / still if still else float("nan")
        table.append(row | how | asdict(candidate.rules))
    single = next((row for row in table if row["stride"] is None), None)
    for row in table:
        row["time_ratio"] = row["vision_seconds"] / single["vision_seconds"] if single else None
    return {
        "title": data.title,
        "dataset": data.source,
        "subset": data.subset,
        "split": data.split,
        "images": len(data),
        "vocabulary": dict(zip(labels, vocabulary.names, strict=True)),
        "scored_classes": [labels[i] for i in scored],
        "runs": table,
        "gaps": find_gaps(table),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("spar-hf", "torch", "transformers", "accelerate", "numpy", "pillow")},
        },
    }


def make_row(
    run: Run,
    confusion: np.ndarray,
    boundary: np.ndarray | None,
    seconds: np.ndarray,
    memory: int,
    labels: Sequence[str],
    scored: Sequence[int],
) -> dict[str, Any]:
    """
    Results of a run; NaN where nothing was counted.

    Args:
        run: what was run.
        confusion: see `iou.count_pixels`.
        boundary: see `iou.count_boundaries`; `None` if boundaries were not counted.
        seconds: mean over the images of the vision forward and of everything, `(2,)`.
        memory: peak memory in bytes, negative if it was not measured.
        labels: all classes.
        scored: numbers of the classes that means and accuracies are taken over.
    """
    scores = area_scores(confusion)
    iou, accuracy = scores["per_category_iou"], scores["per_category_accuracy"]
    correct, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    pixels = int(labelled[scored].sum())
    boundary_iou = np.full(len(labels), np.nan)
    if boundary is not None:
        boundary_iou = boundary_scores(boundary)["per_category_boundary_iou"]
    return {
        "model": run.model,
        "inference": run.inference,
        "stride": run.stride,
        "average": None if run.stride is None else run.average,
        "refinement": run.refinement,
        "mean_iou": mean_of_present(iou[scored]),
        "overall_accuracy": int(correct[scored].sum()) / pixels if pixels else float("nan"),
        "mean_accuracy": mean_of_present(accuracy[scored]),
        "mean_boundary_iou": mean_of_present(boundary_iou[scored]),
        "vision_seconds": float(seconds[0]),
        "total_seconds": float(seconds[1]),
        "peak_memory_bytes": memory if memory >= 0 else None,
        "classes": {
            label: {
                "iou": float(iou[i]),
                "boundary_iou": float(boundary_iou[i]),
                "accuracy": float(accuracy[i]),
                "labelled_pixels": int(labelled[i]),
                "predicted_pixels": int(predicted[i]),
                "correct_pixels": int(correct[i]),
            }
            for i, label in enumerate(labels)
        },
    }


def share_closed(base: float, teacher: float, student: float) -> float | None:
    """
    Share of the gap between base and teacher that the student closes; `None` if the teacher is not better than the base.

    Example:

    ```python
    >>> share_closed(base=0.25, teacher=0.5, student=0.375)
    0.5
    ```"""
    return (student - base) / (teacher - base) if teacher > base else None


def find_gaps(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    One entry for each pair of a teacher and a student. The base is the first single pass, teachers are the sliding windows
    of its model, students are the single passes of other models. Refined runs are left out.
    """
    rows = [row for row in rows if row["refinement"] is None]
    base = next((row for row in rows if row["stride"] is None), None)
    if base is None:
        return []
    return [
        {
            "base": base["model"],
            "teacher": f"{teacher['model']}, sliding window of stride {teacher['stride']}"
            + (", mean of logits" if teacher["average"] == "logits" else ""),
            "student": student["model"],
            "gain": student["mean_iou"] - base["mean_iou"],
            "gap": teacher["mean_iou"] - base["mean_iou"],
            "share_closed": share_closed(base["mean_iou"], teacher["mean_iou"], student["mean_iou"]),
            "times_faster": teacher["vision_seconds"] / student["vision_seconds"],
        }
        for teacher in rows
        if teacher["model"] == base["model"] and teacher["stride"] is not None
        for student in rows
        if student["model"] != base["model"] and student["stride"] is None
    ]


def read_report(path: Path) -> dict[str, Any]:
    """A stored report, also one of version 0.1, which called images photos."""
    report = json.loads(path.read_text(encoding="utf-8"))
    if "photos" in report:
        report["images"] = report.pop("photos")
    return report


def write_table(path: Path, table: dict[str, Any], overwrite: bool) -> None:
    """
    Write a table of several measurements, `{"rows": […], …}`. It may add rows to an earlier one.

    Raises:
        UsageError: the file holds other rows, and `overwrite` is not given.
    """
    table = json.loads(json_text(finite_json(table)))
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    check_replaceable([path] if any(row not in table["rows"] for row in earlier) else [], overwrite)
    write_json(path, table)


def file_names(models: Iterable[str]) -> dict[str, str]:
    """
    What the files of a model are called, by its name.

    Raises:
        UsageError: those of two models would be called the same.
    """
    names = {model: model.replace("/", "-") for model in models}
    if twice := next((name for name, count in Counter(names.values()).items() if count > 1), None):
        both = " and ".join(model for model, name in names.items() if name == twice)
        raise UsageError(f"{both} would both be written to {twice}.md. Give them other names: --model NAME=FOLDER.")
    return names


def card_paths(folder: str | None, models: Iterable[str]) -> dict[str, Path]:
    """
    The model cards that are written to a folder, by the name of the model; none without a folder.

    Raises:
        UsageError: as [`file_names`].
    """
    return {} if folder is None else {model: Path(folder) / f"{name}.md" for model, name in file_names(models).items()}


def eval_result_paths(folder: str | None, models: Iterable[str]) -> dict[str, Path]:
    """The files of results for the hub that are written to a folder, by the name of the model; none without a folder."""
    results = Path(folder or "") / ".eval_results"
    return {} if folder is None else {model: results / f"{name}.yaml" for model, name in file_names(models).items()}


def write_report(report: dict[str, Any], output: Path | None, card_folder: str | None, console: Console | None) -> None:
    """
    Write the report to the file `output`, model cards and results for the hub to `card_folder`, and the table to the
    console, unless `None`.
    """
    if output is not None:
        write_json(output, report)
    models = dict.fromkeys(row["model"] for row in report["runs"])
    for model, path in card_paths(card_folder, models).items():
        write_text(path, results_card(report, model))
    for model, path in eval_result_paths(card_folder, models).items():
        entries = eval_result_entries_to_yaml(eval_results(report, model))
        write_text(path, yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))
    if console is not None:
        show(report, console)


def percent(value: float | None) -> str:
    """
    A share in percent; empty if it is undefined.

    Example:

    ```python
    >>> percent(0.5), percent(None), percent(float("nan"))
    ('50.00', '', '')
    ```"""
    return "" if value is None or value != value else f"{100 * value:.2f}"


def digits(value: float) -> str:
    """A number with three decimals, or one from 10 on, so that columns stay narrow."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def title(report: dict[str, Any]) -> str:
    """Data set, subset, split, number of images and of classes."""
    scored, classes = len(report["scored_classes"]), len(report["vocabulary"])
    of_classes = f"{classes} classes" if scored == classes else f"{scored} of {classes} classes"
    part = "".join(f", {report[name]}" for name in ("subset", "split") if report[name])
    return f"{report['title']}{part}: {report['images']} images, {of_classes}"


def classes_of_means(report: dict[str, Any]) -> str:
    """
    What to say where means of IoU are not over the same classes; empty where they are. A class that is in no mask has an IoU
    of 0 in a run that predicts it somewhere, and none in the others.
    """
    defined = {}
    for row in report["runs"]:
        values = {label: row["classes"][label]["iou"] for label in report["scored_classes"]}
        run = f"{row['model']}, {row['inference']}"
        defined[run] = {label for label, value in values.items() if value is not None and value == value}
    union = set().union(*defined.values())
    missing = [f"{first_few(union - found)} ({run})" for run, found in defined.items() if union - found]
    if not missing:
        return ""
    return (
        f"note: means of IoU leave out classes that neither masks nor predictions hold: {'; '.join(missing)}. Where other "
        "runs predict them, they count as 0. Name the classes to score with --only_classes."
    )


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report as a table with seconds per image, and below it the share of the gap that each student closes."""
    table = Table(title=title(report), box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ("model", "inference"):
        table.add_column(heading)
    units = ("mIoU\n%", "bound.\nIoU %", "pixel\nacc. %", "vision\ns", "total\ns", "vision\ntime", "peak\nMB")
    flicker = any("flicker" in row for row in report["runs"])
    for heading in (*units, *(["flicker\n%"] if flicker else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["runs"]:
        memory = row["peak_memory_bytes"]
        table.add_row(
            row["model"],
            row["inference"],
            percent(row["mean_iou"]),
            percent(row["mean_boundary_iou"]),
            percent(row["overall_accuracy"]),
            digits(row["vision_seconds"]),
            digits(row["total_seconds"]),
            "" if row["time_ratio"] is None else f"{digits(row['time_ratio'])} ×",
            "" if memory is None else f"{memory / 2**20:.0f}",
            *([percent(row.get("flicker"))] if flicker else []),
        )
    console.print(table)
    if note := classes_of_means(report):
        console.print(note)
    for gap in report["gaps"]:
        closed = (
            "the teacher is not better than the base, so there is no gap to close"
            if gap["share_closed"] is None
            else f"{100 * gap['share_closed']:.0f} % of the gap closed"
        )
        console.print(
            f"{gap['student']} in a single pass: {100 * gap['gain']:+.2f} mIoU over {gap['base']} in a single pass, against "
            f"{100 * gap['gap']:+.2f} of {gap['teacher']}: {closed}; {gap['times_faster']:.1f} times faster."
        )


def results_card(report: dict[str, Any], model: str) -> str:
    """
    A model card with the results of a model: mIoU, boundary mIoU and pixel accuracy in percent for each way it was run, as a
    `model-index` for the hub and as a table.

    Source: `EvalResult` of huggingface_hub.
    """
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="open-vocabulary segmentation",
            dataset_type=report["dataset"],
            dataset_name=report["title"],
            dataset_config=report["subset"],
            dataset_split=report["split"],
            metric_type=metric,
            metric_name=f"{name}, {row['inference']}",
            metric_value=round(100 * row[metric], 2),
        )
        for row in report["runs"]
        if row["model"] == model
        for metric, name in SCORES.items()
        if row[metric] == row[metric]  # not NaN
    ]
    table = rows({str(result.metric_name): result.metric_value for result in results})
    text = f"{title(report)}.\n\n| score | % |\n|---|---|\n{table}"
    return model_card(model, text, ModelCardData(model_name=model, eval_results=results))


def eval_results(report: dict[str, Any], model: str) -> list[EvalResultEntry]:
    """
    The results of a model as the hub reads them from `.eval_results/*.yaml` of its repository: mIoU, boundary mIoU and pixel
    accuracy in percent. The hub lists them where the id names a data set there; that of a benchmark on disk is its name.

    Source: `EvalResultEntry` of huggingface_hub.
    """
    protocol = report.get("options", {}).get("protocol")
    setting = title(report) if protocol is None else f"{title(report)}, protocol {protocol}"
    return [
        EvalResultEntry(
            dataset_id=report["dataset"],
            task_id=metric,
            value=round(100 * row[metric], 2),
            notes=f"{name} in %, {row['inference']}; {setting}",
        )
        for row in report["runs"]
        if row["model"] == model
        for metric, name in SCORES.items()
        if row[metric] == row[metric]  # not NaN
    ]
