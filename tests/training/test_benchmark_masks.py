"""The mask benchmark measures what it says, on small sizes."""

import pytest
import torch
from benchmark import Options
from benchmark_masks import (
    against_the_plain_formula,
    batch_speed,
    beside_the_forward,
    folder_throughput,
    measure,
    plain_labels,
    plain_labels_in_strips,
)

from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation

OPTIONS = Options(height=64, width=96, repeats=2, device="cpu")


def test_strips_of_the_formula_are_the_formula():
    logits = torch.randn(5, 9, 4, generator=torch.Generator().manual_seed(0))
    for rows in (1, 4, 20):
        assert torch.equal(plain_labels_in_strips(logits, rows), plain_labels(logits))


@pytest.mark.parametrize("whole", [True, False])
def test_labels_equal_those_of_the_formula(whole):
    row = against_the_plain_formula(7, 128, 192, whole, OPTIONS)
    assert row["equal_labels"] > 0.9999 and row["seconds"] > 0 and row["formula_mib"] == pytest.approx(1.3125)


def test_measure_sees_the_memory_of_the_work():
    _, peak, result = measure(lambda: torch.ones(60 * 2**20 // 4).sum(), "cpu")
    assert float(result) == 60 * 2**20 / 4
    assert 30 * 2**20 < peak < 300 * 2**20


def test_rows_of_a_small_model():
    model = SparForOpenVocabSegmentation.from_pretrained(SPAR_TINY)
    rows = [*beside_the_forward(OPTIONS, 64, model), folder_throughput(OPTIONS, 2), batch_speed(OPTIONS, 2)]
    assert len(rows) == 5 and all(row["ratio"] > 0 and row["bare_seconds"] > 0 for row in rows)
