"""
Layers of the published networks in plain torch, reading weights by the names in an official checkpoint. Every conversion of
a user is checked against them, so they share no code with the models of the library.
"""

import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear, pad, scaled_dot_product_attention, silu

Tensors = dict[str, torch.Tensor]

ACTIVATIONS = {
    "gelu": gelu,
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": silu,
}


def norm(tensors: Tensors, key: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer normalisation with weight and bias below `key`."""
    return layer_norm(x, x.shape[-1:], tensors[f"{key}.weight"], tensors[f"{key}.bias"], eps)


def dense(tensors: Tensors, key: str, x: torch.Tensor) -> torch.Tensor:
    """Linear layer with weight and, where it has one, bias below `key`."""
    return linear(x, tensors[f"{key}.weight"], tensors.get(f"{key}.bias"))


def attention(qkv: torch.Tensor, heads: int, causal: bool = False, rotate=None) -> torch.Tensor:
    """Attention of queries, keys and values `(batch, tokens, 3 * dim)` -> `(batch, tokens, dim)`; `rotate` is RoPE."""
    batch, tokens, width = qkv.shape
    query, key, value = qkv.view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    if rotate is not None:
        query, key = rotate(query), rotate(key)
    attended = scaled_dot_product_attention(query, key, value, is_causal=causal)
    return attended.transpose(1, 2).reshape(batch, tokens, width // 3)


def open_clip_block(tensors: Tensors, key: str, x: torch.Tensor, heads: int, act: str, eps: float, causal: bool):
    """Transformer block of open_clip, of the vision or the text tower."""
    qkv = linear(
        norm(tensors, f"{key}ln_1", x, eps), tensors[f"{key}attn.in_proj_weight"], tensors[f"{key}attn.in_proj_bias"]
    )
    x = x + dense(tensors, f"{key}attn.out_proj", attention(qkv, heads, causal))
    return mlp(tensors, (f"{key}ln_2", f"{key}mlp.c_fc", f"{key}mlp.c_proj"), x, act, eps)


def patches(tensors: Tensors, key: str, pixels: torch.Tensor) -> torch.Tensor:
    """Patch embeddings `(batch, dim, rows, columns)` below `key`; the image is padded right and bottom with zeros."""
    weight = tensors[f"{key}.weight"]
    size = weight.shape[-1]
    pixels = pad(pixels, (0, -pixels.shape[3] % size, 0, -pixels.shape[2] % size))
    return conv2d(pixels, weight, tensors.get(f"{key}.bias"), stride=size)


def mlp(tensors: Tensors, keys: tuple[str, str, str], x: torch.Tensor, act: str, eps: float) -> torch.Tensor:
    """A residual MLP; `keys` are those of its norm and of its two linear layers."""
    before, first, second = keys
    return x + dense(tensors, second, ACTIVATIONS[act](dense(tensors, first, norm(tensors, before, x, eps))))
