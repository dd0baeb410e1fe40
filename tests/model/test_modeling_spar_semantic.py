"""A baked vocabulary or linear probe in a folder: same masks, all Auto classes, and other heads' folders are refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import HIDE
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, randomise, tiny_config
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline
from typer.testing import CliRunner

from spar_hf import (
    SPAR_TINY,
    SlidingWindowTeacher,
    SparConfig,
    SparForOpenVocabSegmentation,
    SparForSemanticSegmentation,
    SparImageProcessorPil,
    SparSemanticConfig,
    SparVisionModel,
    bake_vocabulary,
)
from spar_hf.cli.main import app
from spar_hf.model.prompts import embed_names
from spar_hf.model.segmentation import WORKING_BYTES, decide

LABELS = ["road, street", "car, automobile", "sky", "tree"]


@pytest.fixture(scope="module")
def picture():
    coarse = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((131, 90), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(two_towers, tokenizer, tmp_path):
    """A baked folder with an image processor."""
    bake_vocabulary(two_towers, tokenizer, LABELS, "short").save_pretrained(tmp_path / "baked")
    SparImageProcessorPil(size={"shortest_edge": 80}).save_pretrained(tmp_path / "baked")
    return tmp_path / "baked"


def label_map(segments, labels):
    result = np.full(np.asarray(segments[0]["mask"]).shape, -1)
    for segment in segments:
        result[np.asarray(segment["mask"]) == 255] = labels.index(segment["label"])
    return result


@pytest.mark.parametrize("size", [{"shortest_edge": 80}, {"shortest_edge": 131}, None])
def test_masks_of_a_baked_folder_are_those_of_the_words(folder, two_towers, tokenizer, picture, size):
    processor = SparImageProcessorPil(size=size)
    processor.save_pretrained(folder)
    words = pipeline("open-vocab-segmentation", model=two_towers, tokenizer=tokenizer, image_processor=processor)
    expected = words(picture, candidate_labels=LABELS, templates="short", output="map")
    segments = pipeline("image-segmentation", model=str(folder))(picture)
    assert len(segments) > 1
    assert (label_map(segments, expected["labels"]) == expected["map"]).mean() >= 0.9999
    scores = dict(zip(expected["labels"], expected["scores"], strict=True))
    assert {part["label"]: part["score"] for part in segments} == pytest.approx(
        {part["label"]: scores[part["label"]] for part in segments}, abs=1e-3
    )


@torch.no_grad()
def test_logits_of_classes_are_the_largest_of_their_names(two_towers, tokenizer, folder):
    baked = SparForSemanticSegmentation.from_pretrained(folder)
    pixels = torch.randn(2, 3, 50, 70)
    words = ["road", "street", "car", "automobile", "sky", "tree"]
    names = two_towers(pixels, text_embeds=embed_names(two_towers, tokenizer, words, "short")).logits
    outputs = baked(pixels)
    torch.testing.assert_close(outputs.name_logits, names, atol=1e-4, rtol=0)
    expected = torch.stack([names[:, :2].amax(1), names[:, 2:4].amax(1), names[:, 4], names[:, 5]], 1)
    torch.testing.assert_close(outputs.logits, expected, atol=1e-4, rtol=0)
    assert outputs.logits.argmax(1).max() < len(baked.config.id2label) == 4
    assert outputs.geometry.tolist() == [[50, 70, 16]] * 2


def test_a_batch_in_the_pipeline_gives_what_single_images_give(folder, picture):
    segment = pipeline("image-segmentation", model=str(folder))
    images = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    for one, other in zip(segment(images, batch_size=2), [segment(image) for image in images], strict=True):
        labels = list(segment.model.config.id2label.values())
        assert (label_map(one, labels) == label_map(other, labels)).mean() >= 0.999


@torch.no_grad()
def test_label_maps_are_upsampled_cropped_and_resized():
    """A linear classifier with bias on features that are not normalised, against plain interpolation."""
    vision = randomise(SparVisionModel(tiny_config()))
    weight, bias = torch.randn(5, 32), torch.randn(5)
    model = SparForSemanticSegmentation.from_weights(vision, list("abcde"), weight, bias)
    pixels = torch.randn(1, 3, 70, 51)
    logits = torch.einsum("bdhw,nd->bnhw", vision(pixels).feature_map, weight) + bias[:, None, None]
    outputs = model(pixels)
    torch.testing.assert_close(outputs.logits, logits, atol=1e-4, rtol=1e-4)
    up = F.interpolate(logits, scale_factor=16, mode="bilinear")[:, :, :70, :51]
    processor = SparImageProcessorPil()
    assert (processor.post_process_semantic_segmentation(outputs)[0] == up.argmax(1)[0]).float().mean() > 0.999
    picture = processor.post_process_semantic_segmentation(outputs, [(140, 102)])[0]
    twice = F.interpolate(logits, scale_factor=32, mode="bilinear")[:, :, :140, :102]
    assert picture.shape == (140, 102) and (picture == twice.argmax(1)[0]).float().mean() > 0.999
    with pytest.raises(ValueError, match="one for each"):
        processor.post_process_semantic_segmentation(outputs, [(140, 102), (1, 1)])

    labels = torch.randint(0, 5, (1, 70, 51))
    labels[:, :20] = 255
    loss = model(pixels, labels=labels).loss
    expected = -up.log_softmax(1).gather(1, labels.clamp(max=4)[:, None])[:, 0][labels != 255].mean()
    torch.testing.assert_close(loss, expected)
    for other in (labels[:, 1:], labels[0], labels.expand(2, -1, -1)):
        with pytest.raises(ValueError, match="nearest neighbour"):
            model(pixels, labels=other)


def semantic_model(names=None):
    torch.manual_seed(0)
    labels, rows = "abcde", 5 if names is None else sum(map(len, names))
    vision = randomise(SparVisionModel(tiny_config()))
    return SparForSemanticSegmentation.from_weights(vision, labels, torch.randn(rows, 32), torch.randn(rows), names)


def gradients(model, loss):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [x for x in torch.autograd.grad(loss, parameters, allow_unused=True) if x is not None]


NAMES = [["a"], ["b", "c", "d"], ["e", "f"], ["g"], ["h", "i"]]


@pytest.mark.parametrize(
    ("weight", "bias", "names", "wrong"),
    [
        ((1, 32), None, None, "weight"),
        ((3, 32), (1,), None, "bias"),
        ((3, 16), (3,), None, "weight"),
        ((3, 32), (3,), [["a"], ["b", "c"], ["d"]], "weight"),
    ],
)
def test_weights_of_another_shape_are_refused(vision_model, weight, bias, names, wrong):
    """A single row must not become that of all classes."""
    given = torch.zeros(weight), None if bias is None else torch.zeros(bias)
    with pytest.raises(ValueError, match=f"^{wrong} has shape"):
        SparForSemanticSegmentation.from_weights(vision_model, list("abc"), *given, names)


@pytest.mark.parametrize("names", [None, NAMES], ids=["classes", "names"])
@pytest.mark.parametrize("working_bytes", [WORKING_BYTES, 2**17])
def test_the_loss_is_that_of_all_upsampled_logits(monkeypatch, names, working_bytes):
    """Value and gradients against plain interpolation, cross entropy of the maximum over names at every pixel."""
    monkeypatch.setattr("spar_hf.model.modeling_spar_semantic.WORKING_BYTES", working_bytes)
    model = semantic_model(names)
    pixels, labels = torch.randn(2, 3, 70, 51), torch.randint(0, 5, (2, 70, 51))
    labels[0, :20], labels[1, 5:, 3:] = 255, 255  # the mean is over pixels, not over images
    outputs = model(pixels, labels=labels)
    grid = outputs.logits if names is None else outputs.name_logits
    up = F.interpolate(grid, scale_factor=16, mode="bilinear")[:, :, :70, :51]
    if names is not None:
        of_class = (up[:, :1], up[:, 1:4], up[:, 4:6], up[:, 6:7], up[:, 7:])
        up = torch.stack([logits.amax(1) for logits in of_class], 1)
    expected = F.cross_entropy(up, labels, ignore_index=255)
    torch.testing.assert_close(outputs.loss, expected)
    plain = gradients(model, expected)
    assert len(plain) > 10 and max(float(gradient.abs().max()) for gradient in plain) > 0.01
    for found, gradient in zip(gradients(model, model(pixels, labels=labels).loss), plain, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)
    # the maximum on the patch grid would give another loss
    coarse = F.interpolate(outputs.logits, scale_factor=16, mode="bilinear")[:, :, :70, :51]
    coarse_loss = F.cross_entropy(coarse, labels, ignore_index=255)
    assert bool((coarse_loss - expected).abs() > 1e-3) == (names is not None)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor returned by any operation."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [x for x in (found if isinstance(found, (tuple, list)) else (found,)) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(x.numel() for x in tensors)])
        return found


def test_the_loss_never_holds_classes_times_pixels(monkeypatch):
    """No tensor of the forward or backward pass has that size, nor have the saved tensors together."""
    monkeypatch.setattr("spar_hf.model.modeling_spar_semantic.WORKING_BYTES", 2**18)
    grid = torch.randn(1, 16, 12, 40, requires_grad=True)
    labels, waiting = torch.randint(0, 5, (1, 256, 192)), {}

    def keep(tensor):
        waiting[tensor.data_ptr()] = tensor.numel()  # once what several hold
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = semantic_model().segmentation_loss(grid, labels)
        loss.backward()
    assert max(largest.size, sum(waiting.values())) < 40 * 256 * 192 / 8


def test_the_loss_without_a_labelled_pixel_is_zero():
    model = semantic_model()
    loss = model(torch.randn(1, 3, 40, 50), labels=torch.full((1, 40, 50), 255)).loss
    assert float(loss.detach()) == 0
    found = gradients(model, loss)
    assert len(found) > 10 and all(bool((gradient == 0).all()) for gradient in found)


# --- folders ---


def test_auto_classes_load_the_folder_silently_and_exactly(folder, two_towers, transformers_log, tmp_path):
    model, info = AutoModelForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert type(model) is SparForSemanticSegmentation and not any(info.values())
    assert model.config.id2label == {0: "road", 1: "car", 2: "sky", 3: "tree"}
    assert type(AutoImageProcessor.from_pretrained(folder)) is SparImageProcessorPil
    tower = two_towers.vision_model.state_dict()
    for vision in (AutoModel.from_pretrained(folder), SparVisionModel.from_pretrained(folder)):
        assert isinstance(vision, SparVisionModel)
        assert vision.state_dict().keys() == tower.keys()
        assert all(torch.equal(tensor, tower[name]) for name, tensor in vision.state_dict().items())
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "vision")
    assert type(AutoModel.from_pretrained(tmp_path / "vision")) is SparVisionModel
    assert transformers_log == []


def test_a_head_on_a_models_configuration_leaves_that_its_text_tower(two_towers):
    config = SparSemanticConfig(backbone_config=two_towers.config)
    assert config.backbone_config.text_config is None and two_towers.config.text_config is not None


def test_another_heads_folder_is_refused(folder, two_towers, tmp_path):
    with pytest.raises(ValueError, match="no text tower"):
        SparForOpenVocabSegmentation.from_pretrained(folder)
    two_towers.save_pretrained(tmp_path / "both")
    two_towers.vision_model.save_pretrained(tmp_path / "vision")
    for other in ("both", "vision"):
        with pytest.raises(ValueError, match=r"holds no trained classifier.*bake_vocabulary"):
            SparForSemanticSegmentation.from_pretrained(tmp_path / other)
    weights = load_file(folder / "model.safetensors")
    weights.pop("classifier.bias")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"lacks 1 weights.*classifier\.bias"):
        SparForSemanticSegmentation.from_pretrained(folder)


def test_two_towers_in_image_segmentation_name_their_own_pipeline(picture):
    segment = pipeline("image-segmentation", model=SPAR_TINY)
    with pytest.raises(ValueError, match=r"open-vocab-segmentation.*bake_vocabulary"):
        segment(picture)


def test_bad_vocabularies_and_models_are_refused(two_towers, vision_model, tokenizer):
    with pytest.raises(ValueError, match="text tower"):
        bake_vocabulary(vision_model, tokenizer, LABELS)
    with pytest.raises(ValueError, match="at least one class"):
        bake_vocabulary(two_towers, tokenizer, [])
    with pytest.raises(ValueError, match="one list of names per class"):
        SparSemanticConfig(backbone_config=vision_model.config, id2label={0: "a", 1: "b"}, names=[["a"]])
    with pytest.raises(ValueError, match=r"classes \[1\] are empty.*at least one name"):
        SparSemanticConfig(backbone_config=vision_model.config, id2label={0: "a", 1: "b"}, names=[["x", "y"], []])


def test_the_classifier_stays_in_float32_in_half_precision(folder, picture):
    half = SparForSemanticSegmentation.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.classifier.weight.dtype == torch.float32 and half.vision_model.dtype == torch.bfloat16
    segment = pipeline("image-segmentation", model=str(folder), dtype=torch.bfloat16)
    assert sum((np.asarray(s["mask"]) == 255).sum() for s in segment(picture)) == 131 * 90


def test_folder_says_nothing_of_where_it_was_made(folder, tmp_path):
    model = SparForSemanticSegmentation.from_pretrained(folder)
    labels, weight = model.config.id2label.values(), torch.randn(4, 32)
    SparForSemanticSegmentation.from_weights(AutoModel.from_pretrained(folder), labels, weight).save_pretrained(
        tmp_path / "again"
    )
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert not config["backbone_config"]["_name_or_path"] and config["backbone_config"]["text_config"] is None
    assert config["names"][1] == ["car", "automobile"]


FRESH = """
import sys
from transformers import AutoModel, AutoModelForSemanticSegmentation, pipeline
import torch, numpy as np
from PIL import Image
folder, trust = sys.argv[1], {"trust_remote_code": True} if sys.argv[2] == "hidden" else {}
model = AutoModelForSemanticSegmentation.from_pretrained(folder, **trust)
features = AutoModel.from_pretrained(folder, **trust)(torch.zeros(1, 3, 40, 50)).feature_map
segments = pipeline("image-segmentation", model=folder, **trust)(Image.open(folder + "/image.png"))
print([(s["label"], int((np.asarray(s["mask"]) == 255).sum())) for s in segments], f"{float(features.detach().sum()):.3f}")
assert ("spar_hf" in sys.modules) == (sys.argv[2] != "hidden")
"""


def test_folder_runs_in_a_fresh_process_with_and_without_the_library(folder, picture, tmp_path):
    picture.save(folder / "image.png")
    printed = {}
    for mode, start in (("hidden", HIDE), ("installed", "import spar_hf\n")):
        result = subprocess.run(
            [sys.executable, "-c", start + FRESH, str(folder), mode],
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "TQDM_DISABLE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert "trust" not in result.stdout  # a folder asks no trust of those who have the library
        assert mode == "hidden" or "not supported" not in result.stderr
        printed[mode] = result.stdout
    assert printed["hidden"] == printed["installed"] and "road" in printed["hidden"]


def test_bake_command_writes_a_folder_or_one_line(tmp_path):
    output = tmp_path / "street"
    arguments = ["bake", "--labels", "road; car, automobile; sky", "--templates", "plain", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "3 classes" in result.output and "4 names" in result.output
    assert AutoModelForSemanticSegmentation.from_pretrained(output).config.num_labels == 3
    assert AutoImageProcessor.from_pretrained(output).size["shortest_edge"] == 384
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "exists" in again.output and "Traceback" not in again.output
    assert [path.name for path in tmp_path.iterdir()] == ["street"]

    Image.new("RGB", (40, 30)).save(tmp_path / "image.png")
    words = ["segment", str(tmp_path / "image.png"), "--labels", "sky", "--output", str(tmp_path / "masks.png")]
    for command in (words, ["app"], ["bake", "--labels", "sky", "--output", str(tmp_path / "again")]):
        asked = CliRunner().invoke(app, [*command, "--model", str(output)])
        *loading, said = asked.output.splitlines()  # the page says first that it loads
        assert asked.exit_code and set(loading) <= {"Loading the model."} and said.startswith("error:"), asked.output
        assert "has its classes in it" in asked.output
        assert f'pipeline("image-segmentation", model={str(output)!r})' in asked.output


def test_frequencies_of_rope_stay_in_full_precision():
    """A baked model of half precision is the pipeline's model, also before it is saved."""
    vision = SparVisionModel(SparConfig(backbone_config=CONFIGS["dinov3"]()))
    for parameter in vision.parameters():  # as `from_pretrained(dtype=…)` leaves them
        parameter.data = parameter.data.to(torch.bfloat16)
    baked = SparForSemanticSegmentation.from_weights(vision, ["road", "sky"], torch.randn(2, 32))
    buffers = dict(baked.vision_model.named_buffers())
    assert {name: tensor.dtype for name, tensor in vision.named_buffers()} == {n: t.dtype for n, t in buffers.items()}
    assert {parameter.dtype for parameter in baked.vision_model.parameters()} == {torch.bfloat16}


