"""MeanIoU against pixel sets and scikit-learn, and as users of evaluate handle it."""

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.metrics import confusion_matrix, jaccard_score

from spar_hf.evaluation import BoundaryIoU, MeanIoU
from spar_hf.evaluation.iou import count_boundaries, count_pixels

CLASSES, IGNORE_INDEX = 20, 255
SIZES = [(5, 7), (16, 9), (1, 13), (12, 12)]


@pytest.fixture
def label_maps():
    """Images of unequal size in uint8. Class 3 is only predicted, class 4 only labelled, classes 5 and 6 neither."""
    rng = np.random.default_rng(0)
    absent = {"prediction": [4, 5, 6], "reference": [3, 5, 6]}
    labels = {name: np.setdiff1d(np.arange(CLASSES), classes) for name, classes in absent.items()}
    predictions = [rng.choice(labels["prediction"], size).astype(np.uint8) for size in SIZES]
    references = [rng.choice(labels["reference"], size).astype(np.uint8) for size in SIZES]
    for prediction, reference in zip(predictions, references, strict=True):
        agree = rng.random(reference.shape) < 0.6
        agree &= np.isin(reference, labels["prediction"])
        prediction[agree] = reference[agree]
        reference[rng.random(reference.shape) < 0.15] = IGNORE_INDEX
    return predictions, references


def slow_scores(predictions, references):
    """IoU and accuracy per class from sets of (image, row, column)."""
    predicted, labelled = [{c: set() for c in range(CLASSES)} for _ in range(2)]
    for image, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        for pixel in np.ndindex(reference.shape):
            if reference[pixel] != IGNORE_INDEX:
                predicted[int(prediction[pixel])].add((image, *pixel))
                labelled[int(reference[pixel])].add((image, *pixel))
    iou, accuracy = {}, {}
    for c in range(CLASSES):
        if predicted[c] | labelled[c]:
            iou[c] = len(predicted[c] & labelled[c]) / len(predicted[c] | labelled[c])
        if labelled[c]:
            accuracy[c] = len(predicted[c] & labelled[c]) / len(labelled[c])
    return iou, accuracy


def test_counts_are_those_of_the_functions(label_maps):
    area, boundary = MeanIoU(CLASSES), BoundaryIoU(CLASSES, dilation_ratio=0.1)
    for metric in (area, boundary):
        metric.add_batch(predictions=label_maps[0], references=label_maps[1])
    pairs = list(zip(*label_maps, strict=True))
    np.testing.assert_array_equal(area.counts, sum(count_pixels(*pair, CLASSES) for pair in pairs))
    counts = sum(count_boundaries(*pair, CLASSES, dilation_ratio=0.1) for pair in pairs)
    np.testing.assert_array_equal(boundary.counts, counts)


def test_results_are_those_of_pixel_sets(label_maps):
    metric = MeanIoU(CLASSES)
    metric.add_batch(predictions=label_maps[0], references=label_maps[1])
    results = metric.compute()
    iou, accuracy = slow_scores(*label_maps)
    assert iou[3] == iou[4] == 0 and 3 not in accuracy and not {5, 6} & set(iou)  # the cases that matter are there

    expected_iou = [iou.get(c, np.nan) for c in range(CLASSES)]
    expected_accuracy = [accuracy.get(c, np.nan) for c in range(CLASSES)]
    np.testing.assert_allclose(results["per_category_iou"], expected_iou)
    np.testing.assert_allclose(results["per_category_accuracy"], expected_accuracy)
    assert results["mean_iou"] == pytest.approx(sum(iou.values()) / len(iou))
    assert results["mean_accuracy"] == pytest.approx(sum(accuracy.values()) / len(accuracy))


def test_results_are_those_of_scikit_learn(label_maps):
    predictions, references = label_maps
    metric = MeanIoU(CLASSES)
    metric.add_batch(predictions=predictions, references=references)
    predicted, labelled = (np.concatenate([labels.ravel() for labels in maps]) for maps in label_maps)
    predicted, labelled = predicted[labelled != IGNORE_INDEX], labelled[labelled != IGNORE_INDEX]
    np.testing.assert_array_equal(metric.confusion_matrix, confusion_matrix(labelled, predicted, labels=range(CLASSES)))
    results = metric.compute()
    present = ~np.isnan(results["per_category_iou"])
    scores = jaccard_score(labelled, predicted, labels=np.flatnonzero(present), average=None)
    np.testing.assert_allclose(results["per_category_iou"][present], scores)
    assert results["overall_accuracy"] == pytest.approx(np.mean(predicted == labelled))


