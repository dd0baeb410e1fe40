"""DINOv3.txt in the naming of the dinov3 code: `visual_model.backbone.*`, `visual_model.head.*`, `text_model.*`."""

import math
from typing import Any

import torch
from torch.nn.functional import gelu, silu
from transformers import DINOv3ViTModel

from .checkpoint_tensors import CheckpointTensors
from .reference_layers import Tensors, attention, dense, mlp, norm, patches

MODEL_TYPES = ("dinov3_vit",)
VISION_SETTINGS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "use_gated_mlp": False,
    "pos_embed_rescale": None,
}
TEXT_SETTINGS = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}


def rename_block(source: CheckpointTensors, old: str, new: str, gated: bool) -> None:
    """Rename a block of the backbone, or of the vision head, whose MLP is gated."""
    source.linear(f"{old}norm1", f"{new}norm1")
    source.linear(f"{old}norm2", f"{new}norm2")
    source.split(f"{old}attn.qkv.weight", [f"{new}attention.{name}_proj.weight" for name in "qkv"])
    if not gated:
        source.split(f"{old}attn.qkv.bias", [f"{new}attention.{name}_proj.bias" for name in "qkv"])
        source.renamed.pop(f"{new}attention.k_proj.bias", None)  # bias_mask is 1, 0, 1: keys have no bias
        source.skip("mask that sets the bias of the keys to zero; the model has none", f"{old}attn.qkv.bias_mask")
    source.linear(f"{old}attn.proj", f"{new}attention.o_proj")
    for i in (1, 2):
        source.move(f"{old}ls{i}.gamma", f"{new}layer_scale{i}.lambda1")
    names = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"} if gated else {"fc1": "up_proj", "fc2": "down_proj"}
    for name, new_name in names.items():
        source.linear(f"{old}mlp.{name}", f"{new}mlp.{new_name}")


def rename(source: CheckpointTensors) -> None:
    """Rename every tensor to its name in [`SparForOpenVocabSegmentation`]."""
    old, new = "visual_model.backbone.", "vision_model.backbone."
    source.move(f"{old}cls_token", f"{new}embeddings.cls_token")
    source.move(f"{old}mask_token", f"{new}embeddings.mask_token", lambda t: t.reshape(1, 1, -1))
    source.move(f"{old}storage_tokens", f"{new}embeddings.register_tokens")
    source.linear(f"{old}patch_embed.proj", f"{new}embeddings.patch_embeddings")
    for i in range(source.depth(f"{old}blocks.")):
        rename_block(source, f"{old}blocks.{i}.", f"{new}model.layer.{i}.", gated=False)
    source.linear(f"{old}norm", f"{new}norm")
    # `build_config` moves the periods to the configuration, where half precision cannot round them
    source.move(f"{old}rope_embed.periods", "rope_periods")
    for i in range(source.depth("visual_model.head.blocks.")):
        rename_block(source, f"visual_model.head.blocks.{i}.", f"{new}vision_head.layer.{i}.", gated=True)
    source.linear("visual_model.head.ln_final", f"{new}vision_head.norm")

    text, new = "text_model.backbone.", "text_model.text_model."
    source.move(f"{text}token_embedding.weight", f"{new}embeddings.token_embedding.weight")
    source.move(f"{text}positional_embedding", f"{new}embeddings.position_embedding.weight")
    block = ("attention.proj", "attention_norm", "ffn_norm", "feed_forward.fc1", "feed_forward.fc2")
    source.blocks(f"{text}blocks.", f"{new}encoder.layers.", "attention.qkv.", block, bias=False)
    source.linear(f"{text}ln_final", f"{new}final_layer_norm")
    source.linear("text_model.head.linear_projection", "text_model.text_projection", bias=False)
    source.scalar("logit_scale")


def vision_block(tensors: Tensors, key: str, x: torch.Tensor, heads: int, rotate=None) -> torch.Tensor:
    """Transformer block of the backbone (with RoPE `rotate`) or of the vision head."""
    qkv = dense(tensors, f"{key}attn.qkv", norm(tensors, f"{key}norm1", x, 1e-5))
    if rotate is not None:
        # the published code masks the bias of the keys
        query, _, value = tensors[f"{key}attn.qkv.bias"].chunk(3)
        qkv = qkv - tensors[f"{key}attn.qkv.bias"] + torch.cat([query, torch.zeros_like(query), value])
    attended = dense(tensors, f"{key}attn.proj", attention(qkv, heads, rotate=rotate))
    x = x + attended * tensors[f"{key}ls1.gamma"]
    hidden = norm(tensors, f"{key}norm2", x, 1e-5)
    if f"{key}mlp.w1.weight" in tensors:
        hidden = silu(dense(tensors, f"{key}mlp.w1", hidden)) * dense(tensors, f"{key}mlp.w2", hidden)
        hidden = dense(tensors, f"{key}mlp.w3", hidden)
    else:
        hidden = dense(tensors, f"{key}mlp.fc2", gelu(dense(tensors, f"{key}mlp.fc1", hidden)))
    return x + hidden * tensors[f"{key}ls2.gamma"]


