"""Templates for each class: the entropies of FLOSS against a loop over patches, and the pipeline that uses the choice."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from spar_hf import SparConfig, bake_vocabulary
from spar_hf.model.image_streams import EncodedImage
from spar_hf.model.prompts import Vocabulary, embed_names
from spar_hf.model.template_choice import TemplateChoice, choose_templates

PROMPTS = ("a photo of the {}.", "a bright {}.", "the {}")


@pytest.fixture
def made(segment, monkeypatch):
    """A pipeline where `PROMPTS[1]` is plainly better for the road and `PROMPTS[2]` for the sky, and two encoded images."""
    generator = torch.Generator().manual_seed(0)
    road, sky, other = torch.linalg.qr(torch.randn(32, 3, generator=generator)).Q.T
    embeds = {
        PROMPTS[0]: {"road": road + sky, "sky": road + 1.2 * sky},  # says little of either
        PROMPTS[1]: {"road": road, "sky": 0.3 * sky - 0.5 * road + other},
        PROMPTS[2]: {"road": 0.3 * road - 0.5 * sky + other, "sky": sky},
    }

    def get(names, templates=None, check_weights=True):
        rows = [torch.stack([embeds[t][name] for t in templates]).mean(0) for name in names]
        return F.normalize(torch.stack(rows), dim=-1)

    monkeypatch.setattr(segment._texts, "get", get)
    images = []
    for share in (0.3, 0.7):
        is_road = torch.rand(1, 5, 8, generator=generator) < share
        patches = torch.where(is_road, road[:, None, None], sky[:, None, None])
        noise = 0.1 * torch.randn(32, 5, 8, generator=generator) + 0.3 * other[:, None, None]
        images.append(EncodedImage(patches + noise, torch.zeros(3, 80, 128), (80, 128)))
    monkeypatch.setattr(segment, "encode", lambda image: image)
    return segment, images, get


def test_the_better_template_of_a_class_is_chosen(made):
    segment, images, _ = made
    choice = choose_templates(segment, images, ["road", "sky"], PROMPTS, count=1)
    assert choice.default == PROMPTS and choice.names == {"road": PROMPTS[1:2], "sky": PROMPTS[2:]}


def test_the_order_is_that_of_the_mean_entropy_of_predicted_patches(made):
    segment, images, get = made
    found = {0: {}, 1: {}}
    for prompt in PROMPTS:
        embeds = get(["road", "sky"], (prompt,)).double().numpy()
        entropies = {0: [], 1: []}
        for image in images:
            for patch in image.feature_map.flatten(1).T.double().numpy():
                logits = segment.model.config.dense_logit_scale * embeds @ patch / np.linalg.norm(patch)
                shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
                entropies[int(logits.argmax())].append(-(shares * np.log(np.maximum(shares, 1e-300))).sum())
        for label, values in entropies.items():
            found[label][prompt] = np.mean(values) if values else np.inf
    expected = {
        label: [p for p in sorted(values, key=values.get) if values[p] < np.inf] for label, values in found.items()
    }
    choice = choose_templates(segment, images, ["road", "sky"], PROMPTS, count=3)
    assert {name: list(prompts) for name, prompts in choice.names.items()} == {"road": expected[0], "sky": expected[1]}


def test_a_class_that_no_template_finds_keeps_all(made):
    segment, images, _ = made
    nowhere = EncodedImage(
        images[0].feature_map * 0 + images[0].feature_map[:, :1, :1], *list(vars(images[0]).values())[1:]
    )
    choice = choose_templates(segment, [nowhere], ["road", "sky"], PROMPTS[1:2])
    assert len(choice.names) == 1
    with pytest.raises(ValueError, match="no images"):
        choose_templates(segment, [], ["road", "sky"], PROMPTS)
    with pytest.raises(ValueError, match="count=0"):
        choose_templates(segment, images, ["road", "sky"], PROMPTS, count=0)


def test_names_are_embedded_with_their_own_templates(segment, two_towers, tokenizer, picture, tmp_path):
    choice = TemplateChoice(("the {}", "a {}"), {"road": ("a photo of a {}",), "street": ("the {}",)})
    choice.save(tmp_path / "chosen.json")
    assert TemplateChoice.load(tmp_path / "chosen.json") == choice
    words = ["road, street", "sky", "tree"]
    expected = torch.cat([
        embed_names(two_towers, tokenizer, ["road"], ["a photo of a {}"]),
        embed_names(two_towers, tokenizer, ["street"], ["the {}"]),
        embed_names(two_towers, tokenizer, ["sky", "tree"], ["the {}", "a {}"]),
    ])  # fmt: skip
    for templates in (choice, tmp_path / "chosen.json", str(tmp_path / "chosen.json")):
        torch.testing.assert_close(segment.text_embeds(Vocabulary.parse(words), templates), expected)
        names = Vocabulary.parse(words).all_names
        torch.testing.assert_close(embed_names(two_towers, tokenizer, names, templates), expected)
        baked = bake_vocabulary(two_towers, tokenizer, words, templates)
        torch.testing.assert_close(F.normalize(baked.classifier.weight, dim=-1), expected, atol=1e-6, rtol=1e-5)
    found = segment(picture, candidate_labels=words, templates=str(tmp_path / "chosen.json"), output="logits")
    features = segment.encode(picture).feature_map
    plain = two_towers.dense_logits(features[None], expected)[0]
    np.testing.assert_allclose(found["logits"], plain.detach(), atol=1e-4)


def test_files_that_are_none(segment, tmp_path):
    image = Image.new("RGB", (32, 32))
    with pytest.raises(FileNotFoundError, match="choose_templates"):
        segment(image, candidate_labels=["sky", "road"], templates=str(tmp_path / "nowhere.json"))
    for content in ("no JSON", "[]", json.dumps({"format": "other"}),
                    json.dumps({"format": "spar templates, 1", "default": ["a photo"], "names": {}})):  # fmt: skip
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(ValueError, match=r"wrong\.json.*Write it again"):
            segment(image, candidate_labels=["sky", "road"], templates=str(tmp_path / "wrong.json"))


def test_a_file_that_is_written_again_is_read_again(segment, picture, tmp_path):
    """Also where support images keep what they have computed for the words."""
    file, words = str(tmp_path / "chosen.json"), ["road", "sky"]
    segment.add_support([(picture, np.ones((90, 131), bool), "road")])
    found = []
    for prompt in ("the {}", "a photo of a {}"):
        TemplateChoice((prompt,)).save(file)
        found.append(segment(picture, candidate_labels=words, templates=file, output="logits")["logits"])
        plain = segment(picture, candidate_labels=words, templates=[prompt], output="logits")["logits"]
        np.testing.assert_allclose(found[-1], plain, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_a_single_image_is_not_read_as_many(segment):
    with pytest.raises(ValueError, match="several images, not one ndarray"):
        choose_templates(segment, np.zeros((64, 96, 3), np.uint8), ["road", "sky"])


def test_embeddings_of_a_choice_are_stored_and_read(segment, picture, two_towers, tmp_path):
    choice = TemplateChoice(PROMPTS, {"Road": PROMPTS[:1]})
    first = segment(picture, candidate_labels=["road", "sky"], templates=choice, output="map")
    segment.save_text_embeddings(tmp_path / "used.safetensors", templates=choice)
    segment.save_text_embeddings(tmp_path / "named.safetensors", ["road", "sky"], choice)
    for name in ("used", "named"):
        segment.texts.__init__(two_towers, segment.tokenizer)
        assert segment.load_text_embeddings(tmp_path / f"{name}.safetensors") == 2
        hook = two_towers.text_model.register_forward_pre_hook(lambda *args: pytest.fail("a text forward"))
        again = segment(picture, candidate_labels=["road", "sky"], templates=choice, output="map")
        hook.remove()
        assert (again["map"] == first["map"]).all()


def test_a_name_is_known_however_it_is_spelled(segment):
    choice = TemplateChoice(("{}",), {"Blue  sky": ("a dark photo of the {}.",)})
    rows = choice.rows_of(["blue sky", "BLUE SKY", "road"], lambda names, prompts: [(name, prompts) for name in names])
    assert rows == [(name, ("a dark photo of the {}.",)) for name in ("blue sky", "BLUE SKY")] + [("road", ("{}",))]


def test_a_checkpoint_keeps_no_choice_and_no_path(two_towers, tmp_path):
    """Its folder would mean something else on another machine."""
    choice = TemplateChoice(("{}",), {"sky": ("a dark photo of the {}.",)})
    choice.save(tmp_path / "templates.json")
    for templates in (choice, tmp_path / "templates.json", str(tmp_path / "templates.json")):
        with pytest.raises(ValueError, match="to the pipeline, as its `templates`"):
            SparConfig(templates=templates)


def test_an_iterator_of_templates_is_read_once(segment, picture, two_towers, tokenizer):
    expected = segment(picture, candidate_labels=["road", "sky"], templates=["a {}"], output="map")["map"]
    given = segment(picture, candidate_labels=["road", "sky"], templates=(t for t in ["a {}"]), output="map")["map"]
    np.testing.assert_array_equal(given, expected)
    baked = [bake_vocabulary(two_towers, tokenizer, ["road", "sky"], templates=t) for t in (["a {}"], iter(["a {}"]))]
    assert torch.equal(baked[0].classifier.weight, baked[1].classifier.weight)
    named = {"ground": map(str.strip, ["road ", " street"]), "sky": ["sky"]}
    assert Vocabulary.parse(named).names == (("road", "street"), ("sky",))
