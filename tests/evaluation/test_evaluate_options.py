"""Options of an evaluation: their parts, their ranges, and the forms of models and runs."""

import dataclasses
from pathlib import Path

import pytest
from tiny_models import tiny_config

from spar_hf.evaluation import EvaluationOptions
from spar_hf.evaluation.counts import check_same_settings
from spar_hf.evaluation.evaluator import model_files
from spar_hf.evaluation.options import PARTS, OutputOptions, ResolutionOptions
from spar_hf.evaluation.runs import Run, parse_models, parse_runs
from spar_hf.utils.errors import UsageError


def options(**values):
    return EvaluationOptions.from_flat(**{"dataset": "set", "model": ["base"], **values})


def test_parts_are_flat_on_the_command_line():
    names = [entry.name for part in PARTS.values() for entry in dataclasses.fields(part)]
    assert len(names) == len(set(names))
    assert [entry.name for entry in dataclasses.fields(EvaluationOptions)] == list(PARTS)
    command = ["--dataset", "set", "--model", "base", "--limit", "3", "--size", "8", "9", "--no_warmup"]
    parsed = EvaluationOptions.parse(command)
    assert parsed == options(limit=3, size=[8, 9], warmup=False)
    assert parsed.data.limit == 3 and parsed.resolution.size == [8, 9] and not parsed.run.warmup
    assert list(parsed.flat) == names
    assert EvaluationOptions.from_flat(**parsed.flat) == parsed
    with pytest.raises(UsageError, match="limits"):
        options(limits=3)


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
        with pytest.raises(UsageError, match="NAME:sliding:STRIDE"):
            parse_runs([wrong], models)
    with pytest.raises(UsageError, match="mean of logits"):
        parse_runs(["base:sliding-logits:24+lposs"], models)
    for way in ("sliding", "sliding-logits"):
        with pytest.raises(UsageError, match="stride must be at least 1"):
            parse_runs([f"base:{way}:00"], models)
    with pytest.raises(UsageError, match="names no model"):
        parse_runs(["teacher:single"], models)
    with pytest.raises(UsageError, match="given twice"):
        parse_runs(["base:single", "base:single"], models)
    with pytest.raises(UsageError, match="names that differ"):
        parse_models(["a/model", "b/model"])


def test_options_out_of_range_are_refused(tmp_path):
    options(output=str(tmp_path / "new" / "result.json"), limit=1, threshold=1.0, dense_logit_scale=0.5)
    wrong = [
        ({"limit": -1}, "--limit -1 must be above 0"),
        ({"window_batch_size": 0}, "--window_batch_size 0 must be above 0"),
        ({"shortest_edge": 0}, "--shortest_edge 0 must be above 0"),
        ({"size": [64, -64]}, "--size takes a height and a width of at least 1"),
        ({"holdout_every": -2}, "--holdout_every -2 must be 0 or above"),
        ({"holdout_rest": True}, "--holdout_rest needs --holdout_every"),
        ({"dense_logit_scale": -40.0}, "--dense_logit_scale -40.0 must be above 0"),
        ({"threshold": 1.5}, "--threshold 1.5 must lie in 0 to 1"),
        ({"exclude_area": -0.1}, "--exclude_area"),
        ({"image_range": [1.0, 0.0]}, "LOW < HIGH"),
        ({"max_pixels": 0}, "--max_pixels 0 must be above 0"),
        ({"dilation_ratio": 0.0}, "--dilation_ratio 0.0 must be above 0"),
        ({"mixed_precision": "fp8"}, "--mixed_precision"),
        ({"output": str(tmp_path)}, r"--output .*result\.json"),
        ({"output": str(tmp_path / "new") + "/"}, r"--output .*new/result\.json"),
    ]
    for values, message in wrong:
        with pytest.raises(UsageError, match=message):
            options(**values)
    assert OutputOptions(output=str(tmp_path / "new")).output  # no folder yet


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_size": 32}, "leave out --window_size, or"),
        ({"window_batch_size": 4, "runs": ["sliding:single"]}, "leave out --window_batch_size, or"),
        ({"dilation_ratio": 0.01, "boundary": False}, "leave out --dilation_ratio"),
    ],
)
def test_options_without_effect_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        options(**values).run.check_windows()
    given = {"runs": ["base:single", "base:sliding-logits:24"], "window_size": 32, "window_batch_size": 4}
    options(**given, dilation_ratio=0.01).run.check_windows()


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [("labels", "class_names", "a.json"), ("scale", "dense_logit_scale", 2.0), ("min_area", "exclude_area", 0.1)],
)
def test_earlier_names_give_the_same_options(old, new, value):
    command = ["--dataset", "set", "--model", "base"]
    expected = options(**{new: value})
    assert options(**{old: value}) == EvaluationOptions.parse([*command, f"--{old}", str(value)]) == expected
    assert EvaluationOptions.parse([*command, f"--{new}", str(value)]) == expected
    # stored reports and partial counts
    check_same_settings({f"--{old}": value}, {f"--{new}": value}, Path("report.json"))
    with pytest.raises(UsageError, match=f"--{new} was"):
        check_same_settings({f"--{old}": value}, {f"--{new}": None}, Path("report.json"))


def test_commit_of_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tmp_path / "models--org--model"
    (model / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        tiny_config().save_pretrained(model / "snapshots" / commit)
        (model / "refs" / "main").write_text(commit)
        assert model_files("org/model") == [["commit", commit]]
    with pytest.raises(UsageError, match="org/none"):
        model_files("org/none")


def test_working_resolution():
    assert ResolutionOptions().resize is None
    assert ResolutionOptions(native=True).resize == {"do_resize": False}
    assert ResolutionOptions(size=[64, 96]).resize == {"do_resize": True, "size": {"height": 64, "width": 96}}
    edges = ResolutionOptions(shortest_edge=384, longest_edge=512).resize
    assert edges == {"do_resize": True, "size": {"shortest_edge": 384, "longest_edge": 512}}
    for wrong in ({"native": True, "size": [8, 8]}, {"longest_edge": 8, "size": [8, 8]}, {"size": [8]}):
        with pytest.raises(UsageError, match="--size"):
            ResolutionOptions(**wrong)
