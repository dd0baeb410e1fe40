"""
Speed as ratios, measured side by side in one run: what the library adds to the bare work.

Both sides of a ratio run in turn, A B A B ..., and the median of the pairwise ratios is reported, so that a machine whose
speed drifts does not decide the result.

    python training/studies/benchmark.py --output benchmark.json
    python training/studies/benchmark.py --random siglip2 --height 512 --width 1024 --repeats 3
    python training/studies/benchmark.py --random siglip2 --stride 48 --teacher_dtype bf16 --teacher_compile
    python training/studies/benchmark.py --suite distill
    python training/studies/benchmark.py --suite deploy --camvid DATA/camvid/val --output deploy.json

A suite is a module `benchmark_NAME.py` beside this file: with a `main(args)` of its own and its own options, or with
`rows(options) -> list[dict]`, made with [`compare`].
"""

import argparse
import importlib
import logging
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, DINOv3ViTConfig, SiglipVisionConfig

from spar_hf import SPAR_TINY, SlidingWindowTeacher, SparConfig, SparVisionModel
from spar_hf.distillation.options import TEACHER_DTYPES
from spar_hf.utils.atomic import write_json
from spar_hf.utils.checkpoints import check_replaceable
from spar_hf.utils.devices import clock
from spar_hf.utils.errors import UsageError, as_usage_errors, run_command
from spar_hf.utils.fields import option
from spar_hf.utils.options import HELP, parse_dataclasses, require_one_of, require_positive

logger = logging.getLogger("benchmark")

UNITS = {"seconds": "s", "megabytes": "MB", "images_per_second": "images/s"}  # what a row may compare


@dataclass
class SuiteOptions:
    """Options of every suite."""

    suite: str = option("vision", "What to measure: vision, or the NAME of a benchmark_NAME.py.")
    repeats: int = option(9, "Pairs per ratio; the median is reported.")
    row_seconds: float | None = option(None, "Start no further pair of a ratio after so many seconds.")
    output: str | None = option(None, "JSON file to write.")
    overwrite: bool = option(False, HELP["overwrite"])

    def __post_init__(self):
        require_positive(self, "repeats")
        check_replaceable([Path(self.output)] if self.output else [], self.overwrite)


@dataclass
class Options(SuiteOptions):
    """Options of the suites vision and distill; the others have more."""

    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "Device.")
    model: str = option(SPAR_TINY, "SPAR folder or hub id; the embedded spar-tiny by default.")
    random: str | None = option(
        None, "Random weights of a published size instead: siglip2 (B/16-512), openclip (B/16), dinov3txt (L/16), tiny."
    )
    height: int = option(384, "Height of the test image in pixels.")
    width: int = option(512, "Width of the test image in pixels.")
    stride: int = option(24, "Stride of the teacher.")
    window_batch_size: int = option(16, "Windows per forward pass of the teacher.")
    teacher_dtype: str | None = option(None, f"Precision of the teacher: {', '.join(TEACHER_DTYPES)}.")
    teacher_compile: bool = option(False, "Compile the teacher's encoder.")

    def __post_init__(self):
        super().__post_init__()
        require_one_of(self, "teacher_dtype", TEACHER_DTYPES)


def seconds(work: Callable[[], object], device: str) -> float:
    """Time that the device takes for the work."""
    start = clock(device)
    work()
    return clock(device) - start


def compare(name: str, ours: Callable, bare: Callable, goal: str, options: Options) -> dict:
    """Median of the pairwise ratios of `ours` over `bare`, with the range of the middle half."""
    ours(), bare()
    start, pairs = clock(options.device), []
    for _ in tqdm(range(options.repeats), desc=name, leave=False):
        pairs.append((seconds(ours, options.device), seconds(bare, options.device)))
        if options.row_seconds is not None and clock(options.device) - start > options.row_seconds:
            break
    return ratio_row(name, "seconds", pairs, goal)


