"""Opens the data set of an evaluation: its images, its classes, and the words for them."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from spar_hf.data.benchmarks import open_benchmark
from spar_hf.data.hub_sets import open_hugging_face
from spar_hf.data.order import is_held_out
from spar_hf.data.segmentation_sets import (
    SegmentationSet,
    class_label,
    open_folder,
    passes,
    read_classes,
)
from spar_hf.evaluation.options import DataOptions, WordOptions
from spar_hf.model.prompts import Vocabulary, resolve_templates
from spar_hf.utils.errors import MissingFiles, UsageError, as_usage_errors
from spar_hf.utils.texts import read_text

NAMES_FORM = '{"car": ["car", "automobile"], "sky": ["sky"]}'  # of a --class_names file
HUGGING_FACE = ("split", "subset", "image_column", "mask_column", "ignore_index", "reduce_zero_label")


def open_whole(options: DataOptions, vocabulary: str | None = None) -> SegmentationSet:
    """
    Open the data set that `--dataset` names, with all of its images.

    Args:
        options: `dataset`, `benchmark` and the options of Hugging Face data sets are used.
        vocabulary: built-in vocabulary with the classes of a Hugging Face data set, if `--classes` is not given.

    Raises:
        MissingFiles: the folder or a part of it is missing.
        UsageError: the classes of a Hugging Face data set are unknown, or its options are given for another kind of set.
    """
    folder = Path(options.dataset)
    parts = [name for name in ("images", "masks", "classes.txt") if (folder / name).exists()]
    if options.benchmark is not None or (folder / "images").is_dir() or len(parts) > 1:
        defaults = {entry.name: entry.default for entry in fields(DataOptions)}
        if any(getattr(options, name) != defaults[name] for name in (*HUGGING_FACE, "classes")):
            raise UsageError(
                "--split, --subset, --image_column, --mask_column, --classes, --ignore_index and --reduce_zero_label are "
                f"for Hugging Face data sets; {options.dataset} is a {options.benchmark or 'folder of images and masks'}."
            )
        if options.benchmark is not None:
            return open_benchmark(options.benchmark, folder)
        return open_folder(folder, readable=True)
    if folder.is_absolute() and not folder.is_dir():
        raise MissingFiles(f"--dataset {folder} is no folder.")
    if options.classes is not None:
        classes = read_classes(Path(options.classes))
    elif vocabulary is not None:
        with as_usage_errors():
            classes = list(Vocabulary.parse(vocabulary).labels)
    else:
        raise UsageError(
            f"{options.dataset} is not a folder of `images/`, `masks/` and `classes.txt`. Without --benchmark it is read "
            "as a Hugging Face data set: name its classes with --classes FILE or --vocabulary NAME."
        )
    return open_hugging_face(options.dataset, classes, **{name: getattr(options, name) for name in HUGGING_FACE})


def open_dataset(options: DataOptions, vocabulary: str | None = None) -> SegmentationSet:
    """
    Open the data set that `--dataset` names, with the images that the options choose.

    Args:
        options: choice of the images.
        vocabulary: see [`open_whole`].

    Raises:
        MissingFiles: no image is left.
        UsageError: see [`open_whole`].
    """
    data = open_whole(options, vocabulary)
    chosen = [i for i, name in enumerate(data.names) if passes(name, exclude=options.exclude)]
    if every := options.holdout_every:
        chosen = [i for k, i in enumerate(chosen) if is_held_out(k, every) != options.holdout_rest]
    chosen = [i for i in chosen if passes(data.names[i], options.include)][: options.limit]
    if not chosen:
        raise MissingFiles(
            f"--include, --exclude, --holdout_every and --limit leave no image of {options.dataset}. Change them."
        )
    return data.select(chosen)


def class_numbers(names: Sequence[str], labels: Sequence[str], option: str) -> list[int]:
    """
    Numbers of classes among `labels`, by name: as it stands there, or its [`class_label`]. A class that is named several
    times is there once, at its first place.

    Raises:
        UsageError: there is no such class; the message names the `option`.

    Example:

    ```python
    >>> class_numbers(["Sky", "tree-merged", "sky"], ["road", "sky", "tree"], "--only_classes")
    [1, 2]
    ```"""
    numbers = {class_label(label): number for number, label in enumerate(labels)}
    numbers |= {label: number for number, label in enumerate(labels)}
    found = [numbers.get(name, numbers.get(class_label(name))) for name in names]
    if unknown := [name for name, number in zip(names, found, strict=True) if number is None]:
        raise UsageError(f"{option}: no class is called {', '.join(unknown)}; there are {', '.join(labels)}.")
    return [number for number in dict.fromkeys(found) if number is not None]


def read_words(path: str) -> dict[str, Any]:
    """
    Read the words of a `--class_names` file by class.

    Raises:
        UsageError: the file is not JSON, or not of the form `{class: [name, …]}`.
    """
    try:
        words = json.loads(read_text(path))
    except ValueError as error:  # of JSON and of UTF-8
        raise UsageError(f"--class_names {path} is not JSON: {error}. Write {NAMES_FORM}.") from error
    if not isinstance(words, dict) or not all(isinstance(own, (str, list)) for own in words.values()):
        raise UsageError(f"--class_names {path} does not hold classes and their names. Write {NAMES_FORM}.")
    return words


def open_with_words(
    data: DataOptions, words: WordOptions, protocol_vocabulary: str | None = None
) -> tuple[SegmentationSet, Vocabulary, list[int]]:
    """
    Open the data set of an evaluation and choose the words for its classes.

    Args:
        data: choice of the images.
        words: choice of the classes and words.
        protocol_vocabulary: built-in vocabulary to use unless `words` names one.

    Returns:
        The data set, the words for its classes, and the numbers of the classes that are averaged over.

    Raises:
        MissingFiles, UsageError: see [`open_dataset`] and [`build_vocabulary`]; or there are no such templates.
    """
    if words.templates is not None:
        with as_usage_errors():
            resolve_templates(words.templates)
    opened = open_dataset(data, words.vocabulary).read_as(data)
    vocabulary, opened = build_vocabulary(
        opened, words.vocabulary or protocol_vocabulary, words.class_names, words.ignore_classes or ()
    )
    if words.only_classes is None:
        return opened, vocabulary, list(range(len(opened.labels)))
    return opened, vocabulary, class_numbers(words.only_classes, opened.labels, "--only_classes")


def build_vocabulary(
    data: SegmentationSet,
    vocabulary: str | None = None,
    class_names: str | None = None,
    ignore_classes: Sequence[str] = (),
) -> tuple[Vocabulary, SegmentationSet]:
    """
    The words for the classes of a data set, and the data set without ignored classes. A class has the names that its label
    has in a list of words: commas separate them.

    Args:
        data: the data set.
        vocabulary: built-in vocabulary with words for its classes, in their order.
        class_names: JSON file with words for some classes, which override all others.
        ignore_classes: classes whose pixels are ignored and that are not predicted.

    Raises:
        UsageError: an option names an unknown class, a vocabulary has another number of classes, the file `class_names`
            is wrong, or a word stands for two classes.
    """
    classes = data.labels
    names: dict[str, list[str]] = {}
    with as_usage_errors():
        built_in = None if vocabulary is None else Vocabulary.parse(vocabulary)
    if built_in is not None:
        if len(built_in.labels) != len(classes):
            raise UsageError(
                f"Vocabulary {vocabulary!r} has {len(built_in.labels)} classes, but {data.title} has {len(classes)}. Choose "
                "another --vocabulary, or name single classes with --class_names."
            )
        names = dict(zip(classes, map(list, built_in.names), strict=True))
    for name, own in ({} if class_names is None else read_words(class_names)).items():
        (number,) = class_numbers([name], classes, f"--class_names {class_names}")
        names[classes[number]] = [own] if isinstance(own, str) else own
    ignored = set(class_numbers(ignore_classes, classes, "--ignore_classes"))
    kept = tuple(label for number, label in enumerate(classes) if number not in ignored)
    try:
        own_names = {label: names.get(label) or list(Vocabulary.parse([label]).names[0]) for label in kept}
        words = Vocabulary.parse(own_names)
    except ValueError as error:
        raise UsageError(f"{error} --class_names gives classes other words.") from error
    # renumber the classes; ignored values and values that must not occur stay as they are
    numbers = np.array([kept.index(label) if label in kept else data.ignore_index for label in classes], np.int32)
    is_class = (data.table >= 0) & (data.table != data.ignore_index)
    table = np.where(is_class, numbers[np.where(is_class, data.table, 0)], data.table).astype(data.table.dtype)
    return words, replace(data, labels=kept, table=table)
