"""
What support images are worth beside words: mIoU and accuracy on held-out images with 1, 3 and 10 annotated images per class.

    python training/studies/support.py --data DATA/voc --holdout_every 10 --output support_voc
    python training/studies/support.py --data DATA/camvid/train --exclude "0006R0_*" "0016E5_*" \
        --support_data DATA/camvid/train --support_exclude "0001TP_*" --output support_camvid

Images are tested where they are held out (the last of every group of `--holdout_every`), support images are drawn from the
rest, or from `--support_data`. Every draw takes for each class that many images with at least one patch of it, and all
classes of such an image that were drawn. A class called "background" is the background of the pipeline (`"auto"`), and gets
examples from all images that were drawn.

Prints a table, and writes `OUTPUT/support.json`. Images are encoded once.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import pipeline

import spar_hf
from spar_hf.data.order import split_held_out
from spar_hf.data.segmentation_sets import SegmentationSet, open_folder
from spar_hf.evaluation.iou import area_scores, count_pixels
from spar_hf.model.background import BACKGROUND
from spar_hf.model.support import FILLED, mask_shares
from spar_hf.utils.atomic import write_json
from spar_hf.utils.checkpoints import check_replaceable
from spar_hf.utils.errors import UsageError, run_command
from spar_hf.utils.fields import option, required
from spar_hf.utils.options import HELP, parse_dataclasses


@dataclass(kw_only=True)
class SupportOptions:
    """Options of the study."""

    data: str = required("Folder with `images/`, `masks/` and `classes.txt` (also in its parent).")
    support_data: str | None = option(None, "Folder of the support images, with the same classes. Default: `data`.")
    model: str = option(spar_hf.SPAR_TINY, "Folder of a two-tower model.")
    holdout_every: int = option(0, "Test the last of every so many images, and draw support images from the others.")
    exclude: list[str] | None = option(None, "Shell patterns of images that are not tested.")
    support_exclude: list[str] | None = option(None, "Shell patterns of images that are no support images.")
    images_per_class: list[int] = option([1, 3, 10], "Support images per class.")
    draws: int = option(2, "Draws of support images.")
    penalties: list[float] | None = option(None, "Also with these penalties, in place of the chosen one.")
    limit: int | None = option(None, "Test at most this many images.")
    output: str = option("support", "Folder to write.")
    overwrite: bool = option(False, HELP["overwrite"])

    def __post_init__(self):
        if self.support_data is None and self.holdout_every < 2:
            raise UsageError(
                "Tested images must be no support images: give --support_data or --holdout_every 2 or more."
            )
        if min(self.images_per_class, default=0) < 1 or self.draws < 1:
            raise UsageError("--images_per_class and --draws need 1 or more.")
        check_replaceable([Path(self.output) / "support.json"], self.overwrite)


def draw(present: list[set[int]], classes: int, count: int, seed: int) -> list[tuple[int, int]]:
    """`count` images of each class where there are so many: pairs of image and class, sorted."""
    rng = random.Random(f"support-{seed}")
    found = []
    for label in range(classes):
        images = [i for i, there in enumerate(present) if label in there]
        found += [(i, label) for i in rng.sample(images, min(count, len(images)))]
    return sorted(found)


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse options, measure, print the table; return its rows."""
    (options,) = parse_dataclasses([SupportOptions], args, __doc__)
    tested = open_folder(options.data, readable=True, exclude=options.exclude)
    support = tested
    if options.support_data is not None:
        support = open_folder(options.support_data, readable=True, exclude=options.support_exclude)
        if support.labels != tested.labels:
            raise UsageError(f"{options.support_data} has other classes than {options.data}.")
    if options.holdout_every:
        kept, held_out = split_held_out(len(tested), options.holdout_every)
        support = support if options.support_data else tested.select(kept)
        tested = tested.select(held_out)
    numbers = range(len(tested) if options.limit is None else min(options.limit, len(tested)))
    segment = pipeline("open-vocab-segmentation", model=options.model)
    images = [(segment.encode(tested.read_image(i)), tested.read_mask(i)) for i in tqdm(numbers, desc="encoding")]
    labels = list(tested.labels)
    words = {label: [label] for label in labels if label != BACKGROUND}

    def measure(images_per_class: int, seed: int | None) -> dict[str, Any]:
        """mIoU and accuracy with the support images that the pipeline has."""
        counts = np.zeros((len(labels), len(labels)), np.int64)
        for encoded, mask in tqdm(images, desc="measuring"):
            background = "auto" if BACKGROUND in labels else None
            found = segment(encoded, candidate_labels=words, output="map", background=background)
            table = np.array([labels.index(label) for label in found["labels"]])
            counts += count_pixels(table[found["map"]], mask, len(labels), tested.ignore_index)
        scores = area_scores(counts)
        row = {"images_per_class": images_per_class, "draw": seed, "penalty": segment.support.chosen}
        row["chosen"] = images_per_class > 0 and segment.support.penalty is None
        return {**row, "mean_iou": scores["mean_iou"], "accuracy": scores["overall_accuracy"]}

    rows = [measure(0, None)]
    present = [patches_of(support, i, segment) for i in tqdm(range(len(support)), desc="reading masks")]
    for count in options.images_per_class:
        for seed in range(options.draws):
            pairs = draw([there - ({labels.index(BACKGROUND)} if BACKGROUND in labels else set()) for there in present],
                         len(labels), count, seed)  # fmt: skip
            segment.clear_support()
            segment.add_support(examples_of(support, pairs, BACKGROUND in labels))
            for penalty in [None, *(options.penalties or [])]:
                segment.support.penalty = penalty
                rows.append(measure(count, seed))
    write_json(Path(options.output) / "support.json", {"model": options.model, "rows": rows})
    table = Table("images per class", "draw", "penalty", "mIoU", "accuracy", box=box.MARKDOWN)
    for row in rows:
        shown = f"{row['penalty']}{' (chosen)' if row['chosen'] else ''}" if row["images_per_class"] else "words only"
        values = (f"{100 * row[name]:.1f}" for name in ("mean_iou", "accuracy"))
        table.add_row(str(row["images_per_class"]), str(row["draw"]), shown, *values)
    Console().print(table)
    return rows


def patches_of(data: SegmentationSet, number: int, segment: Any) -> set[int]:
    """The classes of an image that fill at least half of a patch."""
    mask = data.read_mask(number)
    inputs = segment.preprocess(data.read_image(number))
    working = tuple(inputs["pixel_values"].shape[-2:])
    patch_size = segment.model.config.patch_size
    labels = [int(v) for v in np.unique(mask) if v != data.ignore_index]
    return {v for v in labels if float(mask_shares(mask == v, mask.shape, working, patch_size).max()) >= FILLED}


def examples_of(data: SegmentationSet, pairs: list[tuple[int, int]], background: bool) -> Any:
    """Triples for `add_support`, image by image, with the background of every image if there is that class."""
    for number in sorted({i for i, _ in pairs}):
        image, mask = data.read_image(number), data.read_mask(number)
        for label in sorted(label for i, label in pairs if i == number):
            yield image, mask == label, data.labels[label]
        surround = data.labels.index(BACKGROUND) if background else -1
        if (mask == surround).any():
            yield image, mask == surround, BACKGROUND


if __name__ == "__main__":
    run_command(main)
