"""What an export refuses before any model is traced: one line with the remedy, exit status 2, nothing written."""

import shutil
from pathlib import Path

import pytest
import torch
from model_classes import make_model
from tiny_models import CONFIGS
from typer.testing import CliRunner

from spar_hf import SPAR_TINY, SparImageProcessorPil
from spar_hf.cli.main import app
from spar_hf.export import aoti_format, export
from spar_hf.export.folder import RECORD
from spar_hf.export.options import FORMATS, HEADS, check_options
from spar_hf.utils.errors import UsageError


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    make_model("vision").save_pretrained(folder)
    SparImageProcessorPil().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "args, remedy",
    [
        (["--head", "map"], "classmap"),
        (["--format", "tflite"], "onnx, openvino"),
        (["--dtype", "fp64"], "fp32, fp16"),
        (["--dtype", ","], "fp32, fp16"),
        (["--dtype", "bf16"], "--format openvino"),
        (["--format", "aoti"], "--head logits"),
        (["--format", "aoti", "--head", "logits", "--dtype", "int8"], "--format openvino"),
        (["--format", "executorch", "--head", "logits", "--dtype", "bf16"], "--dtype fp32"),
        (["--words", "@missing.txt"], "missing.txt"),
        (["--words", "road; Road"], "Merge or rename"),
        (["--background", "auto"], "--words"),
        (["--templates", "long"], "imagenet80"),
    ],
)
def test_options_that_cannot_be(args, remedy, tmp_path):
    result = CliRunner().invoke(app, ["export", str(SPAR_TINY), "--output", str(tmp_path / "out"), *args])
    assert result.exit_code == 2 and remedy in result.output, result.output
    lines = [line for line in result.output.splitlines() if not line.endswith("…")]  # but those of the steps
    assert len(lines) == 1 and not any(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("spar_hf.export.options.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'spar-hf\[onnx\]'"):
        check_options("onnx", "logits", ["fp32"])
    with pytest.raises(UsageError, match=r"pip install 'spar-hf\[onnx,openvino,nncf\]'"):
        check_options("openvino", "logits", ["int8"])


def test_packages_of_torch_need_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(aoti_format.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="CXX"):
        aoti_format.compile_graph(torch.nn.Module(), tmp_path / "vision_model.pt2")
    assert not any(tmp_path.iterdir())


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    with pytest.raises(UsageError, match="--overwrite"):
        export(SPAR_TINY, tmp_path)


def test_only_an_export_is_replaced_and_never_what_is_read(vision_folder, tmp_path):
    """Also not where the folder of an export was used for the model, or its packages, too."""
    model = shutil.copytree(vision_folder, tmp_path / "student" / "model")
    for folder in (tmp_path / "student", model):
        with pytest.raises(UsageError, match="not an export"):
            export(model, folder, head="features", overwrite=True)
    (tmp_path / "student" / RECORD).write_text("{}")
    with pytest.raises(UsageError, match="is read"):
        export(model, tmp_path / "student", head="features", overwrite=True)
    assert {path.name for path in model.iterdir()} == {path.name for path in Path(vision_folder).iterdir()}
    words = tmp_path / "student" / "words.txt"
    words.write_text("road\nsky\n")
    given = ["export", str(vision_folder), "--words", f"@{words}", "--output", str(tmp_path / "student"), "--overwrite"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2 and "words.txt is read" in result.output and words.is_file()


def test_an_empty_folder_and_an_export_are_replaced(tmp_path):
    for _ in range(2):
        with pytest.raises(UsageError, match="nowhere"):  # the next thing that is looked at
            export(tmp_path / "nowhere", tmp_path / "out", overwrite=True)
        (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / RECORD).write_text("{}")
    with pytest.raises(UsageError, match="nowhere"):
        export(tmp_path / "nowhere", tmp_path / "out", overwrite=True)


def test_models_without_a_text_tower_have_no_words(vision_folder, tmp_path):
    with pytest.raises(UsageError, match="--head features"):
        export(vision_folder, tmp_path / "out", head="classmap")
    with pytest.raises(UsageError, match="no text tower"):
        export(vision_folder, tmp_path / "out", head="features", words=["road"])
    with pytest.raises(UsageError, match="leave --templates out"):
        export(vision_folder, tmp_path / "out", head="features", templates="plain")


def test_models_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        export(tmp_path / "nowhere", tmp_path / "out")
    make_model("universal").save_pretrained(tmp_path / "universal")
    with pytest.raises(UsageError, match="masks of things"):
        export(tmp_path / "universal", tmp_path / "out")
    make_model("semantic").save_pretrained(tmp_path / "semantic")
    SparImageProcessorPil().save_pretrained(tmp_path / "semantic")
    with pytest.raises(UsageError, match="leave --words out"):
        export(tmp_path / "semantic", tmp_path / "out", words=["road"])


def test_every_format_says_why_it_has_no_such_head_or_dtype():
    for format in FORMATS.values():
        for name in (*HEADS, "fp32", "fp16", "bf16", "int8"):
            assert name in format.heads or name in format.dtypes or "Take" in format.refusals[name]


@pytest.mark.parametrize("readout", CONFIGS)
@torch.no_grad()
def test_half_precision_ends_at_the_last_norm(readout):
    from spar_hf.export.graphs import in_half

    model = make_model("vision", readout)
    half = in_half(model, torch.bfloat16)
    kinds = {name.split(".")[1]: p.dtype for name, p in half.named_parameters() if name.startswith("backbone.")}
    assert {torch.float32, torch.bfloat16} == set(kinds.values()) and half.dtype == torch.bfloat16
    images = torch.randn(1, 3, 40, 56)
    one, two = half(images).feature_map, model(images).feature_map
    assert one.dtype == torch.float32 and model.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(one, two, dim=1).min() > 0.99
