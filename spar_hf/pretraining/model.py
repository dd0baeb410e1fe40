"""The two towers that are pre-trained, and how they start."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast, SiglipTextConfig, SiglipVisionConfig

from spar_hf import SparConfig, SparForOpenVocabSegmentation, SparProcessor
from spar_hf.model.backbone_sources import load_source_config
from spar_hf.pretraining.crops import CropSet
from spar_hf.pretraining.options import PATCH_SIZE, NewModelOptions
from spar_hf.pretraining.words import build_tokenizer, common_words, fast_tokenizer, teach_words
from spar_hf.utils.errors import as_usage_errors

logger = logging.getLogger(__name__)


class Towers(nn.Module):
    """Both towers in one forward, so that accelerate can wrap and autocast them together."""

    def __init__(self, model: SparForOpenVocabSegmentation):
        super().__init__()
        self.model = model
        model.set_attn_implementation("eager")  # its backward pass is a fifth faster than sdpa's on CPUs at 144 tokens

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps and pooled features of crops, embeddings of prompts, and the factor on their cosines."""
        vision = self.model.vision_model(pixel_values, output_pooled=True)
        return {
            "feature_map": vision.feature_map,
            "pooler_output": vision.pooler_output,
            "text_embeds": self.model.get_text_features(input_ids).pooler_output,
            "dense_logit_scale": self.model.config.dense_logit_scale,
        }


def load_model(folder: str) -> tuple[SparForOpenVocabSegmentation, SparProcessor]:
    """
    A finished model to train further, and its processor.

    Raises:
        UsageError: the folder holds no such model.
    """
    with as_usage_errors():
        load_source_config(folder)  # says in plain words that there is no such folder
        model = SparForOpenVocabSegmentation.from_pretrained(folder)
    with as_usage_errors():
        return model, SparProcessor.from_pretrained(folder)


def new_model(
    options: NewModelOptions, sets: list[CropSet], extra: list[str], seed: int, kept: Path, initialise: bool
) -> tuple[SparForOpenVocabSegmentation, PreTrainedTokenizerFast]:
    """
    Towers that have seen no image, and a tokenizer made for their words.

    Args:
        options: sizes and words.
        sets: give the words that label pixels and images.
        extra: words that label nothing.
        seed: of the words' directions and their lessons.
        kept: file of the run's tokenizer. A resumed run reads it, since other images would make another one.
        initialise: whether to initialise the vision tower and teach the text tower its words; not for a resumed run, whose
            weights come from a checkpoint.
    """
    if options.text_teacher is not None:
        with as_usage_errors():
            extra = extra + common_words(options.text_teacher, options.common_words)
    if not initialise and kept.is_file():
        tokenizer = fast_tokenizer(Tokenizer.from_file(str(kept)))
    else:
        tokenizer = build_tokenizer(sets, extra, options.vocab_size)
    model = build_model(options, tokenizer)
    if initialise:
        mimetic_initialisation(model)
        reached = teach_words(model, tokenizer, sets, extra, options.text_teacher, options.text_steps, seed)
        logger.info("mean cosine of text embeddings to their targets: %s", reached)
    return model, tokenizer


def build_model(options: NewModelOptions, tokenizer: PreTrainedTokenizerFast) -> SparForOpenVocabSegmentation:
    """Two towers of random weights."""
    size = options.hidden_size
    shape: dict[str, Any] = {
        "hidden_size": size,
        "intermediate_size": 4 * size,
        "num_attention_heads": max(1, size // 64),
    }
    vision = SiglipVisionConfig(
        patch_size=PATCH_SIZE,
        image_size=options.window_size,
        num_hidden_layers=options.layers,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        **shape,
    )
    text = SiglipTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        num_hidden_layers=options.text_layers,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **shape,
    )
    model = SparForOpenVocabSegmentation(SparConfig(backbone_config=vision, text_config=text, dtype="float32"))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(model.config.dense_logit_scale))  # the loss is a softmax: there is no bias
    return model


@torch.no_grad()
def mimetic_initialisation(model: SparForOpenVocabSegmentation) -> None:
    """
    Initialise the attention of the vision tower like that of a trained ViT: with `I` the identity, the product of query and
    key weights is `0.7 I` plus noise, and that of value and output weights is noise minus `0.4 I`. Tokens then attend to
    similar tokens and subtract their mean. With few images a ViT learns faster from there than from noise alone.

    Source: mimetic initialisation (Trockman & Kolter, 2023).
    """
    backbone = model.vision_model.backbone
    size, heads = backbone.config.hidden_size, backbone.config.num_attention_heads
    identity = torch.eye(size)
    for layer in backbone.encoder.layers:
        attention, width = layer.self_attn, size // heads
        for head in range(heads):
            u, s, v = torch.linalg.svd(0.7 * torch.randn(size, size) / size**0.5 + 0.7 * identity)
            part, root = slice(head * width, (head + 1) * width), s[:width].sqrt()[:, None]
            attention.q_proj.weight[part] = root * u.T[:width]
            attention.k_proj.weight[part] = root * v[:width]
        u, s, v = torch.linalg.svd(0.4 * torch.randn(size, size) / size**0.5 - 0.4 * identity)
        attention.out_proj.weight.copy_(u * s.sqrt())
        attention.v_proj.weight.copy_(s.sqrt()[:, None] * v)
