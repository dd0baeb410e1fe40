"""Pipelines of one pass and of the sliding window, and their run times, for the commands, the web page and the demo."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

from spar_hf.cli.reporting import quiet_loading
from spar_hf.model.image_streams import EncodedImage
from spar_hf.model.modeling_spar import SparForOpenVocabSegmentation
from spar_hf.model.processing_spar import SparProcessor
from spar_hf.model.segmentation import class_probabilities
from spar_hf.registration import SPAR_TINY, SPAR_TINY_BASE
from spar_hf.teacher import SlidingWindowTeacher
from spar_hf.utils.devices import clock

HEAT_BYTES = 64 * 2**20  # of the heat maps of all classes of an image, while they are computed


class SlidingWindowVision(SlidingWindowTeacher):
    """
    The sliding window as vision tower of a two-tower model; it ignores the other arguments of a vision tower.

    Attributes:
        progress: called after each batch of windows with the number of windows done and the number of all.
    """

    progress: Callable[[int, int], None] | None = None

    def forward(self, pixel_values: torch.Tensor, *args, **kwargs):
        return super().forward(pixel_values, self.progress)


def load_pipeline(
    model: str | None = None, device: str | None = None, stride: int | None = None, support: Path | None = None
):
    """
    Load an open-vocabulary segmentation pipeline, without notices of transformers and its progress bars of loading.

    Args:
        model: folder or hub id of a two-tower SPAR model or of a pretrained two-tower backbone; the embedded spar-tiny by
            default.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`; the choice of transformers by default.
        stride: stride of a sliding window in pixels; one pass by default.
        support: file of support images, from `spar-hf support`.

    Returns:
        [`OpenVocabSegmentationPipeline`].

    Raises:
        ValueError: no such device, a stride outside 1 to the window size, a model without text tower, or support images of
            another model.
        OSError: no such folder, repository or file.
    """
    folder = SPAR_TINY if model is None else model
    options: dict[str, Any] = {} if device is None else {"device": device}
    # loaded here since `pipeline(model=folder)` wraps errors into two tracebacks
    with quiet_loading():
        two_towers: Any = SparForOpenVocabSegmentation.from_backbone(folder)
        processor: Any = SparProcessor.from_backbone(folder)
    if stride is not None:
        two_towers.vision_model = SlidingWindowVision(two_towers.vision_model, stride=stride).eval()
    task: Any = "open-vocab-segmentation"  # transformers types its own tasks only
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    segment: Any = pipeline(task, model=two_towers, tokenizer=tokenizer, image_processor=image_processor, **options)
    if support is not None:
        segment.load_support(support)
    return segment


def sliding_window_model(model: str | None) -> str | None:
    """The model to compare with one pass of `model`: the base of the embedded spar-tiny, or `model` itself."""
    return SPAR_TINY_BASE if model in (None, SPAR_TINY) else model


def segment_timed(pipe, image: Image.Image, candidate_labels, heat: bool = False, **options) -> dict[str, Any]:
    """
    Segment an image and measure the time, in all and of the vision tower alone.

    Args:
        pipe ([`OpenVocabSegmentationPipeline`]): from [`load_pipeline`].
        image: of any size.
        candidate_labels: classes, as for the pipeline.
        heat: whether to add heat maps of all classes, as [`segment_with_heat`]; they count in no time.
        options: further options of the pipeline.

    Returns:
        The pipeline's `output="map"` (`map`, `labels`, `scores`), `forward_seconds` (vision tower) and `seconds` (from the
        decoded image to the map).

    Example:

    ```python
    >>> size = {"shortest_edge": 48}
    >>> result = segment_timed(load_pipeline(), Image.new("RGB", (64, 48)), ["road", "sky"], size=size)
    >>> result["map"].shape, result["labels"], 0 < result["forward_seconds"] < result["seconds"]
    ((48, 64), ['road', 'sky'], True)
    ```"""
    times: list[float] = []

    def note_time(*_: Any) -> None:
        times.append(clock(pipe.device))

    vision = pipe.model.vision_model
    hooks = [vision.register_forward_pre_hook(note_time), vision.register_forward_hook(note_time)]
    seen = encoding_options(options)
    start = clock(pipe.device)
    try:
        encoded = pipe.encode(image, **seen)
        result = pipe(encoded, candidate_labels=candidate_labels, output="map", **options)
    finally:
        for hook in hooks:
            hook.remove()
    result |= {"forward_seconds": times[-1] - times[0], "seconds": clock(pipe.device) - start}
    return {**result, "heat": _heat(pipe, encoded, candidate_labels, options, result)} if heat else result


def segment_with_heat(pipe, image: Image.Image, candidate_labels, heat: bool = False, **options) -> dict[str, Any]:
    """
    Segment an image and compute heat maps of all classes, in one run of the vision tower.

    Args:
        pipe ([`OpenVocabSegmentationPipeline`]): from [`load_pipeline`].
        image: in RGB, of any size, or encoded.
        candidate_labels: classes, as for the pipeline.
        heat: whether to compute heat maps.
        options: further options of the pipeline.

    Returns:
        The pipeline's `output="map"`; with `heat` also `heat`, the probability of every class as levels from 0 to 255,
        uint8 `(classes, h, w)`: of every pixel, or of fewer points where all would take more than 64 MiB, but never fewer
        than patches. A class that `min_presence` drops has 0 everywhere, and the others share its probability.

    Example:

    ```python
    >>> result = segment_with_heat(load_pipeline(), Image.new("RGB", (64, 48)), ["road", "sky"], heat=True)
    >>> result["heat"].shape, int(result["heat"].sum(0).min()) >= 254
    ((2, 48, 64), True)
    ```"""
    if options.get("tile") is not None:
        if heat:
            raise ValueError("Heat maps are of one pass: leave them out with tiles (--tile).")
        return pipe(image, candidate_labels=candidate_labels, output="map", **options)
    seen = encoding_options(options)
    encoded = image if isinstance(image, EncodedImage) else pipe.encode(image, **seen)
    result = pipe(encoded, candidate_labels=candidate_labels, output="map", **options)
    return {**result, "heat": _heat(pipe, encoded, candidate_labels, options, result)} if heat else result


def encoding_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take those options out that `pipe.encode` has; the others are for the pipeline's call with an encoded image."""
    return {name: options.pop(name) for name in ("size", "max_tokens", "image_range") if name in options}


def _heat(pipe, encoded: EncodedImage, candidate_labels, options: dict[str, Any], result: dict[str, Any]) -> np.ndarray:
    """Heat maps of all classes, as [`segment_with_heat`] describes them, of an image whose `result` the pipeline gave."""
    words = {name: value for name, value in options.items() if name in ("templates", "background", "refine")}
    grid = pipe(encoded, candidate_labels=candidate_labels, output="logits", **words)
    logits, name_to_class = torch.from_numpy(grid["logits"]), torch.from_numpy(grid["name_to_class"])
    classes = int(name_to_class.max()) + 1  # with words; a background without has no probability
    if least := options.get("min_presence"):  # the same words are dropped as for the map
        kept = [i == result["background"] or result["presence"][i] >= least for i in range(classes)]
        names = torch.tensor(kept)[name_to_class]
        logits, name_to_class = logits[names], name_to_class[names]
    height, width = grid["original_size"]
    scale = min(1, math.sqrt(HEAT_BYTES / (4 * classes * height * width)))
    sides = zip((height, width), logits.shape[1:], strict=True)
    size = tuple(min(side, max(math.ceil(side * scale), patches)) for side, patches in sides)
    where = (grid["patch_size"], grid["working_size"], size)
    if not len(name_to_class):
        return np.zeros((classes, *size), np.uint8)
    _, probabilities = class_probabilities(logits, name_to_class, *where, classes=classes)
    return (probabilities * 255).round_().to(torch.uint8).numpy()
