"""Templates that are chosen for each class from images without masks."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .image_streams import several_images
from .segmentation import ClassMaxima
from .templates import TemplateChoice, resolve_templates
from .words import CandidateLabels, Vocabulary

CHOSEN = 4  # templates of a class, as in FLOSS


@torch.no_grad()
def choose_templates(
    pipeline: Any,
    images: Iterable[Any],
    candidate_labels: CandidateLabels | Vocabulary,
    templates: str | Sequence[str] | None = None,
    background: str | Sequence[str] | None = None,
    count: int = CHOSEN,
) -> TemplateChoice:
    """
    For each class the templates whose predictions are surest, from images without masks.

    With each template alone, every patch goes to the class of largest logit. Of a class, those templates are taken whose
    patches have the least entropy in the softmax over classes, on average over all images. A class that no template finds
    keeps all. Source: FLOSS ([arXiv 2504.10487](https://arxiv.org/abs/2504.10487)); there each class keeps the classifier of
    its templates, and their decisions are merged. Here a name is embedded with the templates of its class, and all names
    are compared at once.

    Args:
        pipeline ([`OpenVocabSegmentationPipeline`]): its model and image processor.
        images (`Iterable`): images like those to be segmented, in any form that the pipeline takes; a few dozen, read one
            by one.
        candidate_labels: the classes, as in the pipeline.
        templates: those to choose from; the checkpoint's by default.
        background: as in the pipeline.
        count: templates of a class.

    Raises:
        ValueError: no images or a single one outside a list, `count` below 1, or what the pipeline refuses.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline
    >>> import spar_hf

    >>> segment = pipeline("open-vocab-segmentation")
    >>> image = Image.new("RGB", (96, 64), "skyblue")
    >>> choice = choose_templates(segment, [image], ["sky", "road"], templates="short", count=1)
    >>> len(choice.default), all(len(chosen) == 1 for chosen in choice.names.values())
    (4, True)
    >>> choice.save("templates.json")
    >>> found = segment(image, candidate_labels=["sky", "road"], templates="templates.json")
    ```"""
    if count < 1:
        raise ValueError(f"count={count} must be 1 or more templates for each class.")
    prompts = resolve_templates(pipeline.model.config.templates if templates is None else templates)
    vocabulary = pipeline.classes(Vocabulary.parse(candidate_labels), background, templates=prompts)[0]
    embeds = [pipeline.texts.get(vocabulary.all_names, (prompt,), check_weights=False) for prompt in prompts]
    maxima = ClassMaxima.of(vocabulary.name_to_class.to(embeds[0].device))
    shape = (len(prompts), len(vocabulary.labels))
    sums, patches = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for image in several_images(images, "Images to choose templates from"):
        feature_map = pipeline.encode(image).feature_map.to(pipeline.model.device)
        for m, rows in enumerate(embeds):
            logits = maxima(pipeline.model.dense_logits(feature_map[None], rows)[0].flatten(1).T)  # (patches, classes)
            entropy = torch.distributions.Categorical(logits=logits).entropy().double().cpu()
            labels = logits.argmax(1).cpu()
            sums[m].index_add_(0, labels, entropy)
            patches[m] += torch.bincount(labels, minlength=shape[1])
    if not patches.sum():
        raise ValueError("There are no images. Give a few dozen like those that are to be segmented.")
    means = torch.where(patches > 0, sums / patches.clamp(min=1), torch.inf)  # (templates, classes)
    chosen: dict[str, tuple[str, ...]] = {}
    for k, names in enumerate(vocabulary.names):
        order = [m for m in means[:, k].argsort(stable=True).tolist()[:count] if means[m, k] < torch.inf]
        if order:
            chosen |= dict.fromkeys(names, tuple(prompts[m] for m in order))
    return TemplateChoice(prompts, chosen)


__all__ = ["TemplateChoice", "choose_templates"]
