"""The suite of deployment paths, on a small model: a table that grows, and what is refused."""

import json
import runpy
import subprocess
import sys

import pytest
from launching import TRAINING

SUITE = ("--suite", "deploy", "--tiny", "--models", "spar-tiny", "--repeats", "1", "--threads", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two images with masks of two classes, as CamVid is laid out."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("camvid")
    (folder / "classes.txt").write_text("sky\nroad\n")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 2, (40, 60), dtype=np.uint8)).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture
def benchmark(monkeypatch):
    """Runs the suite with options."""
    studies = TRAINING / "studies"

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *SUITE, *map(str, options)])
        runpy.run_path(str(studies / "benchmark.py"), run_name="__main__")

    monkeypatch.syspath_prepend(studies)
    return run


@pytest.mark.slow
def test_a_table_that_grows(tmp_path, benchmark, data, capsys):
    output = tmp_path / "deploy.json"
    options = ("--output", output, "--camvid", data)
    eager, onnx = "eager fp32", "ONNX Runtime fp32"
    benchmark(*options, "--sizes", "48x64", "--paths", eager, onnx)
    rows = {row["path"]: row for row in json.loads(output.read_text())["rows"]}
    for row in rows.values():
        timed = row["sizes"]["48x64"]
        for kind in ("seconds", "cpu_seconds"):
            assert timed[f"speed_in_{kind}"] > 0 and row[f"start_{kind}"] > timed[kind] > 0
        assert row["cosine"] > 0.99999 and row["equal_21"]["least"] > 0.999 and row["equal_150"]["mean"] > 0.999
        assert row["miou"] == pytest.approx(row["eager_miou"], abs=0.5)
    assert rows[onnx]["start_cpu_seconds"] < rows[eager]["start_cpu_seconds"]  # its process imports no torch
    if sys.platform.startswith("linux"):
        assert rows[onnx]["peak_mib"] < rows[eager]["peak_mib"]

    benchmark(*options, "--sizes", "48x64", "40x90", "--paths", eager)  # only what is missing is measured
    grown = {row["path"]: row for row in json.loads(output.read_text())["rows"]}
    assert grown[onnx] == rows[onnx] and grown[eager]["sizes"]["48x64"] == rows[eager]["sizes"]["48x64"]
    assert grown[eager]["sizes"].keys() == {"48x64", "40x90"} and onnx in output.with_suffix(".md").read_text()

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        benchmark("--output", output, "--camvid", data, "--frames", "1")
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err


def test_a_way_that_fails_says_why(tmp_path):
    """The last line of the process of a way to run the model is what the table shows."""
    settings = json.dumps({"path": "ONNX Runtime fp32", "folder": str(tmp_path), "threads": 1})
    script = TRAINING / "studies" / "deployment_paths.py"
    ended = subprocess.run([sys.executable, script, settings], input="", capture_output=True, text=True)
    assert ended.returncode != 0 and "graphs.json" in ended.stderr.strip().splitlines()[-1] and not ended.stdout
