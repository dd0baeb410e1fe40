"""Images of more than 8 bits, floats and large ones in `segment`, and the same files in every command."""

from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from spar_hf import SPAR_TINY
from spar_hf.batch.huge_images import segment_huge
from spar_hf.cli.main import app


@pytest.fixture(autouse=True)
def pixel_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def segment(folder, output, *options):
    words = ["--labels", "road; sky; tree", "--format", "map", "--shortest-edge", "48", "--templates", "plain"]
    return CliRunner().invoke(app, ["segment", str(folder), *words, "--output", str(output), *options])


def test_floats_and_12_bits_give_the_masks_of_8_bits(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (6, 8)).astype(np.uint8)
    grey = Image.fromarray(levels).resize((64, 48))
    values = np.asarray(grey)
    folder = tmp_path / "in"
    folder.mkdir()
    grey.save(folder / "eight.png")
    Image.fromarray((values / np.float32(255)).astype(np.float32)).save(folder / "float.tif")
    assert segment(folder, tmp_path / "out").exit_code == 0
    maps = [np.asarray(Image.open(tmp_path / "out" / f"{name}.map.png")) for name in ("eight", "float")]
    assert np.equal(*maps).mean() > 0.999  # after resizing only 8 bits are rounded to levels
    Image.fromarray(values.astype(np.uint16) * 16).save(folder / "twelve.png")
    (folder / "float.tif").unlink()
    result = segment(folder, tmp_path / "out2")
    assert result.exit_code == 1 and "--image-range LOW HIGH" in result.output
    assert segment(folder, tmp_path / "out3", "--image-range", "0", "4080").exit_code == 0
    maps = [np.asarray(Image.open(tmp_path / "out3" / f"{name}.map.png")) for name in ("eight", "twelve")]
    assert np.equal(*maps).mean() > 0.999


def test_the_image_range_of_a_checkpoint_holds_in_every_command(tmp_path):
    """And the model sees all 16 bits, not 256 levels of them: masks are those of the pipeline."""
    pipe = pipeline("open-vocab-segmentation", model=SPAR_TINY)
    pipe.image_processor.image_range = (0, 20000)
    pipe.save_pretrained(tmp_path / "model")
    pipe = pipeline("open-vocab-segmentation", model=str(tmp_path / "model"))
    photo = Image.open(Path(skimage.__file__).parent / "data" / "camera.png").resize((96, 96), Image.Resampling.BICUBIC)
    values = np.asarray(photo).astype(np.uint16) * 75
    Image.fromarray(values).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", values)
    words = ["road", "sky", "tree"]
    options = {"templates": "plain", "output": "map", "size": {"shortest_edge": 48}}
    expected = pipe(str(tmp_path / "a.png"), candidate_labels=words, **options)["map"]
    wrong = pipe(str(tmp_path / "a.png"), candidate_labels=words, image_range=(0, 65535), **options)["map"]
    assert (expected != wrong).mean() > 0.05
    given = ["--model", str(tmp_path / "model"), "--background", "none"]
    assert segment(tmp_path / "a.png", tmp_path / "map.png", *given).exit_code == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "map.png")), expected)
    assert segment(tmp_path / "a.png", tmp_path / "other.png", *given, "--image-range", "0", "65535").exit_code == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "other.png")), wrong)
    tiled = pipe(str(tmp_path / "a.png"), candidate_labels=words, templates="plain", output="map", tile=32)["map"]
    segment_huge(pipe, tmp_path / "a.npy", tmp_path / "huge.npy", words, 32, templates="plain")
    assert (np.load(tmp_path / "huge.npy") == tiled).mean() > 0.999


def test_a_pixel_limit_can_be_set(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    result = segment(tmp_path / "a.png", tmp_path / "out.png", "--max-pixels", "9999")
    assert result.exit_code == 1 and "--max-pixels" in result.output
