"""Synonyms, the background's words and presence: against plain formulas, within bounds, and through the pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_tokenizer, randomise, tiny_config
from torch.nn import functional as F
from transformers import pipeline

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil
from spar_hf.model import presence
from spar_hf.model.background import SAME_MEANING, resolve_classes, same_meaning, stuff_beside
from spar_hf.model.presence import class_presence, presence_odds, store_embeddings
from spar_hf.model.prompts import Vocabulary, embed_names
from spar_hf.model.templates import TemplateChoice
from spar_hf.model.text_embeddings import TextEmbeddingCache
from spar_hf.model.vocabularies import ANCHOR_WORDS, STUFF_WORDS


@pytest.fixture(scope="module")
def spar_tiny():
    return pipeline("open-vocab-segmentation")


@pytest.fixture
def letters():
    """A model of random weights whose tokenizer reads letters, so that no two words are equal."""
    model = randomise(SparForOpenVocabSegmentation(tiny_config()))
    return TextEmbeddingCache(model, make_tokenizer(letters=True))


@pytest.fixture
def anchors(monkeypatch):
    """Few anchor words, short enough for the tiny tokenizer's context."""
    words = ("cat", "dog", "horse", "tree", "bush", "sea", "lake", "road", "car", "house", "sky", "rain", "bread")
    for module in ("background", "presence"):
        monkeypatch.setattr(f"spar_hf.model.{module}.ANCHOR_WORDS", words)
    return words


def test_anchors_are_a_few_hundred_different_words():
    assert 200 < len(ANCHOR_WORDS) == len(set(ANCHOR_WORDS)) < 500
    assert all(word == word.strip().lower() and word for word in ANCHOR_WORDS)


@pytest.mark.parametrize(
    ("words", "others", "expected"),
    [
        (["cloud", "wall"], ["sky"], [[True], [False]]),
        (["tree", "grass", "hill"], ["vegetation", "mountain"], [[True, False], [False, False], [False, True]]),
        (["sands", "stair", "river"], ["beach", "stairs"], [[True, False], [False, True], [False, False]]),
    ],
)
def test_words_that_mean_the_same_to_spar_tiny(spar_tiny, words, others, expected):
    assert same_meaning(spar_tiny.texts, words, others).tolist() == expected


@pytest.mark.parametrize(
    ("words", "left_out", "kept"),
    [
        (["road", "car, automobile", "sky"], {"road", "sky", "cloud"}, {"tree", "building", "wall", "grass"}),
        (["pavement", "vegetation", "bicyclist"], {"tree", "road"}, {"sky", "building", "fence"}),
        (["sofa", "carpet", "stairs"], {"stair"}, {"wall", "door", "window", "ceiling", "bed"}),
        (["sheep", "dog, puppy", "lawn"], {"grass"}, {"sky", "tree", "fence", "hill"}),
    ],
)
def test_background_words_on_street_indoor_and_animal_lists(spar_tiny, words, left_out, kept):
    found = set(stuff_beside(spar_tiny.texts, Vocabulary.parse(words)))
    assert found <= set(STUFF_WORDS) and not found & left_out and kept <= found


def test_auto_is_no_background_where_every_stuff_word_is_asked_for(spar_tiny):
    everything = Vocabulary.parse(list(STUFF_WORDS))
    assert resolve_classes(spar_tiny.texts, everything, "auto")[1:] == (list(STUFF_WORDS), -1)
    with_rules = resolve_classes(spar_tiny.texts, everything, "auto", rules=True)
    assert with_rules[1:] == ([*STUFF_WORDS, "background"], len(STUFF_WORDS))


def test_auto_adds_to_a_class_called_background(spar_tiny):
    listed = Vocabulary.parse({"Background": ["sky"], "car": ["car"]})
    vocabulary, labels, background = resolve_classes(spar_tiny.texts, listed, "auto")
    assert labels == ["Background", "car"] and background == 0
    assert {"sky", "cloud", "wall"} <= set(vocabulary.names[0])  # its own synonyms are no obstacle


