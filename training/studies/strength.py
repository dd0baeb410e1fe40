"""
How well words find their pixels: one table over images a model was trained on, images kept out of the training, and classes
that were void in every mask it saw.

    python training/strength.py --data DATA --model base=BASE student=STUDENT --shortest_edge 384 --output strength

Sets, kept images and held-out classes are those of the recipe of `pretrain_tiny.py`. In the third part only pixels of
held-out classes are scored, on all images of a set, and all its words compete for them. Each part of a set is a measurement
of its own and stays in `--output`: a command that was cut off goes on. The commands behind a row are those of
`evaluate.py`, with the options that its JSON holds. Its mIoU counts a class that is predicted but in no mask of the part as
0, as mIoU does everywhere; few images hold few classes, so the mean over those in the masks stands beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import PartialState
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from spar_hf import pretraining
from spar_hf.evaluation.evaluator import evaluate_runs
from spar_hf.evaluation.metrics import mean_of_present
from spar_hf.evaluation.options import Options, choose_images
from spar_hf.evaluation.reports import percent
from spar_hf.utils.atomic import write_json
from spar_hf.utils.usage import run_script


@dataclass
class StrengthOptions:
    """Options of the table; every length is in pixels."""

    data: str = field(metadata={"help": "Folder that the paths of the recipe are relative to."})
    model: list[str] = field(metadata={"help": "NAME=FOLDER each."})
    output: str = field(default="strength", metadata={"help": "Folder to write."})
    recipe: str = field(
        default=str(Path(pretraining.__file__).with_name("spar_tiny_data.yaml")),
        metadata={"help": "YAML with the sets and the held-out words."},
    )
    runs: list[str] | None = field(
        default=None, metadata={"help": "As in evaluate.py. Default: every model in one pass."}
    )
    shortest_edge: int = field(default=384, metadata={"help": "Resize images to this shorter side."})
    limit: int | None = field(default=None, metadata={"help": "Only the first images of every part, this many."})


def find_parts(options: StrengthOptions) -> Iterator[tuple[str, str, Options]]:
    """
    Of every set of the recipe its parts: the set, the part, and what to measure for it.

    Raises:
        ValueError: a file that is no recipe. FileNotFoundError: a set of it is not there.
    """
    recipe = yaml.safe_load(Path(options.recipe).read_text(encoding="utf-8"))
    if not isinstance(recipe, dict) or not {"sets", "held_out"} <= recipe.keys():
        raise ValueError(f"{options.recipe} is no recipe of pretrain_tiny.py: it has no `sets` or no `held_out`.")
    held_out = {word.lower() for word in recipe["held_out"]}
    for spec in recipe["sets"]:
        folder = Path(options.data) / spec["path"]
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; --data is what the recipe starts from.")
        every, exclude = spec.get("holdout_every", 0), spec.get("exclude")
        common: dict[str, Any] = {
            "dataset": str(folder),
            "model": options.model,
            "runs": options.runs,
            "shortest_edge": options.shortest_edge,
            "limit": options.limit,
        }
        kept = {"exclude": exclude, "holdout_every": every}
        labels = choose_images(Options(**common)).labels
        known = [label for label in labels if label not in held_out]
        if known:
            yield spec["path"], "trained on", Options(**common, **kept, holdout_rest=bool(every), only_classes=known)
        if known and every:
            yield spec["path"], "kept images", Options(**common, **kept, only_classes=known)
        elif known and exclude:
            yield spec["path"], "kept images", Options(**common, include=exclude, only_classes=known)
        unseen = [label for label in labels if label in held_out]
        if unseen:
            yield spec["path"], "new classes", Options(**common, only_classes=unseen)


def measure_strength(options: StrengthOptions, console: Console) -> list[dict[str, Any]]:
    """Measure what is missing and write `OUTPUT/strength.json`: a row per set, part and run."""
    rows = []
    for name, part, choice in list(find_parts(options)):  # all are looked at before the first is measured
        file = f"{name}-{part}.json".replace("/", "-").replace(" ", "-")
        choice.output = str(Path(options.output) / file)
        report = evaluate_runs(choice, console, reuse=True)
        for row in report["runs"]:
            present = [label for label in report["scored_classes"] if row["classes"][label]["labelled_pixels"]]
            scores = {name: row[name] for name in ("model", "inference", "mean_iou", "overall_accuracy")}
            scores["mean_iou_of_present"] = mean_of_present(
                np.array([row["classes"][label]["iou"] for label in present])
            )
            rows.append({"set": name, "part": part, "images": report["images"], "classes": present} | scores)
    if PartialState().is_main_process:
        write_json(Path(options.output) / "strength.json", {"rows": rows})
        print_rows(rows, console)
    return rows


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ("set", "part", "images", "classes", "model", "inference", "mIoU\n%", "of\npresent", "acc.\n%"):
        table.add_column(heading)
    for row in rows:
        counts = (str(row["images"]), str(len(row["classes"])))
        scores = [percent(row[name]) for name in ("mean_iou", "mean_iou_of_present", "overall_accuracy")]
        table.add_row(row["set"], row["part"], *counts, row["model"], row["inference"], *scores)
    console.print(table)


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    (options,) = HfArgumentParser(StrengthOptions, description=__doc__).parse_args_into_dataclasses(args)
    rows = measure_strength(options, Console(markup=False, highlight=False))
    PartialState().destroy_process_group()
    return rows


if __name__ == "__main__":
    run_script(main)
