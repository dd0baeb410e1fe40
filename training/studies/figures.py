"""
The two figures of the paper: what a sliding window's stride buys and costs, and how models bear large images.

    python training/figures.py --figure strides --dataset DATA/camvid/train --include "0001TP_*" --shortest_edge 384 \
        --model base=BASE SPAR=STUDENT --strides 192 96 64 48 40 24 --output figures
    python training/figures.py --figure resolutions --dataset DATA/camvid/train --include "0001TP_*" \
        --model base=BASE SPAR=STUDENT "SPAR ALL=OTHER" --resolutions 192 288 384 512 672 --stride 48 --output figures

The first model is the base, which also runs as the sliding window; all others are students, in one pass. All options of
`evaluate.py` that choose images and words hold here too. Each point is a measurement of its own and stays in `points/`: a
command that was cut off goes on, and one with further strides or resolutions measures those alone. Times are those of the
vision forward; a stride's is set against a pass of the base on the same images in turn.

Writes `OUTPUT/strides.png` and `.json`, or `resolutions`.
"""

from dataclasses import dataclass, field, fields
from itertools import chain, cycle
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from spar_hf import SlidingWindowTeacher, SparForOpenVocabSegmentation
from spar_hf.evaluation.evaluator import evaluate_runs
from spar_hf.evaluation.inference import parse_models
from spar_hf.evaluation.options import Options
from spar_hf.utils.atomic import write_atomically, write_json
from spar_hf.utils.usage import run_script

COLOURS = ("#c1272d", "#1b7f4b", "#7b4fa3", "#c77700", "#008b9e")  # students, in their order, then again from the first
BASE, WINDOW = "#777777", "#2b5fa5"


@dataclass
class FigureOptions(Options):
    """Options of the figures, beside those of the evaluation; every length is in pixels."""

    figure: Literal["strides", "resolutions"] = field(kw_only=True, metadata={"help": "Which figure to make."})
    strides: list[int] = field(
        default_factory=lambda: [192, 96, 64, 48, 40, 24], metadata={"help": "Strides of the first figure."}
    )
    resolutions: list[int] = field(
        default_factory=lambda: [192, 288, 384, 512, 672], metadata={"help": "Shorter sides of the second figure."}
    )
    stride: int = field(default=48, metadata={"help": "Stride of the sliding window in the second figure."})
    output: str = field(default="figures", metadata={"help": "Folder to write."})


def point(options: FigureOptions, name: str, runs: list[str], console: Console, **changes: Any) -> dict[str, Any]:
    """The report of one measurement, from `OUTPUT/points/NAME.json` if it is there."""
    values = {entry.name: getattr(options, entry.name) for entry in fields(Options)}
    changes["output"] = str(Path(options.output) / "points" / f"{name}.json")
    return evaluate_runs(Options(**{**values, **changes, "runs": runs}), console, reuse=True)


def short(row: dict[str, Any]) -> dict[str, Any]:
    """What figures need of a row of a report."""
    scores = ("mean_iou", "mean_boundary_iou", "overall_accuracy")
    names = ("model", "stride", "patch_size", *scores, "vision_seconds", "time_ratio", "peak_memory_bytes")
    undefined = {name: float("nan") for name in scores if row[name] is None}  # as JSON has it; curves have a gap there
    return {name: row[name] for name in names} | undefined


def check_strides(strides: list[int], folder: str) -> None:
    """
    Before the first point is measured.

    Raises:
        ValueError: a stride that is not in 1 to the window of the model in the folder.
    """
    encoder = SparForOpenVocabSegmentation.from_backbone(folder).vision_model
    for stride in strides:
        SlidingWindowTeacher(encoder, stride=stride)


def measure_strides(options: FigureOptions, console: Console) -> list[dict[str, Any]]:
    """One pass of every model, and the base's sliding window at every stride beside a pass of the base."""
    models = parse_models(options.model)
    base, *students = models
    check_strides(options.strides, models[base])
    one_pass = point(options, "one-pass", [f"{name}:single" for name in (base, *students)], console)
    rows = [short(row) for row in one_pass["runs"]]
    for stride in sorted(set(options.strides), reverse=True):
        runs = [f"{base}:single", f"{base}:sliding:{stride}"]
        report = point(options, f"stride-{stride}", runs, console, model=options.model[:1])
        rows.append(short(report["runs"][1]))
    return rows


def measure_resolutions(options: FigureOptions, console: Console) -> list[dict[str, Any]]:
    """Every model in one pass and the base's sliding window, at every shorter side."""
    if options.native or options.size or options.shortest_edge:
        raise ValueError("--resolutions are the shorter sides: leave --native, --size and --shortest_edge out.")
    base, *students = parse_models(options.model)
    runs = [f"{base}:single", f"{base}:sliding:{options.stride}", *(f"{name}:single" for name in students)]
    rows = []
    for side in sorted(set(options.resolutions)):
        report = point(options, f"stride-{options.stride}-side-{side}", runs, console, shortest_edge=side)
        rows += [short(row) | {"shortest_edge": side} for row in report["runs"]]
    return rows


