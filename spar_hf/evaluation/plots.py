"""
Figures over measurements of single passes and sliding windows: quality against time for every stride, and quality and time
against resolution. Rows are those of a report, shortened by [`figure_row`].
"""

from collections.abc import Sequence
from itertools import chain, cycle
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich import box
from rich.table import Table

COLOURS = ("#c1272d", "#1b7f4b", "#7b4fa3", "#c77700", "#008b9e")  # of the students; repeated if there are more
BASE, WINDOW = "#777777", "#2b5fa5"
Row = dict[str, Any]


def figure_row(row: Row) -> Row:
    """The entries of a report's row that figures need. Scores that JSON holds as null become NaN, a gap in a curve."""
    scores = ("mean_iou", "mean_boundary_iou", "overall_accuracy")
    names = ("model", "stride", "patch_size", *scores, "vision_seconds", "time_ratio", "peak_memory_bytes")
    return {name: row[name] for name in names} | {name: float("nan") for name in scores if row[name] is None}


def draw_strides(rows: Sequence[Row]) -> Figure:
    """mIoU against time: a point for each stride, filled if the patch divides the stride, and one for each single pass."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    windows = sorted((row for row in rows if row["stride"] is not None), key=lambda row: -row["stride"])
    axes.plot(*_curve(windows, "time_ratio"), color=WINDOW, linewidth=1, alpha=0.5)
    for divides, fill, words in ((True, WINDOW, "a multiple of the patch"), (False, "white", "not a multiple")):
        some = [row for row in windows if (row["stride"] % row["patch_size"] == 0) == divides]
        if some:
            label = f"sliding window, stride {words}"
            axes.plot(*_curve(some, "time_ratio"), "o", color=WINDOW, markerfacecolor=fill, markersize=7, label=label)
    for row in windows:
        point = (row["time_ratio"], 100 * row["mean_iou"])
        axes.annotate(str(row["stride"]), point, xytext=(7, -11), textcoords="offset points", fontsize=9)
    singles = [row for row in rows if row["stride"] is None]
    colours = chain((BASE,), cycle(COLOURS))
    for row, colour, marker in zip(singles, colours, "s" + "*" * len(singles), strict=False):
        size, label = 8 if marker == "s" else 15, f"{row['model']}, single pass"
        axes.axhline(100 * row["mean_iou"], color=colour, linewidth=0.8, linestyle=":")
        axes.plot(*_curve([row], "time_ratio"), marker, color=colour, markersize=size, label=label)
    axes.margins(x=0.08, y=0.1)
    axes.set(xscale="log", xlabel="time of the vision forward, in passes of the base", ylabel="mIoU (%)")
    _finish(figure)
    return figure


def draw_resolutions(rows: Sequence[Row], stride: int) -> Figure:
    """mIoU and seconds per image against `shortest_edge`, a line for each model and way to run it."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        way = "single pass" if row["stride"] is None else f"sliding window, stride {stride}"
        lines.setdefault(f"{row['model']}, {way}", []).append(row)
    for (label, line), colour in zip(lines.items(), chain((BASE, WINDOW), cycle(COLOURS)), strict=False):
        style = {"color": colour, "marker": "o", "markersize": 5, "linewidth": 1.6, "label": label}
        left.plot(*_curve(line, "shortest_edge"), **style)
        right.plot([row["shortest_edge"] for row in line], [row["vision_seconds"] for row in line], **style)
    left.set(xlabel="shorter side (px)", ylabel="mIoU (%)")
    right.set(xlabel="shorter side (px)", ylabel="vision forward, seconds per image", yscale="log")
    for axes in (left, right):
        axes.set_xticks(sorted({row["shortest_edge"] for row in rows}))
    _finish(figure)
    return figure


def _curve(rows: Sequence[Row], x: str) -> tuple[list[float], list[float]]:
    """Coordinates of a line of mIoU in percent."""
    return [row[x] for row in rows], [100 * row["mean_iou"] for row in rows]


def _finish(figure: Figure) -> None:
    """Grid, ticks of logarithmic axes, and one legend above."""
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


def compare_to_windows(rows: Sequence[Row]) -> list[str]:
    """
    A sentence for each student and sliding window at the same resolution: the difference in mIoU and in time.

    Example:

    ```python
    >>> row = {"model": "base", "stride": None, "mean_iou": 0.25, "time_ratio": 1.0}
    >>> window = row | {"stride": 24, "mean_iou": 0.5, "time_ratio": 30.0}
    >>> compare_to_windows([row, window, row | {"model": "student", "mean_iou": 0.5625}])
    ['student: 6.25 mIoU above the sliding window of stride 24, 30.0 times faster.']
    ```"""
    sentences = []
    singles = [row for row in rows if row["stride"] is None]
    for row in (row for row in singles if row["model"] != singles[0]["model"]):
        for window in (row for row in rows if row["stride"] is not None):
            if window.get("shortest_edge") == row.get("shortest_edge"):
                side = f" at {row['shortest_edge']} px" if "shortest_edge" in row else ""
                margin = 100 * (row["mean_iou"] - window["mean_iou"])
                faster = window["time_ratio"] / row["time_ratio"]
                where = "above" if margin > 0 else "below"
                sentences.append(
                    f"{row['model']}{side}: {abs(margin):.2f} mIoU {where} the sliding window of stride {window['stride']}, "
                    f"{faster:.1f} times faster."
                )
    return sentences


def figure_table(rows: Sequence[Row]) -> Table:
    """The points of a figure as a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "stride", "shorter side", "mIoU %", "s/image", "× base"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(
            row["model"],
            "single pass" if row["stride"] is None else str(row["stride"]),
            str(row.get("shortest_edge", "")),
            f"{100 * row['mean_iou']:.2f}",
            f"{row['vision_seconds']:.3f}",
            f"{row['time_ratio']:.1f}",
        )
    return table
