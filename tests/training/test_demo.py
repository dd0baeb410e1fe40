"""The page of overlays, made of a folder of one's own."""

import re

import numpy as np
import pytest
from PIL import Image

# not by `import`: where the folder that it writes lies beside, ruff would take it for a package
demo = pytest.importorskip("demo", reason="the page needs jinja2 (extra demo)")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "in" / f"image{i}.png")
    return tmp_path / "in"


def test_page_shows_every_image_three_ways_and_says_what_failed(folder, tmp_path):
    (folder / "image1.png").write_bytes(b"")
    lines = []
    options = demo.Options(output=str(tmp_path / "out"), images=[str(folder)], packaged=False, vocabulary="road; <sky>")
    options.max_images, options.shortest_edge, options.stride = 3, 64, 96
    page = demo.run(options, lines.append).read_text(encoding="utf-8")
    assert len(lines) == 1 and "empty (0 bytes)" in lines[0] and "empty (0 bytes)" in page
    assert re.findall(r"<h2>(image\d)", page) == ["image0", "image2"]
    assert page.count("data:image/jpeg") == 2 * 4
    assert "&lt;sky&gt;" in page and "<sky>" not in page
    # every picture's legend covers the image: shares are rounded to whole per cents
    for caption in re.findall(r'<div class="legend">(.*?)</div>', page, re.DOTALL):
        assert abs(sum(map(int, re.findall(r"(\d+) %", caption))) - 100) <= 1


def test_images_are_taken_evenly_from_all_arguments(folder):
    names = [image.name for image in demo.own_images([str(folder), str(folder / "image3.png")], 3, "sky")]
    assert names == ["image0", "image3"]  # one of the folder, the other argument's, which has no more
    assert [image.name for image in demo.own_images([str(folder)], 2, "sky")] == ["image0", "image2"]
    with pytest.raises(FileNotFoundError, match="neither a file"):
        demo.own_images(["nowhere"], 2, "sky")
