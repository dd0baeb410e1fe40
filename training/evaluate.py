"""
Mean intersection over union of open-vocabulary segmentation on a folder of photos with masks: one pass, a sliding
window at any stride, or several models and ways side by side with their times.

    accelerate launch training/evaluate.py --dataset DATA/camvid/train --include "0001TP_*" --shortest_edge 720 \
        --model base=BASE student=STUDENT --runs base:single base:sliding:24 student:single --output result.json

A folder holds `images/`, `masks/` (8-bit PNG of the same stem, 255 = void) and `classes.txt`; its class names are the
vocabulary. Predictions are scored at the size of the mask. The runs take turns photo by photo, so that whatever else
the machine does slows all of them alike. Photos are split over processes; without a GPU, two are started with
`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2` (`--cpu` would start only one).
"""

import fnmatch
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Python looks for modules beside a script first, where this very file hides the package `evaluate`: look there last
sys.path.sort(key=lambda path: Path(path).resolve() == Path(__file__).resolve().parent)

import numpy as np
import torch
from accelerate import Accelerator
from data import VOID, open_segmentation_folder, read_mask, readable_name
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from spar_hf import SparForOpenVocabSegmentation, SparProcessor
from spar_hf.image_processing_spar import read_image
from spar_hf.metrics import MeanIoU, mean_of_present
from spar_hf.prompts import Vocabulary, embed_names
from spar_hf.segmentation import decide
from spar_hf.teacher import SlidingWindowTeacher


