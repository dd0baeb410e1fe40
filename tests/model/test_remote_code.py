"""Saved folders load with `trust_remote_code=True` where the library is not installed, and ask no trust where it is."""

import os
import subprocess
import sys

import pytest
import torch
from launching import HIDE
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

from spar_hf import SPAR_TINY, SparProcessor, SparVisionModel

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
    model = AutoModelForSemanticSegmentation.from_pretrained(folder + "/both", **trust)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    segment = pipeline("open-vocab-segmentation", model=SPAR_TINY)
    segment.save_pretrained(folder / "both")
    segment.save_text_embeddings(folder / "words.safetensors", ["road", "sky"])
    processor = SparProcessor.from_pretrained(SPAR_TINY)
    SparVisionModel.from_pretrained(SPAR_TINY).save_pretrained(folder / "vision")
    processor.image_processor.save_pretrained(folder / "vision")
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


def test_folders_load_without_the_library_and_give_the_same(folder, tmp_path):
    hidden, installed = run(folder, "hidden", tmp_path), run(folder, "installed", tmp_path)
    assert set(hidden) == {"vision", "tower", "logits", "pixels", "map", "probabilities", "encoded"}
    for name, tensor in installed.items():
        torch.testing.assert_close(hidden[name], tensor, msg=lambda m, n=name: f"{n}: {m}")
