"""An exported graph compared with PyTorch, at sizes and numbers of names that it was not traced with."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from spar_hf.export.graphs import DenseGraph
from spar_hf.export.options import DECIDING
from spar_hf.export.sources import Source, Words
from spar_hf.model.prompts import Vocabulary, embed_names
from spar_hf.model.results import OUTPUT_BYTES
from spar_hf.model.segmentation import bilinear_cells, class_probabilities, decide, patch_coordinates

Runner = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
MAX_LOGIT_ERROR = 1e-4  # float32, for logits of up to 40; those of a trained head may be larger
# below it nothing is written: least share of equal labels, and largest error of a cosine
AGREEMENT = {"fp32": (1.0, 1e-5), "fp16": (0.98, 0.01), "bf16": (0.85, 0.05), "int8": (0.7, 0.1)}
MAX_CONFIDENCE_ERROR = 2e-3  # float32 graphs: 1e-3 of `decide` among many names, and half precision
MAX_TIES = 1000  # labels of an image that may differ and are looked at one by one
LARGEST = 1024  # pixels of a side that is derived from the model's own size
NAMES = (1, 3, 150, 300)


@dataclass(frozen=True)
class Case:
    """
    One comparison.

    Attributes:
        title: what is special about it.
        size: height and width of the images that the model sees.
        image_size: height and width of the label map.
        batch: number of images.
        names: number of names, where they are an input.
        per_class: names of each class, where they are an input.
    """

    title: str
    size: tuple[int, int]
    image_size: tuple[int, int]
    batch: int = 1
    names: int = 3
    per_class: int = 1


@dataclass(frozen=True)
class Written:
    """
    A graph that was written.

    Attributes:
        path: of its file, relative to the folder.
        runs: functions that run it, and the part before the decision where there is one.
    """

    path: str
    runs: tuple[Runner, Runner | None]


class NotVerified(RuntimeError):
    """An exported graph does not compute what PyTorch computes, so it was not written."""


def cases(source: Source) -> list[Case]:
    """Sizes and numbers of names that no graph is traced with, see [`DenseGraph.example`]."""
    config = source.vision_model.config
    patch, side = config.patch_size, min(config.image_size, LARGEST // 2)
    half = max(2, side // patch // 2) * patch
    portrait = (side + half - 3, max(half - 5, patch + 1))
    large = (min(3 * side + 5, LARGEST), min(4 * side - 3, LARGEST + 331))
    return [
        Case("native grid", (side, side), (side, side), batch=2, names=3),
        Case("as many patches, another shape", (half, 2 * side), (side, 4 * side + 1), names=1),
        Case("portrait", portrait, (2 * portrait[0] + 1, 2 * portrait[1] - 1), names=150, per_class=2),
        Case("odd", (333, 517), (333, 517), names=300, per_class=3),
        Case("large", large, (large[0] // 2, large[1] // 3), names=150),
    ]


def within(case: Case, limits: dict[str, int] | None) -> Case:
    """A case within the largest `batch`, `side` and number of `names` that a format takes."""
    if limits is None:
        return case
    size = (min(case.size[0], limits["side"]), min(case.size[1], limits["side"]))
    return replace(case, size=size, batch=min(case.batch, limits["batch"]), names=min(case.names, limits["names"]))


def affordable(case: Case, classes: int) -> Case:
    """A case whose images are so small that the probabilities of all `classes` may be held, see `class_probabilities`."""
    height, width = case.image_size
    share = math.sqrt(OUTPUT_BYTES / (4 * classes * height * width))
    return case if share >= 1 else replace(case, image_size=(int(height * share), int(width * share)))


def verify(
    source: Source,
    head: str,
    words: Words | None,
    runs: dict[str, tuple[Runner, Runner | None]],
    chosen: list[Case],
) -> list[dict[str, Any]]:
    """
    Compare graphs with PyTorch.

    Args:
        source: the model.
        head: head of the graphs.
        words: names that are part of the graphs.
        runs: for every dtype a function that runs its graph, and for heads that decide one that gives the logits before, if
            the format has it.
        chosen: comparisons, such as [`cases`].

    Returns:
        A row per dtype and case: what was compared, and the largest errors.

    Raises:
        NotVerified: a graph is further from PyTorch than allowed ([`AGREEMENT`]).
    """
    reference = DenseGraph(source, head != "features", words)
    embeddings = None if reference.embeddings is not None or not source.has_text else name_embeddings(source)
    rows = []
    for case in chosen:
        inputs = inputs_of(source, case, words, embeddings)
        dense = dense_values(reference, inputs)
        expected = decided(head, dense, inputs, source) if head in DECIDING else {}
        for dtype, (run, run_dense) in runs.items():
            found = run(inputs)
            before = found if run_dense is None else run_dense(inputs)
            row = {"dtype": dtype, "case": case.title, "size": case.size, "batch": case.batch}
            row["names"] = len(inputs["class_of_name"]) if "class_of_name" in inputs else None
            row |= dense_errors(source, before, dense)
            if head in DECIDING:
                row["image_size"] = case.image_size
                row |= decision_errors(head, found, expected, dense, inputs, source, exact=dtype == "fp32")
            rows.append(row)
            check_row(row, tolerance(dense))
    return rows


def tolerance(logits: torch.Tensor) -> float:
    """How far logits may be off in float32."""
    return MAX_LOGIT_ERROR * max(1.0, float(logits.abs().max()) / 40)


def check_row(row: dict[str, Any], logit_error: float = MAX_LOGIT_ERROR) -> None:
    """
    Raises:
        NotVerified: an error of the row is too large.
    """
    share, cosine = AGREEMENT[row["dtype"]]
    limits = {"cosine_error": cosine, "relative_error": cosine}
    if row["dtype"] == "fp32":
        limits |= {"logit_error": logit_error, "confidence_error": MAX_CONFIDENCE_ERROR, "labels_wrong": 0}
    complaints = [
        f"{name} {row[name]:.2g} is above {limit:g}" for name, limit in limits.items() if not row.get(name, 0) <= limit
    ]
    if row["dtype"] != "fp32" and row.get("labels_equal", 1) < share:
        complaints.append(f"only {row['labels_equal']:.1%} of the labels are equal, and {share:.0%} are asked for")
    if complaints:
        size = "×".join(map(str, row["size"]))
        raise NotVerified(
            f"The {row['dtype']} graph differs from PyTorch at {size} pixels ({row['case']}, {row['names']} names): "
            f"{', '.join(complaints)}. Nothing was written. Leave this dtype out, or report it."
        )


def images(size: tuple[int, int], batch: int) -> np.ndarray:
    """Pictures of large coloured blobs with some noise `(batch, 3, height, width)`, between -1 and 1."""
    generator = torch.Generator().manual_seed(sum(size))
    blobs = torch.rand(batch, 3, 5, 7, generator=generator)
    blobs = nn.functional.interpolate(blobs, size=size, mode="bicubic", align_corners=False)
    noise = torch.randn(batch, 3, *size, generator=generator) * 0.1
    return (blobs * 2 - 1 + noise).clamp(-1, 1).numpy()


def name_embeddings(source: Source) -> torch.Tensor:
    """Embeddings of words `(300, dim)`: of the classes of ADE20K and COCO, where the tokenizer can tell them apart."""
    words = list(
        dict.fromkeys(n for set_name in ("ade20k", "coco-stuff") for n in Vocabulary.parse(set_name).all_names)
    )
    try:
        embeddings = embed_names(source.model, source.tokenizer, words[: NAMES[-1]], "plain").cpu()
    except ValueError:  # a tokenizer that knows other words
        embeddings = torch.zeros(0, source.model.config.projection_dim)
    if len(embeddings.unique(dim=0)) < NAMES[-1]:
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(NAMES[-1], embeddings.shape[1], generator=generator)
    return nn.functional.normalize(embeddings, dim=-1)


def inputs_of(
    source: Source, case: Case, words: Words | None, embeddings: torch.Tensor | None
) -> dict[str, np.ndarray]:
    """All inputs that a graph may have, and those of the decision."""
    inputs = {"pixel_values": images(case.size, case.batch), "image_size": np.array(case.image_size, dtype=np.int64)}
    if words is not None:
        inputs["class_of_name"] = words.class_of_name.numpy()
    elif embeddings is not None:
        inputs["text_embeds"] = embeddings[: case.names].numpy()
        inputs["class_of_name"] = (np.arange(case.names) // case.per_class).astype(np.int64)
    return inputs


@torch.no_grad()
def dense_values(graph: DenseGraph, inputs: dict[str, np.ndarray]) -> torch.Tensor:
    """Features or logits of PyTorch."""
    given = {name: torch.from_numpy(inputs[name]) for name in graph.example()}
    return next(iter(graph(**given).values()))


def dense_errors(source: Source, found: dict[str, np.ndarray], expected: torch.Tensor) -> dict[str, float]:
    """Largest differences of logits or features."""
    if "feature_map" in found:
        one, other = (nn.functional.normalize(x, dim=1) for x in (torch.from_numpy(found["feature_map"]), expected))
        return {"cosine_error": float((1 - (one * other).sum(1)).abs().max())}
    if "logits" not in found:
        return {}
    error = float((torch.from_numpy(found["logits"]) - expected).abs().max())
    if source.has_classes and not source.model.config.normalize_features:
        # no cosines: the largest logit is the measure
        return {"logit_error": error, "relative_error": error / max(1.0, float(expected.abs().max()))}
    return {"logit_error": error, "cosine_error": error / scale_of(source)}


def scale_of(source: Source) -> float:
    """What a cosine is multiplied by to give a logit."""
    if source.has_classes:
        return float(source.model.classifier.weight.norm(dim=1).max())
    return float(source.model.config.dense_logit_scale)


def geometry(source: Source, inputs: dict[str, np.ndarray]) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Patch, working size and image size: arguments of [`decide`]."""
    height, width = inputs["pixel_values"].shape[2:]
    return (
        source.vision_model.config.patch_size,
        (height, width),
        (int(inputs["image_size"][0]), int(inputs["image_size"][1])),
    )


