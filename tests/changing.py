"""Changes to files that a run reads."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def change_weights(folder: Path, part: str = "") -> None:
    """Add something to the first weight of a saved model whose name holds `part`."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    name = next(name for name, tensor in sorted(weights.items()) if part in name and tensor.is_floating_point())
    weights[name] = weights[name] + 0.01
    save_file(weights, file, metadata=metadata)
