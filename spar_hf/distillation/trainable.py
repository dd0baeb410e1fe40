"""What is trained: the last blocks or all of them, single parts, or low-rank adapters; everything else is frozen."""

import re
from typing import Any

import torch
from torch import nn

from spar_hf import SparVisionModel
from spar_hf.utils.errors import UsageError

# Parts by name, as patterns of parameter names: inside a block, and in the backbone outside the blocks.
BLOCK_PARTS = {
    "qkv": r"[qkv]_proj\.",
    "attention": r"(self_attn|attention)\.",
    "mlp": r"mlp\.",
    "norm": r"(layer_)?norm\d\.|layer_scale",
}
OTHER_PARTS = {
    "position_table": r"embeddings\.position_embedding",
    "patch_embedding": r"embeddings\.patch_(embeddings?|projection)\.",
    "tokens": r"embeddings\.(class_embedding|cls_token|register_tokens|cls_register_token)|pre_layrnorm",
    "readout": r"((post_)?layernorm|norm|head|text_head|visual_projection)\.",
}
ADAPTER_PARTS = ("qkv", "attention", "mlp")  # parts made of linear layers, which take adapters


def trainable_names(model: SparVisionModel, train_layers: str, parts: list[str]) -> list[str]:
    """
    Names of the parameters to train. Parameters that dense features do not depend on (a pooling probe, the vision head of
    dino.txt) are never among them: they would get no gradient, and distributed training would stop.

    Args:
        model ([`SparVisionModel`]): the model.
        train_layers (`str`): number of last blocks, or `all`: all blocks and what is outside of them.
        parts (`list[str]`): only these parts (keys of `BLOCK_PARTS` and `OTHER_PARTS`) of what `train_layers` names; parts
            outside the blocks can be named with any `train_layers`. Empty for everything.

    Raises:
        UsageError: more blocks than there are, or a part that this backbone lacks.
    """
    backbone = model.backbone
    blocks = list(backbone.blocks)
    count = len(blocks) if train_layers == "all" else int(train_layers)
    if count > len(blocks):
        raise UsageError(f"--train_layers {count}: the backbone has {len(blocks)} blocks. Name fewer, or 'all'.")
    in_chosen_block = {id(p) for block in blocks[len(blocks) - count :] for p in block.parameters()}
    name_in_block = {id(p): name for block in blocks for name, p in block.named_parameters()}
    found, names = set(), []
    for name, parameter in backbone.named_parameters():
        if any(part in name for part in backbone.unused_parameters):
            continue
        local = name_in_block.get(id(parameter))
        patterns = OTHER_PARTS if local is None else BLOCK_PARTS
        matching = {
            part for part in parts if part in patterns and re.match(rf"(.*\.)?({patterns[part]})", local or name)
        }
        if id(parameter) in in_chosen_block or (local is None and (train_layers == "all" or parts)):
            found |= matching
            if matching or not parts:
                names.append(f"backbone.{name}")
    if missing := set(parts) - found:
        raise UsageError(
            f"--train_parts {' '.join(sorted(missing))}: a {model.config.readout} backbone has no such part there."
        )
    return names


def choose_parameters(model: SparVisionModel, train_layers: str, parts: list[str] | None = None) -> list[nn.Parameter]:
    """
    Freeze everything but the parameters that [`trainable_names`] lists, and return those.

    Blocks below the first trained parameter cost no memory for gradients: autograd keeps nothing where no input needs one.

    Example:

    ```python
    >>> from spar_hf import SPAR_TINY
    >>> model = SparVisionModel.from_pretrained(SPAR_TINY)
    >>> parameters = choose_parameters(model, "1", ["mlp"])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad][0]
    'backbone.encoder.layers.7.mlp.fc1.weight'
    ```"""
    names = set(trainable_names(model, train_layers, parts or []))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def add_adapters(
    model: SparVisionModel, train_layers: str, parts: list[str] | None, rank: int, alpha: float | None = None
) -> Any:
    """
    The model inside a `PeftModel` with LoRA on linear layers of its blocks; everything else is frozen.

    Args:
        model ([`SparVisionModel`]): the model; its modules are replaced in place.
        train_layers (`str`), parts (`list[str]`, *optional*): which layers, see [`trainable_names`]; attention and MLP by
            default.
        rank (`int`): rank of the adapters.
        alpha (`float`, *optional*): adapters are scaled by `alpha / rank`; twice the rank by default.
    """
    from peft import LoraConfig, get_peft_model

    names = set(trainable_names(model, train_layers, parts or ["attention", "mlp"]))
    in_blocks = {module for block in model.backbone.blocks for module in block.modules()}
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in in_blocks and f"{name}.weight" in names
    ]
    scale: Any = alpha or 2 * rank  # peft says int, and takes any number
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=scale, target_modules=targets))


def share_frozen(student: nn.Module, teacher: nn.Module) -> int:
    """
    Let teacher and student hold equal frozen weights in the same memory. Both must be on their device already.

    Returns:
        how many numbers are shared.
    """
    teacher_parameters = dict(teacher.named_parameters())
    shared = 0
    for name, parameter in student.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")  # as adapters rename what they wrap
        if parameter.requires_grad or name not in teacher_parameters:
            continue
        if torch.equal(parameter, teacher_parameters[name]):
            teacher_parameters[name].data = parameter.data
            shared += parameter.numel()
    return shared


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers in the trained parameters, and in all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
