"""
A student that starts out looking nearby: locality written into the weights of a SigLIP-shaped encoder.

Inside a window attention sees 144 or 1024 patches, all of them near. In one pass over a large image the same weights see
many times more, most of them of other things; the features of a sliding window are those of an attention that stays near. So
before distillation every head gets a prior over distance that is a Gaussian as far as it matters. It costs nothing at run
time and the architecture stays what it is, because

    cos w(x - x') + cos w(y - y') - 2  ~  -w² |p - p'|² / 2

is an inner product of (cos wx, sin wx, cos wy, sin wy, -2) at the query and (cos wx', sin wx', cos wy', sin wy', 1) at the
key: five numbers that a position table can carry, smooth functions of place that resampling keeps. They take the five
directions of the token space that the encoder uses least, which it stops reading and writing otherwise, and the five weakest
of each head's dimensions.

The layer norm before attention divides what is read of a token by the token's size, which differs from token to token. The
five numbers have the same length everywhere, so they change that size alike at every place, and the norms' weights make up
for it. Where a token is larger or smaller than most, the whole prior is multiplied: wider or narrower, but always highest at
no distance, which it would not be without the -2.

Training would soon drown numbers that small in what it writes beside them: of spar-tiny the held-out error grew in the first
300 steps at 5e-5. With [`keep_place`] after every step, so that the encoder goes on not writing there, it fell by a third.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from tqdm.auto import tqdm

from spar_hf import SparVisionModel

NUMBERS = 5
# of the cosines, over halves of the image's side: up to one of these the exponent is a Gaussian's to 5 %, beyond it weaker.
# Where the table has a step of its own (`SparConfig.position_extent`), over windows: the same at two windows a side.
FREQUENCY = 0.8
# windows: opposite ends of a table that spans so many are three quarters of a turn of the cosines apart, where the prior is
# as weak as at two windows; a whole turn (7.9) would make them look near
LARGEST_EXTENT = 5.8


@torch.no_grad()
def start_local(
    model: SparVisionModel, images: Iterable[torch.Tensor], spread: float, window: int | None = None
) -> torch.Tensor:
    """
    Change the weights of `model` in place, and return the directions that hold the place: `(hidden_size, 5)`.

    Args:
        model ([`SparVisionModel`]): with the SigLIP read-out.
        images (`Iterable[torch.FloatTensor]` of shape `(batch, 3, height, width)`): show which directions of the token
            space are used; held one at a time.
        spread (`float`): standard deviation of the prior, in halves of the image's side, or in windows where the
            configuration has a `position_extent`.
        window (`int`, *optional*): pixels, the pre-training size by default.

    Raises:
        ValueError: another read-out, heads of five dimensions or fewer, no images, or a `position_extent` of more than 5.8
            windows.
    """
    if model.config.readout != "siglip":
        raise ValueError(f"A local start is written for the SigLIP read-out, not for {model.config.readout!r}.")
    window = model.config.image_size if window is None else window
    reach = 1.0 if model.config.position_extent is None else check_reach(model.config.position_extent, window)
    backbone = model.backbone
    layers = backbone.encoder.layers
    heads = layers[0].self_attn.num_heads
    width = model.config.hidden_size // heads
    if width <= NUMBERS:
        raise ValueError(f"A local start takes {NUMBERS} dimensions of each head, and these have {width}.")
    size = model.config.hidden_size
    moments = [torch.zeros(size, size, dtype=torch.float64) for _ in range(len(layers) + 1)]
    means = [torch.zeros(size, dtype=torch.float64) for _ in moments]
    variances, tokens = [0.0] * len(moments), 0  # of a token over its dimensions, as the layer norms take it
    for pixel_values in images:
        for i, states in enumerate(model(pixel_values, output_hidden_states=True).hidden_states):
            flat = states.flatten(0, 1).double()  # (tokens, hidden)
            moments[i] += flat.T @ flat
            means[i] += flat.sum(0)
            variances[i] += float(flat.var(-1, correction=0).sum())
        tokens += len(flat)
    if not tokens:
        raise ValueError("A local start looks at images, and there is none that can be read.")
    variances = [variance / tokens for variance in variances]
    # directions of least variance over all layers, none of them the mean that a layer norm takes away
    ones = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    keep = torch.eye(size, dtype=torch.float64) - ones @ ones.T
    covariance = torch.zeros(size, size, dtype=torch.float64)  # the least of it is what counts: float32 would lose that
    for moment, total in zip(moments, means, strict=True):
        layer_covariance = moment / tokens - torch.outer(total, total) / tokens**2
        covariance += layer_covariance / layer_covariance.trace()
    _, directions = torch.linalg.eigh(keep @ covariance @ keep + 1e6 * ones @ ones.T)
    u = directions[:, :NUMBERS].float()  # (hidden, numbers)

    def stop_reading(weight, bias, norm):
        # what is read of z = (h - mean) / std is weight @ (gamma * z + beta)
        read = weight @ (norm.weight[:, None] * u)  # (out, numbers)
        weight -= read @ (u / norm.weight[:, None]).T
        bias += read @ (u / norm.weight[:, None]).T @ norm.bias

    keep_place(writers(model), u)
    table = backbone.embeddings.position_embedding.weight
    side = math.isqrt(len(table))
    place = place_numbers(side, reach)
    # small: the layer norms' divisor should stay the token's own
    amplitude = 0.3 * variances[-1] ** 0.5
    added = amplitude**2 * 3 / size  # to a token's variance: cos² + sin² is 1, twice, and the constant
    table -= table @ u @ u.T
    table += amplitude * place @ u.T

    def make_up(norm, variance):
        norm.weight *= (1 + added / variance) ** 0.5

    for layer, variance in zip(layers, variances, strict=False):
        attention, norm = layer.self_attn, layer.layer_norm1
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            stop_reading(linear.weight, linear.bias, norm)
        stop_reading(layer.mlp.fc1.weight, layer.mlp.fc1.bias, layer.layer_norm2)
        make_up(norm, variance)
        make_up(layer.layer_norm2, variance)
        gain = (variance + added) ** 0.5 / (amplitude * spread * FREQUENCY * attention.scale**0.5)
        key_reader = gain * (u / norm.weight[:, None]).T  # (numbers, hidden)
        query_reader = key_reader * torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0])[:, None]
        kept = width - NUMBERS
        for head in range(heads):
            rows_of_head = slice(head * width, (head + 1) * width)
            query = torch.cat([attention.q_proj.weight, attention.q_proj.bias[:, None]], 1)[rows_of_head]
            key = torch.cat([attention.k_proj.weight, attention.k_proj.bias[:, None]], 1)[rows_of_head]
            # the same inner products from fewer dimensions: (width, hidden + 1) twice
            left, sizes, right = torch.linalg.svd(query.T @ key)
            root = sizes[:kept].sqrt()[:, None]
            query[:kept], key[:kept] = root * left.T[:kept], root * right[:kept]
            for rows_of, own in ((query, query_reader), (key, key_reader)):
                rows_of[kept:, :-1], rows_of[kept:, -1] = own, -own @ norm.bias
            attention.q_proj.weight[rows_of_head], attention.q_proj.bias[rows_of_head] = query[:, :-1], query[:, -1]
            attention.k_proj.weight[rows_of_head], attention.k_proj.bias[rows_of_head] = key[:, :-1], key[:, -1]
    norm, head = backbone.post_layernorm, backbone.head.attention
    stop_reading(head.in_proj_weight, head.in_proj_bias, norm)
    make_up(norm, variances[-1])
    return u


def place_numbers(side: int, reach: float) -> torch.Tensor:
    """The five numbers in every cell of a table that reaches from `-reach` to `reach` both ways: `(side * side, 5)`."""
    axis = FREQUENCY * reach * ((torch.arange(side) + 0.5) / side * 2 - 1)
    rows, columns = (angle.flatten() for angle in torch.meshgrid(axis, axis, indexing="ij"))
    return torch.stack([columns.cos(), columns.sin(), rows.cos(), rows.sin(), torch.ones_like(rows)], dim=1)


def check_reach(extent: int, window: int) -> float:
    """How far a table of that many pixels reaches from its middle, in windows; not so far that its ends would look near."""
    if extent > LARGEST_EXTENT * window:
        raise ValueError(
            f"--position_extent {extent}: give at most {LARGEST_EXTENT} windows, {int(LARGEST_EXTENT * window)} px. "
            "Larger images are read all the same."
        )
    return extent / (2 * window)


@torch.no_grad()
def spread_positions(model: SparVisionModel, directions: torch.Tensor | None, extent: int, window: int) -> None:
    """
    Rewrite a table that is stretched over every image for a `position_extent`: a patch's step in an image of two windows a
    side becomes that of every image. In place; the caller sets the configuration.

    What is coarse in the positions stays what it was in such an image, what changes from cell to cell is averaged away: each
    cell of the new table covers several of the old one. Of spar-tiny's positions the latter is almost half of the variance,
    of the features that come of it at 384 x 384 px less than half a percent.

    Attention that stays near does so in patches then, which a table that is stretched cannot hold: the larger the image, the
    farther it looks, farther along the longer side, and one width would have to suit all sizes that are trained on.

    Args:
        model ([`SparVisionModel`]): with the SigLIP read-out and no `position_extent`.
        directions (`torch.FloatTensor` of shape `(hidden_size, 5)`, *optional*): as [`find_place`] gives them. There the
            cosines go on beyond the old table's border; all else repeats what stands there.
        extent (`int`): pixels.
        window (`int`): pixels.

    Raises:
        ValueError: another read-out, or more than 5.8 windows.
    """
    if model.config.readout != "siglip":
        raise ValueError(f"--position_extent is written for the SigLIP read-out, not for {model.config.readout!r}.")
    table = model.backbone.embeddings.position_embedding.weight
    side, reach = math.isqrt(len(table)), check_reach(extent, window)
    place = torch.zeros_like(table)
    if directions is not None:
        # training may have turned and scaled the five numbers: what they are of the cosines, by least squares
        held = torch.linalg.lstsq(place_numbers(side, 1.0), table @ directions).solution  # (numbers, numbers)
        place = place_numbers(side, reach) @ held @ directions.T
        table -= table @ directions @ directions.T
    axis = reach * ((torch.arange(side) + 0.5) / side * 2 - 1)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    where = torch.stack([columns, rows], dim=-1)[None]  # grid_sample wants x before y
    old = table.T.view(1, -1, side, side)  # (side * side, hidden) -> (1, hidden, side, side)
    new = torch.nn.functional.grid_sample(old, where, mode="bilinear", padding_mode="border", align_corners=False)
    table.copy_(new[0].flatten(1).T + place)


@torch.no_grad()
def keep_place(parameters: Iterable[torch.nn.Parameter], directions: torch.Tensor) -> None:
    """Let these [`writers`] write nothing into the directions that [`start_local`] returned; after every step."""
    for parameter in parameters:
        flat = parameter.view(len(parameter), -1)  # a view, so that the parameter changes
        flat -= directions @ (directions.T @ flat)


@torch.no_grad()
def find_place(model: SparVisionModel) -> torch.Tensor | None:
    """
    The directions `(hidden_size, 5)` of a student that had a local start: those that nothing writes into but the position
    table. None where every direction is written into.
    """
    if model.config.readout != "siglip":
        return None
    written = torch.cat([parameter.float().view(len(parameter), -1) for parameter in writers(model)], dim=1)
    strength, directions = torch.linalg.eigh(written @ written.T)
    # half precision leaves a millionth; what is written into at all is far above
    return directions[:, :NUMBERS] if strength[NUMBERS - 1] < 1e-4 * strength[NUMBERS] else None


def writers(model: SparVisionModel) -> list[torch.nn.Parameter]:
    """All weights and biases that write into the tokens, `(hidden_size, ...)` each, but the position table."""
    layers = model.backbone.encoder.layers
    linears = [linear for layer in layers for linear in (layer.self_attn.out_proj, layer.mlp.fc2)]
    return [p for linear in (model.backbone.embeddings.patch_embedding, *linears) for p in (linear.weight, linear.bias)]


@torch.no_grad()
def scale_prior(model: SparVisionModel, directions: torch.Tensor, block: int, factor: float) -> None:
    """Multiply the exponent of one block's prior by `factor`: its standard deviation is divided by the root of that."""
    attention, norm = model.backbone.encoder.layers[block].self_attn, model.backbone.encoder.layers[block].layer_norm1
    read = attention.q_proj.weight @ (norm.weight[:, None] * directions)  # (hidden, numbers)
    added = (factor - 1) * read @ (directions / norm.weight[:, None]).T
    attention.q_proj.weight += added
    attention.q_proj.bias -= added @ norm.bias


