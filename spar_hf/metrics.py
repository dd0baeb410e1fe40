"""Mean intersection over union as an `evaluate.Metric`, in the memory of one confusion matrix."""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from datasets import Sequence as SequenceFeature


class MeanIoU(evaluate.Metric):
    """
    Mean intersection over union, accuracies, and both per class, from a streaming confusion matrix.

    `add`, `add_batch` and `compute` are those of every metric of evaluate, `evaluate.combine` included, and the
    results have the names of `evaluate.load("mean_iou")`. What differs: nothing is looked up on the hub, nothing
    is written to disk, and the memory is one matrix of `num_labels × num_labels` counts. Evaluate itself would
    write every label map to an Arrow file, pixel by pixel, and read them all back to compute; the counts are all
    that is needed of them.

    Source: `EvaluationModule` and the metric `mean_iou` of evaluate.

    Attributes:
        confusion_matrix: `[r, p]` counts the pixels of class `r` predicted as `p`; `(num_labels, num_labels)` int64.

    Args:
        num_labels (`int`): classes; labels are 0 to `num_labels - 1`.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of reference pixels that do not count, whatever is predicted there. `None` counts them all.
        kwargs: passed on to `evaluate.Metric`, e.g. `experiment_id`.

    Raises:
        ValueError: `num_labels` below 1, or `num_process` above 1 (sum the matrices with `merge`).

    Example:

    ```python
    >>> import numpy as np
    >>> from spar_hf.metrics import MeanIoU

    >>> metric = MeanIoU(num_labels=3)
    >>> metric.add_batch(predictions=[np.array([[0, 1], [1, 1]])], references=[np.array([[0, 0], [1, 255]])])
    >>> results = metric.compute()
    >>> results["mean_iou"], results["overall_accuracy"]
    (0.5, 0.6666666666666666)
    >>> results["per_category_iou"]
    array([0.5, 0.5, nan])
    ```"""

    def __init__(self, num_labels: int, ignore_index: int | None = 255, **kwargs: Any):
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels} must be at least 1: the number of classes.")
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                "This metric shares no files between processes. Leave `num_process` out, sum `confusion_matrix` "
                "over the processes (`accelerator.reduce`, say) and `merge` the sum into a fresh metric."
            )
        super().__init__(**kwargs)
        self.info.module_name = "mean_iou"  # evaluate derives "mean_io_u" from the class
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.reset()

    def _info(self) -> evaluate.MetricInfo:
        label_map = SequenceFeature(SequenceFeature(Value("int64")))
        return evaluate.MetricInfo(
            description="Mean intersection over union of label maps.",
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
        self.confusion_matrix = np.zeros((self.num_labels, self.num_labels), dtype=np.int64)
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
        predicted, wanted = predicted.ravel(), wanted.ravel()
        if self.ignore_index is not None:
            counted = wanted != self.ignore_index
            predicted, wanted = predicted[counted], wanted[counted]
        for name, labels in (("reference", wanted), ("prediction", predicted)):
            wrong = np.unique(labels[(labels < 0) | (labels >= self.num_labels)])
            if wrong.size:
                raise ValueError(
                    f"A {name} holds the labels {wrong[:10].tolist()}, but with num_labels={self.num_labels} they "
                    f"are 0 to {self.num_labels - 1}; reference pixels of {self.ignore_index} (`ignore_index`) do "
                    "not count. Correct the labels or these two options."
                )
        pairs = np.bincount(wanted * self.num_labels + predicted, minlength=self.num_labels**2)
        self.confusion_matrix += pairs.reshape(self.num_labels, self.num_labels)
        self._count += 1

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """
        Count the pixels of a batch of label maps; the sizes may differ from photo to photo.

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
                "photo."
            )
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def merge(self, confusion_matrix: np.ndarray | torch.Tensor | Sequence[Sequence[int]]) -> None:
        """
        Add the counts of another metric of the same classes: of another process or of an earlier run.

        Args:
            confusion_matrix: its `confusion_matrix`, `(num_labels, num_labels)`.

        Raises:
            ValueError: another shape, or anything but counts.
        """
        counts = _labels(confusion_matrix, "confusion matrix")
        if counts.shape != self.confusion_matrix.shape or (counts < 0).any():
            raise ValueError(
                f"Expected the confusion matrix of a metric with num_labels={self.num_labels}: counts of shape "
                f"{self.confusion_matrix.shape}, got {counts.shape}."
            )
        self.confusion_matrix += counts

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """
        Results over all pixels added, and these last ones if given; then start afresh.

        Args:
            predictions, references: optional last batch, see `add_batch`.

        Returns:
            `dict` with

            - **mean_iou** (`float`): mean of `per_category_iou` over the classes that are not NaN.
            - **per_category_iou** (`np.ndarray` `(num_labels,)`): correct pixels over those predicted or labelled
              so; NaN for classes that are neither predicted nor labelled.
            - **mean_accuracy** (`float`): mean of `per_category_accuracy` over the classes that are not NaN.
            - **per_category_accuracy** (`np.ndarray` `(num_labels,)`): correct pixels over those labelled so; NaN
              for classes that are not labelled.
            - **overall_accuracy** (`float`): correct pixels over all that count.

        Raises:
            ValueError: nothing was added, and see `add_batch`.
        """
        if predictions is not None or references is not None or kwargs:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        matrix = self.confusion_matrix
        if not self._count and not matrix.any():
            raise ValueError("There is nothing to compute. Call `add`, `add_batch` or `merge` first.")
        self.reset()
        correct, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        iou = _divide(correct, labelled + predicted - correct)
        accuracy = _divide(correct, labelled)
        return {
            "mean_iou": mean_of_present(iou),
            "mean_accuracy": mean_of_present(accuracy),
            "overall_accuracy": float(_divide(correct.sum(), labelled.sum())),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }

    def _check_inputs(self, others: dict[str, Any], predictions: Any, references: Any) -> None:
        if others:
            raise ValueError(
                f"Unknown inputs {sorted(others)}; only predictions and references are compared. `num_labels` and "
                "`ignore_index` are given once, when the metric is made: MeanIoU(num_labels=…, ignore_index=255)."
            )
        if predictions is None or references is None:
            raise ValueError("Predictions and references are both needed: label maps, pairwise of one size.")


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


__all__ = ["MeanIoU", "mean_of_present"]
