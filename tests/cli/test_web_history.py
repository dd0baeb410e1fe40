"""The results of a visitor's session that the page can bring back."""

import numpy as np
from PIL import Image

from spar_hf.cli import web_history
from spar_hf.cli.web_history import Kept, keep
from spar_hf.cli.web_view import Shown, View, picture


def test_the_last_results_are_kept_until_they_are_many_or_large(monkeypatch):
    image = Image.new("RGB", (64, 48), "skyblue")
    result = {"map": np.zeros((48, 64), np.int32), "labels": ["sky", "road"], "scores": [0.9, 0], "background": -1}
    result["heat"] = np.zeros((2, 48, 64), np.uint8)
    shown = Shown.make("one pass", "a.png", image, result, np.zeros((2, 3), np.uint8))
    history = []
    for i in range(8):
        history = keep(history, Kept(f"words {i}", [shown], (f"{i} s", ""), "table"))
    assert [kept.words for kept in history] == [f"words {i}" for i in range(7, 1, -1)]
    # an error showed no new result
    assert keep(history, Kept("wrong; wrong", [shown], ("7 s", ""), "table")) == history
    monkeypatch.setattr(web_history, "KEPT_BYTES", int(2.5 * history[0].size))
    assert [kept.words for kept in keep(history, Kept("new", [shown], ("9 s", ""), "table"))] == ["new", "words 7"]
    small, caption = Kept("x" * 60, [shown], ("", ""), "").thumbnail()
    assert small.size == (64, 48) and len(caption) < 45


def test_a_class_without_a_probability_shows_its_masks_in_place_of_a_heat_map():
    """The background without words, which is among the classes that a visitor can choose."""
    image = Image.new("RGB", (64, 48), "skyblue")
    result = {"map": np.zeros((48, 64), np.int32), "labels": ["sky", "road", "background"], "scores": [0.9, 0, 0]}
    result |= {"background": 2, "heat": np.full((2, 48, 64), 200, np.uint8)}
    shown = Shown.make("one pass", "a.png", image, result, np.arange(9, dtype=np.uint8).reshape(3, 3) * 20)
    masks = picture(shown, View(None))
    assert picture(shown, View(None, heat="background")).tobytes() == masks.tobytes()
    assert picture(shown, View(None, heat="sky")).tobytes() != masks.tobytes()
