"""What commands, page and demo share: words as people type them, pipelines of one pass and of the sliding window, times."""

import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from transformers import pipeline
from transformers.utils import logging

from spar_hf.model.modeling_spar import SparForOpenVocabSegmentation
from spar_hf.model.processing_spar import SparProcessor
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.vocabularies import VOCABULARIES
from spar_hf.registration import SPAR_TINY, SPAR_TINY_BASE
from spar_hf.teacher import SlidingWindowTeacher


class SlidingWindowVision(SlidingWindowTeacher):
    """
    The teacher in the place of a two-tower model's vision tower, whose keywords it takes and ignores.

    Attributes:
        progress: called after each batch of windows with the windows done and the windows in all.
    """

    progress: Callable[[int, int], None] | None = None

    def forward(self, pixel_values: torch.Tensor, *args, **kwargs):
        return super().forward(pixel_values, self.progress)


def load_pipeline(model: str | None = None, device: str | None = None, stride: int | None = None):
    """
    The pipeline of a folder or hub id, the embedded one by default, without the notices of transformers.

    Args:
        model (`str`, *optional*): folder or hub id of a two-tower SPAR model or of an untouched two-tower backbone.
        device (`str`, *optional*): `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`; transformers' choice by default.
        stride (`int`, *optional*): step of a sliding window in pixels; one pass by default.

    Raises:
        ValueError: no such device, a stride outside 1 to the window, a model without text tower.
        OSError: no such folder or repository.
    """
    quiet_transformers()
    folder = SPAR_TINY if model is None else model
    options: dict[str, Any] = {} if device is None else {"device": device}
    # not by `pipeline(model=folder)`, which packs what is wrong into two tracebacks
    two_towers: Any = SparForOpenVocabSegmentation.from_backbone(folder)
    processor: Any = SparProcessor.from_backbone(folder)
    if stride is not None:
        two_towers.vision_model = SlidingWindowVision(two_towers.vision_model, stride=stride).eval()
    task: Any = "open-vocab-segmentation"  # transformers types only its own tasks
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    return pipeline(task, model=two_towers, tokenizer=tokenizer, image_processor=image_processor, **options)


def read_words(text: str | None) -> Vocabulary:
    """
    Classes as people type them: `;` or a new line between them, `,` between names of one; or the name of a built-in
    vocabulary.

    Raises:
        ValueError: no words, or two classes of the same label.

    Example:

    ```python
    >>> read_words("road; car, automobile").labels
    ('road', 'car')
    ```"""
    classes = [part.strip() for part in (text or "").replace("\n", ";").split(";") if part.strip()]
    # one entry alone may be the name of a built-in vocabulary; a single class would cover the whole image
    built_in = len(classes) == 1 and classes[0].lower() in VOCABULARIES
    return Vocabulary.parse(classes[0] if built_in else classes)


def untouched(model: str | None) -> str | None:
    """What the sliding window runs: the embedded student's base, and a model of one's own itself."""
    return SPAR_TINY_BASE if model in (None, SPAR_TINY) else model


def quiet_transformers() -> None:
    """No notices and bars of transformers among a command's own lines."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def timed(segment, image: Image.Image, candidate_labels, **options) -> dict[str, Any]:
    """
    Segment an image and time the vision forward inside.

    Args:
        segment ([`OpenVocabSegmentationPipeline`]): from [`load_pipeline`].
        image (`PIL.Image.Image`): any size.
        candidate_labels, options: see the pipeline.

    Returns:
        The pipeline's `output="map"` (`map`, `labels`, `scores`), `forward_seconds`, the vision forward, and `seconds`,
        everything from the decoded image to the map.

    Example:

    ```python
    >>> result = timed(load_pipeline(), Image.new("RGB", (64, 48)), ["road", "sky"], size={"shortest_edge": 48})
    >>> result["map"].shape, result["labels"], 0 < result["forward_seconds"] < result["seconds"]
    ((48, 64), ['road', 'sky'], True)
    ```"""
    marks: list[float] = []

    def mark(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    vision = segment.model.vision_model
    hooks = [vision.register_forward_pre_hook(mark), vision.register_forward_hook(mark)]
    start = time.perf_counter()
    try:
        result = segment(image, candidate_labels=candidate_labels, output="map", **options)
    finally:
        for hook in hooks:
            hook.remove()
    return {**result, "forward_seconds": marks[-1] - marks[0], "seconds": time.perf_counter() - start}
