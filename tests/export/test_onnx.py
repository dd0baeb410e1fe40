"""ONNX exports: what ONNX Runtime computes equals PyTorch at any size and number of names, and the folder is complete."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from safetensors import safe_open
from tiny_models import make_tokenizer
from transformers import AutoImageProcessor, AutoTokenizer

from spar_hf.export import export

ROOT = Path(__file__).parents[2]
WORDS = ["road, street", "car, automobile", "sky"]


def session(folder, name="vision_model"):
    return onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])


def test_the_folder_has_what_a_client_needs(exported, model_folder):
    folder, record = exported
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "spar_export.json",
        "onnx/vision_model.onnx",
        "onnx/vision_model_quantized.onnx",
        "onnx/text_model.onnx",
    }
    assert json.loads((folder / "spar_export.json").read_text()) == json.loads(json.dumps(record))
    assert AutoTokenizer.from_pretrained(folder)("road")["input_ids"] == make_tokenizer()("road")["input_ids"]
    assert AutoImageProcessor.from_pretrained(folder).size == {"shortest_edge": 80}
    graph = session(folder)
    for listed, values in ((record["inputs"], graph.get_inputs()), (record["outputs"], graph.get_outputs())):
        assert [(value["name"], value["shape"]) for value in listed] == [(value.name, value.shape) for value in values]


def test_every_comparison_is_in_the_record(exported):
    rows = [row for row in exported[1]["verification"]["vision"] if row["dtype"] == "fp32"]
    assert len({tuple(row["size"]) for row in rows}) >= 5 and {row["names"] for row in rows} == {1, 3, 150, 300}
    assert all(row["logit_error"] < 1e-4 and row["labels_wrong"] == 0 for row in rows)
    assert len(exported[1]["verification"]["vision"]) == 2 * len(rows)
    assert exported[1]["verification"]["text"]["largest_error"] < 1e-5


def test_label_maps_are_those_of_the_pipeline(exported, pipe):
    """As a client does it: tokenizer, text tower, templates, image processor, graph."""
    folder, record = exported
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8))
    expected = pipe(image, candidate_labels=WORDS, output="map")
    names = [["road", "street"], ["car", "automobile"], ["sky"]]
    flat, text = [name for some in names for name in some], record["text"]
    prompts = [template.replace("{}", name) for name in flat for template in text["templates"]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompts, padding=text["padding"], max_length=text["max_tokens"], return_tensors="np")["input_ids"]
    embeddings = session(folder, "text_model").run(None, {"input_ids": ids.astype(np.int64)})[0]
    embeddings = embeddings.reshape(len(flat), len(text["templates"]), -1).mean(1)
    inputs = {
        "pixel_values": AutoImageProcessor.from_pretrained(folder)(image, return_tensors="np")["pixel_values"],
        "text_embeds": embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True),
        "class_of_name": np.array([label for label, some in enumerate(names) for _ in some]),
        "image_size": np.array([90, 131]),
    }
    labels, confidence = session(folder).run(["labels", "confidence"], inputs)
    assert (labels.dtype, confidence.dtype) == (np.uint16, np.float16)
    assert np.array_equal(labels[0], expected["map"])
    for label, score in enumerate(expected["scores"]):
        assert confidence[0][labels[0] == label].mean() == pytest.approx(score, abs=1e-3)


def test_the_client_of_the_guide(exported, pipe, tmp_path, monkeypatch):
    """The program in docs/export.md gives the label map of the pipeline."""
    source = (ROOT / "docs" / "export.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "exported").symlink_to(exported[0])
    pixels = np.random.default_rng(2).integers(0, 256, (90, 131, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(source, found)
    assert np.array_equal(found["labels"][0], pipe("street.png", candidate_labels=WORDS, output="map")["map"])


def test_words_can_be_part_of_the_graph(model_folder, pipe, tmp_path):
    record = export(model_folder, tmp_path / "street", words=WORDS, background=["grass", "tree"])
    image = np.random.default_rng(1).random((50, 70, 3), dtype=np.float32)
    expected = pipe(image, candidate_labels=WORDS, background=["grass", "tree"], output="map")
    pixels = pipe.image_processor(image, return_tensors="np")["pixel_values"]
    graph = session(tmp_path / "street")
    labels = graph.run(["labels"], {"pixel_values": pixels, "image_size": np.array([50, 70])})[0]
    assert labels.dtype == np.uint8 and np.array_equal(labels[0], expected["map"])
    assert [c["label"] for c in record["classes"]] == expected["labels"] and record["background"] == expected[
        "background"
    ]
    assert record["text_graph"] is None and not (tmp_path / "street" / "onnx" / "text_model.onnx").exists()
    with safe_open(tmp_path / "street" / "text_embeds.safetensors", "np") as file:
        assert json.loads(file.metadata()["names"]) == ["road", "street", "car", "automobile", "sky", "grass", "tree"]
        assert file.get_tensor("text_embeds").shape == (7, 32)
