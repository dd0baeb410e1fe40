"""SigLIP and fixed-resolution SigLIP2 in the naming of open_clip and timm: `visual.trunk.*`, `text.*`."""

import math

import torch
from torch.nn.functional import interpolate

from .checkpoint_tensors import OPEN_CLIP_BLOCK, CheckpointTensors
from .reference_layers import Tensors, attention, dense, mlp, norm, open_clip_block, patches

MODEL_TYPES = ("siglip",)
VISION_SETTINGS = {"layer_norm_eps": 1e-6}
TEXT_SETTINGS = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def rename(source: CheckpointTensors) -> None:
    """Rename every tensor to its name in [`SparForOpenVocabSegmentation`]."""
    trunk, vision = "visual.trunk.", "vision_model.backbone."
    source.linear(f"{trunk}patch_embed.proj", f"{vision}embeddings.patch_embedding")
    source.move(f"{trunk}pos_embed", f"{vision}embeddings.position_embedding.weight", lambda t: t.squeeze(0))
    timm_block = ("attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2")
    source.blocks(f"{trunk}blocks.", f"{vision}encoder.layers.", "attn.qkv.", timm_block)
    source.linear(f"{trunk}norm", f"{vision}post_layernorm")
    pool, head = f"{trunk}attn_pool.", f"{vision}head."
    source.move(f"{pool}latent", f"{head}probe")
    for part in ("weight", "bias"):
        query, keys_values = source.take(f"{pool}q.{part}"), source.take(f"{pool}kv.{part}")
        if query is not None and keys_values is not None:
            source.renamed[f"{head}attention.in_proj_{part}"] = torch.cat([query, keys_values])
    source.linear(f"{pool}proj", f"{head}attention.out_proj")
    source.linear(f"{pool}norm", f"{head}layernorm")
    source.linear(f"{pool}mlp.fc1", f"{head}mlp.fc1")
    source.linear(f"{pool}mlp.fc2", f"{head}mlp.fc2")

    source.move("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight")
    source.move("text.positional_embedding", "text_model.embeddings.position_embedding.weight")
    source.blocks("text.transformer.resblocks.", "text_model.encoder.layers.", "attn.in_proj_", OPEN_CLIP_BLOCK)
    source.linear("text.ln_final", "text_model.final_layer_norm")
    source.linear("text.text_projection", "text_model.head")
    source.scalar("logit_scale")
    source.scalar("logit_bias")


def dense_features(tensors: Tensors, pixels: torch.Tensor, config) -> torch.Tensor:
    """Reference feature map `(batch, dim, height / patch, width / patch)`: the pooling head applied to single patches."""
    trunk, vision = "visual.trunk.", config.backbone_config
    x = patches(tensors, f"{trunk}patch_embed.proj", pixels)
    grid = x.shape[-2:]
    table = tensors[f"{trunk}pos_embed"][0]
    side = math.isqrt(table.shape[0])
    x = x + interpolate(table.T.reshape(1, -1, side, side), size=grid, mode="bicubic")
    x = x.flatten(2).transpose(1, 2)
    for i in range(vision.num_hidden_layers):
        block = f"{trunk}blocks.{i}."
        qkv = dense(tensors, f"{block}attn.qkv", norm(tensors, f"{block}norm1", x, 1e-6))
        x = x + dense(tensors, f"{block}attn.proj", attention(qkv, vision.num_attention_heads))
        x = mlp(tensors, (f"{block}norm2", f"{block}mlp.fc1", f"{block}mlp.fc2"), x, vision.hidden_act, 1e-6)
    pool = f"{trunk}attn_pool."
    values = dense(tensors, f"{pool}kv", norm(tensors, f"{trunk}norm", x, 1e-6)).chunk(2, dim=-1)[1]
    x = dense(tensors, f"{pool}proj", values)
    x = mlp(tensors, (f"{pool}norm", f"{pool}mlp.fc1", f"{pool}mlp.fc2"), x, vision.hidden_act, 1e-6)
    return x.transpose(1, 2).unflatten(2, grid)


def text_features(tensors: Tensors, ids: torch.Tensor, config) -> torch.Tensor:
    """Reference text embeddings `(names, dim)`, not normalised."""
    x = tensors["text.token_embedding.weight"][ids] + tensors["text.positional_embedding"]
    heads = config.text_config.num_attention_heads
    for i in range(config.text_config.num_hidden_layers):
        block = f"text.transformer.resblocks.{i}."
        x = open_clip_block(tensors, block, x, heads, "gelu_pytorch_tanh", 1e-6, causal=False)
    return dense(tensors, "text.text_projection", norm(tensors, "text.ln_final", x, 1e-6)[:, -1])
