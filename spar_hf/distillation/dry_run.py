"""The table of `distill --dry_run`: every option, its default, and what is published."""

import os
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spar_hf.distillation.options import DistillationOptions
from spar_hf.distillation.presets import PUBLISHED_PRESETS

# What the published training does and no option says.
PUBLISHED_PROCESSES = 2
KEPT = (
    "The student with the smallest held-out error is kept, and --holdout_every holds images out to measure it. Published: "
    "that with the smallest training loss; no image is held out."
)


# Options of views, windows, weights and optimisation of which nothing is published, or which do not change what is learned.
UNPUBLISHED = {
    "model",
    "long_side_windows",
    "short_side_windows",
    "window_batch_size",
    "teacher_mode",
    "teacher_variant",
}
UNPUBLISHED |= {"teacher_cache", "lora_alpha", "merge", "save_dtype", "steps", "words_weight", "words_balance", "seed"}
UNPUBLISHED |= {"gradient_accumulation_steps"}  # as many as devices ask for, see `show_options`


def published_values(preset: str | None) -> dict[str, Any]:
    """Options as published: those of a published preset, by default `spar`, and what it leaves out is off."""
    name = preset if preset in PUBLISHED_PRESETS else "spar"
    options = DistillationOptions.from_flat(model="", images=[""], output="", preset=name)
    parts = (options.views, options.teacher, options.student, options.optimisation)
    values = {"shuffle": options.images.shuffle} | {key: value for part in parts for key, value in asdict(part).items()}
    values["stride"] = options.flat["stride"]
    return {key: value for key, value in values.items() if key not in UNPUBLISHED}


def option_rows(options: DistillationOptions) -> list[tuple[str, Any, Any, Any]]:
    """
    Name, value, default and published value of every option, in the order of `--help`. The published value is that of
    the chosen preset, or of `spar`; `...` where nothing is published. Required options have the default `None`.

    Example:

    ```python
    >>> options = DistillationOptions.from_flat(model="base", images=["images"], output="run", preset="spar-all", stride=32)
    >>> [row for row in option_rows(options) if row[0] in ("stride", "workers")]
    [('workers', 1, 1, Ellipsis), ('stride', 32, 24, 24)]
    ```"""
    given, published = options.flat, published_values(options.run.preset)
    bare = {"model": given["model"], "images": given["images"], "output": given["output"]}
    default = DistillationOptions.from_flat(**bare).flat | dict.fromkeys(bare)
    return [(key, value, default[key], published.get(key, ...)) for key, value in given.items() if key != "dry_run"]


def window_rule(options: DistillationOptions) -> str:
    """Which windows the teacher has, for every family of backbones."""
    if options.teacher.window_size is not None:
        return f"{options.teacher.window_size} px for every model."
    without = options.teacher.rope_window_size
    rope = "its image_size" if without is None else f"{without} px"
    published = "SigLIP2 512 px, OpenCLIP 224 px in the paper"
    return f"the model's image_size ({published}); without a position table (DINOv3.txt) {rope}."


def show_options(options: DistillationOptions, console: Console) -> None:
    """Print all options, marked where they are not the published ones, the windows, and what no option can say."""
    title = f"Options of distill, preset {options.run.preset or 'none'}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("option", "value", "default", "published"):
        table.add_column(heading, overflow="fold")
    for name, value, default, published in option_rows(options):
        differs = published is not ... and value != published
        shown = ["" if entry is None else str(entry) for entry in (value, default)]
        known = "" if published is ... else "none" if published is None else str(published)
        table.add_row(f"{name} *" if differs else name, *shown, known)
    console.print(table)
    console.print("* not as published")
    console.print(f"Windows: {window_rule(options)}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    images = processes * options.optimisation.gradient_accumulation_steps
    console.print(
        f"Images per step: {images}, of {processes} processes. Published: {PUBLISHED_PROCESSES}, one on each of two "
        "devices; on one device --gradient_accumulation_steps 2 is the same."
    )
    console.print(KEPT)
