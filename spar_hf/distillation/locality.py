"""
Locality-biased initialisation of the student: from the start, attention prefers near patches.

Within a window, attention sees 144 or 1024 patches, all of them near. In one pass over a large image the same weights see
many more, most of them far away, whereas features of sliding windows come from near patches only. So before distillation
every head gets a prior over distance, close to a Gaussian where it matters. It costs nothing at run time, and the
architecture stays the same, because

    cos w(x - x') + cos w(y - y') - 2  ~  -w² |p - p'|² / 2

is the inner product of (cos wx, sin wx, cos wy, sin wy, -2) at the query and (cos wx', sin wx', cos wy', sin wy', 1) at the
key. These five numbers, the position code, are smooth functions of position: a position table can carry them, and
resampling preserves them. They take the five directions of the token space that the encoder uses least (the position
subspace), which all layers stop reading and writing otherwise, and the five weakest dimensions of each head.

The layer norm before attention divides a token by its size, which differs between tokens. Position codes have the same
length everywhere, so they enlarge all tokens alike, and the weights of the norms compensate for it. Where a token is larger
or smaller than most, its whole prior is scaled: wider or narrower, but always highest at distance 0, because of the -2.

Training would soon write over numbers as small as these. So [`project_out`] removes after every step what the encoder's
weights would write into the position subspace.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from spar_hf import SparVisionModel
from spar_hf.utils.errors import UsageError

CODE_SIZE = 5  # numbers in a position code
QUERY_SIGNS = (1.0, 1.0, 1.0, 1.0, -2.0)
# Angular frequency w of the cosines, over halves of the image's side: up to a distance of one half-side the exponent is a
# Gaussian's to 5 %, beyond it weaker. With `SparConfig.position_extent` over windows: the same at two windows a side.
FREQUENCY = 0.8
# In windows. Opposite ends of a table that spans this many are three quarters of a period apart, where the prior is as weak
# as at two windows. A whole period (7.9) would make opposite ends look near.
LARGEST_EXTENT = 5.8
PRIOR_STEP = 1.4  # factor between two exponents that `fit_prior` tries


@torch.no_grad()
def initialise_locality(
    model: SparVisionModel, images: Iterable[torch.Tensor], spread: float, window: int | None = None
) -> torch.Tensor:
    """
    Give every head of `model` a prior over distance, in place.

    Args:
        model ([`SparVisionModel`]): with the SigLIP read-out.
        images (`Iterable[torch.FloatTensor]` of shape `(batch, 3, height, width)`): show which directions of the token
            space are used; held one at a time.
        spread (`float`): standard deviation of the prior, in halves of the image's side, or in windows if the
            configuration has a `position_extent`.
        window (`int`, *optional*): side of a window in pixels, the pre-training size by default.

    Returns:
        the position subspace, orthonormal columns `(hidden_size, 5)`.

    Raises:
        UsageError: another read-out, heads of five dimensions or fewer, no images, or a `position_extent` of more than 5.8
            windows.
    """
    require_siglip(model, "--local_start")
    attention = model.backbone.encoder.layers[0].self_attn
    hidden_size, head_size = model.config.hidden_size, model.config.hidden_size // attention.num_heads
    if head_size <= CODE_SIZE:
        raise UsageError(f"--local_start takes {CODE_SIZE} dimensions of each head, and these have {head_size}.")
    extent = model.config.position_extent
    reach = 1.0 if extent is None else table_reach(extent, model.config.image_size if window is None else window)
    statistics = token_statistics(model, images)
    directions = least_used_directions(statistics.covariances)

    project_out(token_writers(model), directions)
    amplitude = 0.3 * statistics.variances[-1] ** 0.5  # small: the divisor of a layer norm should stay the token's own
    added = amplitude**2 * 3 / hidden_size  # to the variance of a token: cos² + sin² is 1, twice, and the constant
    write_position_codes(model, directions, amplitude, reach)
    for layer, variance in zip(model.backbone.encoder.layers, statistics.variances, strict=False):
        gain = (variance + added) ** 0.5 / (amplitude * spread * FREQUENCY * layer.self_attn.scale**0.5)
        localise_block(layer, directions, gain, growth=(1 + added / variance) ** 0.5)
    norm, pooling = model.backbone.post_layernorm, model.backbone.head.attention
    stop_reading(pooling.in_proj_weight, pooling.in_proj_bias, norm, directions)
    norm.weight *= (1 + added / statistics.variances[-1]) ** 0.5
    return directions


def require_siglip(model: SparVisionModel, option: str) -> None:
    """
    Raises:
        UsageError: the model has another read-out.
    """
    if model.config.readout != "siglip":
        raise UsageError(f"{option} works with the SigLIP read-out only, not with {model.config.readout!r}.")


class TokenStatistics(NamedTuple):
    """
    Of the tokens that enter each block, and of the last block's output.

    Attributes:
        covariances: `(hidden_size, hidden_size)` float64 each.
        variances: mean variance of a token over its dimensions, which layer norms divide by.
    """

    covariances: list[torch.Tensor]
    variances: list[float]


def token_statistics(model: SparVisionModel, images: Iterable[torch.Tensor]) -> TokenStatistics:
    """
    [`TokenStatistics`] of a model over images, in one pass. In float64: the smallest eigenvalues are what counts.

    Raises:
        UsageError: no images.
    """
    size, states_count = model.config.hidden_size, len(model.backbone.encoder.layers) + 1
    moments = [torch.zeros(size, size, dtype=torch.float64) for _ in range(states_count)]
    sums = [torch.zeros(size, dtype=torch.float64) for _ in moments]
    variances, tokens = [0.0] * states_count, 0
    for pixel_values in images:
        for i, states in enumerate(model(pixel_values, output_hidden_states=True).hidden_states):
            flat = states.flatten(0, 1).double()  # (tokens, hidden)
            moments[i] += flat.T @ flat
            sums[i] += flat.sum(0)
            variances[i] += float(flat.var(-1, correction=0).sum())
        tokens += len(flat)
    if not tokens:
        raise UsageError("--local_start needs images, and there is none that can be read.")
    covariances = [
        moment / tokens - torch.outer(total, total) / tokens**2 for moment, total in zip(moments, sums, strict=True)
    ]
    return TokenStatistics(covariances, [variance / tokens for variance in variances])


def least_used_directions(covariances: list[torch.Tensor]) -> torch.Tensor:
    """
    Directions of least variance over all layers, orthogonal to (1, 1, …), which a layer norm subtracts:
    orthonormal columns `(hidden_size, 5)`.
    """
    size = len(covariances[0])
    ones = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    centre = torch.eye(size, dtype=torch.float64) - ones @ ones.T
    total = torch.zeros(size, size, dtype=torch.float64)
    for covariance in covariances:
        total += covariance / covariance.trace()
    _, directions = torch.linalg.eigh(centre @ total @ centre + 1e6 * ones @ ones.T)
    return directions[:, :CODE_SIZE].float()


def stop_reading(weight: torch.Tensor, bias: torch.Tensor, norm: nn.LayerNorm, directions: torch.Tensor) -> None:
    """Change a linear layer after a layer norm, in place, so that it ignores the given directions of the tokens."""
    # of z = (h - mean) / std the layer reads weight @ (gamma * z + beta)
    read = weight @ (norm.weight[:, None] * directions)  # (out, codes)
    weight -= read @ (directions / norm.weight[:, None]).T
    bias += read @ (directions / norm.weight[:, None]).T @ norm.bias


def write_position_codes(model: SparVisionModel, directions: torch.Tensor, amplitude: float, reach: float) -> None:
    """Replace what the position table holds along `directions` by the position codes, times `amplitude`."""
    table = model.backbone.embeddings.position_embedding.weight
    table -= table @ directions @ directions.T
    table += amplitude * position_codes(math.isqrt(len(table)), reach) @ directions.T


def localise_block(layer: Any, directions: torch.Tensor, gain: float, growth: float) -> None:
    """
    Give all heads of a block a prior over distance, in place.

    Args:
        layer: block of a SigLIP encoder.
        directions: position subspace.
        gain: factor of the position codes in queries and keys; the prior's exponent grows with its square.
        growth: of a token's size by its position code; the norms' weights compensate for it.
    """
    attention, norm = layer.self_attn, layer.layer_norm1
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        stop_reading(linear.weight, linear.bias, norm, directions)
    stop_reading(layer.mlp.fc1.weight, layer.mlp.fc1.bias, layer.layer_norm2, directions)
    norm.weight *= growth
    layer.layer_norm2.weight *= growth
    key_reader = gain * (directions / norm.weight[:, None]).T  # (codes, hidden)
    query_reader = key_reader * torch.tensor(QUERY_SIGNS)[:, None]
    width = len(attention.q_proj.weight) // attention.num_heads
    kept = width - CODE_SIZE
    for head in range(attention.num_heads):
        rows_of_head = slice(head * width, (head + 1) * width)
        query = torch.cat([attention.q_proj.weight, attention.q_proj.bias[:, None]], 1)[rows_of_head]
        key = torch.cat([attention.k_proj.weight, attention.k_proj.bias[:, None]], 1)[rows_of_head]
        # nearly the same inner products from fewer dimensions: (width, hidden + 1) twice
        left, sizes, right = torch.linalg.svd(query.T @ key)
        root = sizes[:kept].sqrt()[:, None]
        query[:kept], key[:kept] = root * left.T[:kept], root * right[:kept]
        for rows, reader in ((query, query_reader), (key, key_reader)):
            rows[kept:, :-1], rows[kept:, -1] = reader, -reader @ norm.bias
        attention.q_proj.weight[rows_of_head], attention.q_proj.bias[rows_of_head] = query[:, :-1], query[:, -1]
        attention.k_proj.weight[rows_of_head], attention.k_proj.bias[rows_of_head] = key[:, :-1], key[:, -1]


def position_codes(side: int, reach: float) -> torch.Tensor:
    """The position code of every cell of a square table from `-reach` to `reach` both ways: `(side * side, 5)`."""
    axis = FREQUENCY * reach * ((torch.arange(side) + 0.5) / side * 2 - 1)
    rows, columns = (angle.flatten() for angle in torch.meshgrid(axis, axis, indexing="ij"))
    return torch.stack([columns.cos(), columns.sin(), rows.cos(), rows.sin(), torch.ones_like(rows)], dim=1)


def table_reach(extent: int, window: int) -> float:
    """
    How far a table of `extent` pixels reaches from its middle, in windows.

    Raises:
        UsageError: so far that opposite ends would look near.
    """
    if extent > LARGEST_EXTENT * window:
        raise UsageError(
            f"--position_extent {extent}: give at most {LARGEST_EXTENT} windows, {int(LARGEST_EXTENT * window)} px. "
            "Larger images can be read all the same."
        )
    return extent / (2 * window)


@torch.no_grad()
def fix_position_step(model: SparVisionModel, directions: torch.Tensor | None, extent: int, window: int) -> None:
    """
    Rewrite a position table that is stretched over every image for a `position_extent`: one step per patch at any image
    size, as it is now in images of two windows a side. In place; the caller sets the configuration.

    Coarse structure stays as it is in such images. Structure finer than a cell of the new table, which covers several old
    ones, is averaged away. In spar-tiny that is almost half of the table's variance, but less than half a percent of the
    features' at 384 × 384 px.

    A prior over distance then has one width in patches at every image size. With a stretched table its width would grow with
    the image, and along the longer side.

    Args:
        model ([`SparVisionModel`]): with the SigLIP read-out and no `position_extent`.
        directions (`torch.FloatTensor` of shape `(hidden_size, 5)`, *optional*): position subspace. There the cosines
            continue beyond the old table's border; everything else repeats the border.
        extent (`int`): pixels.
        window (`int`): pixels.

    Raises:
        UsageError: another read-out, or more than 5.8 windows.
    """
    require_siglip(model, "--position_extent")
    table = model.backbone.embeddings.position_embedding.weight
    side, reach = math.isqrt(len(table)), table_reach(extent, window)
    codes = torch.zeros_like(table)
    if directions is not None:
        # training may have rotated and scaled the codes: express them in the cosines by least squares
        mixing = torch.linalg.lstsq(position_codes(side, 1.0), table @ directions).solution  # (codes, codes)
        codes = position_codes(side, reach) @ mixing @ directions.T
        table -= table @ directions @ directions.T
    axis = reach * ((torch.arange(side) + 0.5) / side * 2 - 1)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    where = torch.stack([columns, rows], dim=-1)[None]  # grid_sample wants x before y
    old = table.T.view(1, -1, side, side)  # (side * side, hidden) -> (1, hidden, side, side)
    new = nn.functional.grid_sample(old, where, mode="bilinear", padding_mode="border", align_corners=False)
    table.copy_(new[0].flatten(1).T + codes)


@torch.no_grad()
def project_out(parameters: Iterable[nn.Parameter], directions: torch.Tensor) -> None:
    """Remove from [`token_writers`] what they write into the position subspace, in place; to be called after every step."""
    for parameter in parameters:
        flat = parameter.view(len(parameter), -1)  # a view, so that the parameter changes
        flat -= directions @ (directions.T @ flat)


@torch.no_grad()
def position_subspace(model: SparVisionModel) -> torch.Tensor | None:
    """
    The position subspace `(hidden_size, 5)` of a student after [`initialise_locality`], trained or not: the directions that
    only the position table writes into. `None` if there are none.
    """
    if model.config.readout != "siglip":
        return None
    written = torch.cat([parameter.float().view(len(parameter), -1) for parameter in token_writers(model)], dim=1)
    energy, directions = torch.linalg.eigh(written @ written.T)
    # weights stored in half precision leave a millionth; directions in use are far above
    return directions[:, :CODE_SIZE] if energy[CODE_SIZE - 1] < 1e-4 * energy[CODE_SIZE] else None


def token_writers(model: SparVisionModel) -> list[nn.Parameter]:
    """All weights and biases `(hidden_size, ...)` whose results are added to the tokens, except the position table."""
    layers = model.backbone.encoder.layers
    linears = [linear for layer in layers for linear in (layer.self_attn.out_proj, layer.mlp.fc2)]
    return [p for linear in (model.backbone.embeddings.patch_embedding, *linears) for p in (linear.weight, linear.bias)]


@torch.no_grad()
def scale_prior(model: SparVisionModel, directions: torch.Tensor, block: int, factor: float) -> None:
    """Multiply the exponent of one block's prior: its standard deviation is divided by the root of `factor`."""
    attention, norm = model.backbone.encoder.layers[block].self_attn, model.backbone.encoder.layers[block].layer_norm1
    read = attention.q_proj.weight @ (norm.weight[:, None] * directions)  # (hidden, codes)
    added = (factor - 1) * read @ (directions / norm.weight[:, None]).T
    attention.q_proj.weight += added
    attention.q_proj.bias -= added @ norm.bias


