"""The built wheel, installed without this checkout, runs the commands in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from launching import ENVIRONMENT, TWO_PROCESSES
from PIL import Image
from wheel_smoke import check_size

from spar_hf import __version__

ROOT = Path(__file__).parents[1]
PACKAGED = ("spar_hf", "pyproject.toml", "README.md", "LICENSE")
COMMANDS = (
    "segment",
    "features",
    "bake",
    "convert",
    "doctor",
    "env",
    "export",
    "app",
    "space",
    "handler",
    "distill",
    "evaluate",
    "probe",
    "panoptic",
    "cache-teacher",
)
# spar_hf of this checkout may be installed for development: it must not be what runs
HERE = "import spar_hf, sys; sys.exit(not spar_hf.__file__.startswith(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy, since setuptools packs what earlier builds left in `build/` of a checkout."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", reason="no wheel can be built offline")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in PACKAGED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    run = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(source)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("site")
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    return folder


@pytest.fixture
def spar_hf(installed, tmp_path):
    """Runs `spar-hf ARGUMENTS` in an empty folder and returns what it said."""
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {**ENVIRONMENT, "PYTHONPATH": str(installed)}

    def run(*arguments, launch=(sys.executable,)):
        command = [*launch, "-m", "spar_hf.cli.main", *map(str, arguments)]
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
        return process.stdout

    subprocess.run([sys.executable, "-c", HERE, str(installed)], cwd=folder, env=environment, check=True)
    run.folder = folder
    return run


@pytest.fixture
def labelled(tmp_path):
    """Two images with masks of two classes."""
    folder = tmp_path / "set"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("sky\nroad\n")
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 2, (70, 90), dtype=np.uint8)).save(folder / "masks" / f"{i}.png")
    return folder


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as files:
        packed = {name for name in files.namelist() if name.endswith(".py")}
    assert packed == {str(path.relative_to(ROOT)) for path in (ROOT / "spar_hf").rglob("*.py")}


def test_wheel_is_small_and_tells_its_version(wheel):
    assert check_size(wheel) > 0
    assert wheel.name.split("-")[1] == __version__
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dynamic"]


def test_help_lists_the_commands(spar_hf, installed):
    said = spar_hf("--help")
    assert [name for name in COMMANDS if name not in said] == []
    script = [sys.executable, str(installed / "bin" / "spar-hf"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    assert "segment" in subprocess.run(script, env=environment, check=True, capture_output=True, text=True).stdout


def test_segment_writes_a_mask(spar_hf, image_folder):
    spar_hf("segment", image_folder / "0.jpg", "--labels", "road; sky", "--output", "found.png")
    with Image.open(spar_hf.folder / "found.png") as found, Image.open(image_folder / "0.jpg") as image:
        assert found.width == image.width and found.height > image.height  # the legend is below


@pytest.mark.slow
def test_distill_and_evaluate(spar_hf, base_folder, image_folder, labelled):
    options = ["--steps", 2, "--workers", 0, "--holdout_every", 3, "--report_to", "none", "--picture_steps", 0]
    spar_hf("distill", "--model", base_folder, "--images", image_folder, "--output", "run", *options)
    model = spar_hf.folder / "run" / "model"
    arguments = ["--dataset", labelled, "--model", model, "--shortest_edge", 64, "--no_warmup"]
    spar_hf("evaluate", *arguments, "--output", "report.json", launch=TWO_PROCESSES)
    report = json.loads((spar_hf.folder / "report.json").read_text())
    assert report["processes"] == 2 and 0 <= report["runs"][0]["mean_iou"] <= 1
