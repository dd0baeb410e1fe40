"""Tiny random configurations and inputs of all classes, in the form of transformers' model testers."""

import copy
from typing import Any

import torch
from tiny_models import CONFIGS, SHAPE
from transformers import CLIPTextConfig, PreTrainedConfig, Siglip2TextConfig, SiglipTextConfig

from spar_hf import SparConfig, SparSemanticConfig, SparUniversalConfig

BATCH = 3
SIZE = (30, 45)  # pixels; no multiple of the patch
TOKENS = 4 * 6
# class and register tokens before those of the patches
FIRST_TOKENS = {"siglip": 0, "naflex": 0, "maskclip": 1, "dinov3": 5, "dinov3txt": 5}
NAMES, LENGTH = (
    4,
    16,
)  # texts, and tokens of each; not a multiple of the batch, by which the tests tell what belongs to images
LABELS = {0: "road", 1: "car", 2: "sky", 3: "tree"}
WORDS = {"vocab_size": 64, "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
# the text tower that each read-out can have; plain DINOv3 has none
TEXTS: dict[str, Any] = {
    "siglip": lambda: SiglipTextConfig(**SHAPE, **WORDS, projection_size=32),
    "naflex": lambda: Siglip2TextConfig(**SHAPE, **WORDS, projection_size=32),
    "maskclip": lambda: CLIPTextConfig(**SHAPE, **WORDS, projection_dim=24),
    "dinov3txt": lambda: CLIPTextConfig(**SHAPE, **WORDS, projection_dim=64),
}
READOUTS = tuple(CONFIGS)


def spar_config(readout: str, **kwargs) -> SparConfig:
    return SparConfig(backbone_config=CONFIGS[readout](), readout=readout, **kwargs)


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
        return spar_config(self.readout, text_config=TEXTS[self.readout]())

    def get_inputs(self):
        words = {"input_ids": torch.randint(3, 64, (NAMES, LENGTH)), "attention_mask": torch.ones(NAMES, LENGTH).long()}
        return {**super().get_inputs(), **words}


class SemanticTester(ModelTester):
    """A linear head of four classes."""

    def get_config(self):
        return SparSemanticConfig(backbone_config=spar_config(self.readout), id2label=copy.copy(LABELS))


class UniversalTester(ModelTester):
    """A mask-classification head of four classes."""

    def get_config(self):
        return SparUniversalConfig(
            backbone_config=spar_config(self.readout),
            id2label=copy.copy(LABELS),
            hidden_dim=32,
            num_queries=7,
            num_attention_heads=2,
            dim_feedforward=48,
            decoder_layers=3,
            train_num_points=64,
        )

    def get_labels(self) -> dict[str, Any]:
        """Two segments per image: its left and its right half."""
        masks = torch.zeros(2, *SIZE)
        masks[0, :, : SIZE[1] // 2] = 1
        masks[1] = 1 - masks[0]
        return {
            "mask_labels": [masks] * self.batch_size,
            "class_labels": [torch.tensor([0, 2])] * self.batch_size,
        }
