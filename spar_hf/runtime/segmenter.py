"""Open-vocabulary segmentation with an exported model, called as the pipeline is."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from logging import getLogger
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.model.background import BACKGROUND, ONE_CLASS, empty_background, resolve_classes
from spar_hf.model.image_columns import rows_of_images
from spar_hf.model.image_input import (
    ImageRange,
    as_list,
    check_container,
    check_range,
    image_of_item,
    is_encoded,
    is_tensor,
    read_image,
)
from spar_hf.model.image_pixels import (
    TOO_MANY_PATCHES,
    check_count,
    check_size,
    normalise_pixels,
    rescale_pixels,
    resize_pixels,
    rgb_pixels,
    token_limit,
    working_size,
)
from spar_hf.model.results import (
    as_segments,
    check_class_count,
    check_finite_features,
    check_shares,
    guarded,
    is_error,
)
from spar_hf.model.words import CandidateLabels, Vocabulary, normalise_name
from spar_hf.runtime.decisions import class_scores, decide, give_to_background
from spar_hf.runtime.engines import Graph
from spar_hf.runtime.folders import ExportedFolder
from spar_hf.runtime.texts import ExportedTexts

logger = getLogger(__name__)

OUTPUTS = ("segments", "map")
PIPELINE_ONLY = ("presence", "min_presence", "refine", "upsampler", "tile", "num_workers")


@dataclass(frozen=True)
class Classes:
    """
    The classes of a call.

    Attributes:
        labels: of the result, with the background's.
        background: its number among them; -1: there is none.
        hidden: whether segments leave it out.
        class_of_name: class of every name, `(names,)` int64.
        text_embeds: embeddings of the names `(names, dim)`; `None` where they are part of the graph.
    """

    labels: list[str]
    background: int
    hidden: bool
    class_of_name: np.ndarray
    text_embeds: np.ndarray | None


@dataclass(frozen=True)
class Prepared:
    """An image as the graph sees it, `(3, height, width)` float32, and the size of its label map."""

    pixel_values: np.ndarray
    original_size: tuple[int, int]


class OnnxSegmenter:
    """
    Open-vocabulary segmentation with a folder that `spar-hf export` wrote, without PyTorch and transformers.

    Images are read, resized and normalised, and words parsed and embedded, by the code of the pipeline. Results are those of
    the pipeline, with two limits: the graph of the head `classmap` gives probabilities in float16, so scores differ by up to
    0.0005, and so may pixels whose probability is that near to `threshold`; and dtypes other than float32 change labels (the
    export states how many). `presence`, `refine`, `upsampler` and `tile` are the pipeline's only.

    Args:
        folder (`str` or `os.PathLike`): the exported folder.
        engine (`str`, *optional*, defaults to `"onnxruntime"`):
            `"onnxruntime"`, or `"openvino"`, which reads exports of both formats. OpenVINO is told to compute in float32
            (`INFERENCE_PRECISION_HINT`), which it would not do by itself on CPUs with bfloat16.
        dtype (`str`, *optional*):
            `"fp32"`, `"fp16"`, `"bf16"` or `"int8"`: which of the folder's graphs is run. Default: the first of these that
            there is. With OpenVINO, `"bf16"` also computes a graph of weights in float32 in bfloat16.
        threads (`int`, *optional*): threads of one run. Default: the engine's choice, mostly one per core.

    Raises:
        FileNotFoundError: no exported folder, or a graph or file is missing.
        ImportError: the engine is not installed.
        ValueError: an unknown engine or dtype, a damaged file, or a head without words.

    Example:

    ```python
    segment = OnnxSegmenter("exported", engine="openvino")
    segment("street.jpg", candidate_labels=["road", "car, automobile"], background="auto")
    # [{"label": "road", "score": 0.83, "mask": <PIL.Image L, 0 or 255, size of the image>}, …]
    ```

    ```python
    >>> OnnxSegmenter("street.jpg")
    Traceback (most recent call last):
    FileNotFoundError: 'street.jpg' is no folder. Write it with `spar-hf export ...
    ```"""

    def __init__(
        self,
        folder: str | os.PathLike,
        engine: str = "onnxruntime",
        dtype: str | None = None,
        threads: int | None = None,
    ):
        self.folder = ExportedFolder.open(folder)
        path, kind = self.folder.graph(engine, dtype)
        self.engine, self.dtype, self.head = engine, kind, self.folder.record["head"]
        if self.head == "probabilities" or (self.head == "features" and self.folder.labels is not None):
            raise ValueError(
                f"{str(folder)!r} has the head {self.head!r}, which gives no label map. Export with `--head classmap`."
            )
        self.graph = Graph(path, engine, threads, kind)
        self.texts = ExportedTexts(self.folder, engine, threads)

    def __repr__(self) -> str:
        return f"OnnxSegmenter({str(self.folder.path)!r}, engine={self.engine!r}, dtype={self.dtype!r})"

    def __call__(
        self,
        inputs: Any,
        candidate_labels: CandidateLabels | Vocabulary | None = None,
        *,
        templates: str | Sequence[str] | None = None,
        size: Any = None,
        max_tokens: int | None = None,
        image_range: ImageRange | None = None,
        background: str | Sequence[str] | None = None,
        threshold: float = 0.0,
        min_area: float = 0.0,
        output: str = "segments",
        top_k: int | None = None,
        batch_size: int = 1,
        on_error: str = "raise",
        **others: Any,
    ) -> Any:
        """
        Segment an image or several.

        Args:
            inputs: as in the call of [`OpenVocabSegmentationPipeline`]; a generator or dataset gives an iterator.
            candidate_labels: as there; left out where the export has its classes in it, as are `templates`.
            background: as there; where the export has one in it, only `None`, `"auto"` or the label of that one.
            templates, size, max_tokens, image_range, threshold, min_area, on_error: as there.
            output: `"segments"` or `"map"`, as there.
            top_k: with `"segments"`, only so many of highest score, best first.
            batch_size: images that are read together, `None` for one; those of equal size share a run of the graph.

        Returns:
            Per image `[{"label", "score", "mask"}, …]`, or with `"map"` a dict of `map`, an int32 array `(height, width)`,
            `labels`, `scores` and `background`.

        Raises:
            ValueError: as the pipeline; or an option that only the pipeline has.
        """
        check_options(output, top_k, batch_size, on_error, others)
        check_shares(threshold=threshold, min_area=min_area)
        check_count("max_tokens", max_tokens)
        classes = self.classes(candidate_labels, background, bool(threshold or min_area), templates)
        if not (threshold or min_area):
            asked = self.folder.labels if candidate_labels is None else Vocabulary.parse(candidate_labels).labels
            if hint := ONE_CLASS if len(classes.labels) == 1 else empty_background(asked or (), background):
                warn_once(hint)
        skip = on_error == "skip"
        prepare = partial(self.prepare, size=size, max_tokens=max_tokens, image_range=image_range)
        finish = partial(finished, classes=classes, threshold=threshold, min_area=min_area, output=output, top_k=top_k)
        images = [inputs] if is_single(inputs) else as_list(inputs)
        if images is None:
            return self._results(readers(inputs), batch_size, skip, prepare, classes, finish)
        results = list(self._results(readers(images), batch_size, skip, prepare, classes, finish))
        return results[0] if is_single(inputs) else results

    def classes(
        self,
        candidate_labels: CandidateLabels | Vocabulary | None,
        background: str | Sequence[str] | None = None,
        rules: bool = False,
        templates: str | Sequence[str] | None = None,
    ) -> Classes:
        """
        The classes of a call with their embeddings.

        Args:
            candidate_labels, background, templates: as in the call.
            rules: whether pixels may be moved to the background, which then has a label if not words.

        Raises:
            ValueError: no or malformed labels, names that the tokenizer cannot tell apart, more classes than the graph's
                label map has numbers, or for an export that has its classes in it, words, templates or another background.
        """
        if self.folder.labels is not None:
            return self._baked(candidate_labels, background, rules, templates)
        if candidate_labels is None:
            raise ValueError('`candidate_labels` is missing. Name the classes to look for: ["road", "sky"].')
        asked = Vocabulary.parse(candidate_labels)
        vocabulary, labels, number = resolve_classes(self.texts, asked, background, rules, templates)
        hidden = number >= 0 and labels[number] not in asked.labels
        if self.head == "classmap":  # its label map has 16 bits
            check_class_count(len(labels))
        embeddings = self.texts.get(vocabulary.all_names, templates)
        return Classes(labels, number, hidden, np.array(vocabulary.classes_of_names), embeddings)

    def _baked(self, candidate_labels: Any, background: Any, rules: bool, templates: Any) -> Classes:
        """
        The classes that are part of the graph.

        Raises:
            ValueError: words, templates or a background that the graph was not made with.
        """
        labels, number = list(self.folder.labels or ()), self.folder.background
        given = candidate_labels is not None or templates is not None
        if given or (background is not None and not isinstance(background, str)):
            some = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
            raise ValueError(
                f"{str(self.folder.path)!r} has its classes in it ({some}). Leave out `candidate_labels`, `templates` and "
                "words of a background, or export without `--words`."
            )
        if number < 0 and background == "auto":
            raise ValueError(
                f"{str(self.folder.path)!r} was exported without words of a background. Name the class that is the "
                "background, or export with `--background auto`."
            )
        name = None if background in (None, "auto") else normalise_name(background)
        if number >= 0 and name is not None and name != normalise_name(labels[number]):
            raise ValueError(
                f"{str(self.folder.path)!r} has its background in it ({labels[number]}), which is fixed. Leave out "
                f"`background={background!r}`, or export with another `--background`."
            )
        hidden = self.folder.background_hidden
        if number < 0 and (background is not None or rules):
            label = BACKGROUND if background is None else background
            found = [i for i, given in enumerate(labels) if normalise_name(given) == normalise_name(label)]
            number, hidden = found[0] if found else len(labels), not found
            labels += [] if found else [label]
        return Classes(labels, number, hidden, np.array(self.folder.record["class_of_name"]), None)

    def prepare(
        self, image: Any, size: Any = None, max_tokens: int | None = None, image_range: ImageRange | None = None
    ) -> Prepared:
        """Read and preprocess an image as the image processor does."""
        settings = self.folder.image_settings
        image = image_of_item(image)
        image = read_image(image) if is_encoded(image) else image
        known = check_range(settings.get("image_range") if image_range is None else image_range)
        pixels = rgb_pixels(image, known, convert=settings.get("do_convert_rgb", True))
        height, width = pixels.shape[1:]
        size = check_size(settings.get("size") if size is None else size) if settings.get("do_resize", True) else None
        limit = token_limit(max_tokens, settings.get("max_tokens"))
        asked, allowed = working_size(height, width, size, limit, self.folder.patch_size)
        if allowed != asked:
            warn_once(TOO_MANY_PATCHES.format(limit))
        pixels = resize_pixels(pixels, allowed, settings["resample"])
        if settings.get("do_rescale", True):
            pixels = rescale_pixels(pixels, settings["rescale_factor"])
        if settings.get("do_normalize", True):
            pixels = normalise_pixels(pixels, settings["image_mean"], settings["image_std"])
        return Prepared(np.ascontiguousarray(pixels, dtype=np.float32), (height, width))

    def _results(
        self, images: Iterator[Callable[[], Any]], batch_size: int, skip: bool, prepare, classes: Classes, finish
    ) -> Iterator[Any]:
        """Results of images, in their order; each is read by a call. Images of one size share a run of the graph."""
        prepared = (guarded(skip, lambda read=read: prepare(read())) for read in images)
        for items in batches(prepared, batch_size or 1):
            groups: dict[Any, list[int]] = {}
            for i, item in enumerate(items):
                if not is_error(item):
                    groups.setdefault((item.pixel_values.shape, item.original_size), []).append(i)
            for group in groups.values():
                found = guarded(skip, self._run, [items[i] for i in group], classes)
                if is_error(found):  # perhaps out of memory: one by one
                    found = [guarded(skip, self._run_one, items[i], classes) for i in group]
                for i, result in zip(group, found, strict=True):
                    items[i] = result
            for item in items:
                yield item if is_error(item) else guarded(skip, finish, *item)

    def _run_one(self, item: Prepared, classes: Classes) -> tuple[np.ndarray, np.ndarray]:
        """[`_run`] of one image."""
        return self._run([item], classes)[0]

    def _run(self, items: list[Prepared], classes: Classes) -> list[tuple[np.ndarray, np.ndarray]]:
        """Label map int32 and probabilities float32 of images of one size, `(height, width)` each."""
        size = items[0].original_size
        values: dict[str, Any] = {
            "pixel_values": np.stack([item.pixel_values for item in items]),
            "image_size": np.array(size, dtype=np.int64),
            "class_of_name": classes.class_of_name,
            "text_embeds": classes.text_embeds,
        }
        if self.engine == "openvino" and self.head == "classmap":
            check_products(size, items[0].pixel_values.shape[1:], self.folder.patch_size)
        outputs = self.graph(**values)
        check_finite_features(
            next(outputs[name] for name in ("confidence", "logits", "feature_map") if name in outputs)
        )
        if self.head == "classmap":
            parts = zip(outputs["labels"], outputs["confidence"], strict=True)
            return [(labels.astype(np.int32), confidence.astype(np.float32)) for labels, confidence in parts]
        logits = outputs["logits"] if self.head == "logits" else self._logits(outputs["feature_map"], classes)
        geometry = (self.folder.patch_size, items[0].pixel_values.shape[1:], size)
        return [decide(of_image, classes.class_of_name, *geometry) for of_image in logits]

    def _logits(self, features: np.ndarray, classes: Classes) -> np.ndarray:
        """Logits `(batch, names, rows, columns)` of features `(batch, dim, rows, columns)`: cosine times the scale."""
        norms = np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
        batch, dim, rows, columns = features.shape
        cosine = classes.text_embeds @ (features / norms).reshape(batch, dim, -1)
        cosine = cosine.reshape(batch, -1, rows, columns)
        return cosine * np.float32(self.folder.record["dense_logit_scale"])


def finished(
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Classes,
    threshold: float,
    min_area: float,
    output: str,
    top_k: int | None,
) -> Any:
    """The result of an image, from its label map and probabilities."""
    if threshold or min_area:
        give_to_background(labels, probabilities, classes.background, threshold, min_area)
    pixels, scores = class_scores(labels, probabilities, len(classes.labels))
    result = {"map": labels, "labels": classes.labels, "scores": scores, "background": classes.background}
    return result if output == "map" else as_segments(result, pixels, classes.hidden, top_k)


def check_options(output: str, top_k: Any, batch_size: Any, on_error: str, others: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: an option that has another value than it may have, or that only the pipeline has.
        TypeError: one that nothing has.
    """
    if output not in OUTPUTS:
        raise ValueError(
            f"Unknown output {output!r}; use {' or '.join(map(repr, OUTPUTS))}, or the pipeline for others."
        )
    if on_error not in ("raise", "skip"):
        raise ValueError(f"Unknown on_error {on_error!r}; use 'raise' or 'skip'.")
    check_count("top_k", top_k)
    check_count("batch_size", batch_size)
    if top_k is not None and output == "map":
        raise ValueError(
            "`top_k` with output='map' needs all probabilities: use the pipeline, or the head `probabilities`."
        )
    for name in others:
        if name not in PIPELINE_ONLY:
            raise TypeError(f"OnnxSegmenter has no option {name!r}.")
        raise ValueError(f"`{name}` is an option of the pipeline only: `pipeline('open-vocab-segmentation', model=…)`.")


def check_products(size: Sequence[int], working: Sequence[int], patch: int) -> None:
    """
    Raises:
        ValueError: OpenVINO, which multiplies positions as numbers of 32 bits, would take wrong patches for some pixels.

    Example:

    ```python
    >>> check_products((100, 32000), (96, 32000), 16)
    >>> check_products((100, 36000), (96, 36000), 16)
    Traceback (most recent call last):
    ValueError: OpenVINO cannot decide an image of 100×36000 pixels at 96×36000. Give a smaller `size`, or ...
    ```"""
    if any(2 * side * (other + patch) >= 2**31 for side, other in zip(size, working, strict=True)):
        sizes = ["×".join(map(str, sides)) for sides in (size, working)]
        raise ValueError(
            f"OpenVINO cannot decide an image of {sizes[0]} pixels at {sizes[1]}. Give a smaller `size`, or take "
            "engine='onnxruntime'."
        )


def is_single(inputs: Any) -> bool:
    """Whether inputs are one image, not several."""
    if isinstance(inputs, (Mapping, Image.Image)) or is_encoded(inputs):
        return True
    check_container(inputs)
    if as_list(inputs) is not None:
        return False
    by_position = hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")  # as of data sets of torch
    return isinstance(inputs, np.ndarray) or is_tensor(inputs) or not (by_position or isinstance(inputs, Iterable))


def readers(inputs: Any) -> Iterator[Callable[[], Any]]:
    """A function for each of several images that reads it: by position where that is what `[i]` means, or by iteration."""
    rows: Any = rows_of_images(inputs)
    is_table = hasattr(rows, "cast_column") and hasattr(rows, "__len__")
    if is_table or isinstance(rows, Sequence) or not isinstance(rows, Iterable):
        return (partial(rows.__getitem__, number) for number in range(len(rows)))
    return (partial(next, iter([image])) for image in rows)


def batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items; the last may be shorter."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time."""
    logger.warning(message)
