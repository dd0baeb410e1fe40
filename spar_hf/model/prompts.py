"""From words to text embeddings. How vocabularies and templates are written is in `words.py`."""

from collections.abc import Sequence

import torch
from transformers.utils import logging

from .words import (
    IMAGENET80,
    TEMPLATES,
    CandidateLabels,
    Vocabulary,
    distinct_names,
    name_tokens,
    normalise_name,
    resolve_templates,
    unknown_names,
)

logger = logging.get_logger(__name__)

PROGRESS_FROM = 1000  # names from which embedding takes long enough for a progress bar


@torch.no_grad()
def embed_names(
    model, tokenizer, names: Sequence[str], templates: str | Sequence[str] | None = None, batch_size: int = 256
) -> torch.Tensor:
    """
    One embedding per name: the mean of its L2-normalised prompt embeddings, normalised again (SPAR, section 3).

    All prompts are tokenised and checked before the first forward pass. A progress bar is shown for 1,000 names or more.

    Args:
        model ([`SparForOpenVocabSegmentation`]): its text tower embeds the prompts.
        tokenizer (`PreTrainedTokenizerBase`): that of the checkpoint.
        names (`Sequence[str]`): names to embed.
        templates (`str` or `Sequence[str]`, *optional*): defaults to the checkpoint's `config.templates`.
        batch_size (`int`, *optional*, defaults to 256): prompts per forward pass.

    Returns:
        `(names, dim)`, of unit length, float32.

    Raises:
        ValueError: a prompt is longer than the text tower's context, a name has no token, or the templates are malformed.
    """
    prompts_of = resolve_templates(model.config.templates if templates is None else templates)
    name_tokens(tokenizer, names, prompts_of)
    if unknown := unknown_names(tokenizer, names):
        logger.warning_once(
            f"The tokenizer knows none of the characters of {', '.join(map(repr, unknown[:5]))}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}. Results for such names are seldom right."
        )
    encoded = []
    for start in range(0, len(names), 256):  # in chunks: the tokenizer returns large lists of Python integers
        # all templates of the first name, then of the second, …
        prompts = [template.replace("{}", name) for name in names[start : start + 256] for template in prompts_of]
        encoded.append(_tokenise(tokenizer, prompts, model.config.text_config.max_position_embeddings))
    ids = torch.cat(encoded)
    features = []
    for batch in logging.tqdm(ids.split(batch_size), desc="embedding names", disable=len(names) < PROGRESS_FROM):
        outputs = model.get_text_features(batch.long().to(model.device)).pooler_output
        features.append(torch.nn.functional.normalize(outputs.float(), dim=-1))
    # (names * templates, dim) -> (names, dim)
    mean = torch.cat(features).view(len(names), len(prompts_of), -1).mean(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def _tokenise(tokenizer, prompts: Sequence[str], limit: int) -> torch.Tensor:
    """Token ids `(prompts, limit)` int32, padded to the text tower's length. Raises `ValueError` for longer prompts."""
    encoded = tokenizer(prompts, padding="max_length", max_length=limit, truncation=False)["input_ids"]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > limit:
            raise ValueError(f"{prompt!r} has {len(ids)} tokens, but the text tower reads {limit}. Shorten the name.")
    return torch.tensor(encoded, dtype=torch.int32)


__all__ = [
    "IMAGENET80",
    "TEMPLATES",
    "CandidateLabels",
    "Vocabulary",
    "distinct_names",
    "embed_names",
    "normalise_name",
    "resolve_templates",
    "unknown_names",
]
