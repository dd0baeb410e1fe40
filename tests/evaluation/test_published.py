"""Published figures: against their own means, in the documentation, and beside a report of ours."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from spar_hf.data.benchmarks import BENCHMARKS
from spar_hf.evaluation.options import EvaluationOptions
from spar_hf.evaluation.published import ROWS, SETS, differences, published_table, show_comparison
from spar_hf.model.vocabularies import vocabulary_lines
from spar_hf.utils.errors import UsageError

GUIDE = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
# means as they are published beside the rows: of six sets for SPAR's paper, of eight in the other sources
MEANS = {
    "SPAR, arXiv 2604.02252, main results": [
        *(31.7, 41.2, 33.1, 43.6, 42.7, 46.7, 40.9, 46.8),
        *(33.6, 27.7, 34.4, 35.6, 44.0, 43.8, 44.4, 43.8),
    ],
    "OV-Stitcher, arXiv 2604.08110, README of its code": [50.7, 51.6],
    "CorrCLIP, arXiv 2411.10086, README of its code": [51.0, 52.4, 53.6],
    "Trident, arXiv 2411.09219, as public benchmark listings of the paper have it": [48.6],
    "quoted in CCAR, README of its code": [41.4],
    "quoted in FreeCP (ICCV 2025), README of its code": [30.3],
}


@pytest.mark.parametrize("source", MEANS)
def test_rows_have_their_published_means(source):
    found = [sum(row.scores.values()) / len(row.scores) for row in ROWS if row.source == source]
    assert found == pytest.approx(MEANS[source], abs=0.11)  # of figures rounded to 0.1


def test_the_documentation_shows_the_same_figures():
    assert published_table() in GUIDE, f"docs/benchmarks.md needs this table:\n{published_table()}"


def test_the_documentation_shows_the_layouts():
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.+) \|$", GUIDE, re.M))
    expected = {}
    for name, entry in BENCHMARKS.items():
        images, (masks, _) = entry.images[0], entry.masks[0]
        names = "*/NAME" if entry.depth else "NAME"
        home = next((home for home in entry.homes if home), "")
        classes, home = len(vocabulary_lines(entry.vocabulary)), f"`{home}`" if home else ""
        paths = [f"`{pattern.format(names)}`" for pattern in (images, masks)]
        expected[name] = " | ".join([entry.title, str(classes), entry.split, home, *paths])
    table = "\n".join(f"| `{name}` | {row} |" for name, row in expected.items())
    assert {name: row for name, row in rows.items() if name in expected} == expected, (
        f"docs/benchmarks.md needs:\n{table}"
    )


def report_of(benchmark, mean_iou=0.5, **changed):
    options = {"protocol": "spar", "include": ["*"], "limit": None} | changed.pop("options", {})
    size = {"shortest_edge": 1024 if benchmark == "cityscapes" else 672, "longest_edge": 2048}
    run = {"model": "student", "inference": "single pass", "mean_iou": mean_iou, "resize": {"size": size}} | changed
    return {"title": benchmark, "dataset": benchmark, "images": 7, "options": options, "runs": [run]}


def shown(report):
    out = io.StringIO()
    show_comparison(report, Console(file=out, width=140, markup=False, highlight=False))
    return out.getvalue()


def test_ours_stands_among_the_published_rows():
    text = shown(report_of("voc21", mean_iou=0.455))
    lines = [line for line in text.splitlines() if re.search(r"\d\d\.\d ", line + " ")]
    scores = [float(re.search(r"(\d+\.\d)(\s+\d+)?\s*$", line).group(1)) for line in lines]
    assert scores == sorted(scores, reverse=True) and len(scores) == 1 + sum("voc21" in row.scores for row in ROWS)
    ours = next(line for line in lines if "OURS: student" in line)
    assert "45.5" in ours and "672" in ours
    assert "some published rows 336, 448 px" in text
    assert any("EntitySeg" in line and "76.2" in line for line in lines)


def test_what_differs_is_said():
    rows = [row for row in ROWS if row.method == "SPAR"]
    assert differences(report_of("cityscapes"), rows) == []
    plain = differences(report_of("voc20", options={"protocol": None, "limit": 7, "templates": "plain"}), rows)
    assert "--protocol spar" in plain[0] and "7 images" in plain[1] and "--templates" in plain[2]
    small = differences(report_of("voc20", resize={"size": {"shortest_edge": 384}}), rows)
    assert "384 px" in small[0] and "672 px" in small[0]
    square = differences(report_of("voc20", resize={"size": {"height": 700, "width": 600}}), rows)
    assert "600 px" in square[0]
    assert "checkpoint's size" in differences(report_of("voc20", resize=None), rows)[0]
    several = {"size": {"longest_edge": 900}}
    assert "not the same" in differences(report_of("voc20", resize=several), rows)[0]


# with a benchmark these change no score, are refused, or are in the table
SAME_SCORE = {
    *("dataset", "benchmark", "split", "subset", "image_column", "mask_column", "classes", "ignore_index"),
    *("reduce_zero_label", "max_pixels", "protocol", "model", "runs", "window_batch_size", "boundary", "flicker"),
    *("dilation_ratio", "warmup", "output", "card_folder", "compare", "save_seconds", "overwrite"),
}


def test_every_option_that_changes_a_score_is_said():
    options = EvaluationOptions.from_flat(dataset="voc", benchmark="voc20", protocol="spar", model=["student"]).flat
    rows = [row for row in ROWS if row.method == "SPAR"]
    assert differences(report_of("voc20", options=options), rows) == []
    values = {"include": ["a*"], "threshold": 0.0, "exclude_area": 0.5, "window_size": 224}
    for name in options.keys() - SAME_SCORE - {"mixed_precision"}:
        said = differences(report_of("voc20", options=options | {name: values.get(name, 1)}), rows)
        assert len(said) == 1 and (f"--{name}" in said[0] or "a part of the benchmark" in said[0]), name
    report = report_of("voc20", options=options) | {"mixed_precision": "bf16"}
    assert "--mixed_precision bf16" in differences(report, rows)[0]


def test_a_benchmark_without_figures_and_a_set_that_is_none():
    assert "No published figures" in shown(report_of("cwfid"))
    with pytest.raises(UsageError, match="--benchmark"):
        EvaluationOptions.from_flat(dataset="street", model=["student"], compare="published")
    with pytest.raises(UsageError, match="--compare"):
        EvaluationOptions.from_flat(dataset="voc", benchmark="voc21", model=["student"], compare="papers")


def test_every_set_of_the_table_is_a_benchmark():
    assert set(SETS) <= set(BENCHMARKS) and {name for row in ROWS for name in row.scores} == set(SETS)
