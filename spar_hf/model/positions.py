"""
Position tables on other grids than they were trained on. Each family resamples in its own way, and each way is two small
matrices, one per axis, without a branch on the sizes: a graph exported with dynamic sizes accepts all sizes above one patch.
"""

import math
from typing import Any

import torch

from .execution import full_precision

CUBIC = -0.75  # the coefficient of torch's (and OpenCV's) bicubic kernel
ANTIALIASED_CUBIC = -0.5  # that of torch's (and Pillow's) with antialiasing


def cubic_kernel(distance: torch.Tensor, coefficient: float) -> torch.Tensor:
    """The piecewise cubic kernel at distances from 0 on, in steps of the source; 0 from 2 on."""
    near = ((coefficient + 2) * distance - (coefficient + 3)) * distance * distance + 1
    far = ((coefficient * distance - 5 * coefficient) * distance + 8 * coefficient) * distance - 4 * coefficient
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))


def triangle_kernel(distance: torch.Tensor) -> torch.Tensor:
    """The kernel of linear interpolation at distances from 0 on, in steps of the source; 0 from 1 on."""
    return (1 - distance).clamp(min=0)


def bicubic_matrix(
    source: int,
    target: int,
    device: torch.device | None = None,
    offset: float | torch.Tensor = 0.0,
    span: int | None = None,
) -> torch.Tensor:
    """
    Matrix `(target, source)`, float32, that resamples a line of `source` values to `target` values.

    It equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` with `size=target`, or with
    `scale_factor=(target + offset) / source`. With `span`, the source is resampled to `span` values, of which the middle
    `target` are taken. On the native grid the matrix is exactly the identity.

    Example:

    ```python
    >>> bicubic_matrix(2, 3).shape
    torch.Size([3, 2])
    ```"""
    step = source / (target + offset if span is None else span)
    before = 0 if span is None else (span - target) / 2
    centre = (torch.arange(target, device=device, dtype=torch.float32) + before + 0.5) * step - 0.5  # (target,)
    base = centre.floor()
    fraction = centre - base
    taps = torch.arange(-1, 3, device=device, dtype=torch.float32)  # the four neighbours
    weights = cubic_kernel((taps[None, :] - fraction[:, None]).abs(), CUBIC)  # (target, 4)
    index = (base[:, None] + taps[None, :]).clamp(0, source - 1)  # border values repeat
    columns = torch.arange(source, device=device, dtype=torch.float32)
    return (weights[:, :, None] * (index[:, :, None] == columns)).sum(1)  # (target, 4, source) -> (target, source)


def antialias_matrix(source: int, target: int, device: torch.device | None = None, cubic: bool = False) -> torch.Tensor:
    """
    As [`bicubic_matrix`], for `interpolate(size=target, antialias=True)` with `mode="bilinear"`, or `"bicubic"` with
    `cubic`: a kernel as wide as the larger of the two spacings, normalised at the borders. `(target, source)`, float32.
    """
    step = source / (torch.ones((), device=device) * target)  # a quotient of numbers is frozen in some exported graphs
    centre = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * step  # (target,)
    columns = torch.arange(source, device=device, dtype=torch.float32) + 0.5
    distance = (columns[None, :] - centre[:, None]).abs() / step.clamp(min=1)  # (target, source)
    weights = cubic_kernel(distance, ANTIALIASED_CUBIC) if cubic else triangle_kernel(distance)
    return weights / weights.sum(1, keepdim=True)


def bilinear_matrix(source: int, target: int, span: Any, device: torch.device | None = None) -> torch.Tensor:
    """
    As [`bicubic_matrix`], for the first `target` values of `interpolate(size=span, mode="bilinear", align_corners=False)`.
    """
    step = source / (torch.ones((), device=device) * span)
    centre = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * step - 0.5
    centre = centre.clamp(0, source - 1)  # border values repeat
    columns = torch.arange(source, device=device, dtype=torch.float32)
    return triangle_kernel((columns[None, :] - centre[:, None]).abs())


def resample_positions(
    table: torch.Tensor, height: int, width: int, method: str, extent: int | None = None
) -> torch.Tensor:
    """
    Resample a square position table to another grid: `(side * side, hidden)` -> `(height * width, hidden)`.

    `method` is the configuration's `position_resampling`, `extent` its `position_extent` in patches (for `"bicubic"`).
    Computed with one small matrix per axis in float32, and returned so, under autocast and for tables in half precision too.

    Raises:
        ValueError: unknown `method`.
    """
    side, device = math.isqrt(table.shape[0]), table.device
    if method == "bicubic":
        span = None if extent is None else larger(height, width, extent)
        rows, columns = (bicubic_matrix(side, length, device, span=span) for length in (height, width))
    elif method in ("bilinear_antialias", "bicubic_antialias"):
        cubic = method == "bicubic_antialias"
        rows, columns = (antialias_matrix(side, length, device, cubic) for length in (height, width))
    elif method == "bilinear_corner":
        span = larger(height, width, 1)
        rows, columns = (bilinear_matrix(side, length, span, device) for length in (height, width))
    elif method == "bicubic_offset":
        # MaskCLIP resizes by a scale factor, except on the native grid. Tensors are compared, because an exported graph must
        # not branch on the sizes.
        lengths = torch.stack([torch.ones(length, device=device).sum() for length in (height, width)])
        offset = 0.1 * (lengths != side).any()
        rows, columns = (bicubic_matrix(side, length, device, offset) for length in (height, width))
    else:
        raise ValueError(
            f"Unknown position_resampling {method!r}; use 'bicubic', 'bicubic_antialias', 'bicubic_offset', "
            "'bilinear_antialias' or 'bilinear_corner'."
        )
    grid = table.float().view(side, side, -1)
    with full_precision(device):
        grid = torch.tensordot(rows, grid, dims=1)  # (side, side, hidden) -> (height, side, hidden)
        grid = torch.matmul(columns, grid)  # (height, side, hidden) -> (height, width, hidden)
    return grid.flatten(0, 1)


def larger(height: Any, width: Any, extent: int) -> Any:
    """The largest of the three, without a branch: sizes are symbols in `torch.export` and tensors in `torch.jit.trace`."""
    if torch.jit.is_tracing():
        return torch.maximum(height, width).clamp(min=extent)
    return torch.sym_max(torch.sym_max(height, width), extent)