def decided(head: str, logits: torch.Tensor, inputs: dict[str, np.ndarray], source: Source) -> dict[str, np.ndarray]:
    """The result of PyTorch for every image, from its logits."""
    classes, where = torch.from_numpy(inputs["class_of_name"]), geometry(source, inputs)
    if head == "probabilities":
        return {"probabilities": np.stack([class_probabilities(one, classes, *where)[1].numpy() for one in logits])}
    maps = [decide(one, classes, *where) for one in logits]
    return {
        "labels": np.stack([one.labels.numpy() for one in maps]),
        "confidence": np.stack([one.probabilities.numpy() for one in maps]),
    }


def decision_errors(
    head: str,
    found: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    logits: torch.Tensor,
    inputs: dict[str, np.ndarray],
    source: Source,
    exact: bool,
) -> dict[str, Any]:
    """
    Share of equal labels, largest difference of the probabilities where they are equal, and for `exact` graphs the number of
    labels that are wrong.

    A label that differs is wrong unless its logit in PyTorch is within twice [`tolerance`] of the best: the order of
    sums, which every library chooses for itself, decides between such classes.
    """
    if head == "probabilities":
        labels, other = found["probabilities"].argmax(1), expected["probabilities"].argmax(1)
        errors = found["probabilities"] - expected["probabilities"]
    else:
        labels, other = found["labels"].astype(np.int64), expected["labels"]
        errors = (found["confidence"] - expected["confidence"])[labels == other]
    if labels.shape != other.shape:
        raise NotVerified(f"The result has the shape {labels.shape} instead of {other.shape}.")
    found_errors: dict[str, Any] = {
        "labels_equal": float((labels == other).mean()),
        "confidence_error": float(np.abs(errors).max(initial=0.0)),
    }
    if exact:
        found_errors["labels_wrong"] = count_wrong(labels, other, logits, inputs, source)
    return found_errors


