"""The models of an evaluation, each with the words embedded and its settings resolved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers.image_utils import PILImageResampling, SizeDict

from spar_hf.data.augmentation import resize_bilinear
from spar_hf.evaluation.protocols import Protocol
from spar_hf.evaluation.runs import Run
from spar_hf.model.modeling_spar import SparForOpenVocabSegmentation
from spar_hf.model.processing_spar import SparProcessor
from spar_hf.model.prompts import Vocabulary, distinct_names, embed_names
from spar_hf.teacher import SlidingWindowTeacher
from spar_hf.utils.errors import UsageError, as_usage_errors


def first_given(*values: Any) -> Any:
    """
    The first value that is not `None`; `None` if there is none.

    Example:

    ```python
    >>> first_given(None, 0.0, 0.1)
    0.0
    ```"""
    return next((value for value in values if value is not None), None)


@dataclass(frozen=True)
class Rules:
    """
    How logits become classes.

    Attributes:
        scale: factor of the cosines before the softmax; `None` for that of the checkpoint.
        threshold, min_area: background rules, see `inference.decide_as_published`.
        scores: softmax over `"classes"` or, as published, over `"names"`; see [`~spar_hf.model.segmentation.decide`].
    """

    scale: float | None = None
    threshold: float = 0.0
    min_area: float = 0.0
    scores: str = "classes"


@dataclass
class Candidate:
    """
    A model that is measured.

    Attributes:
        model: on its device.
        image_processor: of its folder.
        text_embeds: embeddings of the names of the vocabulary, `(names, dim)` float32.
        resize: keywords of the image processor; empty for the size of the folder.
        rules: how its logits become classes.
        resample: how images are resized: `"bicubic"` (antialiased), `"bilinear"` (without antialiasing, see
            [`resize_bilinear`]), or `None` for the image processor's own, which is bicubic in folders of this library.
        window_size: side of sliding windows in pixels; `None` for the model's `image_size`.
    """

    model: SparForOpenVocabSegmentation
    image_processor: Any
    text_embeds: torch.Tensor
    resize: dict[str, Any] = field(default_factory=dict)
    rules: Rules = field(default_factory=Rules)
    resample: str | None = None
    window_size: int | None = None

    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        """An RGB image, resized and normalised as input of the model: `(1, 3, height, width)`."""
        processor, resize = self.image_processor, dict(self.resize)
        if self.resample == "bicubic":
            resize["resample"] = PILImageResampling.BICUBIC
        if self.resample == "bilinear":
            size = resize.pop("size", processor.size)
            if resize.get("do_resize", processor.do_resize) and size is not None:
                size = size if isinstance(size, SizeDict) else SizeDict(**size)
                limit = (processor.max_tokens, processor.patch_size)
                height, width = processor.working_size(image.height, image.width, size, *limit)
                image = resize_bilinear(image, (width, height))
            resize["do_resize"] = False
        return processor(image, return_tensors="pt", **resize)["pixel_values"]

    @classmethod
    def load(cls, folder: str, device: torch.device) -> tuple["Candidate", Any]:
        """
        A candidate without words yet, and its tokenizer.

        Raises:
            UsageError: the folder or hub id is not a model with two towers and a processor.
        """
        with as_usage_errors():
            model = SparForOpenVocabSegmentation.from_backbone(folder).to(device)
            processor: Any = SparProcessor.from_backbone(folder)
        return cls(model, processor.image_processor, torch.empty(0)), processor.tokenizer


def load_candidates(
    folders: dict[str, str],
    runs: Sequence[Run],
    vocabulary: Vocabulary,
    device: torch.device,
    protocol: Callable[[str], Protocol],
    resize: dict[str, Any] | None = None,
    templates: str | None = None,
    scale: float | None = None,
    threshold: float | None = None,
    min_area: float | None = None,
    resample: str | None = None,
    window_size: int | None = None,
) -> dict[str, Candidate]:
    """
    Load the models that the runs need. A setting that is `None` is that of the protocol, or else of the model's folder.

    Args:
        folders: folder or hub id of every model, by name.
        runs: the runs.
        vocabulary: the classes and their words.
        device: where the models run.
        protocol: gives the settings for a read-out.
        resize: keywords of the image processors.
        templates: prompt templates.
        scale, threshold, min_area: see [`Rules`].
        resample, window_size: see [`Candidate`].

    Returns:
        The candidates by name.

    Raises:
        UsageError: a folder is no model of two towers, background rules apply but no class is called background, a name is
            too long for a text tower, or a stride is larger than the window of a model.
    """
    candidates = {}
    for name in dict.fromkeys(run.model for run in runs):
        candidate, tokenizer = Candidate.load(folders[name], device)
        settings = protocol(candidate.model.config.readout)
        of_protocol = {} if settings.size is None else {"do_resize": True, "size": settings.size}
        candidate.resize = first_given(resize, of_protocol)
        resizes = candidate.resize.get("do_resize", True)
        candidate.resample = first_given(resample, settings.resample) if resizes else None
        candidate.window_size = first_given(window_size, settings.window_size)
        candidate.rules = Rules(
            first_given(scale, settings.scale),
            first_given(threshold, settings.threshold),
            first_given(min_area, settings.min_area),
            settings.scores,
        )
        if (candidate.rules.threshold or candidate.rules.min_area) and "background" not in vocabulary.labels:
            raise UsageError(
                "--threshold and --exclude_area give pixels to the class background, but there is none among "
                f"{', '.join(vocabulary.labels)}."
            )
        with as_usage_errors():
            prompts = first_given(templates, settings.templates)
            # refuses classes of the same tokens; all names stay, since the published protocol counts each
            distinct_names(tokenizer, vocabulary, first_given(prompts, candidate.model.config.templates))
            embeds = embed_names(candidate.model, tokenizer, vocabulary.all_names, prompts)
            for run in runs:
                if run.model == name and run.stride is not None:  # refuses a wrong window or stride
                    SlidingWindowTeacher(candidate.model.vision_model, candidate.window_size, run.stride)
        candidate.text_embeds = embeds.float()
        candidates[name] = candidate
    return candidates
