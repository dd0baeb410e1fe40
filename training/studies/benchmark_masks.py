"""
What making masks from features costs: memory and time against the plain formula, labels equal to its own, time beside the
vision forward, and the throughput of a folder.

    python training/benchmark_masks.py --output masks.json
"""

import logging
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from benchmark import BASE, Options, compare
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoTokenizer, HfArgumentParser, SiglipTextConfig, SiglipVisionConfig, pipeline

from spar_hf import SPAR_TINY, SparConfig, SparForOpenVocabSegmentation, SparImageProcessorPil
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.segmentation import decide
from spar_hf.utils.atomic import write_json
from spar_hf.utils.usage import run_script

logger = logging.getLogger("benchmark")
PATCH = 16
SCALE = 40.0  # the published factor on cosines


def resident() -> int:
    """Bytes that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(work: Callable[[], torch.Tensor], device: str) -> tuple[float, int, torch.Tensor]:
    """
    Seconds of `work`, the most bytes it held beyond what there was before, and its result. On the CPU the memory is the
    resident one, sampled every 2 ms; CUDA keeps count itself.
    """
    cuda = device.startswith("cuda")
    before, peak, done = torch.cuda.memory_allocated() if cuda else resident(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        watcher.start()
    start = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    if cuda:
        return elapsed, torch.cuda.max_memory_allocated() - before, result
    done.set()
    watcher.join()
    return elapsed, max(0, peak - before), result


def logits_like_a_models(names: int, height: int, width: int, device: str) -> torch.Tensor:
    """Smooth cosines times the scale, one name ahead per region: `(names, h, w)`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, names, -(-height // PATCH) // 4, -(-width // PATCH) // 4, generator=generator) * 0.05
    size = (-(-height // PATCH), -(-width // PATCH))
    return (F.interpolate(coarse, size=size, mode="bicubic")[0] * SCALE).to(device)


def plain_labels(logits: torch.Tensor) -> torch.Tensor:
    """The formula as one writes it: upsample, softmax, argmax; every probability of every pixel at once."""
    return F.interpolate(logits[None], scale_factor=PATCH, mode="bilinear")[0].softmax(0).argmax(0)


def plain_labels_in_strips(logits: torch.Tensor, patch_rows: int = 8) -> torch.Tensor:
    """The same in strips, with one patch row beyond on each side, where the whole does not fit into memory."""
    rows, strips = logits.shape[1], []
    for first in range(0, rows, patch_rows):
        last = min(first + patch_rows, rows)
        low, high = max(0, first - 1), min(rows, last + 1)
        labels = plain_labels(logits[:, low:high])
        strips.append(labels[(first - low) * PATCH : (first - low + last - first) * PATCH])
    return torch.cat(strips)


def against_the_plain_formula(names: int, height: int, width: int, whole: bool, options: Options) -> dict:
    """Time, memory and labels of `decide` against the formula, whole or, where that is too large, in strips."""
    logits = logits_like_a_models(names, height, width, options.device)
    plain, name_to_class, size = plain_labels if whole else plain_labels_in_strips, torch.arange(names), (height, width)
    ours, bare = [], []
    for _ in range(options.repeats if whole else 1):  # a thousand classes take minutes
        ours.append(measure(lambda: decide(logits, name_to_class, PATCH, size, size).labels, options.device))
        bare.append(measure(lambda: plain(logits), options.device))
    ratios = sorted(a[0] / b[0] for a, b in zip(ours, bare, strict=True))
    quarter = len(ratios) // 4
    form = "plain formula" if whole else "plain formula in strips of 8 patch rows"
    return {
        "name": f"decision over {form}, {names} classes, {height}×{width}",
        "ratio": statistics.median(ratios),
        "middle_half": [ratios[quarter], ratios[-1 - quarter]],
        "seconds": statistics.median(row[0] for row in ours),
        "bare_seconds": statistics.median(row[0] for row in bare),
        "peak_mib": max(row[1] for row in ours) / 2**20,
        "bare_peak_mib": max(row[1] for row in bare) / 2**20,
        "formula_mib": names * height * width * 4 * 2 / 2**20,  # upsampled logits and their softmax
        "equal_labels": float((ours[0][2] == bare[0][2]).double().mean()),
        "goal": "equal labels ≥ 0.99999",
    }


def random_pipeline(options: Options, model=None):
    """A pipeline of a random ViT-B/16 (SigLIP2's shape) or another model, with the tokenizer of spar-tiny."""
    tokenizer = AutoTokenizer.from_pretrained(SPAR_TINY)
    if model is None:
        text = SiglipTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, num_hidden_layers=1
        )
        vision = SiglipVisionConfig(**BASE, patch_size=PATCH, image_size=512, hidden_act="gelu")
        model = SparForOpenVocabSegmentation(SparConfig(backbone_config=vision, text_config=text, templates="plain"))
    return pipeline(
        "open-vocab-segmentation",
        model=model.eval(),
        tokenizer=tokenizer,
        image_processor=SparImageProcessorPil(),
        device=options.device,
        templates="plain",
    )


def noise(height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@torch.no_grad()
def beside_the_forward(options: Options, size: int = 1024, model=None) -> list[dict]:
    """What runs on the device beside the vision forward, over the forward; and what does not, over the former."""
    segment = random_pipeline(options, model)
    image = noise(size, size)
    pixel_values = segment.preprocess(image)["pixel_values"].to(options.device)
    encoded = segment.encode(image)
    vocabulary = Vocabulary.parse("ade20k")
    decided = segment.forward(encoded, vocabulary=vocabulary, templates="plain")

    def device_work():
        return segment._forward(encoded, vocabulary, "plain")

    what = f"logits, upsampling, decision and scores, 150 classes, {size}×{size}"
    segments = len(segment.postprocess(decided))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        image.save(path)
        forward = partial(segment.model.vision_model, pixel_values)
        decoding, masks = partial(segment.preprocess, path), partial(segment.postprocess, decided)
        return [
            compare(f"{what}, over the vision forward", device_work, forward, "≤ 0.15", options),
            compare("decoding and normalising its JPEG over the same", decoding, device_work, "reported", options),
            compare(f"making masks of {segments} segments over the same", masks, device_work, "reported", options),
        ]


@torch.no_grad()
def folder_throughput(options: Options, count: int = 8) -> dict:
    """Images per second of a folder through the pipeline over those of a bare loop of vision forwards on ready tensors."""
    model = SparForOpenVocabSegmentation.from_pretrained(options.model)
    segment = random_pipeline(options, model)
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(count)]
        for path in paths:
            noise(options.height, options.width).save(path)
        ready = [segment.preprocess(path)["pixel_values"].to(options.device) for path in paths]
        labels = ["road", "car, automobile", "sky", "tree", "building"]
        row = compare(
            f"bare loop of forwards over a folder of {count} JPEGs to label maps, {options.height}×{options.width}",
            lambda: [segment.model.vision_model(pixel_values) for pixel_values in ready],
            lambda: segment(paths, candidate_labels=labels, output="map"),
            "≥ 0.85",
            options,
        )
    return row


@torch.no_grad()
def batch_speed(options: Options, count: int = 8) -> dict:
    """Images of equal size together over one by one."""
    model = SparForOpenVocabSegmentation.from_pretrained(options.model)
    segment = random_pipeline(options, model)
    images, labels = [noise(options.height, options.width)] * count, ["road", "sky"]
    return compare(
        f"{count} equal images one by one over batch_size=4, {options.height}×{options.width}",
        lambda: segment(images, candidate_labels=labels, output="map"),
        lambda: segment(images, candidate_labels=labels, output="map", batch_size=4),
        "reported",
        options,
    )


def rows(options: Options) -> list[dict]:
    """All comparisons; those of memory add `peak_mib`, `bare_peak_mib`, `formula_mib` and `equal_labels`."""
    return [
        against_the_plain_formula(150, 1024, 2048, True, options),
        against_the_plain_formula(1000, 2048, 2048, False, options),
        *beside_the_forward(options),
        folder_throughput(options),
        batch_speed(options),
    ]


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    results = rows(options)
    table = Table("what", "ratio", "middle half", "seconds", "bare", "MiB", "bare", "equal", "goal")
    for row in results:
        low, high = row["middle_half"]
        memory = [f"{row[key]:.0f}" if key in row else "" for key in ("peak_mib", "bare_peak_mib")]
        equal = f"{row['equal_labels']:.7f}" if "equal_labels" in row else ""
        times = (f"{row['ratio']:.3f}", f"{low:.3f}-{high:.3f}", f"{row['seconds']:.3f}", f"{row['bare_seconds']:.3f}")
        table.add_row(row["name"], *times, *memory, equal, row["goal"])
    Console().print(table)
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "ratios": results})


if __name__ == "__main__":
    run_script(main)
