"""The options of the segmentation pipeline, checked and sorted by the step that takes them."""

from typing import Any

from .image_pixels import as_whole, is_count
from .prompts import Vocabulary
from .results import check_shares
from .templates import read_templates

OUTPUTS = ("segments", "map", "probabilities", "logits")
# Options for which `None` says something: a call switches off with it what the pipeline was made with.
SWITCHED_OFF = ("top_k", "background", "min_presence", "refine", "upsampler", "tile")
NOT_GIVEN: Any = object()


def sanitize_parameters(
    candidate_labels=None,
    templates=None,
    size=None,
    max_tokens=None,
    image_range=None,
    output=None,
    top_k=NOT_GIVEN,
    background=NOT_GIVEN,
    threshold=None,
    min_area=None,
    presence=None,
    min_presence=NOT_GIVEN,
    on_error=None,
    refine=NOT_GIVEN,
    upsampler=NOT_GIVEN,
    tile=NOT_GIVEN,
) -> tuple[dict[str, Any], ...]:
    """
    The options of the pipeline by the step that takes them: those of reading, of the decision, and of the form of the
    result, without those that are not given.

    Raises:
        ValueError: a value that an option cannot have.
    """
    if output not in (None, *OUTPUTS):
        raise ValueError(f"Unknown output {output!r}; use {', '.join(map(repr, OUTPUTS[:-1]))} or {OUTPUTS[-1]!r}.")
    if on_error not in (None, "raise", "skip"):
        raise ValueError(f"Unknown on_error {on_error!r}; use 'raise' or 'skip'.")
    top_k, max_tokens = as_whole(top_k), as_whole(max_tokens)
    if top_k not in (None, NOT_GIVEN) and not is_count(top_k):
        raise ValueError(f"`top_k` must be a number of classes, at least 1, got {top_k!r}.")
    shares = {"threshold": threshold, "min_area": min_area, "min_presence": min_presence}
    check_shares(**{name: value for name, value in shares.items() if value not in (None, NOT_GIVEN)})
    vocabulary = None if candidate_labels is None else Vocabulary.parse(candidate_labels)
    if background is not None and background is not NOT_GIVEN and not isinstance(background, str):
        background = list(background)  # a generator could be read once only
    preprocess = {"size": size, "max_tokens": max_tokens, "image_range": image_range}
    preprocess |= {"on_error": on_error, "tile": tile}
    postprocess = {"output": output, "top_k": top_k}
    # a file of templates is read once, and what it holds is part of cached keys
    forward = {"vocabulary": vocabulary, "templates": read_templates(templates), **shares, **postprocess}
    forward |= {"background": background, "presence": presence, "refine": refine, "upsampler": upsampler}

    def is_given(name: str, value: Any) -> bool:
        return value is not NOT_GIVEN and (value is not None or name in SWITCHED_OFF)

    parts = (preprocess, forward, postprocess)
    return tuple({name: value for name, value in part.items() if is_given(name, value)} for part in parts)
