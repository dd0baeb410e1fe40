"""Counts of an evaluation: their sums, and their files on disk."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from spar_hf.evaluation.counts import Counts, PartialCounts, check_same_settings
from spar_hf.evaluation.inference import Prediction
from spar_hf.evaluation.iou import count_boundaries, count_pixels
from spar_hf.utils.errors import UsageError

ARRAYS = ("done", "confusion", "boundary", "nanoseconds", "memory")


def counted(numbers, seed=0):
    """Counts of two runs over random label maps of three classes."""
    counts, rng = Counts(2, 3), np.random.default_rng(seed)
    for number in numbers:
        maps = rng.integers(0, 3, (3, 12, 9)).astype(np.uint8)
        maps[2, :2] = 255
        predictions = [Prediction(torch.from_numpy(maps[i]), 0.5 * (i + 1), 0.25 * number) for i in range(2)]
        counts.add(number, maps[2], predictions, dilation_ratio=0.1)
        counts.note_memory(1, 100 * number)
    return counts


def test_counts_are_those_of_the_images():
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 3, (3, 12, 9)).astype(np.uint8) for _ in range(2)]
    for part in maps:
        part[2, :2] = 255
    counts = counted([4, 2])
    assert counts.done.tolist() == [4, 2] and counts.memory.tolist() == [-1, 400]
    assert counts.nanoseconds.tolist() == [[10**9, 15 * 10**8], [2 * 10**9, 15 * 10**8]]
    for i in range(2):
        expected = sum(count_pixels(part[i], part[2], 3) for part in maps)
        np.testing.assert_array_equal(counts.confusion[i], expected)
        expected = sum(count_boundaries(part[i], part[2], 3, dilation_ratio=0.1) for part in maps)
        np.testing.assert_array_equal(counts.boundary[i], expected)


def test_sets_of_more_classes_than_8_bits_ignore_another_label():
    counts, reference = Counts(1, 300), np.array([[254, 255, 299, 65535]], np.uint16)
    prediction = Prediction(torch.tensor([[254, 255, 0, 7]]), 1.0, 1.0)
    counts.add(0, reference, [prediction], dilation_ratio=0.5, ignore_index=65535)
    assert counts.confusion[0].sum() == 3 and counts.confusion[0, 255, 255] == 1 and counts.confusion[0, 299, 0] == 1
    assert counts.boundary[0, 0, 255] == 1


def test_partial_counts_add_up(tmp_path):
    accelerator, settings = Accelerator(cpu=True), {"--limit": 3}
    parts = [counted([0, 3], seed=1), counted([5], seed=2)]
    for part in parts:
        partial = PartialCounts(tmp_path / "parts", settings, accelerator)
        part.save(partial.path)
    assert [path.name for path in partial.folder.iterdir() if path.suffix == ".npz"].count("0002-000.npz") == 1
    total = PartialCounts(tmp_path / "parts", settings, accelerator).earlier(2, 3)
    parts[0].merge(parts[1])
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(total, name), getattr(parts[0], name))
    with pytest.raises(UsageError, match="--limit was 3, is 4"):
        PartialCounts(tmp_path / "parts", {"--limit": 4}, accelerator)
    (tmp_path / "parts" / "notes.txt").touch()
    partial.remove()
    assert [path.name for path in partial.folder.iterdir()] == ["notes.txt"]


def test_settings_of_version_0_1_are_compared_by_their_new_names(tmp_path):
    now = {"images": "a", "files of images": "b", "mixed precision": "no", "--limit": None}
    then = {"photos": "a", "files of photos": "b", "mixed precision": "no", "--limit": None, "--mixed_precision": "no"}
    check_same_settings(json.loads(json.dumps(then)), now, tmp_path)
    with pytest.raises(UsageError, match='images was "a", is "c"'):
        check_same_settings(then, now | {"images": "c"}, tmp_path)
    with pytest.raises(UsageError, match='mixed precision was "no", is "bf16"'):
        check_same_settings(then, now | {"mixed precision": "bf16"}, tmp_path)


def test_damaged_files_are_reported(tmp_path):
    counts, path = Counts(2, 3), tmp_path / "0001-000.npz"
    counts.note_memory(1, 7)
    counts.save(path)
    whole = path.read_bytes()
    again = Counts(2, 3)
    again.load(path)
    assert again.memory.tolist() == [-1, 7]
    for damaged in (whole[: len(whole) // 2], b"", b"no counts"):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"0001-000\.npz holds no counts .*Delete it"):
            again.load(path)
