"""How a forward pass runs: precision, compiled graphs, offloaded weights, requested outputs, labels without a loss."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

HALVES = (torch.float16, torch.bfloat16)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast is off in this block. It is asked for first, which keeps it out of exported graphs."""
    mixed = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if mixed else nullcontext()


class StreamNorm(nn.LayerNorm):
    """
    A layer norm between a float32 residual stream and layers in half precision: a float32 input is normalised in float32 and
    returned in the dtype of the weights. With float32 weights, and with inputs of the weights' dtype, it is `LayerNorm`.

    Example:

    ```python
    >>> norm = StreamNorm(8).bfloat16()
    >>> norm(torch.ones(2, 8)).dtype
    torch.bfloat16
    ```"""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype not in HALVES or hidden_states.dtype == self.weight.dtype:
            return super().forward(hidden_states)
        weight, bias = self.weight.float(), self.bias.float()
        normalised = nn.functional.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)
        return normalised.to(self.weight.dtype)


def compile_model(model: nn.Module, **options: Any) -> Any:
    """
    `torch.compile` for images of any size: a second size costs no second compilation.

    `torch.compile(model)` first compiles for one size, and again when a second comes. With `dynamic=True` it takes sizes
    that are equal in the first call, such as the sides of a square image, for equal in all calls. Batches of one image and
    of several are two graphs, and so are one name and several.

    Args:
        model (`nn.Module`): a SPAR model; a pipeline's is replaced by `segment.model = compile_model(segment.model)`.
        options: further arguments of `torch.compile`, such as `backend` or `mode`.

    Returns:
        The compiled model: it shares the weights, and takes and returns what `model` does.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from spar_hf import compile_model

    >>> segment = pipeline("open-vocab-segmentation")
    >>> segment.model = compile_model(segment.model)  # compiled at the first image
    ```"""
    compiled: Any = torch.compile(model, **{"dynamic": True, **options})
    compiled.register_forward_pre_hook(lambda _, args, kwargs: mark_sizes(*args, *kwargs.values()), with_kwargs=True)
    return compiled


def mark_sizes(*inputs: Any) -> None:
    """Let graphs hold for any number, height and width of the tensors among `inputs`, each by itself."""
    from torch._dynamo import maybe_mark_dynamic  # documented; loading it takes a second

    for tensor in inputs:
        if isinstance(tensor, torch.Tensor) and tensor.ndim:
            maybe_mark_dynamic(tensor, [0, *range(2, tensor.ndim)] if tensor.ndim == 4 else [0])


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


def check_batch(pixel_values: torch.Tensor) -> None:
    """Raise `ValueError` if `pixel_values` are not a batch of images."""
    if pixel_values.ndim != 4:
        raise ValueError(
            f"`pixel_values` must be (batch, channels, height, width), got shape {tuple(pixel_values.shape)}. "
            "A single image needs a batch axis: `pixel_values[None]`."
        )


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
