"""The two figures and the table of strength, on two images and tiny models."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import figures
import numpy as np
import pytest
import strength
import yaml
from PIL import Image
from tiny_models import randomise, tiny_config
from transformers import HfArgumentParser

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil
from spar_hf.evaluation.evaluator import evaluate_runs
from spar_hf.evaluation.options import Options


@pytest.fixture
def street(tmp_path):
    """Four images `a0` to `a3` of noise with masks of four classes."""
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
    with pytest.raises(ValueError, match="stride=65 must lie between 1 and the window"):
        figures.main([*command[:-1], str(tmp_path / "new"), "--strides", "24", "65"])
    assert not (tmp_path / "new").exists()  # nothing was measured
    # other images are other points
    with pytest.raises(ValueError, match="--limit was 2, is 3"):
        figures.main([*command[:-4], "--limit", "3", "--output", str(output), "--strides", "64"])
    with pytest.raises(ValueError, match="leave --runs out"):
        figures.main([*command, "--runs", "base:single"])


def test_points_of_other_words_are_refused(street, models, tmp_path):
    """The options name the same files as before, but there are other words in them."""
    words = tmp_path / "words.json"
    command = ["--dataset", str(street), *models, "--limit", "1", "--labels", str(words), "--output"]
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses([*command, str(tmp_path / "report.json")])
    lines = ["road", "wall-merged", "wall-other", "sky", "dog"]
    (street / "classes.txt").write_text("\n".join(lines))
    words.write_text('{"dog": "puppy"}')
    assert evaluate_runs(options)["vocabulary"]["dog"] == ("puppy",)
    assert evaluate_runs(options, reuse=True)["vocabulary"]["dog"] == ["puppy"]
    words.write_text('{"dog": "wolf"}')
    with pytest.raises(ValueError, match="measured under other settings: words was"):
        evaluate_runs(options, reuse=True)
    words.write_text('{"dog": "puppy"}')
    lines[2:4] = lines[3:1:-1]  # the same words for other mask values
    (street / "classes.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="other settings: classes of mask values was"):
        evaluate_runs(options, reuse=True)


def test_figure_of_nothing_but_void_is_refused(street, models, tmp_path):
    for path in (street / "masks").iterdir():
        Image.new("L", (96, 70), 255).save(path)
    command = ["--figure", "strides", "--dataset", str(street), *models, "--limit", "1", "--strides", "64"]
    for _ in range(2):  # the second time the points are read from their files
        with pytest.raises(ValueError, match="nothing to draw: choose others"):
            figures.main([*command, "--output", str(tmp_path / "out")])


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


def test_every_model_is_drawn():
    """More of them than there are colours."""
    ways = [("base", None), ("base", 48), *((f"student {i}", None) for i in range(8))]
    rows = [
        {
            "model": model,
            "stride": stride,
            "patch_size": 16,
            "mean_iou": 0.3,
            "time_ratio": 1 + i,
            "vision_seconds": 1 + i,
        }
        for i, (model, stride) in enumerate(ways)
    ]
    strides = figures.draw_strides(rows)
    resolutions = figures.draw_resolutions([row | {"shortest_edge": 64} for row in rows], 48)
    for figure in (strides, resolutions):
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert [text for text in texts if "one pass" in text] == [f"{name}, one pass" for name, s in ways if s is None]


def test_strength_table(street, models, tmp_path):
    """Kept images are those of the recipe, and held-out classes are scored among all words."""
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
    assert [(row["set"], row["part"], row["images"]) for row in rows] == [
        *(("street", part, n) for part, n in (("trained on", 2), ("kept images", 2), ("new classes", 4))),
        *(("kept", part, n) for part, n in (("trained on", 2), ("kept images", 2), ("new classes", 4))),
    ]
    assert all(row["classes"] == ["tree"] for row in rows if row["part"] == "new classes")
    assert not any("tree" in row["classes"] for row in rows if row["part"] != "new classes")
    report = json.loads((tmp_path / "out" / "street-new-classes.json").read_text())
    assert list(report["vocabulary"]) == ["road", "sky", "tree", "dog"]
    assert report["runs"][0]["mean_iou"] == report["runs"][0]["classes"]["tree"]["iou"]
    report = json.loads((tmp_path / "out" / "kept-kept-images.json").read_text())
    assert report["options"]["include"] == ["a0", "a1"]


def test_strength_in_two_processes(street, models, tmp_path):
    """All parts are measured one after the other by the same two processes, and one of them writes and prints."""
    recipe = {"held_out": ["tree"], "sets": [{"path": "street", "holdout_every": 2}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--data", str(tmp_path), *models[:-1], "--recipe", str(tmp_path / "recipe.yaml"), "--limit", "2"]
    arguments += ["--shortest_edge", "64", "--runs", "SPAR:single", "--output"]
    one = strength.main([*arguments, str(tmp_path / "one")])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", Path(strength.__file__), *arguments, tmp_path / "two"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(one) == 3 and process.stdout.count("present") == 1  # one table of the three parts
    np.testing.assert_equal(json.loads((tmp_path / "two" / "strength.json").read_text())["rows"], one)
    assert json.loads((tmp_path / "two" / "street-new-classes.json").read_text())["processes"] == 2
