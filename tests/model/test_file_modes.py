"""What the library writes gets the mode of other new files: safetensors alone writes for the owner only."""

import os

import pytest
import torch
from model_classes import KINDS, make_model
from tiny_models import make_tokenizer

from spar_hf import SparImageProcessorPil, SparProcessor
from spar_hf.heads.frozen_features import ImageFeatures
from spar_hf.model.file_modes import follow_umask
from spar_hf.model.text_embeddings import TextEmbeddingCache
from spar_hf.utils.atomic import write_atomically


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def plain(request, tmp_path):
    """The mode of a file that Python writes, under several umasks."""
    before = os.umask(request.param)
    (tmp_path / "plain").touch()
    yield (tmp_path / "plain").stat().st_mode
    os.umask(before)


def modes(folder):
    return {path.name: path.stat().st_mode for path in folder.rglob("*") if path.is_file()}


def test_saved_folders(plain, tmp_path):
    for kind in KINDS:
        folder = tmp_path / kind
        make_model(kind).save_pretrained(folder)
        SparImageProcessorPil().save_pretrained(folder)
        assert modes(folder) == dict.fromkeys(modes(folder), plain)
    make_model("vision").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    SparProcessor(SparImageProcessorPil(), make_tokenizer()).save_pretrained(tmp_path / "shards")
    found = modes(tmp_path / "shards")
    assert sum(name.endswith(".safetensors") for name in found) > 2
    assert found == dict.fromkeys(found, plain)


def test_saved_features_and_text_embeddings(plain, tmp_path, two_towers, tokenizer):
    TextEmbeddingCache(two_towers, tokenizer).save(tmp_path / "words.safetensors", ["road"], "plain")
    features = ImageFeatures(torch.zeros(2, 3, 4, dtype=torch.bfloat16), (24, 32), (48, 64))
    write_atomically(tmp_path / "features.safetensors", features.save)
    found = modes(tmp_path)
    assert found == dict.fromkeys(found, plain)


def test_modes_of_a_folder_are_widened_and_keep_their_special_bits(tmp_path):
    before = os.umask(0o027)
    try:
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(0o2700)
        (tmp_path / "shared" / "script").touch()
        (tmp_path / "shared" / "script").chmod(0o700)
        follow_umask(tmp_path / "shared")
    finally:
        os.umask(before)
    assert (tmp_path / "shared").stat().st_mode & 0o7777 == 0o2750
    assert (tmp_path / "shared" / "script").stat().st_mode & 0o7777 == 0o740
