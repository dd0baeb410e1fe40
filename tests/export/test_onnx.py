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
from spar_hf.export.verification import Case, affordable
from spar_hf.model.results import OUTPUT_BYTES
from spar_hf.model.template_choice import TemplateChoice
from spar_hf.runtime import OnnxSegmenter
from spar_hf.utils.errors import UsageError

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


def test_a_background_that_was_asked_for_is_a_segment(model_folder, pipe, tmp_path):
    """Segments leave out a background that was added to the words, and show one of the words, as the pipeline does."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8))
    words = ["road", "sky", "car"]
    (largest, *_) = sorted(pipe(image, candidate_labels=words), key=lambda one: -int(np.asarray(one["mask"]).sum()))
    others = [word for word in words if word != largest["label"]]
    for name, given, background in (("asked", words, largest["label"]), ("added", others, [largest["label"]])):
        export(model_folder, tmp_path / name, words=given, background=background)
        found = {one["label"] for one in OnnxSegmenter(tmp_path / name)(image)}
        assert found == {one["label"] for one in pipe(image, candidate_labels=given, background=background)}
        assert (largest["label"] in found) is (name == "asked") and "background" not in found


def test_templates_of_each_class_need_the_classes(model_folder, tmp_path):
    TemplateChoice(("a photo of a {}.",), {"car": ("the {}.",)}).save(tmp_path / "chosen.json")
    with pytest.raises(UsageError, match="--words"):
        export(model_folder, tmp_path / "out", templates=str(tmp_path / "chosen.json"))
    TemplateChoice(("the {}.",), {}).save(tmp_path / "one.json")
    assert export(model_folder, tmp_path / "out", templates=str(tmp_path / "one.json"))["text"]["templates"] == [
        "the {}."
    ]


@pytest.mark.parametrize("classes", [1, 150, 300, 5000])
def test_probabilities_of_many_classes_are_compared_on_smaller_images(classes):
    for height, width in ((333, 517), (512, 2049)):
        case = affordable(Case("large", (512, 512), (height, width)), classes)
        pixels = case.image_size[0] * case.image_size[1]
        assert 4 * classes * pixels <= OUTPUT_BYTES and case.size == (512, 512)
        assert case.image_size == (height, width) or 4 * classes * height * width > OUTPUT_BYTES


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
