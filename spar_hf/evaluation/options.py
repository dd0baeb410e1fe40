"""Options of the evaluation, and what they choose: images, classes, words, resolution."""

import fnmatch
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from spar_hf.data.benchmarks import (
    BENCHMARKS,
    SegmentationSet,
    class_label,
    open_benchmark,
    open_folder,
    open_hugging_face,
)
from spar_hf.data.segmentation_sets import VOID, read_classes
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.segmentation import check_shares

WORDS = '{"car": ["car", "automobile"], "sky": ["sky"]}'  # the form of a --labels file


@dataclass
class Options:
    """Options of the evaluation; every length is in pixels."""

    dataset: str = field(
        metadata={
            "help": "Folder with `images/`, `masks/` and `classes.txt` (also in its parent); with --benchmark that "
            "benchmark's usual folder; else a Hugging Face data set: hub id, folder of save_to_disk or of parquet files."
        }
    )
    model: list[str] = field(
        metadata={
            "help": "Two-tower models: folder or hub id of a SPAR model or a backbone of transformers each, or NAME=FOLDER."
        }
    )
    runs: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to measure, in this order: NAME:single, NAME:sliding:STRIDE (windows' features averaged, as in "
            "training), NAME:sliding-logits:STRIDE (their logits averaged, as in the published evaluation); the first two "
            "also refined, NAME:single+lposs. Default: every model in one pass."
        },
    )
    benchmark: str | None = field(
        default=None, metadata={"help": "--dataset holds this benchmark's validation split: " + ", ".join(BENCHMARKS)}
    )
    protocol: str | None = field(
        default=None,
        metadata={
            "help": "A published evaluation by name: spar. It sets resolution, templates, scale, background rules and words "
            "for a benchmark; each of the options for these overrides it."
        },
    )
    split: str | None = field(default=None, metadata={"help": "Split of a Hugging Face data set."})
    subset: str | None = field(
        default=None,
        metadata={
            "help": "Its configuration (the hub calls it subset), where it has several: the second argument of load_dataset."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Its column of images."})
    mask_column: str = field(default="mask", metadata={"help": "Its column of masks."})
    classes: str | None = field(
        default=None, metadata={"help": "Its classes: a text file, one a line in the order of the mask values."}
    )
    ignore_index: int = field(default=VOID, metadata={"help": "Its mask value that is void, beside 255."})
    reduce_zero_label: bool = field(default=False, metadata={"help": "Its 0 is void, and value v is class v - 1."})
    include: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={"help": "Only images whose stem matches one of these shell patterns."},
    )
    exclude: list[str] | None = field(
        default=None, metadata={"help": "No images whose stem matches one of these shell patterns."}
    )
    holdout_every: int = field(
        default=0,
        metadata={
            "help": "Only each n-th image: those that pretrain_tiny.py keeps out with `holdout_every: n`. Counted "
            "after --exclude (give the recipe's) and before --include and --limit. 0: all images."
        },
    )
    holdout_rest: bool = field(default=False, metadata={"help": "All images but those of --holdout_every instead."})
    limit: int | None = field(default=None, metadata={"help": "Only the first images, this many."})
    shortest_edge: int | None = field(default=None, metadata={"help": "Resize images to this shorter side."})
    longest_edge: int | None = field(
        default=None, metadata={"help": "Resize to this longer side; beside --shortest_edge it is an upper bound."}
    )
    size: list[int] | None = field(default=None, metadata={"help": "Resize images to this height and width."})
    native: bool = field(
        default=False, metadata={"help": "Do not resize images. Default: the protocol's or the checkpoint's own size."}
    )
    vocabulary: str | None = field(
        default=None,
        metadata={"help": "Built-in vocabulary with the words for the classes, in the order of the set's classes."},
    )
    labels: str | None = field(
        default=None,
        metadata={"help": "JSON file {class: [name, …]} with the words for a class; others keep theirs."},
    )
    templates: str | None = field(
        default=None, metadata={"help": "Prompt templates: imagenet80, short or plain. Default: the checkpoint's."}
    )
    scale: float | None = field(
        default=None, metadata={"help": "Factor of the cosines before the softmax. Default: the checkpoint's."}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "Pixels whose best probability is below it become background."}
    )
    min_area: float | None = field(
        default=None,
        metadata={
            "help": "Before --threshold, classes that win at most this share of what is not background are struck off: "
            "their pixels go to the best class that is left, as in the published evaluation (the pipeline's own "
            "min_area gives them to the background)."
        },
    )
    ignore_classes: list[str] | None = field(
        default=None, metadata={"help": "Classes that are void in the masks and left out of the vocabulary."}
    )
    only_classes: list[str] | None = field(
        default=None,
        metadata={"help": "Classes that mIoU and accuracies are taken over; all names still compete for every pixel."},
    )
    boundary: bool = field(default=True, metadata={"help": "Measure boundary IoU as well."})
    dilation_ratio: float | None = field(
        default=None, metadata={"help": "Width of its boundaries in diagonals of the image. Default: 0.02."}
    )
    window_batch_size: int = field(default=16, metadata={"help": "Windows per forward pass of a sliding window."})
    warmup: bool = field(
        default=True,
        metadata={
            "help": "One forward per run on the first image before the clock runs. On a CPU also one more, for peak memory, "
            "there and on every image that has more pixels or a longer shape than all before."
        },
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16. Default: what `accelerate launch` was told."}
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON file to write. Partial counts lie in OUTPUT.parts until then: the same command goes on from them."
        },
    )
    card_folder: str | None = field(
        default=None, metadata={"help": "Folder to write each model's results to, as model cards hold them: NAME.md."}
    )
    save_seconds: float = field(default=30, metadata={"help": "Seconds between writing partial counts."})