def tokens(tensors: Tensors, pixels: torch.Tensor, config) -> tuple[torch.Tensor, torch.Size]:
    """Tokens of the backbone after its last norm, class and register tokens first, and the size of the patch grid."""
    old, heads = "visual_model.backbone.", config.backbone_config.num_attention_heads
    x = patches(tensors, f"{old}patch_embed.proj", pixels)
    grid = x.shape[-2:]
    prefix = torch.cat([tensors[f"{old}cls_token"], tensors[f"{old}storage_tokens"]], dim=1)
    x = torch.cat([prefix.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    periods = tensors[f"{old}rope_embed.periods"]
    rows, columns = (2 * (torch.arange(n) + 0.5) / n - 1 for n in grid)
    down = (2 * math.pi * rows[:, None] / periods).repeat_interleave(grid[1], 0)  # (h * w, head_dim / 4)
    across = (2 * math.pi * columns[:, None] / periods).repeat(grid[0], 1)
    angles = torch.cat([down, across, down, across], dim=1)
    skip = prefix.shape[1]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        patches = x[:, :, skip:]
        first, second = patches.chunk(2, dim=-1)
        rotated = patches * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
        return torch.cat([x[:, :, :skip], rotated], dim=2)

    for i in range(config.backbone_config.num_hidden_layers):
        x = vision_block(tensors, f"{old}blocks.{i}.", x, heads, rotate)
    return norm(tensors, f"{old}norm", x, 1e-5), grid


def dense_features(tensors: Tensors, pixels: torch.Tensor, config) -> torch.Tensor:
    """Reference feature map `(batch, dim, height / patch, width / patch)`: patch tokens after the last norm."""
    x, grid = tokens(tensors, pixels, config)
    return x[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def load_base(base: str) -> DINOv3ViTModel:
    """The base as transformers runs it."""
    return DINOv3ViTModel.from_pretrained(base, dtype=torch.float32).eval()


def features_on(backbone: DINOv3ViTModel, tensors: Tensors, pixels: torch.Tensor, adaptor: str) -> torch.Tensor:
    """Reference feature map where the backbone's weights are those of the base: its patch tokens."""
    size: Any = backbone.config.patch_size
    grid = [side // size for side in pixels.shape[-2:]]
    return backbone(pixels).last_hidden_state[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def pooled_features(tensors: Tensors, pixels: torch.Tensor, config) -> torch.Tensor:
    """Reference image embedding `(batch, 2 * dim)` of the vision head: class token and mean of the patch tokens."""
    x, grid = tokens(tensors, pixels, config)
    for i in range(2):
        x = vision_block(tensors, f"visual_model.head.blocks.{i}.", x, config.backbone_config.num_attention_heads)
    x = norm(tensors, "visual_model.head.ln_final", x, 1e-5)
    return torch.cat([x[:, 0], x[:, -grid[0] * grid[1] :].mean(1)], dim=-1)


def text_features(tensors: Tensors, ids: torch.Tensor, config) -> torch.Tensor:
    """Reference text embeddings `(names, dim)`, not normalised: the half of the channels that matches patch tokens."""
    text, heads = "text_model.backbone.", config.text_config.num_attention_heads
    x = tensors[f"{text}token_embedding.weight"][ids] + tensors[f"{text}positional_embedding"][: ids.shape[1]]
    for i in range(config.text_config.num_hidden_layers):
        block = f"{text}blocks.{i}."
        qkv = dense(tensors, f"{block}attention.qkv", norm(tensors, f"{block}attention_norm", x, 1e-5))
        x = x + dense(tensors, f"{block}attention.proj", attention(qkv, heads, causal=True))
        keys = (f"{block}ffn_norm", f"{block}feed_forward.fc1", f"{block}feed_forward.fc2")
        x = mlp(tensors, keys, x, "gelu", 1e-5)
    x = norm(tensors, f"{text}ln_final", x, 1e-5)[torch.arange(len(ids)), ids.argmax(1)]
    return dense(tensors, "text_model.head.linear_projection", x)[:, -config.projection_dim :]