@pytest.mark.parametrize(
    "convert",
    [torch.from_numpy, Image.fromarray, np.ndarray.tolist, lambda labels: labels.astype(np.int64)],
    ids=["tensor", "image", "list", "int64"],
)
def test_every_way_of_adding_gives_the_same(label_maps, convert):
    predictions, references = ([convert(labels) for labels in maps] for maps in label_maps)
    expected = MeanIoU(CLASSES)
    expected.add_batch(predictions=label_maps[0], references=label_maps[1])

    metric = MeanIoU(CLASSES)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert len(metric) == len(SIZES)
    np.testing.assert_array_equal(metric.confusion_matrix, expected.confusion_matrix)
    metric.add_batch(predictions=predictions[:1], references=references[:1])
    metric.compute()  # leaves nothing behind
    metric.add_batch(predictions=predictions[:1], references=references[:1])
    last = metric.compute(predictions=predictions[1:], references=references[1:])
    np.testing.assert_equal(last, expected.compute())


def test_one_array_of_several_images_is_a_batch():
    rng = np.random.default_rng(1)
    predictions, references = rng.integers(0, 3, (2, 4, 6, 5))
    metric = MeanIoU(3)
    metric.add_batch(predictions=predictions, references=references)
    assert len(metric) == 4
    np.testing.assert_array_equal(
        metric.confusion_matrix, confusion_matrix(references.ravel(), predictions.ravel(), labels=range(3))
    )


def test_merged_parts_give_the_whole(label_maps):
    predictions, references = label_maps
    whole = MeanIoU(CLASSES)
    whole.add_batch(predictions=predictions, references=references)
    parts = [MeanIoU(CLASSES) for _ in range(2)]
    for i, part in enumerate(parts):
        part.add_batch(predictions=predictions[i::2], references=references[i::2])
    merged = MeanIoU(CLASSES)
    merged.merge(parts[0].confusion_matrix)
    merged.merge(torch.from_numpy(parts[1].confusion_matrix))  # as accelerate gives them back
    np.testing.assert_equal(merged.compute(), whole.compute())


def test_ignore_index():
    predictions, references = [[0, 1, 1, 2]], [[0, 1, 0, 2]]
    # class 2 is ignored: its pixel does not count, whatever is predicted there, not even a label out of range
    metric = MeanIoU(3, ignore_index=2)
    metric.add_batch(predictions=[[0, 1, 1, 9]], references=references)
    np.testing.assert_array_equal(metric.compute()["per_category_iou"], [0.5, 0.5, np.nan])
    metric = MeanIoU(3, ignore_index=None)
    assert metric.compute(predictions=predictions, references=references)["overall_accuracy"] == 0.75


def test_nothing_but_ignored_pixels_is_not_a_number():
    results = MeanIoU(2).compute(predictions=[[0, 1]], references=[[IGNORE_INDEX, IGNORE_INDEX]])
    assert np.isnan([results["mean_iou"], results["mean_accuracy"], results["overall_accuracy"]]).all()


