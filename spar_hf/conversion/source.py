"""A checkpoint in its original naming: read without unpickling code, every tensor used once or named with a reason."""

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# what wrappers, Lightning and data parallelism put before a model's own names
PREFIXES = ("segmentor.net.", "module.", "model.")
FORMATS = "A checkpoint is a .safetensors file, or a .ckpt, .pt, .pth or .bin file of tensors alone."
TORCH_STARTS = (b"PK\x03\x04", b"\x80")  # of what torch.save writes: a zip archive, in old versions a pickle


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a `.safetensors`, `.pt`, `.pth`, `.bin` or Lightning `.ckpt` file, on the CPU, wrapper prefixes taken off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds Python objects besides tensors (never unpickled), is damaged, is no checkpoint, or holds
            no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file. {FORMATS}")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of a file that it then refuses
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, EOFError, SafetensorError and whatever else random bytes lead to
        raise ValueError(f"{path} {what_is_wrong(path, error)}") from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, no state dict. Save the model's `state_dict` alone."
        )
    other = sorted(str(name) for name, value in content.items() if not isinstance(value, torch.Tensor))
    if other or not content:
        raise ValueError(
            f"{path} is no state dict of tensors; it also holds {other[:5]}. Save the model's `state_dict` alone."
        )
    tensors = dict(content)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors


def what_is_wrong(path: Path, error: Exception) -> str:
    """Why a file cannot be read. Not in torch's words, which advise to run the code in it."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "is empty (0 bytes). Copy or download it again."
    if path.suffix == ".safetensors":
        return f"is no whole safetensors file ({error}). Copy or download it again."
    if not start.startswith(TORCH_STARTS):
        return f"is no checkpoint. {FORMATS}"
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"holds Python objects{f' ({named[1]})' if named else ''} besides tensors, and code in a checkpoint is never "
            "run. Save the model's `state_dict` alone where the checkpoint was made."
        )
    return f"is damaged or cut short. Copy or download it again. {FORMATS}"


class Source:
    """
    Tensors of a checkpoint that are taken one by one.

    Attributes:
        target: what was taken, by its new name, in float32.
        skipped: names that have no place, with the reason.
        absent: names that were asked for and are not there.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.left = dict(tensors)
        self.target: dict[str, torch.Tensor] = {}
        self.skipped: dict[str, str] = {}
        self.absent: list[str] = []

    def take(self, name: str) -> torch.Tensor | None:
        """A tensor that is then used up, in float32; `None`, and noted, if it is not there."""
        if name not in self.left:
            self.absent.append(name)
            return None
        return self.left.pop(name).float()

    def move(self, name: str, new_name: str, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        tensor = self.take(name)
        if tensor is not None:
            self.target[new_name] = (tensor if change is None else change(tensor)).contiguous()

    def scalar(self, name: str) -> None:
        """A trained scale or bias, `()` or `(1,)`; any other shape is left to be reported."""
        self.move(name, name, lambda t: t.reshape(1) if t.numel() == 1 else t)

    def linear(self, name: str, new_name: str, bias: bool = True) -> None:
        """Weight and bias of a linear layer, a convolution or a norm."""
        for part in ("weight", "bias") if bias else ("weight",):
            self.move(f"{name}.{part}", f"{new_name}.{part}")

    def split(self, name: str, new_names: list[str]) -> None:
        """A tensor whose rows are several layers one below the other (query, key, value)."""
        tensor = self.take(name)
        if tensor is not None:
            for new_name, part in zip(new_names, tensor.chunk(len(new_names)), strict=True):
                self.target[new_name] = part.contiguous()

    def skip(self, reason: str, *names: str) -> None:
        """Name tensors, where they are there, that have no place, and why."""
        for name in names:
            if self.left.pop(name, None) is not None:
                self.skipped[name] = reason

    def depth(self, blocks: str) -> int:
        """Number of blocks numbered from 0 below `blocks`, e.g. `"visual.trunk.blocks."`."""
        numbers = {int(name[len(blocks) :].split(".")[0]) for name in self.left if name.startswith(blocks)}
        return max(numbers, default=-1) + 1

    def open_clip_blocks(self, old: str, new: str) -> None:
        """The blocks of a transformer of open_clip, vision or text, to those of transformers' CLIP and SigLIP."""
        for i in range(self.depth(old)):
            before, after = f"{old}{i}.", f"{new}{i}."
            for part in ("weight", "bias"):
                self.split(f"{before}attn.in_proj_{part}", [f"{after}self_attn.{name}_proj.{part}" for name in "qkv"])
            self.linear(f"{before}attn.out_proj", f"{after}self_attn.out_proj")
            self.linear(f"{before}ln_1", f"{after}layer_norm1")
            self.linear(f"{before}ln_2", f"{after}layer_norm2")
            self.linear(f"{before}mlp.c_fc", f"{after}mlp.fc1")
            self.linear(f"{before}mlp.c_proj", f"{after}mlp.fc2")
