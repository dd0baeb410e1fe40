"""Which windows a sliding-window teacher reads: all of them, or a random few with weights that keep the target unbiased."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

VARIANTS = ("spread", "tiling", "windows")  # ways to draw windows, see WindowPlan.draw


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """
    Starts of the windows along one axis in pixels: every `stride`, the last window flush with the end.

    Example:

    ```python
    >>> window_starts(100, 64, 24)
    [0, 24, 36]
    ```"""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def default_stride(patch_size: int) -> int:
    """
    One and a half patches, SPAR's 24 px at patches of 16 px: windows of even and of odd places then meet each patch at its
    borders and in its middle.

    Example:

    ```python
    >>> default_stride(16), default_stride(14)
    (24, 21)
    ```"""
    return patch_size * 3 // 2


def subdivision(patch_size: int, stride: int) -> int:
    """
    Smallest divisor `r` of the patch for which the stride is a multiple of `patch_size / r`. Each patch is divided into
    `r × r` cells, so that every window starts at the border of a cell (SPAR, section 3).

    Example:

    ```python
    >>> subdivision(16, 24), subdivision(16, 32), subdivision(16, 7), subdivision(14, 21), subdivision(14, 24)
    (2, 1, 16, 2, 7)
    ```"""
    return next(r for r in range(1, patch_size + 1) if patch_size % r == 0 and stride % (patch_size // r) == 0)


class Draw(NamedTuple):
    """
    Windows drawn from a plan and their weights, see [`WindowPlan.draw`].

    Attributes:
        positions: top left cells of the drawn windows, `(drawn, 2)`.
        window_weights: weights of the windows in the mean of a cell, `(drawn,)` float64.
        cell_weights: weight of each cell in the loss, 0 if no drawn window covers it, `(cells high, cells wide)` float64.
    """

    positions: torch.Tensor
    window_weights: torch.Tensor
    cell_weights: torch.Tensor


@dataclass
class WindowPlan:
    """
    The windows that cover a padded image. Lengths are in cells of `patch_size / r` pixels, except `window` and `cell`.

    Attributes:
        rows, columns: starts of the windows along each axis.
        window: height and width of every window in pixels.
        cells: height and width of every window in cells.
        grid: height and width of the image in cells.
        cell: side of a cell in pixels.
    """

    rows: list[int]
    columns: list[int]
    window: tuple[int, int]
    cells: tuple[int, int]
    grid: tuple[int, int]
    cell: int

    @classmethod
    def make(cls, height: int, width: int, window_size: int, stride: int, patch_size: int) -> "WindowPlan":
        """Plan for an image whose sides (in pixels) are multiples of the patch; small images get smaller windows."""
        cell = patch_size // subdivision(patch_size, stride)
        window = (min(window_size, height), min(window_size, width))
        rows, columns = (
            [start // cell for start in window_starts(length, side, stride)]
            for length, side in zip((height, width), window, strict=True)
        )
        return cls(rows, columns, window, (window[0] // cell, window[1] // cell), (height // cell, width // cell), cell)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def positions(self) -> torch.Tensor:
        """Top left cell of every window, row by row: `(windows, 2)`."""
        return torch.cartesian_prod(torch.tensor(self.rows), torch.tensor(self.columns)).view(-1, 2)

    def covered(self, starts: torch.Tensor, axis: int) -> torch.Tensor:
        """Whether each window covers each cell along an axis (0 rows, 1 columns): 0 or 1, `(windows, cells)` float64."""
        offset = torch.arange(self.grid[axis]) - starts[:, None]
        return ((offset >= 0) & (offset < self.cells[axis])).double()

    def coverage(self, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Sum of the weights of the windows over each cell: `(cells high, cells wide)`, float64. Autocast would compute this
        product in half precision for other dtypes, and round the counts.
        """
        rows, columns = (self.covered(starts, axis) for axis, starts in enumerate(positions.T))
        return (rows * weights[:, None]).T @ columns

    def draw(self, windows: int, generator: torch.Generator | None = None, variant: str = "spread") -> Draw:
        """
        Draw about `windows` of the windows, with weights that make the target unbiased.

        The target of a cell is the mean `t` of the drawn windows over it, weighted by `window_weights`. It counts with the
        cell's entry `W` of `cell_weights`, 0 if no drawn window covers it. For every variant `E[W] = 1`, and `E[W t]` is
        the mean `f` over all `k` windows that cover the cell. Hence `E[W (s - t)] = s - f` for any fixed `s`: the expected
        gradient of `W |s - t|²` is that of `|s - f|²`, for every cell.

        - `"windows"`: `n` of the `N` windows, uniformly without replacement. Those among the `k` are a uniform subset of
          the `k`, so if there is at least one, the expectation of their mean is `f`. With `W = 1 / P`, where
          `P = 1 - C(N - k, n) / C(N, n)` is the probability of at least one, both equations hold.
        - `"tiling"`: the same with disjoint sets of windows. The windows over a cell have consecutive starts, also with the
          last start clamped, because all have one length and starts increase strictly; let `m` be their largest number.
          Starts `m` positions apart never share a cell, so every `m`-th start from a phase `0 ≤ p < m` covers no cell twice,
          and `k ≤ m` consecutive starts have `k` different phases. With a phase per axis there are
          `M = m_rows · m_columns` tilings, and exactly `k` of them cover the cell, each with one window. `d` of the `M` are
          drawn uniformly without replacement: as above, with `M`, `d` for `N`, `n`.
        - `"spread"`: window `j` is drawn with probability `π_j` ([`WindowPlan.chances`]) by systematic sampling: each
          window takes a stretch of length `π_j` on a line that winds through the image, and the windows at the points
          `u, u + 1, u + 2, …` are drawn for a uniform `0 ≤ u < 1`, so they lie far apart. With `window_weights` `1 / π_j`
          and `W = sum of 1 / (k π_j)` over the drawn windows on the cell, `W t` is the sum of `f_j / (k π_j)`, the
          Horvitz–Thompson estimator, and both equations hold.

        Cells are weighted, not patches: requiring all cells of a patch to be covered would favour windows that cover all of
        them at once, and bias the target.

        Raises:
            ValueError: an unknown variant, or fewer than one window.
        """
        if variant not in VARIANTS or windows < 1:
            raise ValueError(
                f"Cannot draw {windows} windows as {variant!r}: use 1 or more, and one of {', '.join(VARIANTS)}."
            )
        over_rows, over_columns = self.overlaps()
        over = torch.outer(over_rows, over_columns)  # windows over each cell, (cells high, cells wide)
        if variant == "spread":
            return self._draw_spread(windows, generator, over)
        # groups of windows are drawn: tilings or single windows
        m_rows, m_columns = int(over_rows.max()), int(over_columns.max())
        groups = m_rows * m_columns if variant == "tiling" else len(self)
        drawn = min(groups, max(1, round(windows * groups / len(self))))
        order = torch.randperm(groups, generator=generator)[:drawn]
        if variant == "tiling":
            rows, columns = torch.tensor(self.rows), torch.tensor(self.columns)
            phases = [(p // m_columns, p % m_columns) for p in order.tolist()]
            positions = torch.cat([torch.cartesian_prod(rows[i::m_rows], columns[j::m_columns]) for i, j in phases])
        else:
            positions = self.positions()[order]
        missed, none = groups - over, torch.ones_like(over)
        for i in range(drawn):
            none *= (missed - i).clamp(min=0) / (groups - i)
        weights = none.new_ones(len(positions))
        return Draw(positions, weights, (self.coverage(positions, weights) > 0) / (1 - none))

    def _draw_spread(self, windows: int, generator: torch.Generator | None, over: torch.Tensor) -> Draw:
        """Systematic sampling of windows, see `draw`; `over` counts the windows over each cell."""
        line, chances = self.chances(windows)
        # a window is drawn if a whole number lies on its stretch of the line
        borders = torch.cat([chances.new_zeros(1), chances.cumsum(0)])
        hit = (borders - torch.rand((), generator=generator, dtype=torch.float64)).floor().diff() > 0
        positions, weights = self.positions()[line[hit]], 1 / chances[hit]
        return Draw(positions, weights, self.coverage(positions, weights) / over)

    def overlaps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Number of windows over each cell of an axis: float64, `(cells high,)` and `(cells wide,)`."""
        starts = torch.tensor(self.rows), torch.tensor(self.columns)
        rows, columns = (self.covered(axis_starts, axis).sum(0) for axis, axis_starts in enumerate(starts))
        return rows, columns

    def chances(self, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Probability of each window to be among `windows` drawn ones: `∝ sqrt(sum of 1 / k² over its cells)`, at most 1.

        A cell covered by one window (`k = 1`) gets its whole target from it, so windows at borders are drawn more often.
        This choice has the least variance if windows are drawn independently and have equal errors: the share of a window
        in the variance is `sum of 1 / k² / π`.

        Returns:
            Indices of the windows along a line that winds back and forth through the image, so that neighbours on the line
            are neighbours in the image, and their probabilities in that order, float64: `(windows,)` each.
        """
        over_rows, over_columns = self.overlaps()
        sizes = torch.outer(
            self.covered(torch.tensor(self.rows), 0) @ over_rows**-2,
            self.covered(torch.tensor(self.columns), 1) @ over_columns**-2,
        ).sqrt()  # (rows, columns)
        line = torch.arange(len(self)).view(sizes.shape)
        if len(self.columns) > len(self.rows):
            line = line.T.contiguous()
        line[1::2] = line[1::2].flip(1)
        line, total = line.flatten(), min(windows, len(self))
        sizes = sizes.flatten()[line]
        chances = sizes * total / sizes.sum()
        while bool((chances > 1 + 1e-9).any()):  # cap at 1 and give the rest to the others
            rest = sizes.where(chances < 1, 0)
            chances = torch.where(chances < 1, rest * (total - int((chances >= 1).sum())) / rest.sum(), 1.0)
        return line, chances.clamp(max=1)
