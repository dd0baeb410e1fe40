"""The distillation script, really launched, and the pieces whose correctness training depends on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from distill import Options, augment, choose_parameters, decision_loss, distillation_loss, error_weights, split_photos
from PIL import Image
from test_backbones import CONFIGS
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from spar_hf import SparConfig, SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor, SparVisionModel

TRAINING = Path(__file__).parents[1] / "training"


@pytest.fixture
def base(tmp_path, two_towers, tokenizer):
    folder = tmp_path / "base"
    two_towers.save_pretrained(folder)
    SparProcessor(SparImageProcessorPil(size={"shortest_edge": 128}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((150 + 11 * i, 110), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


def command_line(base, photos, output, *options, processes=1):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    if processes > 1:
        command += ["--multi_gpu", "--main_process_port", "0"]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        str(TRAINING / "distill.py"),
    ]
    command += ["--model", str(base), "--images", str(photos), "--output", str(output), "--workers", "0"]
    return [*command, "--holdout_every", "3", "--log_steps", "5", *map(str, options)]


ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(base, photos, output, *options, processes=1):
    command = command_line(base, photos, output, *options, processes=processes)
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr[-3000:]
    return output / "model"


def test_student_nears_the_teacher_and_keeps_both_towers(base, photos, tmp_path):
    options = ("--steps", 40, "--learning_rate", 1e-3, "--train_layers", "all", "--stride", 24, "--eval_steps", 20)
    options += ("--words", "cityscapes", "--words_weight", 0.1)
    folder = launch(base, photos, tmp_path / "run", *options)
    record = AutoConfig.from_pretrained(folder).distillation
    assert record["held_out"]["after"]["mse"] < 0.8 * record["held_out"]["before"]["mse"]
    assert (record["stride"], record["window_size"], record["photos"], record["steps"]) == (24, 64, 4, 40)

    student = SparForOpenVocabSegmentation.from_pretrained(folder)
    teacher = SparForOpenVocabSegmentation.from_pretrained(base)
    text, before = student.text_model.state_dict(), teacher.text_model.state_dict()
    assert all(torch.equal(text[name], before[name]) for name in before)
    assert AutoProcessor.from_pretrained(folder).tokenizer("sky")["input_ids"]
    assert (
        "distillation" in (folder / "README.md").read_text() and str(tmp_path) not in (folder / "README.md").read_text()
    )
    curve = record["held_out"]["curve"]
    assert [point["step"] for point in curve] == [20, 40]
    assert record["held_out"]["after"] == min(curve, key=lambda point: point["mse"])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(5, 41, 5))
    assert all(0 < row["teacher_share"] < 1 for row in log)


def test_only_the_last_blocks_change_and_runs_repeat(base, photos, tmp_path):
    options = ("--steps", 3, "--learning_rate", 1e-3, "--train_layers", 1, "--teacher_windows", 2)
    weights = [AutoModel.from_pretrained(launch(base, photos, tmp_path / name, *options)).state_dict() for name in "ab"]
    before = AutoModel.from_pretrained(base).state_dict()
    changed = {name for name in before if not torch.equal(before[name], weights[0][name])}
    assert changed and all(name.startswith("backbone.encoder.layers.1.") for name in changed)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in before)


def test_a_vision_only_base_gives_a_vision_only_student(base, photos, tmp_path):
    vision = tmp_path / "vision"
    AutoModel.from_pretrained(base).save_pretrained(vision)
    SparImageProcessorPil().save_pretrained(vision)
    folder = launch(vision, photos, tmp_path / "run", "--steps", 2)
    assert AutoConfig.from_pretrained(folder).text_config is None
    assert type(AutoModel.from_pretrained(folder)) is SparVisionModel


def curve(folder):
    return [(row["step"], row["loss"]) for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_to_the_last_bit(base, photos, tmp_path, processes):
    setting = ("--steps", 24, "--learning_rate", 1e-3, "--train_layers", "all", "--teacher_windows", 3)
    setting += ("--save_steps", 3, "--eval_steps", 12, "--gradient_accumulation_steps", 2)
    expected = launch(base, photos, tmp_path / "whole", *setting, processes=processes)

    killed = tmp_path / "killed"
    command = command_line(base, photos, killed, *setting, processes=processes)
    run = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.DEVNULL)
    while run.poll() is None and not list(killed.glob("checkpoint-*/state.json")):
        time.sleep(0.01)
    time.sleep(0.05)
    assert run.poll() is None, "the run was over before it could be killed"
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (killed / "checkpoint-21").exists()
    # what a kill in the middle of writing leaves behind
    (killed / ".checkpoint-99.partial").mkdir()
    with (killed / "log.jsonl").open("a") as log:
        log.write('{"step": 23, "lo')
    found = launch(base, photos, killed, *setting, "--resume", processes=processes)

    assert curve(killed) == curve(tmp_path / "whole") and len(curve(killed)) == 4
    weights, resumed = AutoModel.from_pretrained(expected).state_dict(), AutoModel.from_pretrained(found).state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
    assert len(list(killed.glob("checkpoint-*"))) == 2  # older ones are rotated away


def test_two_processes_train_as_one_with_the_doubled_batch(base, photos, tmp_path):
    setting = ("--steps", 4, "--learning_rate", 1e-3, "--train_layers", "all", "--stride", 32)
    one = launch(base, photos, tmp_path / "one", *setting, "--gradient_accumulation_steps", 2)
    two = launch(base, photos, tmp_path / "two", *setting, processes=2)
    start, expected = AutoModel.from_pretrained(base).state_dict(), AutoModel.from_pretrained(one).state_dict()
    for name, weight in AutoModel.from_pretrained(two).state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=2e-5, rtol=0)
        assert (weight - start[name]).abs().max() > 2e-4 or "k_proj.bias" in name or "head." in name


def test_ctrl_c_keeps_what_was_done(base, photos, tmp_path):
    command = command_line(base, photos, tmp_path / "run", "--steps", 3000, "--teacher_windows", 2)
    run = subprocess.Popen(
        [*command[:1], *command[command.index(str(TRAINING / "distill.py")) :]],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while run.poll() is None and not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0 and "--resume" in said
    assert len(list((tmp_path / "run").glob("checkpoint-*/state.json"))) == 1


def options(**kwargs):
    return Options(model="m", images=["x"], output="o", **kwargs)


@pytest.mark.parametrize("size", [(1600, 900), (480, 360), (200, 700), (60, 50)])
def test_augmented_photos_follow_the_recipe(size):
    photo = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    whole = options(crop_probability=0.0, min_scale=1.0)
    width, height = augment(photo, 192, 16, whole, Random(0)).size
    # the largest size that fits 4 × 2 windows, floored to patches, never distorted by more than a patch
    factor = min(768 / max(size), 384 / min(size))
    assert (width, height) == tuple(int(side * factor + 1e-3) // 16 * 16 for side in size)
    for seed in range(30):
        width, height = augment(photo, 192, 16, options(), Random(seed)).size
        assert width % 16 == 0 and height % 16 == 0
        assert max(width, height) <= 768 and min(width, height) <= 384
        assert min(width, height) >= min(160, min(size) * factor * 0.5 - 16)


def test_augmentation_crops_the_right_place():
    """A photo whose red channel is its column and green its row: values tell where a crop was taken."""
    rows, columns = np.mgrid[0:192, 0:256]
    photo = Image.fromarray(np.stack([columns, rows, columns * 0], -1).astype(np.uint8))
    no_flip = options(long_side=4 / 3, short_side=1.0, min_scale=1.0, flip_probability=0.0, crop_probability=1.0)
    for seed in range(10):
        crop = np.asarray(augment(photo, 96, 16, no_flip, Random(seed))).astype(int)
        step = np.diff(crop[crop.shape[0] // 2, :, 0])
        assert (step.mean() == pytest.approx(2, abs=0.05)) and (
            np.diff(crop[:, 5, 1]).mean() == pytest.approx(2, abs=0.05)
        )


def test_loss_is_the_mean_squared_error():
    student, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    assert distillation_loss(student, target) == pytest.approx(float((student - target).pow(2).mean()))
    weighted = distillation_loss(student, F.interpolate(target, scale_factor=2), torch.full((6, 8), 0.25))
    assert weighted == pytest.approx(float((student - target).pow(2).mean()), rel=1e-5)


def test_trainable_parameters(vision_model):
    probe = vision_model.backbone.head.probe.numel()  # the pooling query, which dense features do not read
    everything = sum(p.numel() for p in vision_model.parameters()) - probe
    last = sum(p.numel() for p in vision_model.backbone.encoder.layers[1].parameters())
    assert sum(p.numel() for p in choose_parameters(vision_model, "1")) == last
    assert sum(p.numel() for p in choose_parameters(vision_model, "all")) == everything


@pytest.mark.parametrize("readout", ["naflex", "maskclip", "dinov3", "dinov3txt"])
@pytest.mark.parametrize("train_layers", ["1", "all"])
def test_what_is_trained_gets_a_gradient_in_every_family(readout, train_layers):
    model = SparVisionModel(SparConfig(backbone_config=CONFIGS[readout](), readout=readout))
    trained = choose_parameters(model, train_layers)
    model(torch.randn(1, 3, 40, 48)).feature_map.square().mean().backward()
    assert trained and all(parameter.grad is not None for parameter in trained)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if train_layers == "1":
        assert all(".1." in name for name in names)  # of two blocks the last
    else:
        assert len(names) > 20


def test_decisions_over_words_are_compared():
    """The divergence of the decisions, against torch's of the plain softmaxes; cells of a patch count with their weight."""
    generator = torch.Generator().manual_seed(0)
    student, target = torch.randn(2, 2, 6, 3, 4, generator=generator)
    texts = F.normalize(torch.randn(5, 6, generator=generator), dim=-1)
    softmax = [
        (F.normalize(x, dim=1).permute(0, 2, 3, 1) @ texts.T * 40).flatten(0, 2).softmax(-1) for x in (student, target)
    ]
    expected = F.kl_div(softmax[0].log(), softmax[1], reduction="batchmean")
    torch.testing.assert_close(decision_loss(student, target, texts, 40.0), expected, rtol=1e-3, atol=1e-4)
    assert decision_loss(student, student, texts, 40.0).abs() < 1e-5
    cells = target.repeat_interleave(2, 2).repeat_interleave(2, 3)
    weighted = decision_loss(student, cells, texts, 40.0, torch.full((6, 8), 0.25))
    torch.testing.assert_close(weighted, expected, rtol=1e-3, atol=1e-4)


