"""
What surrounds the classes: the background of a vocabulary, and which words mean the same to a model. Common stuff words that
mean what a class means are no background.

The pipeline passes its [`TextEmbeddingCache`], whose embeddings are tensors, the runtime without torch a cache of NumPy
arrays; so this file imports neither torch nor transformers.
"""

from collections.abc import Sequence
from typing import Any

from .vocabularies import ANCHOR_WORDS
from .words import Vocabulary, normalise_name

# Cosine of two text embeddings, less the mean of all anchors', from which two words are taken to mean the same. The mean is
# subtracted because all texts of CLIP and SigLIP lie near each other. With spar-tiny: sky and cloud 0.57, tree and
# vegetation 1.00, lamp and pole 0.71, but building and wall 0.41, grass and tree 0.33. Of 0.35, 0.5, 0.65 and 0.9, presence
# ranks best with 0.5.
SAME_MEANING = 0.5
MEANING_TEMPLATES = ("{}",)  # of words that are compared with each other: the bare word, at one prompt each
ONE_CLASS = "A single class gets every pixel. Name others or a background."
BACKGROUND = "background"  # label of the class of background words


def bare_embeddings(cache: Any, words: Sequence[str]) -> Any:
    """Embeddings `(words, dim)` of the bare words."""
    return cache.get(words, MEANING_TEMPLATES, check_weights=False)


def unit_rows(rows: Any) -> Any:
    """Rows of an array or a tensor, scaled to unit length."""
    return rows / (rows * rows).sum(-1)[:, None] ** 0.5


def same_meaning(cache: Any, words: Sequence[str], others: Sequence[str]) -> Any:
    """
    Which of `words` mean the same as which of `others`: `(words, others)` bool.

    Embeddings are those of the bare words, whatever the templates of the masks.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import spar_hf

    >>> segment = pipeline("open-vocab-segmentation")
    >>> same_meaning(segment.texts, ["cloud", "river"], ["sky", "street"]).tolist()
    [[True, False], [False, False]]
    ```"""
    centre = bare_embeddings(cache, ANCHOR_WORDS).mean(0)
    # operators that arrays of NumPy and tensors have in common
    one, other = (bare_embeddings(cache, some) - centre for some in (words, others))
    return unit_rows(one) @ unit_rows(other).T >= SAME_MEANING


def stuff_beside(cache: Any, vocabulary: Vocabulary) -> list[str]:
    """
    Common stuff words that mean nothing that a class of the vocabulary means, for `background="auto"`. A class called
    background is no obstacle, since the words are added to it.
    """

    def find() -> list[str]:
        words = vocabulary.other_stuff()
        classes = zip(vocabulary.labels, vocabulary.names, strict=True)
        names = [name for label, some in classes if normalise_name(label) != BACKGROUND for name in some]
        if not words or not names:
            return words
        taken = same_meaning(cache, words, names).any(1).tolist()
        return [word for word, is_taken in zip(words, taken, strict=True) if not is_taken]

    return cache.remember(("stuff", vocabulary), find)


def empty_background(labels: Sequence[str], background: Any) -> str:
    """
    What is wrong with a background that no pixel gets where no rule moves pixels to it: a text that is no class, which is a
    label without words. Empty if nothing is.

    Example:

    ```python
    >>> empty_background(["road", "sky"], "sea, wall")
    "No pixel gets the background 'sea, wall': it is none of the classes, and a background without words needs ..."
    >>> empty_background(["road", "sky"], "Sky"), empty_background(["road", "sky"], ["sea", "wall"])
    ('', '')
    ```"""
    if not isinstance(background, str) or background == "auto":
        return ""
    if normalise_name(background) in map(normalise_name, labels):
        return ""
    return (
        f"No pixel gets the background {background!r}: it is none of the classes, and a background without words needs "
        "threshold, min_area or min_presence. Name a class, or 'auto' for common stuff words; words of your own are a list "
        "in Python."
    )


def resolve_classes(
    cache: Any,
    vocabulary: Vocabulary,
    background: str | Sequence[str] | None,
    rules: bool = False,
    templates: str | Sequence[str] | None = None,
) -> tuple[Vocabulary, list[str], int]:
    """
    Add the background to a vocabulary.

    Args:
        cache: text embeddings of the model, as [`TextEmbeddingCache`].
        vocabulary: the classes asked for.
        background: as in the call of the pipeline.
        rules: whether pixels may be moved to the background, which then has a label if not words.
        templates: of the masks.

    Returns:
        The vocabulary with its background, the labels of the result, and the index of the background among them (-1: none).

    Raises:
        ValueError: a background that leaves no class, or names that the tokenizer cannot tell apart.
    """
    label, gives_way = BACKGROUND, None
    if background == "auto" and "auto" not in vocabulary.labels:
        background = stuff_beside(cache, vocabulary) or None
    if isinstance(background, str):
        label = background
    elif background is not None:
        vocabulary = vocabulary.with_background(background)
        gives_way = next(given for given in vocabulary.labels if normalise_name(given) == label)
    vocabulary = cache.distinct(vocabulary, templates, gives_way)
    labels = list(vocabulary.labels)
    if background is None and not rules:
        return vocabulary, labels, -1
    found = [i for i, given in enumerate(labels) if normalise_name(given) == normalise_name(label)]
    return (vocabulary, labels, found[0]) if found else (vocabulary, [*labels, label], len(labels))
