"""Wrong options and missing folders: every script in `training/` says what is wrong in one line and exits with status 2."""

import runpy
import sys

import pytest
from launching import TRAINING

from spar_hf import SPAR_TINY
from spar_hf.utils.errors import run_command

MODEL, NOWHERE, OUTPUT = ("--model", SPAR_TINY), "nowhere", ("--output", "out")
PROBE = ("--train_dataset", NOWHERE, "--test_dataset", NOWHERE)
# script: options that it needs, wrong ones, and what it says of them
SCRIPTS = {
    "benchmark": ((), ("--suite", "nonsense"), "--suite nonsense"),
    "benchmark_deploy": ((), ("--sizes", "512"), "--sizes 512"),
    "benchmark_gpu": ((), ("--dtype", "int8"), "float32, bfloat16, float16"),
    "benchmark_masks": ((), ("--decision", "1", "2"), "--decision"),
    "cache_teacher": ((*MODEL, *OUTPUT), ("--images", NOWHERE), NOWHERE),
    "demo": ((*OUTPUT, "--packaged", "false"), ("--images", NOWHERE), NOWHERE),
    "distill": ((*MODEL, *OUTPUT, "--images", NOWHERE), ("--steps", "-1"), "--steps -1 must be above 0"),
    "evaluate": (MODEL, ("--dataset", f"/{NOWHERE}"), NOWHERE),
    "flicker": (OUTPUT, ("--data", f"/{NOWHERE}"), NOWHERE),
    "figures": ((*MODEL, "--dataset", NOWHERE, "--figure", "strides"), ("--runs", "a:single"), "--runs"),
    "linear_probe": ((*MODEL, *OUTPUT), PROBE, "`images/`"),
    "panoptic": ((*MODEL, *OUTPUT), ("--dataset", NOWHERE), "`images/`"),
    "presence": (OUTPUT, ("--data", f"/{NOWHERE}"), NOWHERE),
    "pretrain_tiny": (OUTPUT, ("--data", NOWHERE), "`images/`"),
    "scale": ((), ("--gpus", "0"), "--gpus"),
    "seams": (("--images", NOWHERE), ("--tile", "64", "--overlaps", "48"), "--overlaps"),
    "quality_cost": ((*MODEL, *OUTPUT, "--images", NOWHERE, "--dataset", NOWHERE), ("--steps", "0"), "--steps"),
    "support": (OUTPUT, ("--data", f"/{NOWHERE}", "--holdout_every", "2"), NOWHERE),
    "serving_load": ((), ("--concurrency", "0"), "--concurrency"),
    "huge_memory": ((), ("--side", "1"), "--side"),
    "generalisation": ((*MODEL, *OUTPUT), ("--data", f"/{NOWHERE}"), NOWHERE),
}
WRONG = [(script, (*needed, *wrong), message) for script, (needed, wrong, message) in SCRIPTS.items()]
# what the options above leave out, so that only the one below is wrong
COMPLETE = {
    name: SCRIPTS[name][1] for name in ("cache_teacher", "evaluate", "linear_probe", "panoptic", "pretrain_tiny")
}
COMPLETE |= {name: SCRIPTS[name][1] for name in ("flicker", "generalisation", "presence", "support")}
UNKNOWN = [
    (script, (*needed, *COMPLETE.get(script, ()), "--nonsense", "1"), "--nonsense")
    for script, (needed, _, _) in SCRIPTS.items()
]
FLOAT16 = [
    (script, (*SCRIPTS[script][0], *COMPLETE.get(script, ()), "--mixed_precision", "fp16"), "on a CPU use bf16 or no")
    for script in ("cache_teacher", "distill", "evaluate", "linear_probe", "panoptic", "pretrain_tiny")
]


def test_all_scripts_are_here():
    parts = {"benchmark_distill", "deployment_paths"}  # of benchmark.py, with no command of their own
    assert {path.stem for path in TRAINING.rglob("*.py")} - parts == SCRIPTS.keys()


@pytest.mark.parametrize(("script", "options", "message"), [*WRONG, *UNKNOWN, *FLOAT16])
def test_wrong_options_are_one_line_and_exit_status_2(script, options, message, tmp_path, monkeypatch, capsys):
    path = next(TRAINING.rglob(f"{script}.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    if path.parent.name == "studies":
        monkeypatch.syspath_prepend(path.parent)  # as Python does for a script: studies import one another
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and message in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bug", [lambda: int("x"), lambda: {}["x"], lambda: [1].index(2)])
def test_bugs_keep_their_traceback(bug):
    with pytest.raises((ValueError, KeyError)):
        run_command(bug)
