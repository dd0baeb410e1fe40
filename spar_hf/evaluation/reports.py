"""Counts -> results: rows, the gap that students close, a table for the terminal, JSON, the block of a model card."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from rich import box
from rich.console import Console
from rich.table import Table

from spar_hf.evaluation.inference import Run
from spar_hf.evaluation.metrics import BoundaryIoU, MeanIoU, mean_of_present


def share_closed(base: float, teacher: float, student: float) -> float | None:
    """Share of the gap between base and teacher that the student closes; `None` if there is no gap."""
    return (student - base) / (teacher - base) if teacher > base else None


def find_gaps(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    One entry for each teacher and student. The base is the first single pass, teachers are the sliding windows of its
    model, students the single passes of other models. Refined runs are neither.
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


def make_row(
    run: Run,
    confusion: np.ndarray,
    boundary: np.ndarray | None,
    seconds: np.ndarray,
    memory: int,
    labels: Sequence[str],
    chosen: Sequence[int],
) -> dict[str, Any]:
    """
    Results of a run; NaN where nothing was counted.

    Args:
        run: what was run.
        confusion: counts of `MeanIoU`.
        boundary: counts of `BoundaryIoU`; `None` if they were not wanted.
        seconds: mean per photo of the vision forward and in all, `(2,)`.
        memory: bytes, negative if not measured.
        labels: all classes.
        chosen: the numbers of those that means and accuracies are taken over.
    """
    # no `compute`: it refuses counts of nothing, as of masks that are void all over; here every mean is NaN then
    results = MeanIoU(len(labels), ignore_index=None).results(confusion)
    iou, accuracy = results["per_category_iou"], results["per_category_accuracy"]
    correct, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    pixels = int(labelled[chosen].sum())
    outlines = np.full(len(labels), np.nan)
    if boundary is not None:
        outlines = BoundaryIoU(len(labels), ignore_index=None).results(boundary)["per_category_boundary_iou"]
    return {
        "model": run.model,
        "inference": run.inference,
        "stride": run.stride,
        "average": None if run.stride is None else run.average,
        "refinement": run.refinement,
        "mean_iou": mean_of_present(iou[chosen]),
        "overall_accuracy": int(correct[chosen].sum()) / pixels if pixels else float("nan"),
        "mean_accuracy": mean_of_present(accuracy[chosen]),
        "mean_boundary_iou": mean_of_present(outlines[chosen]),
        "vision_seconds": float(seconds[0]),
        "total_seconds": float(seconds[1]),
        "peak_memory_bytes": int(memory) if memory >= 0 else None,
        "classes": {
            label: {
                "iou": float(iou[i]),
                "boundary_iou": float(outlines[i]),
                "accuracy": float(accuracy[i]),
                "labelled_pixels": int(labelled[i]),
                "predicted_pixels": int(predicted[i]),
                "correct_pixels": int(correct[i]),
            }
            for i, label in enumerate(labels)
        },
    }


def percent(value: float | None) -> str:
    return "" if value is None or value != value else f"{100 * value:.2f}"


def digits(value: float) -> str:
    """Three digits after the point, or one from 10 on: columns stay narrow."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report as a table (seconds per image), and under it how much of the gap each student closes."""
    scored, classes = len(report["scored_classes"]), len(report["vocabulary"])
    of_classes = f"{classes} classes" if scored == classes else f"{scored} of {classes} classes"
    part = "".join(f", {report[name]}" for name in ("subset", "split") if report[name])
    title = f"{report['title']}{part}: {report['images']} images, {of_classes}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ("model", "inference"):
        table.add_column(heading)
    headings = (
        "mIoU\n%",
        "bound.\nIoU %",
        "pixel\nacc. %",
        "vision\ns",
        "total\ns",
        "vision\ntime",
        "peak\nMB",
    )
    for heading in headings:
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
        )
    console.print(table)
    for gap in report["gaps"]:
        closed = (
            "the teacher is not better than the base, so there is no gap to close"
            if gap["share_closed"] is None
            else f"{100 * gap['share_closed']:.0f} % of the gap closed"
        )
        console.print(
            f"{gap['student']} in one pass: {100 * gap['gain']:+.2f} mIoU over {gap['base']} in one pass; "
            f"{gap['teacher']}, has {100 * gap['gap']:+.2f}: {closed}; {gap['times_faster']:.1f} times faster."
        )


def eval_results(report: dict[str, Any], model: str) -> list[EvalResult]:
    """
    The results of a model as model cards hold them: mIoU, boundary mIoU and pixel accuracy in percent, for every way the
    model was run in.

    Source: `EvalResult` of huggingface_hub.
    """
    metrics = {"mean_iou": "mIoU", "mean_boundary_iou": "boundary mIoU", "overall_accuracy": "pixel accuracy"}
    return [
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
        for metric, name in metrics.items()
        if row[metric] == row[metric]  # no NaN: boundaries may not have been wanted
    ]


def card_block(report: dict[str, Any], model: str) -> str:
    """The front matter of a model card with nothing but these results: a `model-index` in YAML."""
    data = ModelCardData(model_name=model, eval_results=eval_results(report, model))
    return f"---\n{data.to_yaml()}\n---\n"