@dataclass
class Options:
    """Options of the evaluation; every length is in pixels."""

    dataset: str = field(metadata={"help": "Folder with `images/`, `masks/` and `classes.txt` (also in its parent)."})
    model: list[str] = field(
        metadata={
            "help": "Two-tower models: folder or hub id of a SPAR model or a backbone of transformers each, or NAME=FOLDER."
        }
    )
    runs: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to measure, in this order: NAME:single or NAME:sliding:STRIDE. Default: every model in one "
            "pass."
        },
    )
    include: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={"help": "Only photos whose stem matches one of these shell patterns."},
    )
    exclude: list[str] | None = field(
        default=None, metadata={"help": "No photos whose stem matches one of these shell patterns."}
    )
    holdout_every: int = field(
        default=0,
        metadata={
            "help": "Only each n-th photo: those that pretrain_tiny.py keeps out with `holdout_every: n`. Counted "
            "after --exclude (give the recipe's) and before --include and --limit. 0: all photos."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first photos, this many."})
    shortest_edge: int | None = field(default=None, metadata={"help": "Resize photos to this shorter side."})
    longest_edge: int | None = field(
        default=None, metadata={"help": "Resize to this longer side; beside --shortest_edge it is an upper bound."}
    )
    size: list[int] | None = field(default=None, metadata={"help": "Resize photos to this height and width."})
    native: bool = field(default=False, metadata={"help": "Do not resize photos. Default: the checkpoint's own size."})
    labels: str | None = field(
        default=None,
        metadata={"help": "JSON file {class: [name, …]} with the words for a class; others keep the data set's name."},
    )
    ignore_classes: list[str] | None = field(
        default=None, metadata={"help": "Classes that are void in the masks and left out of the vocabulary."}
    )
    only_classes: list[str] | None = field(
        default=None,
        metadata={"help": "Classes that mIoU and accuracies are taken over; all names still compete for every pixel."},
    )
    window_batch_size: int = field(default=16, metadata={"help": "Windows per forward pass of a sliding window."})
    warmup: bool = field(
        default=True, metadata={"help": "One forward per run on the first photo before the clock runs."}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16. Default: what `accelerate launch` was told."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


@dataclass(frozen=True)
class Run:
    """One line of the table: a model, in one pass (`stride` is `None`) or as a sliding window."""

    model: str
    stride: int | None

    @property
    def inference(self) -> str:
        return "single pass" if self.stride is None else f"sliding, stride {self.stride}"


def parse_models(items: Sequence[str]) -> dict[str, str]:
    """
    `NAME=FOLDER` or `FOLDER` -> `{name: folder}`; a folder without a name is called as it is.

    Raises:
        ValueError: two models of one name, or a name with a colon.
    """
    models: dict[str, str] = {}
    for item in items:
        name, separator, folder = item.partition("=")
        if not separator or Path(item).is_dir():  # a folder may have an equals sign in its own name
            name, folder = Path(item).name, item
        if name in models or ":" in name or not name or not folder:
            raise ValueError(
                f"Cannot call a model {name!r} in --model {item}: use NAME=FOLDER, with names that differ."
            )
        models[name] = folder
    return models


def parse_runs(items: Sequence[str] | None, models: dict[str, str]) -> list[Run]:
    """
    `NAME:single` and `NAME:sliding:STRIDE` -> runs, in the same order.

    Raises:
        ValueError: another form, or a name that no model has.
    """
    runs = []
    for item in items or [f"{name}:single" for name in models]:
        name, *way = item.split(":")
        if way == ["single"]:
            run = Run(name, None)
        elif len(way) == 2 and way[0] == "sliding" and way[1].isdecimal():
            run = Run(name, int(way[1]))
        else:
            raise ValueError(
                f"Cannot read --runs {item}: write NAME:single or NAME:sliding:STRIDE, e.g. base:sliding:24."
            )
        if name not in models:
            raise ValueError(f"--runs {item} names no model of --model; there are {sorted(models)}.")
        runs.append(run)
    return runs


def resize_options(options: Options) -> dict[str, Any]:
    """
    The working resolution as keywords of the image processor.

    Raises:
        ValueError: more than one of `--native`, `--size` and the edges, or `--size` without two numbers.
    """
    edges = {"shortest_edge": options.shortest_edge, "longest_edge": options.longest_edge}
    edges = {name: length for name, length in edges.items() if length is not None}
    if options.native + bool(options.size) + bool(edges) > 1:
        raise ValueError("Give one of --native, --size, or --shortest_edge and --longest_edge.")
    if options.native:
        return {"do_resize": False}
    if options.size:
        if len(options.size) != 2:
            raise ValueError(f"--size takes a height and a width, got {options.size}.")
        return {"do_resize": True, "size": dict(zip(("height", "width"), options.size, strict=True))}
    return {"do_resize": True, "size": edges} if edges else {}


def choose_photos(options: Options) -> tuple[tuple[str, ...], list[tuple[Path, Path]]]:
    """
    The lines of `classes.txt`, and the (image, mask) pairs that the options leave.

    Raises:
        FileNotFoundError: the layout is incomplete, or no photo is left.
    """
    folder = open_segmentation_folder(options.dataset, exclude=options.exclude)
    every = options.holdout_every
    pairs = [pair for i, pair in enumerate(folder.pairs) if not every or i % every == every - 1]
    pairs = [pair for pair in pairs if any(fnmatch.fnmatch(pair[0].stem, pattern) for pattern in options.include)]
    pairs = pairs[: options.limit]
    if not pairs:
        raise FileNotFoundError(f"--include, --exclude, --holdout_every and --limit leave no photo of {folder.path}.")
    return folder.classes, pairs


def class_label(name: str) -> str:
    """A data set's class as a person would call it; `null` says nothing, `background` does."""
    word = readable_name(name)
    return "background" if word == "null" else word


def indices(names: Sequence[str], labels: Sequence[str], option: str) -> list[int]:
    """
    Where the classes called `names` stand among `labels`.

    Raises:
        ValueError: there is no such class.
    """
    unknown = [name for name in names if class_label(name) not in labels]
    if unknown:
        raise ValueError(f"{option}: no class is called {', '.join(unknown)}; there are {', '.join(labels)}.")
    return [labels.index(class_label(name)) for name in names]


def build_vocabulary(classes: Sequence[str], options: Options) -> tuple[Vocabulary, np.ndarray]:
    """
    The vocabulary, and the table from mask values to its classes: `(256,)` uint8.

    Classes that read alike (`wall-merged`, `wall-other`) are one class: no word could tell them apart.

    Raises:
        ValueError: too many classes for 8-bit masks, an unknown class in an option, or a word for two classes.
    """
    if len(classes) > VOID:
        raise ValueError(f"classes.txt has {len(classes)} lines, but 8-bit masks hold {VOID} classes and void.")
    words = [class_label(name) for name in classes]
    labels = list(dict.fromkeys(words))
    ignored = {labels[i] for i in indices(options.ignore_classes or [], labels, "--ignore_classes")}
    kept = [label for label in labels if label not in ignored]
    names = {label: [label] for label in kept}
    if options.labels is not None:
        for name, own in json.loads(Path(options.labels).read_text(encoding="utf-8")).items():
            label = labels[indices([name], labels, f"--labels {options.labels}")[0]]
            if label in names:
                names[label] = [own] if isinstance(own, str) else own
    vocabulary = Vocabulary.parse(names)
    twice = sorted({name for name in vocabulary.all_names if vocabulary.all_names.count(name) > 1})
    if twice:
        raise ValueError(f"Words that stand for two classes or twice: {', '.join(twice)}. Correct --labels.")
    table = np.full(256, VOID, np.uint8)
    for value, word in enumerate(words):
        table[value] = VOID if word in ignored else kept.index(word)
    return vocabulary, table


def read_reference(path: Path, table: np.ndarray, classes: int, photo_size: tuple[int, int]) -> np.ndarray:
    """
    A mask in the classes of the vocabulary: `(height, width)` uint8.

    Raises:
        ValueError: a value that is no line of `classes.txt`, or another size than the photo's.
    """
    mask = read_mask(path)
    if mask.shape != photo_size:
        raise ValueError(
            f"{path} has {mask.shape[0]}×{mask.shape[1]} pixels (height × width), its photo {photo_size[0]}×"
            f"{photo_size[1]}. A mask lies on its photo pixel by pixel: resize it to the photo (nearest neighbour)."
        )
    wrong = [int(value) for value in np.unique(mask) if classes <= value != VOID]
    if wrong:
        raise ValueError(f"{path} holds the values {wrong}, but classes.txt has {classes} lines; void is {VOID}.")
    return table[mask]


class Candidate:
    """A model on its device with its image processor and the embeddings of the vocabulary."""

    def __init__(self, folder: str, vocabulary: Vocabulary, device: torch.device):
        self.model = SparForOpenVocabSegmentation.from_backbone(folder).to(device)
        processor = SparProcessor.from_backbone(folder)
        self.image_processor = processor.image_processor
        self.text_embeds = embed_names(self.model, processor.tokenizer, vocabulary.all_names).float()


def now(device: torch.device) -> int:
    """Nanoseconds, after all work that the device was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter_ns()


def share_closed(base: float, teacher: float, student: float) -> float | None:
    """Share of the gap between base and teacher that the student closes; `None` if there is no gap."""
    return (student - base) / (teacher - base) if teacher > base else None


def find_gaps(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    One entry for each teacher and student. The base is the first single pass, teachers are the sliding windows of its
    model, students the single passes of other models.
    """
    base = next((row for row in rows if row["stride"] is None), None)
    if base is None:
        return []
    return [
        {
            "base": base["model"],
            "teacher": f"{teacher['model']}, sliding window of stride {teacher['stride']}",
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


def make_row(run: Run, matrix: np.ndarray, seconds: np.ndarray, labels: Sequence[str], chosen: list[int]) -> dict:
    """Results of a run from its summed confusion matrix and its mean seconds per photo (vision, in all)."""
    metric = MeanIoU(len(labels), ignore_index=None)
    metric.merge(matrix)
    results = metric.compute()
    iou, accuracy = results["per_category_iou"], results["per_category_accuracy"]
    correct, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    pixels = int(labelled[chosen].sum())
    return {
        "model": run.model,
        "inference": run.inference,
        "stride": run.stride,
        "mean_iou": mean_of_present(iou[chosen]),
        "overall_accuracy": int(correct[chosen].sum()) / pixels if pixels else float("nan"),
        "mean_accuracy": mean_of_present(accuracy[chosen]),
        "vision_seconds": float(seconds[0]),
        "total_seconds": float(seconds[1]),
        "classes": {
            label: {
                "iou": float(iou[i]),
                "accuracy": float(accuracy[i]),
                "labelled_pixels": int(labelled[i]),
                "predicted_pixels": int(predicted[i]),
                "correct_pixels": int(correct[i]),
            }
            for i, label in enumerate(labels)
        },
    }


@torch.no_grad()
def predict(
    candidate: Candidate,
    run: Run,
    photo: Image.Image,
    vocabulary: Vocabulary,
    options: Options,
    accelerator: Accelerator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Label map `(height, width)` of a photo, and nanoseconds of the vision forward and in all: `(2,)`."""
    device = accelerator.device
    encoder = vision_model = candidate.model.vision_model
    if run.stride is not None:
        encoder = SlidingWindowTeacher(vision_model, stride=run.stride, window_batch_size=options.window_batch_size)
    start = now(device)
    inputs = candidate.image_processor(photo, return_tensors="pt", **resize_options(options))
    pixel_values = inputs["pixel_values"].to(device)
    before = now(device)
    with accelerator.autocast():
        feature_map = encoder(pixel_values).feature_map
    after = now(device)
    # in float32 from here on: half precision could not tell names of nearly the same cosine apart
    logits = candidate.model.dense_logits(feature_map.float(), candidate.text_embeds)[0]
    height, width = pixel_values.shape[-2:]
    prediction = decide(
        logits,
        vocabulary.name_to_class,
        candidate.model.config.patch_size,
        working_size=(height, width),
        output_size=(photo.height, photo.width),
    )
    labels = prediction.labels.cpu()
    return labels, torch.tensor([after - before, now(device) - start])


def evaluate_runs(options: Options) -> dict[str, Any]:
    """Measure all runs; every process gets the whole report."""
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    device = accelerator.device
    models = parse_models(options.model)
    runs = parse_runs(options.runs, models)
    resize_options(options)  # complain about its options before any work
    classes, pairs = choose_photos(options)
    vocabulary, table = build_vocabulary(classes, options)
    labels = vocabulary.labels
    chosen = indices(options.only_classes or labels, labels, "--only_classes")
    if options.output is not None:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)

    candidates = {name: Candidate(models[name], vocabulary, device) for name in {run.model: None for run in runs}}
    metrics = [MeanIoU(len(labels), ignore_index=VOID) for _ in runs]
    nanoseconds = torch.zeros(len(runs), 2, dtype=torch.int64)
    share = pairs[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(share, desc="photos", disable=not accelerator.is_main_process)
    for step, (image_path, mask_path) in enumerate(bar):
        photo = read_image(image_path)
        reference = read_reference(mask_path, table, len(classes), (photo.height, photo.width))
        for i, run in enumerate(runs):
            if options.warmup and step == 0:
                predict(candidates[run.model], run, photo, vocabulary, options, accelerator)
            prediction, spent = predict(candidates[run.model], run, photo, vocabulary, options, accelerator)
            nanoseconds[i] += spent
            metrics[i].add(prediction=prediction, reference=reference)

    matrices = torch.from_numpy(np.stack([metric.confusion_matrix for metric in metrics]))
    matrices = accelerator.reduce(matrices.to(device), "sum").cpu().numpy()
    seconds = accelerator.reduce(nanoseconds.to(device), "sum").cpu().numpy() / 1e9 / len(pairs)
    rows = [
        make_row(run, matrix, time, labels, chosen) for run, matrix, time in zip(runs, matrices, seconds, strict=True)
    ]
    first = next((row for row in rows if row["stride"] is None), None)
    for row in rows:
        row["time_ratio"] = row["vision_seconds"] / first["vision_seconds"] if first else None
    report = {
        "options": asdict(options),
        "photos": len(pairs),
        "vocabulary": dict(zip(labels, vocabulary.names, strict=True)),
        "scored_classes": [labels[i] for i in chosen],
        "runs": rows,
        "gaps": find_gaps(rows),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("spar-hf", "torch", "transformers", "accelerate", "numpy", "pillow")},
        },
    }
    if accelerator.is_main_process:
        if options.output is not None:
            write_json(report, Path(options.output))
        show(report, Console(markup=False, highlight=False))
    accelerator.end_training()
    return report


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write a report whole or not at all; JSON knows no NaN, so classes that do not occur get null."""

    def without_nan(value):
        if isinstance(value, dict):
            return {key: without_nan(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [without_nan(entry) for entry in value]
        return None if value != value else value

    temporary = path.with_name(f"{path.name}.tmp")
    text = json.dumps(without_nan(report), indent=2, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report as a table, and under it how much of the gap each student closes."""
    scored, classes = len(report["scored_classes"]), len(report["vocabulary"])
    of_classes = f"{classes} classes" if scored == classes else f"{scored} of {classes} classes"
    table = Table(title=f"{report['options']['dataset']}: {report['photos']} photos, {of_classes}")
    for heading in ("model", "inference"):
        table.add_column(heading)
    for heading in ("mIoU\n%", "pixel\nacc. %", "vision\ns/photo", "total\ns/photo", "vision\ntime"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["runs"]:
        table.add_row(
            row["model"],
            row["inference"],
            f"{100 * row['mean_iou']:.2f}",
            f"{100 * row['overall_accuracy']:.2f}",
            f"{row['vision_seconds']:.3f}",
            f"{row['total_seconds']:.3f}",
            "" if row["time_ratio"] is None else f"{row['time_ratio']:.2f} ×",
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


def main(args: list[str] | None = None) -> dict[str, Any]:
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses(args)
    return evaluate_runs(options)


if __name__ == "__main__":
    main()
