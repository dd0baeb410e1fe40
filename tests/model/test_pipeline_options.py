"""Options of the pipeline together: none is ignored, none changes the form of a result."""

import numpy as np
import pytest
import torch
from transformers import pipeline

from spar_hf import SparImageProcessorPil
from spar_hf.model.pipeline import OpenVocabSegmentationPipeline

LABELS = ["road", "car, automobile", "sky"]


@pytest.mark.parametrize("min_presence", [0.0, 0.3, 1.0])
def test_every_class_has_its_row_whatever_is_left_out(segment, picture, min_presence):
    """A background without words, and classes that are not present, have a probability of 0, not a row less."""
    options = {"candidate_labels": LABELS, "background": "rest"}
    dense = segment(picture, output="probabilities", **options)
    assert dense["labels"] == ["road", "car", "sky", "rest"] and dense["probabilities"].shape == (4, 90, 131)
    assert not dense["probabilities"][3].any()
    np.testing.assert_allclose(dense["probabilities"].sum(0), 1, atol=1e-5)
    for top_k in (1, 3, 9):
        found = segment(picture, output="map", min_presence=min_presence, top_k=top_k, **options)
        layers = min(top_k, 4)
        assert found["top_map"].shape == found["top_probabilities"].shape == (layers, 90, 131)
        assert (np.diff(np.sort(found["top_map"], axis=0), axis=0) > 0).all()  # no class twice
        assert (np.diff(found["top_probabilities"], axis=0) <= 1e-6).all()
        if min_presence == 1:
            assert (found["top_map"][0] == 3).all() and (found["top_probabilities"][0] == 1).all()


def test_options_of_encoded_images_and_of_folders(segment, picture, two_towers, tokenizer, tmp_path):
    encoded = segment.encode(picture)
    with pytest.raises(ValueError, match="one pass"):
        segment(encoded, candidate_labels=LABELS, tile=64)
    for words in ((word for word in ("wall", "floor")), np.array(["wall", "floor"])):
        assert "background" in segment(picture, candidate_labels=LABELS, background=words, output="map")["labels"]
    with pytest.raises(ValueError, match="from 0 to 1"):
        segment(picture, candidate_labels=LABELS, threshold="0.5")
    with pytest.raises(ValueError, match=r"\['ade20k'\]"):
        segment.save_pretrained(tmp_path / "words", text_embeddings="ade20k")
    with pytest.raises(ValueError, match="no vocabulary"):
        segment.save_pretrained(tmp_path / "words", text_embeddings=["ade20"])
    assert not (tmp_path / "words").exists()
    limited = OpenVocabSegmentationPipeline(two_towers, tokenizer=tokenizer, image_processor=SparImageProcessorPil())
    limited.image_processor.max_tokens = 40
    limited.save_pretrained(tmp_path / "limited")
    again = pipeline("open-vocab-segmentation", model=str(tmp_path / "limited"))
    maps = [run(picture, candidate_labels=LABELS, output="map")["map"] for run in (limited, again)]
    assert again.image_processor.max_tokens == 40 and (maps[0] == maps[1]).all()


def test_none_switches_off_what_the_pipeline_was_made_with(two_towers, tokenizer, picture):
    parts = {"tokenizer": tokenizer, "image_processor": SparImageProcessorPil()}
    plain = OpenVocabSegmentationPipeline(two_towers, **parts)
    made = {"background": "auto", "min_presence": 0.5, "refine": "pamr", "top_k": 2}
    other = OpenVocabSegmentationPipeline(two_towers, **parts, **made)
    options = {"candidate_labels": LABELS, "output": "map"}
    found, expected = other(picture, **options, **dict.fromkeys(made)), plain(picture, **options)
    assert found.keys() == expected.keys() and (found["map"] == expected["map"]).all()
    assert "background" in other(picture, **options, refine=None)["labels"]
    tiles = OpenVocabSegmentationPipeline(two_towers, **parts, tile=64)
    assert (tiles(picture, **options, tile=None)["map"] == expected["map"]).all()


@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor])
def test_integers_of_numpy_and_torch_are_integers(segment, picture, integer):
    given = {"candidate_labels": ["road", "sky"], "output": "map"}
    for name, value in (("size", 64), ("max_tokens", 20), ("top_k", 1), ("size", (48, 64)), ("tile", 48)):
        other = tuple(map(integer, value)) if isinstance(value, tuple) else integer(value)
        expected, found = (segment(picture, **{**given, name: v}) for v in (value, other))
        np.testing.assert_array_equal(found["map"], expected["map"])
        assert found["scores"] == expected["scores"]
    for name in ("size", "max_tokens", "top_k"):
        with pytest.raises(ValueError, match=name):
            segment(picture, **{**given, name: True})
