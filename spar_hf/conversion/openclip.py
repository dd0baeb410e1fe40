"""CLIP in the naming of open_clip and OpenAI: `visual.*`, `transformer.*`."""

import math

import torch
from torch.nn.functional import interpolate, linear

from .checkpoint_tensors import OPEN_CLIP_BLOCK, CheckpointTensors
from .reference_layers import Tensors, dense, mlp, norm, open_clip_block, patches

MODEL_TYPES = ("clip",)
# the base determines the activation (gelu, or quick_gelu for OpenAI's weights) and the number of heads
VISION_SETTINGS = {"layer_norm_eps": 1e-5}
TEXT_SETTINGS = {"layer_norm_eps": 1e-5}


def rename(source: CheckpointTensors) -> None:
    """Rename every tensor to its name in [`SparForOpenVocabSegmentation`]."""
    vision, text = "vision_model.backbone.", "text_model.text_model."
    source.move("visual.class_embedding", f"{vision}embeddings.class_embedding")
    source.move("visual.positional_embedding", f"{vision}embeddings.position_embedding.weight")
    source.move("visual.conv1.weight", f"{vision}embeddings.patch_embedding.weight")
    source.linear("visual.ln_pre", f"{vision}pre_layrnorm")
    source.blocks("visual.transformer.resblocks.", f"{vision}encoder.layers.", "attn.in_proj_", OPEN_CLIP_BLOCK)
    source.linear("visual.ln_post", f"{vision}post_layernorm")
    source.move("visual.proj", f"{vision}visual_projection.weight", lambda t: t.T)

    source.move("token_embedding.weight", f"{text}embeddings.token_embedding.weight")
    source.move("positional_embedding", f"{text}embeddings.position_embedding.weight")
    source.blocks("transformer.resblocks.", f"{text}encoder.layers.", "attn.in_proj_", OPEN_CLIP_BLOCK)
    source.linear("ln_final", f"{text}final_layer_norm")
    source.move("text_projection", "text_model.text_projection.weight", lambda t: t.T)
    source.scalar("logit_scale")
    source.skip("causal mask of the text tower, computed by the model", "attn_mask")
    source.skip("a size, known from the shapes of the tensors", "input_resolution", "context_length", "vocab_size")


def dense_features(tensors: Tensors, pixels: torch.Tensor, config) -> torch.Tensor:
    """Reference feature map `(batch, dim, height / patch, width / patch)` of MaskCLIP, without the last attention."""
    vision = config.backbone_config
    x = patches(tensors, "visual.conv1", pixels)
    grid = x.shape[-2:]
    table = tensors["visual.positional_embedding"]
    side = math.isqrt(table.shape[0] - 1)
    positions = table[1:].T.reshape(1, -1, side, side)
    if tuple(grid) != (side, side):
        factor = tuple((length + 0.1) / side for length in grid)
        positions = interpolate(positions, scale_factor=factor, mode="bicubic")
    x = (x + positions).flatten(2).transpose(1, 2)
    class_token = (tensors["visual.class_embedding"] + table[0]).expand(x.shape[0], 1, -1)
    x = norm(tensors, "visual.ln_pre", torch.cat([class_token, x], dim=1), 1e-5)
    heads, act = vision.num_attention_heads, vision.hidden_act
    for i in range(vision.num_hidden_layers - 1):
        x = open_clip_block(tensors, f"visual.transformer.resblocks.{i}.", x, heads, act, 1e-5, causal=False)
    last = f"visual.transformer.resblocks.{vision.num_hidden_layers - 1}."
    value_weight = tensors[f"{last}attn.in_proj_weight"].chunk(3)[2]
    value_bias = tensors[f"{last}attn.in_proj_bias"].chunk(3)[2]
    values = linear(norm(tensors, f"{last}ln_1", x, 1e-5), value_weight, value_bias)
    x = x + dense(tensors, f"{last}attn.out_proj", values)
    x = mlp(tensors, (f"{last}ln_2", f"{last}mlp.c_fc", f"{last}mlp.c_proj"), x, act, 1e-5)
    x = norm(tensors, "visual.ln_post", x, 1e-5)[:, 1:] @ tensors["visual.proj"]
    return x.transpose(1, 2).unflatten(2, grid)


def text_features(tensors: Tensors, ids: torch.Tensor, config) -> torch.Tensor:
    """Reference text embeddings `(names, dim)`, pooled at the end token, not normalised."""
    text = config.text_config
    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"][: ids.shape[1]]
    for i in range(text.num_hidden_layers):
        block = f"transformer.resblocks.{i}."
        x = open_clip_block(tensors, block, x, text.num_attention_heads, text.hidden_act, 1e-5, causal=True)
    x = norm(tensors, "ln_final", x, 1e-5)
    return x[torch.arange(len(ids)), ids.argmax(1)] @ tensors["text_projection"]
