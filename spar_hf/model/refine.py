"""
Sharper masks: optional refinements of the logits before the decision, off by default.

A refinement is a callable `(logits, feature_map, pixel_values) -> logits` for one image:

- `logits` `(names, h, w)` and `feature_map` `(dim, h, w)` lie on the same grid of cells,
- `pixel_values` `(3, h * cell, w * cell)` is the normalised image, padded to whole cells by repeating its border,
- the result is `(names, h * r, w * r)` where `r` divides the cell: finer logits over the same padded image.

[`LabelPropagation`] and [`PixelAdaptiveRefinement`] are provided; any callable of this form can be used. An upsampler makes
features finer before the logits are computed, see `upsamplers.py`.

Results of the first `spar-tiny` at a shorter side of 384 px: mIoU and pixel accuracy in percent (`training/evaluate.py
--runs student:single+lposs ...`). Parameters were chosen with an earlier student on 12 frames of CamVid (`val`, sequence
0016E5).

| | CamVid, the first 20 frames of 0001TP, 11 classes | COCO, 20 held-out images, 133 classes |
|---|---|---|
| none | 34.2, 72.2 | 4.5, 31.2 |
| `"lposs"` | 33.7, 72.4 | 4.7, 31.8 |
| `"lposs+"` | 33.6, 72.6 | 4.8, 32.1 |
| `"pamr"` | 34.1, 72.8 | 4.7, 32.1 |

The gains are small here: up to one point of accuracy, and a little mIoU on images of things. With the earlier student,
features upsampled bilinearly by 4 gave no gain, and label propagation with about the paper's parameters, chosen for a graph
of DINO's features, reduced the mIoU of the street scenes from 25.8 to 11.4. Measure on labelled images before using one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .upsamplers import Upsampler, cell_side, upsampled_features

Refinement = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

WORKING_BYTES = 64 * 2**20  # bound on the largest buffer of a step
OUTPUT_BYTES = 2**30  # bound on upsampled logits
MAX_NODES = 2**16
# neighbours up to two cells away, one of each pair of opposite directions
OFFSETS = [(0, 1), (0, 2), *((down, right) for down in (1, 2) for right in range(-2, 3))]


def load_scipy() -> tuple[Any, Any]:
    """
    SciPy's modules of sparse matrices and of sparse solvers.

    Raises:
        ImportError: SciPy is not installed.
    """
    try:
        from scipy import sparse
        from scipy.sparse import linalg
    except ImportError as error:
        raise ImportError(
            "Label propagation solves sparse equations with SciPy, which is not installed: pip install spar-hf[refine]"
        ) from error
    return sparse, linalg


def finer_grid(height: int, width: int, names: int, cell: int, max_cells: int) -> int:
    """
    The largest divisor `r` of the cell for which `height * r × width * r` is at most `max_cells` and the logits take at most
    `WORKING_BYTES`; 1 if there is none.

    Example:

    ```python
    >>> finer_grid(24, 32, 11, 16, 2**16), finer_grid(24, 32, 1000, 16, 2**16)
    (8, 4)
    ```"""
    limit = min(max_cells, WORKING_BYTES // (4 * names))
    return max((r for r in range(1, cell + 1) if cell % r == 0 and height * width * r * r <= limit), default=1)


def enlarge(logits: torch.Tensor, r: int) -> torch.Tensor:
    """Bilinear upsampling over the same image: `(names, h, w)` -> `(names, h * r, w * r)`."""
    if r == 1:
        return logits
    return nn.functional.interpolate(logits[None], scale_factor=r, mode="bilinear")[0]


def colours(pixel_values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Mean colour of every cell: `(3, height * cell, width * cell)` -> `(3, height, width)`, float32."""
    return nn.functional.adaptive_avg_pool2d(pixel_values[None].float(), (height, width))[0]


