"""The study of quality against cost, really run on little: two steps, few windows."""

import json
import runpy
import sys

import numpy as np
import pytest
from launching import TRAINING
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
def test_study_writes_table_and_picture_and_repeats_nothing(base_folder, dataset, tmp_path, monkeypatch, capsys):
    output = tmp_path / "study"
    recipe = "--learning_rate 1e-3 --workers 0 --holdout_every 3 --crop_probability 0 --min_scale 1"
    options = ("--model", base_folder, "--images", dataset / "images", "--dataset", dataset, "--output", output)
    options += ("--steps", 2, "--windows", 2, "--variants", "tiling", "--photos", 2, f"--distill={recipe}")

    for name, value in {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)

    def study(*more):
        """The study in this process; the runs that it launches are processes of their own."""
        script = TRAINING / "studies" / "quality_cost.py"
        monkeypatch.setattr(sys, "argv", [*map(str, (script, *options, *more))])
        runpy.run_path(str(script), run_name="__main__")

    def refused(*more):
        with pytest.raises(SystemExit) as stop:
            study(*more)
        assert stop.value.code == 2
        return capsys.readouterr().err

    study("--stride", 32)
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
    study("--stride", 32)
    assert json.loads((output / "quality_cost.json").read_text())["rows"] == report["rows"]
    assert all(path.stat().st_mtime_ns == moment for path, moment in logs.items())
    assert "--overwrite" in refused("--stride", 16)
    assert "other options" in refused("--stride", 16, "--overwrite")
