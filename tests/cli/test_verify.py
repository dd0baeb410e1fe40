"""`spar-hf verify`: what it says of images that were added or renamed, of frames, and of files that are being written."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from spar_hf.cli.main import app
from spar_hf.utils.atomic import temporary_name


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture
def images(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("ending", ["parquet", "tar"])
def test_images_that_were_added_or_renamed_are_others(base_folder, images, tmp_path, ending):
    output = tmp_path / f"out.{ending}"
    run("features", images, "--output", output, "--model", base_folder, "--shortest-edge", 32)
    assert "3 images are whole" in run("verify", output, images)
    (images / "c.png").rename(images / "d.png")
    assert "other than the 3 named" in run("verify", output, images, status=2)
    (images / "d.png").rename(images / "c.png")
    Image.new("RGB", (48, 32)).save(images / "d.png")
    assert "made of 3 images, other than the 4 named" in run("verify", output, images, status=2)
    assert "3 images are whole" in run("verify", output)


def test_frames_are_results_of_their_file(base_folder, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    frames = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "still.png")
    run("segment", folder, "--output", output, "--labels", "road; sky", "--frames", "all", "--format", "map,json",
        "--templates", "plain", "--model", base_folder, "--shortest-edge", 32)  # fmt: skip
    assert (output / "clip-0001.json").is_file()
    assert "3 images are whole" in run("verify", output, folder)
    (output / "clip-0001.json").unlink()
    assert "missing: clip-0001.json" in run("verify", output, folder, status=1)
    frames[0].save(folder / "other.png")
    assert "missing: other" in run("verify", output, folder, status=1)


def test_files_that_are_being_written_are_left_alone(base_folder, images, tmp_path):
    output = tmp_path / "out"
    run("features", images, "--output", output, "--model", base_folder, "--shortest-edge", 32)
    written = temporary_name(output / "d.safetensors")
    written.write_bytes((output / "c.safetensors").read_bytes()[:100])
    (output / "c.safetensors").write_bytes(b"cut")
    text = run("verify", output, images, "--delete-damaged", status=1)
    assert "2 images are whole, 1 missing, 1 damaged" in text and "damaged: c.safetensors" in text
    assert written.is_file() and not (output / "c.safetensors").exists()


def test_a_folder_says_how_many_images_it_was_made_of(base_folder, images, tmp_path):
    """Names that are no UTF-8 are compared as the manifest has them."""
    (images / "c.png").rename(images / "c\udce9.png")
    output = tmp_path / "out.parquet"
    run("features", images, "--output", output, "--model", base_folder, "--shortest-edge", 32)
    assert json.loads((output / "_spar-hf.json").read_text())["images"] == 3
    run("verify", output, images)


def segment(images, output, base_folder, *options, labels="road; sky", status=0):
    given = (
        "--labels",
        labels,
        "--templates",
        "plain",
        "--model",
        base_folder,
        "--shortest-edge",
        32,
        "--background",
        "none",
    )
    return run("segment", images, "--output", output, *given, *options, status=status)


def test_an_image_without_a_format_that_others_have_is_not_whole(base_folder, images, tmp_path):
    """As of a second run, for another format, that was stopped after its first image."""
    output = tmp_path / "out"
    segment(images, output, base_folder, "--format", "overlay,map")
    segment(images / "a.png", output, base_folder, "--format", "coco")
    text = run("verify", output, images, "--finish", status=1)
    assert "1 images are whole, 2 missing" in text and "missing: b.coco.json missing: c.coco.json" in text
    assert (
        "not finished: see above" in text and len(json.loads((output / "annotations.json").read_text())["images"]) == 1
    )
    segment(images, output, base_folder, "--format", "coco")
    assert "3 images are whole" in run("verify", output, images)


def test_the_coco_file_is_of_the_images_that_are_named(base_folder, images, tmp_path):
    """Not of one that is gone, nor of a name that an image had before another of the same stem came."""
    output = tmp_path / "out"
    segment(images, output, base_folder, "--format", "coco,map")
    (images / "c.png").unlink()
    assert "annotations.json written, of 2 images" in run("verify", output, images, "--finish")
    Image.open(images / "a.png").save(images / "a.bmp")
    segment(images, output, base_folder, "--format", "coco,map", "--skip-existing")
    assert "annotations.json written, of 3 images" in run("verify", output, images, "--finish")
    names = [entry["file_name"] for entry in json.loads((output / "annotations.json").read_text())["images"]]
    assert sorted(name.rpartition("/")[2] for name in names) == ["a.bmp", "a.png", "b.png"]


def test_results_of_two_settings_are_told_apart(base_folder, images, tmp_path):
    masks, features = tmp_path / "masks", tmp_path / "features"
    segment(images, masks, base_folder, "--format", "coco")
    segment(images / "b.png", masks, base_folder, "--format", "coco", "--min-area", 0.5)
    text = run("verify", masks, images, "--finish", status=1)
    assert "1 images are whole, 2 of other settings than the latest" in text and "not finished" in text
    assert "other settings: a.coco.json: min_area null, now 0.5" in text
    of_features = ("--model", base_folder, "--shortest-edge")
    run("features", images, "--output", features, *of_features, 32)
    run("features", images / "b.png", "--output", features, *of_features, 48)
    text = run("verify", features, images, status=1)
    assert "1 images are whole, 2 of other settings than the latest" in text
    assert "other settings: a.safetensors: shortest_edge 32, now 48" in text
    run("features", images, "--output", features, *of_features, 48)
    assert "3 images are whole" in run("verify", features, images)


def test_masks_and_features_in_one_folder_are_both_looked_at(base_folder, images, tmp_path):
    output = tmp_path / "out"
    segment(images, output, base_folder, "--format", "map")
    (output / "support.safetensors").write_bytes(b"of something else")
    assert "features" not in run("verify", output, images)
    run("features", images, "--output", output, "--model", base_folder, "--shortest-edge", 32)
    (output / "support.safetensors").unlink()
    (output / "b.safetensors").unlink()
    text = run("verify", output, images, status=1)
    assert "results of segment: 3 images are whole" in text and "features: 2 images are whole, 1 missing" in text