@torch.no_grad()
def fit_prior(
    model: SparVisionModel, directions: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[float]:
    """
    Widen or narrow the prior of each block as long as the mean squared error to the teacher falls, in place.

    The weights that carry the prior are large compared to an optimizer step, so training hardly changes its width. Blocks
    are tried one after the other, once, on few images and without gradients.

    Args:
        model ([`SparVisionModel`]): after [`initialise_locality`], trained or not.
        directions (`torch.FloatTensor` of shape `(hidden_size, 5)`): position subspace.
        pairs (`Sequence[tuple[torch.FloatTensor, torch.FloatTensor]]`): images and the full teacher's maps of them.

    Returns:
        the factor of each block's exponent, 1 where it stayed.

    Raises:
        UsageError: no pairs, or an error that is not finite.
    """

    def error() -> float:
        # the class's forward: accelerate wraps the model's own in autocast
        maps = ((type(model).forward(model, image).feature_map, target) for image, target in pairs)
        return sum(float((found - target).square().mean()) for found, target in maps)

    factors, least = [1.0] * len(model.backbone.encoder.layers), error()
    if not pairs or not math.isfinite(least):
        raise UsageError(f"--fit_prior: the error on {len(pairs)} images is {least}. Give other images.")
    for block in tqdm(range(len(factors)), desc="priors of the blocks"):
        for change in (PRIOR_STEP, 1 / PRIOR_STEP):
            while True:
                scale_prior(model, directions, block, change)
                found = error()
                if not found < least:  # NaN too
                    scale_prior(model, directions, block, 1 / change)
                    break
                least, factors[block] = found, factors[block] * change
            if factors[block] > 1:
                break
    return factors
