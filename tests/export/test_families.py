"""Every family of backbones and every format, with random weights: each export compares itself with PyTorch."""

import numpy as np
import onnxruntime
import pytest
import torch
from model_classes import make_model, semantic_config
from PIL import Image
from tiny_models import make_tokenizer, randomise

from spar_hf import SparForSemanticSegmentation, SparImageProcessorPil, SparProcessor
from spar_hf.export import export

pytestmark = pytest.mark.slow


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    images = SparImageProcessorPil(size={"shortest_edge": 80})
    (images if tokenizer is None else SparProcessor(images, tokenizer)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("readout, words", [("naflex", ["road", "sky"]), ("maskclip", None), ("dinov3txt", None)])
def test_two_towers(readout, words, tmp_path):
    """CLIP's and DINOv3.txt's text towers are exported too: pooled at the end of the text, and cut to its last half."""
    folder = save(make_model("two towers", readout), tmp_path / "model", make_tokenizer())
    record = export(folder, tmp_path / "out", words=words)
    rows = record["verification"]["vision"]
    assert all(row["logit_error"] < 1e-4 and row["labels_wrong"] == 0 for row in rows)
    if words is None:
        assert record["verification"]["text"]["largest_error"] < 1e-5


def test_features_of_a_vision_tower(tmp_path):
    folder = save(make_model("vision", "dinov3"), tmp_path / "model")
    record = export(folder, tmp_path / "out", head="features", dtypes=["fp32", "fp16", "int8"])
    assert [tensor["name"] for tensor in record["inputs"] + record["outputs"]] == ["pixel_values", "feature_map"]
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_classes_of_a_trained_head(tmp_path):
    """Class map and probabilities of a linear head whose classes have several names, without words."""
    config = semantic_config("siglip", names=[["road", "street"], ["car"], ["sky"], ["tree"]], normalize_features=True)
    torch.manual_seed(0)
    model = randomise(SparForSemanticSegmentation(config))
    folder = save(model, tmp_path / "model")
    record = export(folder, tmp_path / "out", head="probabilities")
    assert [c["label"] for c in record["classes"]] == ["road", "car", "sky", "tree"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    images = SparImageProcessorPil.from_pretrained(folder)
    inputs = images(image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(inputs["pixel_values"])
    expected = images.post_process_semantic_segmentation(
        outputs, inputs["original_sizes"], return_segmentation_scores=True
    )
    graph = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "vision_model.onnx")
    feed = {"pixel_values": inputs["pixel_values"].numpy(), "image_size": np.array([50, 70])}
    found = graph.run(["probabilities"], feed)[0][0]
    np.testing.assert_allclose(found, expected[0]["segmentation_scores"].numpy(), atol=1e-5)


@pytest.mark.parametrize("format", ["aoti", "executorch"])
def test_formats_of_logits(format, model_folder, tmp_path):
    if format == "executorch":
        pytest.importorskip("executorch")
    record = export(model_folder, tmp_path / "out", format=format, head="logits", words=["road", "car", "sky"])
    rows = record["verification"]["vision"]
    assert all(row["logit_error"] < 1e-4 and row["names"] == 3 for row in rows)
    assert (tmp_path / "out" / record["graphs"]["fp32"]).is_file()
