"""Logits on the patch grid -> one decision per pixel of the image, in bounded memory."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

WORKING_BYTES = 64 * 2**20  # bound on the largest buffer of a tile; four to five of them live at once
OUTPUT_BYTES = 2**30  # larger dense outputs are refused
# logits of all names on the whole grid, or what gives those of the patch rows `first` to `last` (exclusive), so that
# they are never held all at once
DenseLogits = torch.Tensor | Callable[[int, int], torch.Tensor]


@dataclass
class LabelMap:
    """
    The decision for every pixel of an image.

    Attributes:
        labels: class per pixel `(height, width)`, int32.
        probabilities: probability of that class `(height, width)`, float32: the softmax over all names, the largest of
            the class's names.
    """

    labels: torch.Tensor
    probabilities: torch.Tensor

    def strips(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Views of labels and probabilities, about a million pixels each: what works on them stays small."""
        rows = max(1, 2**20 // self.labels.shape[1])
        return zip(self.labels.split(rows), self.probabilities.split(rows), strict=True)

    def class_scores(self, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels of every class and the mean probability over them (0 where there are none): two `(classes,)`."""
        device = self.labels.device
        pixels = torch.zeros(num_classes, dtype=torch.int64, device=device)
        accurate = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs do not have
        total = torch.zeros(num_classes, dtype=accurate, device=device)
        for labels, probabilities in self.strips():
            flat = labels.flatten()
            pixels += torch.bincount(flat, minlength=num_classes)
            total += torch.bincount(flat, weights=probabilities.flatten().to(accurate), minlength=num_classes)
        return pixels, (total / pixels.clamp(min=1)).float()


def give_to_background(decision: LabelMap, background: int, threshold: float = 0.0, min_area: float = 0.0) -> LabelMap:
    """
    Give unsure pixels and tiny classes to the background: first pixels whose probability is below `threshold`, then classes
    that cover less than `min_area` of the pixels that are not background.

    The published evaluation has another area rule: it comes before the threshold and gives the pixels of a small class to
    the next best one (`training/inference.py` has it, through the `barred` of [`decide`]).

    A pixel given away gets one minus its former probability. Tensors are changed in place.

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
    labels[given] = background
    probabilities[given] = 1 - probabilities[given]


def check_shares(**shares: float) -> None:
    """
    Raises:
        ValueError: one of them is not in 0 to 1.
    """
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` is a share and must lie in 0 to 1, got {value}.")


def patch_coordinates(
    length: int, working_length: float, patch_size: int, patches: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Where the pixel centres of an image's axis lie between the patch centres of the working image.

    The model saw the image resized to `working_length` pixels and padded at the end to `patches * patch_size`. A pixel
    centre `i + 0.5` of the image is `(i + 0.5) * working_length / length` in the working image, and patch `j` has its
    centre at `(j + 0.5) * patch_size`. Reading the logits there is upsampling them `patch_size`-fold, cropping the
    padding and resizing to the image, in one step.

    Returns:
        Lower patch, upper patch (both int64) and the weight of the upper one: three `(length,)`.
    """
    # on the CPU, because not every device has float64
    centres = torch.arange(length, dtype=torch.float64) + 0.5
    position = (centres * (working_length / length) / patch_size - 0.5).clamp(0, patches - 1)
    lower = position.floor().long()
    upper, weight = (lower + 1).clamp(max=patches - 1), (position - lower).float()
    return lower.to(device), upper.to(device), weight.to(device)


def upsampled_tiles(
    logits: DenseLogits,
    names: int,
    patch_size: int,
    working_size: tuple[int, int],
    output_size: tuple[int, int],
    device: torch.device,
    working_bytes: int,
) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """
    Bilinear upsampling tile by tile: where each lies in the image (rows, columns) and its logits `(rows, columns, names)`.

    Neither a tile nor the logits of the patch rows that it is read from take more than `working_bytes`, but for an image
    of so many names that not even two patch rows or one pixel fit. A tile may be changed in place.
    """
    height, width = output_size
    grid_h, grid_w = (-(-side // patch_size) for side in working_size)
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
        # (names, rows, w) -> (rows, w, names): names side by side in memory
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
    barred: torch.Tensor | None = None,
) -> LabelMap:
    """
    Bilinear upsampling, softmax over names, maximum over the names of a class, best class, tile by tile.

    The best class is the class of the best name and its probability `exp(its logit - best) / sum(exp(logits - best))`, so
    nothing of the size names × image is ever held.

    Args:
        logits (`torch.Tensor` of shape `(names, h, w)`, or a function `(first, last) -> (names, last - first, w)`):
            Of one image, on the patch grid; a function gives some of its rows, where all together would be large. Its
            tensors lie on the device of `name_to_class`.
        name_to_class (`torch.Tensor` of shape `(names,)`): class of every name.
        patch_size (`int`): side of a patch in pixels of the working image.
        working_size (`tuple[int, int]`): height and width the model saw, before its own padding.
        output_size (`tuple[int, int]`): height and width of the image; masks come out in this size.
        working_bytes (`int`, *optional*, defaults to 64 MiB):
            Bound on a tile's largest buffer. Four to five live at once, beside the 8 bytes per pixel of the result.
        barred (`torch.Tensor` of shape `(classes,)`, *optional*):
            Classes (bool, not all of them) that no pixel is given to. Their names keep their share of the softmax.

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
    barred_names = None if barred is None else barred.to(device).index_select(0, name_to_class)
    for place, pixels in upsampled_tiles(logits, len(name_to_class), *where):
        best, name = pixels.max(-1)
        chosen = best
        if barred_names is not None:
            chosen, name = pixels.masked_fill(barred_names, -torch.inf).max(-1)
        labels[place] = name_to_class[name]
        probabilities[place] = (chosen - best).exp_() / pixels.sub_(best[..., None]).exp_().sum(-1)
    return LabelMap(labels, probabilities)


def names_by_rank(name_to_class: torch.Tensor, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The classes that have a first, a second, ... name, and those names."""
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
    The probability of every class at every pixel, or of the `top_k` best: the softmax over all names, the largest of the
    class's names. They sum to 1 where every class has one name, to less elsewhere.

    Arguments as in [`decide`].

    Returns:
        Classes and their probabilities: `(classes,)` int32 and `(classes, height, width)` float32; with `top_k` both
        `(top_k, height, width)`, the best first.

    Raises:
        ValueError: the result would take more than 1 GiB, and see [`decide`].
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