def test_whitening_counts_axes_alike():
    """Along an axis of a hundredfold variance an error counts a hundredth at full power, as much at none."""
    noise = torch.randn(1, 2, 40, 40, generator=torch.Generator().manual_seed(0))
    target = noise * torch.tensor([10.0, 1.0]).view(1, 2, 1, 1)
    full, none = error_weights([target], 1.0), error_weights([target], 0.0)
    assert float(full[1, 1] / full[0, 0]) == pytest.approx(10, rel=0.1)
    torch.testing.assert_close(none, torch.eye(2), atol=1e-4, rtol=0)


def test_split_holds_out_and_excludes(photos):
    kept = Options(model="m", images=[str(photos)], output="o", exclude=["1*"], holdout_every=2)
    train, held_out = split_photos(kept)
    assert [p.stem for p in train] == ["0", "3", "5"] and [p.stem for p in held_out] == ["2", "4"]
    with pytest.raises(ValueError, match="No photo is left"):
        split_photos(Options(model="m", images=[str(photos)], output="o", exclude=["*"]))


@pytest.mark.parametrize(
    "bad", [{"train_layers": "0"}, {"train_layers": "x"}, {"min_scale": 0.0}, {"teacher_windows": 0}]
)
def test_bad_options_are_refused_before_work_starts(bad):
    with pytest.raises(ValueError, match="--"):
        options(**bad)