def test_an_image_without_a_batch_axis_is_refused(two_towers, tokenizer):
    """By the head, and by the teacher, which reads parts of images."""
    image = torch.zeros(3, 96, 96)
    for model in (
        bake_vocabulary(two_towers, tokenizer, ["road", "sky"]),
        SlidingWindowTeacher(two_towers.vision_model),
        SlidingWindowTeacher(two_towers.vision_model, scales=(1, 0.5)),
    ):
        with pytest.raises(ValueError, match=r"got shape \(3, 96, 96\)\. .*\[None\]"):
            model(image)


def test_the_mend_of_labels_that_are_no_class_is_named(two_towers, tokenizer):
    model = bake_vocabulary(two_towers, tokenizer, ["road", "sky"])
    labels = torch.full((1, 32, 32), 7)
    with pytest.raises(ValueError, match=r"hold 7, which is none of the 2 classes .*semantic_loss_ignore_index`, 255"):
        model(torch.zeros(1, 3, 32, 32), labels=labels)
    labels[0, 0] = 1
    model.config.semantic_loss_ignore_index = 7
    assert model(torch.zeros(1, 3, 32, 32), labels=labels).loss > 0


def test_outputs_of_two_towers_are_post_processed_too(two_towers, tokenizer, picture):
    """Every text is a class, as users of the Auto class expect."""
    processor = SparImageProcessorPil(size={"shortest_edge": 80})
    names = tokenizer(["road", "sky"], padding="max_length", return_tensors="pt")
    inputs = processor(picture, return_tensors="pt")
    sizes = inputs.pop("original_sizes")
    with torch.no_grad():
        outputs = two_towers(**inputs, **names)
    (found,) = processor.post_process_semantic_segmentation(outputs, sizes)
    working = tuple(inputs["pixel_values"].shape[-2:])
    expected = decide(outputs.logits[0], torch.arange(2), 16, working, picture.size[::-1]).labels
    assert found.shape == picture.size[::-1] and torch.equal(found.long(), expected.long())
