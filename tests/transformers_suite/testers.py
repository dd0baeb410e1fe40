"""The tiny classes of `tests/model_classes.py` in the form of transformers' model testers."""

from typing import Any

import torch
from model_classes import (
    LABELS,
    LENGTH,
    NAMES,
    READOUTS,
    SIZE,
    TEXTS,
    semantic_config,
    spar_config,
    two_tower_config,
    universal_config,
)
from tiny_models import SHAPE
from transformers import PreTrainedConfig

__all__ = ["LABELS", "READOUTS", "TEXTS"]  # for the modules beside this one

BATCH = 3  # NAMES is no multiple of it: by it the tests tell what belongs to images
TOKENS = 4 * 6
# class and register tokens before those of the patches
FIRST_TOKENS = {"siglip": 0, "naflex": 0, "maskclip": 1, "dinov3": 5, "dinov3txt": 5}


class ModelTester:
    """What the mixins of transformers ask of a tester, for a vision model of one read-out."""

    batch_size = BATCH
    is_training = True
    num_hidden_layers = SHAPE["num_hidden_layers"]
    num_attention_heads = SHAPE["num_attention_heads"]
    hidden_size = SHAPE["hidden_size"]

    def __init__(self, readout: str):
        self.readout = readout
        self.seq_length = TOKENS + FIRST_TOKENS[readout]

    def get_config(self) -> PreTrainedConfig:
        return spar_config(self.readout)

    def get_inputs(self) -> dict[str, Any]:
        return {"pixel_values": torch.randn(self.batch_size, 3, *SIZE)}

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        return self.get_config(), self.get_inputs()


class BackboneTester(ModelTester):
    """Two stages: one of the encoder, and the dense features."""

    def get_config(self):
        return spar_config(self.readout, out_features=["stage1", "features"])


class OpenVocabTester(ModelTester):
    """Both towers, and prompts as tokens."""

    is_training = False  # it has no loss: towers are distilled, heads are trained on a fixed vocabulary

    def get_config(self):
        return two_tower_config(self.readout)

    def get_inputs(self):
        words = {"input_ids": torch.randint(3, 64, (NAMES, LENGTH)), "attention_mask": torch.ones(NAMES, LENGTH).long()}
        return {**super().get_inputs(), **words}


class SemanticTester(ModelTester):
    """A linear head of four classes."""

    def get_config(self):
        return semantic_config(self.readout)


class UniversalTester(ModelTester):
    """A mask-classification head of four classes."""

    def get_config(self):
        return universal_config(self.readout)

    def get_labels(self) -> dict[str, Any]:
        """Two segments per image: its left and its right half."""
        masks = torch.zeros(2, *SIZE)
        masks[0, :, : SIZE[1] // 2] = 1
        masks[1] = 1 - masks[0]
        return {
            "mask_labels": [masks] * self.batch_size,
            "class_labels": [torch.tensor([0, 2])] * self.batch_size,
        }
