"""The suite for GPUs, rehearsed on a CPU with a small model: every row that a card gets, and what is left out in time."""

import json
import runpy
import sys

import pytest
from launching import TRAINING

SUITE = ("--suite", "gpu", "--device", "cpu", "--tiny", "--repeats", "1")


@pytest.fixture
def benchmark(monkeypatch):
    """Runs the benchmark with options."""
    studies = TRAINING / "studies"

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *SUITE, *map(str, options)])
        runpy.run_path(str(studies / "benchmark.py"), run_name="__main__")

    monkeypatch.syspath_prepend(studies)
    return run


def test_every_row(tmp_path, benchmark):
    benchmark("--output", tmp_path / "gpu.json")
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert not [row for row in rows.values() if "error" in row] and len(rows) == 17
    assert all(row["ratio"] > 0 and row["goal"] for row in rows.values() if "ratio" in row)

    def named(start):
        return next(row for name, row in rows.items() if name.startswith(start))

    assert named("published loop")["cosine"] > 0.999  # both compute the same map
    assert named("one pass")["difference"] < 0.05 and named("decision over plain formula,")["equal_labels"] > 0.999
    assert named("float16")["values"]["cosine"] > named("bfloat16")["values"]["cosine"] > 0.999
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert (
        "rehearsal" in lines[0] and len(lines) == 2 + 2 + len(rows) and {line.count("|") for line in lines[2:]} == {7}
    )


def test_parts_that_do_not_fit_into_the_time_are_named(tmp_path, benchmark):
    benchmark("--output", tmp_path / "gpu.json", "--minutes", "1e-9")
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert len(rows) == 9 and all("no time left" in row["error"] for row in rows)
    assert "no time left" in (tmp_path / "gpu.md").read_text()
