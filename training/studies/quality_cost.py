"""
Quality of students against the cost of their teachers: students with the same start, steps and seeds learn from the full
teacher and from samples of its windows.

    python training/studies/quality_cost.py --model BASE --images IMAGES --dataset DATA --output DIR --windows 5 10 20 40

Trains with `distill.py`, measures mIoU with `evaluate.py`, and writes `DIR/quality_cost.json` and `.png`. Finished runs
are not repeated, so the same command continues a study that was stopped. With other options, such as more windows, the table
of an earlier study there is only replaced with `--overwrite`.
"""

import itertools
import json
import logging
import random
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.table import Table

from spar_hf import SparVisionModel
from spar_hf.data.augmentation import draw_crop, view_generator
from spar_hf.data.sources import list_images
from spar_hf.distillation.recipes import parse_options
from spar_hf.model.image_input import open_image
from spar_hf.utils.atomic import write_atomically, write_json
from spar_hf.utils.checkpoints import check_replaceable, differences, list_checkpoints, settings_of
from spar_hf.utils.errors import UsageError, as_usage_errors, run_command
from spar_hf.utils.fields import option, required
from spar_hf.utils.options import parse_dataclasses
from spar_hf.windows import VARIANTS, WindowPlan

logger = logging.getLogger("quality_cost")
TRAINING = Path(__file__).parents[1]


@dataclass
class Options:
    """Options of the study. Names that `distill.py` has as well mean the same there."""

    model: str = required("Two-tower model: the teacher, and the start of every student.")
    images: list[str] = required("Folders of images to distil on.")
    dataset: str = required("Folder with `images/`, `masks/` and `classes.txt` to measure mIoU on.")
    output: str = required("Folder to write runs, table and picture to.")
    steps: int = option(1000, "Optimizer steps of every student.")
    windows: list[int] = option([5, 10, 20, 40], "Windows drawn per image.")
    variants: list[str] = option(list(VARIANTS), f"How they are drawn: {', '.join(VARIANTS)}.")
    images_per_step: list[int] = option(
        [1],
        "Images per optimizer step: one student of sampled windows for each number. Those of the full teacher have 1.",
        aliases=["--photos"],
    )
    full_steps: list[int] = option(
        [], "Also train with the full teacher for these numbers of steps: another way to save windows."
    )
    seeds: list[int] = option([0], "Seeds; every student is trained with each.")
    stride: int = option(24, "Stride of the teacher's windows in pixels.")
    distill: str = option("", 'More options of distill.py, in one string: --distill="--learning_rate 1e-4".')
    evaluate: str = option("", 'More options of evaluate.py, in one string: --evaluate="--shortest_edge 480".')
    overwrite: bool = option(False, "Replace the table of an earlier study with other options; its runs are kept.")

    def __post_init__(self):
        unknown = [variant for variant in self.variants if variant not in VARIANTS]
        if unknown or min([*self.windows, *self.images_per_step, *self.full_steps, self.steps], default=1) < 1:
            raise UsageError(
                f"--variants are of {', '.join(VARIANTS)}; --windows, --images_per_step, --steps and --full_steps are at "
                "least 1."
            )


@dataclass(frozen=True)
class Run:
    """One student; `windows` are those drawn per image, `None` for the full teacher."""

    variant: str
    windows: int | None
    images_per_step: int
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.windows or 'all'}x{self.images_per_step}-{self.steps}-{self.seed}"

    @property
    def kind(self) -> tuple[str, int | None, int, int]:
        """What students that differ in their seed alone have in common."""
        return self.variant, self.windows, self.images_per_step, self.steps


def plan_runs(options: Options) -> list[Run]:
    """All students, those of the full teacher first."""
    full = [("full", None, 1, steps) for steps in dict.fromkeys([options.steps, *options.full_steps])]
    ways = itertools.product(options.variants, options.images_per_step, options.windows)
    sampled = [(variant, windows, images_per_step, options.steps) for variant, images_per_step, windows in ways]
    return [Run(*kind, seed) for kind in full + sampled for seed in options.seeds]


