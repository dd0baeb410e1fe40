"""`spar-hf segment --tile`: label maps on disk and in memory, wrong usage, interruption."""

import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from spar_hf import SparProcessor
from spar_hf.batch.huge_images import SUFFIXES
from spar_hf.cli.huge import MAP_SUFFIXES
from spar_hf.cli.main import app

runner = CliRunner()


def run(*arguments, status=0):
    words = ["--labels", "road; car, automobile; sky", "--templates", "plain"]
    result = runner.invoke(app, ["segment", *map(str, arguments), *words])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def picture(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # the command sets it for its process
    path = tmp_path / "aerial.png"
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8))
    coarse.resize((150, 110)).save(path)
    return path


def test_a_label_map_on_disk_is_the_one_of_the_other_formats(picture, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tiles = ("--tile", 64, "--tile-overlap", 16)
    text = run(picture, "--output", tmp_path / "map.tif", *tiles)
    assert "of the image, score" in text and f"written: {tmp_path / 'map.tif'}" in text and "6/6" in text
    run(picture, "--output", tmp_path / "map.png", "--format", "map", *tiles)
    found, expected = Image.open(tmp_path / "map.tif"), Image.open(tmp_path / "map.png")
    assert np.array_equal(np.asarray(found), np.asarray(expected)) and found.mode == expected.mode == "P"
    assert found.getpalette()[:12] == expected.getpalette()[:12]
    assert tifffile.TiffFile(tmp_path / "map.tif").pages.first.is_tiled
    run(picture, "--output", tmp_path / "map.npy", *tiles)
    assert np.array_equal(np.load(tmp_path / "map.npy"), np.asarray(expected))


@pytest.mark.parametrize(
    ("options", "status", "word"),
    [
        ({"--output": "map.tif"}, 2, "--tile"),
        ({"--output": "map.npy"}, 2, "--tile"),
        ({"--tile-overlap": 16, "--output": "o.png"}, 2, "--tile"),
        ({"--tile": 64, "--tile-overlap": 64}, 2, "overlap"),
        ({"--tile": 8}, 2, "patch"),
        ({"--tile": 64, "--refine": "pamr"}, 2, "--refine"),
        ({"--tile": 64, "--format": "json"}, 2, "--format"),
        ({"--tile": 64, "--refine": "pamr", "--output": "o.png"}, 2, "refine"),
        ({"--tile": 64, "--shortest-edge": 64, "--output": "o.png"}, 2, "size"),
        ({"--tile": 64, "--format": "heatmap", "--output": "heat"}, 2, "--tile"),
        ({"--tile": 64, "--max-pixels": 100}, 1, "max-pixels"),
        ({"--tile": 64, "--workers": 2}, 2, "--workers"),
        ({"--tile": 64, "--batch-size": 8, "--output": "o.png"}, 2, "leave out --batch-size"),
        ({"--frames": "all", "--workers": 2, "--output": "heat"}, 2, "leave out --workers"),
        ({"--tile": 64, "--shard": "0/2"}, 2, "one job writes: leave out --shard."),
        ({"--tile": 64, "--shard-range": "0:2"}, 2, "leave out --shard-range."),
    ],
)
def test_wrong_usage_gives_one_line_and_writes_nothing(picture, tmp_path, monkeypatch, options, status, word):
    monkeypatch.chdir(tmp_path)
    given = {"--output": "map.npy", **options}
    text = run(picture, *(part for item in given.items() for part in item), status=status)
    assert word in text and text.count("error:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["aerial.png"]


def test_the_command_writes_what_the_library_writes():
    assert MAP_SUFFIXES == SUFFIXES


def test_black_and_white_of_the_model_are_those_of_its_maps_on_disk(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    folder = tmp_path / "model"
    shutil.copytree(base_folder, folder)
    processor = SparProcessor.from_pretrained(base_folder)
    processor.image_processor.image_range = (0, 4095)
    processor.save_pretrained(folder)
    levels = np.random.default_rng(0).integers(0, 4096, (110, 150, 3)).astype(np.uint16)
    np.save(tmp_path / "scan.npy", levels)
    tiles = ("--tile", 64, "--tile-overlap", 16, "--model", folder)
    run(tmp_path / "scan.npy", "--output", tmp_path / "own.npy", *tiles)
    run(tmp_path / "scan.npy", "--output", tmp_path / "given.npy", *tiles, "--image-range", 0, 4095)
    assert np.array_equal(np.load(tmp_path / "own.npy"), np.load(tmp_path / "given.npy"))
    text = run(tmp_path / "scan.npy", "--output", tmp_path / "x.npy", "--tile", 64, "--model", base_folder, status=1)
    assert "range" in text and not (tmp_path / "x.npy").exists()


def test_several_images_and_a_missing_one(picture, tmp_path):
    Image.open(picture).save(tmp_path / "second.png")
    assert "one image" in run(tmp_path, "--tile", 64, "--output", tmp_path / "map.npy", status=2)
    assert "neither" in run(tmp_path / "no.tif", "--tile", 64, "--output", tmp_path / "map.npy", status=1)


def test_an_interrupted_run_keeps_the_older_map(picture, tmp_path, monkeypatch):
    from spar_hf.batch import huge_images

    target = tmp_path / "map.npy"
    target.write_bytes(b"older")

    def stop(path, *args):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(huge_images, "write_label_array", stop)
    text = run(picture, "--tile", 64, "--output", target, status=130)
    assert "interrupted" in text and target.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aerial.png", "map.npy"]
