"""Templates that are chosen for each class from images without masks."""

import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .segmentation import ClassMaxima
from .words import CandidateLabels, Vocabulary, resolve_templates

FORMAT = "spar templates, 1"
CHOSEN = 4  # templates of a class, as in FLOSS


@dataclass(frozen=True)
class TemplateChoice:
    """
    Prompt templates for each name, in place of one set for all: the pipeline takes it, or the file of it, as `templates`.

    Attributes:
        default: templates of all other names.
        names: templates of a name.
    """

    default: tuple[str, ...]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        """The default templates: where a set of templates is expected, it is that one."""
        return iter(self.default)

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a JSON file."""
        content = {"format": FORMAT, "default": self.default, "names": self.names}
        target = Path(path)
        temporary = target.with_name(f".{os.getpid()}-{threading.get_ident()}.partial")
        try:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TemplateChoice":
        """
        Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, or a template without exactly one `{}`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{str(path)!r} does not exist. Write it with `choose_templates(…).save`.")
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError("of another format")
            names = {name: resolve_templates(templates) for name, templates in content["names"].items()}
            return cls(resolve_templates(content["default"]), names)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} is no file of `choose_templates`: {error}. Write it again.") from error


def name_embeds(texts: Any, names: Sequence[str], templates: Any, check_weights: bool = True) -> torch.Tensor:
    """Embeddings of names `(names, dim)` from a [`TextEmbeddingCache`], each with its templates."""
    if not isinstance(templates, TemplateChoice):
        return texts.get(names, templates, check_weights)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(templates.names.get(name, templates.default), []).append(name)
    rows: dict[str, torch.Tensor] = {}
    for prompts, some in groups.items():
        rows.update(zip(some, texts.get(some, prompts, check_weights), strict=True))
    return torch.stack([rows[name] for name in names])


def read_templates(templates: Any) -> Any:
    """Templates as the pipeline takes them; the name of a JSON file becomes its [`TemplateChoice`]."""
    if isinstance(templates, os.PathLike) or (isinstance(templates, str) and templates.endswith(".json")):
        return TemplateChoice.load(templates)
    return templates


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
        ValueError: no images, `count` below 1, or what the pipeline refuses.

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
    for image in images:
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