def check_options(options: Options) -> None:
    """
    Complain about what can be seen to be wrong before anything is opened.

    Raises:
        ValueError: an option out of range, or an `--output` that is a folder.
    """
    lowest = {"limit": 1, "window_batch_size": 1, "shortest_edge": 1, "longest_edge": 1, "holdout_every": 0}
    for name, least in lowest.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")
    if min(options.size or [1]) < 1:
        raise ValueError(f"--size takes a height and a width of at least 1, got {options.size}.")
    if options.scale is not None and not options.scale > 0:
        raise ValueError(f"--scale must be above 0, got {options.scale}: with it the worst name would win.")
    if options.holdout_rest and not options.holdout_every:
        raise ValueError("--holdout_rest are the images that --holdout_every leaves: say which, 5 for every fifth.")
    check_shares(threshold=options.threshold or 0.0, min_area=options.min_area or 0.0)
    output = options.output
    if output is not None and (Path(output).is_dir() or output.endswith(("/", os.sep))):
        raise ValueError(
            f"--output {output} is a folder, but the report is a file: {Path(output) / 'result.json'}, say."
        )


def resize_options(options: Options) -> dict[str, Any] | None:
    """
    The working resolution as keywords of the image processor; `None` if the options leave it open.

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
    return {"do_resize": True, "size": edges} if edges else None


def open_set(options: Options) -> SegmentationSet:
    """
    The data set behind `--dataset`, whole.

    Raises:
        ValueError, FileNotFoundError: see `benchmarks.py`; options of Hugging Face data sets with another kind of set.
    """
    hugging_face = {
        name: getattr(options, name)
        for name in ("split", "subset", "image_column", "mask_column", "ignore_index", "reduce_zero_label")
    }
    folder = Path(options.dataset)
    parts = [name for name in ("images", "masks", "classes.txt") if (folder / name).exists()]
    if options.benchmark is not None or (folder / "images").is_dir() or len(parts) > 1:
        if options.classes is not None or any(value != getattr(Options, name) for name, value in hugging_face.items()):
            raise ValueError(
                "--split, --subset, --image_column, --mask_column, --classes, --ignore_index and --reduce_zero_label are "
                f"for Hugging Face data sets; {options.dataset} is a {options.benchmark or 'folder of images and masks'}."
            )
        return open_folder(folder) if options.benchmark is None else open_benchmark(options.benchmark, folder)
    if folder.is_absolute() and not folder.is_dir():
        raise FileNotFoundError(f"--dataset {folder} is no folder.")
    if options.classes is not None:
        classes = read_classes(Path(options.classes))
    elif options.vocabulary is not None:
        classes = list(Vocabulary.parse(options.vocabulary).labels)
    else:
        raise ValueError(
            f"{options.dataset} is no folder of `images/`, `masks/` and `classes.txt` (the benchmarks need --benchmark), so "
            "it is read as a Hugging Face data set. Name its classes with --classes FILE or --vocabulary NAME."
        )
    return open_hugging_face(options.dataset, classes, **hugging_face)


def choose_images(options: Options) -> SegmentationSet:
    """
    The data set with the images that the options leave.

    Raises:
        FileNotFoundError: no image is left, or see `open_set`.
    """
    data = open_set(options)
    every = options.holdout_every

    def matches(number: int, patterns: list[str]) -> bool:
        stem = Path(data.names[number]).name
        return any(fnmatch.fnmatch(stem, pattern) for pattern in patterns)

    chosen = [i for i in range(len(data)) if not matches(i, options.exclude or [])]
    chosen = [i for k, i in enumerate(chosen) if not every or (k % every == every - 1) != options.holdout_rest]
    chosen = [i for i in chosen if matches(i, options.include)][: options.limit]
    if not chosen:
        raise FileNotFoundError(
            f"--include, --exclude, --holdout_every and --limit leave no image of {options.dataset}."
        )
    return data.select(chosen)


def indices(names: list[str] | tuple[str, ...], labels: tuple[str, ...], option: str) -> list[int]:
    """
    Where the classes called `names` stand among `labels`.

    Raises:
        ValueError: there is no such class.
    """
    unknown = [name for name in names if class_label(name) not in labels]
    if unknown:
        raise ValueError(f"{option}: no class is called {', '.join(unknown)}; there are {', '.join(labels)}.")
    return [labels.index(class_label(name)) for name in names]


def read_words(path: str) -> dict[str, Any]:
    """
    The words of a `--labels` file by class.

    Raises:
        ValueError: no JSON, or none of the form `{class: [name, …]}`.
    """
    try:
        words = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"--labels {path} is no JSON: {error}. Write {WORDS}.") from error
    if not isinstance(words, dict) or not all(isinstance(own, (str, list)) for own in words.values()):
        raise ValueError(f"--labels {path} does not hold classes and their names. Write {WORDS}.")
    return words


def build_vocabulary(
    data: SegmentationSet, options: Options, words: str | None = None
) -> tuple[Vocabulary, SegmentationSet]:
    """
    The vocabulary, and the data set in its classes: without those that are ignored.

    Args:
        data: the set.
        options: of these, `labels` and `ignore_classes`.
        words: built-in vocabulary to take the names of the classes from, in their order.

    Raises:
        ValueError: an unknown class in an option, a `--labels` file of another form, a vocabulary of another size, or a
            word for two classes.
    """
    labels = data.labels
    names: dict[str, list[str]] = {label: [label] for label in labels}
    if words is not None:
        built_in = Vocabulary.parse(words)
        if len(built_in.labels) != len(labels):
            raise ValueError(
                f"Vocabulary {words!r} has {len(built_in.labels)} classes, but {data.title} has {len(labels)}. Choose "
                "another one, or name single classes with --labels."
            )
        names = dict(zip(labels, map(list, built_in.names), strict=True))
    if options.labels is not None:
        for name, own in read_words(options.labels).items():
            label = labels[indices([name], labels, f"--labels {options.labels}")[0]]
            names[label] = [own] if isinstance(own, str) else own
    ignored = {labels[i] for i in indices(options.ignore_classes or [], labels, "--ignore_classes")}
    kept = tuple(label for label in labels if label not in ignored)
    vocabulary = Vocabulary.parse({label: names[label] for label in kept})
    # an old class -> its new number; void and values that must not occur stay what they are
    table = np.array([kept.index(label) if label in kept else VOID for label in labels], np.int16)
    is_class = (data.table >= 0) & (data.table != VOID)
    values = np.where(is_class, table[np.where(is_class, data.table, 0)], data.table).astype(np.int16)
    return vocabulary, replace(data, labels=kept, table=values)
