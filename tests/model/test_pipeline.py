"""The pipeline with random weights: results, position of the masks, refused inputs."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, pipeline
from transformers.utils.logging import warning_once

import spar_hf
from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation, SparImageProcessorPil
from spar_hf.model.prompts import embed_names
from spar_hf.model.segmentation import decide

LABELS = ["road", "car, automobile", "sky"]


def test_masks_partition_the_image_and_equal_the_plain_formula(segment, picture, two_towers, tokenizer):
    segments = segment(picture, candidate_labels=LABELS)
    masks = np.stack([np.asarray(s["mask"]) for s in segments])
    assert masks.shape[1:] == (90, 131) and set(np.unique(masks)) <= {0, 255}
    assert ((masks == 255).sum(0) == 1).all()

    pixels = segment.image_processor(picture, return_tensors="pt")["pixel_values"]
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


def same(one: dict, other: dict) -> float:
    """Share of equal pixels of two label maps."""
    assert one["labels"] == other["labels"] and one["map"].shape == other["map"].shape
    return float((one["map"] == other["map"]).mean())


def test_list_in_list_out_and_text_is_embedded_once_per_vocabulary(segment, picture, two_towers):
    calls = []
    hook = two_towers.text_model.register_forward_hook(lambda *args: calls.append(1))
    singles = [segment(image, candidate_labels=LABELS) for image in (picture, picture.resize((40, 50)))]
    first = len(calls)
    together = segment([picture, picture.resize((40, 50))], candidate_labels=LABELS)
    assert len(calls) == first > 0
    segment(picture, candidate_labels=LABELS, templates="plain")
    assert len(calls) > first
    hook.remove()
    for one, other in zip(singles, together, strict=True):
        assert [(s["label"], s["score"]) for s in one] == [(s["label"], s["score"]) for s in other]
        assert all((np.asarray(a["mask"]) == np.asarray(b["mask"])).all() for a, b in zip(one, other, strict=True))


def test_map_output_agrees_with_segments(segment, picture):
    result = segment(picture, candidate_labels=LABELS, output="map")
    assert result["labels"] == ["road", "car", "sky"] and result["map"].shape == (90, 131)
    for s in segment(picture, candidate_labels=LABELS):
        index = result["labels"].index(s["label"])
        assert ((np.asarray(s["mask"]) == 255) == (result["map"] == index)).all()
        assert result["scores"][index] == pytest.approx(s["score"])


def test_working_size_is_an_option_and_the_masks_keep_the_images(segment, picture, two_towers):
    shapes = []
    hook = two_towers.vision_model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[-2:]))
    mask = segment(picture, candidate_labels=LABELS, size={"shortest_edge": 45})[0]["mask"]
    hook.remove()
    assert shapes == [(45, 66)] and mask.size == (131, 90)


def test_unsure_pixels_go_to_a_background_without_words(segment, picture):
    plain = segment(picture, candidate_labels=LABELS, output="map")
    middle = float(np.median([s for s in plain["scores"] if s]))
    result = segment(picture, candidate_labels=LABELS, output="map", threshold=middle)
    assert result["labels"] == ["road", "car", "sky", "background"]
    moved = result["map"] == 3
    assert 0 < moved.mean() < 1 and (result["map"][~moved] == plain["map"][~moved]).all()
    named = segment(picture, candidate_labels=LABELS, output="map", threshold=1.0, background="sky")
    assert named["labels"] == ["road", "car", "sky"] and (named["map"] == 2).all()


def test_a_background_that_no_pixel_gets_is_told(segment, picture, caplog):
    def told(**options):
        warning_once.cache_clear()
        caplog.clear()
        segment(picture, candidate_labels=LABELS, output="map", **options)
        return any("No pixel gets the background 'sea'" in message for message in caplog.messages)

    assert told(background="sea")
    for options in ({"background": "SKY"}, {"background": ["sea"]}, {"background": "sea", "threshold": 0.5}):
        assert not told(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "`candidate_labels` is missing"),
        ({"candidate_labels": "road"}, "is no vocabulary"),
        ({"candidate_labels": []}, "at least one class"),
        ({"candidate_labels": ["road", "Road "]}, "stand twice"),
        ({"candidate_labels": LABELS, "output": "nonsense"}, "'segments', 'map', 'probabilities' or 'logits'"),
        ({"candidate_labels": LABELS, "on_error": "ignore"}, "'raise' or 'skip'"),
        ({"candidate_labels": LABELS, "top_k": 0}, "at least 1"),
        ({"candidate_labels": LABELS, "threshold": 40}, "0 to 1"),
        ({"candidate_labels": LABELS, "output": "logits", "threshold": 0.5}, "before a decision"),
        ({"candidate_labels": LABELS, "background": ["road", "car", "sky"]}, "at least one must be left"),
        ({"candidate_labels": ["road", "car, auto"], "background": ["auto"]}, "no word of its own: auto"),
        ({"candidate_labels": ["road " * 50], "templates": "plain", "on_error": "skip"}, "text tower reads"),
        ({"candidate_labels": LABELS, "size": "large"}, "`size` is 'large'; it must be None or 'native'"),
        ({"candidate_labels": LABELS, "max_tokens": -1}, "`max_tokens` is -1"),
        ({"candidate_labels": LABELS, "max_tokens": 0}, "`max_tokens` is 0"),
        ({"candidate_labels": LABELS, "templates": "nonsense"}, "template set"),
    ],
)
def test_bad_calls_name_the_fix(segment, picture, call, message):
    with pytest.raises(ValueError, match=message):
        segment(picture, **call)


def test_a_vision_model_is_refused(vision_model, tokenizer):
    with pytest.raises(ValueError, match="two-tower"):
        pipeline(
            "open-vocab-segmentation",
            model=vision_model,
            tokenizer=tokenizer,
            image_processor=SparImageProcessorPil(),
        )


def test_a_folder_without_a_tokenizer_is_refused_by_what_it_is(two_towers, vision_model, tmp_path):
    for name, model, message in (
        ("vision", vision_model, "two-tower"),
        ("towers", two_towers, "needs the tokenizer of"),
    ):
        model.save_pretrained(tmp_path / name)
        SparImageProcessorPil().save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            pipeline("open-vocab-segmentation", model=str(tmp_path / name))


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
def test_embedded_student_is_nearer_to_the_teacher_than_its_base_on_an_image_it_never_saw():
    """An image inside scikit-learn: the student's one pass against the teacher's features, base against the same."""
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


def test_unequal_sizes_in_one_batch_give_the_masks_they_give_one_by_one(segment, picture, forwards):
    images = [
        picture,
        picture.resize((40, 50)),
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        picture.resize((97, 97)),
    ]
    images.append(picture.resize((40, 50)).rotate(180))
    alone = [segment(image, candidate_labels=LABELS, output="map") for image in images]
    forwards.clear()
    together = segment(images, candidate_labels=LABELS, output="map", batch_size=4)
    # of the first four, two share a size; the fifth is a batch of its own; nothing is padded
    assert forwards == [(2, 3, 80, 116), (1, 3, 100, 80), (1, 3, 80, 80), (1, 3, 100, 80)]
    assert all(same(one, other) >= 0.9999 for one, other in zip(alone, together, strict=True))


def test_streams__generators_and_datasets_give_their_results_as_they_are_asked_for(segment, picture):
    from datasets import Dataset
    from transformers.pipelines.pt_utils import KeyDataset

    images = [picture, picture.resize((40, 50)), picture.rotate(180)]
    expected = segment(images, candidate_labels=LABELS, output="map")
    read = []

    def stream():
        for image in images:
            read.append(1)
            yield image

    results = iter(segment(stream(), candidate_labels=LABELS, output="map"))
    assert same(next(results), expected[0]) == 1 and len(read) == 1
    assert [same(*pair) for pair in zip(results, expected[1:], strict=True)] == [1, 1]
    rows = Dataset.from_dict({"image": images, "number": [1, 2, 3]})
    by_key = segment(KeyDataset(rows, "image"), candidate_labels=LABELS, output="map", batch_size=2)
    assert len(by_key) == 3
    for results in (by_key, segment(rows, candidate_labels=LABELS, output="map"), by_key):  # also a second time
        assert [same(*pair) for pair in zip(results, expected, strict=True)] == [1, 1, 1]
    streamed = segment(rows.to_iterable_dataset(), candidate_labels=LABELS, output="map", batch_size=2)
    assert [same(*pair) for pair in zip(streamed, expected, strict=True)] == [1, 1, 1]
    tuples_and_arrays = (tuple(images), np.stack([np.asarray(picture)] * 2))
    assert [len(segment(many, candidate_labels=LABELS)) for many in tuples_and_arrays] == [3, 2]
    assert segment([], candidate_labels=LABELS) == []


def test_one_bad_image_loses_none_of_the_others(segment, picture, tmp_path):
    from datasets import Dataset, Features
    from datasets import Image as ImageColumn

    picture.save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:9000])
    good = tmp_path / "good.png"
    files = [good, tmp_path / "empty.png", tmp_path / "cut.png", np.full((8, 8, 3), np.nan), tmp_path / "no.png", good]
    with pytest.raises(ValueError, match="0 bytes"):
        segment(files, candidate_labels=LABELS)
    results = segment(files, candidate_labels=LABELS, output="map", on_error="skip", batch_size=4)
    for i, message in ((1, "0 bytes"), (2, "Cannot decode"), (3, "NaN"), (4, "neither a file nor a URL")):
        assert set(results[i]) == {"error"} and message in results[i]["error"]
    assert same(results[0], results[5]) >= 0.9999
    assert "0 bytes" in segment(files[1], candidate_labels=LABELS, on_error="skip")["error"]
    rows = Dataset.from_dict({"image": [str(path) for path in (good, files[2], good)]}).cast_column(
        "image", ImageColumn()
    )
    assert rows.features == Features(image=ImageColumn())
    for dataset in (rows, rows.to_iterable_dataset()):
        results = list(segment(dataset, candidate_labels=LABELS, output="map", on_error="skip"))
        assert "Cannot decode" in results[1]["error"] and same(results[0], results[2]) == 1
    with pytest.raises(ValueError, match=r"columns \['photo'\] has no `image`.*KeyDataset"):
        segment([{"photo": picture}], candidate_labels=LABELS)


def test_a_batch_that_fails_is_run_image_by_image(segment, picture, two_towers):
    """Fails like a device without memory for several images at once."""

    def refuse(module, args):
        if len(args[0]) > 1:
            raise RuntimeError("out of memory")

    two_towers.vision_model.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        segment([picture, picture], candidate_labels=LABELS, batch_size=2)
    results = segment([picture, picture], candidate_labels=LABELS, batch_size=2, on_error="skip", output="map")
    assert same(*results) == 1


def test_encode__once_for_any_number_of_vocabularies(segment, picture, forwards):
    encoded = segment.encode(picture, size={"shortest_edge": 60})
    assert encoded.working_size == (60, 87) and encoded.original_size == (90, 131)
    assert encoded.feature_map.shape == (32, 4, 6)
    told = "EncodedImage(grid=(4, 6), dim=32, working_size=(60, 87), original_size=(90, 131), device='cpu')"
    assert repr(encoded) == told
    first = segment(encoded, candidate_labels=LABELS, output="map")
    second = segment([encoded], candidate_labels=["tree", "dog"], output="map")[0]
    assert len(forwards) == 1
    assert same(first, segment(picture, candidate_labels=LABELS, output="map", size={"shortest_edge": 60})) == 1
    assert second["labels"] == ["tree", "dog"] and second["map"].shape == (90, 131)
    assert [part.original_size for part in segment.encode([picture, picture.resize((40, 50))])] == [(90, 131), (50, 40)]


def test_probabilities_and_logits_are_those_of_the_map(segment, picture, two_towers):
    result = segment(picture, candidate_labels=LABELS, output="map", top_k=2)
    dense = segment(picture, candidate_labels=LABELS, output="probabilities")
    assert dense["labels"] == ["road", "car", "sky"] and dense["probabilities"].shape == (3, 90, 131)
    assert (dense["probabilities"].argmax(0) == result["map"]).mean() > 0.999
    assert (result["top_map"][0] == result["map"]).mean() > 0.999
    ordered = np.sort(dense["probabilities"], 0)[::-1]
    np.testing.assert_allclose(result["top_probabilities"], ordered[:2], atol=1e-6)
    for label, score in enumerate(result["scores"]):
        mask = result["map"] == label
        assert score == pytest.approx(float(dense["probabilities"][label][mask].mean()) if mask.any() else 0, abs=1e-5)
    raw = segment(picture, candidate_labels=LABELS, output="logits")
    assert raw["names"] == ["road", "car", "automobile", "sky"] and raw["labels"] == ["road", "car", "sky"]
    geometry = (raw["patch_size"], raw["working_size"], raw["original_size"])
    again = decide(torch.from_numpy(raw["logits"]), torch.from_numpy(raw["name_to_class"]), *geometry)
    assert (again.labels.numpy() == result["map"]).mean() > 0.9999
    assert np.abs(raw["logits"]).max() <= two_towers.config.dense_logit_scale


def test_top_k_segments_are_those_of_highest_score(segment, picture):
    segments = segment(picture, candidate_labels=LABELS)
    best = segment(picture, candidate_labels=LABELS, top_k=2)
    assert [s["score"] for s in best] == sorted((s["score"] for s in segments), reverse=True)[:2]


def test_outputs_too_large_for_memory_name_the_map(segment, picture, monkeypatch):
    monkeypatch.setattr("spar_hf.model.results.OUTPUT_BYTES", 1000)
    for output in ("segments", "probabilities"):
        with pytest.raises(ValueError, match='Take output="map"'):
            segment(picture, candidate_labels=LABELS, output=output)
    assert segment(picture, candidate_labels=LABELS, output="map")["map"].size > 1000


def test_background_of_words_takes_its_pixels_from_all_classes(segment, picture):
    result = segment(picture, candidate_labels=LABELS, output="map", background=["sky", "tree"])
    assert result["labels"] == ["road", "car", "background"]
    merged = segment(picture, candidate_labels=["road", "car, automobile", "sky, tree"], output="map")
    assert (result["map"] == merged["map"]).all()
    stuff = segment(picture, candidate_labels=["dog", "cat"], output="map", background="auto")
    assert stuff["labels"] == ["dog", "cat", "background"]
    of_auto = segment(picture, candidate_labels=["auto", "cat"], output="map", background="auto", threshold=1.0)
    assert of_auto["labels"] == ["auto", "cat"] and (of_auto["map"] == 0).all()


def test_a_single_class_is_noted(segment, picture, own_log):
    segment(picture, candidate_labels=["road"], templates="plain", output="logits")
    segment(picture, candidate_labels=["road"], templates="plain", background=["sky"])
    assert own_log == []
    segment(picture, candidate_labels=["road"], templates="plain")
    assert len(own_log) == 1 and "single class" in own_log[0]


def test_defaults_of_the_pipeline_hold_until_a_call_says_otherwise(two_towers, tokenizer, picture, tmp_path):
    parts = {"model": two_towers, "tokenizer": tokenizer, "image_processor": SparImageProcessorPil()}
    segment = pipeline(
        "open-vocab-segmentation", **parts, candidate_labels=["road", "sky"], output="map", templates="plain"
    )
    assert segment(picture)["labels"] == ["road", "sky"]
    assert segment(picture, candidate_labels=["dog"])["labels"] == ["dog"]
    two_towers.text_model.register_forward_pre_hook(lambda *args: pytest.fail("a text forward"))
    segment.save_text_embeddings(tmp_path / "words.safetensors")  # those of the default templates
    assert segment.load_text_embeddings(tmp_path / "words.safetensors") == 3


def test_working_sizes(segment, picture, forwards):
    for size in (
        "native",
        {"longest_edge": 64},
        {"height": 32, "width": 48},
        50,
        {"shortest_edge": 80, "longest_edge": 90},
    ):
        segment(picture, candidate_labels=LABELS, size=size)
    segment(picture, candidate_labels=LABELS)
    assert [shape[2:] for shape in forwards] == [(90, 131), (44, 64), (32, 48), (50, 73), (62, 90), (80, 116)]


def test_a_grid_over_the_limit_is_made_smaller_with_one_warning(segment, picture, forwards, own_log):
    for _ in range(2):
        result = segment(picture, candidate_labels=LABELS, size="native", max_tokens=24, output="map")
    assert result["map"].shape == (90, 131)
    # 6 × 9 patches; times sqrt(24 · 16² / (90 · 131)) = 0.72 there are 4.06 × 5.9, rounded down 4 × 5
    assert [shape[2:] for shape in forwards] == [(64, 80)] * 2
    assert len([message for message in own_log if "24 patches" in message]) == 1
    segment.image_processor.max_tokens = 6  # what a checkpoint carries
    segment.image_processor.patch_size = 16
    segment(picture, candidate_labels=LABELS)
    assert forwards[-1][2:] == (32, 32)


def test_fifty_megapixels(segment, forwards):
    """An image of 8660 × 5773 pixels at its native size: 16,384 patches would be a minute's work here, 64 are not."""
    columns = np.arange(8660, dtype=np.uint16) * 255 // 8659
    picture = Image.fromarray(np.broadcast_to(columns.astype(np.uint8), (5773, 8660)))
    result = segment(
        picture, candidate_labels=["road", "sky"], size="native", max_tokens=64, output="map", templates="plain"
    )
    assert forwards == [(1, 3, 96, 144)] and result["map"].shape == (5773, 8660)
    assert set(np.unique(result["map"])) <= {0, 1}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    height=st.integers(16, 200),
    width=st.integers(16, 200),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "LA", "1", "CMYK", "I;16"]),
    classes=st.lists(
        st.lists(st.sampled_from(["road", "car", "sky", "tree", "dog", "cat"]), min_size=1, unique=True), min_size=1
    ),
    output=st.sampled_from(["segments", "map", "probabilities"]),
    size=st.sampled_from(["native", {"shortest_edge": 33}, {"longest_edge": 70}]),
)
def test_any_size_mode_and_vocabulary(small_segment, height, width, mode, classes, output, size):
    seen: set[str] = set()
    classes = [kept for names in classes if (kept := [n for n in names if n not in seen and not seen.add(n)])]
    if mode == "I;16":
        picture = Image.fromarray(np.full((height, width), 30_000, np.uint16))
    else:
        picture = Image.effect_noise((width, height), 80).convert(mode)
    result = small_segment(picture, candidate_labels=classes, output=output, size=size)
    if output == "segments":
        masks = np.stack([np.asarray(s["mask"]) for s in result])
        assert masks.shape[1:] == (height, width) and ((masks == 255).sum(0) == 1).all()
        assert {s["label"] for s in result} <= {names[0] for names in classes}
    elif output == "map":
        assert result["map"].shape == (height, width) and result["map"].max() < len(classes)
        assert result["labels"] == [names[0] for names in classes]
    else:
        assert result["probabilities"].shape == (len(classes), height, width)
        total = result["probabilities"].sum(0)
        assert (total < 1 + 1e-4).all() and (len(seen) > len(classes) or (total > 1 - 1e-4).all())


