"""Each model class on each family of backbones: tiny, of random weights, with inputs and labels."""

import copy
from typing import Any

import torch
from tiny_models import CONFIGS, SHAPE, randomise
from transformers import CLIPTextConfig, MetaClip2TextConfig, Siglip2TextConfig, SiglipTextConfig, Tipsv2TextConfig

from spar_hf import (
    SparBackbone,
    SparConfig,
    SparForOpenVocabSegmentation,
    SparForSemanticSegmentation,
    SparForUniversalSegmentation,
    SparSemanticConfig,
    SparUniversalConfig,
    SparVisionModel,
)

SIZE = (30, 45)  # pixels; no multiple of the patch
LABELS = {0: "road", 1: "car", 2: "sky", 3: "tree"}
NAMES, LENGTH = 4, 16  # texts, and tokens of each
WORDS = {"vocab_size": 64, "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
READOUTS = tuple(CONFIGS)
# the text tower that each read-out can have; DINOv2 and plain DINOv3 have none
TEXTS: dict[str, Any] = {
    "siglip": lambda: SiglipTextConfig(**SHAPE, **WORDS, projection_size=32),
    "naflex": lambda: Siglip2TextConfig(**SHAPE, **WORDS, projection_size=32),
    "maskclip": lambda: CLIPTextConfig(**SHAPE, **WORDS, projection_dim=24),
    "metaclip2": lambda: MetaClip2TextConfig(**SHAPE, **WORDS, projection_dim=24),
    "dinov3txt": lambda: CLIPTextConfig(**SHAPE, **WORDS, projection_dim=64),
    "tipsv2": lambda: Tipsv2TextConfig(**SHAPE, **WORDS),
    "radiotext": lambda: SiglipTextConfig(**SHAPE, **WORDS, projection_size=24),
}


def spar_config(readout: str, **kwargs) -> SparConfig:
    return SparConfig(backbone_config=CONFIGS[readout](), readout=readout, **kwargs)


def two_tower_config(readout: str) -> SparConfig:
    return spar_config(readout, text_config=TEXTS[readout]())


def semantic_config(readout: str, **kwargs) -> SparSemanticConfig:
    """A linear head of four classes."""
    return SparSemanticConfig(backbone_config=spar_config(readout), **{"id2label": copy.copy(LABELS), **kwargs})


def universal_config(readout: str) -> SparUniversalConfig:
    """A mask-classification head of four classes."""
    return SparUniversalConfig(
        backbone_config=spar_config(readout),
        id2label=copy.copy(LABELS),
        hidden_dim=32,
        num_queries=7,
        num_attention_heads=2,
        dim_feedforward=48,
        decoder_layers=3,
        train_num_points=64,
    )


KINDS: dict[str, tuple[Any, Any]] = {
    "vision": (SparVisionModel, spar_config),
    "backbone": (SparBackbone, spar_config),
    "two towers": (SparForOpenVocabSegmentation, two_tower_config),
    "semantic": (SparForSemanticSegmentation, semantic_config),
    "universal": (SparForUniversalSegmentation, universal_config),
}
CASES = [(kind, readout) for kind in KINDS for readout in (TEXTS if kind == "two towers" else READOUTS)]


def make_model(kind: str, readout: str = "siglip") -> Any:
    torch.manual_seed(0)
    model_class, config = KINDS[kind]
    return randomise(model_class(config(readout)))


def make_inputs(kind: str, batch: int = 2, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(size))
    inputs = {"pixel_values": torch.randn(batch, 3, *size, generator=generator)}
    if kind == "two towers":
        inputs["input_ids"] = torch.randint(3, 64, (NAMES, LENGTH), generator=generator)
    return inputs


def make_labels(kind: str) -> dict[str, Any]:
    """Two classes: the left and the right half of both images."""
    left = torch.zeros(SIZE, dtype=torch.long)
    left[:, : SIZE[1] // 2] = 1
    if kind == "semantic":
        return {"labels": torch.stack([2 * left, left])}
    masks = torch.stack([left, 1 - left]).float()
    return {"mask_labels": [masks] * 2, "class_labels": [torch.tensor([0, 2])] * 2}


def loss_of(model: Any, kind: str) -> torch.Tensor:
    """The loss of a head, or one on the dense features or logits of a model without."""
    if kind in ("semantic", "universal"):
        return model(**make_inputs(kind), **make_labels(kind)).loss
    outputs = model(**make_inputs(kind))
    values = {"vision": "feature_map", "backbone": "feature_maps", "two towers": "logits"}[kind]
    found = outputs[values]
    return (found[-1] if isinstance(found, tuple) else found).square().sum()