def ratio_row(name: str, unit: str, pairs: list[tuple[float, float]], goal: str) -> dict[str, Any]:
    """A row of the table, from pairs of an amount of ours and of the bare work; `unit` is a key of `UNITS`."""
    ratios = sorted(a / b for a, b in pairs)
    quarter = len(ratios) // 4
    ours, bare = zip(*pairs, strict=True)
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "middle_half": [ratios[quarter], ratios[-1 - quarter]],
        unit: statistics.median(ours),
        f"bare_{unit}": statistics.median(bare),
        "goal": goal,
    }


BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def load(options: Options) -> SparVisionModel:
    """The model to time: a folder's, or one of a published size with random weights."""
    if options.random is None:
        with as_usage_errors():
            return SparVisionModel.from_backbone(options.model)
    backbones = {
        "siglip2": lambda: SiglipVisionConfig(**BASE, patch_size=16, image_size=512, hidden_act="gelu"),
        "openclip": lambda: CLIPVisionConfig(
            **BASE, patch_size=16, image_size=224, projection_dim=512, hidden_act="gelu"
        ),
        "dinov3txt": lambda: DINOv3ViTConfig(**LARGE, patch_size=16, image_size=384, num_register_tokens=4),
        "tiny": lambda: SiglipVisionConfig(**TINY, patch_size=16, image_size=64, hidden_act="gelu"),  # for rehearsals
    }
    if options.random not in backbones:
        raise UsageError(f"--random {options.random}: use one of {', '.join(backbones)}.")
    return SparVisionModel(SparConfig(backbone_config=backbones[options.random]()))


PLAIN = ("siglip", "maskclip", "dinov3", "dinov3txt")  # read-outs whose layers are called below one by one


