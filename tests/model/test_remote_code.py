"""Saved folders load without the library with `trust_remote_code=True`, and with the library without asking for trust."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from launching import HIDE
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

import spar_hf.model
from spar_hf import (
    SPAR_TINY,
    SparBackbone,
    SparForOpenVocabSegmentation,
    SparForSemanticSegmentation,
    SparForUniversalSegmentation,
    SparProcessor,
    SparSemanticModel,
    SparVisionModel,
)

USE = """
import sys, torch, numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor, pipeline
folder, trust = sys.argv[1], {"trust_remote_code": True} if sys.argv[2] == "hidden" else {}
pixels = load_file(folder + "/in.safetensors")["pixels"]
out = {}
with torch.no_grad():
    out["vision"] = AutoModel.from_pretrained(folder + "/vision", **trust)(pixels).feature_map
    out["tower"] = AutoModel.from_pretrained(folder + "/both", **trust)(pixels).feature_map
    for name, auto_class in (("vision", AutoModel), ("both", AutoModelForSemanticSegmentation)):
        again = folder + "/again-" + sys.argv[2] + "/" + name  # code that came with a folder saves folders that load
        model = auto_class.from_pretrained(folder + "/" + name, **trust)
        model.save_pretrained(again)
        model = auto_class.from_pretrained(again, **trust)
        if name == "vision":
            out["again"] = model(pixels).feature_map
    processor = AutoProcessor.from_pretrained(folder + "/both", **trust)
    inputs = processor(images=folder + "/image.png", text=["road", "sky"], return_tensors="pt")
    inputs.pop("original_sizes")
    out["logits"] = model(**inputs).logits
    image_processor = AutoImageProcessor.from_pretrained(folder + "/vision", **trust)
    out["pixels"] = image_processor(folder + "/image.png", return_tensors="pt").pixel_values
