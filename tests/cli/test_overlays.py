"""Overlays, legends with their fonts, and heat maps."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

import spar_hf
from spar_hf.cli import fonts
from spar_hf.cli.overlays import FIRST_COLOURS, GREY, heat_picture, overlay, palette


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


def test_the_background_is_not_painted_and_stands_last_in_the_legend():
    image = Image.new("RGB", (200, 60), (100, 110, 120))
    label_map = np.zeros((60, 200), int)
    label_map[:, 150:] = 1
    picture = overlay(image, label_map, ["rest", "road"], background=0)
    assert picture.getpixel((10, 10)) == (100, 110, 120) != picture.getpixel((190, 10))
    legend = np.asarray(picture)[60:]
    grey, road = ((legend == colour).all(2).any(0).argmax() for colour in (GREY, palette(2)[1]))
    assert 0 < road < grey


def test_only_the_classes_shown_are_painted_in_the_colours_given():
    image = Image.new("RGB", (90, 60), (100, 110, 120))
    label_map = np.zeros((60, 90), int)
    label_map[:, 30:60], label_map[:, 60:] = 1, 2
    colours = np.array([[1, 2, 3], [250, 0, 0], [0, 250, 0]], np.uint8)
    given = {"colours": colours, "shown": [1], "legend": False}
    filled = np.asarray(overlay(image, label_map, ["a", "b", "c"], opacity=1, **given))
    assert (filled[:, 31:60] == colours[1]).all()
    assert (filled[:, :30] == (100, 110, 120)).all() and (filled[:, 61:] == (100, 110, 120)).all()
    lines = np.asarray(overlay(image, label_map, ["a", "b", "c"], outlines=True, **given))
    assert (lines[:, 35:55] == (100, 110, 120)).all() and (lines[:, :30] == (100, 110, 120)).all()
    assert (lines[:, 30] == colours[1]).all() and (lines[:, 59] == colours[1]).all()


def test_a_name_is_written_inside_its_region_only():
    image = Image.new("RGB", (400, 100), (100, 110, 120))
    label_map = np.zeros((100, 400), int)
    label_map[:, 200:], label_map[50, 100] = 1, 2  # the last has no room for a name
    given = {"opacity": 0.0, "legend": False}
    plain, named = (np.asarray(overlay(image, label_map, ["sky", "road", "bird"], names=n, **given)) for n in (0, 1))
    changed = (plain != named).any(2)
    assert changed[30:70, 70:130].any() and changed[30:70, 270:330].any()
    assert not changed[:, 150:250].any() and not changed[:20].any() and not changed[80:].any()


def test_a_legend_has_no_class_of_0_percent():
    label_map = np.zeros((100, 100), int)
    label_map[0, :40] = 1
    picture = overlay(Image.new("RGB", (100, 100)), label_map, ["sky", "bird"])
    legend = np.asarray(picture)[100:].reshape(-1, 3)
    assert [bool((legend == colour).all(1).any()) for colour in palette(2)] == [True, False]


def test_a_heat_map_is_dark_where_a_class_is_unlikely():
    heat = np.zeros((60, 200), np.uint8)
    heat[:, 100:] = 255
    picture = heat_picture(Image.new("RGB", (200, 60), "gray"), heat, "sky")
    assert sum(picture.getpixel((10, 10))) < 200 < 500 < sum(picture.getpixel((190, 10))) and picture.height > 60


def test_letters_that_no_font_has_are_named_once(monkeypatch, caplog):
    monkeypatch.setattr(fonts, "font_files", lambda: [])
    for cached in (fonts.font_for, fonts.warn_of):
        cached.cache_clear()
    assert fonts.font_for("road", 12).getlength("road") > 0 and not caplog.records
    fonts.font_for("道路", 12), fonts.font_for("道路 road", 13)
    assert len(caplog.records) == 1 and "Install Noto Sans CJK" in caplog.text
    fonts.font_for.cache_clear()


def test_a_label_gets_a_font_that_has_its_letters():
    pytest.importorskip("matplotlib", reason="its fonts are used (extra train)")
    fonts.font_for.cache_clear()
    for text in ("улица", "Straße", "طريق"):
        assert fonts.missing_letters(ImageFont.load_default(12), text)
        assert not fonts.missing_letters(fonts.font_for(text, 12), text)


def test_colours_differ():
    assert len({tuple(colour) for colour in palette(60)}) == 60


# Machado, Oliveira and Fernandes 2009, severity 1.0: for linear RGB
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_first_12_colours_and_grey_can_be_told_apart_by_the_colour_blind(sight):
    rgb = np.concatenate([palette(12), [GREY]]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.transpose(SIGHTS[sight])).clip(0, 1)
    # CIE 1976 L*a*b* under D65
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    ratio = linear @ np.transpose(to_xyz) / [0.95047, 1.0, 1.08883]
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    difference = np.linalg.norm(lab[:, None] - lab, axis=2)  # CIE76
    assert difference[np.triu_indices(13, 1)].min() >= 20


def test_a_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match="10×20"):
        overlay(Image.new("RGB", (30, 40)), np.zeros((20, 10), int), ["sky"])


def test_the_web_export_has_the_same_first_colours():
    script = (Path(spar_hf.__file__).parent / "export" / "web" / "labels.js").read_text(encoding="utf-8")
    listed = re.search(r"FIRST_COLOURS = \[(.*?)\];", script, re.DOTALL)[1]
    found = [tuple(map(int, colour)) for colour in re.findall(r"\[(\d+), (\d+), (\d+)\]", listed)]
    assert found == list(FIRST_COLOURS)
