"""Presets: the published recipes against the facts about them, and what they meant in runs of earlier versions."""

import json
from dataclasses import asdict
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from tiny_models import CONFIGS
from transformers import CLIPVisionConfig, DINOv3ViTConfig, SiglipVisionConfig

from spar_hf import SparConfig, SparImageProcessorPil, SparVisionModel
from spar_hf.data.augmentation import Views, draw_crop, view_generator
from spar_hf.data.order import MapOrder, Sample
from spar_hf.data.training_images import TrainingImages
from spar_hf.distillation import cache_teacher
from spar_hf.distillation.cache_teacher import CacheOptions
from spar_hf.distillation.dry_run import option_rows, show_options
from spar_hf.distillation.models import make_teacher
from spar_hf.distillation.optimisation import Optimisation
from spar_hf.distillation.options import DistillationOptions, OptimisationOptions, StudentOptions, WindowOptions
from spar_hf.distillation.presets import EARLIER_PRESETS, PRESETS
from spar_hf.distillation.recipes import parse_options
from spar_hf.distillation.student import Student
from spar_hf.distillation.trainer import main
from spar_hf.utils.checkpoints import differences
from spar_hf.utils.errors import UsageError

# What the paper and its code do, written down from them: option, as the table prints it, and value.
PUBLISHED = {
    "epochs": "10.0",
    "learning_rate": "2e-05",
    "lr_scheduler_type": "constant",  # no decay
    "warmup_ratio": "0.0",
    "max_grad_norm": "0.0",  # no clipping
    "weight_decay": "0.0001",
    "mixed_precision": "fp16",
    "shuffle": "False",
    "stride": "24",
    "rope_window_size": "384",  # DINOv3.txt
    "window_size": "",  # SigLIP2 512 and OpenCLIP 224: those of the checkpoints
    "teacher_mode": "full",
    "teacher_scales": "",
    "teacher_sides": "",
    "teacher_flip": "False",
    "long_side_pixels": "2048",
    "short_side_pixels": "1024",
    "min_side_pixels": "512",
    "min_scale": "0.5",
    "resample": "bilinear",
    "fixed_views": "True",  # images and targets are drawn once
    "crop_probability": "0.5",
    "flip_probability": "0.5",
    "jitter_probability": "0.0",
    "jitter_student_only": "False",
    "cutmix_probability": "0.0",
    "whiten": "0.0",
    "words": "[]",
    "student": "[]",
    "local_start": "",
    "position_extent": "",
    "lora_rank": "",
    "train_parts": "[]",
}
TRAINED = {
    "spar": {"train_layers": "2"},
    "spar-all": {"train_layers": "all"},
    "spar-all-hires": {
        "train_layers": "all",
        "long_side_pixels": "2560",
        "short_side_pixels": "2560",
        "min_scale": "0.2",
    },
}


def table_of(text):
    """Option -> value of a printed table."""
    lines = [line.split() for line in text.splitlines()]
    names = set(DistillationOptions.from_flat(model="m", images=["i"], output="o").flat)
    starts = text[text.index(" option") :].splitlines()[0]
    value, default = starts.index("value"), starts.index("default")
    cells = {
        words[0]: line for words, line in zip(lines, text.splitlines(), strict=True) if words and words[0] in names
    }
    return {name: line[value:default].strip() for name, line in cells.items()}


@pytest.mark.parametrize("preset", TRAINED)
def test_dry_run_prints_the_published_recipe(preset, capsys):
    assert main(["--preset", preset, "--dry_run"]) is None  # without model, images and output
    said = capsys.readouterr().out
    table, facts = table_of(said), PUBLISHED | TRAINED[preset]
    assert {name: table[name] for name in facts} == facts
    assert "*" not in said.split("* not as published")[0]  # nothing is marked as not published
    said = " ".join(said.split())
    assert "SigLIP2 512 px, OpenCLIP 224 px" in said and "(DINOv3.txt) 384 px" in said
    assert "Published: 2, one on each of two devices" in said and "smallest training loss" in said


def test_dry_run_marks_what_is_not_published():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    options = parse_options(["--preset", "spar-hf", "--dry_run", "--learning_rate", "1e-4", "--window_size", "64"])
    show_options(options, console)
    said = console.export_text()
    marked = {line.split()[0] for line in said.splitlines() if " * " in f"{line} "[:40]}
    assert {"learning_rate", "shuffle", "fixed_views", "resample", "train_layers", "lr_scheduler_type"} <= marked
    assert {"teacher_windows", "window_size", "max_grad_norm", "mixed_precision"} <= marked  # off in the paper, or None
    assert "stride" not in marked and "64 px for every model" in said
    values = {name: (value, default, published) for name, value, default, published in option_rows(options)}
    assert values["stride"] == (24, 24, 24) and values["learning_rate"] == (1e-4, 2e-5, 2e-5)
    assert "dry_run" not in values