def plain_odds(cache, feature_map, names, anchors):
    """Of one class, in float64, patch by patch."""
    embeds = {
        word: row
        for word, row in zip(
            [*anchors, *names],
            embed_names(cache.model, cache.tokenizer, [*anchors, *names], "plain").double(),
            strict=True,
        )
    }
    centre = torch.stack([embeds[word] for word in anchors]).mean(0)
    near = {
        anchor
        for anchor in anchors
        for name in names
        if F.cosine_similarity(embeds[anchor] - centre, embeds[name] - centre, dim=0) >= SAME_MEANING
    }
    patches = F.normalize(feature_map.double().flatten(1), dim=0)
    scale = cache.model.config.dense_logit_scale
    rivals = torch.stack([scale * embeds[word] @ patches for word in anchors if word not in near]).logsumexp(0)
    best = max(1, round(presence.BEST_PATCHES * patches.shape[1]))
    return max(float((scale * embeds[name] @ patches - rivals).sort().values[-best:].mean()) for name in names)


@pytest.mark.parametrize("working_bytes", [1, 3_000, 2**26])
def test_odds_equal_the_plain_formula_in_groups_of_any_size(letters, anchors, working_bytes):
    feature_map = torch.randn(32, 13, 17, generator=torch.Generator().manual_seed(0))
    vocabulary = Vocabulary.parse({"road": ["road", "street"], "cow": ["cow"], "pond": ["pond", "lake", "water"]})
    odds = presence_odds(letters, feature_map, vocabulary, working_bytes)
    expected = [plain_odds(letters, feature_map, names, anchors) for names in vocabulary.names]
    torch.testing.assert_close(odds, torch.tensor(expected), rtol=1e-4, atol=1e-3)


def test_presence_of_a_class_does_not_depend_on_the_other_words_or_templates(letters, anchors):
    feature_map = torch.randn(32, 5, 7, generator=torch.Generator().manual_seed(1))
    alone = class_presence(letters, feature_map, Vocabulary.parse(["cow"]))
    listed = class_presence(letters, feature_map, Vocabulary.parse(["road", "cow", "lake, pond"]))
    assert listed[1] == pytest.approx(alone[0], abs=1e-6) and all(0 <= value <= 1 for value in listed)
    synonym = class_presence(letters, feature_map, Vocabulary.parse(["cow, xyz"]))
    assert synonym[0] >= alone[0] - 1e-6


def test_a_model_may_have_its_own_calibration(letters, anchors, tmp_path):
    letters.model.config.presence_calibration = [0.0, 0.0]
    letters.model.save_pretrained(tmp_path)
    again = SparForOpenVocabSegmentation.from_pretrained(tmp_path)
    feature_map = torch.randn(32, 2, 2)
    cache = TextEmbeddingCache(again, letters.tokenizer)
    assert class_presence(cache, feature_map, Vocabulary.parse(["cow", "road"])) == [0.5, 0.5]


def test_anchors_are_embedded_once_per_model(letters, anchors):
    prompts = []
    letters.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: prompts.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for words in (["cow", "pond"], ["pond", "cow", "barn"]):
        class_presence(letters, torch.randn(32, 3, 4), Vocabulary.parse(words))
    assert sum(prompts) == len({*anchors, "cow", "pond", "barn"})


@pytest.fixture
def segment(monkeypatch, anchors):
    """A pipeline of random weights whose presence is stated by the test."""
    model = randomise(SparForOpenVocabSegmentation(tiny_config(templates="plain")))
    processor = SparImageProcessorPil(size={"shortest_edge": 80})
    found = pipeline(
        "open-vocab-segmentation", model=model, tokenizer=make_tokenizer(letters=True), image_processor=processor
    )
    stated = {"road": 0.9, "car": 0.2, "sky": 0.5, "background": 0.1}
    monkeypatch.setattr(
        "spar_hf.model.pipeline.class_presence",
        lambda cache, features, words: [stated[label] for label in words.labels],
    )
    return found


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8))


