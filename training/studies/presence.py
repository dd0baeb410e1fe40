"""
Presence and background words: how well they say what is in an image, and the constants of the calibration.

    python training/studies/presence.py --data DATA --model spar_hf/assets/spar-tiny

Presence is measured on held-out images of `DATA/voc` (every tenth, 20 words) and `DATA/coco` (every fifth, 133 words): is a
class in the image or not? It is compared with the plain `score` of lists of 2 to 10 words, as people write them. Even images
fit the two constants (`CALIBRATION` of `spar_hf/model/presence.py`, or `presence_calibration` in a model's config.json), so
that classes that are there weigh as much as those that are not, and VOC as much as COCO. Odd images are reported.

Background words are measured on ten frames of `DATA/camvid/val` and on held-out images of COCO and VOC, with two or three of
the image's own classes as words: which share of their pixels, and of all others, is right without a background, with all
stuff words, and with those that are no synonym of a word.

Every image is encoded once. Writes `OUTPUT/presence.json`.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import pipeline

import spar_hf
from spar_hf.data.order import split_held_out
from spar_hf.data.segmentation_sets import SegmentationSet, open_folder
from spar_hf.model.presence import presence_odds
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.vocabularies import STUFF_WORDS
from spar_hf.utils.atomic import write_json
from spar_hf.utils.checkpoints import check_replaceable
from spar_hf.utils.errors import MissingFiles, run_command
from spar_hf.utils.options import HELP, parse_dataclasses

BACKGROUNDS = ("none", "all stuff words", "auto")
SETS = {"voc": 10, "coco": 5}  # group size of the hold-out rule, as in the recipe of spar-tiny
SURROUNDINGS = ("background", "null")  # labels that mean everything else
SHOWN = 0.01  # share of the image that a class covers at least to be a word of the second table


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study."""

    data: str = field(metadata={"help": "Folder with voc, coco and camvid/val."})
    model: str = field(default=spar_hf.SPAR_TINY, metadata={"help": "Folder of a two-tower model."})
    output: str = field(default="presence", metadata={"help": "Folder to write."})
    lists: int = field(default=6, metadata={"help": "Random lists of words for every image."})
    limit: int | None = field(default=None, metadata={"help": "At most this many images of every set."})
    overwrite: bool = field(default=False, metadata={"help": HELP["overwrite"]})


@dataclass
class Encoded:
    """An image with its mask: `encoded` is that of the pipeline, `mask` holds classes, 255 is ignored."""

    encoded: Any
    mask: np.ndarray

    def share(self, label: int) -> float:
        """Share of the image that a class covers."""
        return float((self.mask == label).mean())


def encode(segment: Any, data: SegmentationSet, numbers: list[int]) -> list[Encoded]:
    """Features and masks of some images."""
    return [Encoded(segment.encode(data.read_image(i)), data.read_mask(i)) for i in numbers]


def average_precision(truth: np.ndarray, values: np.ndarray) -> float:
    """Area under precision over recall, as a step function."""
    hits = truth[np.argsort(-values, kind="stable")]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


def area_under_roc(truth: np.ndarray, values: np.ndarray) -> float:
    """Probability that a class that is there has a larger value than one that is not; ties count half."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[place]
    there = truth.sum()
    return float((rank[truth].sum() - there * (there + 1) / 2) / (there * (len(truth) - there)))


def recall_and_precision(name: str, truth: np.ndarray, given: np.ndarray) -> dict[str, float]:
    """How many of those that are there are given, and how many of the given are there."""
    hits = float((truth & given).sum())
    return {f"{name}_recall": hits / max(truth.sum(), 1), f"{name}_precision": hits / max(given.sum(), 1)}


def fit_logistic(odds: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the logistic function with the least weighted cross-entropy, by Newton's method."""
    inputs, parameters = np.stack([odds, np.ones_like(odds)], 1), np.zeros(2)
    for _ in range(30):
        found = 1 / (1 + np.exp(-inputs @ parameters))
        gradient = inputs.T @ (weight * (found - truth))
        hessian = (inputs * (weight * found * (1 - found))[:, None]).T @ inputs
        parameters -= np.linalg.solve(hessian + 1e-9 * np.eye(2), gradient)
    return float(parameters[0]), float(parameters[1])


