"""
C-RADIO's head of a teacher with a text tower, in the naming of the RADIO code: `radio_model.adaptors.NAME.head_mlp.*` in
repositories of the hub, `_heads.NAME.*` or `_heads.NUMBER.*` in the state dict of its own checkpoints.

The backbone comes from the base, a C-RADIO model in the format of transformers, and the text tower from SigLIP2.
"""

import re
from typing import Any

import torch
from torch.nn.functional import gelu, layer_norm
from transformers import RadioModel

from spar_hf.utils.errors import UsageError

from .checkpoint_tensors import CheckpointTensors
from .reference_layers import Tensors, dense

MODEL_TYPES = ("radio",)
VISION_SETTINGS: dict[str, Any] = {}
TEXT_SETTINGS: dict[str, Any] = {}
HEAD = re.compile(r"(radio_model\.adaptors\.([^.]+)\.head_mlp\.|_heads\.([^.]+)\.)")
NEW = "vision_model.backbone.text_head."


def head_prefix(names: Any, adaptor: str) -> str:
    """
    What the names of the head's tensors begin with.

    Raises:
        UsageError: the checkpoint has no such head, or one in another form than C-RADIO's since version 2.5.
    """
    found = {match[2] or match[3]: match[1] for match in map(HEAD.match, names) if match}
    if adaptor not in found:
        others = f"heads of {', '.join(sorted(found))}" if found else "no head of a teacher"
        raise UsageError(
            f"The checkpoint has {others}, and none of {adaptor}. Name the one of SigLIP2 with --adaptor; its output is as "
            "wide as SigLIP2's texts."
        )
    prefix = found[adaptor]
    if f"{prefix}final.2.weight" not in names or f"{prefix}fc1.weight" not in names:
        raise UsageError(
            f"The head of {adaptor} is no residual MLP of plain layers ({prefix}fc1, {prefix}final). Merge spectral "
            "parametrisations with the published code first; the heads of earlier versions are not read."
        )
    return prefix


def rename(source: CheckpointTensors, adaptor: str = "siglip2-g") -> None:
    """Rename the tensors of a head to their names in [`SparForOpenVocabSegmentation`]; the others are not used."""
    prefix = head_prefix(source.remaining, adaptor)
    layers = [f"blocks.{i}" for i in range(source.depth(f"{prefix}blocks."))] + ["final"]
    source.linear(f"{prefix}fc1", f"{NEW}fc1")
    for layer in layers:
        source.linear(f"{prefix}{layer}.0", f"{NEW}{layer}.0")
        source.linear(f"{prefix}{layer}.2", f"{NEW}{layer}.2")
    others = [name for name in source.remaining if not name.startswith(prefix)]
    source.skip("not of this head: the backbone is that of the base", *others)


def head_settings(renamed: Tensors, adaptor: str) -> dict[str, int]:
    """The settings of the backbone's configuration that the head's shapes determine."""
    blocks = {name.split(".")[4] for name in renamed if name.startswith(f"{NEW}blocks.")}
    return {
        "text_head_hidden": renamed[f"{NEW}fc1.weight"].shape[0],
        "text_head_layers": len(blocks),
        "text_head_size": renamed[f"{NEW}final.2.weight"].shape[0],
        "text_head_token": int(adaptor) if adaptor.isdigit() else 0,
    }


def load_base(base: str) -> RadioModel:
    """The base as transformers runs it."""
    return RadioModel.from_pretrained(base, dtype=torch.float32).eval()


def features_on(backbone: RadioModel, tensors: Tensors, pixels: torch.Tensor, adaptor: str) -> torch.Tensor:
    """Reference feature map `(batch, dim, height / patch, width / patch)`: the head on transformers' features."""
    prefix = head_prefix(tensors, adaptor)

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = tensors[f"{prefix}{name}.0.weight"], tensors[f"{prefix}{name}.0.bias"]
        return dense(tensors, f"{prefix}{name}.2", gelu(layer_norm(x, x.shape[-1:], weight, bias)))

    x, number = dense(tensors, f"{prefix}fc1", backbone(pixels).features), 0
    while f"{prefix}blocks.{number}.0.weight" in tensors:
        x, number = x + layer(f"blocks.{number}", x), number + 1
    grid = [side // int(backbone.config.patch_size) for side in pixels.shape[-2:]]
    return layer("final", x).transpose(1, 2).unflatten(2, grid)
