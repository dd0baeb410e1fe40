"""Flicker counts pixels that stand still and change their class."""

import math

import numpy as np
import pytest
from PIL import Image

from spar_hf.evaluation.flicker import Flicker


def test_against_a_plain_count():
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 40, (12, 17, 3), dtype=np.uint8)]
    for _ in range(4):
        frames.append(np.clip(frames[-1].astype(int) + rng.integers(-12, 13, (12, 17, 3)), 0, 255).astype(np.uint8))
    maps = [rng.integers(0, 3, (12, 17)) for _ in frames]
    flicker, still, changed = Flicker(tolerance=8), 0, 0
    for number, (frame, labels) in enumerate(zip(frames, maps, strict=True)):
        flicker.add(Image.fromarray(frame), labels)
        for i in range(12 if number else 0):
            for j in range(17):
                if all(abs(int(frame[i, j, c]) - int(frames[number - 1][i, j, c])) <= 8 for c in range(3)):
                    still += 1
                    changed += int(labels[i, j] != maps[number - 1][i, j])
    assert 0 < changed < still and flicker.value == changed / still


def test_sequences_of_other_sizes_begin_anew_and_nothing_is_no_number():
    flicker = Flicker()
    flicker.add(Image.new("RGB", (4, 3)), np.zeros((3, 4), int))
    flicker.add(Image.new("RGB", (5, 3)), np.ones((3, 5), int))
    assert math.isnan(flicker.value)
    with pytest.raises(ValueError, match="label map"):
        flicker.add(Image.new("RGB", (5, 3)), np.ones((5, 3), int))