segment = pipeline("open-vocab-segmentation", model=folder + "/both", **trust)
segment.load_text_embeddings(folder + "/words.safetensors")
calls = []
segment.model.text_model.register_forward_pre_hook(lambda *args: calls.append(1))
images = [folder + "/image.png", folder + "/none.png", segment.encode(folder + "/image.png")]
options = {"candidate_labels": ["road", "sky"], "output": "probabilities"}
results = segment(images, batch_size=2, on_error="skip", **options)
assert "none.png" in results[1]["error"]
out["probabilities"], out["encoded"] = (torch.from_numpy(results[i]["probabilities"]) for i in (0, 2))
assert not calls, "words of a file ran through the text tower"
out["map"] = torch.from_numpy(segment(folder + "/image.png", candidate_labels=["road", "sky"], output="map")["map"])
assert ("spar_hf" in sys.modules) == (sys.argv[2] != "hidden"), "the package was not hidden"
save_file({k: v.contiguous() for k, v in out.items()}, folder + "/" + sys.argv[2] + ".safetensors")
"""


def write_folders(folder: Path) -> None:
    pipeline("open-vocab-segmentation", model=SPAR_TINY).save_pretrained(folder / "both")
    SparVisionModel.from_pretrained(SPAR_TINY).save_pretrained(folder / "vision")
    SparProcessor.from_pretrained(SPAR_TINY).image_processor.save_pretrained(folder / "vision")


def write_folders_of_version_0_1(folder: Path) -> None:
    """Folders with the code and JSON files that version 0.1 wrote; weights and tokenizer have not changed since."""
    write_folders(folder)
    with zipfile.ZipFile(Path(__file__).parent / "assets" / "folders_0_1.zip") as files:
        for name in ("both", "vision"):
            for path in [*(folder / name).glob("*.py"), *(folder / name).glob("*config.json")]:
                if path.name != "tokenizer_config.json":
                    path.unlink()
            for member in files.namelist():
                if member.startswith(("code/", f"{name}/")):
                    (folder / name / Path(member).name).write_bytes(files.read(member))


@pytest.fixture(
    scope="module", params=[write_folders, write_folders_of_version_0_1], ids=["this version", "version 0.1"]
)
def folder(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("checkpoints")
    request.param(folder)
    pipeline("open-vocab-segmentation", model=SPAR_TINY).save_text_embeddings(
        folder / "words.safetensors", ["road", "sky"]
    )
    save_file({"pixels": torch.randn(1, 3, 100, 140)}, folder / "in.safetensors")
    Image.effect_mandelbrot((120, 90), (-2, -1, 1, 1), 20).convert("RGB").save(folder / "image.png")
    return folder


def run(folder, mode: str, environment_folder) -> dict[str, torch.Tensor]:
    code = (HIDE if mode == "hidden" else "import spar_hf\n") + USE
    environment = {**os.environ, "HF_MODULES_CACHE": str(environment_folder), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), mode],
        env=environment,
        cwd=environment_folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(folder / f"{mode}.safetensors")


@pytest.mark.slow
def test_folders_load_without_the_library_and_give_the_same(folder, tmp_path):
    hidden, installed = run(folder, "hidden", tmp_path), run(folder, "installed", tmp_path)
    assert set(hidden) == {"vision", "again", "tower", "logits", "pixels", "map", "probabilities", "encoded"}
    for name, tensor in installed.items():
        torch.testing.assert_close(hidden[name], tensor, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(hidden["again"], hidden["vision"])


def closure(modules: set[str]) -> set[str]:
    """The modules and all modules of `spar_hf/model/` that they import, from their syntax trees."""
    found: set[str] = set()
    while modules - found:
        name = (modules - found).pop()
        found.add(name)
        for node in ast.walk(ast.parse((Path(spar_hf.model.__file__).parent / f"{name}.py").read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                modules = modules | {node.module}
    return found


SAVED = {
    SparVisionModel: {"configuration_spar", "modeling_spar", "backbone_spar", "image_processing_spar"},
    SparBackbone: {"configuration_spar", "modeling_spar", "backbone_spar", "image_processing_spar"},
    SparSemanticModel: {"configuration_spar", "modeling_spar", "backbone_spar", "image_processing_spar"},
    SparForOpenVocabSegmentation: {"modeling_spar", "backbone_spar", "processing_spar", "pipeline"},
    SparForSemanticSegmentation: {"modeling_spar_semantic", "image_processing_spar"},
    SparForUniversalSegmentation: {"modeling_spar_universal", "image_processing_spar_universal"},
}


@pytest.mark.parametrize("model_class", SAVED, ids=lambda model_class: model_class.__name__)
def test_a_folder_carries_the_code_of_its_class_and_no_more(model_class, two_towers, tmp_path):
    if model_class is SparForUniversalSegmentation:
        model = model_class.from_spar(two_towers.vision_model, num_labels=2, hidden_dim=32, decoder_layers=2)
    elif model_class in (SparForSemanticSegmentation, SparSemanticModel):
        model = SparForSemanticSegmentation.from_weights(two_towers.vision_model, ["a"], torch.randn(1, 32))
        if model_class is SparSemanticModel:
            model = model_class(model.config)
    else:
        model = model_class(two_towers.config)
    model.save_pretrained(tmp_path)
    expected = closure(SAVED[model_class])
    assert {path.stem for path in tmp_path.glob("*.py")} == expected
    assert ("pipeline" in expected) == (model_class is SparForOpenVocabSegmentation)
    config = json.loads((tmp_path / "config.json").read_text())
    named = {reference.split(".")[0] for reference in config["auto_map"].values()}
    named |= {task["impl"].split(".")[0] for task in config.get("custom_pipelines", {}).values()}
    assert SAVED[model_class] <= named <= expected
    assert model_class is SparForOpenVocabSegmentation or "AutoProcessor" not in config["auto_map"]


def test_saving_into_a_folder_of_version_0_1_replaces_its_code(tmp_path):
    write_folders_of_version_0_1(tmp_path)
    assert (tmp_path / "vision" / "photo_streams.py").is_file()
    SparVisionModel.from_pretrained(tmp_path / "vision").save_pretrained(tmp_path / "vision")
    here = Path(spar_hf.model.__file__).parent
    for name in closure({"modeling_spar", "backbone_spar", "image_processing_spar"}):
        assert (tmp_path / "vision" / f"{name}.py").read_bytes() == (here / f"{name}.py").read_bytes()
