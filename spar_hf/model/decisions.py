"""
The decision among many names, without the logits of all of them at every pixel.

A pixel lies in a cell between the centres of four patches, and its logits are a convex mix of theirs.

**Label.** Only a name whose largest corner of the cell reaches the best smallest corner of any name can win in it. These few
candidates are upsampled by the same operations, in the same order, as all names would be. So the label of every pixel
equals that of the plain computation, bit for bit. For the `k` best classes of every pixel, the bar is the `k`-th best
smallest corner of any class.

**Probability** of the best class. It is `1 / (s + exp(f - best))`. The sum `s` runs over the candidates and the names little
below them; it is computed at every pixel (if names are classes; else `s = 0`). The rest is `f(x) = log sum_c exp(y_c(x))`,
where `y_c` is the largest logit of the names of class `c`. Within a cell logits are bilinear, `y_c` is a maximum of them and
`f` a log-sum-exp of that, so `f` is convex along rows and along columns. Where it is known at the nodes of a finer grid,

- interpolating it bilinearly between four nodes gives an upper bound `U`, by convexity;
- for every node `x_0`, `f(x_0) + sum_c q_c (l_c(x) - l_c(x_0))` is a lower bound, where `q` are the probabilities at `x_0`
  and `l_c` is the logit of the name of class `c` that is best there: `y_c >= l_c`, and log-sum-exp lies above its tangents.
  It is bilinear, so four numbers per node describe it. `L` is the largest of four.

The probability lies between `1 / (s + exp(U - best))` and `1 / (s + exp(L - best))`, and the middle is returned. Cells are
divided until half of this interval is at most [`ERROR_BOUND`], and computed exactly where dividing does not pay. The
probability of another class is that of the best times `exp(logit - best)`, with an error that is no larger.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from .upsampling import Axes, bilinear

logger = logging.get_logger(__name__)

ERROR_BOUND = 1e-3  # largest error of a probability, in absolute terms
MARGIN = 1.0  # logits: names this far below the candidates are summed at every pixel, too
LEVELS = (2, 3, 4, 6, 9)  # divisions of a cell per axis
NODE_BYTES = 2**20  # bound on the logits at nodes that are computed at once; of the order of a cache
NOTHING = -1e4  # a logit whose exp is 0
MAX_SPREAD = 60.0  # logits: larger differences are not left to sums of exp in float32


@dataclass(frozen=True)
class ClassMaxima:
    """
    The largest logit of each class's names.

    Attributes:
        first: the first name of every class that has one, in the order of the classes; `None` if names are classes.
        others: the second, third, … names: positions of their classes among those of `first`, and the names.
    """

    first: torch.Tensor | None
    others: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @classmethod
    def of(cls, name_to_class: torch.Tensor) -> "ClassMaxima":
        """From the class of every name."""
        device = name_to_class.device
        if torch.equal(name_to_class, torch.arange(len(name_to_class), device=device, dtype=name_to_class.dtype)):
            return cls(None)
        ordered, names = name_to_class.sort(stable=True)  # the names of a class stay in their order
        _, position, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        rank = torch.arange(len(names), device=device) - starts[position]
        others = tuple((position[rank == r], names[rank == r]) for r in range(1, int(counts.max())))
        return cls(names[starts], others)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """`(..., names)` -> `(..., classes)`, the same tensor if names are classes."""
        if self.first is None:
            return logits
        best = logits.index_select(-1, self.first)
        for position, names in self.others:
            best[..., position] = torch.maximum(best[..., position], logits[..., names])
        return best

    def best_names(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Largest logits and the names that have them, the first of equal ones: two `(..., classes)`."""
        assert self.first is not None
        best = logits.index_select(-1, self.first)
        chosen = self.first.expand(best.shape).clone()
        for position, names in self.others:
            values = logits[..., names]
            better = values > best[..., position]
            best[..., position] = torch.where(better, values, best[..., position])
            chosen[..., position] = torch.where(better, names, chosen[..., position])
        return best, chosen