@pytest.mark.parametrize("family", ["dinov3", "clip"])
def test_distils_a_backbone_as_the_hub_holds_it(family, photos, tmp_path, tokenizer):
    """No conversion first: a vision-only DINOv3 and a two-tower CLIP, with their image statistics and tokenizer."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "dinov3":
        model = DINOv3ViTModel(DINOv3ViTConfig(**shape, image_size=64, num_register_tokens=4))
    else:
        text = shape | {"vocab_size": 64, "max_position_embeddings": 16, "projection_dim": 24, "eos_token_id": 1}
        vision = shape | {"image_size": 64, "patch_size": 16, "projection_dim": 24}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        tokenizer.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "hub")
    statistics = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(statistics))
    options = ("--steps", 6, "--learning_rate", 1e-3, "--train_layers", "all", "--teacher_windows", 2, "--whiten", 0.5)
    # two processes: a parameter without gradient would stop them
    folder = launch(tmp_path / "hub", photos, tmp_path / "run", *options, processes=2)
    student = AutoModel.from_pretrained(folder)
    assert student.config.readout == ("dinov3" if family == "dinov3" else "maskclip")
    assert list(AutoImageProcessor.from_pretrained(folder).image_mean) == [0.4] * 3
    base = SparVisionModel.from_backbone(str(tmp_path / "hub"))
    changed = [n for n, p in student.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert len(changed) > 10
    if family == "clip":
        both = SparForOpenVocabSegmentation.from_pretrained(folder)
        expected = model.text_projection.weight
        torch.testing.assert_close(both.text_model.text_projection.weight, expected)
        assert AutoProcessor.from_pretrained(folder).tokenizer("a road")["input_ids"]