@pytest.mark.parametrize(
    ("backbone", "window"),
    [
        (SiglipVisionConfig(image_size=512, patch_size=16), 512),
        (CLIPVisionConfig(image_size=224, patch_size=16, projection_dim=8), 224),
        (DINOv3ViTConfig(image_size=224, patch_size=16), 384),
    ],
)
def test_windows_of_the_published_families(backbone, window):
    backbone.num_hidden_layers, backbone.hidden_size, backbone.intermediate_size, backbone.num_attention_heads = (
        1,
        8,
        8,
        1,
    )
    model = SparVisionModel(SparConfig(backbone_config=backbone))
    flat = DistillationOptions.from_flat(model="m", images=["i"], output="o", preset="spar")
    assert make_teacher(model, flat.teacher).window_size == window
    plain = make_teacher(model, WindowOptions(model="m"))
    assert plain.window_size == backbone.image_size  # without a preset as before
    assert make_teacher(model, WindowOptions(model="m", window_size=64, rope_window_size=384)).window_size == 64


def test_a_cache_is_made_with_the_same_preset(base_folder, image_folder, tmp_path, monkeypatch):
    """The published training runs the teacher once: the cache holds the views that training by itself would draw."""
    known = {name for part in CacheOptions.parts().values() for name in part.__dataclass_fields__}
    for preset in PRESETS:
        cache = CacheOptions.from_flat(model="m", images=["i"], output="o", preset=preset).flat
        whole = DistillationOptions.from_flat(model="m", images=["i"], output="o", preset=preset).flat
        assert {name: cache[name] for name in PRESETS[preset].keys() & known} == {
            name: whole[name] for name in PRESETS[preset].keys() & known
        }
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    small = ["--long_side_pixels", "96", "--short_side_pixels", "80", "--min_side_pixels", "48", "--stride", "32"]
    words = ["--model", str(base_folder), "--images", str(image_folder), "--output", str(tmp_path / "cache")]
    words += [*small, "--preset", "spar", "--mixed_precision", "no", "--holdout_every", "3"]
    cache = cache_teacher.main(words)
    views, names = parse_options(["--preset", "spar", *words[:6], *small]).views, set()
    assert asdict(views) == {name: cache.setting[name] for name in asdict(views)} and views.fixed_views
    for shard in cache.shards:
        for entry in shard["maps"]:
            path = (tmp_path / "cache" / entry["image"]).resolve()
            crop = draw_crop(Image.open(path).size, 64, 16, views, view_generator(0, str(path)))
            assert json.loads(json.dumps(crop.record)) == entry["crop"]
            names.add(path.name)
    assert len(names) == len(cache) == 4


def test_fixed_views_do_not_change_from_epoch_to_epoch(image_folder):
    files = sorted(map(str, image_folder.glob("*.jpg")))
    for fixed in (True, False):
        images = TrainingImages([], SparImageProcessorPil(), 64, 16, Views(fixed_views=fixed, min_scale=0.3))
        shapes = [images[Sample(index, files[0], files[0], [])].pixel_values for index in range(0, 40, 8)]
        same = all(shape.shape == shapes[0].shape and torch.equal(shape, shapes[0]) for shape in shapes)
        assert same == fixed


@pytest.mark.parametrize("given", [{"fixed_views": True}, {"teacher_mode": "cached", "teacher_cache": "c"}])
def test_sizes_that_images_keep_are_not_drawn_for_every_step(given):
    with pytest.raises(UsageError, match="--same_size"):
        DistillationOptions.from_flat(model="m", images=["i"], output="o", same_size=2, **given)


def test_own_presets_are_complete_and_differ_from_the_published():
    for name in ("spar-hf", "spar-hf-siglip"):
        flat = DistillationOptions.from_flat(model="m", images=["i"], output="o", preset=name).flat
        assert (flat["lr_scheduler_type"], flat["warmup_ratio"], flat["max_grad_norm"]) == ("cosine", 0.05, 1.0)
        assert flat["teacher_mode"] == "sampled" and flat["shuffle"] and not flat["fixed_views"]
        assert flat["resample"] == "bicubic" and flat["long_side_pixels"] is None
        assert (flat["local_start"] is not None) == (name == "spar-hf-siglip")