def count_wrong(
    labels: np.ndarray, other: np.ndarray, logits: torch.Tensor, inputs: dict[str, np.ndarray], source: Source
) -> int:
    """Labels `(images, height, width)` that differ from the `other` ones and have no nearly equal logit in `logits`."""
    patch, working_size, image_size = geometry(source, inputs)
    classes = torch.from_numpy(inputs["class_of_name"])
    axes = [
        patch_coordinates(length, working, patch, patches)
        for length, working, patches in zip(image_size, working_size, logits.shape[2:], strict=True)
    ]
    wrong, tie = 0, 2 * tolerance(logits)
    for one, two, values in zip(labels, other, logits.flatten(2), strict=True):
        rows, columns = (torch.from_numpy(place) for place in (one != two).nonzero())
        if len(rows) > MAX_TIES:
            return int((labels != other).sum())
        cells, weights = bilinear_cells(rows, columns, axes[0], axes[1], logits.shape[3])
        pixels = (values[:, cells] * weights).sum(-1)  # (names, pixels)
        best = [
            pixels.masked_fill(classes[:, None] != torch.from_numpy(chosen[one != two]).long(), -torch.inf).amax(0)
            for chosen in (one, two)
        ]
        wrong += int(((best[0] - best[1]).abs() > tie).sum())
    return wrong


def verify_text(source: Source, run: Runner) -> dict[str, Any]:
    """
    Compare the text tower with PyTorch, at other numbers of texts than it was traced with.

    Raises:
        NotVerified: an embedding differs.
    """
    worst = 0.0
    for names in (1, 5, 64):
        ids = token_ids(source, names)
        with torch.no_grad():
            expected = source.model.get_text_features(ids).pooler_output
        expected = nn.functional.normalize(expected.float(), dim=-1).numpy()
        worst = max(worst, float(np.abs(run({"input_ids": ids.numpy()})["text_embeds"] - expected).max()))
    if not worst <= AGREEMENT["fp32"][1]:
        raise NotVerified(f"The text tower differs from PyTorch by {worst:.2g}. Nothing was written.")
    return {"largest_error": worst}


def token_ids(source: Source, names: int) -> torch.Tensor:
    """Tokens of real words `(names, tokens)`."""
    words = [word for word in Vocabulary.parse("coco-stuff").all_names][:names]
    length = source.model.config.text_config.max_position_embeddings
    ids = source.tokenizer(words, padding="max_length", max_length=length, truncation=True)["input_ids"]
    return torch.tensor(ids)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines that show the comparisons."""
    for row in rows:
        shown = [f"{row['dtype']:5}", f"{'×'.join(map(str, row['size'])):>10}", f"batch {row['batch']}"]
        if row["names"] is not None:
            shown.append(f"{row['names']:4} names")
        if "logit_error" in row:
            shown.append(f"logits ±{row['logit_error']:.1e}")
        if "cosine_error" in row:
            shown.append(f"cosines ±{row['cosine_error']:.1e}")
        if "labels_equal" in row:
            wrong = f", {row['labels_wrong']} wrong" if "labels_wrong" in row else ""
            shown.append(f"labels {row['labels_equal']:.3%} equal{wrong}")
            shown.append(f"probabilities ±{row['confidence_error']:.1e}")
        yield "  ".join([*shown, f"({row['case']})"])
