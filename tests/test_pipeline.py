"""The pipeline as a user calls it, on random weights: what it returns, where its masks lie, what it refuses."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, pipeline

import spar_hf
from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation, SparImageProcessorPil
from spar_hf.prompts import embed_names


@pytest.fixture
def segment(two_towers, tokenizer):
    processor = SparImageProcessorPil(size={"shortest_edge": 80})
    return pipeline("open-vocab-segmentation", model=two_towers, tokenizer=tokenizer, image_processor=processor)


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


LABELS = ["road", "car, automobile", "sky"]


def test_masks_partition_the_photo_and_equal_the_plain_formula(segment, photo, two_towers, tokenizer):
    segments = segment(photo, candidate_labels=LABELS)
    masks = np.stack([np.asarray(s["mask"]) for s in segments])
    assert masks.shape[1:] == (90, 131) and set(np.unique(masks)) <= {0, 255}
    assert ((masks == 255).sum(0) == 1).all()

    pixels = segment.image_processor(photo, return_tensors="pt")["pixel_values"]
    height, width = pixels.shape[-2:]
    with torch.no_grad():
        text = embed_names(two_towers, tokenizer, ["road", "car", "automobile", "sky"])
        logits = two_towers(pixels, text_embeds=text).logits
    up = F.interpolate(logits, scale_factor=16, mode="bilinear")[:, :, :height, :width]
    up = F.interpolate(up, size=(90, 131), mode="bilinear")[0].softmax(0)
    classes = torch.stack([up[0], torch.maximum(up[1], up[2]), up[3]])
    expected = classes.argmax(0)
    by_label = {s["label"]: np.asarray(s["mask"]) == 255 for s in segments}
    for index, label in enumerate(["road", "car", "sky"]):
        mask = by_label.get(label, np.zeros((90, 131), bool))
        assert (mask == (expected == index).numpy()).mean() > 0.98  # the second resizing of the formula blurs
    for s in segments:
        assert 0 < s["score"] <= 1


def test_list_in_list_out_and_text_is_embedded_once_per_vocabulary(segment, photo, two_towers):
    calls = []
    hook = two_towers.text_model.register_forward_hook(lambda *args: calls.append(1))
    singles = [segment(image, candidate_labels=LABELS) for image in (photo, photo.resize((40, 50)))]
    first = len(calls)
    together = segment([photo, photo.resize((40, 50))], candidate_labels=LABELS)
    assert len(calls) == first > 0
    segment(photo, candidate_labels=LABELS, templates="plain")
    assert len(calls) > first
    hook.remove()
    for one, other in zip(singles, together, strict=True):
        assert [(s["label"], s["score"]) for s in one] == [(s["label"], s["score"]) for s in other]
        assert all((np.asarray(a["mask"]) == np.asarray(b["mask"])).all() for a, b in zip(one, other, strict=True))


def test_map_output_agrees_with_segments(segment, photo):
    result = segment(photo, candidate_labels=LABELS, output="map")
    assert result["labels"] == ["road", "car", "sky"] and result["map"].shape == (90, 131)
    for s in segment(photo, candidate_labels=LABELS):
        index = result["labels"].index(s["label"])
        assert ((np.asarray(s["mask"]) == 255) == (result["map"] == index)).all()
        assert result["scores"][index] == pytest.approx(s["score"])


def test_working_size_is_an_option_and_the_masks_keep_the_photos(segment, photo, two_towers):
    shapes = []
    hook = two_towers.vision_model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[-2:]))
    mask = segment(photo, candidate_labels=LABELS, size={"shortest_edge": 45})[0]["mask"]
    hook.remove()
    assert shapes == [(45, 66)] and mask.size == (131, 90)


def test_unsure_pixels_go_to_a_background_without_words(segment, photo):
    plain = segment(photo, candidate_labels=LABELS, output="map")
    middle = float(np.median([s for s in plain["scores"] if s]))
    result = segment(photo, candidate_labels=LABELS, output="map", threshold=middle)
    assert result["labels"] == ["road", "car", "sky", "background"]
    moved = result["map"] == 3
    assert 0 < moved.mean() < 1 and (result["map"][~moved] == plain["map"][~moved]).all()
    named = segment(photo, candidate_labels=LABELS, output="map", threshold=1.0, background="sky")
    assert named["labels"] == ["road", "car", "sky"] and (named["map"] == 2).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "`candidate_labels` is missing"),
        ({"candidate_labels": "road"}, "is no vocabulary"),
        ({"candidate_labels": []}, "at least one class"),
        ({"candidate_labels": LABELS, "output": "nonsense"}, "'segments' or 'map'"),
        ({"candidate_labels": LABELS, "batch_size": 4}, "one at a time"),
        ({"candidate_labels": LABELS, "templates": "nonsense"}, "template set"),
    ],
)
def test_bad_calls_name_the_fix(segment, photo, call, message):
    with pytest.raises(ValueError, match=message):
        segment(photo, **call)


def test_a_vision_model_is_refused(vision_model, tokenizer):
    with pytest.raises(ValueError, match="two-tower"):
        pipeline(
            "open-vocab-segmentation",
            model=vision_model,
            tokenizer=tokenizer,
            image_processor=SparImageProcessorPil(),
        )


def test_no_model_named_runs_the_embedded_one_in_a_fresh_process():
    code = """
import logging, numpy as np
from PIL import Image
from transformers import pipeline
import spar_hf
segment = pipeline("open-vocab-segmentation")
result = segment(Image.new("RGB", (97, 61), "white"), candidate_labels=["sky", "road"])
print(sum((np.asarray(s["mask"]) == 255).sum() for s in result))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(97 * 61)]


def test_embedded_folder_serves_every_auto_class():
    from transformers import AutoImageProcessor, AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(SPAR_TINY)
    assert type(model) is spar_hf.SparVisionModel and model.dtype == torch.float32
    assert model.config.distillation["stride"] == 24
    assert AutoModel.from_pretrained(spar_hf.SPAR_TINY_BASE).config.distillation is None
    processor = AutoProcessor.from_pretrained(SPAR_TINY)
    inputs = processor(images=Image.new("RGB", (640, 480)), text=["sky"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 384, 512)
    assert type(AutoImageProcessor.from_pretrained(SPAR_TINY)) is SparImageProcessorPil
    tokens = AutoTokenizer.from_pretrained(SPAR_TINY)("Sky!", padding="max_length")["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(SPAR_TINY)("sky", padding="max_length")["input_ids"]


@torch.no_grad()
def test_embedded_student_is_nearer_to_the_teacher_than_its_base_on_a_photo_it_never_saw():
    """A photo inside scikit-learn: the student's one pass against the teacher's features, base against the same."""
    from sklearn.datasets import load_sample_image

    processor = SparImageProcessorPil.from_pretrained(SPAR_TINY)
    pixels = processor(load_sample_image("china.jpg"), return_tensors="pt")["pixel_values"]
    student = SparForOpenVocabSegmentation.from_pretrained(SPAR_TINY).vision_model
    base = SparForOpenVocabSegmentation.from_pretrained(spar_hf.SPAR_TINY_BASE).vision_model
    target = spar_hf.SlidingWindowTeacher(base, stride=48)(pixels).feature_map
    error = {
        name: float(F.mse_loss(model(pixels).feature_map, target))
        for name, model in (("student", student), ("base", base))
    }
    assert error["student"] < 0.7 * error["base"], error
