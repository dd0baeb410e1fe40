"""The benchmark runs on every family it knows, compares like with like, and measures distillation as it is launched."""

import json
import os
import runpy
import subprocess
import sys

import pytest
from launching import ENVIRONMENT, TRAINING
from tiny_models import CONFIGS, randomise

from spar_hf import SparConfig, SparVisionModel

SCRIPT = TRAINING / "studies" / "benchmark.py"


def start(monkeypatch, *options):
    """The script within this process: one that is only a moment at work."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def launch(*options):
    """The script as a process; returns what it wrote on stderr."""
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.parametrize("readout", ["siglip", "maskclip", "dinov3", "dinov3txt"])
def test_both_sides_compute_the_same(readout, tmp_path, monkeypatch):
    model = randomise(SparVisionModel(SparConfig(backbone_config=CONFIGS[readout](), readout=readout)))
    model.save_pretrained(tmp_path)
    options = ("--model", tmp_path, "--height", 48, "--width", 64, "--repeats", 2, "--device", "cpu")
    start(monkeypatch, *options, "--teacher_dtype", "bf16", "--output", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["ratios"]
    assert rows[0]["difference"] < 1e-5 and 0 < rows[1]["relative_error"] < 0.05
    assert len(rows) == 3 and all(row["ratio"] > 0 and row["seconds"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--random", "resnet"), "siglip2, openclip, dinov3txt"),
        (("--suite", "speed"), "distill"),  # the suites that lie beside the script
    ],
)
def test_an_unknown_size_or_suite_is_refused(options, named, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, *options)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and options[0] in said and named in said


@pytest.mark.slow
def test_distillation__steps_memory_and_processes(tmp_path, vision_model):
    vision_model.save_pretrained(tmp_path)
    options = ("--suite", "distill", "--model", tmp_path, "--height", 512, "--width", 1024, "--stride", 48)
    said = launch(*options, "--repeats", 1, "--device", "cpu", "--output", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["ratios"]
    step, sampled, memory, *processes = rows
    assert "231 windows" in step["name"] and "23 sampled windows over one with all 231" in sampled["name"]
    assert all(row[key] > 0 for row in (step, sampled) for key in ("ratio", "seconds", "bare_seconds"))
    # a step on a large image holds at least what each block keeps of it for the way back
    tokens, hidden, mlp, blocks = 32 * 64, 32, 48, 2
    kept = 4 * tokens * blocks * (6 * hidden + 2 * mlp) / 2**20
    assert kept < memory["megabytes"] < 1000
    if not processes:  # two processes need two cores
        assert "two cores" in said
        return
    steps, whole = processes
    two, one = steps["images_per_second"], steps["bare_images_per_second"]
    assert "4 images per step" in steps["name"] and steps["ratio"] == pytest.approx(two / one)
    # steps of this model take milliseconds, and importing torch alone takes longer than all of them
    assert all(seconds > 48 / rate for seconds, rate in ((whole["seconds"], two), (whole["bare_seconds"], one)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot give a process fewer cores")
def test_two_processes_on_one_core_are_left_out(tmp_path, vision_model):
    vision_model.save_pretrained(tmp_path)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # the process inherits it
    try:
        options = ("--suite", "distill", "--model", tmp_path, "--height", 96, "--width", 128, "--repeats", 1)
        said = launch(*options, "--device", "cpu", "--output", tmp_path / "rows.json")
    finally:
        os.sched_setaffinity(0, cores)
    assert "two cores" in said and len(json.loads((tmp_path / "rows.json").read_text())["ratios"]) == 3
