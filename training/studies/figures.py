"""
The two figures of the paper: quality and cost of the stride of a sliding window, and quality and time on large images.

    python training/studies/figures.py --figure strides --dataset DATA/camvid/train --include "0001TP_*" \
        --shortest_edge 384 --model base=BASE SPAR=STUDENT --strides 192 96 64 48 40 24 --output figures
    python training/studies/figures.py --figure resolutions --dataset DATA/camvid/train --include "0001TP_*" \
        --model base=BASE SPAR=STUDENT "SPAR ALL=OTHER" --shortest_edges 192 288 384 512 672 --stride 48 --output figures

The first model is the base, which also runs as the sliding window. All others are students, in a single pass. The options of
`evaluate.py` that choose images and words apply. Each point is a measurement of its own and stays in `OUTPUT/points/`: the
same command continues after an interruption, and one with more strides or resolutions measures only those. Times are those
of the vision forward; the time of a stride is divided by that of a single pass of the base on the same images in turn.

Writes `OUTPUT/strides.png` and `strides.json`, or `resolutions`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from rich.console import Console

from spar_hf import SlidingWindowTeacher, SparForOpenVocabSegmentation
from spar_hf.evaluation import EvaluationOptions, evaluate_runs
from spar_hf.evaluation.options import PARTS, OutputOptions
from spar_hf.evaluation.plots import compare_to_windows, draw_resolutions, draw_strides, figure_row, figure_table
from spar_hf.evaluation.reports import write_table
from spar_hf.evaluation.runs import parse_models
from spar_hf.utils.atomic import write_atomically
from spar_hf.utils.errors import UsageError, as_usage_errors, run_command
from spar_hf.utils.fields import option, required
from spar_hf.utils.options import parse_dataclasses


@dataclass(kw_only=True)
class FigureOptions(OutputOptions):
    """Options of the figures in addition to those of an evaluation; every length is in pixels."""

    figure: Literal["strides", "resolutions"] = required("Which figure to make.")
    strides: list[int] = option([192, 96, 64, 48, 40, 24], "Strides of the first figure.")
    shortest_edges: list[int] = option(
        [192, 288, 384, 512, 672], "Shorter sides of the second figure.", aliases=["--resolutions"]
    )
    stride: int = option(48, "Stride of the sliding window in the second figure.")
    output: str = option("figures", "Folder to write.")

    def __post_init__(self):
        """`output` is a folder here."""


def measure_point(
    evaluation: EvaluationOptions, output: OutputOptions, name: str, runs: list[str], console: Console
) -> dict[str, Any]:
    """The report of one measurement, read from `OUTPUT/points/NAME.json` if it is there."""
    file = str(Path(str(output.output)) / "points" / f"{name}.json")
    files = OutputOptions(output=file, save_seconds=output.save_seconds)
    options = replace(evaluation, run=replace(evaluation.run, runs=runs), output=files)
    return evaluate_runs(options, console, reuse=True)


def check_strides(strides: list[int], folder: str) -> None:
    """
    Check strides before the first point is measured.

    Raises:
        UsageError: a stride is not in 1 to the window of the model in the folder.
    """
    with as_usage_errors():
        encoder = SparForOpenVocabSegmentation.from_backbone(folder).vision_model
        for stride in strides:
            SlidingWindowTeacher(encoder, stride=stride)


def measure_strides(figure: FigureOptions, evaluation: EvaluationOptions, console: Console) -> list[dict[str, Any]]:
    """A single pass of every model, and the sliding window of the base at every stride beside its single pass."""
    models = parse_models(evaluation.run.model)
    base, *students = models
    check_strides(figure.strides, models[base])
    runs = [f"{name}:single" for name in (base, *students)]
    rows = [figure_row(row) for row in measure_point(evaluation, figure, "one-pass", runs, console)["runs"]]
    alone = replace(evaluation, run=replace(evaluation.run, model=evaluation.run.model[:1]))
    for stride in sorted(set(figure.strides), reverse=True):
        runs = [f"{base}:single", f"{base}:sliding:{stride}"]
        report = measure_point(alone, figure, f"stride-{stride}", runs, console)
        rows.append(figure_row(report["runs"][1]))
    return rows


def measure_resolutions(figure: FigureOptions, evaluation: EvaluationOptions, console: Console) -> list[dict[str, Any]]:
    """Every model in a single pass and the sliding window of the base, at every shorter side."""
    given = evaluation.resolution
    if given.native or given.size or given.shortest_edge:
        raise UsageError("--shortest_edges are the resolutions: leave --native, --size and --shortest_edge out.")
    base, *students = parse_models(evaluation.run.model)
    runs = [f"{base}:single", f"{base}:sliding:{figure.stride}", *(f"{name}:single" for name in students)]
    rows = []
    for side in sorted(set(figure.shortest_edges)):
        resized = replace(evaluation, resolution=replace(given, shortest_edge=side))
        report = measure_point(resized, figure, f"stride-{figure.stride}-side-{side}", runs, console)
        rows += [figure_row(row) | {"shortest_edge": side} for row in report["runs"]]
    return rows


def make_figure(figure: FigureOptions, evaluation: EvaluationOptions, console: Console) -> list[dict[str, Any]]:
    """
    Measure what is missing, draw, write.

    Raises:
        UsageError: `--runs` or a resolution is given, no pixel is scored, or an earlier figure had other points; and see
            `evaluate_runs`.
    """
    if evaluation.run.runs is not None:
        raise UsageError("The figures choose their own runs: leave --runs out.")
    if figure.card_folder is not None or figure.compare:
        raise UsageError("A figure is of many measurements: leave --card_folder and --compare to evaluate.py.")
    of_strides = figure.figure == "strides"
    rows = (measure_strides if of_strides else measure_resolutions)(figure, evaluation, console)
    if all(row["mean_iou"] != row["mean_iou"] for row in rows):  # NaN
        raise UsageError(
            "No pixel of these images belongs to a class that is scored, so there is nothing to draw. Choose others with "
            "--include, --limit, --ignore_classes or --only_classes."
        )
    if PartialState().is_main_process:
        output, sentences = Path(figure.output), compare_to_windows(rows)
        drawing = draw_strides(rows) if of_strides else draw_resolutions(rows, figure.stride)
        table = {"rows": rows, "against_the_teacher": sentences}
        write_table(output / f"{figure.figure}.json", table, figure.overwrite)
        write_atomically(output / f"{figure.figure}.png", lambda temporary: drawing.savefig(temporary, dpi=160))
        console.print(figure_table(rows))
        for sentence in sentences:
            console.print(sentence)
    return rows


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse options, measure, draw. Returns the points."""
    parts = {name: part for name, part in PARTS.items() if name != "output"}
    figure, *parsed = parse_dataclasses((FigureOptions, *parts.values()), args, __doc__)
    evaluation = EvaluationOptions(**dict(zip(parts, parsed, strict=True)))
    rows = make_figure(figure, evaluation, Console(markup=False, highlight=False))
    PartialState().destroy_process_group()
    return rows


if __name__ == "__main__":
    run_command(main)
