"""Intersection over union of areas and of boundaries as `evaluate.Metric`s. The commands use [`iou`] directly."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from datasets import Sequence as SequenceFeature

from spar_hf.data.segmentation_sets import IGNORE_INDEX
from spar_hf.evaluation.iou import (
    area_scores,
    boundary_scores,
    check_dilation_ratio,
    count_boundaries,
    count_pixels,
    to_integers,
)


class LabelMapMetric(evaluate.Metric, ABC):
    """
    Base class of metrics of label maps, whose memory is one array of counts.

    `add`, `add_batch` and `compute` are those of every metric of evaluate, and `evaluate.combine` works. Unlike other
    metrics, it looks nothing up on the hub and writes nothing to disk: evaluate would write every label map to an Arrow
    file, pixel by pixel, and read them all back to compute.

    Source: `EvaluationModule` of evaluate.

    Args:
        num_labels (`int`): number of classes; labels are 0 to `num_labels - 1`.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of reference pixels that are not counted, whatever is predicted there. `None` counts all pixels.
        kwargs: passed on to `evaluate.Metric`, for example `experiment_id`.

    Raises:
        ValueError: `num_labels` is below 1, or `num_process` above 1 (sum the counts with `merge` instead).
    """

    module_name: str  # evaluate would derive "mean_io_u" from the class
    description: str
    counts: np.ndarray

    def __init__(self, num_labels: int, ignore_index: int | None = IGNORE_INDEX, **kwargs: Any):
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels} must be at least 1: the number of classes.")
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                "This metric shares no files between processes. Omit `num_process`, sum `counts` over the processes (for "
                "example by `accelerator.reduce`), and `merge` the sum into a new metric."
            )
        super().__init__(**kwargs)
        self.info.module_name = self.module_name
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.reset()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the counts."""

    @abstractmethod
    def count(self, prediction: Any, reference: Any) -> np.ndarray:
        """Counts of one image, int64."""

    @abstractmethod
    def results(self, counts: np.ndarray) -> dict[str, Any]:
        """Scores of counts, as `compute` returns them."""

    def _info(self) -> evaluate.MetricInfo:
        label_map = SequenceFeature(SequenceFeature(Value("int64")))
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=(
                "\npredictions, references: lists of integer label maps `(height, width)`, in pairs of equal size; "
                "arrays, tensors, PIL images or nested lists."
            ),
            features=Features({"predictions": label_map, "references": label_map}),
        )

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # nothing is written, so no folder is made

    def __len__(self) -> int:
        """Number of label maps added since the last `compute`."""
        return self._count

    def reset(self) -> None:
        """Forget everything that was added."""
        self.counts = np.zeros(self.shape, np.int64)
        self._count = 0

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """
        Count the pixels of one label map. `predictions` and `references` are accepted too, as in examples of evaluate.

        Args:
            prediction: integer label map `(height, width)`: array, tensor, PIL image or nested list.
            reference: the correct labels, same shape.

        Raises:
            ValueError: shapes differ, values are not integers, or a label is out of range.
        """
        prediction = kwargs.pop("predictions", prediction)
        reference = kwargs.pop("references", reference)
        self._check_inputs(kwargs, prediction, reference)
        self.counts = self.counts + self.count(prediction, reference)
        self._count += 1

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """
        Count the pixels of a batch of label maps, whose sizes may differ.

        Args:
            predictions: list of integer label maps `(height, width)`, or one array `(batch, height, width)`.
            references: the correct labels, in pairs of equal shape.

        Raises:
            ValueError: there are more of one than of the other, or see `add`. Maps before the wrong one stay counted.
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
            ValueError: the shape differs, or the values are not counts.
        """
        counts = to_integers(counts, "metric's counts")
        if counts.shape != self.counts.shape or (counts < 0).any():
            raise ValueError(
                f"Expected the counts of a metric with num_labels={self.num_labels}: whole numbers of shape "
                f"{self.counts.shape}, got {counts.shape}."
            )
        self.counts = self.counts + counts

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """
        Scores over all pixels added; then start again.

        Args:
            predictions, references: optional last batch, see `add_batch`.

        Returns:
            `dict`, see the class.

        Raises:
            ValueError: nothing was added, or see `add_batch`.
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
                f"Unknown inputs {sorted(others)}; only predictions and references are compared. Give `num_labels` and "
                f"`ignore_index` when the metric is made: {type(self).__name__}(num_labels=…, ignore_index=255)."
            )
        if predictions is None or references is None:
            raise ValueError("Both predictions and references are needed: label maps, in pairs of equal size.")


class MeanIoU(LabelMapMetric):
    """
    Mean intersection over union, accuracies, and both per class, from a streaming confusion matrix.

    Arguments, memory and errors are those of [`LabelMapMetric`]. `compute` returns the scores of [`iou.area_scores`], under
    the names of `evaluate.load("mean_iou")`.

    Source: the metric `mean_iou` of evaluate.

    Attributes:
        counts, confusion_matrix: see [`iou.count_pixels`]; `(num_labels, num_labels)`.

    Example:

    ```python
    >>> import numpy as np
    >>> from spar_hf.evaluation import MeanIoU

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
    def shape(self) -> tuple[int, ...]:
        return self.num_labels, self.num_labels

    @property
    def confusion_matrix(self) -> np.ndarray:
        return self.counts

    def count(self, prediction: Any, reference: Any) -> np.ndarray:
        return count_pixels(prediction, reference, self.num_labels, self.ignore_index)

    def results(self, counts: np.ndarray) -> dict[str, Any]:
        return area_scores(counts)


class BoundaryIoU(LabelMapMetric):
    """
    Intersection over union of the boundaries of classes. It measures outlines, which large areas dominate in mIoU.

    Arguments beside `dilation_ratio`, memory and errors are those of [`LabelMapMetric`]. `compute` returns the scores of
    [`iou.boundary_scores`].

    Source: Cheng et al., CVPR 2021 (arXiv 2103.16562), section 4, see [`iou.count_boundaries`].

    Attributes:
        counts: see [`iou.count_boundaries`]; `(3, num_labels)`.

    Args:
        num_labels, ignore_index, kwargs: see [`LabelMapMetric`].
        dilation_ratio (`float`, *optional*, defaults to 0.02): width of boundaries as a share of the image diagonal.

    Raises:
        ValueError: `dilation_ratio` is not above 0.

    Example:

    ```python
    >>> import numpy as np
    >>> from spar_hf.evaluation import BoundaryIoU

    >>> reference = np.zeros((20, 20), int)
    >>> reference[5:15, 5:15] = 1
    >>> metric = BoundaryIoU(num_labels=2)
    >>> metric.add(prediction=np.roll(reference, 1, axis=0), reference=reference)
    >>> metric.compute()["per_category_boundary_iou"].round(2)
    array([0.69, 0.33])
    ```"""

    module_name = "boundary_iou"
    description = "Intersection over union of the boundaries of classes in label maps."

    def __init__(
        self,
        num_labels: int,
        ignore_index: int | None = IGNORE_INDEX,
        dilation_ratio: float = 0.02,
        **kwargs: Any,
    ):
        check_dilation_ratio(dilation_ratio)
        self.dilation_ratio = dilation_ratio
        super().__init__(num_labels, ignore_index, **kwargs)

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, self.num_labels

    def count(self, prediction: Any, reference: Any) -> np.ndarray:
        return count_boundaries(prediction, reference, self.num_labels, self.ignore_index, self.dilation_ratio)

    def results(self, counts: np.ndarray) -> dict[str, Any]:
        return boundary_scores(counts)
