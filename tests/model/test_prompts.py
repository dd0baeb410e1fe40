"""Vocabulary grammar, templates, and text embeddings against the plain formula."""

import pytest
import torch
from PIL import Image
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, pipeline
from transformers.utils import logging

from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation, bake_vocabulary
from spar_hf.model import prompts
from spar_hf.model.prompts import (
    TEMPLATES,
    Vocabulary,
    distinct_names,
    embed_names,
    resolve_templates,
    unknown_names,
)
from spar_hf.model.vocabularies import VOCABULARIES


@pytest.mark.parametrize(
    ("candidate_labels", "labels", "names"),
    [
        (["road", "car, automobile", "sky"], ("road", "car", "sky"), (("road",), ("car", "automobile"), ("sky",))),
        ([r"salt\, pepper, spices"], ("salt, pepper",), (("salt, pepper", "spices"),)),
        ([["car", "red, shiny car"], ["sky"]], ("car", "sky"), (("car", "red, shiny car"), ("sky",))),
        ({"vehicle": ["car", "bus"], "sky": "sky"}, ("vehicle", "sky"), (("car", "bus"), ("sky",))),
        ({"a, b": ["c, d"]}, ("a, b",), (("c, d",),)),
        (("road",), ("road",), (("road",),)),
    ],
)
def test_grammar(candidate_labels, labels, names):
    vocabulary = Vocabulary.parse(candidate_labels)
    assert (vocabulary.labels, vocabulary.names) == (labels, names)
    assert Vocabulary.parse(vocabulary) is vocabulary


def test_grammar__a_name_twice_in_a_class_counts_once():
    assert Vocabulary.parse(["car, auto, Car, auto"]).names == (("car", "auto"),)


@pytest.mark.parametrize(
    ("labels", "background", "expected"),
    [
        (["car", "sky"], ["wall"], {"car": ("car",), "sky": ("sky",), "background": ("wall",)}),
        (["car", "sky, clouds"], ["wall", "Sky"], {"car": ("car",), "background": ("wall", "sky", "clouds")}),
        (["background, clutter", "car"], ["wall"], {"background": ("background", "clutter", "wall"), "car": ("car",)}),
        (["car", "sky, wall"], ["wall", "hill"], {"car": ("car",), "sky": ("sky", "wall"), "background": ("hill",)}),
    ],
)
def test_with_background(labels, background, expected):
    vocabulary = Vocabulary.parse(labels).with_background(background)
    assert dict(zip(vocabulary.labels, vocabulary.names, strict=True)) == expected


def test_with_background__auto_is_the_published_stuff_without_what_is_looked_for():
    vocabulary = Vocabulary.parse(["cat", "Sky", "garden, tree"]).with_background("auto")
    published = Vocabulary.parse("voc21-spar").names[0]
    assert vocabulary.labels == ("cat", "Sky", "garden", "background")
    assert vocabulary.names[3] == tuple(word for word in published if word not in ("sky", "tree"))


def test_with_background__errors():
    with pytest.raises(ValueError, match="at least one must be left"):
        Vocabulary.parse(["sky", "road"]).with_background(["road", "sky"])
    for words in ([], [""]):
        with pytest.raises(ValueError, match="needs words"):
            Vocabulary.parse(["sky"]).with_background(words)


def test_names_know_their_class():
    vocabulary = Vocabulary.parse(["road", "car, automobile", "sky"])
    assert vocabulary.all_names == ["road", "car", "automobile", "sky"]
    assert vocabulary.name_to_class.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("candidate_labels", "message"),
    [
        ("road", r'\["road", "car, automobile", "sky"\]'),
        ([], "at least one class"),
        (["road", ""], "empty name"),
        (["road, "], "empty name"),
        ({"road": []}, "empty name"),
        (["Road", "sky", "road "], "stand twice: Road, road"),
        (["traffic light", "sky", "Traffic  Light, lamp"], "stand twice"),
        (["car, auto", "truck, Auto"], "two classes or twice: Auto, auto"),
        (3, "list"),
        ([3, "sky"], "a string or a list of strings, got 3"),
        ([None], "a string or a list of strings"),
        ({"road": [3]}, "a string or a list of strings"),
        ({"road", "sky"}, r"sorted\(words\)"),
        (["road", frozenset({"car", "automobile"})], r"sorted\(names\)"),
    ],
)
def test_bad_vocabularies_say_what_to_write(candidate_labels, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.parse(candidate_labels)


def test_templates():
    assert len(set(resolve_templates("imagenet80"))) == 80
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)
    assert resolve_templates(["the {}"]) == ("the {}",)
    for bad in ("nonsense", [], ["no place"], ["{} and {}"]):
        with pytest.raises(ValueError, match="template"):
            resolve_templates(bad)


