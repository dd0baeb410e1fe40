"""Vocabulary grammar, templates, and text embeddings against the plain formula."""

import pytest
import torch

from spar_hf.prompts import TEMPLATES, Vocabulary, embed_names, resolve_templates


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


def test_a_text_longer_than_the_context_is_refused(two_towers, tokenizer):
    with pytest.raises(ValueError, match="text tower reads"):
        embed_names(two_towers, tokenizer, ["road " * 50], "plain")


def test_built_in_vocabularies_have_the_sets_numbers_of_classes():
    numbers = {"voc20": 20, "voc21": 21, "context59": 59, "context60": 60, "cityscapes": 19, "ade20k": 150}
    numbers |= {"coco-object": 81, "coco-stuff": 171, "voc21-spar": 21, "context60-spar": 60}
    for name, number in numbers.items():
        assert len(Vocabulary.parse(name).labels) == number, name
    assert Vocabulary.parse("ADE20K").labels[0] == "wall"
    spar = Vocabulary.parse("voc21-spar")
    assert spar.names[spar.labels.index("television monitor")][1] == "tv monitor"
    assert "pottedplant" in spar.labels and len(spar.names[0]) == 26  # the background is a list of stuff
