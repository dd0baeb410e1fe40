"""Reads the tensors of an official checkpoint without unpickling code, and renames each exactly once."""

import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from spar_hf.utils.errors import MissingFiles, UsageError

# prefixes of wrappers, Lightning and data parallelism
PREFIXES = ("segmentor.net.", "module.", "model.")
FORMATS = "A checkpoint is a .safetensors file, or a .ckpt, .pt, .pth or .bin file that contains tensors only."
BLOCK = ("self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")  # of CLIP and SigLIP in transformers
OPEN_CLIP_BLOCK = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
TORCH_STARTS = (b"PK\x03\x04", b"\x80")  # first bytes of torch.save: a zip archive, in old versions a pickle


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Read the tensors of a `.safetensors`, `.pt`, `.pth`, `.bin` or Lightning `.ckpt` file to the CPU, and remove the prefixes
    of wrappers from their names.

    Raises:
        MissingFiles: no such file.
        UsageError: the file is not a checkpoint, is damaged, contains no tensors, or contains other Python objects, which
            are never unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFiles(f"{path} is not a file. {FORMATS}")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about files that it then refuses
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, EOFError, SafetensorError, … for arbitrary bytes
        raise UsageError(f"{path} {reading_problem(path, error)}") from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} contains a {type(content).__name__} instead of a state dict. Save only the model's `state_dict`."
        )
    other = sorted(str(name) for name, value in content.items() if not isinstance(value, torch.Tensor))
    if other or not content:
        problem = f"also contains {', '.join(other[:5])}" if other else "is empty"
        raise UsageError(f"The state dict of {path} {problem}. Save only the model's `state_dict`.")
    tensors = dict(content)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors


def reading_problem(path: Path, error: Exception) -> str:
    """Explain why a file cannot be read. torch's own message advises to run the code in it."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "is empty (0 bytes). Copy or download it again."
    if path.suffix == ".safetensors":
        return f"is not a complete safetensors file ({error}). Copy or download it again."
    if not start.startswith(TORCH_STARTS):
        return f"is not a checkpoint. {FORMATS}"
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"contains Python objects{f' ({named[1]})' if named else ''} besides tensors, and code in a checkpoint is never "
            "run. Where the checkpoint was made, save only the model's `state_dict`."
        )
    return f"is damaged or truncated. Copy or download it again. {FORMATS}"


class CheckpointTensors:
    """
    Tensors of a checkpoint, renamed one by one, so that none is used twice or forgotten.

    Attributes:
        remaining: tensors that are not used yet, by old name.
        renamed: tensors by new name, in float32.
        skipped: old names of tensors that the model does not have, with the reason.
        missing: old names that were requested but do not exist.

    Example:

    ```python
    >>> source = CheckpointTensors({"norm.weight": torch.ones(2), "norm.bias": torch.zeros(2), "step": torch.zeros(1)})
    >>> source.linear("norm", "vision_model.layer_norm")
    >>> list(source.renamed), list(source.remaining)
    (['vision_model.layer_norm.weight', 'vision_model.layer_norm.bias'], ['step'])
    ```"""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.remaining = dict(tensors)
        self.renamed: dict[str, torch.Tensor] = {}
        self.skipped: dict[str, str] = {}
        self.missing: list[str] = []

    def take(self, name: str) -> torch.Tensor | None:
        """Take a tensor out, in float32. `None` if there is none of this name, which is noted in `missing`."""
        if name not in self.remaining:
            self.missing.append(name)
            return None
        return self.remaining.pop(name).float()

    def move(self, name: str, new_name: str, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        """Rename a tensor, and change its layout if asked for."""
        tensor = self.take(name)
        if tensor is not None:
            self.renamed[new_name] = (tensor if change is None else change(tensor)).contiguous()

    def scalar(self, name: str) -> None:
        """Keep a scale or bias of shape `()` or `(1,)` under its name; other shapes are reported later."""
        self.move(name, name, lambda t: t.reshape(1) if t.numel() == 1 else t)

    def linear(self, name: str, new_name: str, bias: bool = True) -> None:
        """Rename weight and bias of a linear layer, a convolution or a norm."""
        for part in ("weight", "bias") if bias else ("weight",):
            self.move(f"{name}.{part}", f"{new_name}.{part}")

    def split(self, name: str, new_names: list[str]) -> None:
        """Split a tensor whose rows belong to several layers, such as query, key and value."""
        tensor = self.take(name)
        if tensor is not None:
            for new_name, part in zip(new_names, tensor.chunk(len(new_names)), strict=True):
                self.renamed[new_name] = part.contiguous()

    def skip(self, reason: str, *names: str) -> None:
        """Note tensors that the model does not have, with the reason. Names that do not exist are ignored."""
        for name in names:
            if self.remaining.pop(name, None) is not None:
                self.skipped[name] = reason

    def depth(self, blocks: str) -> int:
        """Number of blocks, which are numbered from 0 after a prefix such as `"visual.trunk.blocks."`."""
        numbers = {int(name[len(blocks) :].split(".")[0]) for name in self.remaining if name.startswith(blocks)}
        return max(numbers, default=-1) + 1

    def blocks(self, old: str, new: str, qkv: str, layers: Sequence[str], bias: bool = True) -> None:
        """
        Rename the blocks of a tower to those of CLIP and SigLIP in transformers.

        Args:
            old, new: prefixes of the blocks' numbers.
            qkv: old name of queries, keys and values, before `weight` and `bias`.
            layers: old names of the output projection, the two norms and the two layers of the MLP.
            bias: whether queries, keys and values have biases; those of transformers are zero if not.
        """
        for i in range(self.depth(old)):
            projections = [f"{new}{i}.self_attn.{name}_proj." for name in "qkv"]
            for part in ("weight", "bias") if bias else ("weight",):
                self.split(f"{old}{i}.{qkv}{part}", [f"{name}{part}" for name in projections])
            for name in () if bias else projections:
                if (weight := self.renamed.get(f"{name}weight")) is not None:
                    self.renamed[f"{name}bias"] = torch.zeros(len(weight))
            for name, new_name in zip(layers, BLOCK, strict=True):
                self.linear(f"{old}{i}.{name}", f"{new}{i}.{new_name}")
