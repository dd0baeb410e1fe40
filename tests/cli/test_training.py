"""The commands of training and evaluation under `spar-hf`: the same functions as the scripts of `training/`."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
from launching import ENVIRONMENT, TRAINING, reset_accelerate
from PIL import Image
from typer.testing import CliRunner

from spar_hf import SparImageProcessorPil
from spar_hf.cli import training
from spar_hf.cli.main import app
from spar_hf.utils.errors import UsageError

ONE_PROCESS = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
ONE_PROCESS += ["--cpu", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture
def invoke(monkeypatch):
    """Runs `spar-hf` in this process."""
    monkeypatch.setattr(sys, "argv", ["spar-hf"])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield lambda *args: CliRunner().invoke(app, [*map(str, args)])
    reset_accelerate()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("distill", "--train_layers"),
        ("evaluate", "--protocol"),
        ("probe", "--inference"),
        ("panoptic", "--things"),
        ("cache-teacher", "--views"),
    ],
)
def test_help_of_a_command_is_its_own(invoke, command, option):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and option in result.output and result.output.startswith(f"usage: spar-hf {command}")


@pytest.mark.parametrize("command", training.COMMANDS)
def test_help_lists_the_command(invoke, command):
    assert command in invoke("--help").output


def test_wrong_options_are_one_line_and_exit_status_2(invoke, tmp_path):
    result = invoke("panoptic", "--model", "m", "--dataset", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "must hold `images/`" in result.stderr
    assert invoke("probe", "--no_such_option").exit_code == 2


def test_a_missing_package_names_the_extra(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate.utils")

    monkeypatch.setattr("spar_hf.utils.errors.import_module", absent)
    with pytest.raises(UsageError, match=r"spar-hf\[train\]"):
        training.load_main("probe", "spar_hf.heads.linear_probe")


def test_a_probe_by_the_command_is_that_by_the_script(vision_model, tmp_path, monkeypatch):
    """Under `accelerate launch -m`, beside the script in this process."""
    vision_model.save_pretrained(tmp_path / "model")
    SparImageProcessorPil().save_pretrained(tmp_path / "model")
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    (tmp_path / "set" / "classes.txt").write_text("dark\nlight\n")
    for i in range(3):
        mask = np.random.default_rng(i).integers(0, 2, (2, 3), np.uint8).repeat(32, 0).repeat(32, 1)
        Image.fromarray(mask * 200).convert("RGB").save(tmp_path / "set" / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "set" / "masks" / f"{i}.png")
    folders = ["--model", tmp_path / "model", "--train_dataset", tmp_path / "set", "--test_dataset", tmp_path / "set"]
    more = ["--train_exclude", "2", "--test_include", "2", "--shortest_edge", 64, "--steps", 4, "--batch_size", 2]
    arguments = [*map(str, (*folders, *more))]

    launch = [*ONE_PROCESS, "-m", "spar_hf.cli.main", "probe", *arguments, "--output", str(tmp_path / "command")]
    launched = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True)
    assert launched.returncode == 0, launched.stderr[-3000:]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["linear_probe.py", *arguments, "--output", str(tmp_path / "script")])
    runpy.run_path(str(TRAINING / "linear_probe.py"), run_name="__main__")
    command, script = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("command", "script"))
    # another process may round sums otherwise: a pixel in doubt may fall to the other side
    for ours, theirs in zip(command["heads"], script["heads"], strict=True):
        assert ours["mean_iou"] == pytest.approx(theirs["mean_iou"], abs=0.01)
    for report in (command, script):
        for measured in ("seconds_per_image", "heads", "best"):
            report.pop(measured)
    assert command == script
    files = [sorted(path.name for path in (tmp_path / name / "model").iterdir()) for name in ("command", "script")]
    assert files[0] == files[1]
