"""Mean intersection over union, of areas and of boundaries, as `evaluate.Metric`s in the memory of their counts."""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Python looks for modules beside a script first, where training/evaluate.py hides the package `evaluate`
sys.path.sort(key=lambda path: (Path(path) / "evaluate.py").is_file())

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from datasets import Sequence as SequenceFeature
from scipy import ndimage


class LabelMapMetric(evaluate.Metric, ABC):
    """
    What the metrics of this module share: label maps in, integer counts, results out.

    `add`, `add_batch` and `compute` are those of every metric of evaluate, `evaluate.combine` included. What differs:
    nothing is looked up on the hub, nothing is written to disk, and the memory is one array of counts. Evaluate itself
    would write every label map to an Arrow file, pixel by pixel, and read them all back to compute.

    Source: `EvaluationModule` of evaluate.

    Args:
        num_labels (`int`): classes; labels are 0 to `num_labels - 1`.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of reference pixels that do not count, whatever is predicted there. `None` counts them all.
        kwargs: passed on to `evaluate.Metric`, e.g. `experiment_id`.

    Raises:
        ValueError: `num_labels` below 1, or `num_process` above 1 (sum the counts with `merge`).
    """

    module_name: str  # evaluate would derive "mean_io_u" from the class
    description: str
    counts: np.ndarray

    def __init__(self, num_labels: int, ignore_index: int | None = 255, **kwargs: Any):
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels} must be at least 1: the number of classes.")
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                "This metric shares no files between processes. Leave `num_process` out, sum `counts` over the "
                "processes (`accelerator.reduce`, say) and `merge` the sum into a fresh metric."
            )
        super().__init__(**kwargs)
        self.info.module_name = self.module_name
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.reset()

    @abstractmethod
    def count(self, predicted: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """What one image adds to `counts`; two label maps of one shape, int64."""

    @abstractmethod
    def results(self, counts: np.ndarray) -> dict[str, Any]:
        """What `compute` returns for these counts."""

    @abstractmethod
    def empty_counts(self) -> np.ndarray:
        """Counts of nothing, int64."""

    def _info(self) -> evaluate.MetricInfo:
        label_map = SequenceFeature(SequenceFeature(Value("int64")))
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=(
                "\npredictions, references: lists of integer label maps `(height, width)`, pairwise of one size; "
                "arrays, tensors, PIL images or nested lists."
            ),
            features=Features({"predictions": label_map, "references": label_map}),
        )

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # nothing is ever written, so no folder is made

    def __len__(self) -> int:
        """How many label maps were added since the last `compute`."""
        return self._count

    def reset(self) -> None:
        """Forget all that was added."""
        self.counts = self.empty_counts()
        self._count = 0

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """
        Count the pixels of one label map. `references` is taken for `reference`, as in examples of evaluate.

        Args:
            prediction: integer label map `(height, width)`; array, tensor, PIL image or nested list.
            reference: the right labels, same shape.

        Raises:
            ValueError: unequal shapes, numbers that are not integers, or a label out of range.
        """
        prediction = kwargs.pop("predictions", prediction)
        reference = kwargs.pop("references", reference)
        self._check_inputs(kwargs, prediction, reference)
        predicted, wanted = _labels(prediction, "prediction"), _labels(reference, "reference")
        if predicted.shape != wanted.shape:
            raise ValueError(
                f"A prediction of shape {predicted.shape} does not fit its reference of shape {wanted.shape}. "
                "Both are label maps (height, width): take the argmax of logits over the classes and bring it to "
                "the reference's size."
            )
        counted = np.ones_like(wanted, bool) if self.ignore_index is None else wanted != self.ignore_index
        for name, labels in (("reference", wanted), ("prediction", predicted)):
            wrong = np.unique(labels[counted & ((labels < 0) | (labels >= self.num_labels))])
            if wrong.size:
                raise ValueError(
                    f"A {name} holds the labels {wrong[:10].tolist()}, but with num_labels={self.num_labels} they "
                    f"are 0 to {self.num_labels - 1}; reference pixels of {self.ignore_index} (`ignore_index`) do "
                    "not count. Correct the labels or these two options."
                )
        self.counts += self.count(predicted, wanted)
        self._count += 1

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """
        Count the pixels of a batch of label maps; the sizes may differ from image to image.

        Args:
            predictions: list of integer label maps `(height, width)`, or one array `(batch, height, width)`.
            references: the right labels, pairwise of the same shape.

        Raises:
            ValueError: unequal numbers, and see `add`. Nothing of the maps before the wrong one is taken back.
        """
        self._check_inputs(kwargs, predictions, references)
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} predictions but {len(references)} references. Pass one of each per "
                "image."
            )
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def merge(self, counts: np.ndarray | torch.Tensor | Sequence[Sequence[int]]) -> None:
        """
        Add the counts of another metric of the same classes: of another process or of an earlier run.

        Args:
            counts: its `counts`, same shape.

        Raises:
            ValueError: another shape, or anything but counts.
        """
        counts = _labels(counts, "metric's counts")
        if counts.shape != self.counts.shape or (counts < 0).any():
            raise ValueError(
                f"Expected the counts of a metric with num_labels={self.num_labels}: whole numbers of shape "
                f"{self.counts.shape}, got {counts.shape}."
            )
        self.counts += counts

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """
        Results over all pixels added, and these last ones if given; then start afresh.

        Args:
            predictions, references: optional last batch, see `add_batch`.

        Returns:
            `dict`, see the class.

        Raises:
            ValueError: nothing was added, and see `add_batch`.
        """
        if predictions is not None or references is not None or kwargs:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        counts = self.counts
        if not self._count and not counts.any():
            raise ValueError("There is nothing to compute. Call `add`, `add_batch` or `merge` first.")
        self.reset()
        return self.results(counts)

    def _check_inputs(self, others: dict[str, Any], predictions: Any, references: Any) -> None:
        if others:
            raise ValueError(
                f"Unknown inputs {sorted(others)}; only predictions and references are compared. `num_labels` and "
                f"`ignore_index` are given once, when the metric is made: {type(self).__name__}(num_labels=…, "
                "ignore_index=255)."
            )
        if predictions is None or references is None:
            raise ValueError("Predictions and references are both needed: label maps, pairwise of one size.")