def test_an_option_replaces_what_it_contradicts():
    def read(**given):
        return DistillationOptions.from_flat(model="m", images=["i"], output="o", **given)

    assert read(preset="spar", long_side_windows=3.5).views.min_side_pixels is None
    assert read(preset="spar-hf", teacher_mode="full").teacher.teacher_windows is None
    words = ["--model", "m", "--images", "i", "--output", "o", "--preset"]
    assert parse_options([*words, "spar", "--short_side", "3"]) == read(preset="spar", short_side_windows=3.0)
    assert parse_options([*words, "spar-hf", "--teacher_mode", "full"]) == read(preset="spar-hf", teacher_mode="full")
    assert read(preset="spar", steps=3).optimisation.epochs is None
    with pytest.raises(UsageError, match="--short_side_pixels"):
        read(long_side_pixels=2048)


# Runs of earlier versions


def earlier_recipe(preset, **changed):
    """What a run with this preset wrote to `recipe.yaml` before the presets were the published recipes."""
    recipe = DistillationOptions.from_flat(model="m", images=["i"], output="o").flat | EARLIER_PRESETS[preset]
    recipe |= {"preset": preset, "steps": None, "long_side": recipe.pop("long_side_windows")} | changed
    new = "shuffle max_grad_norm resample fixed_views rope_window_size dry_run long_side_pixels short_side_pixels"
    return {name: value for name, value in recipe.items() if name not in (*new.split(), "min_side_pixels")}


@pytest.mark.parametrize("preset", EARLIER_PRESETS)
def test_a_recipe_of_an_earlier_run_means_what_it_meant(preset, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(earlier_recipe(preset)))
    read = parse_options([str(recipe)])
    for name, value in EARLIER_PRESETS[preset].items():
        assert read.flat[name] == value, name
    assert (read.optimisation.lr_scheduler_type, read.optimisation.max_grad_norm) == ("cosine", 1.0)
    assert read.views.long_side_pixels is None and read.images.shuffle and read.run.preset == preset


def test_an_earlier_run_is_resumed_by_the_same_command(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    words = ["--model", "m", "--images", "i", "--output", str(run), "--preset", "spar"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(earlier_recipe("spar", output=str(run))))
    resumed = parse_options([*words, "--resume"])
    then = resumed.with_current_names(earlier_recipe("spar", output=str(run)))
    assert differences(then, resumed.settings) == ""
    assert resumed == DistillationOptions.from_flat(
        model="m", images=["i"], output=str(run), preset="spar", resume=True
    )
    # a new run there, and a run of today, have the published preset
    today = parse_options(words)
    assert today.optimisation.lr_scheduler_type == "constant" and today.views.min_side_pixels == 512
    (run / "recipe.yaml").write_text(yaml.safe_dump(today.flat))
    assert parse_options([*words, "--resume"]).settings == today.settings
    assert parse_options([str(run / "recipe.yaml")]).flat == today.flat


@pytest.mark.parametrize("later", [{"max_grad_norm": 0.0}, {"shuffle": False}, {"resample": "bilinear"}])
def test_a_later_option_is_a_difference_to_an_earlier_run(later):
    stored = earlier_recipe("spar")
    now = DistillationOptions.from_flat(**(DistillationOptions.with_current_names(stored) | later))
    assert f"--{next(iter(later))}" in differences(now.with_current_names(stored), now.settings)


# What the new options do


def test_order_without_shuffling_is_that_of_the_images():
    images = SimpleNamespace(sample=lambda number, index, after: Sample(index, str(number), "", after), __len__=None)

    class Images:
        sample = staticmethod(images.sample)

        def __len__(self):
            return 3

    names = [sample.name for sample in islice(MapOrder(Images(), 0, 0, 1, shuffle=False), 7)]
    assert names == ["0", "1", "2", "0", "1", "2", "0"]
    second = [sample.name for sample in islice(MapOrder(Images(), 0, 1, 2, start=[1], shuffle=False), 2)]
    assert second == ["0", "2"]


@pytest.mark.parametrize(("norm", "clipped"), [(1.0, True), (0.0, False)])
def test_gradients_are_shortened_or_left(norm, clipped, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    student = Student(SparVisionModel(SparConfig(backbone_config=CONFIGS["siglip"]())), StudentOptions(), None)
    options = OptimisationOptions(max_grad_norm=norm)
    optimisation = Optimisation(Accelerator(), student, options, steps=2)
    seen = []
    monkeypatch.setattr(
        optimisation.optimizer, "step", lambda: seen.extend(p.grad.norm() for p in optimisation.parameters)
    )
    loss = 1000 * optimisation.wrapped(torch.randn(1, 3, 32, 32)).feature_map.square().sum()
    optimisation.step(loss)
    assert (float(torch.stack(seen).norm()) <= 1.001) == clipped
