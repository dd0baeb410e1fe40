"""
Suite `gpu` of `benchmark.py`: what one card does with a ViT-B/16 of random weights in SigLIP2's shape, in at most eight
minutes and without a download.

    python training/studies/benchmark.py --suite gpu --output gpu.json
    python training/studies/benchmark.py --suite gpu --device cpu --tiny

Ratios are medians of pairs in turn: the sliding-window teacher over one pass, over its bare windows and over the published
loop, which runs one window at a time; one pass over its bare layers; the pipeline over the forward; decisions of 150 and
1,000 classes over the plain formula; `torch.compile` over eager; a training step over its bare parts. Half precision is
compared with float32, and peak memory is measured. Writes a table (Markdown) beside the JSON file, after each row. What does
not fit into the time or the memory is said in its place.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark import Options, SuiteOptions, compare, load, ratio_cells, seconds, setting, vision_rows
from benchmark_deploy import DeployOptions, open_subject
from benchmark_distill import step_rows
from benchmark_masks import MaskOptions, against_the_plain_formula, make_pipeline, noise, peak_mib, realistic_logits
from rich.console import Console
from rich.markdown import Markdown
from torch.nn import functional as F

from demo import PRESETS
from spar_hf import SlidingWindowTeacher
from spar_hf.model.prompts import Vocabulary
from spar_hf.utils.atomic import write_json, write_text
from spar_hf.utils.errors import run_command
from spar_hf.utils.fields import option
from spar_hf.utils.labels import parse_labels
from spar_hf.utils.options import parse_dataclasses, require_one_of, require_positive

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class GpuOptions(SuiteOptions):
    """Options of the suite."""

    repeats: int = option(7, "Pairs per ratio; the median is reported.")
    row_seconds: float | None = option(15, "Start no further pair of a ratio after so many seconds.")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "Device.")
    dtype: str = option("bfloat16", f"Precision of the model where rows name no other: {', '.join(PRECISIONS)}.")
    minutes: float = option(8, "Start no further row after so many minutes.")
    stride: int = option(24, "Stride of the teacher.")
    window_batch_size: int = option(16, "Windows per forward pass of the teacher.")
    tiny: bool = option(False, "Rehearse with a model of two small layers and small images.")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "minutes", "stride", "window_batch_size")
        require_one_of(self, "dtype", PRECISIONS)

    @property
    def usual(self) -> tuple[int, int]:
        """Size of an image of most data sets, whose shorter side is 672."""
        return (80, 112) if self.tiny else (672, 896)

    @property
    def large(self) -> tuple[int, int]:
        """Size of an image of Cityscapes."""
        return (96, 160) if self.tiny else (1024, 2048)

    def at(self, size: tuple[int, int]) -> Options:
        """Options of the other suites, for one size."""
        shared = {name: getattr(self, name) for name in ("repeats", "row_seconds", "device", "stride")}
        model = "tiny" if self.tiny else "siglip2"
        batch = self.window_batch_size
        return Options(random=model, height=size[0], width=size[1], window_batch_size=batch, **shared)


class Card:
    """
    The card, and what all rows use.

    Attributes:
        options: of the suite.
        model: the vision tower, in the precision of `--dtype`.
    """

    def __init__(self, options: GpuOptions):
        torch.manual_seed(0)
        self.options = options
        self.model = load(options.at(options.usual)).to(options.device, PRECISIONS[options.dtype]).eval()

    def image(self, size: tuple[int, int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A normalised image `(1, 3, height, width)`."""
        return torch.randn(1, 3, *size, device=self.options.device, dtype=dtype or self.model.dtype)


def one_window_at_a_time(teacher: SlidingWindowTeacher, image: torch.Tensor) -> torch.Tensor:
    """The sliding window as the published code runs it: a forward pass, an upsampling and a sum for every window."""
    plan = teacher.plan(*image.shape[-2:])
    height, width = plan.window
    sums = image.new_zeros(1, teacher.config.projection_dim, *plan.grid)
    counts = image.new_zeros(1, 1, *plan.grid)
    for row, column in plan.positions().tolist():
        top, left = row * plan.cell, column * plan.cell
        features = teacher.model(image[..., top : top + height, left : left + width]).feature_map
        features = F.interpolate(features, size=plan.cells, mode="bilinear")
        place = (..., slice(row, row + plan.cells[0]), slice(column, column + plan.cells[1]))
        sums[place] += features
        counts[place] += 1
    return F.interpolate(sums / counts, scale_factor=plan.cell / teacher.config.patch_size, mode="bilinear")


