"""Images of more than 8 bits, floats and large ones in `segment`, and the same files in every command."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

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
    assert np.array_equal(*maps)
    Image.fromarray(values.astype(np.uint16) * 16).save(folder / "twelve.png")
    (folder / "float.tif").unlink()
    result = segment(folder, tmp_path / "out2")
    assert result.exit_code == 1 and "--image-range LOW HIGH" in result.output
    assert segment(folder, tmp_path / "out3", "--image-range", "0", "4080").exit_code == 0
    maps = [np.asarray(Image.open(tmp_path / "out3" / f"{name}.map.png")) for name in ("eight", "twelve")]
    assert np.array_equal(*maps)


def test_a_pixel_limit_can_be_set(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    result = segment(tmp_path / "a.png", tmp_path / "out.png", "--max-pixels", "9999")
    assert result.exit_code == 1 and "--max-pixels" in result.output
