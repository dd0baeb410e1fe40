"""The study of presence and background words: its statistics against SciPy's definitions, and all of it on a few images."""

import importlib.util
import json

import numpy as np
import pytest
from launching import TRAINING
from PIL import Image

from spar_hf.utils.errors import MissingFiles, UsageError


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("presence_study", TRAINING / "studies/presence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ranking_figures_are_those_of_all_pairs_and_all_thresholds(study):
    rng = np.random.default_rng(0)
    truth, values = rng.random(60) < 0.3, rng.integers(0, 12, 60) / 4.0  # with ties
    there, absent = values[truth][:, None], values[~truth][None]
    assert study.area_under_roc(truth, values) == pytest.approx(((there > absent) + 0.5 * (there == absent)).mean())
    distinct = values + np.arange(60) * 1e-6
    precisions = [truth[distinct >= value].mean() for value in distinct[truth]]
    assert study.average_precision(truth, distinct) == pytest.approx(np.mean(precisions))


def test_recall_and_precision_of_a_threshold(study):
    truth, given = np.array([1, 1, 1, 0, 0, 0], bool), np.array([1, 0, 0, 1, 0, 0], bool)
    assert study.recall_and_precision("score", truth, given) == {"score_recall": 1 / 3, "score_precision": 1 / 2}
    none = study.recall_and_precision("score", truth, ~given & False)
    assert none == {"score_recall": 0, "score_precision": 0}


def test_the_logistic_function_is_the_one_that_made_the_data(study):
    rng = np.random.default_rng(0)
    odds = rng.normal(size=20_000) * 3 - 2
    truth = rng.random(20_000) < 1 / (1 + np.exp(-(0.7 * odds + 1.5)))
    assert study.fit_logistic(odds, truth, np.ones(20_000)) == pytest.approx((0.7, 1.5), abs=0.1)
    # twice the weight of what is there moves the offset by log 2
    slope, offset = study.fit_logistic(odds, truth, np.where(truth, 2.0, 1.0))
    assert (slope, offset) == pytest.approx((0.7, 1.5 + np.log(2)), abs=0.1)


def test_the_study_runs_and_says_the_constants(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "SETS", {"voc": 2, "coco": 2})
    names = {
        "voc": ["background", "cat", "car", "sofa"],
        "coco": ["sky", "road", "dog"],
        "camvid": ["sky", "road", "car"],
    }
    rng = np.random.default_rng(0)
    for name, classes in names.items():
        folder = tmp_path / ("camvid/val" if name == "camvid" else name)
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
        (folder / "classes.txt").write_text("\n".join(classes) + "\n")
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(folder / f"images/{i}.jpg")
            mask = np.zeros((32, 48), np.uint8)
            mask[:, 16 : 16 * (i % 3 + 1)] = 1 + i % (len(classes) - 1)
            Image.fromarray(mask).save(folder / f"masks/{i}.png")
    monkeypatch.setattr(study.random.Random, "choice", lambda self, sizes: 2)
    report = study.main(["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--lists", "2"])
    assert json.loads((tmp_path / "out/presence.json").read_text()) == report
    said = capsys.readouterr().out
    assert f"CALIBRATION = ({report['calibration'][0]:.3f}, {report['calibration'][1]:.3f})" in said
    assert set(report["sets"]) == {"voc", "coco"} and set(report["background"]) == {"voc", "coco", "camvid/val"}
    assert report["sets"]["voc"]["words"] == 3 and report["background"]["voc"]["none"]["rest"] == 0
    with pytest.raises(UsageError, match="--overwrite"):
        study.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(MissingFiles, match="--data"):
        study.main(["--data", str(tmp_path / "none")])