@torch.no_grad()
def test_other_braces_in_a_template_are_text(two_towers, tokenizer):
    odd, plain = (embed_names(two_towers, tokenizer, ["road"], [text]) for text in ("{x} {}", "{x} road{}"))
    road_twice = embed_names(two_towers, tokenizer, [""], ["{x} road{}"])
    torch.testing.assert_close(odd, road_twice)
    assert not torch.allclose(odd, plain)


@torch.no_grad()
def test_embeddings_are_normalised_means_of_normalised_prompts(two_towers, tokenizer):
    names, templates = ["road", "sky"], ["a photo of a {}.", "the {}"]
    embeds = embed_names(two_towers, tokenizer, names, templates, batch_size=3)
    limit = two_towers.config.text_config.max_position_embeddings
    for name, embed in zip(names, embeds, strict=True):
        rows = []
        for template in templates:
            ids = tokenizer(template.format(name), padding="max_length", max_length=limit, return_tensors="pt")
            row = two_towers.text_model(ids["input_ids"]).pooler_output[0]
            rows.append(row / row.norm())
        mean = torch.stack(rows).sum(0) / len(rows)
        torch.testing.assert_close(embed, mean / mean.norm(), atol=1e-6, rtol=1e-5)


def test_a_bar_appears_where_embedding_takes_long_and_changes_nothing(two_towers, tokenizer, capsys, monkeypatch):
    logging.enable_progress_bar()  # a command of ours run before in this process has switched bars off
    silent = embed_names(two_towers, tokenizer, ["road", "sky"], "plain")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(prompts, "PROGRESS_AFTER", 0)
    shown = embed_names(two_towers, tokenizer, ["road", "sky"], "plain")
    assert "embedding names" in capsys.readouterr().err
    torch.testing.assert_close(shown, silent)


def test_a_text_longer_than_the_context_is_refused(two_towers, tokenizer):
    with pytest.raises(ValueError, match="text tower reads"):
        embed_names(two_towers, tokenizer, ["road " * 50], "plain")


def test_built_in_vocabularies_have_the_sets_numbers_of_classes():
    numbers = {"voc20": 20, "voc21": 21, "context59": 59, "context60": 60, "cityscapes": 19, "ade20k": 150}
    numbers |= {"coco-object": 81, "coco-stuff": 171, "voc20-spar": 20, "voc21-spar": 21}
    numbers |= {
        "context59-spar": 59,
        "context60-spar": 60,
        "cityscapes-spar": 19,
        "ade20k-spar": 150,
        "ade20k-847": 847,
    }
    numbers |= {
        "loveda": 7,
        "dark-zurich": 20,
        "mhp-v1": 19,
        "foodseg103": 104,
        "atlantis": 56,
        "dram": 12,
        "isaid": 16,
    }
    numbers |= {
        "isprs-potsdam": 6,
        "worldfloods": 3,
        "floodnet": 10,
        "uavid": 8,
        "kvasir-instrument": 2,
        "chase-db1": 2,
    }
    numbers |= {
        "cryonuseg": 2,
        "corrosion-cs": 4,
        "deepcrack": 2,
        "pst900": 5,
        "zerowaste-f": 5,
        "suim": 8,
        "cub-200": 201,
    }
    numbers |= {"cwfid": 3} | {f"paxray-{part}": 2 for part in ("lungs", "mediastinum", "bones", "diaphragm")}
    assert set(numbers) == set(VOCABULARIES)
    for name, number in numbers.items():
        assert len(Vocabulary.parse(name).labels) == number, name
    assert Vocabulary.parse("ADE20K").labels[0] == "wall"
    spar = Vocabulary.parse("voc21-spar")
    assert spar.names[spar.labels.index("television monitor")][1] == "tv monitor"
    assert "pottedplant" in spar.labels and len(spar.names[0]) == 26  # the background is a list of stuff


