"""
How likely an image shows a class at all, compared with a fixed set of everyday nouns, the anchor words, so that results do
not depend on which other classes are listed.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch

from .background import MEANING_TEMPLATES, bare_embeddings, same_meaning
from .prompts import Vocabulary
from .templates import read_templates, resolve_templates
from .text_embeddings import TextEmbeddingCache
from .vocabularies import ANCHOR_WORDS, STUFF_WORDS

BEST_PATCHES = 0.02  # share of an image's patches that a class is judged by; 0.01 to 0.1 rank alike
# presence = sigmoid(CALIBRATION[0] * odds + CALIBRATION[1]), fitted with spar-tiny by `training/studies/presence.py`. A
# model may have its own, `config.presence_calibration`.
CALIBRATION = (0.414, 1.735)
WORKING_BYTES = 64 * 2**20  # bound on the largest buffer, unless there are so many patches that one class takes more


def store_embeddings(
    cache: TextEmbeddingCache,
    path: str | os.PathLike,
    names: Sequence[str],
    templates: Any = None,
) -> None:
    """
    Write the embeddings of names to a file, with those that `background="auto"` and `presence` need for them. `templates` as
    for [`TextEmbeddingCache.get`]; the file says for each name with which it was embedded.
    """
    words = list(dict.fromkeys([*STUFF_WORDS, *names]))
    bare = list(dict.fromkeys([*ANCHOR_WORDS, *words]))
    choice = read_templates(cache.model.config.templates if templates is None else templates)
    cache.refresh()
    bare_embeddings(cache, bare)
    cache.save(path, bare if resolve_templates(choice) == MEANING_TEMPLATES else words, choice)


@torch.no_grad()
def presence_odds(
    cache: TextEmbeddingCache, feature_map: torch.Tensor, vocabulary: Vocabulary, working_bytes: int = WORKING_BYTES
) -> torch.Tensor:
    """
    How much better than the anchor words a class matches the patches of an image that it matches best.

    At every patch: the logit of a name less the logarithm of the summed exponentials of all anchors' logits, which is the
    log-odds of the name in a softmax over itself and the anchors. Anchors that mean the same as a name of the class take no
    part. The value of a name is the mean over its best patches (`BEST_PATCHES`), that of a class the largest of its names.

    Args:
        cache: text embeddings of the model.
        feature_map (`torch.Tensor` of shape `(dim, h, w)`): dense features of one image.
        vocabulary: classes and their names.
        working_bytes (`int`, *optional*, defaults to 64 MiB):
            Bound on the largest buffer, of which four exist at once, beside 5 kB per patch for the anchors.

    Returns:
        `(classes,)` float32.
    """
    model = cache.model
    # (anchors, patches)
    anchors = model.dense_logits(feature_map[None], bare_embeddings(cache, ANCHOR_WORDS))[0].flatten(1)
    highest = anchors.amax(0)
    weights = (anchors - highest).exp_()
    patches = weights.shape[1]
    best = max(1, round(BEST_PATCHES * patches))
    odds = []
    for names in _groups(vocabulary.names, max(1, working_bytes // (4 * patches))):
        flat = [name for some in names for name in some]
        owner = torch.tensor([i for i, some in enumerate(names) for _ in some], device=weights.device)
        same = same_meaning(cache, flat, ANCHOR_WORDS).float()
        rivals = same.new_zeros(len(names), len(ANCHOR_WORDS)).index_add_(0, owner, same) == 0
        sums = rivals.float() @ weights  # (classes, patches)
        sums = sums.clamp_(min=torch.finfo(torch.float32).tiny).log_().add_(highest)
        logits = model.dense_logits(feature_map[None], bare_embeddings(cache, flat))[0].flatten(1)
        found = (logits - sums[owner]).topk(best, -1).values.mean(-1)  # (names,)
        odds.append(found.new_full((len(names),), -torch.inf).scatter_reduce_(0, owner, found, "amax"))
    return torch.cat(odds)


def class_presence(cache: TextEmbeddingCache, feature_map: torch.Tensor, vocabulary: Vocabulary) -> list[float]:
    """
    How likely an image shows each class of a vocabulary, from 0 to 1: calibrated [`presence_odds`].

    It depends on the image and the names of the class, not on other classes of the list. It is calibrated for lists of which
    half of the classes are there: 0.5 is where "there" and "not there" are equally likely then. It says nothing about how
    good the mask is.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline
    >>> import spar_hf

    >>> segment = pipeline("open-vocab-segmentation")
    >>> image = segment.encode(Image.new("RGB", (330, 200)))
    >>> one = class_presence(segment.texts, image.feature_map, Vocabulary.parse(["road"]))
    >>> two = class_presence(segment.texts, image.feature_map, Vocabulary.parse(["road", "pizza"]))
    >>> abs(one[0] - two[0]) < 1e-6
    True
    ```"""
    slope, offset = getattr(cache.model.config, "presence_calibration", None) or CALIBRATION
    return (slope * presence_odds(cache, feature_map, vocabulary) + offset).sigmoid().tolist()


def _groups(classes: tuple[tuple[str, ...], ...], names: int) -> list[list[tuple[str, ...]]]:
    """Split classes into groups of about `names` names, at least a class each."""
    groups: list[list[tuple[str, ...]]] = [[]]
    count = 0
    for some in classes:
        if groups[-1] and count + len(some) > names:
            groups.append([])
            count = 0
        groups[-1].append(some)
        count += len(some)
    return groups
