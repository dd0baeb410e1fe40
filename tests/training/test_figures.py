"""The studies `figures` and `generalisation`, launched on a few images and tiny models."""

import json
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from launching import ENVIRONMENT, TRAINING, TWO_PROCESSES
from PIL import Image
from tiny_models import randomise, tiny_config

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil
from spar_hf.evaluation import EvaluationOptions, evaluate_runs
from spar_hf.utils.errors import UsageError

STUDIES = TRAINING / "studies"


@pytest.fixture
def launch(monkeypatch):
    """Runs a study as `python STUDY.py` does, in this process."""

    def run(study, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{study}.py", *map(str, arguments)])
        runpy.run_path(str(STUDIES / f"{study}.py"), run_name="__main__")

    return run


@pytest.fixture
def refuse(launch, capsys):
    """Runs a study that must end with one line and status 2, and returns the line."""

    def run(study, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            launch(study, *arguments)
        said = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and said[-1].startswith("error: ")
        return said[-1]

    return run


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


def rows_of(output, figure):
    return json.loads((output / f"{figure}.json").read_text())["rows"]


def test_figure_of_strides_is_restartable(street, models, tmp_path, launch, refuse):
    output = tmp_path / "out"
    command = ["--figure", "strides", "--dataset", street, *models, "--limit", "2", "--output", output]
    launch("figures", *command, "--strides", "24", "64")
    rows = rows_of(output, "strides")
    ways = [(row["model"], row["stride"]) for row in rows]
    assert ways == [("base", None), ("SPAR", None), ("base", 64), ("base", 24)]
    assert rows[0]["time_ratio"] == 1 and rows[3]["time_ratio"] > 0
    picture = Image.open(output / "strides.png")
    assert picture.width > 800 and len(np.unique(np.asarray(picture.convert("L")))) > 50
    stored = json.loads((output / "strides.json").read_text())
    better = rows[1]["mean_iou"] > rows[2]["mean_iou"]
    assert ("above" if better else "below") + " the sliding window of stride 64" in stored["against_the_teacher"][0]
    points = {path.name: path.stat().st_mtime_ns for path in (output / "points").iterdir()}
    assert set(points) == {"one-pass.json", "stride-64.json", "stride-24.json"}
    # one more stride is measured alone, the rest stays as it is
    launch("figures", *command, "--strides", "24", "64", "32")
    more = rows_of(output, "strides")
    assert [row["stride"] for row in more] == [None, None, 64, 32, 24]
    assert [row for row in more if row["stride"] != 32] == rows
    assert all((output / "points" / name).stat().st_mtime_ns == time for name, time in points.items())
    said = refuse("figures", *command[:-1], tmp_path / "new", "--strides", "24", "65")
    assert "stride=65 must lie between 1 and the window" in said
    assert not (tmp_path / "new").exists()  # nothing was measured
    # other images are other points
    said = refuse("figures", *command[:-4], "--limit", "3", "--output", output, "--strides", "64")
    assert "--limit was 2, is 3" in said
    assert "leave --runs out" in refuse("figures", *command, "--runs", "base:single")
    assert "--card_folder" in refuse("figures", *command, "--card_folder", tmp_path / "cards")


def test_reports_of_other_words_are_refused(street, models, tmp_path):
    """The options name the same files as before, but these hold other words."""
    words = tmp_path / "words.json"
    command = ["--dataset", str(street), *models, "--limit", "1", "--class_names", str(words), "--output"]
    options = EvaluationOptions.parse([*command, str(tmp_path / "report.json")])
    lines = ["road", "wall-merged", "wall-other", "sky", "dog"]
    (street / "classes.txt").write_text("\n".join(lines))
    words.write_text('{"dog": "cat"}')
    assert evaluate_runs(options)["vocabulary"]["dog"] == ("cat",)
    assert evaluate_runs(options, reuse=True)["vocabulary"]["dog"] == ["cat"]
    words.write_text('{"dog": "grass"}')
    with pytest.raises(UsageError, match="measured with other settings: words was"):
        evaluate_runs(options, reuse=True)
    words.write_text('{"dog": "cat"}')
    lines[2:4] = lines[3:1:-1]  # the same words for other mask values
    (street / "classes.txt").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="other settings: classes of mask values was"):
        evaluate_runs(options, reuse=True)


def test_figure_without_labelled_pixels_is_refused(street, models, tmp_path, refuse):
    for path in (street / "masks").iterdir():
        Image.new("L", (96, 70), 255).save(path)
    command = ["--figure", "strides", "--dataset", street, *models, "--limit", "1", "--strides", "64"]
    for _ in range(2):  # the second time the points are read from their files
        assert "nothing to draw" in refuse("figures", *command, "--output", tmp_path / "out")


def test_figure_of_resolutions(street, models, tmp_path, launch, refuse):
    command = ["--figure", "resolutions", "--dataset", street, *models, "--limit", "1"]
    command += ["--output", tmp_path / "out", "--stride", "32"]
    launch("figures", *command, "--shortest_edges", "128", "64")
    rows = rows_of(tmp_path / "out", "resolutions")
    assert [(row["shortest_edge"], row["model"], row["stride"]) for row in rows] == [
        *((64, *way) for way in (("base", None), ("base", 32), ("SPAR", None))),
        *((128, *way) for way in (("base", None), ("base", 32), ("SPAR", None))),
    ]
    assert (tmp_path / "out" / "resolutions.png").is_file()
    assert "--overwrite" in refuse("figures", *command, "--shortest_edges", "64")  # it would lose three points
    assert rows_of(tmp_path / "out", "resolutions") == rows
    launch("figures", *command, "--overwrite", "--resolutions", "64")  # the name of the option in version 0.1
    assert rows_of(tmp_path / "out", "resolutions") == rows[:3]
    assert "leave --native, --size and --shortest_edge out" in refuse("figures", *command, "--native")


def write_recipe(folder, **recipe):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_generalisation_table(street, models, tmp_path, launch, refuse):
    """Held-out images are those of the recipe, and held-out classes are scored among all words."""
    shutil.copytree(street, tmp_path / "kept")
    sets = [{"path": "street", "holdout_every": 2}, {"path": "kept", "exclude": ["a0", "a1"]}]
    recipe = write_recipe(tmp_path, held_out=["tree", "zebra"], sets=sets)
    output = tmp_path / "out"
    command = ["--data", tmp_path, *models[:-1], "--recipe", recipe, "--shortest_edge", "64", "--output", output]
    launch("generalisation", *command, "--runs", "SPAR:single")
    rows = rows_of(output, "generalisation")
    parts = ("training images", 2), ("held-out images", 2), ("held-out classes", 4)
    assert [(row["set"], row["part"], row["images"]) for row in rows] == [
        *(("street", part, n) for part, n in parts),
        *(("kept", part, n) for part, n in parts),
    ]
    assert all(row["classes"] == ["tree"] for row in rows if row["part"] == "held-out classes")
    assert not any("tree" in row["classes"] for row in rows if row["part"] != "held-out classes")
    report = json.loads((output / "street-held-out-classes.json").read_text())
    assert list(report["vocabulary"]) == ["road", "sky", "tree", "dog"]
    assert report["runs"][0]["mean_iou"] == report["runs"][0]["classes"]["tree"]["iou"]
    report = json.loads((output / "kept-held-out-images.json").read_text())
    assert report["options"]["include"] == ["a0", "a1"]
    # reports under the names of version 0.1 are used
    earlier = {"training images": "trained-on", "held-out images": "kept-photos", "held-out classes": "new-classes"}
    for part, name in earlier.items():
        (output / f"street-{part.replace(' ', '-')}.json").rename(output / f"street-{name}.json")
    files = {path.name: path.stat().st_mtime_ns for path in output.glob("*-*.json")}
    launch("generalisation", *command, "--runs", "SPAR:single")
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("*-*.json")} == files
    assert rows_of(output, "generalisation") == rows
    assert "is no folder" in refuse("generalisation", "--data", "/nowhere", *models[:-1], "--recipe", recipe)
    recipe.write_text("sets: []")
    assert "is not a recipe" in refuse("generalisation", *command)


@pytest.mark.slow
def test_generalisation_in_two_processes(street, models, tmp_path, launch):
    """Both processes measure all parts, one after the other, and one of them writes and prints."""
    recipe = write_recipe(tmp_path, held_out=["tree"], sets=[{"path": "street", "holdout_every": 2}])
    arguments = ["--data", str(tmp_path), *models[:-1], "--recipe", str(recipe), "--limit", "2"]
    arguments += ["--shortest_edge", "64", "--runs", "SPAR:single", "--output"]
    launch("generalisation", *arguments, tmp_path / "one")
    command = [*TWO_PROCESSES, STUDIES / "generalisation.py", *arguments, tmp_path / "two"]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    one, two = (rows_of(tmp_path / name, "generalisation") for name in ("one", "two"))
    assert len(one) == 3 and process.stdout.count("present") == 1  # one table of the three parts
    assert one == two
    assert json.loads((tmp_path / "two" / "street-held-out-classes.json").read_text())["processes"] == 2
