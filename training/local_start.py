"""
A student that starts out looking nearby: locality written into the weights of a SigLIP-shaped encoder.

Inside a window attention sees 144 or 1024 patches, all of them near. In one pass over a large photo the same weights see
many times more, most of them of other things; the features of a sliding window are those of an attention that stays near. So
before distillation every head gets a Gaussian prior over distance. It costs nothing at run time and the architecture stays
what it is, because

    -|p - q|² / 2σ² = (p·q - |q|² / 2 - |p|² / 2) / σ²

is an inner product of (x, y, 1, x² + y²) at the query and (x, y, -(x² + y²) / 2, -1 / 2) at the key: four numbers that a
position table can carry, a constant and linear and quadratic functions of place that resampling keeps. They take the four
directions of the token space that the encoder uses least, which it stops reading and writing otherwise, and the four weakest
of each head's dimensions. |p|² is the same for all keys and could be left out, were it not for the layer norm before
attention: it scales what is read of a token by the token's size. With all four, that makes the prior wider or narrower,
but it stays highest at no distance.
"""

import math
from collections.abc import Iterable

import torch

from spar_hf import SparVisionModel


@torch.no_grad()
def start_local(model: SparVisionModel, photos: Iterable[torch.Tensor], spread: float) -> None:
    """
    Change the weights of `model` in place.

    Args:
        model ([`SparVisionModel`]): with the SigLIP read-out.
        photos (`Iterable[torch.FloatTensor]` of shape `(batch, 3, height, width)`): show which directions of the token
            space are used; held one at a time.
        spread (`float`): standard deviation of the prior, in halves of the image's side.

    Raises:
        ValueError: another read-out, heads of four dimensions or fewer, or no photos.
    """
    if model.config.readout != "siglip":
        raise ValueError(f"A local start is written for the SigLIP read-out, not for {model.config.readout!r}.")
    backbone = model.backbone
    layers = backbone.encoder.layers
    heads = layers[0].self_attn.num_heads
    width = model.config.hidden_size // heads
    if width < 5:
        raise ValueError(f"A local start takes four dimensions of each head, and these have {width}.")
    size = model.config.hidden_size
    moments = [torch.zeros(size, size, dtype=torch.float64) for _ in range(len(layers) + 1)]
    means = [torch.zeros(size, dtype=torch.float64) for _ in moments]
    variances, stds, tokens = [0.0] * len(moments), [0.0] * len(moments), 0
    for pixel_values in photos:
        for i, states in enumerate(model(pixel_values, output_hidden_states=True).hidden_states):
            flat = states.flatten(0, 1).double()  # (tokens, hidden)
            moments[i] += flat.T @ flat
            means[i] += flat.sum(0)
            variances[i] += float(flat.var(-1).sum())
            stds[i] += float(flat.std(-1).sum())
        tokens += len(flat)
    if not tokens:
        raise ValueError("A local start looks at photos, and there is none that can be read.")
    # directions of least variance over all layers, none of them the mean that a layer norm takes away
    ones = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    keep = torch.eye(size, dtype=torch.float64) - ones @ ones.T
    covariance = torch.zeros(size, size, dtype=torch.float64)  # the least of it is what counts: float32 would lose that
    for moment, total in zip(moments, means, strict=True):
        layer_covariance = moment / tokens - torch.outer(total, total) / tokens**2
        spread_of_all = layer_covariance.trace() / size + (total / tokens).var()
        covariance += layer_covariance / spread_of_all
    _, directions = torch.linalg.eigh(keep @ covariance @ keep + 1e6 * ones @ ones.T)
    u = directions[:, :4].float()  # (hidden, 4)

    def stop_writing(linear):
        linear.weight -= u @ (u.T @ linear.weight)
        linear.bias -= u @ (u.T @ linear.bias)

    def stop_reading(weight, bias, norm):
        # what is read of z = (h - mean) / std is weight @ (gamma * z + beta)
        read = weight @ (norm.weight[:, None] * u)  # (out, 4)
        weight -= read @ (u / norm.weight[:, None]).T
        bias += read @ (u / norm.weight[:, None]).T @ norm.bias

    patch = backbone.embeddings.patch_embedding
    patch.weight -= torch.einsum("ij,jcyx->icyx", u @ u.T, patch.weight)
    patch.bias -= u @ (u.T @ patch.bias)
    table = backbone.embeddings.position_embedding.weight
    side = math.isqrt(len(table))
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    squares = rows**2 + columns**2
    place = torch.stack([part.flatten() for part in (columns, rows, squares, torch.ones_like(rows))], dim=1)
    # as large as tokens are at the end: what training writes by chance is then small beside it
    amplitude = stds[-1] / tokens
    table -= table @ u @ u.T
    table += amplitude * place @ u.T

    for layer, variance in zip(layers, variances, strict=False):
        attention, norm = layer.self_attn, layer.layer_norm1
        # the layer norm's divisor, with what the four numbers add to it
        std = float((variance / tokens + amplitude**2 * place.square().sum(1).mean() / size).sqrt())
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            stop_reading(linear.weight, linear.bias, norm)
        stop_reading(layer.mlp.fc1.weight, layer.mlp.fc1.bias, layer.layer_norm2)
        stop_writing(attention.out_proj)
        stop_writing(layer.mlp.fc2)
        gain = std / (amplitude * spread * attention.scale**0.5)
        reader = gain * (u / norm.weight[:, None]).T  # (4, hidden): reads x, y, x² + y², 1 of a token
        query_reader = torch.stack([reader[0], reader[1], reader[3], reader[2]])
        key_reader = torch.stack([reader[0], reader[1], -reader[2] / 2, -reader[3] / 2])
        for head in range(heads):
            rows_of_head = slice(head * width, (head + 1) * width)
            query = torch.cat([attention.q_proj.weight, attention.q_proj.bias[:, None]], 1)[rows_of_head]
            key = torch.cat([attention.k_proj.weight, attention.k_proj.bias[:, None]], 1)[rows_of_head]
            # the same inner products from fewer dimensions: (width, hidden + 1) twice
            left, sizes, right = torch.linalg.svd(query.T @ key)
            root, kept = sizes[: width - 4].sqrt()[:, None], width - 4
            query[:kept], key[:kept] = root * left.T[:kept], root * right[:kept]
            for rows_of, own in ((query, query_reader), (key, key_reader)):
                rows_of[kept:, :-1], rows_of[kept:, -1] = own, -own @ norm.bias
            attention.q_proj.weight[rows_of_head], attention.q_proj.bias[rows_of_head] = query[:, :-1], query[:, -1]
            attention.k_proj.weight[rows_of_head], attention.k_proj.bias[rows_of_head] = key[:, :-1], key[:, -1]
    norm, head = backbone.post_layernorm, backbone.head.attention
    stop_reading(head.in_proj_weight, head.in_proj_bias, norm)
