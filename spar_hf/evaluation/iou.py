"""
Intersection over union of areas and of boundaries, from integer counts.

An image is counted by a function, counts of images are added, and scores are computed from the sum. Counts are integers, so
the sum is the same in every order and over any number of processes. [`metrics`] wraps these functions for `evaluate`.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from spar_hf.data.segmentation_sets import IGNORE_INDEX


def to_integers(values: Any, name: str) -> np.ndarray:
    """
    An array, tensor, image or nested list of integers as int64.

    Raises:
        ValueError: the values are not integers; the message calls them `name`.
    """
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype.kind not in "iub":
        raise ValueError(
            f"A {name} holds integers, but this one is of type {array.dtype}. Take the argmax of scores first."
        )
    return array.astype(np.int64)


def to_label_maps(
    prediction: Any, reference: Any, num_labels: int, ignore_index: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """
    Check a predicted and a reference label map, and convert them to int64.

    Raises:
        ValueError: the shapes differ, values are not integers, or a label is out of range at a pixel that is not ignored.
    """
    predicted, labelled = to_integers(prediction, "prediction"), to_integers(reference, "reference")
    if predicted.shape != labelled.shape:
        raise ValueError(
            f"A prediction of shape {predicted.shape} does not fit its reference of shape {labelled.shape}. Both are label "
            "maps (height, width): take the argmax of logits over the classes, at the size of the reference."
        )
    counted = np.ones_like(labelled, bool) if ignore_index is None else labelled != ignore_index
    for name, labels in (("reference", labelled), ("prediction", predicted)):
        wrong = np.unique(labels[counted & ((labels < 0) | (labels >= num_labels))])
        if wrong.size:
            raise ValueError(
                f"A {name} holds the labels {wrong[:10].tolist()}, but with num_labels={num_labels} they are 0 to "
                f"{num_labels - 1}. Reference pixels of {ignore_index} (`ignore_index`) are ignored. Correct the labels or "
                "these two options."
            )
    return predicted, labelled


def count_pixels(
    prediction: Any, reference: Any, num_labels: int, ignore_index: int | None = IGNORE_INDEX
) -> np.ndarray:
    """
    Confusion matrix of one image.

    Args:
        prediction: integer label map `(height, width)`: array, tensor, PIL image or nested list.
        reference: the correct labels, same shape.
        num_labels: number of classes; labels are 0 to `num_labels - 1`.
        ignore_index: label of reference pixels that are not counted, whatever is predicted there; `None` counts all.

    Returns:
        `(num_labels, num_labels)` int64; `[r, p]` is the number of pixels of class `r` that were predicted as `p`.

    Raises:
        ValueError: see [`to_label_maps`].

    Example:

    ```python
    >>> counts = count_pixels([[0, 1], [1, 1]], [[0, 0], [1, 255]], num_labels=2)
    >>> counts.tolist(), area_scores(counts)["mean_iou"]
    ([[1, 1], [0, 1]], 0.5)
    ```"""
    predicted, labelled = to_label_maps(prediction, reference, num_labels, ignore_index)
    if ignore_index is not None:
        counted = labelled != ignore_index
        predicted, labelled = predicted[counted], labelled[counted]
    pairs = np.bincount((labelled * num_labels + predicted).ravel(), minlength=num_labels**2)
    return pairs.reshape(num_labels, num_labels)


def area_scores(counts: np.ndarray) -> dict[str, Any]:
    """
    Scores from a sum of [`count_pixels`], under the names of `evaluate.load("mean_iou")`.

    Returns:
        - **mean_iou** (`float`): mean of `per_category_iou` over the classes that are not NaN.
        - **per_category_iou** (`np.ndarray` `(num_labels,)`): correct pixels over those predicted or labelled; NaN for
          classes that are neither predicted nor labelled.
        - **mean_accuracy** (`float`): mean of `per_category_accuracy` over the classes that are not NaN.
        - **per_category_accuracy** (`np.ndarray` `(num_labels,)`): correct pixels over labelled pixels; NaN for classes that
          are not labelled.
        - **overall_accuracy** (`float`): correct pixels over all counted pixels.
    """
    correct, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = _divide(correct, labelled + predicted - correct)
    accuracy = _divide(correct, labelled)
    return {
        "mean_iou": mean_of_present(iou),
        "mean_accuracy": mean_of_present(accuracy),
        "overall_accuracy": float(_divide(correct.sum(), labelled.sum())),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def count_boundaries(
    prediction: Any,
    reference: Any,
    num_labels: int,
    ignore_index: int | None = IGNORE_INDEX,
    dilation_ratio: float = 0.02,
) -> np.ndarray:
    """
    Boundary pixels of one image, for boundary IoU.

    A pixel belongs to the boundary of its class if another label, or the border of the image, lies at most `d` rows and `d`
    columns away; `d` is `dilation_ratio` times the image diagonal, at least 1. Ignored pixels belong to no boundary. They
    are one more label in both maps, so predictions there neither make nor move a boundary.

    Source: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021 (arXiv
    2103.16562), section 4, whose `mask_to_boundary` gives the same pixels by `d` erosions. The treatment of ignored pixels
    is ours.

    Args:
        prediction, reference, num_labels, ignore_index: see [`count_pixels`].
        dilation_ratio: the paper takes 0.02 for COCO and 0.005 for the larger images of Cityscapes, both about 15 pixels.

    Returns:
        `(3, num_labels)` int64: boundary pixels of every class in both maps, in the reference, in the prediction.

    Raises:
        ValueError: the maps do not have two axes, `dilation_ratio` is not above 0, or see [`to_label_maps`].

    Example:

    ```python
    >>> reference = np.zeros((20, 20), int)
    >>> reference[5:15, 5:15] = 1
    >>> counts = count_boundaries(np.roll(reference, 1, axis=0), reference, num_labels=2)
    >>> boundary_scores(counts)["per_category_boundary_iou"].round(2)
    array([0.69, 0.33])
    ```"""
    check_dilation_ratio(dilation_ratio)
    predicted, labelled = to_label_maps(prediction, reference, num_labels, ignore_index)
    if labelled.ndim != 2:
        raise ValueError(f"Boundaries need label maps (height, width), got shape {labelled.shape}.")
    counted = np.ones_like(labelled, bool)
    if ignore_index is not None:
        counted = labelled != ignore_index
        # `ignore_index` may be the number of a class, so ignored pixels get a label that no class has
        predicted, labelled = (np.where(counted, labels, num_labels) for labels in (predicted, labelled))
    distance = max(1, round(dilation_ratio * math.hypot(*labelled.shape)))
    in_reference, in_prediction = (counted & near_another_label(labels, distance) for labels in (labelled, predicted))
    in_both = in_reference & in_prediction & (labelled == predicted)
    parts = ((labelled, in_both), (labelled, in_reference), (predicted, in_prediction))
    return np.stack([np.bincount(labels[pixels], minlength=num_labels) for labels, pixels in parts])


def check_dilation_ratio(dilation_ratio: float) -> None:
    """
    Raises:
        ValueError: `dilation_ratio` is not above 0.
    """
    if not dilation_ratio > 0:
        raise ValueError(f"dilation_ratio={dilation_ratio} must be above 0: it is a share of the image diagonal.")


def boundary_scores(counts: np.ndarray) -> dict[str, Any]:
    """
    Scores from a sum of [`count_boundaries`].

    Returns:
        - **mean_boundary_iou** (`float`): mean of `per_category_boundary_iou` over the classes that are not NaN.
        - **per_category_boundary_iou** (`np.ndarray` `(num_labels,)`): boundary pixels in both maps over those in either;
          NaN for classes that are in neither.
    """
    both, in_reference, in_prediction = counts
    iou = _divide(both, in_reference + in_prediction - both)
    return {"mean_boundary_iou": mean_of_present(iou), "per_category_boundary_iou": iou}


def near_another_label(labels: np.ndarray, distance: int) -> np.ndarray:
    """
    Whether the square of `distance` pixels around a pixel holds another label or leaves the map: `(height, width)` bool.

    It holds one exactly where the smallest and the largest label in the square differ, which covers all classes at once.
    """
    padded = np.pad(labels, 1, constant_values=labels.min() - 1)
    filters = (ndimage.minimum_filter, ndimage.maximum_filter)
    low, high = (extreme(padded, size=2 * distance + 1, mode="nearest") for extreme in filters)
    return (low != high)[1:-1, 1:-1]


def mean_of_present(values: np.ndarray) -> float:
    """
    Mean of the entries that are not NaN; NaN if there are none.

    Example:

    ```python
    >>> mean_of_present(np.array([0.25, np.nan, 0.75]))
    0.5
    ```"""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


def _divide(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """The quotient, NaN for 0 / 0."""
    with np.errstate(invalid="ignore"):
        return counts / totals
