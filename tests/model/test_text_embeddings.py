"""The cache of text embeddings: reuse, invalidation, and files that belong to a text tower."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import randomise, tiny_config

from spar_hf import SparForOpenVocabSegmentation
from spar_hf.model.prompts import embed_names
from spar_hf.model.text_embeddings import TextEmbeddingCache


@pytest.fixture
def cache(two_towers, tokenizer):
    return TextEmbeddingCache(two_towers, tokenizer)


@pytest.fixture
def prompts_run(two_towers):
    """Records the number of prompts in each forward pass of the text tower."""
    rows: list[int] = []
    two_towers.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def test_a_name_is_embedded_once_per_templates_whatever_the_vocabulary(cache, prompts_run, two_towers, tokenizer):
    cache.get(["road", "sky"], "plain")
    assert sum(prompts_run) == 2
    embeds = cache.get(["tree", "sky", "road"], "plain")
    assert sum(prompts_run) == 3
    torch.testing.assert_close(embeds, embed_names(two_towers, tokenizer, ["tree", "sky", "road"], "plain"))
    prompts_run.clear()
    cache.get(["sky"], ["the {}", "a {}"])
    cache.get(["sky"], ("the {}", "a {}"))
    assert sum(prompts_run) == 2


@pytest.mark.parametrize("change", ["in place", "through data", "another tensor", "load", "fused optimiser"])
def test_embeddings_are_forgotten_when_the_text_tower_changes(cache, two_towers, tokenizer, change):
    before = cache.get(["road"], "plain")
    weight = next(p for name, p in two_towers.text_model.named_parameters() if name.endswith("fc1.weight"))
    if change == "in place":
        with torch.no_grad():
            weight.mul_(1.5)
    elif change == "through data":
        weight.data *= 1.5
    elif change == "another tensor":
        weight.data = weight.data * 1.5
    elif change == "load":
        other = randomise(SparForOpenVocabSegmentation(tiny_config()), seed=1)
        two_towers.load_state_dict(other.state_dict())
    else:
        optimiser = torch.optim.AdamW([weight], lr=0.5, fused=True)
        weight.grad = torch.ones_like(weight)
        optimiser.step()
    after = cache.get(["road"], "plain")
    torch.testing.assert_close(after, embed_names(two_towers, tokenizer, ["road"], "plain"))
    assert not torch.allclose(after, before)


def test_training_the_vision_tower_forgets_nothing(cache, prompts_run, two_towers):
    cache.get(["road"], "plain")
    with torch.no_grad():
        for parameter in two_towers.vision_model.parameters():
            parameter.mul_(1.5)
    cache.get(["road"], "plain")
    assert len(prompts_run) == 1


def test_the_least_recently_used_names_are_forgotten(two_towers, tokenizer, prompts_run):
    cache = TextEmbeddingCache(two_towers, tokenizer, max_names=3)
    cache.get(["road", "sky", "tree"], "plain")
    cache.get(["road"], "plain")
    cache.get(["dog"], "plain")  # in the place of "sky"
    prompts_run.clear()
    cache.get(["road", "tree", "dog"], "plain")
    assert not prompts_run
    cache.get(["sky"], "plain")
    assert prompts_run == [1]
    many = ["road", "sky", "tree", "dog", "cat", "grass"]
    torch.testing.assert_close(cache.get(many, "plain"), embed_names(two_towers, tokenizer, many, "plain"))


def test_save_and_load__no_forward_in_another_process_of_the_same_model(cache, two_towers, tokenizer, tmp_path):
    path = tmp_path / "words.safetensors"
    expected = cache.get(["road", "sky"], "short")
    cache.save(path, templates="short")
    assert [file.name for file in tmp_path.iterdir()] == ["words.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["names"]) == ["road", "sky"]
        assert len(json.loads(file.metadata()["templates"])) == 4
        torch.testing.assert_close(file.get_tensor("text_embeds"), expected, rtol=0, atol=0)
    other = copy.deepcopy(two_towers)
    fresh = TextEmbeddingCache(other, tokenizer)
    assert fresh.load(path) == 2
    other.text_model.register_forward_pre_hook(lambda *args: pytest.fail("a text forward"))
    torch.testing.assert_close(fresh.get(["sky", "road"], "short"), expected.flip(0), rtol=0, atol=0)


def test_save__names_that_are_not_embedded_yet(cache, tmp_path):
    with pytest.raises(ValueError, match="Nothing has been embedded"):
        cache.save(tmp_path / "words.safetensors")
    cache.save(tmp_path / "words.safetensors", ["road", "sky", "road"], "plain")
    assert cache.load(tmp_path / "words.safetensors") == 2


def test_load__what_does_not_belong_is_refused(cache, two_towers, tokenizer, tmp_path):
    path = tmp_path / "words.safetensors"
    cache.save(path, ["road"], "plain")
    for other in (randomise(SparForOpenVocabSegmentation(tiny_config()), seed=1), two_towers.half()):
        with pytest.raises(ValueError, match="another text tower, dtype or tokenizer"):
            TextEmbeddingCache(other, tokenizer).load(path)
    save_file({"text_embeds": torch.zeros(1, 32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no text embeddings"):
        cache.load(tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        cache.load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        cache.load(tmp_path / "none.safetensors")