WORDS = ["road", "car, auto", "sky"]


def test_presence_is_added_to_maps_and_segments(segment, picture):
    plain = segment(picture, candidate_labels=WORDS, output="map")
    found = segment(picture, candidate_labels=WORDS, output="map", presence=True)
    assert "presence" not in plain and found["presence"] == [0.9, 0.2, 0.5]
    assert (found["map"] == plain["map"]).all() and found["scores"] == plain["scores"] and plain["background"] == -1
    for entry in segment(picture, candidate_labels=WORDS, presence=True):
        assert entry["presence"] == {"road": 0.9, "car": 0.2, "sky": 0.5}[entry["label"]]
    dense = segment(picture, candidate_labels=WORDS, output="probabilities", presence=True)
    assert dense["presence"] == [0.9, 0.2, 0.5]
    named = segment(picture, candidate_labels=WORDS, output="map", presence=True, background="rest", threshold=0.1)
    assert named["labels"][named["background"]] == "rest" and named["presence"][3] == 0  # it has no words


def test_min_presence_decides_as_if_the_words_had_not_been_listed(segment, picture):
    for extra in ({}, {"background": ["tree", "sea"]}, {"threshold": 0.3}, {"refine": "pamr"}):
        found = segment(picture, candidate_labels=WORDS, output="map", min_presence=0.5, **extra)
        fewer = segment(picture, candidate_labels=["road", "sky"], output="map", **extra)
        number = {label: i for i, label in enumerate(found["labels"])}
        renumbered = np.array([number[label] for label in fewer["labels"]])[fewer["map"]]
        assert (found["map"] == renumbered).all() and found["scores"][1] == 0
        assert found["labels"] == ["road", "car", "sky", "background"] and found["background"] == 3
        assert found["presence"][:3] == [0.9, 0.2, 0.5]


def test_if_every_class_is_dropped_all_is_background(segment, picture):
    for background in (None, ["tree", "sea"]):
        options = {"candidate_labels": WORDS, "min_presence": 0.95, "background": background}
        found = segment(picture, output="map", top_k=2, **options)
        assert found["labels"][found["background"]] == "background" and (found["map"] == found["background"]).all()
        assert (found["top_map"][0] == found["background"]).all()
        assert segment(picture, **options) == []
    named = segment(picture, candidate_labels=WORDS, min_presence=0.95, background="car", output="map")
    assert (named["map"] == 1).all()  # the background is never dropped


def test_min_presence_of_zero_drops_nothing_and_moves_nothing(segment, picture):
    found = segment(picture, candidate_labels=WORDS, output="map", min_presence=0.0)
    plain = segment(picture, candidate_labels=WORDS, output="map")
    assert (found["map"] == plain["map"]).all() and found["labels"] == plain["labels"] and len(found["presence"]) == 3


@pytest.mark.parametrize("call", [{"min_presence": 1.5}, {"min_presence": 0.5, "output": "logits"}])
def test_bad_calls_name_the_option(segment, picture, call):
    with pytest.raises(ValueError, match="min_presence"):
        segment(picture, candidate_labels=WORDS, **call)


def test_background_is_no_segment_unless_it_is_one_of_the_labels(segment, picture):
    def labels(words, **options):
        return {entry["label"] for entry in segment(picture, candidate_labels=words, **options)}

    everything = {"background": "rest", "threshold": 1.0}
    assert labels(WORDS, **everything) == set()
    assert labels(["road", "rest, sea"], **everything) == {"rest"}
    assert labels(WORDS, background="sky", threshold=1.0) == {"sky"}
    words = segment(picture, candidate_labels=["road"], background=["sky", "car", "tree"], output="map")
    assert (words["map"] == words["background"]).any()
    assert "background" not in labels(["road"], background=["sky", "car", "tree"])


