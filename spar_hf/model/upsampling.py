"""Bilinear upsampling from the patch grid to the pixels of an image, tile by tile."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

WORKING_BYTES = 64 * 2**20  # bound on the largest buffer of a tile; four to five of them live at once
# logits of all names on the whole grid, or a function that gives those of the patch rows `first` to `last` (exclusive), so
# that they are never all in memory
DenseLogits = torch.Tensor | Callable[[int, int], torch.Tensor]


def patch_coordinates(
    length: int, working_length: float, patch_size: int, patches: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The two patches that each pixel of an image's axis lies between, for bilinear reading.

    The model saw the axis resized from `length` to `working_length` pixels and padded at the end to `patches * patch_size`.
    The pixel centre `i + 0.5` lies at `(i + 0.5) * working_length / length` in the working image, and the centre of patch
    `j` at `(j + 0.5) * patch_size`. Reading there equals upsampling `patch_size`-fold, cropping the padding and resizing to
    the image, in one step.

    Returns:
        Lower patch, upper patch (both int64) and the weight of the upper one: three `(length,)`.
    """
    # on the CPU, because not every device has float64
    centres = torch.arange(length, dtype=torch.float64) + 0.5
    position = (centres * (working_length / length) / patch_size - 0.5).clamp(0, patches - 1)
    lower = position.floor().long()
    upper, weight = (lower + 1).clamp(max=patches - 1), (position - lower).float()
    return lower.to(device), upper.to(device), weight.to(device)


