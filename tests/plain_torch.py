"""
The published networks written down in plain torch from their original parameter names, for tiny random weights.

It must share no code with the library, `spar_hf/conversion/reference_layers.py` included: models, converter and teacher are
held against it.
"""

import math

import torch
from torch.nn import functional as F


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every weight, bias, norm and scale non-trivial."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        scales = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_1.weight", "ln_2.weight", "gamma"))
        scales |= (
            name.rsplit(".", 1)[0].endswith(("ln_pre", "ln_post", "ln_final", "_norm", "norm")) and "weight" in name
        )
        state[name] = 1 + 0.2 * values if scales else values * (0.5 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.2)
    return state


def linear_shapes(name: str, out: int, into: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm_shapes(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def open_clip_block_shapes(key: str, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{key}attn.in_proj_weight": (3 * dim, dim),
        f"{key}attn.in_proj_bias": (3 * dim,),
        **linear_shapes(f"{key}attn.out_proj", dim, dim),
        **norm_shapes(f"{key}ln_1", dim),
        **norm_shapes(f"{key}ln_2", dim),
        **linear_shapes(f"{key}mlp.c_fc", hidden, dim),
        **linear_shapes(f"{key}mlp.c_proj", dim, hidden),
    }


def siglip2_shapes(dim=32, hidden=48, layers=2, patch=8, side=4, vocab=40, length=12) -> dict[str, tuple[int, ...]]:
    trunk = "visual.trunk."
    shapes = {f"{trunk}patch_embed.proj.weight": (dim, 3, patch, patch), f"{trunk}patch_embed.proj.bias": (dim,)}
    shapes[f"{trunk}pos_embed"] = (1, side * side, dim)
    for i in range(layers):
        block = f"{trunk}blocks.{i}."
        shapes |= norm_shapes(f"{block}norm1", dim) | norm_shapes(f"{block}norm2", dim)
        shapes |= linear_shapes(f"{block}attn.qkv", 3 * dim, dim) | linear_shapes(f"{block}attn.proj", dim, dim)
        shapes |= linear_shapes(f"{block}mlp.fc1", hidden, dim) | linear_shapes(f"{block}mlp.fc2", dim, hidden)
        shapes |= open_clip_block_shapes(f"text.transformer.resblocks.{i}.", dim, hidden)
    shapes |= norm_shapes(f"{trunk}norm", dim) | {f"{trunk}attn_pool.latent": (1, 1, dim)}
    pool = f"{trunk}attn_pool."
    shapes |= linear_shapes(f"{pool}q", dim, dim) | linear_shapes(f"{pool}kv", 2 * dim, dim)
    shapes |= linear_shapes(f"{pool}proj", dim, dim) | norm_shapes(f"{pool}norm", dim)
    shapes |= linear_shapes(f"{pool}mlp.fc1", hidden, dim) | linear_shapes(f"{pool}mlp.fc2", dim, hidden)
    shapes |= {"text.token_embedding.weight": (vocab, dim), "text.positional_embedding": (length, dim)}
    shapes |= norm_shapes("text.ln_final", dim) | linear_shapes("text.text_projection", dim, dim)
    return shapes | {"logit_scale": (), "logit_bias": ()}


def openclip_shapes(
    dim=32, hidden=48, layers=2, patch=8, side=4, out=24, text=16, vocab=40, length=12
) -> dict[str, tuple[int, ...]]:
    shapes = {"visual.conv1.weight": (dim, 3, patch, patch), "visual.class_embedding": (dim,)}
    shapes |= {"visual.positional_embedding": (side * side + 1, dim), "visual.proj": (dim, out)}
    shapes |= norm_shapes("visual.ln_pre", dim) | norm_shapes("visual.ln_post", dim)
    for i in range(layers):
        shapes |= open_clip_block_shapes(f"visual.transformer.resblocks.{i}.", dim, hidden)
        shapes |= open_clip_block_shapes(f"transformer.resblocks.{i}.", text, hidden)
    shapes |= {"token_embedding.weight": (vocab, text), "positional_embedding": (length, text)}
    return shapes | norm_shapes("ln_final", text) | {"text_projection": (text, out), "logit_scale": ()}


def dinov3txt_shapes(
    dim=32, heads=2, layers=2, patch=8, registers=4, text=24, vocab=40, length=12
) -> dict[str, tuple[int, ...]]:
    old, hidden, gated = "visual_model.backbone.", 4 * dim, math.ceil(int(8 * dim / 3) / 64) * 64
    shapes = {f"{old}cls_token": (1, 1, dim), f"{old}mask_token": (1, dim), f"{old}storage_tokens": (1, registers, dim)}
    shapes |= {f"{old}patch_embed.proj.weight": (dim, 3, patch, patch), f"{old}patch_embed.proj.bias": (dim,)}
    for prefix, count, bias in ((f"{old}blocks.", layers, True), ("visual_model.head.blocks.", 2, False)):
        for i in range(count):
            block = f"{prefix}{i}."
            shapes |= norm_shapes(f"{block}norm1", dim) | norm_shapes(f"{block}norm2", dim)
            shapes |= linear_shapes(f"{block}attn.qkv", 3 * dim, dim, bias) | linear_shapes(
                f"{block}attn.proj", dim, dim
            )
            shapes |= {f"{block}ls1.gamma": (dim,), f"{block}ls2.gamma": (dim,)}
            if bias:
                shapes |= {f"{block}attn.qkv.bias_mask": (3 * dim,)}
                shapes |= linear_shapes(f"{block}mlp.fc1", hidden, dim) | linear_shapes(f"{block}mlp.fc2", dim, hidden)
            else:
                shapes |= linear_shapes(f"{block}mlp.w1", gated, dim) | linear_shapes(f"{block}mlp.w2", gated, dim)
                shapes |= linear_shapes(f"{block}mlp.w3", dim, gated)
    shapes |= norm_shapes(f"{old}norm", dim) | norm_shapes("visual_model.head.ln_final", dim)
    shapes |= {f"{old}rope_embed.periods": (dim // heads // 4,)}
    words = "text_model.backbone."
    shapes |= {f"{words}token_embedding.weight": (vocab, text), f"{words}positional_embedding": (length, text)}
    for i in range(layers):
        block = f"{words}blocks.{i}."
        shapes |= norm_shapes(f"{block}attention_norm", text) | norm_shapes(f"{block}ffn_norm", text)
        shapes |= linear_shapes(f"{block}attention.qkv", 3 * text, text, bias=False)
        shapes |= linear_shapes(f"{block}attention.proj", text, text)
        shapes |= linear_shapes(f"{block}feed_forward.fc1", 4 * text, text)
        shapes |= linear_shapes(f"{block}feed_forward.fc2", text, 4 * text)
    shapes |= norm_shapes(f"{words}ln_final", text)
    return shapes | {"text_model.head.linear_projection.weight": (2 * dim, text), "logit_scale": ()}


def softmax_attention(x, weight, bias, heads, mask=None, rotate=None):
    """Written out with an explicit softmax: `(batch, tokens, dim)` -> the same, before the output projection."""
    q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    if rotate is not None:
        q, k = rotate(q), rotate(k)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Plain:
    """Base of the families: parameters by name."""

    def __init__(self, state: dict[str, torch.Tensor], heads: int, text_heads: int):
        self.p, self.heads, self.text_heads = state, heads, text_heads

    def lin(self, key, x):
        return F.linear(x, self.p[f"{key}.weight"], self.p.get(f"{key}.bias"))

    def norm(self, key, x, eps):
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + eps) * self.p[f"{key}.weight"] + self.p[f"{key}.bias"]

    def clip_block(self, key, x, heads, act, eps, mask=None):
        weight, bias = self.p[f"{key}attn.in_proj_weight"], self.p[f"{key}attn.in_proj_bias"]
        x = x + self.lin(
            f"{key}attn.out_proj", softmax_attention(self.norm(f"{key}ln_1", x, eps), weight, bias, heads, mask)
        )
        return x + self.lin(f"{key}mlp.c_proj", act(self.lin(f"{key}mlp.c_fc", self.norm(f"{key}ln_2", x, eps))))

    def causal(self, length):
        return torch.full((length, length), float("-inf")).triu(1)

    def depth(self, key):
        return 1 + max(int(name[len(key) :].split(".")[0]) for name in self.p if name.startswith(key))


class PlainSiglip2(Plain):
    def features(self, pixels):
        t = "visual.trunk."
        weight = self.p[f"{t}patch_embed.proj.weight"]
        x = F.conv2d(pixels, weight, self.p[f"{t}patch_embed.proj.bias"], stride=weight.shape[-1])
        h, w = x.shape[-2:]
        table = self.p[f"{t}pos_embed"]
        side = math.isqrt(table.shape[1])
        table = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(h, w), mode="bicubic", antialias=False)
        x = (x + table).flatten(2).transpose(1, 2)
        for i in range(self.depth(f"{t}blocks.")):
            b = f"{t}blocks.{i}."
            weight, bias = self.p[f"{b}attn.qkv.weight"], self.p[f"{b}attn.qkv.bias"]
            x = x + self.lin(
                f"{b}attn.proj", softmax_attention(self.norm(f"{b}norm1", x, 1e-6), weight, bias, self.heads)
            )
            x = x + self.lin(f"{b}mlp.fc2", F.gelu(self.lin(f"{b}mlp.fc1", self.norm(f"{b}norm2", x, 1e-6))))
        x = self.norm(f"{t}norm", x, 1e-6)
        dim = x.shape[-1]
        v = F.linear(x, self.p[f"{t}attn_pool.kv.weight"][dim:], self.p[f"{t}attn_pool.kv.bias"][dim:])
        v = self.lin(f"{t}attn_pool.proj", v)
        inner = F.gelu(self.lin(f"{t}attn_pool.mlp.fc1", self.norm(f"{t}attn_pool.norm", v, 1e-6)))
        v = v + self.lin(f"{t}attn_pool.mlp.fc2", inner)
        return v.transpose(1, 2).reshape(len(v), dim, h, w)

    def texts(self, ids):
        x = self.p["text.token_embedding.weight"][ids] + self.p["text.positional_embedding"]
        act = lambda v: F.gelu(v, approximate="tanh")  # noqa: E731
        for i in range(self.depth("text.transformer.resblocks.")):
            x = self.clip_block(f"text.transformer.resblocks.{i}.", x, self.text_heads, act, 1e-6)
        return self.lin("text.text_projection", self.norm("text.ln_final", x, 1e-6)[:, -1])


class PlainMaskClip(Plain):
    def __init__(self, state, heads, text_heads, quick: bool):
        super().__init__(state, heads, text_heads)
        self.act = (lambda v: v * torch.sigmoid(1.702 * v)) if quick else F.gelu

    def features(self, pixels):
        weight = self.p["visual.conv1.weight"]
        x = F.conv2d(pixels, weight, stride=weight.shape[-1])
        h, w = x.shape[-2:]
        table = self.p["visual.positional_embedding"]
        side = math.isqrt(len(table) - 1)
        grid = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if h * w != side * side:
            grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        x = (x + grid).flatten(2).transpose(1, 2)
        first = (self.p["visual.class_embedding"] + table[0]).repeat(len(x), 1, 1)
        x = self.norm("visual.ln_pre", torch.cat([first, x], 1), 1e-5)
        layers = self.depth("visual.transformer.resblocks.")
        for i in range(layers - 1):
            x = self.clip_block(f"visual.transformer.resblocks.{i}.", x, self.heads, self.act, 1e-5)
        b, dim = f"visual.transformer.resblocks.{layers - 1}.", x.shape[-1]
        weight, bias = self.p[f"{b}attn.in_proj_weight"][2 * dim :], self.p[f"{b}attn.in_proj_bias"][2 * dim :]
        x = x + self.lin(f"{b}attn.out_proj", F.linear(self.norm(f"{b}ln_1", x, 1e-5), weight, bias))
        x = x + self.lin(f"{b}mlp.c_proj", self.act(self.lin(f"{b}mlp.c_fc", self.norm(f"{b}ln_2", x, 1e-5))))
        x = (self.norm("visual.ln_post", x, 1e-5) @ self.p["visual.proj"])[:, 1:]
        return x.transpose(1, 2).reshape(len(x), -1, h, w)

    def pooled(self, pixels):
        """CLIP's own image embedding, at the native size."""
        weight = self.p["visual.conv1.weight"]
        x = F.conv2d(pixels, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        x = torch.cat([self.p["visual.class_embedding"].repeat(len(x), 1, 1), x], 1)
        x = self.norm("visual.ln_pre", x + self.p["visual.positional_embedding"], 1e-5)
        for i in range(self.depth("visual.transformer.resblocks.")):
            x = self.clip_block(f"visual.transformer.resblocks.{i}.", x, self.heads, self.act, 1e-5)
        return self.norm("visual.ln_post", x[:, 0], 1e-5) @ self.p["visual.proj"]

    def texts(self, ids):
        x = self.p["token_embedding.weight"][ids] + self.p["positional_embedding"][: ids.shape[1]]
        for i in range(self.depth("transformer.resblocks.")):
            mask = self.causal(ids.shape[1])
            x = self.clip_block(f"transformer.resblocks.{i}.", x, self.text_heads, self.act, 1e-5, mask)
        x = self.norm("ln_final", x, 1e-5)
        return torch.stack([row[i] for row, i in zip(x, ids.argmax(1), strict=True)]) @ self.p["text_projection"]


class PlainDinov3Txt(Plain):
    registers = 4

    def tokens(self, pixels):
        t = "visual_model.backbone."
        weight = self.p[f"{t}patch_embed.proj.weight"]
        x = F.conv2d(pixels, weight, self.p[f"{t}patch_embed.proj.bias"], stride=weight.shape[-1])
        h, w = x.shape[-2:]
        first = torch.cat([self.p[f"{t}cls_token"], self.p[f"{t}storage_tokens"]], 1)
        x = torch.cat([first.repeat(len(x), 1, 1), x.flatten(2).transpose(1, 2)], 1)
        periods = self.p[f"{t}rope_embed.periods"]
        angles = []
        for i in range(h):
            for j in range(w):
                y, z = (i + 0.5) / h * 2 - 1, (j + 0.5) / w * 2 - 1
                angles.append(torch.cat([2 * math.pi * y / periods, 2 * math.pi * z / periods]).repeat(2))
        angles = torch.stack(angles)

        def rotate(q):
            head, patches = q[:, :, : 1 + self.registers], q[:, :, 1 + self.registers :]
            half = patches.shape[-1] // 2
            swapped = torch.cat([-patches[..., half:], patches[..., :half]], -1)
            return torch.cat([head, patches * angles.cos() + swapped * angles.sin()], 2)

        for i in range(self.depth(f"{t}blocks.")):
            x = self.block(f"{t}blocks.{i}.", x, rotate)
        return self.norm(f"{t}norm", x, 1e-5), h, w

    def block(self, b, x, rotate=None):
        bias = None
        if rotate is not None:
            bias = self.p[f"{b}attn.qkv.bias"] * torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(x.shape[-1])
        weight = self.p[f"{b}attn.qkv.weight"]
        attended = softmax_attention(self.norm(f"{b}norm1", x, 1e-5), weight, bias, self.heads, rotate=rotate)
        x = x + self.p[f"{b}ls1.gamma"] * self.lin(f"{b}attn.proj", attended)
        y = self.norm(f"{b}norm2", x, 1e-5)
        if rotate is None:
            y = self.lin(f"{b}mlp.w3", F.silu(self.lin(f"{b}mlp.w1", y)) * self.lin(f"{b}mlp.w2", y))
        else:
            y = self.lin(f"{b}mlp.fc2", F.gelu(self.lin(f"{b}mlp.fc1", y)))
        return x + self.p[f"{b}ls2.gamma"] * y

    def features(self, pixels):
        x, h, w = self.tokens(pixels)
        return x[:, 1 + self.registers :].transpose(1, 2).reshape(len(x), -1, h, w)

    def pooled(self, pixels):
        x, _, _ = self.tokens(pixels)
        for i in range(2):
            x = self.block(f"visual_model.head.blocks.{i}.", x)
        x = self.norm("visual_model.head.ln_final", x, 1e-5)
        return torch.cat([x[:, 0], x[:, 1 + self.registers :].mean(1)], -1)

    def texts(self, ids):
        t = "text_model.backbone."
        x = self.p[f"{t}token_embedding.weight"][ids] + self.p[f"{t}positional_embedding"][: ids.shape[1]]
        for i in range(self.depth(f"{t}blocks.")):
            b, mask = f"{t}blocks.{i}.", self.causal(ids.shape[1])
            weight = self.p[f"{b}attention.qkv.weight"]
            attended = softmax_attention(self.norm(f"{b}attention_norm", x, 1e-5), weight, None, self.text_heads, mask)
            x = x + self.lin(f"{b}attention.proj", attended)
            inner = F.gelu(self.lin(f"{b}feed_forward.fc1", self.norm(f"{b}ffn_norm", x, 1e-5)))
            x = x + self.lin(f"{b}feed_forward.fc2", inner)
        x = self.norm(f"{t}ln_final", x, 1e-5)
        x = torch.stack([row[i] for row, i in zip(x, ids.argmax(1), strict=True)])
        x = self.lin("text_model.head.linear_projection", x)
        return x[:, x.shape[1] // 2 :]
