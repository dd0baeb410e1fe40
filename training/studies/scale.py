"""
Hours, cost and storage of features, masks and teacher maps of millions of images, and what limits the speed.

    python training/studies/scale.py --seconds_per_megapixel 0.01 --gpus 64 --price 3
    python training/studies/scale.py --check 200 2000 --output scale.json

Four stages work at the same time: images are read from a store, decoded and resized on CPU cores, go through the model on
GPUs, and results are written to the store. The slowest one gives the time. Cores and GPUs add up, the store is shared.
All rates are options: measure yours on some hundred images. The defaults are round numbers, not measurements.

`--check` measures the rates of this CPU on 100 small images, predicts the CPU seconds of `spar-hf features` and `spar-hf
segment` for other numbers of them, and runs both commands. Stages share one core there, so that their times add up. CPU
seconds of the whole process are compared: unlike the clock, they count nothing that other processes do.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from spar_hf.batch.extractor import FeatureExtractor, ImagePreparation
from spar_hf.batch.features import FileWriter, feature_work
from spar_hf.cli.frames import ImageReader, ReadWithPixels
from spar_hf.cli.pipelines import load_pipeline, segment_with_heat
from spar_hf.cli.result_files import write_results
from spar_hf.cli.result_record import ResultRecord
from spar_hf.utils.atomic import write_json
from spar_hf.utils.checkpoints import check_replaceable
from spar_hf.utils.errors import UsageError, run_command
from spar_hf.utils.fields import option
from spar_hf.utils.image_files import InputImage, find_images
from spar_hf.utils.labels import read_labels
from spar_hf.utils.options import HELP, parse_dataclasses
from spar_hf.windows import WindowPlan

STAGES = ("read", "decode", "compute", "write")
FEATURES, MASKS = "features", "masks"
PRODUCTS = (FEATURES, MASKS, "teacher, all windows", "teacher, sampled")
HALF = 2  # bytes of a number in float16 or bfloat16
LABELS = ["road", "car", "sky", "person", "building", "tree"]
CALIBRATION = 100  # images that rates are measured on
BATCH, MASKS_BATCH = 8, 4  # images that share a forward pass, as in the commands
SIDES, EDGE = (160, 120), 96  # of the images of a check, and the shorter side that the model sees, in pixels


@dataclass(kw_only=True)
class ScaleOptions:
    """Options of the study. Sizes are width and height in pixels."""

    images: list[int] = option([10**6, 10**8, 5 * 10**9], "Numbers of images.")
    source: list[int] = option([1600, 1200], "Size of the images: width and height in pixels.")
    source_kb: float = option(400.0, "Size of a file in kB.")
    working: list[int] = option([592, 448], "Size that the model sees: width and height in pixels.")
    patch: int = option(16, "Side of a patch in pixels.")
    dim: int = option(768, "Channels of a feature.")
    view: list[int] = option([768, 576], "Size of a view that the teacher sees: width and height in pixels.")
    window_size: int = option(256, "Side of the teacher's windows in pixels.")
    stride: int = option(24, HELP["stride"])
    teacher_windows: int = option(10, "Windows per view where they are sampled.")
    seconds_per_megapixel: float = option(0.01, "Of the model on one GPU, at about the working size.")
    decide_seconds: float = option(0.002, "Seconds per megapixel of the image to decide its masks, on one GPU.")
    mask_bytes: float = option(0.03, "Bytes per pixel of a mask as PNG.")
    decode_megapixels: float = option(30.0, "Megapixels that a core decodes and resizes per second.")
    cores: float = option(8, "Cores per GPU.")
    read_mb: float = option(5000.0, "MB that the store gives per second, to all machines together.")
    write_mb: float = option(2000.0, "MB that the store takes per second, from all machines together.")
    gpus: int = option(8, "GPUs.")
    price: float = option(3.0, "Price of a GPU with its cores for an hour.")
    storage_price: float = option(20.0, "Price of a TB for a month.")
    start_seconds: float = option(60.0, "Until a GPU has loaded the model.")
    check: list[int] = option([], "Compare with runs on this CPU of so many small images.")
    output: str | None = option(None, "JSON file to write.")
    overwrite: bool = option(False, HELP["overwrite"])

    def __post_init__(self):
        for name in ("source", "working", "view"):
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) < 1:
                raise UsageError(f"--{name} must be a width and a height in pixels.")
        rates = ("seconds_per_megapixel", "decode_megapixels", "cores", "read_mb", "write_mb", "gpus", "patch", "dim")
        if wrong := [name for name in (*rates, "window_size", "stride", "teacher_windows") if getattr(self, name) <= 0]:
            raise UsageError(f"--{wrong[0]} {getattr(self, wrong[0])} must be above 0.")
        if not self.images or min([*self.images, *self.check]) < 1:
            raise UsageError("--images and --check are numbers of images, from 1.")


@dataclass
class ImageWork:
    """What one image costs: MB read, megapixels decoded, seconds of a GPU, MB written."""

    read: float
    decode: float
    compute: float
    write: float


@dataclass
class Estimate:
    """
    What a product of so many images takes.

    Attributes:
        stages: seconds of each stage, if it worked alone.
        hours: of all GPUs together running.
        cost: of the GPUs.
        terabytes: written.
    """

    product: str
    images: int
    stages: dict[str, float]
    hours: float
    cost: float
    terabytes: float

    @property
    def bottleneck(self) -> str:
        """The slowest stage."""
        return max(self.stages, key=lambda stage: self.stages[stage])


def megapixels(size: Sequence[int]) -> float:
    return size[0] * size[1] / 1e6


def map_megabytes(size: Sequence[int], options: ScaleOptions) -> float:
    """Size of a feature map in half precision."""
    columns, rows = (-(-side // options.patch) for side in size)
    return rows * columns * options.dim * HALF / 1e6


def work_of(product: str, options: ScaleOptions) -> ImageWork:
    """What an image costs for one of the `PRODUCTS`."""
    work = ImageWork(options.source_kb / 1e3, megapixels(options.source), 0.0, 0.0)
    one_pass = megapixels(options.working) * options.seconds_per_megapixel
    if product == FEATURES:
        return replace(work, compute=one_pass, write=map_megabytes(options.working, options))
    if product == MASKS:
        decision = megapixels(options.source) * options.decide_seconds
        return replace(work, compute=one_pass + decision, write=megapixels(options.source) * options.mask_bytes)
    width, height = (-(-side // options.patch) * options.patch for side in options.view)
    plan = WindowPlan.make(height, width, options.window_size, options.stride, options.patch)
    a_window = megapixels(plan.window) * options.seconds_per_megapixel
    if product == "teacher, sampled":  # drawn anew in every step, so nothing is kept
        return replace(work, compute=min(options.teacher_windows, len(plan)) * a_window)
    return replace(work, compute=len(plan) * a_window, write=map_megabytes(options.view, options))


def estimate(product: str, images: int, options: ScaleOptions) -> Estimate:
    """Time, cost and storage of a product where the stages work at the same time."""
    work, gpus = work_of(product, options), options.gpus
    stages = {
        "read": images * work.read / options.read_mb,
        "decode": images * work.decode / (options.decode_megapixels * options.cores * gpus),
        "compute": images * work.compute / gpus,
        "write": images * work.write / options.write_mb,
    }
    hours = (options.start_seconds + max(stages.values())) / 3600
    return Estimate(product, images, stages, hours, hours * gpus * options.price, images * work.write / 1e6)


# Checked against runs on this machine


def write_images(folder: Path, count: int) -> None:
    """JPEG images of smooth noise."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize(SIDES, Image.Resampling.BICUBIC).save(folder / f"{i:06}.jpg", quality=90)