@dataclass(frozen=True)
class Rule:
    """
    How the logits of a pixel become its best classes and their probabilities.

    Attributes:
        maxima: classes over which the softmax runs.
        classes: class of every name `(names,)`.
        excluded: True for names that win no pixel `(names,)`; they keep their share of the softmax.
        top: number of classes that are asked for. At least so many have names that are not excluded.
    """

    maxima: ClassMaxima
    classes: torch.Tensor
    excluded: torch.Tensor | None = None
    top: int = 1

    def decide(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The best names of the best classes and their probabilities, the best first, from all logits
        `(rows, columns, names)`, which are changed: two `(top, rows, columns)`.
        """
        best = pixels.amax(-1)
        over = self.maxima(pixels).sub(best[..., None]).exp_().sum(-1)
        if self.excluded is not None:
            pixels = pixels.masked_fill(self.excluded, -torch.inf)
        chosen, names = self.strongest(pixels, self.classes, -1)
        return names, (chosen - best).exp_().div_(over)

    def strongest(self, logits: torch.Tensor, classes: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The largest logits of different classes along `dim` and their places there, the first of equal ones: two `(top, …)`.
        `classes` are those of the logits. With `top` above 1 the logits are changed.
        """
        best, place = logits.max(dim, keepdim=True)
        found = [(best.squeeze(dim), place.squeeze(dim))]
        for _ in range(1, self.top):
            chosen = classes.expand_as(logits).gather(dim, place)
            best, place = logits.masked_fill_(classes == chosen, -torch.inf).max(dim, keepdim=True)
            found.append((best.squeeze(dim), place.squeeze(dim)))
        values, places = zip(*found, strict=True)
        return torch.stack(values), torch.stack(places)


def pays(names: int, axes: Axes, device: torch.device, working_bytes: int) -> bool:
    """
    Whether [`decide_rows`] is used: on CPUs, for many names, cells of many pixels, and rows of patches that fit into memory.
    """
    grid_h, grid_w = axes.grid_size
    pixels = len(axes.rows[0]) * len(axes.columns[0]) / (grid_h * grid_w)
    return device.type == "cpu" and names >= 64 and pixels >= 32 and 4 * names * grid_w <= working_bytes // 8


def decide_tile(rule: Rule, *part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Names and probabilities of a tile from the logits of all names at every pixel, without a branch on a value: what
    [`tile_decider`] compiles.

    Args:
        rule: how logits become names.
        part: the arguments of [`bilinear`].

    Returns:
        Two `(top, rows, columns)`, as [`Rule.decide`].
    """
    return rule.decide(bilinear(*part))


def tile_decider(names: int, pixels: int, device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """
    [`decide_tile`], compiled for CUDA devices where an image has so many logits that this pays: it takes seconds in every
    process. `TORCH_COMPILE_DISABLE=1` turns it off.
    """
    return compiled_tile() if device.type == "cuda" and names >= 64 and names * pixels >= 2**28 else decide_tile


@functools.cache
def compiled_tile(**options: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """
    [`decide_tile`] as one graph for all sizes, or as it is from the first failure of the compiler on: Triton, for example,
    is not available everywhere. `options` are those of `torch.compile`.
    """
    compiled: Any = torch.compile(decide_tile, fullgraph=True, dynamic=True, **options)

    def decide(rule: Rule, *part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal compiled
        try:
            return compiled(rule, *part)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Dynamo, Inductor, Triton and compilers, which have no common class
            if compiled is decide_tile:
                raise
            logger.warning(f"Masks are decided without torch.compile, which failed: {str(error).splitlines()[0]}")
            compiled = decide_tile
            return decide_tile(rule, *part)

    return decide


def decide_rows(
    above: torch.Tensor,
    below: torch.Tensor,
    down: torch.Tensor,
    columns: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rule: Rule,
    working_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Names and probabilities of the image rows between two rows of patches.

    Args:
        above, below (`torch.Tensor` of shape `(w, names)`): logits of the two rows of patches.
        down (`torch.Tensor` of shape `(rows,)`): weight of the lower one, for every image row.
        columns: [`patch_coordinates`] of the image's columns.
        rule: how logits become names.
        working_bytes: bound on the larger buffers.

    Returns:
        Best names and their probabilities, within [`ERROR_BOUND`]: two `(top, rows, columns)`.
    """
    row = CellRow(above, below, down, columns, rule, working_bytes)
    names, best, sums = row.win()
    probabilities = row.probabilities(best[0], sums) * (best - best[0]).exp_()
    row.decide_exactly(names, probabilities)
    return names, probabilities


class CellRow:
    """A row of cells between two rows of patches; the arguments are those of [`decide_rows`]."""

    def __init__(self, above, below, down, columns, rule: Rule, working_bytes: int):
        self.above, self.below, self.down, self.rule, self.working_bytes = above, below, down, rule, working_bytes
        self.left, self.right, self.across = columns
        self.cells, self.names = above.shape
        following = torch.arange(1, self.cells + 1, device=above.device).clamp(max=self.cells - 1)
        self.corners = torch.stack([part for row in (above, below) for part in (row, row.index_select(0, following))])
        self.exact = torch.zeros(self.cells, dtype=torch.bool, device=above.device)  # cells left to `decide_exactly`

    def of_cells(self, cells: torch.Tensor) -> torch.Tensor:
        """Image columns that lie in these cells (True or False per cell)."""
        return cells[self.left].nonzero().flatten()

    def upsample(self, columns: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Logits of all names `(rows, columns, names)`, by the operations of [`bilinear`]."""
        left, right, across = self.left[columns], self.right[columns], self.across[columns, None]
        above = self.above.index_select(0, left).lerp_(self.above.index_select(0, right), across)
        below = self.below.index_select(0, left).lerp_(self.below.index_select(0, right), across)
        return torch.lerp(above, below, down[:, None, None])

    # --- labels ---

    def win(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Best names and their logits, `(top, rows, columns)`, and the sum of `exp(logit - best)` over the names summed at
        every pixel, `(rows, columns)`. Cells of too many candidates are left out and marked `exact`.
        """
        shape = (len(self.down), len(self.left))
        names = torch.zeros(self.rule.top, *shape, dtype=torch.int64, device=self.above.device)
        best, sums = torch.zeros(names.shape, device=names.device), torch.zeros(shape, device=names.device)
        cell, name = self.candidates().nonzero().T
        counts = torch.bincount(cell, minlength=self.cells)
        starts = counts.cumsum(0) - counts
        self.exact |= counts > self.names // 4
        size, low = 1, 0
        while low < int(counts.masked_fill(self.exact, 0).max()):
            columns = self.of_cells((counts > low) & (counts <= size) & ~self.exact)
            place = torch.arange(size, device=names.device)[:, None]
            # the list of a cell `(size, cells)` is filled up with its last candidate, which changes no maximum
            table = name[(starts + place.minimum(counts - 1)).clamp_(min=0)]
            step = max(1, self.working_bytes // (32 * size * len(self.down)))
            for part in columns.split(step) if len(columns) else ():
                names[..., part], best[..., part], sums[:, part] = self.best_of(table, counts, part)
            low, size = size, size * 2
        return names, best, sums

    def candidates(self) -> torch.Tensor:
        """
        Names that may be among the best in a cell, or are close to that: True or False, `(cells, names)`. If names are
        classes, they are taken out of `corners`.
        """
        high, low = self.corners.amax(0), self.corners.amin(0)
        # two interpolations in float32 may go beyond the corners by rounding
        slack = 2e-6 * torch.maximum(high.amax().abs(), low.amin().abs())
        if self.rule.excluded is not None:
            low.masked_fill_(self.rule.excluded, -torch.inf)
        bar = low.amax(-1, keepdim=True)
        if self.rule.top > 1:
            bar = self.rule.maxima(low).topk(self.rule.top).values[:, -1:]
        split = self.rule.maxima.first is None
        found = high >= bar - slack - (MARGIN if split else 0)
        if self.rule.excluded is not None:
            found &= ~self.rule.excluded
        if split:
            self.corners.masked_fill_(found, NOTHING)
        self.largest = self.corners.amax((0, 2))  # (cells,)
        # what is small beside the largest corner is lost in float32; it must be small beside the best name, too
        self.exact |= self.largest - bar[:, 0] > MAX_SPREAD
        return found

    def best_of(
        self, table: torch.Tensor, counts: torch.Tensor, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `win`, at image columns: of the lists `table` `(size, cells)`, the first `counts` `(cells,)` names."""
        left, right, across = self.left[columns], self.right[columns], self.across[columns]
        names = table[:, left]  # (size, columns)
        above = torch.lerp(self.above[left, names], self.above[right, names], across)
        below = torch.lerp(self.below[left, names], self.below[right, names], across)
        logits = torch.lerp(above[:, None], below[:, None], self.down[:, None])  # (size, rows, columns)
        sums = torch.zeros(logits.shape[1:], device=logits.device)
        if self.rule.maxima.first is None:
            shares = (logits - logits.amax(0)).exp_()
            shares *= torch.arange(len(table), device=left.device)[:, None, None] < counts[left]
            sums = shares.sum(0)
        best, place = self.rule.strongest(logits, self.rule.classes[names][:, None], 0)
        return names[place, torch.arange(len(columns), device=left.device)], best, sums

    # --- probabilities ---

    def probabilities(self, best: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """
        Probabilities of the logits `best` beside the names of `sums`, `(rows, columns)`. Cells that no level divides enough
        are marked `exact`.
        """
        self.corners -= self.largest[:, None]
        found = torch.zeros_like(best)
        pending = ~self.exact
        needed = torch.zeros(self.cells, device=best.device)
        for level in LEVELS:
            cells = (pending & (needed <= level)).nonzero().flatten()
            if len(cells) == 0:
                continue
            error = self.bound(cells, level, best, sums, found)
            pending[cells[error <= 0.95 * ERROR_BOUND]] = False  # the rest is for rounding
            # the error falls with the square of the divisions
            needed[cells] = level * (1.1 * error / ERROR_BOUND).sqrt()
        self.exact |= pending
        return found

    def bound(
        self, cells: torch.Tensor, level: int, best: torch.Tensor, sums: torch.Tensor, found: torch.Tensor
    ) -> torch.Tensor:
        """
        Write the probabilities in cells that are divided `level` times per axis; returns the largest half interval of each.
        """
        number = torch.full((self.cells,), -1, device=cells.device)
        number[cells] = torch.arange(len(cells), device=cells.device)
        columns = (number[self.left] >= 0).nonzero().flatten()
        cell, across = number[self.left[columns]], self.across[columns]
        value, tangents = self.nodes(cells, level)
        nodes, side = (
            level + 1,
            (across * level).long().clamp_(max=level - 1),
        )  # the node column left of an image column
        row = (self.down * level).long().clamp_(max=level - 1)

        # (cells, nodes, nodes) -> (columns, nodes) -> (rows, columns)
        value = value.transpose(1, 2).reshape(-1, nodes)
        at = cell * nodes + side
        value = value.index_select(0, at).lerp_(value.index_select(0, at + 1), (across * level - side)[:, None]).T
        upper = value.index_select(0, row).lerp_(value.index_select(0, row + 1), (self.down * level - row)[:, None])

        # a tangent is read at the image column along both edges of the cell, then at the image row
        tangents = tangents.transpose(1, 2).reshape(-1, nodes * 4)
        lower, down = torch.full_like(upper, -torch.inf), self.down[:, None]
        for of_side in (at, at + 1):
            corners = tangents.index_select(0, of_side).view(len(columns), nodes, 2, 2)
            edges = torch.lerp(corners[..., 0], corners[..., 1], across[:, None, None]).permute(1, 2, 0).contiguous()
            for of_row in (row, row + 1):
                above, below = edges.index_select(0, of_row).unbind(1)  # (rows, columns)
                lower = torch.maximum(lower, torch.lerp(above, below, down))
        chosen, explicit = (part.index_select(1, columns) for part in (best, sums))
        least = (explicit + upper.sub_(chosen).exp_()).reciprocal_()
        most = (explicit + lower.sub_(chosen).exp_()).reciprocal_()
        found[:, columns] = (least + most).mul_(0.5)
        half = most.sub_(least).mul_(0.5).amax(0)
        return half.new_zeros(len(cells)).scatter_reduce_(0, cell, half, "amax")

    def nodes(self, cells: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `f` at the nodes of cells, `(cells, level + 1, level + 1)`, and its tangents there, by their values at the corners of
        the cell, `(cells, level + 1, level + 1, 2, 2)`.
        """
        steps = torch.linspace(0, 1, level + 1, device=cells.device)
        weights = torch.stack([1 - steps, steps], 1)  # (level + 1, 2)
        weights = torch.einsum("ia,jb->ijab", weights, weights).reshape(-1, 4)  # (nodes, corners)
        size = max(1, NODE_BYTES // (4 * len(weights) * self.names))
        parts = [self.denominators(part, weights) for part in cells.split(size)]
        value, slope = (torch.cat(part) for part in zip(*parts, strict=True))  # (cells, nodes), (cells, nodes, 4)
        tangents = value[..., None] + slope - (slope * weights).sum(-1, keepdim=True)
        side = level + 1
        return value.view(-1, side, side), tangents.view(-1, side, side, 2, 2)

    def denominators(self, cells: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        At nodes of cells with `weights` `(nodes, 4)` of the corners: `f`, and the mean of each corner's logits under the
        probabilities there; `(cells, nodes)` and `(cells, nodes, 4)`.
        """
        corners = self.corners.index_select(1, cells)  # (4, cells, names)
        logits = (weights @ corners.flatten(1)).view(len(weights), len(cells), self.names)
        if self.rule.maxima.first is None:
            shares = logits.exp_()
        else:
            best, names = self.rule.maxima.best_names(logits)
            shares = logits.zero_().scatter_(-1, names, best.exp_())
        shares = shares.transpose(0, 1)  # (cells, nodes, names)
        total = shares.sum(-1).clamp_(min=1e-36)
        slope = torch.matmul(shares, corners.permute(1, 2, 0)) / total[..., None]
        return total.log() + self.largest[cells, None], slope

    # --- the rest ---

    def decide_exactly(self, names: torch.Tensor, probabilities: torch.Tensor) -> None:
        """Write names and probabilities of the cells marked `exact`, from the logits of all names."""
        columns = self.of_cells(self.exact)
        pixels = max(1, self.working_bytes // (4 * self.names))
        step = min(max(1, pixels // len(self.down)), max(1, len(columns)))
        for part in columns.split(step) if len(columns) else ():
            rows = max(1, pixels // len(part))
            for start in range(0, len(self.down), rows):
                place = slice(start, start + rows)
                found = self.rule.decide(self.upsample(part, self.down[place]))
                names[:, place, part], probabilities[:, place, part] = found
