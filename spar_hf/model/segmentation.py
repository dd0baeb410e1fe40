"""From logits on the patch grid to a class for every pixel of the image, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .decisions import ClassMaxima, Rule, decide_rows, pays, tile_decider
from .results import check_dense_size, check_output_size, check_shares
from .upsampling import (
    WORKING_BYTES,
    Axes,
    DenseLogits,
    bilinear_cells,
    check_grid,
    patch_coordinates,
    upsampled_tiles,
)


@dataclass
class LabelMap:
    """
    The decision for every pixel of an image.

    Attributes:
        labels: class per pixel `(height, width)`, int32.
        probabilities: probability of that class `(height, width)`, float32, in the softmax over classes. See [`decide`].
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


@torch.no_grad()
def decide(
    logits: DenseLogits,
    name_to_class: torch.Tensor,
    patch_size: int,
    working_size: tuple[int, int],
    output_size: tuple[int, int],
    working_bytes: int = WORKING_BYTES,
    excluded: torch.Tensor | None = None,
    scores: str = "classes",
) -> LabelMap:
    """
    The class of every pixel: bilinear upsampling, the largest logit of each class's names, softmax over classes, best class.
    Of equal logits, that of the first name wins.

    A name that wins nowhere changes nothing, so synonyms can be added freely. It works tile by tile, so nothing of the size
    names × height × width is in memory. From 64 names on, on a CPU, only names that can win are upsampled
    (`spar_hf.model.decisions`): labels are the same, and probabilities are off by at most 0.001.

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
            True for classes that get no pixel (not all of them). They keep their share of the softmax.
        scores (`str`, *optional*, defaults to `"classes"`):
            `"names"` gives the probability of the best name in the softmax over all names, as published (SPAR, section 3).
            Then synonyms take probability from each other. Labels are the same.

    Returns:
        [`LabelMap`] on the device of `logits`.

    Raises:
        ValueError: the grid of `logits` is not that of `working_size`, or `scores` is neither of the two.

    Example:

    ```python
    >>> logits = torch.tensor([1.0, 3.0, 2.0])[:, None, None]  # three names on one patch
    >>> decide(logits, torch.tensor([0, 1, 1]), 16, (16, 16), (1, 1)).probabilities  # of classes 1 and 3
    tensor([[0.8808]])
    >>> decide(logits, torch.tensor([0, 1, 1]), 16, (16, 16), (1, 1), scores="names").probabilities
    tensor([[0.6652]])
    ```"""
    check_grid(logits, patch_size, working_size)
    if scores not in ("classes", "names"):
        raise ValueError(f"Unknown scores {scores!r}; use 'classes' or 'names'.")
    device = logits.device if isinstance(logits, torch.Tensor) else name_to_class.device
    classes = name_to_class.to(device).int()
    maxima = ClassMaxima.of(classes) if scores == "classes" else ClassMaxima(None)
    rule = Rule(maxima, classes, None if excluded is None else excluded.to(device).index_select(0, classes))
    axes = Axes.of(patch_size, working_size, output_size, device)
    labels, probabilities = _best_classes(logits, rule, axes, working_bytes)
    return LabelMap(labels[0], probabilities[0])


def _best_classes(logits: DenseLogits, rule: Rule, axes: Axes, working_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best classes of every pixel and their probabilities: int32 and float32 `(rule.top, height, width)`."""
    names, device = len(rule.classes), rule.classes.device
    size = (len(axes.rows[0]), len(axes.columns[0]))
    labels = torch.empty(rule.top, *size, dtype=torch.int32, device=device)
    probabilities = torch.empty(rule.top, *size, device=device)
    few = pays(names, axes, device, working_bytes)
    decide_tile = tile_decider(names, size[0] * size[1], device)
    for start, end, first, grid in axes.bands(logits, names, working_bytes):
        if few:
            for rows, above, below in axes.cell_rows(start, end, working_bytes):
                down = axes.rows[2][rows]
                found = decide_rows(grid[above - first], grid[below - first], down, axes.columns, rule, working_bytes)
                labels[:, rows], probabilities[:, rows] = rule.classes[found[0]], found[1]
            continue
        for (rows, columns), part in axes.parts(grid, start, end, first, names, working_bytes):
            found = decide_tile(rule, *part)
            labels[:, rows, columns], probabilities[:, rows, columns] = rule.classes[found[0]], found[1]
    return labels, probabilities


@torch.no_grad()
def class_probabilities(
    logits: DenseLogits,
    name_to_class: torch.Tensor,
    patch_size: int,
    working_size: tuple[int, int],
    output_size: tuple[int, int],
    top_k: int | None = None,
    working_bytes: int = WORKING_BYTES,
    classes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The probability of every class, or of the `top_k` best, at every pixel: the softmax over classes of the largest logit of
    their names. The probabilities of all classes sum to 1; a class without names has 0.

    Arguments as in [`decide`], which also says what is exact: the first of the `top_k` classes is the one it chooses. They
    need no more memory than their result and the buffers of [`decide`].

    `classes` is how many there are, with those that have no names; by default up to the last one that has.

    Returns:
        Classes and their probabilities: `(classes,)` int32 and `(classes, height, width)` float32; with `top_k` both
        `(top_k, height, width)`, the best first.

    Raises:
        ValueError: the result would take more than 1 GiB; or as [`decide`].
    """
    check_grid(logits, patch_size, working_size)
    device = logits.device if isinstance(logits, torch.Tensor) else name_to_class.device
    name_to_class = name_to_class.to(device).long()
    classes = int(name_to_class.max()) + 1 if classes is None else classes
    kept = classes if top_k is None else min(top_k, classes)
    size = kept * output_size[0] * output_size[1] * (4 if top_k is None else 8)
    instead = 'output="map" (8 bytes per pixel), fewer classes, or a smaller image'
    check_dense_size(f"Probabilities of {kept} classes", size, output_size, instead)
    maxima, named = ClassMaxima.of(name_to_class), name_to_class.unique()
    if top_k is not None:
        rule = Rule(maxima, name_to_class.int(), top=min(kept, len(named)))
        axes = Axes.of(patch_size, working_size, output_size, device)
        found, probabilities = _best_classes(logits, rule, axes, working_bytes)
        if rule.top < kept:  # classes without names follow
            rest = torch.ones(classes, dtype=torch.bool, device=device).index_fill_(0, named, False).nonzero().int()
            rest = rest[: kept - rule.top, :, None].expand(-1, *output_size)
            found = torch.cat([found, rest])
            probabilities = torch.cat([probabilities, probabilities.new_zeros(rest.shape)])
        return found, probabilities
    probabilities = torch.zeros(classes, *output_size, device=device)
    where = (patch_size, working_size, output_size, device, working_bytes)
    for (rows, columns), pixels in upsampled_tiles(logits, len(name_to_class), *where):
        probabilities[named, rows, columns] = maxima(pixels).softmax(-1).permute(2, 0, 1)
    return torch.arange(classes, dtype=torch.int32, device=device), probabilities


__all__ = [
    "WORKING_BYTES",
    "DenseLogits",
    "LabelMap",
    "bilinear_cells",
    "check_grid",
    "check_output_size",
    "check_shares",
    "class_probabilities",
    "decide",
    "give_to_background",
    "patch_coordinates",
    "upsampled_tiles",
]
