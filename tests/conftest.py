"""Shared by all tests: offline, two threads at most, tiny models of random weights."""

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "training" / "studies"))

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, SiglipTextConfig, SiglipVisionConfig

from spar_hf import SparConfig, SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor

torch.set_num_threads(1)  # two workers share two cores


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight, bias, norm and scale non-trivial, so that no mistake hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def tiny_config(**kwargs) -> SparConfig:
    """Two blocks of width 32 on a 4×4 grid of 16 px patches, with a text tower of the same width."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(image_size=64, hidden_act="gelu", layer_norm_eps=1e-6, **shape)
    text = SiglipTextConfig(
        vocab_size=64,
        max_position_embeddings=16,
        projection_size=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **shape,
    )
    return SparConfig(**{"backbone_config": vision, "text_config": text, **kwargs})


@pytest.fixture
def two_towers() -> SparForOpenVocabSegmentation:
    torch.manual_seed(0)
    return randomise(SparForOpenVocabSegmentation(tiny_config()))


@pytest.fixture
def vision_model(two_towers):
    return two_towers.vision_model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word of the short templates and of some classes, padded to the tiny text tower's 16 tokens."""
    words = "a photo of the bright dark black and white hard to see road street car automobile sky tree dog cat grass"
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words.split()])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(".", " ")])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=16,
        model_input_names=["input_ids"],
    )


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A saved two-tower model with its processor: a teacher for the training scripts."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same in every run: how far it can be trained in a few steps is no matter of luck
        model = SparForOpenVocabSegmentation(tiny_config())
    randomise(model).save_pretrained(folder)
    SparProcessor(SparImageProcessorPil(size={"shortest_edge": 128}), make_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Six coloured images, `0.jpg` to `5.jpg`, 110 px high and 150 to 205 px wide."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((150 + 11 * i, 110), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


class RecordList(logging.Handler):
    """Keeps what is logged at WARNING or above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def transformers_log():
    """What transformers logs at WARNING or above during the test, also what it says only once per process."""
    from transformers.utils.logging import warning_once

    warning_once.cache_clear()
    handler, logger = RecordList(), logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.WARNING)  # a command of ours run before in this process has silenced it
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)
    logger.setLevel(level)