@pytest.fixture(scope="module")
def small_segment():
    from tiny_models import randomise, tiny_config

    parts = {"tokenizer": AutoTokenizer.from_pretrained(SPAR_TINY), "image_processor": SparImageProcessorPil()}
    config = tiny_config()
    config.text_config.vocab_size, config.text_config.max_position_embeddings = 6144, 24
    model = randomise(SparForOpenVocabSegmentation(config))
    return pipeline("open-vocab-segmentation", model=model, **parts, templates="plain")


def test_images_of_unusual_kinds(segment, picture, tmp_path):
    """The first frame of an animation, transparency over white, and refused images with a message that helps."""
    other = picture.rotate(180)
    picture.save(tmp_path / "moving.png", save_all=True, append_images=[other])
    still = segment(picture, candidate_labels=LABELS, output="map")
    assert same(segment(str(tmp_path / "moving.png"), candidate_labels=LABELS, output="map"), still) == 1
    clear = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    white = segment(Image.new("RGB", picture.size, "white"), candidate_labels=LABELS, output="map")
    assert same(segment(clear, candidate_labels=LABELS, output="map"), white) == 1
    with pytest.raises(ValueError, match="NaN"):
        segment(torch.full((3, 40, 40), torch.nan), candidate_labels=LABELS)
    picture.save(tmp_path / "bomb.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(ValueError, match=r"bomb\.png' is refused.*MAX_IMAGE_PIXELS"):
            segment(tmp_path / "bomb.png", candidate_labels=LABELS)


def test_a_device_that_is_not_there(two_towers, tokenizer):
    parts = {"model": two_towers, "tokenizer": tokenizer, "image_processor": SparImageProcessorPil()}
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"Device '{device}' is not available.*leave it out"):
            pipeline("open-vocab-segmentation", **parts, device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_nearly_the_same(segment, picture, two_towers, dtype):
    expected = segment(picture, candidate_labels=LABELS, output="map")
    two_towers.to(dtype)
    assert same(segment(picture, candidate_labels=LABELS, output="map"), expected) > 0.9


def test_a_compiled_model_is_what_runs_and_gives_the_same(segment, picture):
    expected = segment(picture, candidate_labels=LABELS, output="map")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    segment.model = torch.compile(segment.model, backend=backend)
    assert same(segment(picture, candidate_labels=LABELS, output="map"), expected) > 0.9999
    assert graphs
    torch._dynamo.reset()
