import numpy as np
import pytest
from PIL import Image

from spar_hf.cli.overlays import overlay, palette


def test_overlay_mixes_colours_and_draws_a_border_and_legend():
    image = Image.new("RGB", (200, 60), (100, 100, 100))
    label_map = np.zeros((60, 200), int)
    label_map[:, 100:] = 1
    picture = overlay(image, label_map, ["sky", "road", "absent"], opacity=0.5)
    colours = palette(3).astype(int)
    assert np.abs(np.array(picture.getpixel((10, 10))) - (50 + colours[0] / 2)).max() <= 1
    assert np.abs(np.array(picture.getpixel((150, 10))) - (50 + colours[1] / 2)).max() <= 1
    assert picture.getpixel((100, 30)) == (255, 255, 255)
    assert picture.width == 200 and picture.height > 60
    legend = np.asarray(picture)[60:].reshape(-1, 3)
    present = [bool((legend == colour).all(1).any()) for colour in palette(3)]
    assert present == [True, True, False]


def test_colours_differ():
    assert len({tuple(colour) for colour in palette(60)}) == 60


def test_a_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match="10×20"):
        overlay(Image.new("RGB", (30, 40)), np.zeros((20, 10), int), ["sky"])
