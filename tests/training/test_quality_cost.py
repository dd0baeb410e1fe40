"""The study of quality against cost, really run on little: two steps, few windows."""

import json

import numpy as np
import pytest
from PIL import Image
from quality_cost import Options, study

from spar_hf import SparImageProcessorPil, SparProcessor


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


def test_study_writes_table_and_picture_and_repeats_nothing(two_towers, tokenizer, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    two_towers.save_pretrained(tmp_path / "base")
    SparProcessor(SparImageProcessorPil(size={"shortest_edge": 128}), tokenizer).save_pretrained(tmp_path / "base")
    options = Options(
        str(tmp_path / "base"),
        [str(dataset / "images")],
        str(dataset),
        str(tmp_path / "study"),
        steps=2,
        windows=[2],
        variants=["tiling"],
        images_per_step=[2],
        stride=32,
        distill="--learning_rate 1e-3 --workers 0 --holdout_every 3 --crop_probability 0 --min_scale 1",
    )
    report = study(options)
    full, sampled = report["rows"]
    # an image of 150×110 px fits 4 × 2 windows of 64 px as 174×128, floored to 160×128: 4 × 3 windows of stride 32
    assert full["windows_in_all"] == 2 * 12 and sampled["windows_in_all"] == 2 * 2 * 2
    assert (full["cost_percent"], full["mse_gain_percent"]) == (100, 100)
    assert sampled["cost_percent"] == pytest.approx(100 * 2 * 2 / 12)
    assert full["mse"] < report["before"]["mse"] and sampled["mse"] != full["mse"]
    assert json.loads((tmp_path / "study" / "quality_cost.json").read_text())["rows"] == report["rows"]
    with Image.open(tmp_path / "study" / "quality_cost.png") as picture:
        assert min(picture.size) > 300

    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("log.jsonl")}
    assert len(logs) == 2
    assert study(options)["rows"] == report["rows"]
    assert all(path.stat().st_mtime_ns == moment for path, moment in logs.items())
    with pytest.raises(ValueError, match="other options"):
        study(Options(**(vars(options) | {"stride": 16})))
