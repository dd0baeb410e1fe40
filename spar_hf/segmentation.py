"""Logits on the patch grid -> one decision per pixel of the photo, in bounded memory."""

from dataclasses import dataclass

import torch

WORKING_BYTES = 64 * 2**20  # bound on the largest buffer of a tile; about four of them live at once


@dataclass
class LabelMap:
    """
    The decision for every pixel of a photo.

    Attributes:
        labels: class per pixel `(height, width)`, int32.
        probabilities: probability of that class `(height, width)`, float32: the softmax over all names, the largest of
            the class's names.
    """

    labels: torch.Tensor
    probabilities: torch.Tensor

    def class_scores(self, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels of every class and the mean probability over them (0 where there are none): two `(classes,)`."""
        flat = self.labels.flatten().long()
        pixels = torch.bincount(flat, minlength=num_classes)
        total = torch.bincount(flat, weights=self.probabilities.flatten().double(), minlength=num_classes)
        return pixels, (total / pixels.clamp(min=1)).float()


def give_to_background(decision: LabelMap, background: int, threshold: float = 0.0, min_area: float = 0.0) -> LabelMap:
    """
    Give unsure pixels and tiny classes to the background: first pixels whose probability is below `threshold`, then classes
    that cover less than `min_area` of the pixels that are not background (both rules of the published evaluation).

    A pixel given away gets one minus its former probability. Tensors are changed in place.

    Raises:
        ValueError: `threshold` or `min_area` is not in 0 to 1.
    """
    for name, value in (("threshold", threshold), ("min_area", min_area)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` is a share and must lie in 0 to 1, got {value}.")
    labels, probabilities = decision.labels, decision.probabilities
    given = (probabilities < threshold) & (labels != background)
    foreground = labels[~given & (labels != background)]
    pixels = torch.bincount(foreground.long(), minlength=background + 1)
    small = (pixels < min_area * pixels.sum()).nonzero().flatten()
    given |= torch.isin(labels, small.int()) & (labels != background)
    labels[given] = background
    probabilities[given] = 1 - probabilities[given]
    return decision


def patch_coordinates(
    length: int, working_length: float, patch_size: int, patches: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Where the pixel centres of a photo's axis lie between the patch centres of the working image.

    The model saw the photo resized to `working_length` pixels and padded at the end to `patches * patch_size`. A pixel
    centre `i + 0.5` of the photo is `(i + 0.5) * working_length / length` in the working image, and patch `j` has its
    centre at `(j + 0.5) * patch_size`. Reading the logits there is upsampling them `patch_size`-fold, cropping the
    padding and resizing to the photo, in one step.

    Returns:
        Lower patch, upper patch (both int64) and the weight of the upper one: three `(length,)`.
    """
    # on the CPU, because not every device has float64
    centres = torch.arange(length, dtype=torch.float64) + 0.5
    position = (centres * (working_length / length) / patch_size - 0.5).clamp(0, patches - 1)
    lower = position.floor().long()
    upper, weight = (lower + 1).clamp(max=patches - 1), (position - lower).float()
    return lower.to(device), upper.to(device), weight.to(device)


@torch.no_grad()
def decide(
    logits: torch.Tensor,
    name_to_class: torch.Tensor,
    patch_size: int,
    working_size: tuple[int, int],
    output_size: tuple[int, int],
    working_bytes: int = WORKING_BYTES,
) -> LabelMap:
    """
    Bilinear upsampling, softmax over names, maximum over the names of a class, best class, tile by tile of rows.

    The best class is the class of the best name and its probability `1 / sum(exp(logits - best))`, so nothing of the
    size names × photo is ever held.

    Args:
        logits (`torch.Tensor` of shape `(names, h, w)`): of one photo, on the patch grid.
        name_to_class (`torch.Tensor` of shape `(names,)`): class of every name.
        patch_size (`int`): side of a patch in pixels of the working image.
        working_size (`tuple[int, int]`): height and width the model saw, before its own padding.
        output_size (`tuple[int, int]`): height and width of the photo; masks come out in this size.
        working_bytes (`int`, *optional*, defaults to 64 MiB): bound on a tile's largest buffer.

    Returns:
        [`LabelMap`] on the device of `logits`.

    Raises:
        ValueError: the grid of `logits` is not that of `working_size`.
    """
    names, grid_h, grid_w = logits.shape
    expected = tuple(-(-side // patch_size) for side in working_size)
    if (grid_h, grid_w) != expected:
        raise ValueError(
            f"Logits on a {grid_h}×{grid_w} grid do not belong to a working image of {working_size[0]}×{working_size[1]}"
            f" pixels, which has {expected[0]}×{expected[1]} patches of {patch_size} pixels."
        )
    height, width = output_size
    device = logits.device
    # (names, h, w) -> (h, w, names): names side by side in memory
    logits = logits.float().permute(1, 2, 0).contiguous()
    name_to_class = name_to_class.to(device)
    top, bottom, down = patch_coordinates(height, working_size[0], patch_size, grid_h, device)
    left, right, across = patch_coordinates(width, working_size[1], patch_size, grid_w, device)
    labels = torch.empty(height, width, dtype=torch.int32, device=device)
    probabilities = torch.empty(height, width, device=device)
    tile = max(1, working_bytes // (4 * names * width))
    for start in range(0, height, tile):
        rows = slice(start, min(start + tile, height))
        first, last = int(top[rows][0]), int(bottom[rows][-1])
        # columns first, on the few patch rows under this tile: (patch rows, w, names) -> (patch rows, width, names)
        strip = logits[first : last + 1]
        strip = strip.index_select(1, left).lerp_(strip.index_select(1, right), across[:, None])
        # then rows: -> (tile, width, names)
        below = strip.index_select(0, bottom[rows] - first)
        pixels = strip.index_select(0, top[rows] - first).lerp_(below, down[rows, None, None])
        best, name = pixels.max(-1)
        labels[rows] = name_to_class[name].int()
        probabilities[rows] = pixels.sub_(best[..., None]).exp_().sum(-1).reciprocal()
    return LabelMap(labels, probabilities)
