"""`spar-hf features`: files contain the feature maps of the model, and an interrupted run can be continued."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
from typer.testing import CliRunner

from spar_hf import SlidingWindowTeacher, SparBackbone, SparImageProcessorPil
from spar_hf.batch.extractor import KEY, FeatureExtractor
from spar_hf.batch.features import ShardWriter
from spar_hf.cli.main import app
from spar_hf.utils.image_files import InputImage


@pytest.fixture
def model(two_towers, tmp_path):
    """A folder of a tiny model with random weights."""
    two_towers.save_pretrained(tmp_path / "model")
    SparImageProcessorPil(size={"shortest_edge": 80}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def images(tmp_path):
    """Five images of unequal size, one of them in a sub-folder."""
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "c.png", "d.png", "sub/a.png")):
        Image.fromarray(rng.integers(0, 256, (70 + 9 * i, 90, 3), dtype=np.uint8)).save(tmp_path / "in" / name)
    return tmp_path / "in"


def run(*arguments, status=0):
    result = CliRunner().invoke(app, ["features", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def expected(model, image, encoder=None, **options):
    pixel_values = AutoImageProcessor.from_pretrained(model)(image, return_tensors="pt", **options)["pixel_values"]
    with torch.no_grad():
        return (encoder or AutoModel.from_pretrained(model))(pixel_values).feature_map[0]


def test_files_contain_the_feature_map_and_its_settings(model, images, tmp_path):
    assert "5 done" in run(images, "--model", model, "--output", tmp_path / "out")
    file = tmp_path / "out" / "sub" / "a.safetensors"
    assert torch.equal(load_file(file)["feature_map"], expected(model, images / "sub/a.png"))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["model"] == model.name and metadata["patch_size"] == "16"
    assert json.loads(metadata["original_size"]) == [106, 90] and json.loads(metadata["working_size"]) == [94, 80]
    assert len(list((tmp_path / "out").rglob("*"))) == 6  # five files, one folder


def test_normalised_features_in_float16_at_another_size(model, images, tmp_path):
    options = ["--normalize", "--dtype", "float16", "--shortest-edge", 48]
    run(images / "b.png", "--model", model, "--output", tmp_path / "out", *options)
    found = load_file(tmp_path / "out" / "b.safetensors")["feature_map"]
    whole = expected(model, images / "b.png", size={"shortest_edge": 48})
    assert found.dtype == torch.float16
    assert torch.equal(found, torch.nn.functional.normalize(whole, dim=0).half())


def test_a_stride_gives_the_features_of_the_sliding_window(model, images, tmp_path):
    run(images / "a.png", "--model", model, "--output", tmp_path / "out", "--stride", 24, "--window-size", 48)
    teacher = SlidingWindowTeacher(AutoModel.from_pretrained(model), window_size=48, stride=24)
    found = load_file(tmp_path / "out" / "a.safetensors")["feature_map"]
    assert torch.equal(found, expected(model, images / "a.png", teacher))
    assert not torch.allclose(found, expected(model, images / "a.png"), atol=1e-3)


@pytest.mark.parametrize("shards", [(), ("--shard-size", "0.01")])
def test_tokens_of_blocks_and_pooled_vectors_are_written_too(model, images, tmp_path, shards):
    output = tmp_path / "out"
    options = [images, "--model", model, "--output", output, "--layers", "2,features", *shards]
    run(*options)
    with torch.no_grad():
        backbone = SparBackbone.from_pretrained(model, out_features=["stage2", "features"])
        pixel_values = AutoImageProcessor.from_pretrained(model)(images / "b.png", return_tensors="pt")["pixel_values"]
        maps = [one[0] for one in backbone(pixel_values).feature_maps]
    tensors = read_shards(output) if shards else load_file(output / "b.safetensors")
    names = ["b#layer_2", "b"] if shards else ["layer_2", "feature_map"]
    assert all(torch.equal(tensors[name], one) for name, one in zip(names, maps, strict=True))
    assert "5 skipped" in run(*options, "--skip-existing")
    assert "layers=" in run(*options[: -1 - len(shards)], "1", *shards, "--skip-existing", status=2)
    # an option that is left out is another setting too
    assert "layers=" in run(*options[:5], *shards, "--skip-existing", status=2)
    run(images / "b.png", "--model", model, "--output", tmp_path / "pooled", "--pool", "mean")
    assert "pool=mean" in run(images, "--model", model, "--output", tmp_path / "pooled", "--skip-existing", status=2)
    vector = load_file(tmp_path / "pooled" / "b.safetensors")["feature_map"]
    torch.testing.assert_close(vector, maps[1].flatten(1).mean(1))
    with safe_open(tmp_path / "pooled" / "b.safetensors", "pt") as opened:
        assert opened.metadata()["pool"] == "mean"


def read_shards(folder):
    """All tensors by name through the index; asserts that the index lists each tensor of the shards once."""
    index = json.loads((folder / "features.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert sorted(index["weight_map"]) == sorted(name for shard in shards.values() for name in shard)
    return {name: shards[shard][name] for name, shard in index["weight_map"].items()}


def test_a_killed_run_is_continued(model, images, tmp_path):
    """The shards of a run that was killed after two images; other settings must not be mixed with them."""
    output = tmp_path / "out"
    options = ["--model", model, "--output", output, "--shard-size", 0.001]
    run(images / "a.png", images / "b.png", *options)
    before = {path: path.stat().st_mtime_ns for path in output.glob("features-*.safetensors")}
    (output / "features.safetensors.index.json").unlink()

    assert "--skip-existing" in run(images, *options, status=2)
    assert "normalized=false" in run(images, *options, "--skip-existing", "--normalize", status=2)
    assert "3 done, 2 skipped" in run(images, *options, "--skip-existing")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    tensors = read_shards(output)
    assert sorted(tensors) == ["a", "b", "c", "d", "sub/a"]
    assert torch.equal(tensors["d"], expected(model, images / "d.png"))
    assert torch.equal(tensors["a"], expected(model, images / "a.png"))


def test_single_files_are_continued_too_and_a_bad_image_stops_no_other(model, images, tmp_path):
    output = tmp_path / "out"
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:400])
    assert "5 done, 1 failed" in run(images, "--model", model, "--output", output, status=1)
    (output / "c.safetensors").unlink()
    assert "1 done, 4 skipped (already written), 1 failed" in run(
        images, "--model", model, "--output", output, "--skip-existing", status=1
    )
    assert "dtype=float32" in run(
        images, "--model", model, "--output", output, "--skip-existing", "--dtype", "bfloat16", status=2
    )


@pytest.mark.parametrize("shards", [(), ("--shard-size", "0.001")])
def test_a_replaced_image_of_the_same_name_is_made_anew(model, images, tmp_path, shards):
    output = tmp_path / "out"
    options = [images, "--model", model, "--output", output, "--skip-existing", *shards]
    run(*options)
    assert "5 skipped" in run(*options)
    status = (images / "b.png").stat()
    shutil.copy(images / "sub" / "a.png", images / "b.png")
    os.utime(images / "b.png", ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))  # older than the one before
    assert "1 done, 4 skipped" in run(*options)
    assert "5 skipped" in run(*options)
    file, name = output / "b.safetensors", "feature_map"
    if shards:
        index = json.loads((output / "features.safetensors.index.json").read_text())
        file, name = output / index["weight_map"]["b"], "b"
    assert torch.equal(load_file(file)[name], expected(model, images / "sub" / "a.png"))


def test_shards_of_small_vectors_are_written_before_their_names_are_too_many(tmp_path):
    """safetensors refuses headers of more than 100 MB, in which names and records are."""
    images = [InputImage("gone.png", f"{i:05d}/" + "n" * 20_000) for i in range(2_600)]
    writer = ShardWriter(tmp_path, {"pool": "mean"}, shard_bytes=10**9)
    for image in images:
        writer.add(image, {KEY: torch.zeros(4)}, {})
    writer.close()
    written = ShardWriter(tmp_path, {"pool": "mean"}, shard_bytes=10**9).written
    assert set(written) == {image.name for image in images}


def test_features_of_other_weights_in_the_same_folder_are_not_mixed(model, images, tmp_path):
    """The folder has the same name but other weights or another image processor."""
    options = [images, "--model", model, "--output", tmp_path / "out", "--skip-existing"]
    run(*options)
    assert "5 skipped" in run(*options)
    shutil.copytree(model, tmp_path / "elsewhere" / model.name)
    moved = [images, "--model", tmp_path / "elsewhere" / model.name, "--output", tmp_path / "out", "--skip-existing"]
    assert "5 skipped" in run(*moved)
    SparImageProcessorPil(size={"shortest_edge": 96}).save_pretrained(model)
    assert "fingerprint" in run(*options, status=2)
    SparImageProcessorPil(size={"shortest_edge": 80}).save_pretrained(model)
    assert "5 skipped" in run(*options)
    trained = AutoModel.from_pretrained(model)
    with torch.no_grad():
        next(trained.parameters()).add_(0.1)
    trained.save_pretrained(model)
    assert "fingerprint" in run(*options, status=2)


@pytest.mark.slow
def test_two_processes_share_the_images(model, images, tmp_path):
    pytest.importorskip("accelerate", reason="several processes need accelerate (extra train)")
    output = tmp_path / "out"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "spar_hf.cli.main", "features", images, "--model", model]
    process = subprocess.run(
        [*map(str, launch), "--output", str(output), "--shard-size", "0.001"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert sum(map(int, re.findall(r"process \d of 2: (\d+) done", process.stdout))) == 5, process.stdout
    tensors = read_shards(output)  # also: no image twice
    assert sorted(tensors) == ["a", "b", "c", "d", "sub/a"]
    assert all(torch.equal(found, expected(model, images / f"{name}.png")) for name, found in tensors.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "float16, bfloat16, float32"),
        (["--window-size", "48"], "give a stride"),
        (["--layers", "3,all"], "3,6,9,features"),
        (["--layers", "99"], "no block 99"),
        (["--pool", "max"], "mean, head"),
        (["--layers", "3", "--stride", "24"], "leave out the stride"),
        (["--stride", "900"], "must lie between 1 and the window"),
        (["--device", "cuda:7"], "Device 'cuda:7' is not available"),
    ],
)
def test_wrong_options_name_the_fix_and_have_status_2(images, tmp_path, options, message):
    if "cuda:7" in options and torch.cuda.device_count() > 7:
        pytest.skip("this machine has eight graphics cards")
    assert message in run(images / "a.png", "--output", tmp_path / "out", *options, status=2)
    assert not (tmp_path / "out").exists()


def test_working_size_is_limited_as_in_the_pipeline(tmp_path):
    Image.new("RGB", (4000, 100)).save(tmp_path / "long.png")
    features, record = FeatureExtractor(shortest_edge=100, max_tokens=64)(str(tmp_path / "long.png"))
    assert features.shape[1] * features.shape[2] <= 64 and record["original_size"] == [100, 4000]
    assert FeatureExtractor(shortest_edge=100, max_tokens=64).settings["max_tokens"] == 64
    assert "max_tokens" not in FeatureExtractor().settings  # folders of earlier versions are continued


def test_images_of_more_than_8_bits_need_their_range(tmp_path):
    levels = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    with pytest.raises(ValueError, match="--image-range"):
        FeatureExtractor(shortest_edge=64)(levels)
    features, _ = FeatureExtractor(shortest_edge=64, image_range=(0, 4095))(levels)
    expected, _ = FeatureExtractor(shortest_edge=64)((levels / 4095).astype(np.float32))
    torch.testing.assert_close(features, expected)
