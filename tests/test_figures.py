"""The two figures and the table of strength, on two photos and tiny models."""

import json
import shutil

import figures
import numpy as np
import pytest
import strength
import yaml
from accelerate.state import AcceleratorState
from conftest import randomise, tiny_config
from PIL import Image

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def street(tmp_path):
    """Four photos `a0` to `a3` of noise with masks of four classes."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "street" / kind).mkdir(parents=True)
    (tmp_path / "street" / "classes.txt").write_text("road\nsky\ntree-merged\ndog\n")
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((96, 70), Image.Resampling.BICUBIC).save(tmp_path / "street" / "images" / f"a{i}.png")
        blocks = Image.fromarray(rng.integers(0, 4, (4, 3), dtype=np.uint8))
        blocks.resize((96, 70), Image.Resampling.NEAREST).save(tmp_path / "street" / "masks" / f"a{i}.png")
    return tmp_path / "street"


@pytest.fixture
def models(tmp_path, tokenizer):
    for seed, name in enumerate(("base", "student")):
        model = randomise(SparForOpenVocabSegmentation(tiny_config(templates="plain")), seed)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        SparImageProcessorPil(size={"shortest_edge": 80}).save_pretrained(tmp_path / name)
    return ["--model", f"base={tmp_path / 'base'}", f"SPAR={tmp_path / 'student'}", "--no_warmup"]


def test_figure_of_strides_is_restartable(street, models, tmp_path):
    output = tmp_path / "out"
    command = ["--figure", "strides", "--dataset", str(street), *models, "--limit", "2", "--output", str(output)]
    rows = figures.main([*command, "--strides", "24", "64"])
    ways = [(row["model"], row["stride"]) for row in rows]
    assert ways == [("base", None), ("SPAR", None), ("base", 64), ("base", 24)]
    assert rows[0]["time_ratio"] == 1 and rows[3]["time_ratio"] > 0
    picture = Image.open(output / "strides.png")
    assert picture.width > 800 and len(np.unique(np.asarray(picture.convert("L")))) > 50
    stored = json.loads((output / "strides.json").read_text())
    assert stored["rows"] == rows
    better = rows[1]["mean_iou"] > rows[2]["mean_iou"]
    assert ("above" if better else "below") + " the sliding window of stride 64" in stored["against_the_teacher"][0]
    points = {path.name: path.stat().st_mtime_ns for path in (output / "points").iterdir()}
    assert set(points) == {"one-pass.json", "stride-64.json", "stride-24.json"}
    # a further stride is measured alone, the rest stays as it is
    more = figures.main([*command, "--strides", "24", "64", "32"])
    assert [row["stride"] for row in more] == [None, None, 64, 32, 24]
    assert [row for row in more if row["stride"] != 32] == rows
    assert all((output / "points" / name).stat().st_mtime_ns == time for name, time in points.items())
    # other photos are other points
    with pytest.raises(ValueError, match="--limit was 2, is 3"):
        figures.main([*command[:-4], "--limit", "3", "--output", str(output)])
    with pytest.raises(ValueError, match="leave --runs out"):
        figures.main([*command, "--runs", "base:single"])


def test_figure_of_resolutions(street, models, tmp_path):
    command = ["--figure", "resolutions", "--dataset", str(street), *models, "--limit", "1"]
    command += ["--output", str(tmp_path / "out")]
    rows = figures.main([*command, "--resolutions", "128", "64", "--stride", "32"])
    assert [(row["shortest_edge"], row["model"], row["stride"]) for row in rows] == [
        *((64, *way) for way in (("base", None), ("base", 32), ("SPAR", None))),
        *((128, *way) for way in (("base", None), ("base", 32), ("SPAR", None))),
    ]
    assert (tmp_path / "out" / "resolutions.png").is_file()
    with pytest.raises(ValueError, match="leave --native, --size and --shortest_edge out"):
        figures.main([*command, "--native"])


def test_strength_table(street, models, tmp_path):
    """Kept photos are those of the recipe, and held-out classes are scored among all words."""
    shutil.copytree(street, tmp_path / "kept")
    recipe = {
        "held_out": ["tree", "zebra"],
        "sets": [{"path": "street", "holdout_every": 2}, {"path": "kept", "exclude": ["a0", "a1"]}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [
        "--data",
        str(tmp_path),
        *models[:-1],
        "--recipe",
        str(tmp_path / "recipe.yaml"),
        "--shortest_edge",
        "64",
    ]
    rows = strength.main([*command, "--output", str(tmp_path / "out"), "--runs", "SPAR:single"])
    assert [(row["set"], row["part"], row["photos"]) for row in rows] == [
        *(("street", part, n) for part, n in (("trained on", 2), ("kept photos", 2), ("new classes", 4))),
        *(("kept", part, n) for part, n in (("trained on", 2), ("kept photos", 2), ("new classes", 4))),
    ]
    assert all(row["classes"] == ["tree"] for row in rows if row["part"] == "new classes")
    assert not any("tree" in row["classes"] for row in rows if row["part"] != "new classes")
    report = json.loads((tmp_path / "out" / "street-new-classes.json").read_text())
    assert list(report["vocabulary"]) == ["road", "sky", "tree", "dog"]
    assert report["runs"][0]["mean_iou"] == report["runs"][0]["classes"]["tree"]["iou"]
    report = json.loads((tmp_path / "out" / "kept-kept-photos.json").read_text())
    assert report["options"]["include"] == ["a0", "a1"]
