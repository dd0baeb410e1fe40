"""The page of overlays, made by the script from a folder of images."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from launching import ENVIRONMENT, TRAINING
from PIL import Image

pytest.importorskip("jinja2", reason="the page needs the extra demo")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "in" / f"image{i}.png")
    return tmp_path / "in"


def demo(output, *images, vocabulary="road; sky", most=3):
    """The page, and what the script said on stderr."""
    command = [sys.executable, str(TRAINING / "studies" / "demo.py"), "--output", str(output), "--packaged", "false"]
    command += ["--vocabulary", vocabulary, "--max_images", str(most), "--shortest_edge", "64", "--stride", "96"]
    run = subprocess.run(
        [*command, "--images", *map(str, images)],
        env={**ENVIRONMENT, "TQDM_DISABLE": "1"},
        cwd=os.path.dirname(output),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return (output / "index.html").read_text(encoding="utf-8"), run.stderr


def titles(page):
    return re.findall(r"<h2>(image\d)", page)


def test_page_shows_every_image_three_ways_and_says_what_failed(folder, tmp_path):
    (folder / "image1.png").write_bytes(b"")
    page, said = demo(tmp_path / "out", folder, vocabulary="road; <sky>")
    assert said.count("empty (0 bytes)") == 1 and "empty (0 bytes)" in page
    assert titles(page) == ["image0", "image2"]
    assert page.count("data:image/jpeg") == 2 * 4
    assert "&lt;sky&gt;" in page and "<sky>" not in page
    # every picture's legend covers the image: shares are rounded to whole per cents
    for caption in re.findall(r'<div class="legend">(.*?)</div>', page, re.DOTALL):
        assert abs(sum(map(int, re.findall(r"(\d+) %", caption))) - 100) <= 1


@pytest.mark.slow
def test_images_are_taken_evenly_from_all_arguments(folder, tmp_path):
    page, _ = demo(tmp_path / "two", folder, folder / "image3.png", most=3)
    assert titles(page) == ["image0", "image3"]  # one of the folder, and the other argument's, which has no more
    page, _ = demo(tmp_path / "one", folder, most=2)
    assert titles(page) == ["image0", "image2"]
