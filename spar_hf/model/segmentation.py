"""From logits on the patch grid to a class for every pixel of the image, in bounded memory."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

WORKING_BYTES = 64 * 2**20  # bound on the largest buffer of a tile; four to five of them live at once
OUTPUT_BYTES = 2**30  # larger dense outputs are refused
# logits of all names on the whole grid, or a function that gives those of the patch rows `first` to `last` (exclusive), so
# that they are never all in memory
DenseLogits = torch.Tensor | Callable[[int, int], torch.Tensor]


@dataclass
class LabelMap:
    """
    The decision for every pixel of an image.

    Attributes:
        labels: class per pixel `(height, width)`, int32.
        probabilities: probability of that class `(height, width)`, float32: that of its most probable name in the softmax
            over all names.
    """

    labels: torch.Tensor
    probabilities: torch.Tensor

    def strips(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Views of labels and probabilities, about a million pixels each, so that temporary tensors stay small."""
        rows = max(1, 2**20 // self.labels.shape[1])
        return zip(self.labels.split(rows), self.probabilities.split(rows), strict=True)

    def class_scores(self, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels of every class and the mean probability over them (0 where there are none): two `(classes,)`."""
        device = self.labels.device
        pixels = torch.zeros(num_classes, dtype=torch.int64, device=device)
        accurate = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        total = torch.zeros(num_classes, dtype=accurate, device=device)
        for labels, probabilities in self.strips():
            flat = labels.flatten()
            pixels += torch.bincount(flat, minlength=num_classes)
            total += torch.bincount(flat, weights=probabilities.flatten().to(accurate), minlength=num_classes)
        return pixels, (total / pixels.clamp(min=1)).float()


def give_to_background(decision: LabelMap, background: int, threshold: float = 0.0, min_area: float = 0.0) -> LabelMap:
    """
    Move unsure pixels and tiny classes to the background: first pixels whose probability is below `threshold`, then classes
    that cover less than `min_area` of the pixels outside the background.

    The published evaluation uses another area rule, before the threshold: the pixels of a small class go to the next best
    class (`spar_hf.evaluation.inference`, with `excluded` of [`decide`]).

    A moved pixel gets one minus its former probability. Tensors are changed in place.

    Raises:
        ValueError: `threshold` or `min_area` is not in 0 to 1.
    """
    check_shares(threshold=threshold, min_area=min_area)
    counts = torch.zeros(
        max(int(decision.labels.max()), background) + 1, dtype=torch.int64, device=decision.labels.device
    )
    for labels, probabilities in decision.strips():
        _give(labels, probabilities, (probabilities < threshold) & (labels != background), background)
        counts += torch.bincount(labels.flatten(), minlength=len(counts))
    counts[background] = 0
    small = counts < min_area * counts.sum()
    small[background] = False
    if (small & (counts > 0)).any():
        for labels, probabilities in decision.strips():
            _give(labels, probabilities, small[labels.long()], background)
    return decision


def _give(labels: torch.Tensor, probabilities: torch.Tensor, given: torch.Tensor, background: int) -> None:
    """Move the pixels of the mask `given` to the background, in place."""
    labels[given] = background
    probabilities[given] = 1 - probabilities[given]


def check_output_size(size: int, output: str) -> None:
    """
    Raises:
        ValueError: `size`, in bytes, is too large for one result.
    """
    if size > OUTPUT_BYTES:
        raise ValueError(
            f"output={output!r} of this image takes {size / 2**30:.1f} GiB, more than {OUTPUT_BYTES / 2**30:.0f} GiB. Take "
            'output="map" (8 bytes per pixel), fewer classes, or a smaller image.'
        )


def check_shares(**shares: float) -> None:
    """
    Raises:
        ValueError: one of them is not in 0 to 1.
    """
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be a share from 0 to 1, got {value}.")


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
    height, width = output_size
    grid_h, grid_w = grid_size or (math.ceil(side / patch_size) for side in working_size)
    top, bottom, down = patch_coordinates(height, working_size[0], patch_size, grid_h)
    left, right, across = patch_coordinates(width, working_size[1], patch_size, grid_w, device)
    down = down.to(device)
    budget = max(1, working_bytes // (4 * names))  # pixels with all their names
    band = max(2, budget // grid_w)  # patch rows
    columns = min(width, budget)
    tile = max(1, budget // columns)
    start = 0
    while start < height:
        first = int(top[start])
        last = min(first + band, grid_h)
        part = logits[:, first:last] if isinstance(logits, torch.Tensor) else logits(first, last)
        # (names, rows, w) -> (rows, w, names): the names of a pixel become neighbours in memory
        grid = part.float().permute(1, 2, 0).contiguous()
        end = int(torch.searchsorted(bottom, last))  # image rows that lie between these patch rows
        for row in range(start, end, tile):
            rows = slice(row, min(row + tile, end))
            above, below = top[rows] - first, bottom[rows] - first
            strip = grid[int(above[0]) : int(below[-1]) + 1]
            above, below = (above - above[0]).to(device), (below - above[0]).to(device)
            for column in range(0, width, columns):
                cols = slice(column, min(column + columns, width))
                # columns first, on the few patch rows under this tile: (patch rows, w, names) -> (.., columns, names)
                wide = strip.index_select(1, left[cols])
                wide.lerp_(strip.index_select(1, right[cols]), across[cols, None])
                # then rows: -> (rows, columns, names)
                pixels = wide.index_select(0, above)
                pixels.lerp_(wide.index_select(0, below), down[rows, None, None])
                yield (rows, cols), pixels
        start = end


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


@torch.no_grad()
def decide(
    logits: DenseLogits,
    name_to_class: torch.Tensor,
    patch_size: int,
    working_size: tuple[int, int],
    output_size: tuple[int, int],
    working_bytes: int = WORKING_BYTES,
    excluded: torch.Tensor | None = None,
) -> LabelMap:
    """
    The class of every pixel: bilinear upsampling, softmax over names, maximum over the names of a class, best class.

    It works tile by tile, so nothing of the size names × height × width is in memory.

    Args:
        logits (`torch.Tensor` of shape `(names, h, w)`, or a function `(first, last) -> (names, last - first, w)`):
            Of one image, on the patch grid. A function gives some rows of the grid, where all would be too large; its
            tensors lie on the device of `name_to_class`.
        name_to_class (`torch.Tensor` of shape `(names,)`): class of every name.
        patch_size (`int`): side of a patch in pixels of the working image.
        working_size (`tuple[int, int]`): height and width the model saw, before its own padding.
        output_size (`tuple[int, int]`): height and width of the image; masks come out in this size.
        working_bytes (`int`, *optional*, defaults to 64 MiB):
            Bound on a tile's largest buffer. Four to five exist at once, beside the 8 bytes per pixel of the result.
        excluded (`torch.Tensor` of shape `(classes,)`, *optional*):
            True for classes that get no pixel (not all of them). Their names keep their share of the softmax.

    Returns:
        [`LabelMap`] on the device of `logits`.

    Raises:
        ValueError: the grid of `logits` is not that of `working_size`.
    """
    check_grid(logits, patch_size, working_size)
    device = logits.device if isinstance(logits, torch.Tensor) else name_to_class.device
    name_to_class = name_to_class.to(device).int()
    labels = torch.empty(output_size, dtype=torch.int32, device=device)
    probabilities = torch.empty(output_size, device=device)
    where = (patch_size, working_size, output_size, device, working_bytes)
    excluded_names = None if excluded is None else excluded.to(device).index_select(0, name_to_class)
    for place, pixels in upsampled_tiles(logits, len(name_to_class), *where):
        best, name = pixels.max(-1)
        chosen = best
        if excluded_names is not None:
            chosen, name = pixels.masked_fill(excluded_names, -torch.inf).max(-1)
        labels[place] = name_to_class[name]
        # softmax of the chosen logit
        probabilities[place] = (chosen - best).exp_() / pixels.sub_(best[..., None]).exp_().sum(-1)
    return LabelMap(labels, probabilities)


def names_by_rank(name_to_class: torch.Tensor, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For the first, second, … name of a class: the classes that have one, and these names."""
    ranks: list[tuple[list[int], list[int]]] = []
    seen: Counter[int] = Counter()
    for name, label in enumerate(name_to_class.tolist()):
        if seen[label] == len(ranks):
            ranks.append(([], []))
        ranks[seen[label]][0].append(label)
        ranks[seen[label]][1].append(name)
        seen[label] += 1
    return [(torch.tensor(labels, device=device), torch.tensor(names, device=device)) for labels, names in ranks]


@torch.no_grad()
def class_probabilities(
    logits: DenseLogits,
    name_to_class: torch.Tensor,
    patch_size: int,
    working_size: tuple[int, int],
    output_size: tuple[int, int],
    top_k: int | None = None,
    working_bytes: int = WORKING_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The probability of every class, or of the `top_k` best, at every pixel: that of its most probable name in the softmax
    over all names. They sum to 1 if every class has one name, else to less.

    Arguments as in [`decide`].

    Returns:
        Classes and their probabilities: `(classes,)` int32 and `(classes, height, width)` float32; with `top_k` both
        `(top_k, height, width)`, the best first.

    Raises:
        ValueError: the result would take more than 1 GiB; or as [`decide`].
    """
    check_grid(logits, patch_size, working_size)
    device = logits.device if isinstance(logits, torch.Tensor) else name_to_class.device
    name_to_class = name_to_class.to(device)
    classes = int(name_to_class.max()) + 1
    kept = classes if top_k is None else min(top_k, classes)
    size = kept * output_size[0] * output_size[1] * (4 if top_k is None else 8)
    if size > OUTPUT_BYTES:
        raise ValueError(
            f"Probabilities of {kept} classes at {output_size[0]}×{output_size[1]} pixels take {size / 2**30:.1f} GiB, more "
            f'than {OUTPUT_BYTES / 2**30:.0f} GiB. Take output="map" (8 bytes per pixel), fewer classes, or a smaller image.'
        )
    ranks = names_by_rank(name_to_class, device)
    in_order = torch.equal(name_to_class, torch.arange(classes, device=device))  # one name per class
    found = torch.arange(classes, dtype=torch.int32, device=device)
    if top_k is not None:
        found = torch.empty(kept, *output_size, dtype=torch.int32, device=device)
    probabilities = torch.empty(kept, *output_size, device=device)
    where = (patch_size, working_size, output_size, device, working_bytes)
    for (rows, cols), pixels in upsampled_tiles(logits, len(name_to_class), *where):
        tile = pixels.softmax(-1)
        if not in_order:  # (rows, columns, names) -> (rows, columns, classes)
            best = tile.new_zeros(*tile.shape[:2], classes)
            for with_name, names in ranks:
                best[..., with_name] = torch.maximum(best[..., with_name], tile[..., names])
            tile = best
        if top_k is not None:
            tile, index = tile.topk(kept, -1)
            found[:, rows, cols] = index.permute(2, 0, 1).int()
        probabilities[:, rows, cols] = tile.permute(2, 0, 1)
    return found, probabilities
