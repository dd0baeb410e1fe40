"""The study of quality against cost, really run on little: two steps, few windows."""

import json
import subprocess
import sys

import numpy as np
import pytest
from launching import ENVIRONMENT, TRAINING
from PIL import Image


@pytest.fixture
def dataset(tmp_path):
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((150, 110), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.jpg")
        Image.fromarray(rng.integers(0, 2, (110, 150), dtype=np.uint8)).save(folder / "masks" / f"{i}.png")
    (folder / "classes.txt").write_text("road\nsky\n")
    return folder


@pytest.mark.slow
def test_study_writes_table_and_picture_and_repeats_nothing(base_folder, dataset, tmp_path):
    output = tmp_path / "study"
    recipe = "--learning_rate 1e-3 --workers 0 --holdout_every 3 --crop_probability 0 --min_scale 1"
    options = ("--model", base_folder, "--images", dataset / "images", "--dataset", dataset, "--output", output)
    options += ("--steps", 2, "--windows", 2, "--variants", "tiling", "--photos", 2, f"--distill={recipe}")

    def study(*more):
        command = [sys.executable, TRAINING / "studies" / "quality_cost.py", *options, *more]
        return subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)

    done = study("--stride", 32)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((output / "quality_cost.json").read_text())
    full, sampled = report["rows"]
    # an image of 150×110 px fits 4 × 2 windows of 64 px as 174×128, floored to 160×128: 4 × 3 windows of stride 32
    assert full["windows_in_all"] == 2 * 12 and sampled["windows_in_all"] == 2 * 2 * 2
    assert (full["cost_percent"], full["mse_gain_percent"]) == (100, 100)
    assert sampled["cost_percent"] == pytest.approx(100 * 2 * 2 / 12)
    assert full["mse"] < report["before"]["mse"] and sampled["mse"] != full["mse"]
    with Image.open(output / "quality_cost.png") as picture:
        assert min(picture.size) > 300

    logs = {path: path.stat().st_mtime_ns for path in output.rglob("log.jsonl")}
    assert len(logs) == 2
    assert study("--stride", 32).returncode == 0
    assert json.loads((output / "quality_cost.json").read_text())["rows"] == report["rows"]
    assert all(path.stat().st_mtime_ns == moment for path, moment in logs.items())
    refused = study("--stride", 16)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr
    refused = study("--stride", 16, "--overwrite")
    assert refused.returncode == 2 and "other options" in refused.stderr