TWINS = [("C++", "C#"), ("road", "Road!"), ("left lane (1)", "left lane [1]"), ("road", "road\u200b"), ("A/B", "a b")]


@pytest.fixture(scope="module")
def spar_tiny():
    return SparForOpenVocabSegmentation.from_pretrained(SPAR_TINY), AutoTokenizer.from_pretrained(SPAR_TINY)


# not "tcl", whose plural puts an s behind the punctuation of a name, so that the tokens differ
@pytest.mark.parametrize("templates", [*sorted(TEMPLATES.keys() - {"tcl"}), ["the {} there", "{}"]])
@pytest.mark.parametrize("names", TWINS)
def test_classes_of_equal_tokens_are_refused_and_synonyms_dropped(spar_tiny, names, templates):
    _, tokenizer = spar_tiny
    first, second = names
    with pytest.raises(ValueError, match="tokens") as refusal:
        distinct_names(tokenizer, Vocabulary.parse([[first], ["sky", second]]), templates)
    assert repr(first) in str(refusal.value) and repr(second) in str(refusal.value)
    merged = distinct_names(tokenizer, Vocabulary.parse([["sky"], [first, second, "tree"]]), templates)
    assert merged.labels == ("sky", first) and merged.names == (("sky",), (first, "tree"))


@pytest.mark.parametrize("templates", [*TEMPLATES])
@pytest.mark.parametrize("name", ["🐶", "?", "\u200b", "…"])
def test_names_without_a_token_are_refused(spar_tiny, name, templates):
    model, tokenizer = spar_tiny
    with pytest.raises(ValueError, match="no token"):
        distinct_names(tokenizer, Vocabulary.parse(["sky", name]), templates)
    with pytest.raises(ValueError, match="no token"):
        embed_names(model, tokenizer, [name], templates)


def test_background_words_give_way_to_classes_of_equal_tokens(spar_tiny):
    _, tokenizer = spar_tiny
    vocabulary = Vocabulary.parse(["wall!", "dog"]).with_background(["WALL?", "sky"])
    assert distinct_names(tokenizer, vocabulary, "plain", "background").names == (("wall!",), ("dog",), ("sky",))
    with pytest.raises(ValueError, match="background"):
        distinct_names(tokenizer, Vocabulary.parse(["wall!"]).with_background(["WALL?"]), "plain", "background")


def test_names_differ_if_one_template_tells_them_apart(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"!$"), "")  # only at the end of a prompt
    vocabulary = Vocabulary.parse([["road"], ["road!"]])
    assert distinct_names(tokenizer, vocabulary, ["the {}", "{} street"]) == vocabulary
    with pytest.raises(ValueError, match="tokens"):
        distinct_names(tokenizer, vocabulary, ["the {}", "a {}"])


def test_names_of_unknown_tokens_only_are_noted_once(two_towers, tokenizer, spar_tiny, caplog):
    logging.warning_once.cache_clear()
    assert unknown_names(tokenizer, ["road", "qwe", "qwe road", "qwe asd"]) == ["qwe", "qwe asd"]
    assert unknown_names(spar_tiny[1], ["road", "道路", "道路 road", "Straße"]) == ["道路"]
    for _ in range(2):
        embed_names(two_towers, tokenizer, ["road", "qwe"], "plain")
    (note,) = [record.getMessage() for record in caplog.records]
    assert "'qwe'" in note


@pytest.mark.parametrize("name", VOCABULARIES)
def test_built_in_vocabularies_are_distinct_for_the_tokenizer(spar_tiny, name):
    vocabulary = Vocabulary.parse(name)
    for templates in ("plain", "short"):
        assert distinct_names(spar_tiny[1], vocabulary, templates) == vocabulary


def test_pipeline_and_bake_refuse_classes_of_equal_tokens(spar_tiny):
    pipe = pipeline("open-vocab-segmentation")
    image = Image.new("RGB", (32, 32))
    for labels in (["C++", "C#"], ["🐶", "road"]):
        with pytest.raises(ValueError, match="token"):
            pipe(image, candidate_labels=labels)
        with pytest.raises(ValueError, match="token"):
            bake_vocabulary(*spar_tiny, labels)
    both = pipe(image, candidate_labels=["road, Road!", "sky"], templates="plain", output="logits")
    assert both["names"] == ["road", "sky"]
