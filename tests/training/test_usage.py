"""What the scripts in `training/` say of wrong options, and that bugs keep their tracebacks."""

import runpy
import sys
from pathlib import Path

import pytest

from spar_hf import SPAR_TINY
from spar_hf.utils import usage

TRAINING = Path(__file__).parents[2] / "training"
MODEL, NOWHERE, OUTPUT = ("--model", SPAR_TINY), "nowhere", ("--output", "out")
PROBE = ("--train_dataset", NOWHERE, "--test_dataset", NOWHERE)
WRONG = {
    "benchmark": (("--suite", "nonsense"), "use vision or one of"),
    "benchmark_masks": (("--nonsense", "1"), "--nonsense"),
    "cache_teacher": ((*MODEL, *OUTPUT, "--images", NOWHERE), NOWHERE),
    "distill": ((*MODEL, *OUTPUT, "--images", NOWHERE, "--steps", "-1"), "--steps -1 must be above 0"),
    "evaluate": ((*MODEL, "--dataset", f"/{NOWHERE}"), "is no folder"),
    "figures": ((*MODEL, "--dataset", NOWHERE, "--figure", "strides", "--runs", "a:single"), "leave --runs out"),
    "linear_probe": ((*MODEL, *OUTPUT, *PROBE), "must hold `images/`"),
    "panoptic": ((*MODEL, *OUTPUT, "--data", NOWHERE), "must hold `images/`"),
    "pretrain_tiny": ((*OUTPUT, "--data", NOWHERE), "must hold `images/`"),
    "quality_cost": ((*MODEL, *OUTPUT, "--images", NOWHERE, "--dataset", NOWHERE, "--steps", "0"), "at least 1"),
    "generalisation": ((*MODEL, *OUTPUT, "--data", f"/{NOWHERE}"), "is no folder"),
}


FLOAT16 = ("--mixed_precision", "fp16")
WITH_PRECISION = ("cache_teacher", "evaluate", "linear_probe", "panoptic", "pretrain_tiny")
WRONG_ON_CPU = {script: ((*WRONG[script][0], *FLOAT16), "on a CPU use bf16 or no") for script in WITH_PRECISION}
WRONG_ON_CPU["distill"] = ((*MODEL, *OUTPUT, "--images", NOWHERE, *FLOAT16), "on a CPU use bf16 or no")


@pytest.fixture(autouse=True)
def before_work(monkeypatch):
    monkeypatch.setitem(usage._work, "begun", False)


@pytest.mark.parametrize(("script", "wrong"), [*WRONG.items(), *WRONG_ON_CPU.items()])
def test_wrong_options_and_missing_folders_are_one_line_and_exit_status_2(script, wrong, tmp_path, monkeypatch, capsys):
    options, message = wrong
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(next(TRAINING.rglob(f"{script}.py"))), run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and message in said, said


def refuse():
    raise ValueError("--steps 0 must be\nabove 0.")


def in_the_middle_of_work():
    usage.work_begins()
    refuse()


@pytest.mark.parametrize("bug", [lambda: int("x"), lambda: {}["x"], lambda: [1].index(2), in_the_middle_of_work])
def test_run_script__bugs_and_errors_in_the_middle_of_work_are_raised(bug):
    with pytest.raises((ValueError, KeyError)):
        usage.run_script(bug)


def test_run_script__a_refusal_is_one_line(capsys):
    with pytest.raises(SystemExit):
        usage.run_script(refuse)
    assert capsys.readouterr().err == "error: --steps 0 must be above 0.\n"