def measure_presence(segment: Any, name: str, labels: list[str], images: list[Encoded], lists: int) -> dict[str, Any]:
    """Odds and truth of every class in every image, and the `score` of classes in random lists of words."""
    rng = random.Random(f"lists-{name}")
    vocabulary = Vocabulary.parse({label: [label] for label in labels})
    odds = np.array([presence_odds(segment.texts, i.encoded.feature_map, vocabulary).cpu().numpy() for i in images])
    truth = np.array([[image.share(c) > 0 for c in range(len(labels))] for image in images])
    scores, places = [], []
    for i, image in enumerate(images):
        for _ in range(lists):
            chosen = rng.sample(range(len(labels)), rng.choice([2, 3, 5, 10]))
            found = segment(image.encoded, candidate_labels={labels[c]: [labels[c]] for c in chosen}, output="map")
            scores += found["scores"]
            places += [(i, c) for c in chosen]
    return {"odds": odds, "truth": truth, "scores": np.array(scores), "places": np.array(places).T}


def report_presence(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The constants fitted on even images, and a row per set: ranking by score and presence, precision and recall at 0.5."""
    odds, truth, weight = [], [], []
    for found in measured.values():
        even = found["truth"][::2].ravel()
        odds.append(found["odds"][::2].ravel())
        truth.append(even)
        weight.append(np.where(even, 0.5 / even.sum(), 0.5 / (~even).sum()))
    slope, offset = fit_logistic(*map(np.concatenate, (odds, truth, weight)))
    rows = {}
    for name, found in measured.items():
        places = tuple(found["places"])
        listed = found["truth"][places]
        odd, given = found["truth"][1::2].ravel(), slope * found["odds"][1::2].ravel() + offset >= 0
        recall, false = float(given[odd].mean()), float(given[~odd].mean())
        in_odd = places[0] % 2 == 1
        present = slope * found["odds"][places] + offset >= 0
        rows[name] = {
            "images": len(found["truth"]),
            "words": found["truth"].shape[1],
            "score_auc": area_under_roc(listed, found["scores"]),
            "score_ap": average_precision(listed, found["scores"]),
            "presence_auc": area_under_roc(listed, found["odds"][places]),
            "presence_ap": average_precision(listed, found["odds"][places]),
            # of classes in the lists: a `score` of 0.5 or more, and a presence of 0.5 or more
            **recall_and_precision("score", listed[in_odd], found["scores"][in_odd] >= 0.5),
            **recall_and_precision("presence", listed[in_odd], present[in_odd]),
            "listed_there": float(listed[in_odd].mean()),
            "there": float(odd.mean()),
            "recall": recall,
            "dropped": 1 - false,
            "precision": float(odd[given].mean()) if given.any() else 0.0,
            "precision_of_half": recall / (recall + false) if recall else 0.0,
        }
    return {"calibration": [slope, offset], "sets": rows}


def measure_background(segment: Any, labels: list[str], images: list[Encoded]) -> dict[str, dict[str, float]]:
    """
    Per kind of background, over all images: share of the words' pixels that are right, and of all others that are
    background. The words of an image are its three largest classes.
    """
    counts = {kind: np.zeros(4) for kind in BACKGROUNDS}
    for image in images:
        shares = {c: image.share(c) for c, label in enumerate(labels) if label not in SURROUNDINGS}
        words = [c for c in sorted(shares, key=lambda c: -shares[c])[:3] if shares[c] >= SHOWN]
        if not words:
            continue
        target = np.full(image.mask.shape, -1)
        for number, c in enumerate(words):
            target[image.mask == c] = number
        target[image.mask == 255] = 255
        vocabulary = Vocabulary.parse({labels[c]: [labels[c]] for c in words})
        for kind in BACKGROUNDS:
            background = {"none": None, "auto": "auto"}.get(kind, vocabulary.other_stuff())
            found = segment(image.encoded, candidate_labels=vocabulary, background=background, output="map")
            label_map = np.where(found["map"] == found["background"], -1, found["map"])
            asked, around = (target >= 0) & (target < 255), target == -1
            counts[kind] += [
                (label_map == target)[asked].sum(),
                asked.sum(),
                (label_map == -1)[around].sum(),
                around.sum(),
            ]
    return {
        kind: {"words": float(c[0] / max(c[1], 1)), "rest": float(c[2] / max(c[3], 1))} for kind, c in counts.items()
    }


def show(report: dict[str, Any]) -> None:
    """Print both tables and the constants."""
    table = Table(
        box=box.SIMPLE,
        title="Is a class in the image? In lists of 2 to 10 words: ranking, recall and precision from 0.5 on odd images; "
        "then min_presence=0.5 for all words on odd images",
    )
    for column in (
        "set",
        "score: AUC, AP; recall, precision",
        "presence: the same",
        "kept that are there",
        "dropped that are not",
        "precision",
    ):
        table.add_column(column)
    for name, row in report["sets"].items():
        table.add_row(
            f"{name}, {row['words']} words, {row['images']} images",
            *(
                f"{row[f'{kind}_auc']:.3f}, {row[f'{kind}_ap']:.3f}; "
                f"{row[f'{kind}_recall']:.0%}, {row[f'{kind}_precision']:.0%} of {row['listed_there']:.0%}"
                for kind in ("score", "presence")
            ),
            f"{row['recall']:.0%}",
            f"{row['dropped']:.0%}",
            f"{row['precision']:.0%} of {row['there']:.0%} there; {row['precision_of_half']:.0%} of half",
        )
    console = Console(width=150)
    console.print(table)
    console.print(f"CALIBRATION = ({report['calibration'][0]:.3f}, {report['calibration'][1]:.3f})")
    table = Table(box=box.SIMPLE, title="Background: pixels of the words that are right / others that are background")
    for column in ("images", *BACKGROUNDS):
        table.add_column(column)
    for name, kinds in report["background"].items():
        table.add_row(name, *(f"{kinds[kind]['words']:.0%} / {kinds[kind]['rest']:.0%}" for kind in BACKGROUNDS))
    console.print(table)


@torch.no_grad()
def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run the study; returns what it writes."""
    (options,) = parse_dataclasses((StudyOptions,), args)
    folder = Path(options.data)
    if missing := [name for name in (*SETS, "camvid/val") if not (folder / name).is_dir()]:
        raise MissingFiles(f"{folder} has no {', '.join(missing)}. --data names the folder that holds them.")
    check_replaceable([Path(options.output) / "presence.json"], options.overwrite)
    segment = pipeline("open-vocab-segmentation", model=options.model)
    measured, background = {}, {}
    for name, every in SETS.items():
        data = open_folder(folder / name, readable=True)
        images = encode(segment, data, split_held_out(len(data), every)[1][: options.limit])
        labels = [label for label in data.labels if label not in SURROUNDINGS]
        classes = [data.labels.index(label) for label in labels]
        background[name] = measure_background(segment, list(data.labels), images)
        table = np.full(256, 255)
        table[classes] = np.arange(len(classes))
        for image in images:
            image.mask = table[image.mask]
        measured[name] = measure_presence(segment, name, labels, images, options.lists)
    data = open_folder(folder / "camvid/val", readable=True)
    images = encode(segment, data, list(range(0, len(data), max(1, len(data) // 10)))[:10][: options.limit])
    background["camvid/val"] = measure_background(segment, list(data.labels), images)
    report = {**report_presence(measured), "background": background, "stuff_words": list(STUFF_WORDS)}
    Path(options.output).mkdir(parents=True, exist_ok=True)
    write_json(Path(options.output) / "presence.json", report)
    show(report)
    return report


if __name__ == "__main__":
    run_command(main)
