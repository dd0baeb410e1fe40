"""What the options of the evaluation mean, and what its reports say, with no model."""

import io
import json

import pytest
from huggingface_hub import ModelCard
from rich.console import Console
from tiny_models import tiny_config

from spar_hf.data.benchmarks import SegmentationSet, table_of_lines
from spar_hf.data.segmentation_sets import VOID
from spar_hf.evaluation.counts import Tally
from spar_hf.evaluation.evaluator import evaluate_runs, files_of
from spar_hf.evaluation.inference import Run, parse_models, parse_runs
from spar_hf.evaluation.options import Options, build_vocabulary, check_options, resize_options
from spar_hf.evaluation.reports import card_block, find_gaps, show


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
    for text, message in (
        ("{'cat': 'kitten'}", "is no JSON"),
        ('["cat"]', "does not hold classes"),
        ('{"cat": 3}', "does not hold classes"),
    ):
        words.write_text(text)
        with pytest.raises(ValueError, match=r"--labels .*labels.json " + message + r'.*Write \{"car": \["car"'):
            build_vocabulary(set_of(["cat", "dog"]), options(labels=str(words)))
    words.write_text(json.dumps({"cat": ["cat", "dog"]}))
    with pytest.raises(ValueError, match=r"two classes or twice: dog\. Merge or rename"):
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
    for way in ("sliding", "sliding-logits"):
        with pytest.raises(ValueError, match="a stride is 1 pixel or more"):
            parse_runs([f"base:{way}:00"], models)
    with pytest.raises(ValueError, match="names no model"):
        parse_runs(["teacher:single"], models)
    with pytest.raises(ValueError, match="stands twice"):
        parse_runs(["base:single", "base:single"], models)
    with pytest.raises(ValueError, match="names that differ"):
        parse_models(["a/model", "b/model"])


def test_options_out_of_range_are_refused_before_any_work(tmp_path):
    check_options(options(output=str(tmp_path / "new" / "result.json"), limit=1, threshold=1.0, scale=0.5))
    wrong = [
        ({"limit": -1}, "--limit must be at least 1, got -1"),
        ({"window_batch_size": 0}, "--window_batch_size must be at least 1, got 0"),
        ({"shortest_edge": 0}, "--shortest_edge must be at least 1"),
        ({"size": [64, -64]}, "--size takes a height and a width of at least 1"),
        ({"holdout_every": -2}, "--holdout_every must be at least 0"),
        ({"scale": -40.0}, "--scale must be above 0, got -40"),
        ({"threshold": 1.5}, "`threshold` is a share and must lie in 0 to 1, got 1.5"),
        ({"min_area": -0.1}, "`min_area` is a share"),
        ({"output": str(tmp_path)}, "is a folder.*result.json"),
        ({"output": str(tmp_path / "new") + "/"}, "is a folder.*new/result.json, say"),
    ]
    for values, message in wrong:
        with pytest.raises(ValueError, match=message):
            evaluate_runs(options(**values))  # no model and no data set is looked at: there are none


def test_commit_of_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tmp_path / "models--org--model"
    (model / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        tiny_config().save_pretrained(model / "snapshots" / commit)
        (model / "refs" / "main").write_text(commit)
        assert files_of("org/model") == [["commit", commit]]
    with pytest.raises(OSError, match="org/none is no folder here"):
        files_of("org/none")


def test_working_resolution_options():
    assert resize_options(options()) is None
    assert resize_options(options(native=True)) == {"do_resize": False}
    edges = resize_options(options(shortest_edge=384, longest_edge=512))
    assert edges["size"] == {"shortest_edge": 384, "longest_edge": 512}
    for wrong in ({"native": True, "size": [8, 8]}, {"longest_edge": 8, "size": [8, 8]}, {"size": [8]}):
        with pytest.raises(ValueError, match="--size"):
            resize_options(options(**wrong))


def test_damaged_counts_are_told_as_such(tmp_path):
    tally, path = Tally(2, 3), tmp_path / "0001-000.npz"
    tally.note_memory(1, 7)
    tally.save(path)
    whole = path.read_bytes()
    again = Tally(2, 3)
    again.load(path)
    assert again.memory.tolist() == [-1, 7]
    for damaged in (whole[: len(whole) // 2], b"", b"no counts"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"0001-000\.npz holds no counts .*Delete it"):
            again.load(path)


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
    report = {"title": "streets", "split": "val", "subset": "rain", "images": 3, "dataset": "org/streets"}
    report |= {"vocabulary": {"a": ["a"]}, "scored_classes": ["a"], "runs": rows, "gaps": gaps}
    out = io.StringIO()
    show(report, Console(file=out, width=80, markup=False))
    results = ModelCard(card_block(report, "student")).data.eval_results
    assert [(result.dataset_config, result.dataset_split) for result in results] == [("rain", "val")] * len(results)
    lines = out.getvalue().splitlines()
    assert any("base" in line and "stride 24" in line and "28.00" in line and "20.0 ×" in line for line in lines)
    text = " ".join(out.getvalue().split())
    assert "streets, rain, val: 3 images" in text
    assert "75 % of the gap closed" in text and "no gap to close" in text
