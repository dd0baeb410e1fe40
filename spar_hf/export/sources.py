"""What is exported: a model with its image processor and, where it reads words, its tokenizer."""

from dataclasses import dataclass
from typing import Any

import torch

from spar_hf.export.options import DECIDING
from spar_hf.model.backbone_sources import load_source_config
from spar_hf.model.background import resolve_classes
from spar_hf.model.image_processing_spar import SparImageProcessorPil
from spar_hf.model.modeling_spar import SparForOpenVocabSegmentation, SparVisionModel
from spar_hf.model.modeling_spar_semantic import SparForSemanticSegmentation
from spar_hf.model.processing_spar import SparProcessor
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.text_embeddings import TextEmbeddingCache
from spar_hf.utils.errors import UsageError, as_usage_errors


@dataclass(frozen=True)
class Source:
    """
    A loaded model, in float32 on the CPU.

    Attributes:
        name: as the user gave it.
        model: [`SparForOpenVocabSegmentation`], [`SparVisionModel`] or [`SparForSemanticSegmentation`].
        image_processor: [`SparImageProcessorPil`].
        tokenizer: `None` for models without a text tower.
    """

    name: str
    model: Any
    image_processor: Any
    tokenizer: Any = None

    @property
    def vision_model(self) -> SparVisionModel:
        """The vision tower."""
        return getattr(self.model, "vision_model", self.model)

    @property
    def has_text(self) -> bool:
        """Whether words can be embedded."""
        return isinstance(self.model, SparForOpenVocabSegmentation)

    @property
    def has_classes(self) -> bool:
        """Whether the classes are part of the model."""
        return isinstance(self.model, SparForSemanticSegmentation)


@dataclass(frozen=True)
class Words:
    """
    Names with their embeddings, which become part of a graph.

    Attributes:
        labels: of the classes.
        names: names of each class.
        embeddings: of all names, normalised, `(names, dim)` float32; `None` where a classifier has them in its weights.
        background: number of the background's class; -1: there is none.
        hidden: whether segments leave the background out: it is none of the classes that were asked for.
    """

    labels: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    embeddings: torch.Tensor | None = None
    background: int = -1
    hidden: bool = False

    @property
    def class_of_name(self) -> torch.Tensor:
        """The class of every name `(names,)`, int64."""
        return Vocabulary(self.labels, self.names).name_to_class


def load_source(name: str) -> Source:
    """
    Load a folder or a model of the hub: SPAR models, trained linear heads, and backbones that SPAR reads.

    Raises:
        UsageError: no such model, one that lacks files, or a type that cannot be exported.
    """
    with as_usage_errors():
        kind = load_source_config(name)
    if kind.model_type == "spar_universal":
        raise UsageError(
            f"{name} predicts masks of things, which has no export. Export its vision model with a linear head."
        )
    has_text = getattr(kind, "text_config", None) is not None
    try:
        with as_usage_errors():
            if kind.model_type == "spar_semantic":
                model: Any = SparForSemanticSegmentation.from_pretrained(name)
                return Source(name, prepared(model), SparImageProcessorPil.from_backbone(name))
            if has_text:
                processor = SparProcessor.from_backbone(name)
                model = SparForOpenVocabSegmentation.from_backbone(name)
                return Source(name, prepared(model), processor.image_processor, processor.tokenizer)
            model = SparVisionModel.from_backbone(name)
            return Source(name, prepared(model), SparImageProcessorPil.from_backbone(name))
    except RuntimeError as error:  # weights of other shapes
        raise UsageError(str(error)) from error


def prepared(model: Any) -> Any:
    """The model in float32 on the CPU, for inference."""
    return model.float().cpu().eval().requires_grad_(False)


def check_head(source: Source, head: str, words: Any, templates: Any = None) -> None:
    """
    Raises:
        UsageError: the head needs words that the model cannot embed, words are given to a model with classes, or templates
            to one without a text tower.
    """
    if source.has_classes and words is not None:
        raise UsageError(f"{source.name} has its classes in it: leave --words out.")
    if templates is not None and not source.has_text:
        raise UsageError(f"{source.name} has no text tower, so no prompts are made: leave --templates out.")
    if source.has_text or source.has_classes:
        return
    if words is not None or head in (*DECIDING, "logits"):
        raise UsageError(
            f"{source.name} has no text tower, so --head {head} has no words to compare with. Take --head features, or a "
            "two-tower model."
        )


def embed_words(source: Source, words: Any, templates: Any = None, background: Any = None) -> Words | None:
    """
    The classes that become part of a graph: those of `words`, embedded as the pipeline does, or those of the model itself.
    `None` if words stay an input.

    Raises:
        UsageError: malformed words, templates or background, or names that the tokenizer cannot tell apart.
    """
    if source.has_classes:
        config = source.model.config
        classes = tuple(config.id2label[i] for i in range(config.num_labels))
        return Words(classes, tuple(map(tuple, config.names or [[label] for label in classes])))
    if words is None:
        return None
    cache = TextEmbeddingCache(source.model, source.tokenizer)
    with as_usage_errors():
        given = Vocabulary.parse(words)
        vocabulary, labels, number = resolve_classes(cache, given, background, templates=templates)
        if len(labels) > len(vocabulary.labels):
            raise UsageError(f"The background {background!r} has no words. Give words, 'auto', or leave it out.")
        embeddings = cache.get(vocabulary.all_names, templates)
    hidden = number >= 0 and labels[number] not in given.labels
    return Words(tuple(labels), vocabulary.names, embeddings.float().cpu(), number, hidden)