def draw_strides(rows: list[dict[str, Any]]) -> Figure:
    """mIoU over time, a point per stride; filled where the stride divides by the patch."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    windows = sorted((row for row in rows if row["stride"] is not None), key=lambda row: -row["stride"])
    axes.plot(*curve(windows, "time_ratio"), color=WINDOW, linewidth=1, alpha=0.5)
    for divides, fill, words in ((True, WINDOW, "divides by the patch"), (False, "white", "does not")):
        some = [row for row in windows if (row["stride"] % row["patch_size"] == 0) == divides]
        if some:
            label = f"sliding window, stride {words}"
            axes.plot(*curve(some, "time_ratio"), "o", color=WINDOW, markerfacecolor=fill, markersize=7, label=label)
    for row in windows:
        place = (row["time_ratio"], 100 * row["mean_iou"])
        axes.annotate(str(row["stride"]), place, xytext=(7, -11), textcoords="offset points", fontsize=9)
    singles = [row for row in rows if row["stride"] is None]
    colours = chain((BASE,), cycle(COLOURS))
    for row, colour, marker in zip(singles, colours, "s" + "*" * len(singles), strict=False):
        size = 8 if marker == "s" else 15
        axes.axhline(100 * row["mean_iou"], color=colour, linewidth=0.8, linestyle=":")
        axes.plot(*curve([row], "time_ratio"), marker, color=colour, markersize=size, label=f"{row['model']}, one pass")
    axes.margins(x=0.08, y=0.1)
    axes.set(xscale="log", xlabel="time of the vision forward, in passes of the base", ylabel="mIoU (%)")
    finish(figure)
    return figure


def draw_resolutions(rows: list[dict[str, Any]], stride: int) -> Figure:
    """mIoU and seconds per image over the shorter side, a line per model and way."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        way = "one pass" if row["stride"] is None else f"sliding window, stride {stride}"
        lines.setdefault(f"{row['model']}, {way}", []).append(row)
    for (label, line), colour in zip(lines.items(), chain((BASE, WINDOW), cycle(COLOURS)), strict=False):
        style = {"color": colour, "marker": "o", "markersize": 5, "linewidth": 1.6, "label": label}
        left.plot(*curve(line, "shortest_edge"), **style)
        right.plot([row["shortest_edge"] for row in line], [row["vision_seconds"] for row in line], **style)
    left.set(xlabel="shorter side (px)", ylabel="mIoU (%)")
    right.set(xlabel="shorter side (px)", ylabel="vision forward, seconds per image", yscale="log")
    for axes in (left, right):
        axes.set_xticks(sorted({row["shortest_edge"] for row in rows}))
    finish(figure)
    return figure


def curve(rows: list[dict[str, Any]], x: str) -> tuple[list[float], list[float]]:
    return [row[x] for row in rows], [100 * row["mean_iou"] for row in rows]


def finish(figure: Figure) -> None:
    for axes in figure.axes:
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
            if scale == "log":
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)


def against_teacher(rows: list[dict[str, Any]]) -> list[str]:
    """For each student, by how much it lies above or below the base's sliding windows."""
    sentences = []
    singles = [row for row in rows if row["stride"] is None]
    for row in (row for row in singles if row["model"] != singles[0]["model"]):
        for window in (row for row in rows if row["stride"] is not None):
            if window.get("shortest_edge") == row.get("shortest_edge"):
                side = f" at {row['shortest_edge']} px" if "shortest_edge" in row else ""
                margin = 100 * (row["mean_iou"] - window["mean_iou"])
                where = "above" if margin > 0 else "below"
                faster = window["time_ratio"] / row["time_ratio"]
                sentences.append(
                    f"{row['model']}{side}: {abs(margin):.2f} mIoU {where} the sliding window of stride "
                    f"{window['stride']}, {faster:.1f} times faster."
                )
    return sentences


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "stride", "shorter side", "mIoU %", "s/image", "× base"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(
            row["model"],
            "one pass" if row["stride"] is None else str(row["stride"]),
            str(row.get("shortest_edge", "")),
            f"{100 * row['mean_iou']:.2f}",
            f"{row['vision_seconds']:.3f}",
            f"{row['time_ratio']:.1f}",
        )
    console.print(table)
    for sentence in against_teacher(rows):
        console.print(sentence)


def make_figure(options: FigureOptions, console: Console) -> list[dict[str, Any]]:
    """
    Measure what is missing, draw, write.

    Raises:
        ValueError: `--runs`, a resolution beside `--resolutions`, or images without a score; and see `evaluate_runs`.
    """
    if options.runs is not None:
        raise ValueError("The figures choose their own runs: leave --runs out.")
    rows = (measure_strides if options.figure == "strides" else measure_resolutions)(options, console)
    if all(row["mean_iou"] != row["mean_iou"] for row in rows):  # NaN
        raise ValueError(
            "No pixel of these images is labelled with a class that is scored, so there is nothing to draw: choose others "
            "with --include, --limit, --ignore_classes or --only_classes."
        )
    if PartialState().is_main_process:
        output = Path(options.output)
        drawing = draw_strides(rows) if options.figure == "strides" else draw_resolutions(rows, options.stride)
        write_json(output / f"{options.figure}.json", {"rows": rows, "against_the_teacher": against_teacher(rows)})
        write_atomically(output / f"{options.figure}.png", lambda temporary: drawing.savefig(temporary, dpi=160))
        print_rows(rows, console)
    return rows


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    (options,) = HfArgumentParser(FigureOptions, description=__doc__).parse_args_into_dataclasses(args)
    rows = make_figure(options, Console(markup=False, highlight=False))
    PartialState().destroy_process_group()
    return rows


if __name__ == "__main__":
    run_script(main)