@torch.no_grad()
def published_loop(card: Card) -> list[dict]:
    """The published loop over the teacher of this library."""
    options, image = card.options, card.image(card.options.usual)
    teacher = SlidingWindowTeacher(card.model, stride=options.stride, window_batch_size=options.window_batch_size)
    name = f"published loop, one window at a time, over the teacher, {size_of(options.usual)}"
    loop = partial(one_window_at_a_time, teacher, image)
    cosine = torch.cosine_similarity(loop().float(), teacher(image).feature_map, dim=1).mean()
    return [{"cosine": float(cosine)} | compare(name, loop, lambda: teacher(image), "≥ 1.5", options)]


def large_teacher(card: Card) -> list[dict]:
    """The teacher over one pass on an image of Cityscapes, the last row of [`vision_rows`]."""
    options = card.options.at(card.options.large)
    image = card.image(card.options.large)
    teacher = SlidingWindowTeacher(card.model, stride=options.stride, window_batch_size=options.window_batch_size)
    name = f"teacher at stride {options.stride} over one pass, {size_of(card.options.large)}"
    with torch.no_grad():
        return [compare(name, lambda: teacher(image), lambda: card.model(image), "reported", options)]


@torch.no_grad()
def pipeline_rows(card: Card) -> list[dict]:
    """The pipeline over the forward: on the device alone, and from a decoded image to the label map."""
    options, size = card.options, card.options.large
    model = open_subject("spar-tiny", DeployOptions(tiny=True)).segment.model if options.tiny else None
    segment = make_pipeline(options, model)
    segment.model.to(PRECISIONS[options.dtype])
    picture, vocabulary = noise(*size), Vocabulary.parse("ade20k")
    prepared = segment.preprocess(picture)
    pixels = prepared["pixel_values"].to(options.device, PRECISIONS[options.dtype])
    forward = partial(segment.model.vision_model, pixels)

    def on_the_device() -> Any:
        return segment._forward(segment._encode([prepared])[0], vocabulary, "plain")

    whole = partial(segment, picture, candidate_labels=vocabulary, output="map")
    what = f"over its vision forward, 150 classes, {size_of(size)}"
    return [
        compare(f"pipeline on the device {what}", on_the_device, forward, "≤ 1.15", options),
        compare(f"pipeline from a decoded image to a label map {what}", whole, forward, "reported", options),
    ]


def decision_rows(card: Card) -> list[dict]:
    """Decisions of 150 and 1,000 classes over the plain formula, which is computed in strips for 1,000."""
    shared = {name: getattr(card.options, name) for name in ("repeats", "row_seconds", "device")}
    masks, rows = MaskOptions(**shared), []
    for names, strips in ((150, False), (1000, True)):
        size = [names, *card.options.large]
        logits = realistic_logits(*size, card.options.device) if strips else None
        form = "plain formula in strips" if strips else "plain formula"
        name = f"decision over {form}, {names} classes, {size_of(card.options.large)}"
        rows.append(against_the_plain_formula(size, masks, logits) | {"name": name})
    return rows


@torch.no_grad()
def compile_rows(card: Card) -> list[dict]:
    """`torch.compile` with dynamic sizes over eager; `first_seconds` is the first call of a size."""
    options, rows = card.options, []
    forward = torch.compile(card.model, fullgraph=True, dynamic=True, backend="eager" if options.tiny else "inductor")
    for size in (options.usual, options.large):
        image = card.image(size)
        found = {"first_seconds": seconds(partial(forward, image), options.device)}
        work = (partial(forward, image), partial(card.model, image))
        rows.append(found | compare(f"torch.compile over eager, {size_of(size)}", *work, "reported", options))
    return rows


@torch.no_grad()
def agreement_rows(card: Card) -> list[dict]:
    """Half precision against float32: cosine of features of random weights, equal labels of spar-tiny."""
    options = card.options
    subject = open_subject("spar-tiny", DeployOptions(tiny=options.tiny))
    vocabularies = (Vocabulary.parse(parse_labels(PRESETS["everyday"])), Vocabulary.parse("ade20k"))
    image, found = card.image(options.usual, torch.float32), {}
    exact_model = load(options.at(options.usual)).to(options.device).eval()
    for name, dtype in PRECISIONS.items():
        # a copy: `to` changes the weights in place, and those that were bfloat16 before would be measured as float16
        features = copy.deepcopy(exact_model).to(dtype)(image).feature_map.float()
        maps = []
        tower = copy.deepcopy(subject.vision).to(options.device, dtype)
        for pixels in subject.images:
            dense = tower(torch.from_numpy(pixels).to(options.device)).feature_map.float().cpu().numpy()
            working = pixels.shape[-2:]
            maps.append([subject.labels(dense, vocabulary, working, working) for vocabulary in vocabularies])
        found[name] = (features, maps)
    (exact, labels), rows = found.pop("float32"), []
    for name, (features, maps) in found.items():
        values: dict[str, Any] = {"cosine": float(torch.cosine_similarity(features, exact, dim=1).mean())}
        for number, vocabulary in enumerate(vocabularies):
            equal = [float((a[number] == b[number]).mean()) for a, b in zip(maps, labels, strict=True)]
            values[f"equal labels, {len(vocabulary.labels)} words"] = sum(equal) / len(equal)
        rows.append({"name": f"{name} against float32", "values": values, "goal": "reported"})
    return rows


