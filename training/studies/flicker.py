"""
What averaging over time does to a video: mIoU and flicker of `segment.stream` for several weights of the past and reaches of
motion, on a folder of frames with masks.

    python training/studies/flicker.py --data DATA/camvid/val --shortest_edge 480 --output flicker

Flicker is the share of pixels that change class from frame to frame although the image stands still. Frames are read in the
order of their names. Prints a table, and writes `OUTPUT/flicker.json`, and with `--strip N` a picture of N frames with and
without the average.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import pipeline

import spar_hf
from spar_hf.cli.overlays import overlay
from spar_hf.data.segmentation_sets import IGNORE_INDEX, open_folder
from spar_hf.evaluation.flicker import Flicker, is_next_frame
from spar_hf.model.video import FrameAverage
from spar_hf.utils.atomic import write_atomically, write_json
from spar_hf.utils.checkpoints import check_replaceable
from spar_hf.utils.errors import UsageError, run_command
from spar_hf.utils.fields import option, required
from spar_hf.utils.options import HELP, parse_dataclasses, require_positive


@dataclass(kw_only=True)
class FlickerOptions:
    """Options of the study."""

    data: str = required("Folder with `images/`, `masks/` and `classes.txt` (also in its parent), one sequence.")
    model: str = option(spar_hf.SPAR_TINY, "Folder of a two-tower model.")
    shortest_edge: int = option(480, HELP["shortest_edge"])
    smoothings: list[float] = option([0.0, 0.3, 0.6, 0.8], "Weights of the past.")
    motions: list[int] = option([0, 1, 2], "Patches that things may move from frame to frame.")
    limit: int | None = option(None, "At most this many frames, from the first one on.")
    strip: int = option(4, "Frames of the picture; 0 draws none.")
    output: str = option("flicker", "Folder to write.")
    overwrite: bool = option(False, HELP["overwrite"])

    def __post_init__(self):
        require_positive(self, "shortest_edge", "limit")
        if not self.smoothings or not self.motions:
            raise UsageError("--smoothings and --motions need a value at least.")
        check_replaceable([Path(self.output) / "flicker.json"], self.overwrite)


@dataclass
class Row:
    """What one way to average gives: counts of a confusion matrix `(classes, classes)`, and flicker."""

    smoothing: float
    motion: int
    average: FrameAverage
    flicker: Flicker
    confusion: np.ndarray

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur, in percent."""
        hits = self.confusion.diagonal()
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        return float(100 * (hits[union > 0] / union[union > 0]).mean())


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse options, measure, print the table; return its rows."""
    (options,) = parse_dataclasses([FlickerOptions], args, __doc__)
    data = open_folder(Path(options.data))
    labels = list(data.labels)
    segment = pipeline("open-vocab-segmentation", model=options.model)
    ways = [(smoothing, motion) for smoothing in options.smoothings for motion in options.motions]
    ways = [way for way in ways if way[0] > 0 or way[1] == options.motions[0]]  # without a past motion changes nothing
    empty = np.zeros((len(labels), len(labels)), np.int64)
    rows = [Row(s, m, FrameAverage(s, m), Flicker(), empty.copy()) for s, m in ways]
    order = sorted(range(len(data)), key=lambda number: data.names[number])[: options.limit]
    chosen = set(np.linspace(0, len(order) - 1, options.strip).round().astype(int).tolist()) if options.strip else set()
    pictures = []
    for position, number in enumerate(tqdm(order, desc="frames")):
        image, reference = data.read(number)
        encoded = segment.encode(image, size={"shortest_edge": options.shortest_edge})
        begins = position > 0 and not is_next_frame(data.place(order[position - 1]), data.place(number))
        maps = []
        for row in rows:
            if begins:  # averages see a cut
                row.flicker.begin()
            found = segment(row.average(encoded), candidate_labels=labels, output="map")["map"]
            row.flicker.add(image, found)
            known = reference != IGNORE_INDEX
            pairs = reference[known].astype(np.int64) * len(labels) + found[known]
            row.confusion += np.bincount(pairs, minlength=empty.size).reshape(empty.shape)
            maps.append(found)
        if position in chosen:
            pictures.append([overlay(image, found, labels, legend=False) for found in (maps[0], maps[-1])])
    report = [
        {"smoothing": r.smoothing, "motion": r.motion, "mean_iou": r.mean_iou, "flicker": r.flicker.value}
        | {"scene_cuts": r.average.cuts}
        for r in rows
    ]
    show(report, len(order))
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "flicker.json", {"options": vars(options), "frames": len(order), "rows": report})
    if pictures:
        write_atomically(output / "strip.png", lambda path: strip(pictures).save(path, "PNG"))
    return report


def show(report: list[dict[str, Any]], frames: int) -> None:
    """Print the table."""
    table = Table(
        "smoothing", "motion", "mIoU %", "flicker %", "scene cuts", title=f"{frames} frames", box=box.SIMPLE_HEAD
    )
    for row in report:
        figures = (f"{row['mean_iou']:.2f}", f"{100 * row['flicker']:.2f}", str(row["scene_cuts"]))
        table.add_row(f"{row['smoothing']:g}", str(row["motion"]), *figures)
    Console().print(table)


def strip(pictures: list[list[Image.Image]]) -> Image.Image:
    """Frames from left to right: above by themselves, below with the last way to average."""
    width, height = pictures[0][0].size
    sheet = Image.new("RGB", (width * len(pictures), height * 2))
    for column, pair in enumerate(pictures):
        for line, picture in enumerate(pair):
            sheet.paste(picture.resize((width, height)), (column * width, line * height))
    return sheet


if __name__ == "__main__":
    run_command(main)
