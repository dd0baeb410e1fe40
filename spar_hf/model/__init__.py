"""What travels with a checkpoint: configurations, models, processors, prompts, segmentation and the pipeline."""

from importlib import import_module
from pathlib import Path
from typing import Any


def __getattr__(name: str) -> Any:
    if not (Path(__file__).parent / f"{name}.py").is_file() or name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)
