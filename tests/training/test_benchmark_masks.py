"""The mask benchmark, launched on small sizes, measures what it says."""

import json
import subprocess
import sys

import pytest
from launching import ENVIRONMENT, TRAINING

SIZES = ["--decision", "60", "512", "512", "--large_decision", "7", "320", "192"]
SIZES += ["--many_names", "70", "72", "100", "--forward_size", "64"]
SIZES += ["--height", "64", "--width", "96", "--image_count", "2", "--repeats", "2", "--device", "cpu"]


@pytest.mark.slow
def test_labels_memory_and_times_of_small_sizes(tmp_path):
    script, output = TRAINING / "studies" / "benchmark_masks.py", tmp_path / "masks.json"
    command = [sys.executable, str(script), *SIZES, "--output", str(output)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(output.read_text())["ratios"]
    assert len(rows) == 8 and all(row[key] > 0 for row in rows for key in ("ratio", "seconds", "bare_seconds"))

    whole, strips, many = rows[:3]  # 320 px are two whole strips of 8 patch rows and a half one
    # of 7,200 pixels of the last, one with two classes as good as equal may fall either way
    assert min(row["equal_labels"] for row in (whole, strips)) > 0.9999 and many["equal_labels"] > 1 - 2 / 7200
    assert whole["formula_mib"] == pytest.approx(120) and strips["formula_mib"] == pytest.approx(3.28, abs=0.01)
    if sys.platform.startswith("linux"):  # elsewhere memory cannot be measured
        assert 0.5 < whole["bare_peak_mib"] / whole["formula_mib"] < 2