def shifted(maps: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Every cell's neighbour `down` and `right` of it, borders repeated; `(..., h, w)`, shape kept."""
    height, width = maps.shape[-2:]
    rows = (torch.arange(height, device=maps.device) + down).clamp(0, height - 1)
    columns = (torch.arange(width, device=maps.device) + right).clamp(0, width - 1)
    return maps.index_select(-2, rows).index_select(-1, columns)


@dataclass(frozen=True)
class LabelPropagation:
    """
    Label propagation: patches with similar features get similar logits.

    Patches are nodes of a sparse graph, each joined to the `neighbors` with the most similar features. With symmetrically
    normalised weights `S` and logits `Y`, the refined logits `Z` solve `(I - alpha S) Z = (1 - alpha) Y` by conjugate
    gradients, one name at a time. Rows are scaled so that every result is a weighted mean of logits, which keeps their
    scale and the meaning of probabilities.

    Source: LPOSS (Stojnić et al., CVPR 2025, arXiv 2503.19777). The paper builds the graph from a second model, DINO; here
    it is built from the model's own features minus their mean over the image.

    Args:
        alpha (`float`, *optional*, defaults to 0.5):
            How far labels spread: weight of each step along an edge. In the paper 0.95.
        neighbors (`int`, *optional*, defaults to 8): edges per patch. In the paper 400.
        gamma (`float`, *optional*, defaults to 8): power of the cosine of two patches in the weight of their edge.
        reach (`float`, *optional*, defaults to 3): distance in cells at which the weight falls to 1 / e.
        max_cells (`int`, *optional*, defaults to 0):
            If not 0, a second propagation follows on a finer grid of at most this many cells, each joined to the cells
            around it by similar colours ("LPOSS+").
        tau (`float`, *optional*, defaults to 0.05): squared distance of normalised colours at which that weight is 1 / e.

    Raises:
        ImportError: SciPy is not installed (`pip install spar-hf[refine]`).
        ValueError: a grid of more than 65,536 cells.
    """

    alpha: float = 0.5
    neighbors: int = 8
    gamma: float = 8.0
    reach: float = 3.0
    max_cells: int = 0
    tau: float = 0.05

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor, feature_map: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        names, height, width = logits.shape
        if height * width > MAX_NODES:
            raise ValueError(
                f"Label propagation over {height}×{width} cells: at most {MAX_NODES} are supported. Make `size` smaller, or "
                "leave the upsampler out."
            )
        load_scipy()
        if height * width == 1:
            return logits
        refined = self.solve(self.feature_graph(feature_map), logits)
        if not self.max_cells:
            return refined
        r = finer_grid(height, width, names, pixel_values.shape[-2] // height, self.max_cells)
        guide = colours(pixel_values, height * r, width * r)
        return self.solve(self.colour_graph(guide), enlarge(refined, r))

    def feature_graph(self, feature_map: torch.Tensor):
        """Weights of the edges between patches: a symmetric sparse matrix `(h * w, h * w)`."""
        height, width = feature_map.shape[1:]
        features = feature_map.float().flatten(1).T  # (dim, h, w) -> (h * w, dim)
        features = nn.functional.normalize(features - features.mean(0), dim=-1)
        count = len(features)
        neighbors = min(self.neighbors, count - 1)
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float().to(features.device)
        targets, weights = [], []
        for chunk in torch.arange(count, device=features.device).split(max(1, WORKING_BYTES // (4 * count))):
            cosines = (features[chunk] @ features.T).clamp(min=0) ** self.gamma  # (chunk, h * w)
            cosines *= torch.exp(-torch.cdist(places[chunk], places) / self.reach)
            cosines[torch.arange(len(chunk)), chunk] = -1  # a patch is not its own neighbour
            best = cosines.topk(neighbors)
            targets.append(best.indices)
            weights.append(best.values.clamp(min=0))
        rows = torch.arange(count).repeat_interleave(neighbors)
        return self.symmetric(rows, torch.cat(targets).flatten(), torch.cat(weights).flatten(), count)

    def colour_graph(self, guide: torch.Tensor):
        """Weights of the edges between cells up to two apart, from their colours `(3, h, w)`: `(h * w, h * w)`."""
        height, width = guide.shape[1:]
        index = torch.arange(height * width, device=guide.device).view(height, width)
        first = guide.permute(1, 2, 0)  # (3, h, w) -> (h, w, 3)
        rows, targets, weights = [], [], []
        for down, right in OFFSETS:
            here = (slice(None, height - down), slice(max(0, -right), width - max(0, right)))
            there = (slice(down, None), slice(max(0, right), width + min(0, right)))
            distance = (first[here] - first[there]).square().sum(-1)
            rows.append(index[here].flatten())
            targets.append(index[there].flatten())
            weights.append(torch.exp(-distance / self.tau).flatten())
        return self.symmetric(torch.cat(rows), torch.cat(targets), torch.cat(weights), height * width)

    @staticmethod
    def symmetric(rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, count: int):
        """Sparse matrix `(count, count)` of the edges, averaged with its transpose."""
        sparse, _ = load_scipy()
        edges = (rows.cpu().numpy(), targets.cpu().numpy())
        graph = sparse.csr_array((weights.cpu().double().numpy(), edges), shape=(count, count))
        return (graph + graph.T) / 2

    def solve(self, graph, logits: torch.Tensor) -> torch.Tensor:
        """Propagate `(names, h, w)` over a graph of its cells; shape kept."""
        sparse, linalg = load_scipy()
        degree = graph.sum(1)
        root = (degree + 1e-12) ** 0.5  # a cell without edges keeps its logits
        scale = sparse.diags_array(1 / root)
        system = sparse.eye_array(len(degree)) - self.alpha * (scale @ graph @ scale)
        system = system.tocsr()
        refined = torch.empty_like(logits, dtype=torch.float32, device="cpu")
        for name, values in enumerate(logits.flatten(1).cpu().double().numpy()):
            # the solver starts at 0, so without the mean it needs fewer steps
            mean = values.mean()
            right = (1 - self.alpha) * root * (values - mean)
            found, _ = linalg.cg(system, right, rtol=1e-4, maxiter=200)
            refined[name] = torch.from_numpy(found / root + mean).view(logits.shape[1:])
        return refined.to(logits.device)


@dataclass(frozen=True)
class PixelAdaptiveRefinement:
    """
    Pixel-adaptive refinement: on a grid finer than the patches, the logits of each cell are repeatedly replaced by the mean
    of its neighbours, weighted by the similarity of their colours.

    Source: PAMR (Araslanov and Roth, CVPR 2020, arXiv 2005.08104), section 4.2, which works on pixels.

    Args:
        iterations (`int`, *optional*, defaults to 3): number of repetitions. In the paper 10.
        dilations (`tuple[int, ...]`, *optional*, defaults to `(1, 2, 4)`):
            Distances in cells of the eight neighbours of each ring.
        max_cells (`int`, *optional*, defaults to 16,384):
            Limit on the cells of the grid. Four times as many took seven times as long, for a change below 0.1 mIoU.
    """

    iterations: int = 3
    dilations: tuple[int, ...] = (1, 2, 4)
    max_cells: int = 2**14

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor, feature_map: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        names, height, width = logits.shape
        r = finer_grid(height, width, names, pixel_values.shape[-2] // height, self.max_cells)
        refined = enlarge(logits.float(), r)
        guide = colours(pixel_values, height * r, width * r)
        offsets = [(d * y, d * x) for d in self.dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
        around = torch.stack([shifted(guide, *offset) for offset in offsets])  # (neighbours, 3, h * r, w * r)
        spread = torch.cat([around, guide[None]]).std(0)
        likeness = -((around - guide).abs() / (0.1 * spread + 1e-8)).mean(1)
        weights = likeness.softmax(0)  # (neighbours, h * r, w * r)
        for _ in range(self.iterations):
            mean = torch.zeros_like(refined)
            for offset, weight in zip(offsets, weights, strict=True):
                mean.addcmul_(shifted(refined, *offset), weight)
            refined = mean
        return refined


REFINEMENTS: dict[str, Callable[[], Refinement]] = {
    "lposs": LabelPropagation,
    "lposs+": lambda: LabelPropagation(max_cells=2**14),
    "pamr": PixelAdaptiveRefinement,
}


def resolve_refinement(refine: str | Refinement) -> Refinement:
    """
    The refinement called `"lposs"`, `"lposs+"` or `"pamr"`, or a callable as it is.

    Raises:
        ValueError: an unknown name, or neither a name nor a callable.

    Example:

    ```python
    >>> resolve_refinement("pamr")
    PixelAdaptiveRefinement(iterations=3, dilations=(1, 2, 4), max_cells=16384)
    ```"""
    if isinstance(refine, str) and refine in REFINEMENTS:
        return REFINEMENTS[refine]()
    if not callable(refine):
        raise ValueError(
            f"Unknown refinement {refine!r}; use one of {sorted(REFINEMENTS)} or a callable "
            "`(logits, feature_map, pixel_values) -> logits` (`spar_hf/model/refine.py`)."
        )
    return refine


@torch.no_grad()
def refined_logits(
    model,
    feature_map: torch.Tensor,
    text_embeds: torch.Tensor,
    pixel_values: torch.Tensor,
    refine: str | Refinement | None = None,
    upsampler: Upsampler | None = None,
) -> tuple[torch.Tensor, int]:
    """
    The logits of one image, from upsampled features and refined, if asked.

    Args:
        model ([`SparForOpenVocabSegmentation`]): compares features with text embeddings.
        feature_map (`torch.Tensor` of shape `(dim, h, w)`): dense features of the image.
        text_embeds (`torch.Tensor` of shape `(names, dim)`): text embeddings of the names.
        pixel_values (`torch.Tensor` of shape `(3, height, width)`): input of the vision tower.
        refine (`str` or `Callable`, *optional*): see [`resolve_refinement`].
        upsampler (`Callable`, *optional*):
            `(image, features) -> features`, see `upsamplers.py`. It gets SPAR's normalised image, window by window, so that
            its memory is that of 32 × 32 patches; only a refinement needs the finer features of the whole image.

    Returns:
        Logits `(names, ceil(height / cell), ceil(width / cell))` and the side of a cell in pixels, `patch / r`: the
        `logits` and `patch_size` of [`~spar_hf.model.segmentation.decide`].

    Raises:
        ValueError: an unknown refinement, a result on an impossible grid, or logits or refined features above 1 GiB.
    """
    if upsampler is not None or callable(refine):
        feature_map = feature_map.clone()  # they may change it in place, and it serves later calls
    cell = model.config.patch_size
    height, width = pixel_values.shape[-2:]
    padding = (0, feature_map.shape[2] * cell - width, 0, feature_map.shape[1] * cell - height)
    image = nn.functional.pad(pixel_values[None], padding, mode="replicate")
    if upsampler is None:
        check_size(f"{len(text_embeds)} names", len(text_embeds), feature_map.shape[1:])
        logits = model.dense_logits(feature_map[None], text_embeds)[0]
    else:
        logits, feature_map, cell = upsampled_logits(
            model, feature_map, text_embeds, image, upsampler, refine is not None
        )
    if refine is not None:
        refined = resolve_refinement(refine)(logits, feature_map, image[0])
        cell = cell_side("The refinement's logits", refined.shape, logits.shape, cell)
        logits = refined
    # cells that lie in the padding are cut off
    return logits[:, : -(-height // cell), : -(-width // cell)], cell


def upsampled_logits(
    model, feature_map: torch.Tensor, text_embeds: torch.Tensor, image: torch.Tensor, upsampler: Upsampler, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The logits of upsampled features, these features if they are to be kept, and the side of their cells."""
    dim, height, width = feature_map.shape
    patch = cell = model.config.patch_size
    logits = features = torch.empty(0)
    for place, fine, cell in upsampled_features(upsampler, image, feature_map, patch):
        if not len(logits):
            size = (height * patch // cell, width * patch // cell)
            check_size(f"{len(text_embeds)} names", len(text_embeds), size)
            logits = fine.new_empty((len(text_embeds), *size), dtype=torch.float32)
            if keep:
                check_size(f"Features of {dim} channels for a refinement", dim, size)
                features = fine.new_empty((dim, *size))
        logits[:, *place] = model.dense_logits(fine[None], text_embeds)[0]
        if keep:
            features[:, *place] = fine
    return logits, features, cell


def check_size(what: str, values: int, size: Sequence[int]) -> None:
    """
    Raises:
        ValueError: float32 `values` per cell of a grid of this `size` take more than 1 GiB.
    """
    if 4 * values * size[0] * size[1] > OUTPUT_BYTES:
        raise ValueError(
            f"{what} on {size[0]}×{size[1]} cells take more than {OUTPUT_BYTES // 2**20} MiB. Use fewer names, a smaller "
            "`size`, an upsampler with a coarser grid, or no refinement."
        )


__all__ = ["LabelPropagation", "PixelAdaptiveRefinement", "refined_logits", "resolve_refinement"]
