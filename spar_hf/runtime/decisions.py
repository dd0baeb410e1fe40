"""The decision for every pixel in NumPy, by the rule of `spar_hf.model.segmentation`, for graphs that end before it."""

import numpy as np

STRIP_VALUES = 2**22  # logits that are upsampled at once: 16 MiB


def patch_coordinates(length: int, working_length: int, patch_size: int, patches: int) -> tuple[np.ndarray, ...]:
    """The two patches that each pixel of an axis lies between and the weight of the second, three `(length,)`."""
    centres = np.arange(length) + 0.5
    position = (centres * (working_length / length) / patch_size - 0.5).clip(0, patches - 1)
    lower = np.floor(position).astype(np.int64)
    return lower, (lower + 1).clip(max=patches - 1), (position - lower).astype(np.float32)


def decide(
    logits: np.ndarray, class_of_name: np.ndarray, patch_size: int, working_size: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """
    The class of every pixel and its probability, in strips of rows.

    Args:
        logits: `(names, rows, columns)` on the patch grid.
        class_of_name: class of every name, ascending from 0 without gaps.
        patch_size, working_size, size: side of a patch, size of the image the model saw, size of the label map.

    Returns:
        Labels int32 and probabilities float32, `(height, width)` each.
    """
    _, rows, columns = logits.shape
    above, below, down = patch_coordinates(size[0], working_size[0], patch_size, rows)
    left, right, across = patch_coordinates(size[1], working_size[1], patch_size, columns)
    starts = np.flatnonzero(np.diff(class_of_name, prepend=-1))
    labels, probabilities = np.empty(size, np.int32), np.empty(size, np.float32)
    step = max(1, STRIP_VALUES // (len(logits) * size[1]))
    for start in range(0, size[0], step):
        part = slice(start, start + step)
        strip = logits[:, above[part]] + (logits[:, below[part]] - logits[:, above[part]]) * down[part, None]
        strip = strip[..., left] + (strip[..., right] - strip[..., left]) * across
        best = np.maximum.reduceat(strip, starts, axis=0) if len(starts) < len(strip) else strip  # per class
        labels[part] = best.argmax(0)
        probabilities[part] = 1 / np.exp(best - best.max(0)).sum(0)
    return labels, probabilities


def give_to_background(
    labels: np.ndarray, probabilities: np.ndarray, background: int, threshold: float, min_area: float
) -> None:
    """As `spar_hf.model.segmentation.give_to_background`: move unsure pixels, then tiny classes to it, in place."""
    unsure = (probabilities < threshold) & (labels != background)
    labels[unsure] = background
    probabilities[unsure] = 1 - probabilities[unsure]
    counts = np.bincount(labels.ravel(), minlength=background + 1)
    counts[background] = 0
    small = (counts > 0) & (counts < np.float32(min_area) * np.float32(counts.sum()))
    if small.any():
        given = small[labels]
        labels[given] = background
        probabilities[given] = 1 - probabilities[given]


def class_scores(labels: np.ndarray, probabilities: np.ndarray, classes: int) -> tuple[np.ndarray, list[float]]:
    """Pixels of every class, and the mean probability over them, 0 where there are none."""
    pixels = np.bincount(labels.ravel(), minlength=classes)
    total = np.bincount(labels.ravel(), weights=probabilities.ravel(), minlength=classes)
    return pixels, (total / pixels.clip(min=1)).astype(np.float32).tolist()
