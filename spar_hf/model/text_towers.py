"""The text towers, and how each family pools a text."""

from typing import Any

import torch
from transformers import (
    CLIPTextModelWithProjection,
    MetaClip2TextModelWithProjection,
    Siglip2TextModel,
    SiglipTextModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .readout_tipsv2 import Tipsv2TextTower

# not AutoModel, which does not know SigLIP's text tower and loads CLIP's without its projection
TEXT_MODELS: dict[str, Any] = {
    "siglip_text_model": SiglipTextModel,
    "siglip2_text_model": Siglip2TextModel,
    "clip_text_model": CLIPTextModelWithProjection,
    "metaclip_2_text_model": MetaClip2TextModelWithProjection,
    "tipsv2_text_model": Tipsv2TextTower,
}
POOLED_AT_THE_END = ("siglip_text_model", "siglip2_text_model")  # at the last token, padding or not, without a mask
PROJECTED = ("clip_text_model", "metaclip_2_text_model")  # after pooling


def embed_tokens(
    text_model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, dim: int, **options: Any
) -> BaseModelOutputWithPooling:
    """
    The outputs of a text tower, whose `pooler_output` `(names, dim)` are the embeddings that face patches.

    Args:
        text_model: one of `TEXT_MODELS`.
        input_ids: `(names, length)`.
        attention_mask: `(names, length)`, ignored by SigLIP's towers.
        dim: width of the dense features.
        options: of the text model's forward pass.

    Raises:
        ValueError: prompts that are too long, or for a SigLIP text tower of another length.
    """
    kind, length = text_model.config.model_type, text_model.config.max_position_embeddings
    if kind in POOLED_AT_THE_END:
        if input_ids.shape[-1] != length:
            raise ValueError(
                f"The text tower reads prompts of exactly {length} tokens (it is pooled at the last), got "
                f'{input_ids.shape[-1]}. Tokenise with `padding="max_length", max_length={length}`.'
            )
        return text_model(input_ids=input_ids, return_dict=True, **options)
    if input_ids.shape[-1] > length:
        raise ValueError(
            f"The text tower reads prompts of up to {length} tokens, got {input_ids.shape[-1]}. Shorten them, or "
            f"tokenise with `truncation=True, max_length={length}`."
        )
    outputs = text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **options)
    embeddings = outputs.text_embeds if kind in PROJECTED else outputs.pooler_output
    # dino.txt compares the first half of its embedding with the pooled image, the last half with patches
    return BaseModelOutputWithPooling(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=embeddings[:, -dim:],
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
