"""
Speed as ratios, measured side by side in one run: what the library adds to the bare work.

Both sides of a ratio run in turn, A B A B ..., and the median of the pairwise ratios is reported, so that a machine whose
speed drifts does not decide the result.

    python training/benchmark.py --output benchmark.json
"""

import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, HfArgumentParser

from spar_hf import SPAR_TINY, SlidingWindowTeacher, SparVisionModel

logger = logging.getLogger("benchmark")


@dataclass
class Options:
    """Options of the benchmark."""

    model: str = field(
        default=SPAR_TINY, metadata={"help": "SPAR folder or hub id; the embedded spar-tiny by default."}
    )
    height: int = field(default=384, metadata={"help": "Height of the test image in pixels."})
    width: int = field(default=512, metadata={"help": "Width of the test image in pixels."})
    stride: int = field(default=24, metadata={"help": "Stride of the teacher."})
    window_batch_size: int = field(default=16, metadata={"help": "Windows per forward pass of the teacher."})
    repeats: int = field(default=9, metadata={"help": "Pairs per ratio; the median is reported."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Device."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, ours: Callable, bare: Callable, goal: str, options: Options) -> dict:
    """Median of the pairwise ratios of `ours` over `bare`, with the range of the middle half."""
    ours(), bare()
    pairs = []
    for _ in tqdm(range(options.repeats), desc=name, leave=False):
        pairs.append((seconds(ours, options.device), seconds(bare, options.device)))
    ratios = sorted(a / b for a, b in pairs)
    quarter = len(ratios) // 4
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "middle_half": [ratios[quarter], ratios[-1 - quarter]],
        "seconds": statistics.median(a for a, _ in pairs),
        "bare_seconds": statistics.median(b for _, b in pairs),
        "goal": goal,
    }


def plain_pass(model: SparVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """The backbone's layers and the read-out in plain torch; positions resampled once, before, as a lower bound."""
    backbone = model.backbone
    patches = F.conv2d(
        pixel_values,
        backbone.embeddings.patch_embedding.weight,
        backbone.embeddings.patch_embedding.bias,
        stride=model.config.patch_size,
    )
    table = backbone.embeddings.position_embedding.weight
    side = int(table.shape[0] ** 0.5)
    positions = F.interpolate(table.T.view(1, -1, side, side), size=patches.shape[-2:], mode="bicubic")
    hidden = (patches + positions).flatten(2).transpose(1, 2)
    for layer in backbone.encoder.layers:
        hidden = layer(hidden, None)
    hidden = backbone.post_layernorm(hidden)
    head = backbone.head
    weight, bias = head.attention.in_proj_weight.chunk(3)[2], head.attention.in_proj_bias.chunk(3)[2]
    values = head.attention.out_proj(F.linear(hidden, weight, bias))
    return values + head.mlp(head.layernorm(values))


def run(options: Options) -> list[dict]:
    """All ratios; see the names in the table."""
    device = options.device
    model = AutoModel.from_pretrained(options.model).to(device).eval()
    torch.manual_seed(0)
    image = torch.randn(1, 3, options.height, options.width, device=device)
    teacher = SlidingWindowTeacher(model, stride=options.stride, window_batch_size=options.window_batch_size)
    plan = teacher.plan(options.height, options.width)
    windows = torch.randn(options.window_batch_size, 3, *plan.window, device=device)

    def bare_windows():
        done = 0
        while done < len(plan):
            model(windows[: min(options.window_batch_size, len(plan) - done)])
            done += options.window_batch_size

    size = f"{options.height}×{options.width}"
    with torch.no_grad():
        return [
            compare(
                f"one pass over backbone layers + plain read-out, {size}",
                lambda: model(image),
                lambda: plain_pass(model, image),
                "≤ 1.03",
                options,
            ),
            compare(
                f"teacher over its {len(plan)} bare windows, stride {options.stride}, {size}",
                lambda: teacher(image),
                bare_windows,
                "≤ 1.10",
                options,
            ),
            compare(
                f"teacher at stride {options.stride} over one pass, {size}",
                lambda: teacher(image),
                lambda: model(image),
                "≥ 15",
                options,
            ),
        ]


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    rows = run(options)
    table = Table("what", "ratio", "middle half", "seconds", "bare", "goal")
    for row in rows:
        low, high = row["middle_half"]
        numbers = (
            f"{row['ratio']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['seconds']:.3f}",
            f"{row['bare_seconds']:.3f}",
        )
        table.add_row(row["name"], *numbers, row["goal"])
    Console().print(table)
    if options.output:
        setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
        path = Path(options.output)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(json.dumps({"options": vars(options), **setting, "ratios": rows}, indent=2))
        temporary.replace(path)


if __name__ == "__main__":
    main()
