"""What version 0.1 wrote: its checkpoints resume and its teacher caches are read, to the same numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from distilling import distil, log_of
from transformers import AutoConfig, AutoModel

from spar_hf.distillation import TeacherCache
from spar_hf.distillation.cache_teacher import main

ASSETS = Path(__file__).parent / "assets" / "version-0.1"
EXPECTED = json.loads((ASSETS / "expected.json").read_text())
# the options of both runs and of the cache, with paths relative to the folder of the assets
COMMON = ("--stride", 12, "--seed", 3, "--holdout_every", 3)
RUN = (*COMMON, "--steps", 6, "--log_steps", 1, "--eval_steps", 3, "--picture_steps", 0, "--learning_rate", 1e-3)
RUN += ("--report_to", "none")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the assets as the working directory."""
    shutil.copytree(ASSETS, tmp_path / "assets")
    monkeypatch.chdir(tmp_path / "assets")
    return tmp_path / "assets"


def assert_same_numbers(output, expected):
    assert [row["loss"] for row in log_of(output)] == pytest.approx(expected["losses"], rel=1e-4)
    held_out = AutoConfig.from_pretrained(output / "model").distillation["held_out"]
    assert held_out["before"] == pytest.approx(expected["before"], rel=1e-4)
    for found, point in zip(held_out["curve"], expected["curve"], strict=True):
        assert found == pytest.approx(point, rel=1e-3)


def test_a_checkpoint_resumes(folder):
    options = ("--save_steps", 3, "--train_layers", 1, "--teacher_windows", 3, "--jitter_probability", 0.5, "--resume")
    distil("base", "photos", folder / "run", *RUN, *options)
    assert_same_numbers(folder / "run", EXPECTED["run"])
    # the image that cannot be read was listed by the first half, and is not listed again
    assert (folder / "run" / "skipped.jsonl").read_text() == (ASSETS / "run" / "skipped.jsonl").read_text()


def test_a_checkpoint_is_not_resumed_with_other_options(folder):
    with pytest.raises(ValueError, match=r"--jitter_probability \(was 0.5, is 0.0\)"):
        distil("base", "photos", folder / "run", *RUN, "--train_layers", 1, "--teacher_windows", 3, "--resume")


def test_a_recipe_repeats_the_run(folder):
    shutil.rmtree(folder / "run" / "checkpoint-3")
    distil("base", "photos", folder / "again", recipe=folder / "run" / "recipe.yaml")
    assert_same_numbers(folder / "again", EXPECTED["run"])


def test_a_cache_is_trained_on(folder):
    options = ("--train_layers", "all", "--teacher_mode", "cached", "--teacher_cache", "cache")
    distil("base", "photos", folder / "cached", *RUN, *options)
    assert_same_numbers(folder / "cached", EXPECTED["cached-run"])


@pytest.mark.parametrize("value", ["eager", "fused"])
def test_a_cache_is_recognised_by_a_later_transformers(folder, monkeypatch, value):
    """A setting that a later version adds to a backbone counts only where it is not the default."""
    model = AutoModel.from_pretrained("base")
    kind, own = type(model.config.backbone_config), model.config.backbone_config
    to_dict = kind.to_dict
    added = {True: value, False: "eager"}
    monkeypatch.setattr(kind, "to_dict", lambda config: to_dict(config) | {"added": added[config is own]})
    if value == "eager":
        assert len(TeacherCache.open("cache", model=model)) == 8
    else:
        with pytest.raises(ValueError, match="another setting: model"):
            TeacherCache.open("cache", model=model)


def test_a_cache_goes_on(folder, monkeypatch):
    """A shard that is missing is made again by the same command, as it was; the others are kept."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = AutoModel.from_pretrained("base")
    targets = [TeacherCache.open("cache", model=model).target(i) for i in range(8)]
    manifest = json.loads((folder / "cache" / "manifest.json").read_text())
    for file in (folder / "cache").glob("maps-00001.*"):
        file.unlink()
    kept = (folder / "cache" / "maps-00000.safetensors").stat().st_mtime_ns
    options = (*COMMON, "--jitter_probability", 0.5, "--views", 2, "--shard_maps", 4)
    cache = main([*map(str, ("--model", "base", "--images", "photos", "--output", "cache", *options))])
    assert (folder / "cache" / "maps-00000.safetensors").stat().st_mtime_ns == kept
    assert [shard["maps"] for shard in cache.shards] == [shard["maps"] for shard in manifest["shards"]]
    for i, target in enumerate(targets):
        torch.testing.assert_close(cache.target(i), target, atol=1e-2, rtol=1e-2)  # stored in bfloat16