def bilinear_cells(
    rows: torch.Tensor,
    columns: torch.Tensor,
    vertical: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    horizontal: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grid_width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The four cells around chosen pixels and their weights: the bilinear value of a pixel is the weighted sum of its cells.

    Args:
        rows, columns (`torch.Tensor` of shape `(pixels,)`): positions of the pixels in the image.
        vertical, horizontal: [`patch_coordinates`] of the two axes.
        grid_width (`int`): cells per row of the grid.

    Returns:
        Numbers of the cells, counted row by row, int64, and their weights, float32: two `(pixels, 4)`.

    Example:

    ```python
    >>> axis = patch_coordinates(4, 4, 2, 2)  # 4 pixels, 2 patches of 2 pixels
    >>> bilinear_cells(torch.tensor([0]), torch.tensor([1]), axis, axis, 2)
    (tensor([[0, 1, 2, 3]]), tensor([[0.7500, 0.2500, 0.0000, 0.0000]]))
    ```"""
    top, bottom, down = (values[rows] for values in vertical)
    left, right, across = (values[columns] for values in horizontal)
    upper, lower = top * grid_width, bottom * grid_width
    cells = torch.stack([upper + left, upper + right, lower + left, lower + right], dim=1)
    weights = [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across]
    return cells, torch.stack(weights, dim=1)


@dataclass(frozen=True)
class Axes:
    """
    Where the pixels of an image lie between the patches: [`patch_coordinates`] of rows and columns.

    Attributes:
        rows: lower patch and upper patch (on the CPU) and weight of the upper one, per image row.
        columns: the same per image column.
        grid_size: patches per column and row of the grid.
    """

    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    columns: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    grid_size: tuple[int, int]

    @classmethod
    def of(
        cls,
        patch_size: int,
        working_size: tuple[float, float],
        output_size: tuple[int, int],
        device: torch.device,
        grid_size: tuple[int, int] | None = None,
    ) -> "Axes":
        """`grid_size` is that of the logits where it differs from `working_size` over the patch, rounded up."""
        grid_h, grid_w = grid_size or (math.ceil(side / patch_size) for side in working_size)
        top, bottom, down = patch_coordinates(output_size[0], working_size[0], patch_size, grid_h)
        columns = patch_coordinates(output_size[1], working_size[1], patch_size, grid_w, device)
        return cls((top, bottom, down.to(device)), columns, (grid_h, grid_w))

    def bands(
        self, logits: DenseLogits, names: int, working_bytes: int
    ) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        """
        Read the grid in bands of patch rows of at most `working_bytes`, unless two rows take more.

        Yields:
            First and last image row (exclusive) that lie between these patch rows, number of the first patch row, and the
            logits of the band `(patch rows, w, names)`: those of a patch are neighbours in memory.
        """
        top, bottom, _ = self.rows
        grid_h, grid_w = self.grid_size
        band = max(2, working_bytes // (4 * names * grid_w))
        start = 0
        while start < len(top):
            first = int(top[start])
            last = min(first + band, grid_h)
            part = logits[:, first:last] if isinstance(logits, torch.Tensor) else logits(first, last)
            end = int(torch.searchsorted(bottom, last))
            yield start, end, first, part.float().permute(1, 2, 0).contiguous()
            start = end

    def cell_rows(self, start: int, end: int, working_bytes: int) -> Iterator[tuple[slice, int, int]]:
        """
        Split the image rows `start` to `end` by the two patch rows that they lie between, into parts of few pixels.

        Yields:
            Image rows, and the numbers of the patch row above and of the one below.
        """
        top, bottom, _ = self.rows
        most = max(1, working_bytes // (64 * len(self.columns[0])))
        patches, counts = top[start:end].unique_consecutive(return_counts=True)
        for above, count in zip(patches.tolist(), counts.tolist(), strict=True):
            for row in range(start, start + count, most):
                yield slice(row, min(row + most, start + count)), above, int(bottom[row])
            start += count

    def parts(
        self, grid: torch.Tensor, start: int, end: int, first: int, values: int, working_bytes: int
    ) -> Iterator[tuple[tuple[slice, slice], tuple[torch.Tensor, ...]]]:
        """
        The image rows `start` to `end` of a band in tiles, see [`upsampled_tiles`]: their rows and columns in the image, and
        the arguments of [`bilinear`]; `values` per pixel take `working_bytes`.
        """
        top, bottom, down = self.rows
        left, right, across = self.columns
        budget = max(1, working_bytes // (4 * values))  # pixels
        columns = min(len(left), budget)
        rows = max(1, budget // max(1, columns))
        for row in range(start, end, rows):
            place = slice(row, min(row + rows, end))
            above, below = top[place] - first, bottom[place] - first
            strip = grid[int(above[0]) : int(below[-1]) + 1]
            above, below = (above - above[0]).to(grid.device), (below - above[0]).to(grid.device)
            for column in range(0, len(left), columns):
                cols = slice(column, min(column + columns, len(left)))
                yield (place, cols), (strip, left[cols], right[cols], across[cols], above, below, down[place])


def bilinear(
    strip: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    across: torch.Tensor,
    above: torch.Tensor,
    below: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """
    A tile of an image, read from the patch rows that it lies between.

    Args:
        strip (`torch.Tensor` of shape `(patch rows, w, names)`): these rows.
        left, right, across: columns of patches beside each image column, and the weight of the right one: `(columns,)`.
        above, below, down: the same for the image rows: `(rows,)`.

    Returns:
        `(rows, columns, names)`.
    """
    # columns first, on the few patch rows: (patch rows, w, names) -> (patch rows, columns, names)
    wide = strip.index_select(1, left)
    wide.lerp_(strip.index_select(1, right), across[:, None])
    # then rows: -> (rows, columns, names)
    pixels = wide.index_select(0, above)
    return pixels.lerp_(wide.index_select(0, below), down[:, None, None])


def upsampled_tiles(
    logits: DenseLogits,
    names: int,
    patch_size: int,
    working_size: tuple[float, float],
    output_size: tuple[int, int],
    device: torch.device,
    working_bytes: int,
    grid_size: tuple[int, int] | None = None,
) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """
    Bilinear upsampling tile by tile: the rows and columns of each tile in the image, and its logits
    `(rows, columns, names)`, which may be changed in place.

    A tile and the patch rows it is read from take at most `working_bytes` each, unless there are so many names that two
    patch rows or one pixel take more. `names` is how many values per pixel count for this. `grid_size` is that of the
    logits where it differs from `working_size` over the patch, rounded up.
    """
    axes = Axes.of(patch_size, working_size, output_size, device, grid_size)
    for start, end, first, grid in axes.bands(logits, names, working_bytes):
        for place, part in axes.parts(grid, start, end, first, names, working_bytes):
            yield place, bilinear(*part)


def check_grid(logits: DenseLogits, patch_size: int, working_size: tuple[int, int]) -> None:
    """
    Raises:
        ValueError: the grid of `logits` is not that of `working_size`.
    """
    expected = tuple(-(-side // patch_size) for side in working_size)
    if isinstance(logits, torch.Tensor) and tuple(logits.shape[1:]) != expected:
        grid = "×".join(map(str, logits.shape[1:]))
        raise ValueError(
            f"Logits on a {grid} grid do not belong to a working image of {working_size[0]}×{working_size[1]} pixels, "
            f"which has {expected[0]}×{expected[1]} patches of {patch_size} pixels."
        )
