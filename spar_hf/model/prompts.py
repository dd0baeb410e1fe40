"""From words to text embeddings. How vocabularies are written is in `words.py`, templates are in `templates.py`."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from .templates import IMAGENET80, TEMPLATES, TemplateChoice, read_templates, resolve_templates
from .words import (
    UNKNOWN_NAMES,
    CandidateLabels,
    Vocabulary,
    distinct_names,
    normalise_name,
    prompt_tokens,
    some_of,
    unknown_names,
)

logger = logging.get_logger(__name__)

PROGRESS_AFTER = 2.0  # seconds from which embedding takes long enough for a progress bar


@torch.no_grad()
def embed_names(model, tokenizer, names: Sequence[str], templates: Any = None, batch_size: int = 256) -> torch.Tensor:
    """
    One embedding per name: the mean of its L2-normalised prompt embeddings, normalised again (SPAR, section 3).

    All prompts are tokenised and checked before the first forward pass. A progress bar appears after two seconds.

    Args:
        model ([`SparForOpenVocabSegmentation`]): its text tower embeds the prompts.
        tokenizer (`PreTrainedTokenizerBase`): that of the checkpoint.
        names (`Sequence[str]`): names to embed.
        templates (`str`, `Sequence[str]` or [`TemplateChoice`], *optional*):
            a set, strings with `{}`, or templates for each name or the JSON file of these. Default: the checkpoint's.
        batch_size (`int`, *optional*, defaults to 256): prompts per forward pass.

    Returns:
        `(names, dim)`, of unit length, float32.

    Raises:
        ValueError: a prompt is longer than the text tower's context, a name has no token, or the templates are malformed.
    """
    given = read_templates(model.config.templates if templates is None else templates)
    if isinstance(given, TemplateChoice):
        rows = given.rows_of(names, lambda some, prompts: embed_names(model, tokenizer, some, prompts, batch_size))
        return torch.stack(rows)
    prompts_of = resolve_templates(given)
    if unknown := unknown_names(tokenizer, names):
        logger.warning_once(UNKNOWN_NAMES.format(some_of(unknown)))
    limit = model.config.text_config.max_position_embeddings
    encoded = [torch.tensor(ids, dtype=torch.int32) for ids in prompt_tokens(tokenizer, names, prompts_of, limit)]
    ids = torch.cat(encoded)
    features = []
    for batch in logging.tqdm(ids.split(batch_size), desc="embedding names", delay=PROGRESS_AFTER):
        outputs = model.get_text_features(batch.long().to(model.device)).pooler_output
        features.append(torch.nn.functional.normalize(outputs.float(), dim=-1))
    # (names * templates, dim) -> (names, dim)
    mean = torch.cat(features).view(len(names), len(prompts_of), -1).mean(1)
    return torch.nn.functional.normalize(mean, dim=-1)


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
