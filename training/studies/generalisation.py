"""
Generalisation table: mIoU on training images, held-out images and held-out classes.

    python training/studies/generalisation.py --data DATA --model base=BASE student=STUDENT --shortest_edge 384 \
        --output generalisation

Data sets, held-out images and held-out classes are those of a recipe of `pretrain_tiny.py`, which ignores held-out classes
in every mask. The third part scores only pixels of held-out classes, on all images of a data set, while all of its words
compete. Each part of a data set is a measurement of its own and stays in `--output`, so the same command continues after an
interruption; its JSON holds the options with which `evaluate.py` repeats it. mIoU counts a class that is predicted but in no
mask as 0, and few images hold few classes, so the table also has the mean over the classes that the masks hold.

Writes `OUTPUT/generalisation.json`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from rich import box
from rich.console import Console
from rich.table import Table

from spar_hf.evaluation import EvaluationOptions, evaluate_runs
from spar_hf.evaluation.dataset import open_whole
from spar_hf.evaluation.iou import mean_of_present
from spar_hf.evaluation.options import OutputOptions
from spar_hf.evaluation.reports import percent, write_table
from spar_hf.pretraining.options import RECIPE, read_recipe
from spar_hf.utils.errors import MissingFiles, run_command
from spar_hf.utils.fields import option, required
from spar_hf.utils.options import HELP, parse_dataclasses

# the parts of the table, each with its names in earlier versions, under which reports may be stored
EARLIER_NAMES = {
    "training images": ("trained on",),
    "held-out images": ("kept images", "kept photos"),
    "held-out classes": ("new classes",),
}


@dataclass(kw_only=True)
class TableOptions:
    """Options of the table; every length is in pixels."""

    data: str = required("Folder that the paths of the recipe start from.")
    model: list[str] = required("Models as in evaluate.py, each as FOLDER or NAME=FOLDER.")
    output: str = option("generalisation", "Folder to write.")
    recipe: str = option(str(RECIPE), "YAML file with the data sets and the held-out words.")
    runs: list[str] | None = option(None, "Runs as in evaluate.py. Default: every model in a single pass.")
    shortest_edge: int = option(384, "Resize images to this shorter side.")
    limit: int | None = option(None, "At most this many images of every part.")
    overwrite: bool = option(False, HELP["overwrite"])


def find_parts(options: TableOptions) -> Iterator[tuple[str, str, EvaluationOptions]]:
    """
    The parts of every data set of the recipe: path of the set, name of the part, options of its measurement.

    Raises:
        MissingFiles: a data set is missing.
        UsageError: the recipe or an option is wrong.
    """
    recipe = read_recipe(options.recipe)
    held_out = {word.lower() for word in recipe["held_out"]}
    for spec in recipe["sets"]:
        folder = Path(options.data) / spec["path"]
        if not folder.is_dir():
            raise MissingFiles(f"{folder} is no folder. --data names the folder that the recipe's paths start from.")
        every, exclude = spec.get("holdout_every", 0), spec.get("exclude")
        everything = EvaluationOptions.from_flat(
            dataset=str(folder),
            model=options.model,
            runs=options.runs,
            shortest_edge=options.shortest_edge,
            limit=options.limit,
        )
        labels = open_whole(everything.data).labels
        known, unseen = ([label for label in labels if (label in held_out) == out] for out in (False, True))

        def part(classes: list[str], base: EvaluationOptions = everything, **images: Any) -> EvaluationOptions:
            words = replace(base.words, only_classes=classes)
            return replace(base, words=words, data=replace(base.data, **images))

        split = {"exclude": exclude, "holdout_every": every}
        if known:
            yield spec["path"], "training images", part(known, **split, holdout_rest=bool(every))
        if known and every:
            yield spec["path"], "held-out images", part(known, **split)
        elif known and exclude:
            yield spec["path"], "held-out images", part(known, include=exclude)
        if unseen:
            yield spec["path"], "held-out classes", part(unseen)


def report_file(output: Path, name: str, part: str) -> Path:
    """The file of a part's report, under an earlier name if that or its partial counts are there."""
    files = [
        output / f"{name}-{word}.json".replace("/", "-").replace(" ", "-") for word in (part, *EARLIER_NAMES[part])
    ]
    return next((file for file in files if file.is_file() or Path(f"{file}.parts").is_dir()), files[0])


def measure_table(options: TableOptions, console: Console) -> list[dict[str, Any]]:
    """Measure what is missing and write `OUTPUT/generalisation.json`: a row for each data set, part and run."""
    rows, output = [], Path(options.output)
    for name, part, choice in list(find_parts(options)):  # checks all data sets before the first is measured
        files = OutputOptions(output=str(report_file(output, name, part)))
        report = evaluate_runs(replace(choice, output=files), console, reuse=True)
        for row in report["runs"]:
            present = [label for label in report["scored_classes"] if row["classes"][label]["labelled_pixels"]]
            iou = np.array([row["classes"][label]["iou"] for label in present], float)
            scores = {score: row[score] for score in ("model", "inference", "mean_iou", "overall_accuracy")}
            scores["mean_iou_of_present"] = mean_of_present(iou)
            rows.append({"set": name, "part": part, "images": report["images"], "classes": present} | scores)
    if PartialState().is_main_process:
        write_table(output / "generalisation.json", {"rows": rows}, options.overwrite)
        console.print(make_table(rows))
    return rows


def make_table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ("set", "part", "images", "classes", "model", "inference", "mIoU\n%", "of\npresent", "acc.\n%"):
        table.add_column(heading)
    for row in rows:
        counts = (str(row["images"]), str(len(row["classes"])))
        scores = [percent(row[name]) for name in ("mean_iou", "mean_iou_of_present", "overall_accuracy")]
        table.add_row(row["set"], row["part"], *counts, row["model"], row["inference"], *scores)
    return table


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse options, measure, print the table. Returns its rows."""
    (options,) = parse_dataclasses([TableOptions], args, __doc__)
    rows = measure_table(options, Console(markup=False, highlight=False))
    PartialState().destroy_process_group()
    return rows


if __name__ == "__main__":
    run_command(main)
