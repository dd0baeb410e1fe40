"""What the options of the evaluation mean, and what its reports say, with no model."""

import io
import json

import pytest
from benchmarks import SegmentationSet, table_of_lines
from data import VOID
from inference import Run, parse_models, parse_runs
from options import Options, build_vocabulary, resize_options
from reports import find_gaps, show
from rich.console import Console


def options(**kwargs):
    return Options(**{"dataset": "", "model": [], **kwargs})


def set_of(classes):
    return SegmentationSet("set", None, (), *table_of_lines(classes), "set")


def test_vocabulary(tmp_path):
    classes = ["null", "wall-merged", "Sports_ball", "wall-other", "dog"]
    words = tmp_path / "labels.json"
    words.write_text(json.dumps({"sports ball": ["football", "ball"], "wall-merged": "brick, wall"}))
    vocabulary, data = build_vocabulary(set_of(classes), options(labels=str(words), ignore_classes=["Dog"]))
    # what reads alike is one class, and names of a file are taken as they are
    assert vocabulary.labels == ("background", "wall", "sports ball")
    assert vocabulary.names == (("background",), ("brick, wall",), ("football", "ball"))
    assert data.labels == vocabulary.labels
    assert data.table[:5].tolist() == [0, 1, 2, 1, VOID] and data.table[255] == VOID
    assert (data.table[5:255] < 0).all()  # no mask of the set may hold these


def test_vocabulary__errors(tmp_path):
    with pytest.raises(ValueError, match="--ignore_classes: no class is called kat; there are cat, dog"):
        build_vocabulary(set_of(["cat", "dog"]), options(ignore_classes=["kat"]))
    words = tmp_path / "labels.json"
    words.write_text(json.dumps({"cat": ["cat", "dog"]}))
    with pytest.raises(ValueError, match="two classes or twice: dog"):
        build_vocabulary(set_of(["cat", "dog"]), options(labels=str(words)))
    with pytest.raises(ValueError, match="256 classes"):
        set_of([str(i) for i in range(256)])


def test_models_and_runs(tmp_path):
    odd = tmp_path / "lr=1"
    odd.mkdir()
    models = parse_models(["base=some/folder", "org/student", str(odd)])
    assert models == {"base": "some/folder", "student": "org/student", "lr=1": str(odd)}
    given = [
        "student:single",
        "base:sliding:24",
        "base:sliding-logits:24",
        "base:sliding:24+lposs",
        "lr=1:single+lposs",
    ]
    assert parse_runs(given, models) == [
        Run("student"),
        Run("base", 24),
        Run("base", 24, "logits"),
        Run("base", 24, refinement="lposs"),
        Run("lr=1", refinement="lposs"),
    ]
    assert len({run.inference for run in parse_runs(given, models)}) == len(given)  # each way has words of its own
    assert [run.model for run in parse_runs(None, models)] == ["base", "student", "lr=1"]
    wrong_forms = (
        "base",
        "base:sliding",
        "base:sliding:x",
        "base:sliding:-4",
        "base:double",
        "base:single+",
        "base:single:4",
    )
    for wrong in wrong_forms:
        with pytest.raises(ValueError, match="NAME:sliding:STRIDE"):
            parse_runs([wrong], models)
    with pytest.raises(ValueError, match="mean of logits has none"):
        parse_runs(["base:sliding-logits:24+lposs"], models)
    with pytest.raises(ValueError, match="names no model"):
        parse_runs(["teacher:single"], models)
    with pytest.raises(ValueError, match="stands twice"):
        parse_runs(["base:single", "base:single"], models)
    with pytest.raises(ValueError, match="names that differ"):
        parse_models(["a/model", "b/model"])


def test_working_resolution_options():
    assert resize_options(options()) is None
    assert resize_options(options(native=True)) == {"do_resize": False}
    edges = resize_options(options(shortest_edge=384, longest_edge=512))
    assert edges["size"] == {"shortest_edge": 384, "longest_edge": 512}
    for wrong in ({"native": True, "size": [8, 8]}, {"longest_edge": 8, "size": [8, 8]}, {"size": [8]}):
        with pytest.raises(ValueError, match="--size"):
            resize_options(options(**wrong))


def row(model, stride, mean_iou, seconds):
    return {
        "model": model,
        "inference": Run(model, stride).inference,
        "stride": stride,
        "average": "features",
        "refinement": None,
        "mean_boundary_iou": float("nan"),
        "peak_memory_bytes": None,
        "mean_iou": mean_iou,
        "overall_accuracy": 0.5,
        "vision_seconds": seconds,
        "total_seconds": seconds + 1,
        "time_ratio": seconds / 0.5,
    }


def test_share_of_the_gap_closed_and_the_table():
    rows = [row("student", 24, 0.4, 9.0), row("base", None, 0.2, 0.5), row("base", 24, 0.28, 10.0)]
    assert find_gaps(rows) == []
    rows += [row("base", 96, 0.19, 1.0), row("student", None, 0.26, 0.5)]
    gaps = find_gaps(rows)
    assert [(gap["student"], gap["teacher"]) for gap in gaps] == [
        ("student", "base, sliding window of stride 24"),
        ("student", "base, sliding window of stride 96"),
    ]
    assert gaps[0]["share_closed"] == pytest.approx(0.75)
    assert gaps[0]["times_faster"] == 20
    assert gaps[1]["share_closed"] is None  # a teacher below the base leaves no gap
    report = {"title": "streets", "split": None, "photos": 3, "vocabulary": {"a": ["a"]}, "scored_classes": ["a"]}
    out = io.StringIO()
    show({**report, "runs": rows, "gaps": gaps}, Console(file=out, width=80, markup=False))
    lines = out.getvalue().splitlines()
    assert any("base" in line and "stride 24" in line and "28.00" in line and "20.0 ×" in line for line in lines)
    text = " ".join(out.getvalue().split())
    assert "75 % of the gap closed" in text and "no gap to close" in text
