"""Presets of a distillation: the published recipes to the letter, and this library's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spar_hf.utils.errors import UsageError
from spar_hf.utils.texts import read_yaml

# SPAR (arXiv 2604.02252, section 4) and its code: one set of images for all families, AdamW at a constant rate, no clipping.
PUBLISHED: dict[str, Any] = {
    "epochs": 10,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "max_grad_norm": 0.0,
    "weight_decay": 1e-4,
    "mixed_precision": "fp16",
    "shuffle": False,
    "rope_window_size": 384,
    "long_side_pixels": 2048,
    "short_side_pixels": 1024,
    "min_side_pixels": 512,
    "min_scale": 0.5,
    "resample": "bilinear",
    "fixed_views": True,
    "crop_probability": 0.5,
    "flip_probability": 0.5,
}
# What is better or cheaper, with the reason for each beside it; docs/benchmarks.md has the figures.
OWN: dict[str, Any] = {
    "epochs": 10,
    "learning_rate": 2e-5,
    "weight_decay": 1e-4,
    "rope_window_size": 384,
    "train_layers": "all",
    # an unbiased estimate of the target: a tenth of spar-tiny's windows gives 96 % of the gain of all
    "teacher_windows": 10,
    # the windows saved buy a second image a step, whose gradient is less noisy
    "gradient_accumulation_steps": 2,
    # sizes follow the window, so that every family sees the scales it is run at; each epoch sees new views
    "long_side_windows": 4.0,
    "short_side_windows": 2.0,
    "min_scale": 0.5,
    "crop_probability": 0.5,
    "flip_probability": 0.5,
}
PUBLISHED_PRESETS: dict[str, dict[str, Any]] = {
    "spar": PUBLISHED | {"train_layers": "2"},
    "spar-all": PUBLISHED | {"train_layers": "all"},
    "spar-all-hires": PUBLISHED
    | {"train_layers": "all", "long_side_pixels": 2560, "short_side_pixels": 2560, "min_scale": 0.2},
}
PRESETS: dict[str, dict[str, Any]] = PUBLISHED_PRESETS | {
    "spar-hf": OWN,
    # for SigLIP and SigLIP2: attention that starts near each patch is closer to the windows before any training
    "spar-hf-siglip": OWN | {"local_start": 0.3, "position_extent": 1024},
}
HELP_PRESET = (
    f"Recipe by name ({', '.join(PRESETS)}). spar is the published one to the letter, for the last two blocks; "
    "spar-all trains all weights, spar-all-hires also on larger images. spar-hf is this library's own, spar-hf-siglip "
    "the same with a local start. Options given beside it take precedence; --dry_run of distill shows what results."
)
# What these names meant in earlier versions: a run that was begun with one of them goes on with it.
_BEFORE: dict[str, Any] = {
    "epochs": 10,
    "learning_rate": 2e-5,
    "weight_decay": 1e-4,
    "stride": 24,
    "long_side_windows": 4.0,
    "short_side_windows": 2.0,
    "min_scale": 0.5,
    "crop_probability": 0.5,
    "flip_probability": 0.5,
}
EARLIER_PRESETS: dict[str, dict[str, Any]] = {
    "spar": _BEFORE | {"train_layers": "2"},
    "spar-all": _BEFORE | {"train_layers": "all"},
    "spar-all-hires": _BEFORE | {"train_layers": "all", "long_side_windows": 5.0, "short_side_windows": 2.5},
}
# Options that runs of earlier versions did not have, with what those runs did. What is off by default needs no entry.
LATER: dict[str, Any] = {"max_grad_norm": 1.0, "shuffle": True, "resample": "bicubic"}
# A recipe or checkpoint with all of these was written by a run, which states every option.
MARKS = {"learning_rate", "lr_scheduler_type", "holdout_images", "log_steps", "seed", "stride", "train_layers"}


# What of a preset an option replaces that is given beside it.
IN_PIXELS = ("long_side_pixels", "short_side_pixels", "min_side_pixels")
REPLACES = {"steps": ("epochs",), "long_side_windows": IN_PIXELS, "short_side_windows": IN_PIXELS}


def states_every_option(values: Mapping[str, Any]) -> bool:
    """Whether options are those that a run wrote, all of them, and not a choice by hand."""
    return values.keys() >= MARKS


def with_later_options(values: dict[str, Any]) -> dict[str, Any]:
    """
    Options that a run wrote, completed by what it did where options came later; others unchanged.

    Example:

    ```python
    >>> with_later_options({"preset": "spar", "seed": 3})
    {'preset': 'spar', 'seed': 3}
    >>> with_later_options(dict.fromkeys(MARKS))["max_grad_norm"]
    1.0
    ```"""
    return LATER | values if states_every_option(values) else values


def with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """
    Options with those that their preset fills in. `steps` replaces the preset's `epochs`, sizes in windows those in
    pixels, and a `teacher_mode` that draws no windows their number. A recipe that a run wrote is complete and is left
    as it is. A run that is resumed keeps the preset that it was begun with.

    Raises:
        UsageError: no preset of this name.
    """
    name = values.get("preset")
    if name is None or states_every_option(values):
        return values
    if name not in PRESETS:
        raise UsageError(f"--preset {name}: use one of {', '.join(PRESETS)}.")
    begun_before = values.get("resume") and name in EARLIER_PRESETS and _is_earlier(Path(values.get("output") or ""))
    preset = dict((EARLIER_PRESETS if begun_before else PRESETS)[name])
    replaced = {name for given, names in REPLACES.items() if values.get(given) is not None for name in names}
    if values.get("teacher_mode") in ("full", "cached"):
        replaced.add("teacher_windows")
    return {name: value for name, value in preset.items() if name not in replaced} | values


def _is_earlier(output: Path) -> bool:
    """Whether the run in a folder was begun before the presets were the published recipe to the letter."""
    path = output / "recipe.yaml"
    if not path.is_file():
        return False
    recipe = read_yaml(path)
    return isinstance(recipe, dict) and states_every_option(recipe) and not recipe.keys() >= LATER.keys()
