"""The distillation script from options to written folders, run in this process; test_distill_resume.py launches it."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from distilling import curve, distil, log_of
from PIL import Image
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

from spar_hf import SlidingWindowTeacher, SparForOpenVocabSegmentation, SparImageProcessorPil, SparVisionModel
from spar_hf.distillation.cache_teacher import CacheOptions, make_cache
from spar_hf.distillation.recipes import parse_options
from spar_hf.distillation.trainer import main
from spar_hf.utils.errors import UsageError


def test_student_nears_the_teacher_and_says_how(base_folder, image_folder, tmp_path):
    options = ("--steps", 40, "--learning_rate", 1e-3, "--train_layers", "all", "--stride", 24, "--eval_steps", 20)
    options += ("--words", "cityscapes", "--words_weight", 0.1, "--log_steps", 5, "--picture_steps", 40)
    folder = distil(base_folder, image_folder, tmp_path / "run", *options)
    record = AutoConfig.from_pretrained(folder).distillation
    assert record["held_out"]["after"]["mse"] < 0.8 * record["held_out"]["before"]["mse"]
    assert (record["stride"], record["window_size"], record["num_images"], record["steps"]) == (24, 64, 4, 40)

    student = SparForOpenVocabSegmentation.from_pretrained(folder)
    teacher = SparForOpenVocabSegmentation.from_pretrained(base_folder)
    text, before = student.text_model.state_dict(), teacher.text_model.state_dict()
    assert all(torch.equal(text[name], before[name]) for name in before)
    assert AutoProcessor.from_pretrained(folder).tokenizer("sky")["input_ids"]
    points = record["held_out"]["curve"]
    assert [point["step"] for point in points] == [20, 40]
    # the student kept is the best at what was trained on, words as well
    assert record["held_out"]["after"] == min(points, key=lambda point: point["mse"] + 0.1 * point["words"])
    assert all(point["words"] > 0 for point in points)

    card = (folder / "README.md").read_text()
    assert str(tmp_path) not in card and "learning_rate: 0.001" in card
    shown = [name for name in ("curve.png", "step-000040.png") if f"({name})" in card and (folder / name).is_file()]
    assert len(shown) == 2 and Image.open(folder / "step-000040.png").width > 300
    rows = log_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(5, 41, 5))
    assert all(0 < row["teacher_share"] < 1 and 0 <= row["wait_share"] < 1 for row in rows)
    assert all(row["teacher_share"] + row["wait_share"] < 1 and row["memory_gib"] > 0 for row in rows)
    assert list((tmp_path / "run" / "spar-distillation").rglob("events.out.tfevents*"))  # the tracker that is installed
    again = parse_options([str(tmp_path / "run" / "recipe.yaml")])
    assert (again.optimisation.words, again.teacher.stride, again.optimisation.steps) == (["cityscapes"], 24, 40)


def test_only_the_last_blocks_change__runs_repeat_and_damage_is_passed_over(base_folder, image_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "3.jpg").write_bytes((images / "3.jpg").read_bytes()[:500])
    (images / "5.jpg").write_text("held out, and no image")
    options = (
        "--steps",
        6,
        "--learning_rate",
        1e-3,
        "--train_layers",
        1,
        "--teacher_windows",
        2,
        "--report_to",
        "none",
    )
    folders = [distil(base_folder, images, tmp_path / w, *options, "--workers", w, "--log_steps", 1) for w in "02"]
    weights = [AutoModel.from_pretrained(folder).state_dict() for folder in folders]
    before = AutoModel.from_pretrained(base_folder).state_dict()
    changed = {name for name in before if not torch.equal(before[name], weights[0][name])}
    assert changed and all(name.startswith("backbone.encoder.layers.1.") for name in changed)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in before)
    assert curve(tmp_path / "0") == curve(tmp_path / "2")
    listed = [json.loads(line) for line in (tmp_path / "2" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["image"].rpartition("/")[2] for row in listed) == ["3.jpg", "5.jpg"]
    assert log_of(tmp_path / "2")[-1]["skipped"] == 2
    assert AutoConfig.from_pretrained(folders[0]).distillation["held_out"]["images"] == 1


def test_streams_resume_to_the_last_bit(base_folder, image_folder, tmp_path):
    """Rows of a table in passing, a damaged one among them; the second half of the run once more from its checkpoint."""
    import datasets

    files = sorted(image_folder.glob("*.jpg"))
    rows = [{"bytes": path.read_bytes(), "path": None} for path in files] + [{"bytes": b"no image", "path": None}]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features).save_to_disk(tmp_path / "table")
    options = ("--steps", 8, "--save_steps", 3, "--train_layers", "all", "--learning_rate", 1e-3, "--streaming")
    options += ("--teacher_windows", 2, "--log_steps", 1, "--report_to", "none", "--shuffle_buffer", 3)
    whole = distil(base_folder, tmp_path / "table", tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoint-6")
    half = distil(base_folder, tmp_path / "table", tmp_path / "half", *options, "--resume")
    assert curve(tmp_path / "half") == curve(tmp_path / "whole") and len(curve(tmp_path / "half")) == 8
    weights, resumed = (AutoModel.from_pretrained(folder).state_dict() for folder in (whole, half))
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
    skipped = [(tmp_path / run / "skipped.jsonl").read_text() for run in ("whole", "half")]
    assert skipped[0] == skipped[1] and len(skipped[0].splitlines()) == 1  # it has no name, and came up in every epoch
    # other rows are refused, until told to go on
    shutil.rmtree(tmp_path / "half" / "checkpoint-6")
    datasets.Dataset.from_dict({"image": rows[1:]}, features).save_to_disk(tmp_path / "other")
    shutil.rmtree(tmp_path / "table")
    (tmp_path / "other").rename(tmp_path / "table")
    with pytest.raises(UsageError, match=r"1 added \(.*fingerprint.*1 removed .*--allow_changed_data"):
        distil(base_folder, tmp_path / "table", tmp_path / "half", *options, "--resume")
    assert distil(base_folder, tmp_path / "table", tmp_path / "half", *options, "--resume", "--allow_changed_data")


def test_a_run_is_not_mixed_with_another(base_folder, image_folder, tmp_path):
    options = ("--steps", 4, "--save_steps", 2, "--teacher_windows", 2, "--report_to", "none", "--holdout_images", 0)
    distil(base_folder, image_folder, tmp_path / "run", *options)
    with pytest.raises(ValueError, match="--resume"):
        distil(base_folder, image_folder, tmp_path / "run", *options)
    with pytest.raises(ValueError, match=r"--seed \(was 0, is 1\)"):
        distil(base_folder, image_folder, tmp_path / "run", *options, "--resume", "--seed", 1)
    with pytest.raises(FileNotFoundError, match="Start without --resume"):
        distil(base_folder, image_folder, tmp_path / "other", *options, "--resume")
    assert distil(base_folder, image_folder, tmp_path / "run", *options, "--resume", "--workers", 1).is_dir()
    held = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "model.safetensors" in held  # the student once, and no teacher
    size = (tmp_path / "run" / "checkpoint-2" / "model.safetensors").stat().st_size
    assert size < 1.2 * 4 * sum(p.numel() for p in AutoModel.from_pretrained(base_folder).parameters())


def test_adapters_are_saved_by_themselves_and_merged(base_folder, image_folder, tmp_path):
    from peft import PeftModel

    options = ("--steps", 6, "--learning_rate", 1e-2, "--lora_rank", 4, "--merge", "--teacher_windows", 2)
    options += ("--save_steps", 3, "--report_to", "none", "--log_steps", 1, "--train_layers", 1)
    merged = AutoModel.from_pretrained(distil(base_folder, image_folder, tmp_path / "run", *options))
    assert curve(tmp_path / "run")[-1][1] > 0
    adapter = tmp_path / "run" / "adapter"
    small = sum(path.stat().st_size for path in adapter.glob("*.safetensors"))
    assert small < 0.3 * (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    base = AutoModel.from_pretrained(base_folder)
    names = {name for name, weight in base.state_dict().items() if not torch.equal(weight, merged.state_dict()[name])}
    assert names and all(".layers.1." in name and name.endswith("weight") for name in names)
    pixels = torch.randn(1, 3, 80, 112)
    with torch.no_grad():
        before = base(pixels).feature_map
        found = PeftModel.from_pretrained(base, adapter)(pixels).feature_map
        torch.testing.assert_close(found, merged(pixels).feature_map, atol=2e-5, rtol=1e-4)
    assert (found - before).abs().max() > 1e-3
    assert json.loads((adapter / "distillation.json").read_text())["lora_rank"] == 4
    assert str(tmp_path) not in (adapter / "README.md").read_text() + (adapter / "adapter_config.json").read_text()


def test_the_held_out_error_is_measured_in_full_precision(base_folder, image_folder, tmp_path):
    """It decides which student is kept, and half precision would blur it."""
    errors = []
    for precision in ("no", "bf16"):
        options = ("--steps", 1, "--mixed_precision", precision, "--report_to", "none", "--teacher_windows", 1)
        folder = distil(base_folder, image_folder, tmp_path / precision, *options)
        errors.append(AutoConfig.from_pretrained(folder).distillation["held_out"]["before"])
    assert errors[0] == errors[1] and errors[0]["mse"] > 0


def test_the_teacher_reads_images_in_their_own_light(base_folder, image_folder, tmp_path):
    """Student and teacher are equal and each image is one window, so that only other light makes a loss."""
    views = {
        "long_side_windows": 1,
        "short_side_windows": 1,
        "min_scale": 1,
        "crop_probability": 0,
        "jitter_probability": 1,
    }
    run = {"steps": 4, "stride": 32, "holdout_images": 0, "log_steps": 1, "learning_rate": 1e-9}
    options = [part for name, value in (views | run).items() for part in (f"--{name}", value)]
    losses = {}
    for alone in (False, True):
        output = tmp_path / str(alone)
        distil(base_folder, image_folder, output, *options, "--jitter_student_only", alone)
        losses[alone] = [row["loss"] for row in log_of(output)]
    assert max(losses[False]) < 1e-6 and min(losses[True]) > 1e-3


def test_the_teacher_reads_the_sides_that_are_asked_for(base_folder, image_folder, tmp_path, monkeypatch):
    seen, sample, forward = [], SlidingWindowTeacher.sample, SlidingWindowTeacher.forward

    def sampling(self, pixel_values, windows, generator, variant, scales):
        seen.append(scales)
        return sample(self, pixel_values, windows, generator, variant, scales)

    def reading(self, pixel_values, progress=None, scales=None):
        seen.append(scales)
        return forward(self, pixel_values, progress, scales)

    monkeypatch.setattr(SlidingWindowTeacher, "sample", sampling)
    monkeypatch.setattr(SlidingWindowTeacher, "forward", reading)
    options = ("--steps", 2, "--teacher_windows", 1, "--teacher_sides", 64, 96, "--min_scale", 0.3, "--stride", 32)
    folder = distil(base_folder, image_folder, tmp_path / "run", *options, "--holdout_images", 1, "--workers", 0)
    assert len(seen) == 3 and all(scales[1] == pytest.approx(1.5 * scales[0]) for scales in seen)
    assert len({scales[0] for scales in seen}) == 3
    record = AutoConfig.from_pretrained(folder).distillation
    assert record["teacher_sides"] == [64, 96] and record["teacher_scales"] is None


def test_a_cached_teacher_trains_on_its_own_maps(base_folder, image_folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    made = {"model": str(base_folder), "images": [str(image_folder)], "output": str(cache)}
    made |= {"crop_probability": 0.2, "jitter_probability": 0.1, "long_side": 3.0}
    make_cache(CacheOptions.from_flat(views=8, stride=32, holdout_every=3, mixed_precision="no", **made))
    options = ("--stride", 32, "--steps", 40, "--learning_rate", 1e-3, "--train_layers", "all", "--eval_steps", 40)
    options += ("--teacher_mode", "cached", "--teacher_cache", cache)
    calls, run = [], SlidingWindowTeacher.forward
    monkeypatch.setattr(SlidingWindowTeacher, "forward", lambda *a, **k: calls.append(1) or run(*a, **k))
    folder = distil(base_folder, image_folder, tmp_path / "run", *options)
    assert len(calls) == 2  # the held-out images, once
    record = AutoConfig.from_pretrained(folder).distillation
    assert (record["num_images"], record["num_stored_views"]) == (4, 4 * 8)
    # how the stored views were drawn, not what options of this run would have said
    assert (record["crop_probability"], record["jitter_probability"], record["view_size"][0]) == (0.2, 0.1, 3.0)
    assert record["held_out"]["after"]["mse"] < 0.9 * record["held_out"]["before"]["mse"]
    with pytest.raises(ValueError, match="stride is 32 there and 24 here"):
        distil(base_folder, image_folder, tmp_path / "other", *options, "--stride", 24)
    with pytest.raises(ValueError, match="held out here"):
        distil(base_folder, image_folder, tmp_path / "other", *options, "--holdout_every", 2)
    with pytest.raises(ValueError, match="held out here"):  # also if the error is not measured
        distil(base_folder, image_folder, tmp_path / "other", *options, "--holdout_every", 2, "--holdout_images", 0)
    with pytest.raises(UsageError, match=r"--exclude leaves out, such as .*4\.jpg"):
        distil(base_folder, image_folder, tmp_path / "other", *options, "--holdout_every", 3, "--exclude", "4")
    with pytest.raises(ValueError, match="belong together"):
        distil(base_folder, image_folder, tmp_path / "other", "--teacher_mode", "cached")
    others = ("--crop_probability", 0.3, "--min_scale", 0.5, "--long_side_windows", 3.0)  # the last two are as stored
    with pytest.raises(UsageError, match=r"drawn with --crop_probability 0\.2 \(not 0\.3\)\. Leave"):
        distil(base_folder, image_folder, tmp_path / "other", *options, *others)


@pytest.mark.parametrize("family", ["dinov3", "clip"])
def test_distils_a_backbone_as_the_hub_holds_it(family, image_folder, tmp_path, tokenizer):
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
    folder = distil(tmp_path / "hub", image_folder, tmp_path / "run", *options, "--report_to", "none")
    student = AutoModel.from_pretrained(folder)
    assert type(student) is SparVisionModel
    assert student.config.readout == ("dinov3" if family == "dinov3" else "maskclip")
    assert list(AutoImageProcessor.from_pretrained(folder).image_mean) == [0.4] * 3
    base = SparVisionModel.from_backbone(str(tmp_path / "hub"))
    changed = [n for n, p in student.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert len(changed) > 10
    if family == "clip":
        both = SparForOpenVocabSegmentation.from_pretrained(folder)
        torch.testing.assert_close(both.text_model.text_projection.weight, model.text_projection.weight)
        assert AutoProcessor.from_pretrained(folder).tokenizer("a road")["input_ids"]
    else:
        assert AutoConfig.from_pretrained(folder).text_config is None
        assert type(AutoImageProcessor.from_pretrained(folder)) is SparImageProcessorPil


def test_ctrl_c_keeps_what_was_done(base_folder, image_folder, tmp_path, caplog):
    def interrupt():
        while not (tmp_path / "run" / "log.jsonl").is_file() or not (tmp_path / "run" / "log.jsonl").stat().st_size:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    options = ("--steps", 3000, "--teacher_windows", 2, "--log_steps", 1, "--eval_steps", 3000, "--report_to", "none")
    before = signal.getsignal(signal.SIGINT)
    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    with caplog.at_level("INFO"):
        distil(base_folder, image_folder, tmp_path / "run", *options)
    assert "--resume" in caplog.text
    (kept,) = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((kept / "state.json").read_text())["step"] == log_of(tmp_path / "run")[-1]["step"] < 3000
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_of_a_finished_run_says_so(base_folder, image_folder, tmp_path, monkeypatch, caplog):
    arguments = ["--model", base_folder, "--images", image_folder, "--output", tmp_path / "run", "--holdout_every", 3]
    arguments += ["--workers", 0, "--teacher_windows", 2, "--picture_steps", 0, "--report_to", "none", "--resume"]

    def resume(*options):
        monkeypatch.setattr("sys.argv", ["distill.py", *map(str, (*arguments, *options))])
        with caplog.at_level("INFO"):
            main()
        return caplog.messages[-1]

    folder = distil(base_folder, image_folder, tmp_path / "run", *arguments[6:-1], "--steps", 1)
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    assert str(folder) in resume("--steps", 1) and "complete" in caplog.messages[-1]
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(ValueError, match=r"no checkpoint to go on from with --steps \(was 1, is 2\)"):
        resume("--steps", 2)
    with pytest.raises(ValueError, match=r"--save_dtype \(was 'float32', is 'float16'\)"):
        resume("--steps", 1, "--save_dtype", "float16")
    (tmp_path / "run" / "recipe.yaml").touch()  # another run began in the folder since, and was killed
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        resume("--steps", 1)


def test_several_students_start_as_their_mean(base_folder, image_folder, tmp_path):
    options = ("--teacher_windows", 2, "--report_to", "none", "--holdout_images", 0, "--train_layers", "all")
    one = distil(base_folder, image_folder, tmp_path / "1", *options, "--steps", 2, "--learning_rate", 1e-2)
    options += ("--steps", 1, "--learning_rate", 1e-12, "--student")
    found = distil(base_folder, image_folder, tmp_path / "2", *options, base_folder, one)
    base, trained, mean = (AutoModel.from_pretrained(folder).state_dict() for folder in (base_folder, one, found))
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (base[name] + trained[name]) / 2)
    assert any(not torch.equal(trained[name], weight) for name, weight in mean.items())
    assert [Path(name).name for name in AutoConfig.from_pretrained(found).distillation["student"]] == ["base0", "model"]
    fixed = distil(base_folder, image_folder, tmp_path / "3", *options, one, "--position_extent", 128)
    with pytest.raises(ValueError, match=r"span None px, those of .* 128"):
        distil(base_folder, image_folder, tmp_path / "4", *options, one, fixed)
    with pytest.raises(ValueError, match="--student"):
        parse_options(["--model", "m", "--images", "i", "--output", "o", "--student", "a", "b", "--lora_rank", "4"])