def plain_pass(model: SparVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    The backbone's layers and the same read-out without the library's forward: the least that one pass costs. The references
    of the conversion read the names of official checkpoints, which a loaded model has no more.
    """
    backbone, readout = model.backbone, model.config.readout
    if readout not in PLAIN:
        raise UsageError(
            f"--model: the plain side of the comparison is written for the read-outs {', '.join(PLAIN)}, and not for "
            f"{readout}; choose another model."
        )
    if readout.startswith("dinov3"):
        tokens, rope = backbone.embeddings(pixel_values), backbone.rope_embeddings(pixel_values)
        for layer in backbone.model.layer:
            tokens = layer(tokens, position_embeddings=rope)
        return backbone.norm(tokens)[:, 1 + backbone.config.num_register_tokens :]
    patches = backbone.embeddings.patch_embedding(pixel_values)
    grid, hidden = patches.shape[-2:], patches.flatten(2).transpose(1, 2)
    if readout == "siglip":
        table = backbone.embeddings.position_embedding.weight
        side = math.isqrt(len(table))
        positions = F.interpolate(table.T.reshape(1, -1, side, side), size=grid, mode="bicubic")
        hidden = hidden + positions.flatten(2).transpose(1, 2)
        for layer in backbone.encoder.layers:
            hidden = layer(hidden, None)
        hidden, head = backbone.post_layernorm(hidden), backbone.head
        weight, bias = head.attention.in_proj_weight.chunk(3)[2], head.attention.in_proj_bias.chunk(3)[2]
        values = head.attention.out_proj(F.linear(hidden, weight, bias))
        return values + head.mlp(head.layernorm(values))
    embeddings, table = backbone.embeddings, backbone.embeddings.position_embedding.weight
    side = math.isqrt(len(table) - 1)
    factor = tuple((length + 0.1) / side for length in grid)
    positions = F.interpolate(table[1:].T.reshape(1, -1, side, side), scale_factor=factor, mode="bicubic")
    hidden = hidden + positions.flatten(2).transpose(1, 2)
    first = (embeddings.class_embedding + table[0]).expand(len(hidden), 1, -1)
    hidden = backbone.pre_layrnorm(torch.cat([first, hidden], 1))
    for layer in backbone.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    last = backbone.encoder.layers[-1]
    hidden = hidden + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(hidden)))
    hidden = hidden + last.mlp(last.layer_norm2(hidden))
    return backbone.visual_projection(backbone.post_layernorm(hidden)[:, 1:])


def open_suite(name: str) -> ModuleType | None:
    """
    The module of a suite; `None` for that of this file.

    Raises:
        UsageError: there is no such suite.
    """
    known = sorted(path.stem.removeprefix("benchmark_") for path in Path(__file__).parent.glob("benchmark_*.py"))
    if name not in ("vision", *known):
        raise UsageError(f"--suite {name}: use vision or one of {', '.join(known)}.")
    return None if name == "vision" else importlib.import_module(f"benchmark_{name}")


def rows(options: Options) -> list[dict]:
    """One pass and the teacher against their bare work."""
    torch.manual_seed(0)
    return vision_rows(load(options).to(options.device).eval(), options)


@torch.no_grad()
def vision_rows(model: SparVisionModel, options: Options) -> list[dict]:
    """
    One pass over the bare layers, the teacher over its bare windows, and the teacher over one pass. A teacher of another
    precision is compared with the plain one: the relative error of its features, of all together.
    """
    image = torch.randn(1, 3, options.height, options.width, device=options.device, dtype=model.dtype)
    plain = SlidingWindowTeacher(model, stride=options.stride, window_batch_size=options.window_batch_size)
    teacher, agreement = plain, {}
    if options.teacher_dtype or options.teacher_compile:
        teacher = plain.sped_up(TEACHER_DTYPES.get(options.teacher_dtype), options.teacher_compile)
        target = plain(image).feature_map
        agreement["relative_error"] = float((teacher(image).feature_map - target).norm() / target.norm())
    plan = teacher.plan(options.height, options.width)
    windows = torch.randn(options.window_batch_size, 3, *plan.window, device=options.device, dtype=model.dtype)

    def bare_windows():
        done = 0
        while done < len(plan):
            model(windows[: min(options.window_batch_size, len(plan) - done)])
            done += options.window_batch_size

    size = f"{options.height}×{options.width}"
    features = model(image).feature_map.flatten(2).transpose(1, 2)  # (1, dim, h, w) -> (1, h * w, dim)
    difference = float((plain_pass(model, image) - features).abs().max())  # both sides must compute the same
    return [
        {"difference": difference}
        | compare(
            f"one pass over backbone layers + plain read-out, {size}",
            lambda: model(image),
            lambda: plain_pass(model, image),
            "≤ 1.03",
            options,
        ),
        agreement
        | compare(
            f"teacher over its {len(plan)} bare windows, stride {options.stride}, {size}",
            lambda: teacher(image),
            bare_windows,
            "≤ 0.55" if agreement else "≤ 1.10",
            options,
        ),
        compare(
            f"teacher at stride {options.stride} over one pass, {size}",
            lambda: teacher(image),
            lambda: model(image),
            "≥ 15" if options.random is None else "52 in the paper (mean of six sets)",
            options,
        ),
    ]


def ratio_cells(row: dict) -> list[str]:
    """Cells of a row from [`ratio_row`]: name, ratio, its middle half, both amounts."""
    low, high = row["middle_half"]
    unit = next(unit for unit in UNITS if unit in row)
    amounts = (f"{row[name]:.3f} {UNITS[unit]}" for name in (unit, f"bare_{unit}"))
    return [row["name"], f"{row['ratio']:.3f}", f"{low:.3f}-{high:.3f}", *amounts]


def setting() -> dict[str, Any]:
    """What a measurement depends on beside its options."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def main(args: list[str] | None = None) -> list[dict]:
    """Parse options, measure, and print the table; return its rows."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--suite", default="vision")
    suite = open_suite(parser.parse_known_args(args)[0].suite)
    if suite is not None and hasattr(suite, "main"):
        return suite.main(args)
    (options,) = parse_dataclasses([Options], args, __doc__)
    found = (rows if suite is None else suite.rows)(options)
    table = Table("what", "ratio", "middle half", "ours", "bare", "goal")
    for row in found:
        table.add_row(*ratio_cells(row), row["goal"])
    Console().print(table)
    if options.output:
        write_json(Path(options.output), {"options": vars(options), **setting(), "ratios": found})
    return found


if __name__ == "__main__":
    run_command(main)