def seconds_of(stage: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what the stage returned."""
    start = time.process_time()
    found = stage()
    return time.process_time() - start, found


@torch.no_grad()
def measure_features(images: list[InputImage], folder: Path) -> dict[str, float]:
    """CPU seconds per image of the stages of `spar-hf features`."""
    extract = FeatureExtractor(shortest_edge=EDGE, device="cpu")
    folder.mkdir()
    work = feature_work(extract, FileWriter(folder, extract.settings))
    work.compute([work.read(image) for image in images[:BATCH]])  # the first pass allocates
    decode, items = seconds_of(lambda: [work.read(image) for image in images])
    groups = [items[i : i + BATCH] for i in range(0, len(items), BATCH)]
    compute, results = seconds_of(lambda: [one for group in groups for one in work.compute(group)])
    write, _ = seconds_of(lambda: [work.write(*given) for given in zip(images, items, results, strict=True)])
    return {name: value / len(images) for name, value in zip(STAGES[1:], (decode, compute, write), strict=True)}


@torch.no_grad()
def measure_masks(images: list[InputImage], folder: Path) -> dict[str, float]:
    """CPU seconds per image of the stages of `spar-hf segment` with its defaults; deciding counts as computing."""
    pipe: Any = load_pipeline(None, "cpu")
    record, words = ResultRecord(folder, {}), read_labels("; ".join(LABELS))
    patch, size = pipe.model.config.patch_size, {"shortest_edge": EDGE}
    read = ReadWithPixels(ImageReader(None), ImagePreparation(pipe.image_processor, patch, size))

    def compute(items: list[Any]) -> list[Any]:
        given = [{"pixel_values": item.pixel_values, "original_size": item.original_size} for item in items]
        options = {"candidate_labels": words, "background": "auto"}
        return [segment_with_heat(pipe, one, **options) for one in pipe._encode(given)]

    def write(image: InputImage, item: Any, result: Any) -> None:
        path = folder / f"{image.name}.png"
        write_results(item.image, result, {"map": path}, image)
        record.add(image, [path])

    compute([read(image) for image in images[:MASKS_BATCH]])
    decode, items = seconds_of(lambda: [read(image) for image in images])
    groups = [items[i : i + MASKS_BATCH] for i in range(0, len(items), MASKS_BATCH)]
    with pipe.texts.unchanged():
        forward, results = seconds_of(lambda: [one for group in groups for one in compute(group)])
    written, _ = seconds_of(lambda: [write(*given) for given in zip(images, items, results, strict=True)])
    return {name: value / len(images) for name, value in zip(STAGES[1:], (decode, forward, written), strict=True)}


def arguments(product: str, images: Path, output: Path) -> list[str]:
    """What makes a product of a folder, after `spar-hf`."""
    words = ["features" if product == FEATURES else "segment", str(images), "--output", str(output)]
    words += ["--shortest-edge", str(EDGE), "--workers", "0", "--device", "cpu"]
    return words + ([] if product == FEATURES else ["--labels", "; ".join(LABELS), "--format", "map"])


def run(product: str, images: Path, output: Path) -> dict[str, float]:
    """Run the command of a product in a process with one thread: its CPU seconds, and those of the clock."""
    command = [sys.executable, "-m", "spar_hf.cli.main", *arguments(product, images, output)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    after, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-1000:]}")
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "clock": clock}


def check(counts: Sequence[int], console: Console) -> list[dict[str, Any]]:
    """Predict and measure runs of so many images; prints and returns a row for each."""
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    columns = ("decode ms", "compute ms", "write ms", "predicted CPU s", "measured CPU s", "error", "clock s")
    table = Table("product", "images", *columns, title=f"Rates on {CALIBRATION} images, and runs")
    try:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for count in {1, CALIBRATION, *counts}:
                write_images(folder / str(count), count)
            sample = find_images([str(folder / str(CALIBRATION))])[0]
            for product, measure in ((FEATURES, measure_features), (MASKS, measure_masks)):
                for count in counts:
                    before = measure(sample, folder / f"rates-{product}-{count}-before")
                    start = run(product, folder / "1", folder / f"{product}-{count}-1")["cpu"]
                    found = run(product, folder / str(count), folder / f"{product}-{count}")
                    after = measure(sample, folder / f"rates-{product}-{count}-after")
                    # other processes change how fast a core is, so rates are those around the run
                    stages = {name: (value + after[name]) / 2 for name, value in before.items()}
                    each = sum(stages.values())
                    row = {"product": product, "images": count, "start": start - each, "before": before, "after": after}
                    row |= {"stages": stages, "predicted": start + (count - 1) * each, **found}
                    row["error"] = row["predicted"] / found["cpu"] - 1
                    rows.append(row)
                    rates = (f"{1e3 * value:.2f}" for value in stages.values())
                    seconds = (f"{row['predicted']:.1f}", f"{found['cpu']:.1f}", f"{row['error']:+.1%}")
                    table.add_row(product, f"{count:,}", *rates, *seconds, f"{found['clock']:.1f}")
    finally:
        torch.set_num_threads(threads)
    console.print(table)
    return rows


def short(value: float) -> str:
    """A number with three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run the study; returns what it prints."""
    (options,) = parse_dataclasses((ScaleOptions,), args, __doc__)
    if options.output:
        check_replaceable([Path(options.output)], options.overwrite)
    console = Console(width=120)
    report: dict[str, Any] = {"options": vars(options)}
    if options.check:
        report["check"] = check(options.check, console)
    else:
        estimates = [estimate(product, images, options) for product in PRODUCTS for images in options.images]
        table = Table("product", "images", "hours", "cost", "TB", "per month", "limited by", "next")
        for one in estimates:
            order = sorted(one.stages, key=lambda stage: -one.stages[stage])
            share = one.stages[order[1]] / one.stages[order[0]]
            money = (short(one.cost), short(one.terabytes), short(one.terabytes * options.storage_price))
            table.add_row(one.product, f"{one.images:,}", short(one.hours), *money, order[0], f"{order[1]} {share:.0%}")
        console.print(table)
        report["estimates"] = [{**vars(one), "bottleneck": one.bottleneck} for one in estimates]
    if options.output:
        write_json(Path(options.output), report)
    return report


if __name__ == "__main__":
    run_command(main)
