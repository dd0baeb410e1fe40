"""What a report says: the gap that students close, the table, the model card."""

import io
import json

import pytest
import yaml
from huggingface_hub import ModelCard, eval_result_entries_to_yaml, parse_eval_result_entries
from rich.console import Console

from spar_hf.evaluation.reports import card_paths, find_gaps, read_report, results_card, show, write_report
from spar_hf.evaluation.runs import Run
from spar_hf.utils.errors import UsageError


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
        "classes": {"a": {"iou": mean_iou}, "b": {"iou": float("nan")}},
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
    results = ModelCard(results_card(report, "student")).data.eval_results
    assert [(result.dataset_config, result.dataset_split) for result in results] == [("rain", "val")] * len(results)
    lines = out.getvalue().splitlines()
    assert any("base" in line and "stride 24" in line and "28.00" in line and "20.0 ×" in line for line in lines)
    text = " ".join(out.getvalue().split())
    assert "streets, rain, val: 3 images" in text
    assert "75 % of the gap closed" in text and "no gap to close" in text and "is over" not in text
    # a class that no mask holds, which one run predicts
    rows[1]["classes"]["b"]["iou"], out = 0.0, io.StringIO()
    rows[2]["classes"]["b"]["iou"] = None  # as a report that is read again has it
    show(report | {"scored_classes": ["a", "b"]}, Console(file=out, width=80, markup=False))
    text = " ".join(out.getvalue().split())
    assert "hold: b (student, sliding, stride 24); b (base, sliding, stride 24); b (" in text
    assert "b (base, single pass)" not in text


def test_results_for_the_hub(tmp_path):
    """They have the form that the hub reads, and the same values as the `model-index`."""
    report = {"title": "streets", "split": "val", "subset": None, "images": 3, "dataset": "org/streets", "gaps": []}
    report |= {"vocabulary": {"a": ["a"]}, "scored_classes": ["a"], "options": {"protocol": "spar"}}
    report["runs"] = [row("student", None, 0.26114, 0.5), row("student", 24, 0.3, 9.0), row("org/base", None, 0.2, 0.5)]
    write_report(report, None, str(tmp_path), None)
    assert sorted(path.name for path in (tmp_path / ".eval_results").iterdir()) == ["org-base.yaml", "student.yaml"]
    stored = yaml.safe_load((tmp_path / ".eval_results" / "student.yaml").read_text(encoding="utf-8"))
    entries = parse_eval_result_entries(stored)
    assert eval_result_entries_to_yaml(entries) == stored
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        *(("org/streets", "mean_iou", 26.11), ("org/streets", "overall_accuracy", 50.0)),
        *(("org/streets", "mean_iou", 30.0), ("org/streets", "overall_accuracy", 50.0)),
    ]
    assert "single pass" in entries[0].notes and "stride 24" in entries[2].notes and "protocol spar" in entries[0].notes
    index = ModelCard((tmp_path / "student.md").read_text(encoding="utf-8")).data.eval_results
    assert [result.metric_value for result in index] == [entry.value for entry in entries]


def test_report_of_version_0_1(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"title": "streets", "photos": 3}))
    assert read_report(tmp_path / "report.json") == {"title": "streets", "images": 3}


def test_two_models_have_two_cards():
    assert [path.name for path in card_paths("cards", ["a/b", "a.b"]).values()] == ["a-b.md", "a.b.md"]
    with pytest.raises(UsageError, match=r"a/b and a-b would both be written to a-b\.md"):
        card_paths("cards", ["a/b", "c", "a-b"])
