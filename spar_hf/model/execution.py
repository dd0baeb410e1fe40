"""How a forward pass runs: precision under autocast, offloaded weights, requested outputs, labels without a loss."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast is off in this block. It is asked for first, which keeps it out of exported graphs."""
    mixed = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if mixed else nullcontext()


def own_weights(module: nn.Module) -> AbstractContextManager:
    """
    For code that reads weights of `module` without calling it. Where accelerate offloads them (`device_map="auto"`,
    `cpu_offload`, `disk_offload`), they are empty outside of `forward`, and this block loads them.
    """
    hooks = [(part, part._hf_hook) for part in module.modules() if hasattr(part, "_hf_hook")]
    return loaded(hooks) if hooks else nullcontext()


@contextmanager
def loaded(hooks: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Load the weights of modules by their hooks, and send them back after the block."""
    for part, hook in hooks:
        hook.pre_forward(part)
    try:
        yield
    finally:
        for part, hook in hooks:
            hook.post_forward(part, None)


def as_tensor(sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """Sizes `(n,)`, int64; in exported and traced graphs those of the input, where `torch.tensor` would freeze them."""
    return torch.stack([torch.scalar_tensor(size, dtype=torch.int64, device=device) for size in sizes])


def with_output_flags(config: Any, kwargs: Any) -> dict[str, Any]:
    """
    Options of a part of a composite model: `kwargs`, and the outputs that the whole's `config` asks for. The part's own
    configuration does not have them.
    """
    flags = {name: getattr(config, name, False) for name in ("output_hidden_states", "output_attentions")}
    return {**kwargs, **{name: value for name, value in flags.items() if value and kwargs.get(name) is None}}


def refuse_labels(model: nn.Module, kwargs: Any) -> None:
    """
    Raise `ValueError` for labels given to a model without a loss for them. As further keyword arguments they would be
    dropped, and a training would go on without them.
    """
    given = [name for name in ("labels", "mask_labels", "class_labels") if kwargs.get(name) is not None]
    if given:
        raise ValueError(
            f"{type(model).__name__} has no loss for `{given[0]}`. Models with one: `SparForSemanticSegmentation` for "
            "`labels` (`bake_vocabulary` makes one of a model and class names, `spar-hf probe` trains one) and "
            "`SparForUniversalSegmentation` for `mask_labels` and `class_labels`."
        )