def training_rows(card: Card) -> list[dict]:
    """A training step over its bare parts, and a sampled step over a full one."""
    found = step_rows(card.options.at(card.options.usual))
    return [{**row, "name": f"{row['name']}, float32"} for row in found]


def memory_rows(card: Card) -> list[dict]:
    """Peak memory beyond the weights."""
    options = card.options
    teacher = SlidingWindowTeacher(card.model, stride=options.stride, window_batch_size=options.window_batch_size)
    rows = []
    with torch.no_grad():
        for size in (options.usual, options.large):
            image = card.image(size)
            work = {"one pass": partial(card.model, image), "teacher": partial(teacher, image)}
            values = {f"{name}, MiB": peak_mib(run, options.device) for name, run in work.items()}
            rows.append(
                {"name": f"peak memory beyond the weights, {size_of(size)}", "values": values, "goal": "reported"}
            )
    return rows


PARTS: dict[str, Callable[[Card], list[dict]]] = {
    "one pass and the teacher": lambda card: vision_rows(card.model, card.options.at(card.options.usual)),
    "the published loop": published_loop,
    "the pipeline": pipeline_rows,
    "decisions": decision_rows,
    "agreement": agreement_rows,
    "peak memory": memory_rows,
    "a training step": training_rows,
    "torch.compile": compile_rows,
    "the teacher on a large image": large_teacher,
}


def rows(options: GpuOptions) -> Iterator[dict]:
    """All rows, one after another; a part that has no time or memory left gives one with `error`."""
    start, card = time.monotonic(), Card(options)
    for name, part in PARTS.items():
        if time.monotonic() - start > 60 * options.minutes:
            yield {"name": name, "error": f"no time left of --minutes {options.minutes:g}"}
            continue
        try:
            yield from part(card)
        except torch.OutOfMemoryError:
            yield {"name": name, "error": "out of memory"}
            torch.cuda.empty_cache()


def size_of(size: tuple[int, int]) -> str:
    """Height × width."""
    return "×".join(map(str, size))


def describe_card(options: GpuOptions) -> dict[str, Any]:
    """The card, and what the figures depend on beside the options."""
    found = {**setting(), "device": "CPU"}
    if torch.device(options.device).type == "cuda":
        card = torch.cuda.get_device_properties(torch.device(options.device))
        found |= {"device": card.name, "memory_gib": card.total_memory / 2**30, "cuda": torch.version.cuda}
    return found


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    machine, options = report["setting"], report["options"]
    lines = [" | ".join(["what", "ratio", "middle half", "ours", "bare", "goal"]), " | ".join(["---"] * 6)]
    for row in report["rows"]:
        if "ratio" in row:
            parts = [*ratio_cells(row), row["goal"]]
        else:
            said = row.get("error") or ", ".join(
                f"{name} {'not measured' if value is None else format(value, '.5g')}"
                for name, value in row["values"].items()
            )
            parts = [row["name"], said, "", "", "", row.get("goal", "")]
        lines.append(" | ".join(parts))
    where = f"{machine['device']}, {options['dtype']}, torch {machine['torch']}"
    model = (
        "a model of two small layers (rehearsal)" if options["tiny"] else "ViT-B/16, random weights, SigLIP2's shape"
    )
    return f"{where}; {model}.\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


def main(args: list[str] | None = None) -> dict[str, Any]:
    """The command: prints the table and returns what it writes."""
    (options,) = parse_dataclasses([GpuOptions], args, __doc__)
    report = {"options": asdict(options), "setting": describe_card(options), "rows": []}
    for row in rows(options):
        report["rows"].append(row)
        if options.output:
            write_json(Path(options.output), report)
            write_text(Path(options.output).with_suffix(".md"), table(report))
    Console().print(Markdown(table(report)))
    return report


if __name__ == "__main__":
    run_command(main)