def test_combines_with_other_metrics_and_writes_nothing(tmp_path):
    first, second = MeanIoU(3, cache_dir=str(tmp_path)), MeanIoU(3, ignore_index=2, cache_dir=str(tmp_path))
    both = evaluate.combine({"all": first, "some": second})
    both.add(predictions=[0, 1], references=[0, 2])
    both.add_batch(predictions=[[0, 1]], references=[[0, 1]])
    results = both.compute()
    assert results["all_mean_iou"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert results["some_mean_iou"] == 1
    assert first.name == "mean_iou"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[[0, 1]]], [[[0], [1]]], "shape"),
        (np.zeros((1, 3, 2, 2), int), np.zeros((1, 2, 2), int), "argmax"),
        ([[0, 1]], [[0, 3]], r"reference holds the labels \[3\].*num_labels=3"),
        ([[0, -1]], [[0, 1]], r"prediction holds the labels \[-1\]"),
        ([[0, IGNORE_INDEX]], [[0, 1]], r"prediction holds the labels \[255\]"),
        ([[0.2, 0.8]], [[0, 1]], "integers"),
        ([[0, 1]], [[0, 1], [0, 1]], "1 predictions but 2 references"),
        ([[0, 1]], None, "[Bb]oth"),
    ],
    ids=["size", "logits", "label", "negative", "ignored", "float", "number", "missing"],
)
def test_clear_errors(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(3).add_batch(predictions=predictions, references=references)


def test_clear_errors__wrong_use():
    with pytest.raises(ValueError, match="nothing to compute"):
        MeanIoU(3).compute()
    with pytest.raises(ValueError, match="when the metric is made"):  # where evaluate's own mean_iou takes it
        MeanIoU(3).compute(predictions=[[0]], references=[[0]], num_labels=3)
    with pytest.raises(ValueError, match="merge"):
        MeanIoU(3, num_process=2, process_id=1)
    with pytest.raises(ValueError, match="at least 1"):
        MeanIoU(0)
    with pytest.raises(ValueError, match=r"\(3, 3\), got \(2, 2\)"):
        MeanIoU(3).merge(MeanIoU(2).confusion_matrix)


def eroded_boundary(mask, distance):
    """The definition's own way: what erosion by 3×3, `distance` times, takes away; outside of the image is no mask."""
    eroded = ndimage.binary_erosion(mask, np.ones((3, 3), bool), iterations=distance, border_value=0)
    return mask & ~eroded


def test_boundary_iou_is_that_of_eroded_masks():
    rng = np.random.default_rng(0)
    both, either = np.zeros(4), np.zeros(4)
    metric = BoundaryIoU(4, dilation_ratio=0.05)
    for height, width in ((40, 31), (7, 90), (24, 24)):
        blocks = rng.integers(0, 3, (height // 6 + 1, width // 6 + 1))  # no pixel is of class 3
        reference = np.kron(blocks, np.ones((6, 6), int))[:height, :width]
        prediction = np.roll(reference, 1, axis=1)
        reference[rng.random(reference.shape) < 0.003] = IGNORE_INDEX
        metric.add(prediction=prediction.astype(np.uint8), reference=reference.astype(np.uint8))
        known = np.where(reference == IGNORE_INDEX, IGNORE_INDEX, prediction)
        distance = max(1, round(0.05 * np.hypot(height, width)))
        for label in range(4):
            of_reference = eroded_boundary(reference == label, distance)
            of_prediction = eroded_boundary(known == label, distance)
            both[label] += (of_reference & of_prediction).sum()
            either[label] += (of_reference | of_prediction).sum()
    results = metric.compute()
    expected = [b / e if e else np.nan for b, e in zip(both, either, strict=True)]
    assert 0 < expected[0] < 1 and np.isnan(expected[3])
    np.testing.assert_allclose(results["per_category_boundary_iou"], expected)
    assert results["mean_boundary_iou"] == pytest.approx(np.mean(expected[:3]))


def test_boundary_iou__ignored_pixels_neither_make_nor_move_a_boundary():
    reference = np.zeros((30, 30), int)
    reference[:, 15:] = 1
    reference[:, 14:16] = IGNORE_INDEX  # an outline, as VOC has it
    metric = BoundaryIoU(2)
    for edge in (14, 15, 16):  # all of these are right wherever there is a label
        prediction = (np.arange(30) >= edge).astype(int) * np.ones((30, 1), int)
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute()["mean_boundary_iou"] == 1
    with pytest.raises(ValueError, match="dilation_ratio=0 must be above 0"):
        BoundaryIoU(2, dilation_ratio=0)
    with pytest.raises(ValueError, match=r"label maps \(height, width\), got shape \(4,\)"):
        metric.add(prediction=[0, 1, 0, 1], reference=[0, 0, 1, 1])


def test_boundary_iou__ignored_pixels_with_the_number_of_a_class():
    """Class 0 is ignored in the reference. Predictions of it are wrong, and edges to ignored pixels are boundaries too."""
    rng = np.random.default_rng(2)
    reference, prediction = (np.kron(rng.integers(0, 3, (6, 5)), np.ones((6, 6), int)) for _ in range(2))
    metric = BoundaryIoU(3, ignore_index=0, dilation_ratio=0.04)
    metric.add(prediction=prediction, reference=reference)
    known = np.where(reference == 0, IGNORE_INDEX, prediction)
    distance = round(0.04 * np.hypot(36, 30))
    for label in range(3):
        of_reference = eroded_boundary(reference == label, distance) if label else np.zeros((36, 30), bool)
        of_prediction = eroded_boundary(known == label, distance)
        counts = [(of_reference & of_prediction).sum(), of_reference.sum(), of_prediction.sum()]
        assert metric.counts[:, label].tolist() == counts


def test_boundary_iou__parts_merge():
    rng = np.random.default_rng(1)
    predictions, references = rng.integers(0, 2, (2, 3, 20, 20))
    whole, merged = BoundaryIoU(2), BoundaryIoU(2)
    whole.add_batch(predictions=predictions, references=references)
    for prediction, reference in zip(predictions, references, strict=True):
        part = BoundaryIoU(2)
        part.add(prediction=prediction, reference=reference)
        merged.merge(part.counts)
    np.testing.assert_equal(merged.compute(), whole.compute())
