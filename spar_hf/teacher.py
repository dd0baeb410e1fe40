"""The sliding-window teacher: a frozen encoder run on every window of a photo, its features averaged on one grid."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .modeling_spar import SparVisionModel, SparVisionModelOutput, pad_to_patches

CELL_BYTES = 256 * 2**20  # bound on the features of one batch of windows, laid out on the cells


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """
    Where windows start along one axis, in pixels: every `stride`, the last one flush with the end.

    Example:

    ```python
    >>> window_starts(100, 64, 24)
    [0, 24, 36]
    ```"""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def subdivision(patch_size: int, stride: int) -> int:
    """
    Smallest divisor `r` of the patch for which the stride is a multiple of `patch_size / r`: each patch becomes
    `r × r` cells, so that every window starts on a cell border (SPAR, section 3).

    Example:

    ```python
    >>> subdivision(16, 24), subdivision(16, 32), subdivision(16, 40), subdivision(16, 7)
    (2, 1, 2, 16)
    ```"""
    return next(r for r in range(1, patch_size + 1) if patch_size % r == 0 and stride % (patch_size // r) == 0)


@dataclass
class WindowPlan:
    """
    Which windows cover a padded photo. All lengths in cells of `patch_size / r` pixels but `window` in pixels.

    Attributes:
        rows, columns: starts of the windows along each axis.
        window: height and width of every window in pixels.
        cells: height and width of every window in cells.
        grid: height and width of the photo in cells.
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
        """Plan for a photo whose sides (in pixels) are multiples of the patch; small photos get smaller windows."""
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
        """Which cells along an axis (0 rows, 1 columns) each window covers: 0 or 1, `(windows, cells)`."""
        offset = torch.arange(self.grid[axis], device=starts.device) - starts[:, None]
        return ((offset >= 0) & (offset < self.cells[axis])).float()

    def draw(self, windows: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draw about `windows` windows as near-tilings, and the chance of each cell to be covered by such a draw.

        Along an axis at most `m` windows cover a cell, `m` neighbours in the row of starts. Taking every `m`-th start
        from a phase `0 ≤ p < m` therefore covers no cell twice, and every window belongs to exactly one phase. With a
        phase for each axis the windows fall into `M = m_rows · m_columns` disjoint tilings; a cell covered by `k`
        windows of the plan is covered by exactly `k` of the tilings. Drawing `d` of the `M` without replacement,

        - the windows over a cell that are drawn are, given their number, a uniform subset of the `k`: their mean is an
          unbiased estimate of the mean over all `k` wherever there is at least one;
        - there is at least one with probability `1 - C(M - k, d) / C(M, d)`.

        Returns:
            Top left cells of the drawn windows `(drawn, 2)` and the probabilities `(cells high, cells wide)`.
        """
        rows, columns = torch.tensor(self.rows), torch.tensor(self.columns)
        over_rows, over_columns = self.covered(rows, 0).sum(0), self.covered(columns, 1).sum(0)
        m_rows, m_columns = int(over_rows.max()), int(over_columns.max())
        tilings = m_rows * m_columns
        drawn = min(tilings, max(1, round(windows * tilings / len(self))))
        phases = torch.randperm(tilings, generator=generator)[:drawn]
        positions = [
            torch.cartesian_prod(rows[int(p) // m_columns :: m_rows], columns[int(p) % m_columns :: m_columns])
            for p in phases
        ]
        missed = tilings - torch.outer(over_rows, over_columns).double()  # tilings that miss each cell
        none = torch.ones_like(missed)
        for i in range(drawn):
            none *= (missed - i).clamp(min=0) / (tilings - i)
        return torch.cat(positions), (1 - none).float()


class SlidingWindowTeacher(nn.Module):
    """
    Features of a frozen [`SparVisionModel`] averaged over sliding windows, on the grid of a single pass.

    Each window's feature map is laid onto a common grid of cells and every cell divided by how often it was covered. A
    cell is a patch, or a part of one where the stride does not divide by the patch: the window's features are then
    resized bilinearly to the cells first, and the averaged map back to patches at the end. The last window of each axis
    lies flush with the padded photo's border; a photo smaller than the window is one smaller window.

    Source: SPAR (arXiv 2604.02252), section 3.

    Args:
        model ([`SparVisionModel`]): the encoder, used as it is and without gradient.
        window_size (`int`, *optional*): side in pixels, a multiple of the patch. Defaults to `config.image_size`.
        stride (`int`, *optional*, defaults to 24): step between windows in pixels, at most `window_size`.
        window_batch_size (`int`, *optional*, defaults to 16): windows per forward pass; bounds the memory.

    Raises:
        ValueError: a window that is no multiple of the patch, or a stride outside 1 to `window_size`.

    Example:

    ```python
    >>> import torch
    >>> from transformers import AutoModel
    >>> from spar_hf import SPAR_TINY, SlidingWindowTeacher

    >>> teacher = SlidingWindowTeacher(AutoModel.from_pretrained(SPAR_TINY), stride=96)
    >>> teacher(torch.zeros(1, 3, 200, 330)).feature_map.shape
    torch.Size([1, 192, 13, 21])
    ```"""

    def __init__(
        self,
        model: SparVisionModel,
        window_size: int | None = None,
        stride: int = 24,
        window_batch_size: int = 16,
    ):
        super().__init__()
        window_size = model.config.image_size if window_size is None else window_size
        patch_size = model.config.patch_size
        if window_size < patch_size or window_size % patch_size:
            nearest = max(patch_size, round(window_size / patch_size) * patch_size)
            raise ValueError(
                f"window_size={window_size} is no multiple of the patch ({patch_size} px); use {nearest}, say."
            )
        if not 1 <= stride <= window_size:
            raise ValueError(
                f"stride={stride} must lie between 1 and the window ({window_size} px), or pixels are missed."
            )
        if window_batch_size < 1:
            raise ValueError(f"window_batch_size={window_batch_size} must be at least 1.")
        self.model = model
        self.window_size = window_size
        self.stride = stride
        self.window_batch_size = window_batch_size

    @property
    def config(self):
        """The encoder's configuration."""
        return self.model.config

    def plan(self, height: int, width: int) -> WindowPlan:
        """The windows of a photo of `height` × `width` pixels."""
        patch = self.config.patch_size
        return WindowPlan.make(height + -height % patch, width + -width % patch, self.window_size, self.stride, patch)

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, progress: Callable[[int, int], None] | None = None
    ) -> SparVisionModelOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`): any height and width.
            progress (`Callable[[int, int], None]`, *optional*):
                Called after each forward pass with the windows done and the windows in all.

        Returns:
            [`SparVisionModelOutput`] with `feature_map` `(batch, dim, ceil(height / patch), ceil(width / patch))`.
        """
        pixel_values = pad_to_patches(pixel_values, self.config.patch_size)
        plan = self.plan(*pixel_values.shape[-2:])
        positions = plan.positions().to(pixel_values.device)
        features, coverage = self.stitch(pixel_values, plan, positions, progress)
        return SparVisionModelOutput(feature_map=self.to_patches(features / coverage, plan))

    @torch.no_grad()
    def sample(
        self, pixel_values: torch.Tensor, windows: int, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        An unbiased target for distillation from about `windows` windows instead of all of them.

        With the student's feature `s` of a patch, the sampled mean `t` of each of its cells and the returned weight
        `w`, the gradient of `sum(w * |s - t|²)` over all cells is on average that of `sum(|s - full|²)` over patches, where
        `full` is the teacher's map: the full map is linear in its cells, `w` is the share of the cell in its patch
        divided by the probability that the cell is covered, and 0 where it is not. See [`WindowPlan.draw`].

        Returns:
            Means `(batch, dim, cells high, cells wide)`, 0 where nothing was drawn, and weights
            `(cells high, cells wide)`.
        """
        pixel_values = pad_to_patches(pixel_values, self.config.patch_size)
        plan = self.plan(*pixel_values.shape[-2:])
        positions, probability = (tensor.to(pixel_values.device) for tensor in plan.draw(windows, generator))
        sums, coverage = self.stitch(pixel_values, plan, positions)
        # bilinear resizing to patches reads the two middle cells of each axis (the middle one where r is odd)
        r = self.config.patch_size // plan.cell
        share = torch.zeros(r, device=sums.device)
        share[(r - 1) // 2 : r // 2 + 1] = 1 / (r // 2 + 1 - (r - 1) // 2)
        shares = torch.outer(share, share).repeat(plan.grid[0] // r, plan.grid[1] // r)
        return sums / coverage.clamp(min=1), shares * (coverage > 0) / probability

    def stitch(
        self,
        pixel_values: torch.Tensor,
        plan: WindowPlan,
        positions: torch.Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Sum the features of the windows at `positions` on the grid of cells.

        Returns:
            Sums `(batch, dim, cells high, cells wide)` in float32, and how often each cell was covered
            `(cells high, cells wide)`.
        """
        batch = pixel_values.shape[0]
        device = pixel_values.device
        rows, columns = (torch.arange(side, device=device) for side in plan.cells)
        (window_h, window_w), (grid_h, grid_w) = plan.window, plan.grid
        # (batch, 3, H, W) -> a view of every window that starts on a cell: (batch, 3, starts, starts, height, width)
        views = pixel_values.unfold(2, window_h, plan.cell).unfold(3, window_w, plan.cell)
        jobs = torch.cartesian_prod(torch.arange(batch, device=device), torch.arange(len(positions), device=device))
        sums: torch.Tensor | None = None
        # where a stride divides the patch into many cells, a window's features on them are large: fewer windows at a time
        window_bytes = 4 * self.config.projection_dim * plan.cells[0] * plan.cells[1]
        at_once = min(self.window_batch_size, max(1, CELL_BYTES // window_bytes))
        for chunk in jobs.split(at_once):
            image, (top, left) = chunk[:, 0], positions[chunk[:, 1]].unbind(1)
            windows = views[image, :, top, left]  # (n, 3, height, width)
            features = self.model(windows).feature_map.float()  # (n, dim, height / patch, width / patch)
            if features.shape[-2:] != plan.cells:
                features = nn.functional.interpolate(features, size=plan.cells, mode="bilinear", align_corners=False)
            if sums is None:
                sums = features.new_zeros(batch * grid_h * grid_w, features.shape[1])
            # the cell under each feature, counted over the whole batch: (n, cells high, cells wide)
            cell = (top[:, None] + rows)[:, :, None] * grid_w + (left[:, None] + columns)[:, None, :]
            cell = cell + image[:, None, None] * (grid_h * grid_w)
            sums.index_add_(0, cell.flatten(), features.permute(0, 2, 3, 1).flatten(0, 2))
            if progress is not None:
                progress(int(chunk[-1, 0]) * len(positions) + int(chunk[-1, 1]) + 1, len(jobs))
        assert sums is not None  # a plan holds at least one window
        coverage = plan.covered(positions[:, 0], 0).T @ plan.covered(positions[:, 1], 1)
        # (batch * cells, dim) -> (batch, dim, cells high, cells wide)
        return sums.view(batch, grid_h, grid_w, -1).permute(0, 3, 1, 2), coverage

    def to_patches(self, cells: torch.Tensor, plan: WindowPlan) -> torch.Tensor:
        """Resize a map of cells bilinearly to patches: `(batch, dim, cells high, cells wide)` -> patches."""
        patches = [side * plan.cell // self.config.patch_size for side in plan.grid]
        if list(cells.shape[-2:]) == patches:
            return cells
        return nn.functional.interpolate(cells, size=patches, mode="bilinear", align_corners=False)
