"""Figures of an evaluation, drawn from rows without any measurement."""

import numpy as np
import pytest

from spar_hf.evaluation.plots import compare_to_windows, draw_resolutions, draw_strides, figure_row


@pytest.fixture
def rows():
    """A base in a single pass and as a sliding window, and more students than there are colours."""
    ways = [("base", None), ("base", 48), *((f"student {i}", None) for i in range(8))]
    return [
        {
            "model": model,
            "stride": stride,
            "patch_size": 16,
            "mean_iou": 0.3 + 0.01 * i,
            "time_ratio": 1 + i,
            "vision_seconds": 1 + i,
        }
        for i, (model, stride) in enumerate(ways)
    ]


def test_every_model_is_drawn(rows):
    singles = [row["model"] for row in rows if row["stride"] is None]
    for figure in (draw_strides(rows), draw_resolutions([row | {"shortest_edge": 64} for row in rows], 48)):
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert [text for text in texts if "single pass" in text] == [f"{name}, single pass" for name in singles]
        assert sum("sliding window" in text for text in texts) == 1


def test_students_are_compared_at_their_resolution(rows):
    small, large = ([row | {"shortest_edge": side} for row in rows[:3]] for side in (64, 128))
    assert compare_to_windows(small + large) == [
        "student 0 at 64 px: 1.00 mIoU above the sliding window of stride 48, 0.7 times faster.",
        "student 0 at 128 px: 1.00 mIoU above the sliding window of stride 48, 0.7 times faster.",
    ]


def test_scores_without_value_are_gaps_in_a_curve(rows):
    scores = {"mean_iou": None, "mean_boundary_iou": 0.5, "overall_accuracy": 0.5, "peak_memory_bytes": None}
    row = figure_row(rows[0] | scores)
    assert np.isnan(row["mean_iou"]) and row["mean_boundary_iou"] == 0.5
