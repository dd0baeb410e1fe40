"""Images and teacher maps in a store (`memory://`): the same maps as on a disk, and distillation reads both from there."""

import json

import fsspec
import pytest
import torch
from distilling import distil, log_of
from transformers import AutoModel
from typer.testing import CliRunner

from spar_hf.cli.main import app
from spar_hf.distillation.cache_teacher import main as cache_teacher
from spar_hf.distillation.teacher_cache import TeacherCache
from spar_hf.utils.folders import Folder

VIEWS = ("--stride", "32", "--window_size", "64", "--views", "2", "--shard_maps", "3", "--holdout_every", "3")


@pytest.fixture
def stored(image_folder):
    """The images in a store, empty but for them."""
    files = fsspec.filesystem("memory")
    if files.exists("/teacher"):
        files.rm("/teacher", recursive=True)
    folder = Folder("memory://teacher/images")
    for image in image_folder.iterdir():
        folder.write(image.name, image.read_bytes())
    return folder


def verify(*arguments):
    result = CliRunner().invoke(app, ["verify", *arguments])
    return result.exit_code, result.output


def test_a_cache_from_a_store_to_a_store(base_folder, image_folder, stored, tmp_path):
    output = "memory://teacher/cache"
    local = cache_teacher(
        ["--model", str(base_folder), *VIEWS, "--images", str(image_folder), "--output", str(tmp_path)]
    )
    make = ["--model", str(base_folder), *VIEWS, "--images", stored.url, "--output", output]
    assert cache_teacher([*make, "--shard", "0/2"]) is None
    assert verify(output)[0] == 1
    cache = cache_teacher([*make, "--shard", "1/2"])
    assert len(cache) == len(local) == 8 and cache.image(0) == f"{stored.url}/0.jpg"
    for i in range(8):
        assert torch.equal(cache.target(i), local.target(i)) and torch.equal(
            cache.pixel_values(i), local.pixel_values(i)
        )
    assert verify(output) == (0, "teacher cache: 3 shards are whole\n")

    folder, model = Folder(output), AutoModel.from_pretrained(base_folder)
    data = bytearray(folder.read("maps-00001.safetensors"))
    data[-5] ^= 1  # in the last map of the second shard
    folder.write("maps-00001.safetensors", bytes(data))
    opened = TeacherCache.open(output, model=model)
    assert torch.equal(opened.target(4), local.target(4))  # each map has a checksum of its own
    with pytest.raises(ValueError, match=r"maps-00001.*damaged.*makes only this shard anew"):
        opened.target(5)
    with pytest.raises(ValueError, match="another setting: stride"):
        cache_teacher([*make, "--stride", "16"])
    assert verify(output, "--delete-damaged")[0] == 1
    assert torch.equal(cache_teacher(make).target(5), local.target(5))
    stored.write("0.jpg", stored.read("1.jpg"))
    with pytest.raises(ValueError, match=r"0\.jpg is not the image"):
        opened.pixel_values(0)
    stored.delete("0.jpg")
    with pytest.raises(FileNotFoundError, match=r"0\.jpg, which is gone"):
        opened.pixel_values(0)


def test_a_cache_of_local_images_in_a_store(base_folder, image_folder):
    output = "memory://teacher/of-local"
    cache = cache_teacher(["--model", str(base_folder), *VIEWS, "--images", str(image_folder), "--output", output])
    assert cache.image(0) == image_folder / "0.jpg" and cache.pixel_values(0).shape[:2] == (1, 3)


def test_distillation_reads_images_and_maps_of_a_store(base_folder, image_folder, stored, tmp_path):
    output = "memory://teacher/cache"
    cache_teacher(["--model", str(base_folder), *VIEWS, "--images", stored.url, "--output", output])
    options = ("--steps", 2, "--log_steps", 1, "--stride", 32, "--report_to", "none", "--picture_steps", 0)
    options += ("--window_size", 64)
    cached = ("--teacher_mode", "cached", "--teacher_cache", output, "--workers", 1)
    distil(base_folder, stored.url, tmp_path / "run", *options, *cached)
    assert [row["step"] for row in log_of(tmp_path / "run")] == [1, 2]
    record = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["distillation"]
    assert (record["num_images"], record["num_stored_views"]) == (4, 8)
    with pytest.raises(ValueError, match="held out here"):
        distil(base_folder, stored.url, tmp_path / "other", *options, *cached, "--holdout_every", 2)
    for name, images in (("local", image_folder), ("remote", stored.url)):
        distil(base_folder, images, tmp_path / name, *options, "--teacher_windows", 2)
    losses = [[row["loss"] for row in log_of(tmp_path / name)] for name in ("local", "remote")]
    assert losses[0] == losses[1]
