"""Sliding-window teacher: a frozen encoder runs on every window of an image, and its features are averaged on one grid."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from .model.execution import check_batch, full_precision, mark_sizes
from .model.image_pixels import as_whole
from .model.modeling_spar import SparVisionModel, SparVisionModelOutput, pad_to_patches
from .model.segmentation import patch_coordinates
from .windows import WindowPlan, default_stride

CELL_BYTES = 256 * 2**20  # bound on the features of one batch of windows on the cells
MAP_BYTES = 2**30  # bound on the sum over all windows on the cells


def copy_as(model: SparVisionModel, dtype: torch.dtype) -> SparVisionModel:
    """
    A frozen copy of a model in evaluation mode, its parameters in another precision. RoPE's frequencies stay in float32, as
    when a model is loaded.

    Raises:
        ValueError: weights are offloaded and have no values here.

    Example:

    ```python
    >>> from spar_hf import SPAR_TINY, SparVisionModel

    >>> model = SparVisionModel.from_pretrained(SPAR_TINY)
    >>> copy_as(model, torch.bfloat16).dtype, model.dtype
    (torch.bfloat16, torch.float32)
    ```"""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("The weights of this model are offloaded. Load it on one device, or in the dtype itself.")
    # what `deepcopy` finds here it takes for done, so that no second copy in the old precision is made
    done: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, done).eval()


class SlidingWindowTeacher(nn.Module):
    """
    Features of a frozen [`SparVisionModel`] averaged over sliding windows, on the patch grid of a single pass.

    The feature maps of all windows are summed on a common grid of cells and divided by the number of windows over each cell.
    A cell is a patch, or part of one if the stride is not a multiple of the patch: then the features of a window are resized
    bilinearly to the cells, and the averaged map back to patches. The last window of each axis is flush with the border of
    the padded image. An image smaller than the window is one smaller window.

    Source: SPAR (arXiv 2604.02252), section 3.

    Args:
        model ([`SparVisionModel`]): the encoder, used without gradient.
        window_size (`int`, *optional*): side in pixels, a multiple of the patch. Defaults to `config.image_size`.
        stride (`int`, *optional*):
            Step between windows in pixels, at most `window_size`. Default: one and a half patches, which is the published
            24 at patches of 16 px. With a stride that shares no large factor with the patch, cells are small and many: 24
            at patches of 14 px makes 49 of each patch, 21 makes 4.
        window_batch_size (`int`, *optional*, defaults to 16): windows per forward pass; it bounds the memory.
        scales (`Sequence[float]`, *optional*, defaults to `(1.0,)`):
            Sizes of the image over its own at which it is read; the features are the mean over them. At `0.5` a window sees
            twice as much of the scene. Several sizes make a better target than the published teacher, at a higher cost.
        flip (`bool`, *optional*, defaults to `False`): also read the mirrored image, at every scale.
        dtype (`torch.dtype`, *optional*):
            Precision of the windows, under autocast too. If the weights have another one, the teacher holds a frozen copy of
            its own, and `model` stays as it is. Windows are summed in float32. Default: that of the weights and of autocast.
        compile (`bool`, *optional*, defaults to `False`):
            Compile the encoder at the first call, once for all sizes and numbers of windows. It takes a minute or so.

    Raises:
        ValueError: a model with a text tower, a window that is not a multiple of the patch, a stride outside 1 to
            `window_size`, no positive scale, or a `dtype` for offloaded weights.

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
        stride: int | None = None,
        window_batch_size: int = 16,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ):
        super().__init__()
        if hasattr(model, "vision_model"):
            raise ValueError(f"The teacher reads one tower: pass `model.vision_model` of the {type(model).__name__}.")
        window_size = model.config.image_size if window_size is None else window_size
        patch_size = model.config.patch_size
        stride = default_stride(patch_size) if stride is None else stride
        numbers = {"window_size": window_size, "stride": stride, "window_batch_size": window_batch_size}
        for name, number in numbers.items():
            if not isinstance(as_whole(number), int):
                raise ValueError(f"{name}={number!r} must be a whole number, for example {name}=96.")
        window_size, stride, window_batch_size = map(as_whole, numbers.values())
        if window_size < patch_size or window_size % patch_size:
            nearest = max(patch_size, round(window_size / patch_size) * patch_size)
            raise ValueError(f"window_size={window_size} is no multiple of the patch ({patch_size} px); use {nearest}.")
        if not 1 <= stride <= window_size:
            raise ValueError(
                f"stride={stride} must lie between 1 and the window ({window_size} px), or pixels are missed."
            )
        if window_batch_size < 1:
            raise ValueError(f"window_batch_size={window_batch_size} must be at least 1.")
        self.model = model if dtype is None or dtype == model.dtype else copy_as(model, dtype)
        self.window_size, self.stride, self.window_batch_size = window_size, stride, window_batch_size
        self.flip, self.dtype = flip, dtype
        self.scales = tuple(float(scale) for scale, mirrored in self.views_at(scales) if not mirrored)
        self.compiled = torch.compile(self.features, dynamic=True) if compile else None

    @property
    def config(self):
        """The encoder's configuration."""
        return self.model.config

    @property
    def views(self) -> list[tuple[float, bool]]:
        """The views of an image: its size over the image's own, and whether it is mirrored."""
        return self.views_at(self.scales)

    def views_at(self, scales: Sequence[float]) -> list[tuple[float, bool]]:
        """
        As [`SlidingWindowTeacher.views`], at other sizes.

        Raises:
            ValueError: no scale, or one that is not positive.
        """
        if not scales or not all(scale > 0 for scale in scales):
            raise ValueError(f"scales={tuple(scales)} must be one or more positive factors, for example (1.0, 0.5).")
        return [(scale, mirrored) for scale in scales for mirrored in (False, True)[: 1 + self.flip]]

    def sped_up(self, dtype: torch.dtype | None = None, compile: bool = False) -> "SlidingWindowTeacher":
        """The same teacher, computed as `dtype` and `compile` say."""
        windows = (self.window_size, self.stride, self.window_batch_size, self.scales, self.flip)
        return SlidingWindowTeacher(self.model, *windows, dtype, compile)

    def features(self, windows: torch.Tensor) -> torch.Tensor:
        """The encoder's features of windows `(n, 3, height, width)`: `(n, dim, height / patch, width / patch)`."""
        return self.model(windows).feature_map

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """As `features`, but float32, in the teacher's precision and compiled if it is asked for."""
        with nullcontext() if self.dtype is None else full_precision(windows.device):
            if self.compiled is None:
                return self.features(windows).float()
            number = len(windows)
            if number == 1:  # graphs hold for 2 and more, and a single window would be compiled for itself
                windows = torch.cat([windows, windows])
            mark_sizes(windows)
            return self.compiled(windows)[:number].float()

    def plan(self, height: int, width: int) -> WindowPlan:
        """The windows of an image of `height` × `width` pixels."""
        patch = self.config.patch_size
        return WindowPlan.make(height + -height % patch, width + -width % patch, self.window_size, self.stride, patch)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor,
        progress: Callable[[int, int], None] | None = None,
        scales: Sequence[float] | None = None,
    ) -> SparVisionModelOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`): any height and width.
            progress (`Callable[[int, int], None]`, *optional*):
                Called after each forward pass with the number of windows done and of all windows, of each view by itself.
            scales (`Sequence[float]`, *optional*): of this batch, instead of the teacher's own.

        Returns:
            [`SparVisionModelOutput`] with `feature_map` `(batch, dim, ceil(height / patch), ceil(width / patch))`.

        Raises:
            ValueError: no positive scale, or a map on the cells of more than 1 GiB, e.g. with an odd stride, whose cells are
                pixels.
        """
        total: torch.Tensor | None = None
        views = self.views_at(self.scales if scales is None else scales)
        for view in views:
            pixels = self.view(pixel_values, view)
            plan = self.plan(*pixels.shape[-2:])
            features, coverage = self.stitch(pixels, plan, plan.positions(), progress)
            features = self.from_view(self.to_patches(features.div_(coverage), plan), view, pixel_values.shape[-2:])
            total = features if total is None else total.add_(features)
        assert total is not None  # there is at least one view
        return SparVisionModelOutput(feature_map=total.div_(len(views)) if len(views) > 1 else total)

    @torch.no_grad()
    def sample(
        self,
        pixel_values: torch.Tensor,
        windows: int,
        generator: torch.Generator | None = None,
        variant: str = "spread",
        scales: Sequence[float] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        An unbiased target for distillation from about `windows` windows instead of all.

        With the student's feature `s` of a patch, the sampled mean `t` of each of its cells and the returned weight `w`, the
        expected gradient of `sum(w * |s - t|²)` over all cells is that of `sum(|s - full|²)` over patches, where `full` is
        the teacher's map. `w` is the share of the cell in its patch times the cell's weight of [`WindowPlan.draw`], which
        has the proof. All images of a batch share the draw.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`): any height and width.
            windows (`int`): windows to run per image; with `"tiling"` on average.
            generator (`torch.Generator`, *optional*): random generator on the CPU.
            variant (`str`, *optional*, defaults to `"spread"`):
                `"spread"`: windows far apart, those at the borders more often; it has the least variance. `"tiling"`:
                disjoint windows that tile the image from a random phase. `"windows"`: windows drawn uniformly.
            scales (`Sequence[float]`, *optional*): of this batch, instead of the teacher's own; one of them is drawn.

        Returns:
            Means `(batch, dim, cells high, cells wide)`, 0 in cells without a drawn window, and weights
            `(cells high, cells wide)`.

        Raises:
            ValueError: an unknown variant, fewer than one window, or scales or too many cells, see `forward`.

        Example:

        ```python
        >>> import torch
        >>> from transformers import AutoModel
        >>> from spar_hf import SPAR_TINY, SlidingWindowTeacher

        >>> teacher = SlidingWindowTeacher(AutoModel.from_pretrained(SPAR_TINY), stride=24)
        >>> target, weight = teacher.sample(torch.zeros(1, 3, 256, 320), windows=4)
        >>> target.shape, weight.shape  # each patch is 2 × 2 cells
        (torch.Size([1, 192, 32, 40]), torch.Size([32, 40]))
        ```"""
        views = self.views_at(self.scales if scales is None else scales)
        view = views[0]
        if len(views) > 1:  # one is drawn uniformly, which keeps the target unbiased
            view = views[int(torch.randint(len(views), (), generator=generator))]
        size = pixel_values.shape[-2:]
        pixel_values = self.view(pixel_values, view)
        plan = self.plan(*pixel_values.shape[-2:])
        draw = plan.draw(windows, generator, variant)
        sums, coverage = self.stitch(pixel_values, plan, draw.positions, weights=draw.window_weights)
        # bilinear resizing to patches averages the two middle cells of each axis (or takes the middle one if r is odd)
        r = self.config.patch_size // plan.cell
        share = torch.zeros(r, device=sums.device)
        share[(r - 1) // 2 : r // 2 + 1] = 1 / (r // 2 + 1 - (r - 1) // 2)
        shares = torch.outer(share, share).repeat(plan.grid[0] // r, plan.grid[1] // r)
        means, cell_weights = sums.div_(coverage.where(coverage > 0, 1)), draw.cell_weights.float().to(sums.device)
        if view == (1.0, False):
            return means, shares * cell_weights
        # the weighted means are resized, so that what is expected of them is the resized map of the view
        weighted = self.to_patches(torch.cat([means * cell_weights, cell_weights.expand_as(means[:, :1])], dim=1), plan)
        weighted = self.from_view(weighted, view, size)
        weight = weighted[:, -1:]
        return weighted[:, :-1] / weight.where(weight > 0, 1), weight[0, 0]

    def view(self, pixel_values: torch.Tensor, view: tuple[float, bool]) -> torch.Tensor:
        """A batch at another size, padded to whole patches, perhaps mirrored."""
        check_batch(pixel_values)
        scale, mirrored = view
        if scale != 1:
            size = [max(1, round(side * scale)) for side in pixel_values.shape[-2:]]
            pixel_values = nn.functional.interpolate(pixel_values, size, mode="bicubic", antialias=True)
        pixel_values = pad_to_patches(pixel_values, self.config.patch_size)
        return pixel_values.flip(-1) if mirrored else pixel_values

    def from_view(self, maps: torch.Tensor, view: tuple[float, bool], size: Sequence[int]) -> torch.Tensor:
        """Maps of a view on the patches of the image of `size`, height and width: `(batch, dim, h, w)`."""
        scale, mirrored = view
        maps = maps.flip(-1) if mirrored else maps
        if scale == 1:
            return maps
        patch = self.config.patch_size
        for axis, side in zip((2, 3), size, strict=True):
            patches = -(-side // patch)
            # a patch of the image is a pixel of an axis that the view shows `working` patches long
            working = patches * patch * max(1, round(side * scale)) / side
            lower, upper, weight = patch_coordinates(patches, working, patch, maps.shape[axis], maps.device)
            weight = weight[:, None] if axis == 2 else weight
            maps = torch.lerp(maps.index_select(axis, lower), maps.index_select(axis, upper), weight)
        return maps

    def stitch(
        self,
        pixel_values: torch.Tensor,
        plan: WindowPlan,
        positions: torch.Tensor,
        progress: Callable[[int, int], None] | None = None,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Sum the features of the windows at `positions`, times their `weights` (default 1), on the grid of cells. Both tensors
        are on the CPU, weights in float64, as in a [`Draw`].

        Returns:
            Sums `(batch, dim, cells high, cells wide)`, and the sum of the weights over each cell
            `(cells high, cells wide)`; both float32.
        """
        batch = pixel_values.shape[0]
        device = pixel_values.device
        self.check_memory(batch, plan)
        weights = torch.ones(len(positions), dtype=torch.float64) if weights is None else weights
        coverage = plan.coverage(positions, weights).float().to(device)
        is_weighted = bool((weights != 1).any())
        positions, weights = positions.to(device), weights.float().to(device)
        rows, columns = (torch.arange(side, device=device) for side in plan.cells)
        (window_h, window_w), (grid_h, grid_w) = plan.window, plan.grid
        # (batch, 3, H, W) -> a view of every window that starts on a cell: (batch, 3, starts, starts, height, width)
        views = pixel_values.unfold(2, window_h, plan.cell).unfold(3, window_w, plan.cell)
        jobs = torch.cartesian_prod(torch.arange(batch, device=device), torch.arange(len(positions), device=device))
        sums: torch.Tensor | None = None
        # with many cells per patch the features of a window are large: fewer windows at a time
        window_bytes = 4 * self.config.projection_dim * plan.cells[0] * plan.cells[1]
        at_once = min(self.window_batch_size, max(1, CELL_BYTES // window_bytes))
        for chunk in jobs.split(at_once):
            image, (top, left) = chunk[:, 0], positions[chunk[:, 1]].unbind(1)
            windows = views[image, :, top, left]  # (n, 3, height, width)
            features = self.encode(windows)  # (n, dim, height / patch, width / patch)
            if is_weighted:  # before resizing: there are fewer patches than cells
                features = features * weights[chunk[:, 1]][:, None, None, None]
            if features.shape[-2:] != plan.cells:
                features = nn.functional.interpolate(features, size=plan.cells, mode="bilinear", align_corners=False)
            if sums is None:
                sums = features.new_zeros(batch * grid_h * grid_w, features.shape[1])
            # index over the whole batch of the cell of each feature: (n, cells high, cells wide)
            cell = (top[:, None] + rows)[:, :, None] * grid_w + (left[:, None] + columns)[:, None, :]
            cell = cell + image[:, None, None] * (grid_h * grid_w)
            sums.index_add_(0, cell.flatten(), features.permute(0, 2, 3, 1).flatten(0, 2))
            if progress is not None:
                progress(int(chunk[-1, 0]) * len(positions) + int(chunk[-1, 1]) + 1, len(jobs))
        assert sums is not None  # a plan holds at least one window
        # (batch * cells, dim) -> (batch, dim, cells high, cells wide)
        return sums.view(batch, grid_h, grid_w, -1).permute(0, 3, 1, 2), coverage

    def check_memory(self, batch: int, plan: WindowPlan) -> None:
        """
        Raises:
            ValueError: the maps of the batch on the cells would take more than 1 GiB.
        """
        (rows, columns), dim, patch = plan.grid, self.config.projection_dim, self.config.patch_size
        if 4 * batch * dim * rows * columns <= MAP_BYTES:
            return
        half = max(1, patch // 2)
        better = max(1, round(self.stride / half)) * half
        coarser = f"a stride that is a multiple of half a patch ({better}), " if plan.cell < half else ""
        raise ValueError(
            f"A map of {dim} channels on {rows}×{columns} cells of {plan.cell} px takes more than {MAP_BYTES // 2**30} GiB. "
            f"Use {coarser}smaller images, or fewer channels (names, if logits are averaged)."
        )

    def to_patches(self, cells: torch.Tensor, plan: WindowPlan) -> torch.Tensor:
        """Resize a map of cells bilinearly to patches: `(batch, dim, cells high, cells wide)` -> patches."""
        patches = [side * plan.cell // self.config.patch_size for side in plan.grid]
        if list(cells.shape[-2:]) == patches:
            return cells
        return nn.functional.interpolate(cells, size=patches, mode="bilinear", align_corners=False)