@torch.no_grad()
def fit_prior(
    model: SparVisionModel,
    directions: torch.Tensor,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    step: float = 1.4,
) -> list[float]:
    """
    Widen or narrow the prior of every block as long as the mean squared error to the teacher falls; in place.

    What holds the place is large beside what an optimizer moves in a step, so training itself hardly changes how far a
    block looks. Block after block is tried, once through, with few images and no gradients.

    Args:
        model ([`SparVisionModel`]): after [`start_local`], trained or not.
        directions (`torch.FloatTensor` of shape `(hidden_size, 5)`): as [`start_local`] or [`find_place`] gave them.
        pairs (`Sequence[tuple[torch.FloatTensor, torch.FloatTensor]]`): images and the full teacher's maps of them.
        step (`float`): factor between two strengths that are tried.

    Returns:
        the factor of each block's exponent, 1 where it stayed.

    Raises:
        ValueError: no pairs, or an error that is not finite.
    """

    def error() -> float:
        # of the class: around the model's own, accelerate puts autocast
        maps = ((type(model).forward(model, image).feature_map, target) for image, target in pairs)
        return sum(float((found - target).square().mean()) for found, target in maps)

    factors, least = [1.0] * len(model.backbone.encoder.layers), error()
    if not pairs or not math.isfinite(least):
        raise ValueError(f"The priors are fitted to images, and the error on {len(pairs)} is {least}. Give others.")
    for block in tqdm(range(len(factors)), desc="priors of the blocks"):
        for change in (step, 1 / step):
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