def test_stored_embeddings_are_read_from_beside_the_checkpoint(segment, picture, tmp_path, caplog):
    segment.save_pretrained(tmp_path / "model", text_embeddings=[WORDS, ["cow", "barn"]])
    again = pipeline("open-vocab-segmentation", model=str(tmp_path / "model"), image_processor=segment.image_processor)
    hook = again.model.text_model.register_forward_pre_hook(lambda *args: pytest.fail("a text forward"))
    options = {"candidate_labels": [*WORDS, "barn"], "background": "auto", "output": "map"}
    found = again(picture, **options)
    hook.remove()
    expected = segment(picture, **options)
    assert found["labels"] == expected["labels"] and (found["map"] == expected["map"]).mean() > 0.999
    # with other weights, the same file is not used
    randomise(segment.model, seed=1).save_pretrained(tmp_path / "model")
    other = pipeline("open-vocab-segmentation", model=str(tmp_path / "model"), image_processor=segment.image_processor)
    rows = other.texts.get(["road"], "plain")
    torch.testing.assert_close(rows, embed_names(other.model, other.tokenizer, ["road"], "plain"))
    (tmp_path / "model/text_embeddings.safetensors").write_bytes(b"damaged")
    damaged = pipeline("open-vocab-segmentation", model=str(tmp_path / "model"))
    torch.testing.assert_close(damaged.texts.get(["road"], "plain"), rows)


@pytest.mark.parametrize("templates", [["the {}"], TemplateChoice(("the {}",), {"road": ("{}",)})])
def test_stored_embeddings_serve_the_templates_that_they_were_made_with(segment, picture, tmp_path, own_log, templates):
    parts = {"tokenizer": segment.tokenizer, "image_processor": segment.image_processor}
    made = pipeline("open-vocab-segmentation", model=segment.model, templates=templates, **parts)
    made.save_pretrained(tmp_path, text_embeddings=[WORDS])
    assert len(own_log) == 1 and "not the checkpoint's" in own_log[0]
    again = pipeline("open-vocab-segmentation", model=str(tmp_path), image_processor=segment.image_processor)
    hook = again.model.text_model.register_forward_pre_hook(lambda *args: pytest.fail("a text forward"))
    again(picture, candidate_labels=WORDS, templates=templates, background="auto", presence=True)
    hook.remove()
    plain = embed_names(again.model, again.tokenizer, ["sky"], "plain")  # the templates of the checkpoint
    torch.testing.assert_close(again.texts.get(["sky"]), plain)
    assert not torch.allclose(again.texts.get(["sky"], templates), plain)
    segment.save_pretrained(tmp_path, text_embeddings=[WORDS])
    assert len(own_log) == 1


def test_files_hold_the_bare_words_that_have_been_used(letters, anchors, tmp_path):
    store_embeddings(letters, tmp_path / "words.safetensors", ["cow", "barn"], "plain")
    store_embeddings(letters, tmp_path / "more.safetensors", ["cow", "barn"], ["{} x"])
    fresh = TextEmbeddingCache(letters.model, letters.tokenizer)
    count = len({"cow", "barn", *STUFF_WORDS, *anchors})
    assert fresh.load(tmp_path / "more.safetensors") == count
    fresh.model.text_model.register_forward_pre_hook(lambda *args: pytest.fail("a text forward"))
    assert len(stuff_beside(fresh, Vocabulary.parse(["cow", "barn"]))) > 0
    fresh.get(["cow", "sky"], ["{} x"])


def test_spar_tiny_comes_with_the_embeddings_of_the_built_in_words():
    """If this fails after a change of the text tower or of the words: `docs/masks.md` has the command for the file."""
    segment = pipeline("open-vocab-segmentation")
    segment.model.text_model.register_forward_pre_hook(lambda *args: pytest.fail("a text forward"))
    image = Image.new("RGB", (64, 48))
    for words in ("ade20k", "voc21-spar", "coco-stuff", "cityscapes"):
        segment(image, candidate_labels=words, background="auto", output="map", presence=True)