class MeanIoU(LabelMapMetric):
    """
    Mean intersection over union, accuracies, and both per class, from a streaming confusion matrix.

    Results have the names of `evaluate.load("mean_iou")`; arguments, memory and errors are those of
    [`LabelMapMetric`]. `compute` returns

    - **mean_iou** (`float`): mean of `per_category_iou` over the classes that are not NaN.
    - **per_category_iou** (`np.ndarray` `(num_labels,)`): correct pixels over those predicted or labelled so; NaN
      for classes that are neither predicted nor labelled.
    - **mean_accuracy** (`float`): mean of `per_category_accuracy` over the classes that are not NaN.
    - **per_category_accuracy** (`np.ndarray` `(num_labels,)`): correct pixels over those labelled so; NaN for
      classes that are not labelled.
    - **overall_accuracy** (`float`): correct pixels over all that count.

    Source: the metric `mean_iou` of evaluate.

    Attributes:
        counts, confusion_matrix: `[r, p]` counts the pixels of class `r` predicted as `p`; `(num_labels, num_labels)`.

    Example:

    ```python
    >>> import numpy as np
    >>> from spar_hf.evaluation.metrics import MeanIoU

    >>> metric = MeanIoU(num_labels=3)
    >>> metric.add_batch(predictions=[np.array([[0, 1], [1, 1]])], references=[np.array([[0, 0], [1, 255]])])
    >>> results = metric.compute()
    >>> results["mean_iou"], results["overall_accuracy"]
    (0.5, 0.6666666666666666)
    >>> results["per_category_iou"]
    array([0.5, 0.5, nan])
    ```"""

    module_name = "mean_iou"
    description = "Mean intersection over union of label maps."

    @property
    def confusion_matrix(self) -> np.ndarray:
        return self.counts

    def empty_counts(self) -> np.ndarray:
        return np.zeros((self.num_labels, self.num_labels), dtype=np.int64)

    def count(self, predicted: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        if self.ignore_index is not None:
            counted = wanted != self.ignore_index
            predicted, wanted = predicted[counted], wanted[counted]
        pairs = np.bincount((wanted * self.num_labels + predicted).ravel(), minlength=self.num_labels**2)
        return pairs.reshape(self.num_labels, self.num_labels)

    def results(self, counts: np.ndarray) -> dict[str, Any]:
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


class BoundaryIoU(LabelMapMetric):
    """
    Intersection over union of the boundaries of classes: mIoU that sees outlines where large areas hide them.

    A pixel belongs to the boundary of its class if a pixel of another label, or the end of the image, lies at most `d`
    rows and `d` columns away; `d` is `dilation_ratio` of the image's diagonal, at least 1. Per class, the boundary pixels
    in both maps are divided by those in either, counted over all images. Pixels without a label lie in neither, and what is
    predicted there neither makes nor moves a boundary: they are one more label, in both maps.

    Arguments beside `dilation_ratio`, memory and errors are those of [`LabelMapMetric`]. `compute` returns

    - **mean_boundary_iou** (`float`): mean of `per_category_boundary_iou` over the classes that are not NaN.
    - **per_category_boundary_iou** (`np.ndarray` `(num_labels,)`): NaN for classes that occur in neither map.

    Source: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021 (arXiv
    2103.16562), section 4; its `mask_to_boundary` erodes `d` times by 3×3, which is the same pixels. Void is ours.

    Attributes:
        counts: boundary pixels in both maps, of the reference, of the prediction; `(3, num_labels)`.

    Args:
        num_labels, ignore_index, kwargs: see [`LabelMapMetric`].
        dilation_ratio (`float`, *optional*, defaults to 0.02): width of boundaries, in diagonals of the image. The paper
            takes 0.02 for COCO and 0.005 for Cityscapes' larger images, both about 15 pixels.

    Raises:
        ValueError: `dilation_ratio` is not above 0.

    Example:

    ```python
    >>> import numpy as np
    >>> from spar_hf.evaluation.metrics import BoundaryIoU

    >>> reference = np.zeros((20, 20), int)
    >>> reference[5:15, 5:15] = 1
    >>> metric = BoundaryIoU(num_labels=2)
    >>> metric.add(prediction=np.roll(reference, 1, axis=0), reference=reference)
    >>> metric.compute()["per_category_boundary_iou"].round(2)
    array([0.69, 0.33])
    ```"""

    module_name = "boundary_iou"
    description = "Intersection over union of the boundaries of classes in label maps."

    def __init__(self, num_labels: int, ignore_index: int | None = 255, dilation_ratio: float = 0.02, **kwargs: Any):
        if not dilation_ratio > 0:
            raise ValueError(f"dilation_ratio={dilation_ratio} must be above 0: a share of the image's diagonal.")
        self.dilation_ratio = dilation_ratio
        super().__init__(num_labels, ignore_index, **kwargs)

    def empty_counts(self) -> np.ndarray:
        return np.zeros((3, self.num_labels), dtype=np.int64)

    def count(self, predicted: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        if wanted.ndim != 2:
            raise ValueError(f"Boundaries need label maps (height, width), got shape {wanted.shape}.")
        counted = np.ones_like(wanted, bool)
        if self.ignore_index is not None:
            counted = wanted != self.ignore_index
            # void may have the number of a class, and is none of them here
            predicted, wanted = (np.where(counted, labels, self.num_labels) for labels in (predicted, wanted))
        distance = max(1, round(self.dilation_ratio * math.hypot(*wanted.shape)))
        of_reference, of_prediction = (counted & near_another_label(labels, distance) for labels in (wanted, predicted))
        both = of_reference & of_prediction & (wanted == predicted)
        return np.stack(
            [np.bincount(wanted[where], minlength=self.num_labels) for where in (both, of_reference)]
            + [np.bincount(predicted[of_prediction], minlength=self.num_labels)]
        )

    def results(self, counts: np.ndarray) -> dict[str, Any]:
        both, of_reference, of_prediction = counts
        iou = _divide(both, of_reference + of_prediction - both)
        return {"mean_boundary_iou": mean_of_present(iou), "per_category_boundary_iou": iou}


def near_another_label(labels: np.ndarray, distance: int) -> np.ndarray:
    """
    Whether the square of `distance` pixels around a pixel holds another label or leaves the map: `(height, width)` bool.

    All classes at once: where the smallest and the largest label in a square differ, so does some label from the centre's.
    """
    padded = np.pad(labels, 1, constant_values=labels.min() - 1)
    filters = (ndimage.minimum_filter, ndimage.maximum_filter)
    low, high = (fold(padded, size=2 * distance + 1, mode="nearest") for fold in filters)
    return (low != high)[1:-1, 1:-1]


def mean_of_present(values: np.ndarray) -> float:
    """Mean without NaN entries; NaN if there are no others."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


def _divide(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # 0 / 0 is meant to be NaN
        return counts / totals


def _labels(values: Any, name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype.kind not in "iub":
        raise ValueError(
            f"A {name} holds integers, but this one is of type {array.dtype}. Take the argmax of scores first."
        )
    return array.astype(np.int64)


__all__ = ["BoundaryIoU", "LabelMapMetric", "MeanIoU", "mean_of_present"]