def call(script: str, *arguments: Any) -> None:
    """
    Run a script of `training/`.

    Raises:
        RuntimeError: it failed; with the end of its error output.
    """
    command = [sys.executable, str(TRAINING / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")


def measure(model: str | Path, folder: Path, options: Options) -> float:
    """mIoU of a model in one pass."""
    report = folder / "evaluation.json"
    arguments = ("--dataset", options.dataset, "--model", f"student={model}", "--output", report, "--overwrite")
    call("evaluate.py", *arguments, *shlex.split(options.evaluate))
    return json.loads(report.read_text(encoding="utf-8"))["runs"][0]["mean_iou"]


def carry_out(run: Run, options: Options) -> dict[str, Any]:
    """
    Train and measure a student, or read what an earlier call found.

    Raises:
        UsageError: the folder holds a run of another setting.
    """
    folder = Path(options.output) / run.name
    arguments = ["--model", options.model, "--images", *options.images, "--output", folder, "--steps", run.steps]
    arguments += ["--seed", run.seed, "--stride", options.stride, "--gradient_accumulation_steps", run.images_per_step]
    if run.windows is not None:
        arguments += ["--teacher_windows", run.windows, "--teacher_variant", run.variant]
    arguments += shlex.split(options.distill)
    setting = [*map(str, arguments), options.dataset, *shlex.split(options.evaluate)]
    started, finished = folder / "setting.json", folder / "result.json"
    if started.is_file() and json.loads(started.read_text(encoding="utf-8")) != setting:
        raise UsageError(f"{folder} is a run with other options. Use another --output, or delete that folder.")
    if finished.is_file():
        return json.loads(finished.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, setting)
    call("distill.py", *arguments, *(["--resume"] if list_checkpoints(folder) else []))
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    held_out = config["distillation"]["held_out"]
    result = {
        "before": held_out["before"]["mse"],
        "mse": held_out["after"]["mse"],
        "mean_iou": measure(folder / "model", folder, options),
    }
    write_json(finished, result)
    return result


def windows_per_image(options: Options, most: int = 500) -> list[int]:
    """
    Windows that the full teacher needs for images as distillation draws them. The costs of the table are means over these: a
    sample of `n` windows costs `n` or, if that is less, all windows (for tilings on average).
    """
    with as_usage_errors():
        config = SparVisionModel.from_backbone(options.model).config
    own = ["--model", options.model, "--images", *options.images, "--output", options.output]
    recipe = parse_options([*own, *shlex.split(options.distill)])
    window = recipe.teacher.window_size or config.image_size
    paths = [path for folder in options.images for path in list_images(folder)]
    rng, counts = random.Random(0), []
    for index in range(most):
        image, _ = open_image(rng.choice(paths), urls=False)
        crop = draw_crop(image.size, window, config.patch_size, recipe.views, view_generator(options.seeds[0], index))
        counts.append(len(WindowPlan.make(*crop.size[::-1], window, options.stride, config.patch_size)))
    return counts


def summarise(
    runs: list[Run], results: list[dict[str, Any]], base: float, counts: list[int], options: Options
) -> list[dict]:
    """
    The rows of the table: a row per kind of student, mean over the seeds. Costs and gains are in percent of those of the
    full teacher with `--steps`.

    Args:
        base: mIoU of the model before distillation.
        counts: windows of the full teacher, for images as distillation draws them.
    """
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for run, result in zip(runs, results, strict=True):
        kinds.setdefault(run.kind, []).append(result)
    mean = {kind: {key: statistics.mean(r[key] for r in found) for key in found[0]} for kind, found in kinds.items()}
    full = mean["full", None, 1, options.steps]

    def share(gain: float, full_gain: float) -> float | None:
        return 100 * gain / full_gain if full_gain > 0 else None

    def cost(windows: int | None) -> float:
        return statistics.mean(count if windows is None else min(windows, count) for count in counts)

    return [
        {
            "variant": variant,
            "windows": windows,
            "images": images_per_step,
            "steps": steps,
            "seeds": len(found),
            "windows_in_all": cost(windows) * images_per_step * steps,
            "cost_percent": 100 * cost(windows) * images_per_step * steps / (cost(None) * options.steps),
            "mse": row["mse"],
            "mean_iou": row["mean_iou"],
            "mse_gain_percent": share(row["before"] - row["mse"], full["before"] - full["mse"]),
            "mean_iou_gain_percent": share(row["mean_iou"] - base, full["mean_iou"] - base),
            "mse_of_seeds": [r["mse"] for r in found],
            "mean_iou_of_seeds": [r["mean_iou"] for r in found],
        }
        for (variant, windows, images_per_step, steps), found in kinds.items()
        for row in [mean[variant, windows, images_per_step, steps]]
    ]


def draw(rows: list[dict], before: float, base: float, path: Path) -> None:
    """Draw held-out error and mIoU over the number of windows, a line per way to draw them."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")  # by itself it needs no display
    panels = figure.subplots(1, 2)
    for panel, key, start, factor, label in (
        (panels[0], "mse", before, 1, "held-out mean squared error"),
        (panels[1], "mean_iou", base, 100, "mIoU in %"),
    ):
        final = factor * rows[0][key]
        for variant, images_per_step in dict.fromkeys((row["variant"], row["images"]) for row in rows):
            own = [row for row in rows if (row["variant"], row["images"]) == (variant, images_per_step)]
            own.sort(key=lambda row: row["windows_in_all"])
            spent, values = [row["windows_in_all"] for row in own], [factor * row[key] for row in own]
            name = "full teacher" if variant == "full" else f"sampled: {variant}"
            name += f", {images_per_step} images per step" if images_per_step > 1 else ""
            line = panel.plot(spent, values, "o-", label=name, zorder=3, alpha=0.9)[0]
            for row in own:
                seeds = [factor * value for value in row[f"{key}_of_seeds"]]
                panel.plot([row["windows_in_all"]] * len(seeds), seeds, "_", color=line.get_color(), alpha=0.6)
                if row["windows"]:
                    style = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": line.get_color()}
                    panel.annotate(f"{row['windows']}", (row["windows_in_all"], factor * row[key]), (0, 6), **style)
        panel.axhline(factor * start, color="grey", linestyle=":", label="before distillation")
        gained = final < start if key == "mse" else final > factor * start
        if gained:
            almost = final + 0.05 * (factor * start - final)
            panel.axhline(almost, color="grey", linestyle="--", label="95 % of the full gain")
        panel.axvline(0.1 * rows[0]["windows_in_all"], color="grey", linewidth=0.8, label="10 % of the windows")
        panel.set(xscale="log", xlabel="teacher windows in total", ylabel=label)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(0.08, 0.12)
        panel.grid(alpha=0.25, which="both")
    for panel in panels:
        panel.legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def show(rows: list[dict], before: float, base: float) -> None:
    """Print the table."""
    table = Table(title=f"Before distillation: held-out error {before:.4f}, mIoU {100 * base:.2f} %")
    table.add_column("teacher")
    counts = ("windows\nper image", "images\nper step", "steps", "windows\nin total", "cost\n%")
    for heading in (*counts, "mse", "gain\n%", "mIoU\n%", "gain\n%"):
        table.add_column(heading, justify="right")

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    for row in rows:
        numbers = [str(row["windows"] or "all"), str(row["images"]), str(row["steps"]), f"{row['windows_in_all']:.0f}"]
        numbers += [percent(row["cost_percent"]), f"{row['mse']:.4f}", percent(row["mse_gain_percent"])]
        table.add_row(row["variant"], *numbers, f"{100 * row['mean_iou']:.2f}", percent(row["mean_iou_gain_percent"]))
    Console().print(table)


def study(options: Options) -> dict[str, Any]:
    """
    Carry out what is missing of the study; write and return its table.

    Raises:
        UsageError: the folder holds the table of other options, or a run of another setting.
    """
    output = Path(options.output)
    table = output / "quality_cost.json"
    settings = settings_of(options, {"output", "overwrite"})
    earlier = json.loads(table.read_text(encoding="utf-8"))["options"] if table.is_file() else settings
    if differences(earlier, settings):
        check_replaceable([table], options.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    counts = windows_per_image(options)
    runs, results = plan_runs(options), []
    for number, run in enumerate(runs):
        logger.info("%s (%d of %d)", run.name, number + 1, len(runs))
        results.append(carry_out(run, options))
    start, setting = output / "base.json", [options.model, options.dataset, options.evaluate]
    known = json.loads(start.read_text(encoding="utf-8")) if start.is_file() else {}
    if known.get("setting") != setting:
        known = {"setting": setting, "mean_iou": measure(options.model, output, options)}
        write_json(start, known)
    before, base = statistics.mean(result["before"] for result in results), known["mean_iou"]
    rows = summarise(runs, results, base, counts, options)
    report = {"options": vars(options), "before": {"mse": before, "mean_iou": base}, "rows": rows}
    write_json(table, report)
    draw(rows, before, base, output / "quality_cost.png")
    show(rows, before, base)
    return report


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Parse options and carry out the study; return its table."""
    (options,) = parse_dataclasses([Options], args, __doc__)
    report = study(options)
    logger.info("written: %s", Path(options.output) / "quality_cost.png")
    return report


if __name__ == "__main__":
    run_command(main)
