"""The cache of text embeddings: reuse, invalidation, and files that belong to a text tower."""

import copy
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import randomise, tiny_config
from tokenizers import normalizers
from transformers import pipeline

from spar_hf import SparForOpenVocabSegmentation
from spar_hf.model.fingerprints import checksum
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


def test_changes_are_looked_for_before_and_after_a_block_that_excludes_them(cache, two_towers):
    weight = next(p for name, p in two_towers.text_model.named_parameters() if name.endswith("fc1.weight"))
    first = cache.get(["road"], "plain")
    weight.data[0] += 1
    with cache.unchanged():
        second = cache.get(["road"], "plain")
        assert not torch.allclose(second, first)
        weight.data[0] += 1
        assert torch.equal(cache.get(["road"], "plain"), second)
    assert not torch.allclose(cache.get(["road"], "plain"), second)


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


def test_every_row_of_every_weight_counts(cache, two_towers, tokenizer):
    for weight in two_towers.text_model.parameters():
        for change in (lambda w: w.view(-1)[-1:].mul_(1 + 2**-20).add_(1e-30), lambda w: w.flip(0)):
            before = checksum(two_towers.text_model)
            kept = weight.data.clone()
            changed = change(weight.data)
            if changed.shape == kept.shape and not torch.equal(changed, kept):
                weight.data.copy_(changed)
            if not torch.equal(weight.data, kept):
                assert checksum(two_towers.text_model) != before
            weight.data.copy_(kept)
            assert checksum(two_towers.text_model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_row_of_a_weight_is_enough(two_towers, tokenizer, dtype):
    two_towers.to(dtype)
    cache = TextEmbeddingCache(two_towers, tokenizer)
    before = cache.get(["road"], "plain")
    table = two_towers.text_model.get_input_embeddings().weight
    token = tokenizer("road")["input_ids"][0]
    table.data[token] *= -1.5
    after = cache.get(["road"], "plain")
    assert torch.equal(after, embed_names(two_towers, tokenizer, ["road"], "plain"))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("change", ["another", "normaliser", "token"])
def test_embeddings_are_forgotten_when_the_tokenizer_changes(two_towers, tokenizer, change):
    cache = TextEmbeddingCache(two_towers, tokenizer)
    before = cache.get(["road"], "plain")
    if change == "another":
        cache.tokenizer = copy.deepcopy(tokenizer)
        tokenizer = cache.tokenizer
    if change == "token":
        tokenizer.add_tokens(["roa"])
    else:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("road", "sky")
    after = cache.get(["road"], "plain")
    assert torch.equal(after, embed_names(two_towers, tokenizer, ["road"], "plain"))
    assert not torch.allclose(after, before)


def test_threads_share_a_full_cache(two_towers, tokenizer):
    cache = TextEmbeddingCache(two_towers, tokenizer, max_names=2)
    words = ["road", "sky", "tree", "dog", "cat", "grass"]
    expected = dict(zip(words, embed_names(two_towers, tokenizer, words, "plain"), strict=True))

    def look_up(number):
        names = [words[number % 6], words[(number + 1) % 6], words[(number * 5 + 2) % 6]]
        got = cache.get(names, "plain")
        return all(torch.allclose(row, expected[name], atol=1e-6) for name, row in zip(names, got, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look_up, range(100)))


def test_a_copy_in_another_process_has_a_lock_of_its_own(cache):
    cache.get(["road"], "plain")
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.get(["road"], "plain"), cache.get(["road"], "plain"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_generator_with_a_worker_works_with_every_start_method(method):
    code = f"""
import multiprocessing, spar_hf
from PIL import Image
from transformers import pipeline
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    segment = pipeline("open-vocab-segmentation")
    images = (Image.new("RGB", (32, 32 + i)) for i in range(3))
    options = dict(candidate_labels=["road", "sky"], templates="plain", output="map", num_workers=1)
    print([result["map"].shape for result in segment(images, **options)])
"""
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "[(32, 32), (33, 32), (34, 32)]", process.stderr


def test_pipeline_forgets_the_words_of_another_tokenizer():
    segment = pipeline("open-vocab-segmentation")
    options = {"candidate_labels": ["road", "sky"], "templates": "plain", "output": "logits"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    before = segment(image, **options)["logits"]
    segment.tokenizer = copy.deepcopy(segment.tokenizer)
    swap = normalizers.Sequence([normalizers.Replace("road", "x"), normalizers.Replace("sky", "road")])
    segment.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([swap, normalizers.Replace("x", "sky")])
    np.testing.assert_allclose(segment(image, **options)["logits"], before[::-1], atol=1e-5)
