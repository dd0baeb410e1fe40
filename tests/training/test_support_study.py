"""The study of support images on a small folder."""

import importlib.util
import json

import numpy as np
from launching import TRAINING
from PIL import Image


def load_study():
    spec = importlib.util.spec_from_file_location("support_study", TRAINING / "studies/support.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_draw_has_so_many_images_of_each_class_where_there_are():
    study = load_study()
    present = [{0, 1}, {1}, {1, 2}, {0}, set()]
    found = study.draw(present, 3, 2, seed=0)
    assert found == study.draw(present, 3, 2, seed=0) == sorted(found)
    assert [sum(label == c for _, label in found) for c in range(3)] == [2, 2, 1]
    assert all(label in present[i] for i, label in found)


def test_the_study_measures_words_and_support(tmp_path, base_folder, capsys):
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (tmp_path / "set" / part).mkdir(parents=True)
    for i in range(6):
        mask = np.zeros((64, 96), np.uint8)
        mask[:, 48:] = 1 + i % 2
        image = rng.integers(0, 60, (64, 96, 3)) + 70 * mask[..., None]
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"set/images/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"set/masks/{i}.png")
    (tmp_path / "set/classes.txt").write_text("road\ncat\nsky\n")
    rows = load_study().main([
        "--data", str(tmp_path / "set"), "--model", str(base_folder), "--holdout_every", "3", "--output",
        str(tmp_path / "out"), "--images_per_class", "2", "--draws", "1", "--penalties", "0.003",
    ])  # fmt: skip
    assert [(row["images_per_class"], row["chosen"]) for row in rows] == [(0, False), (2, True), (2, False)]
    assert rows[2]["penalty"] == 0.003 and rows[2]["mean_iou"] > rows[0]["mean_iou"]
    assert json.loads((tmp_path / "out/support.json").read_text())["rows"] == rows
    assert "words only" in capsys.readouterr().out
