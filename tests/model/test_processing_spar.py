"""The processor: images and words together, and one folder that all Auto classes reload."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_config
from transformers import AutoProcessor, PreTrainedTokenizerFast

from spar_hf import SparImageProcessorPil, SparProcessor, SparVisionModel


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))


@pytest.fixture
def processor(tokenizer) -> SparProcessor:
    return SparProcessor(SparImageProcessorPil(size={"shortest_edge": 48}), tokenizer)


def ids(tokenizer: PreTrainedTokenizerFast, words: str, length: int = 16) -> list[int]:
    """Words, end of text, padding: looked up one by one."""
    vocabulary = tokenizer.get_vocab()
    sequence = [vocabulary[word] for word in words.split()] + [vocabulary["</s>"]]
    return sequence + [vocabulary["<pad>"]] * (length - len(sequence))


def test_images_and_text(processor, image, two_towers):
    inputs = processor(images=image, text=["road", "a photo of the sky."], return_tensors="pt")
    assert sorted(inputs) == ["input_ids", "original_sizes", "pixel_values"]
    expected = [ids(processor.tokenizer, "road"), ids(processor.tokenizer, "a photo of the sky")]
    assert inputs.input_ids.tolist() == expected
    alone = SparImageProcessorPil(size={"shortest_edge": 48})(image, return_tensors="pt")
    torch.testing.assert_close(inputs.pixel_values, alone.pixel_values, rtol=0, atol=0)
    assert inputs.original_sizes == [(37, 53)]
    assert inputs.to("cpu").original_sizes == [(37, 53)]
    with torch.no_grad():
        assert two_towers(**inputs).logits.shape == (1, 2, 3, 5)


def test_images_or_text_alone(processor, image, tmp_path):
    image.save(tmp_path / "image.png")
    inputs = processor(images=[image, str(tmp_path / "image.png"), tmp_path / "image.png"], return_tensors="pt")
    assert sorted(inputs) == ["original_sizes", "pixel_values"]
    assert inputs.pixel_values.shape == (3, 3, 48, 69)
    assert processor(text="road", return_tensors="pt").input_ids.shape == (1, 16)
    assert processor(text="road")["input_ids"] == ids(processor.tokenizer, "road")
    with pytest.raises(ValueError, match="at least one input"):
        processor()


def test_options_reach_their_part(processor, image):
    inputs = processor(images=image, text=["sky"], size={"longest_edge": 32}, padding=False)
    assert inputs["pixel_values"][0].shape == (3, 22, 32)
    assert inputs["input_ids"] == [ids(processor.tokenizer, "sky", length=2)]


def test_unequal_sizes_are_refused(processor, image):
    with pytest.raises(ValueError, match="Group them by size"):
        processor(images=[image, image.rotate(90, expand=True)], return_tensors="pt")


def test_attention_mask_only_where_the_tokenizer_has_one(processor):
    processor.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    inputs = processor(text=["road", "a photo of the sky"], return_tensors="pt")
    assert inputs.attention_mask.sum(1).tolist() == [2, 6]


def test_too_long_text_is_refused(processor):
    fits = " ".join(["sky"] * 15)
    assert processor(text=[fits], return_tensors="pt").input_ids.tolist() == [ids(processor.tokenizer, fits)]
    for kind in (None, "pt"):
        with pytest.raises(ValueError, match=r"'sky sky.*has 17 tokens, the text tower reads 16.*truncation=True"):
            processor(text=["road", fits + " sky"], return_tensors=kind)
    for options in ({"truncation": True}, {"text_kwargs": {"truncation": True}}):
        cut = processor(text=["road", fits + " sky"], return_tensors="pt", **options)
        assert cut.input_ids[1].tolist() == ids(processor.tokenizer, fits)


def test_text_that_cannot_be_padded(processor):
    with pytest.raises(ValueError, match="empty list"):
        processor(text=[])
    processor.tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match=r"`model_max_length`.*`max_position_embeddings`"):
        processor(text=["road"])


def test_one_folder_for_all_auto_classes(processor, image, two_towers, tmp_path):
    """Weights, configuration, image processor and tokenizer, loaded in a fresh process."""
    two_towers.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image.save(tmp_path / "image.png")
    code = """
import json, sys
import spar_hf
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder)
image_processor = AutoImageProcessor.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
words = ["road", "a photo of the sky"]
inputs = processor(images=folder + "/image.png", text=words, return_tensors="np")
print(json.dumps({
    "types": [type(part).__name__ for part in (processor, image_processor, AutoConfig.from_pretrained(folder))],
    "image_processors": [processor.image_processor.to_dict(), image_processor.to_dict()],
    "input_ids": [inputs["input_ids"].tolist(), tokenizer(words, padding="max_length")["input_ids"]],
    "keys": sorted(inputs),
    "original_sizes": inputs["original_sizes"],
    "pixel_values": inputs["pixel_values"].tolist(),
}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    loaded = json.loads(result.stdout)
    assert loaded["types"] == ["SparProcessor", "SparImageProcessorPil", "SparConfig"]
    assert loaded["image_processors"] == [json.loads(processor.image_processor.to_json_string())] * 2
    here = processor(images=image, text=["road", "a photo of the sky"], return_tensors="np")
    assert loaded["input_ids"] == [here["input_ids"].tolist()] * 2
    assert loaded["keys"] == sorted(here)
    assert loaded["original_sizes"] == [[37, 53]]
    np.testing.assert_array_equal(np.float32(loaded["pixel_values"]), here["pixel_values"])


def test_vision_only_folder_has_no_processor(tmp_path):
    SparVisionModel(tiny_config(text_config=None)).save_pretrained(tmp_path)
    SparImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vision-only.*`AutoImageProcessor`"):
        AutoProcessor.from_pretrained(tmp_path)
