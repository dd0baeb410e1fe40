"""`spar-hf env`: what a bug report says."""

import platform

import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spar_hf import SPAR_TINY, SparVisionModel, __version__
from spar_hf.cli.main import app
from spar_hf.model.fingerprints import vision_fingerprint


def env(*arguments, status=0):
    result = CliRunner().invoke(app, ["env", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def test_versions_and_device():
    lines = env().splitlines()
    for line in (f"python: {platform.python_version()}", f"spar-hf: {__version__}", f"torch: {torch.__version__}"):
        assert f"- {line}" in lines
    assert f"- transformers: {transformers.__version__}" in lines
    assert any(line.startswith("- device: ") for line in lines) and not any("fingerprint" in line for line in lines)


def test_fingerprints_follow_the_weights(base_folder, tmp_path):
    said = env(base_folder)
    assert "two towers" in said and "text fingerprint" in said
    for file in base_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert env(tmp_path) == said
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.startswith("vision_model."))
    save_file(weights | {name: weights[name] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    changed = env(tmp_path)
    facts, others = ({line.split(": ")[0]: line for line in text.splitlines()} for text in (said, changed))
    assert [fact for fact in facts if facts[fact] != others[fact]] == ["- vision fingerprint"]


def test_the_fingerprint_is_that_of_the_loaded_model():
    assert vision_fingerprint(SparVisionModel.from_pretrained(SPAR_TINY))[:20] in env(SPAR_TINY)


def test_a_model_that_does_not_exist_is_one_line(tmp_path):
    said = env(tmp_path / "nothing", status=2)
    assert len(said.splitlines()) == 1 and "nothing" in said
