"""
A student that starts out looking nearby: locality written into the weights of a SigLIP-shaped encoder.

Inside a window attention sees 144 or 1024 patches, all of them near. In one pass over a large photo the same weights see
many times more, most of them of other things; the features of a sliding window are those of an attention that stays near. So
before distillation every head gets a Gaussian prior over distance. It costs nothing at run time and the architecture stays
what it is, because

    -|p - q|² / 2σ² = (p·q - |q|² / 2) / σ² + (what does not depend on the key q)

is an inner product of (x, y, 1) at the query and (x, y, -(x² + y²) / 2) at the key: three numbers that a position table
can carry, linear and quadratic functions of place that resampling keeps. They take the three directions of the token space
that the encoder uses least, which it stops reading and writing otherwise, and the three weakest of each head's dimensions.

Early layers are left as they are: tokens differ most in size there (a patch of sky against one of leaves), and the layer
norm before attention would make errors of place of that.
"""

import math

import torch

from spar_hf import SparVisionModel


@torch.no_grad()
def start_local(model: SparVisionModel, pixel_values: torch.Tensor, spread: float) -> None:
    """
    Change the weights of `model` in place.

    Args:
        model ([`SparVisionModel`]): with the SigLIP read-out.
        pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`): photos that show which directions of the
            token space are used.
        spread (`float`): standard deviation of the prior, in halves of the image's side.

    Raises:
        ValueError: another read-out, or heads of three dimensions or fewer.
    """
    if model.config.readout != "siglip":
        raise ValueError(f"A local start is written for the SigLIP read-out, not for {model.config.readout!r}.")
    backbone = model.backbone
    layers = backbone.encoder.layers
    heads = layers[0].self_attn.num_heads
    width = model.config.hidden_size // heads
    if width < 4:
        raise ValueError(f"A local start takes three dimensions of each head, and these have {width}.")
    states = model(pixel_values, output_hidden_states=True).hidden_states
    size = model.config.hidden_size
    # directions of least variance over all layers, none of them the mean that a layer norm takes away
    ones = torch.full((size, 1), size**-0.5)
    keep = torch.eye(size) - ones @ ones.T
    covariance = sum(torch.cov(h.flatten(0, 1).T) / h.var() for h in states)
    _, directions = torch.linalg.eigh(keep @ covariance @ keep + 1e6 * ones @ ones.T)
    u = directions[:, :3]  # (hidden, 3)

    def stop_writing(linear):
        linear.weight -= u @ (u.T @ linear.weight)
        linear.bias -= u @ (u.T @ linear.bias)

    def stop_reading(weight, bias, norm):
        # what is read of z = (h - mean) / std is weight @ (gamma * z + beta)
        read = weight @ (norm.weight[:, None] * u)  # (out, 3)
        weight -= read @ (u / norm.weight[:, None]).T
        bias += read @ (u / norm.weight[:, None]).T @ norm.bias

    patch = backbone.embeddings.patch_embedding
    patch.weight -= torch.einsum("ij,jcyx->icyx", u @ u.T, patch.weight)
    patch.bias -= u @ (u.T @ patch.bias)
    table = backbone.embeddings.position_embedding.weight
    side = math.isqrt(len(table))
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    place = torch.stack([columns.flatten(), rows.flatten(), (rows**2 + columns**2).flatten()], dim=1)
    # as large as tokens are at the end: what training writes by chance is then small beside it
    amplitude = float(states[-1].std(-1).mean())
    place[:, 2] -= place[:, 2].mean()
    table -= table @ u @ u.T
    table += amplitude * place @ u.T

    first = len(layers) * 3 // 8
    for number, (layer, hidden) in enumerate(zip(layers, states, strict=False)):
        attention, norm = layer.self_attn, layer.layer_norm1
        std = float(hidden.std(-1).mean())
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            stop_reading(linear.weight, linear.bias, norm)
        stop_reading(layer.mlp.fc1.weight, layer.mlp.fc1.bias, layer.layer_norm2)
        stop_writing(attention.out_proj)
        stop_writing(layer.mlp.fc2)
        if number < first:
            continue
        gain = std / (amplitude * spread * attention.scale**0.5)
        constant = std / (2 * spread**2 * attention.scale * gain * amplitude)
        reader = gain * (u / norm.weight[:, None]).T  # (3, hidden): reads x, y, x² + y² of a token
        offset = -reader @ norm.bias
        for head in range(heads):
            rows_of_head = slice(head * width, (head + 1) * width)
            query = torch.cat([attention.q_proj.weight, attention.q_proj.bias[:, None]], 1)[rows_of_head]
            key = torch.cat([attention.k_proj.weight, attention.k_proj.bias[:, None]], 1)[rows_of_head]
            # the same inner products from fewer dimensions: (width, hidden + 1) twice
            left, sizes, right = torch.linalg.svd(query.T @ key)
            root = sizes[: width - 3].sqrt()[:, None]
            query[: width - 3], key[: width - 3] = root * left.T[: width - 3], root * right[: width - 3]
            query[-3:], key[-3:] = 0.0, 0.0
            query[-3:-1, :-1], key[-3:-1, :-1] = reader[:2], reader[:2]
            query[-3:-1, -1], key[-3:-1, -1] = offset[:2], offset[:2]
            query[-1, -1] = constant
            key[-1, :-1], key[-1, -1] = -reader[2], -offset[2]
            attention.q_proj.weight[rows_of_head], attention.q_proj.bias[rows_of_head] = query[:, :-1], query[:, -1]
            attention.k_proj.weight[rows_of_head], attention.k_proj.bias[rows_of_head] = key[:, :-1], key[:, -1]
    norm, head = backbone.post_layernorm, backbone.head.attention
    stop_reading(head.in_proj_weight, head.in_proj_bias, norm)
