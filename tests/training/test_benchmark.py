"""The benchmark runs on every family it knows and compares like with like."""

import os

import benchmark_distill
import pytest
import torch
from benchmark import Options, load, plain_pass, run
from tiny_models import CONFIGS, randomise

from spar_hf import SparConfig, SparVisionModel


@pytest.mark.parametrize("readout", ["siglip", "maskclip", "dinov3", "dinov3txt"])
@torch.no_grad()
def test_both_sides_compute_the_same(readout, tmp_path):
    model = randomise(SparVisionModel(SparConfig(backbone_config=CONFIGS[readout](), readout=readout)))
    pixels = torch.randn(1, 3, 48, 64)
    features = model(pixels).feature_map.flatten(2).transpose(1, 2)
    torch.testing.assert_close(plain_pass(model, pixels), features, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    rows = run(Options(model=str(tmp_path), height=48, width=64, repeats=2, device="cpu"))
    assert len(rows) == 3 and all(row["ratio"] > 0 and row["seconds"] > 0 for row in rows)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="siglip2, openclip, dinov3txt"):
        load(Options(random="resnet"))


def test_every_suite_of_the_folder_is_known():
    with pytest.raises(ValueError, match=r"use vision or one of .*distill"):
        run(Options(suite="speed"))


def test_a_distillation_step_is_measured(tmp_path, vision_model):
    vision_model.save_pretrained(tmp_path)
    options = Options(model=str(tmp_path), height=96, width=128, stride=16, repeats=1, device="cpu")
    step, sampled = benchmark_distill.step_rows(options)
    assert "15 windows" in step["name"] and "1 sampled windows over one with all 15" in sampled["name"]
    assert all(row[key] > 0 for row in (step, sampled) for key in ("ratio", "seconds", "bare_seconds"))


def test_memory_is_that_of_a_process_of_its_own(tmp_path, vision_model):
    """A step on a large image holds at least what each block keeps of it for the way back."""
    vision_model.save_pretrained(tmp_path)
    options = Options(model=str(tmp_path), height=512, width=1024, device="cpu")
    tokens, hidden, mlp, blocks = 32 * 64, 32, 48, 2
    kept = 4 * tokens * blocks * (6 * hidden + 2 * mlp) / 2**20
    assert kept < benchmark_distill.memory_in_new_process(options, 2) < 1000


@pytest.mark.skipif(benchmark_distill.places("cpu") < 2, reason="two processes need two cores")
def test_two_processes_are_measured_against_one__steps_apart_from_the_start(tmp_path, vision_model):
    vision_model.save_pretrained(tmp_path)
    options = Options(model=str(tmp_path), height=96, width=128, stride=16, repeats=1, device="cpu")
    steps, start = benchmark_distill.process_rows(options)
    two, one = steps["images_per_second"], steps["bare_images_per_second"]
    assert "4 images a step" in steps["name"] and steps["ratio"] == pytest.approx(two / one)
    # steps of this model take milliseconds, and importing torch alone takes longer than all of them
    assert all(seconds > 48 / rate for seconds, rate in ((start["seconds"], two), (start["bare_seconds"], one)))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot give a process fewer cores")
def test_two_processes_on_one_core_are_left_out(vision_model, caplog):
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert benchmark_distill.process_rows(Options(device="cpu")) == []
    finally:
        os.sched_setaffinity(0, cores)
    assert "two cores" in caplog.text
