"""
Suite `masks` of `benchmark.py`: what it costs to make masks from features. Memory and time relative to the plain formula,
whose labels must be the same; time relative to the vision forward; and the throughput of a folder.

    python training/studies/benchmark_masks.py --output masks.json
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from benchmark import BASE, Options, compare, ratio_row
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoTokenizer, SiglipTextConfig, SiglipVisionConfig, pipeline

from spar_hf import SPAR_TINY, SparConfig, SparForOpenVocabSegmentation, SparImageProcessorPil
from spar_hf.model.image_input import read_rgb
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.segmentation import decide
from spar_hf.model.vocabularies import VOCABULARIES
from spar_hf.utils.atomic import write_json
from spar_hf.utils.devices import PeakMemory, clock
from spar_hf.utils.errors import UsageError, as_usage_errors, run_command
from spar_hf.utils.options import formerly, parse_dataclasses

PATCH = 16
SCALE = 40.0  # the published factor on cosines
ADJECTIVES = ("red", "old", "small", "wooden", "metal", "broken", "dirty", "bright", "green", "white", "large")


@dataclass
class MaskOptions(Options):
    """Options of the benchmark, and the sizes of this suite."""

    decision: list[int] = field(
        default_factory=lambda: [150, 1024, 2048],
        metadata={"help": "Classes, height and width in pixels of the decision against the whole formula."},
    )
    large_decision: list[int] = field(
        default_factory=lambda: [1000, 2048, 2048],
        metadata={
            "help": "The same with the model's logits, where the formula is computed in strips to fit into memory."
        },
    )
    many_names: list[int] = field(
        default_factory=lambda: [10_000, 360, 480], metadata={"help": "The same for very many names on a small image."}
    )
    image: str | None = field(
        default=None,
        metadata={"help": "Image of the last two, resized. Default: smooth noise, which has harder logits."},
    )
    forward_size: int = field(
        default=1024, metadata={"help": "Side in pixels of the image whose masks are timed against the vision forward."}
    )
    image_count: int = field(
        default=8, metadata={"help": "Images in the folder and in the batch.", "aliases": formerly("images")}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("decision", "large_decision", "many_names"):
            if len(getattr(self, name)) != 3 or min(getattr(self, name)) < 1:
                raise UsageError(f"--{name} takes three numbers above 0: classes, height, width.")


def timed(work: Callable[[], torch.Tensor], device: str) -> tuple[float, float, torch.Tensor]:
    """Seconds of the work, CPU seconds of all its threads, and its result."""
    start, cpu_start = clock(device), time.process_time()
    result = work()
    return clock(device) - start, time.process_time() - cpu_start, result


def peak_mib(work: Callable[[], torch.Tensor], device: str) -> float | None:
    """The most memory that the work holds, in MiB; `None` where it cannot be measured."""
    with PeakMemory(device) as peak:
        work()
    return None if peak.bytes is None else peak.bytes / 2**20


def realistic_logits(names: int, height: int, width: int, device: str) -> torch.Tensor:
    """Logits as a model makes them, smooth and with one name ahead in each region: `(names, h, w)`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, names, -(-height // PATCH) // 4, -(-width // PATCH) // 4, generator=generator) * 0.05
    size = (-(-height // PATCH), -(-width // PATCH))
    return (F.interpolate(coarse, size=size, mode="bicubic")[0] * SCALE).to(device)


def model_logits(segment, size: list[int], image: str | None) -> torch.Tensor:
    """Logits of the model of a pipeline for names of things, alone and with adjectives: `(names, h, w)`."""
    names, height, width = size
    nouns = list(dict.fromkeys(name for words in VOCABULARIES for name in Vocabulary.parse(words).all_names))
    words = [*nouns, *(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in nouns)][:names]
    if len(words) < names:
        raise UsageError(f"There are only {len(words)} names, not {names}.")
    picture = noise(height + 32, width + 32) if image is None else read_rgb(image)
    encoded = segment.encode(picture.resize((width, height), Image.Resampling.BICUBIC), size="native")
    embeds = segment.text_embeds(Vocabulary.parse({word: [word] for word in words}), "plain")
    with torch.no_grad():
        return segment.model.dense_logits(encoded.feature_map[None], embeds)[0]


def plain_labels(logits: torch.Tensor) -> torch.Tensor:
    """The plain formula: upsample, softmax, argmax, with all probabilities of all pixels at once."""
    return F.interpolate(logits[None], scale_factor=PATCH, mode="bilinear")[0].softmax(0).argmax(0)


def plain_labels_in_strips(logits: torch.Tensor) -> torch.Tensor:
    """The same in strips of at most 1 GiB, each with one more patch row on either side."""
    names, rows, columns = logits.shape
    patch_rows = max(1, min(8, 2**30 // (4 * names * columns * PATCH**2)))
    strips = []
    for first in range(0, rows, patch_rows):
        last = min(first + patch_rows, rows)
        low, high = max(0, first - 1), min(rows, last + 1)
        labels = plain_labels(logits[:, low:high])
        strips.append(labels[(first - low) * PATCH : (first - low + last - first) * PATCH])
    return torch.cat(strips)


def against_the_plain_formula(size: list[int], options: MaskOptions, logits: torch.Tensor | None = None) -> dict:
    """Time, memory and labels of `decide` relative to the formula: whole, or in strips if logits are given."""
    names, height, width = size
    strips = logits is not None
    logits = realistic_logits(names, height, width, options.device) if logits is None else logits
    plain = partial(plain_labels_in_strips if strips else plain_labels, logits)
    working_size = (height, width)

    def ours() -> torch.Tensor:
        return decide(logits, torch.arange(names), PATCH, working_size, working_size).labels

    pairs = []
    for _ in range(1 if strips else options.repeats):  # in strips it takes a minute
        pairs.append((timed(ours, options.device), timed(plain, options.device)))
    form = "plain formula in strips, logits of the model" if strips else "plain formula"
    (*_, cpu_seconds, ours_labels), (*_, bare_cpu_seconds, plain_result) = pairs[0]
    name = f"decision over {form}, {names} classes, {height}×{width}"
    goal = ("≤ 0.1, " if strips else "") + "equal labels ≥ 0.99999"
    return (
        ratio_row(name, "seconds", [(a[0], b[0]) for a, b in pairs], goal)
        | {
            "peak_mib": peak_mib(ours, options.device),
            "bare_peak_mib": peak_mib(plain, options.device),
            "formula_mib": names * height * width * 4 * 2 / 2**20,  # upsampled logits and their softmax
            "equal_labels": float((ours_labels == plain_result[:height, :width]).double().mean()),
            "cpu_seconds": cpu_seconds,  # of the first pair; they tell how much else ran on the machine
            "bare_cpu_seconds": bare_cpu_seconds,
        }
    )


def make_pipeline(options: MaskOptions, model: SparForOpenVocabSegmentation | None = None):
    """A pipeline of a model, by default a ViT-B/16 of random weights in SigLIP2's shape, with spar-tiny's tokenizer."""
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
    """An image of smooth noise."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@torch.no_grad()
def beside_the_forward(options: MaskOptions) -> list[dict]:
    """Work on the device after the vision forward, relative to the forward; and work elsewhere, relative to that work."""
    segment, size = make_pipeline(options), options.forward_size
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
        path = Path(folder) / "image.jpg"
        image.save(path)
        forward = partial(segment.model.vision_model, pixel_values)
        decoding, masks = partial(segment.preprocess, path), partial(segment.postprocess, decided)
        return [
            compare(f"{what}, over the vision forward", device_work, forward, "≤ 0.15", options),
            compare("decoding and normalising its JPEG over the same", decoding, device_work, "reported", options),
            compare(f"making masks of {segments} segments over the same", masks, device_work, "reported", options),
        ]


@torch.no_grad()
def folder_throughput(segment, options: MaskOptions) -> dict:
    """Images per second of a folder through the pipeline, relative to a bare loop of vision forwards on ready tensors."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(options.image_count)]
        for path in paths:
            noise(options.height, options.width).save(path)
        ready = [segment.preprocess(path)["pixel_values"].to(options.device) for path in paths]
        labels = ["road", "car, automobile", "sky", "tree", "building"]
        return compare(
            f"bare loop of forwards over a folder of {len(paths)} JPEGs to label maps, {options.height}×{options.width}",
            lambda: [segment.model.vision_model(pixel_values) for pixel_values in ready],
            lambda: segment(paths, candidate_labels=labels, output="map"),
            "≥ 0.85",
            options,
        )


@torch.no_grad()
def batch_speed(segment, options: MaskOptions) -> dict:
    """Images of equal size one by one, relative to the same in batches."""
    images, labels = [noise(options.height, options.width)] * options.image_count, ["road", "sky"]
    return compare(
        f"{len(images)} equal images one by one over batch_size=4, {options.height}×{options.width}",
        lambda: segment(images, candidate_labels=labels, output="map"),
        lambda: segment(images, candidate_labels=labels, output="map", batch_size=4),
        "reported",
        options,
    )


def rows(sizes: MaskOptions) -> list[dict]:
    """All comparisons; those with the formula add `peak_mib`, `bare_peak_mib`, `formula_mib` and `equal_labels`."""
    with as_usage_errors():
        model = SparForOpenVocabSegmentation.from_pretrained(sizes.model)
    segment = make_pipeline(sizes, model)
    return [
        against_the_plain_formula(sizes.decision, sizes),
        *(
            against_the_plain_formula(size, sizes, model_logits(segment, size, sizes.image))
            for size in (sizes.large_decision, sizes.many_names)
        ),
        *beside_the_forward(sizes),
        folder_throughput(segment, sizes),
        batch_speed(segment, sizes),
    ]


def main(args: list[str] | None = None) -> list[dict]:
    """The command: prints the comparisons and returns them."""
    (options,) = parse_dataclasses([MaskOptions], args, __doc__)
    results = rows(options)
    table = Table("what", "ratio", "middle half", "seconds", "bare", "CPU s", "bare", "MiB", "bare", "equal", "goal")
    for row in results:
        low, high = row["middle_half"]
        memory = [f"{row[key]:.0f}" if row.get(key) is not None else "" for key in ("peak_mib", "bare_peak_mib")]
        equal = f"{row['equal_labels']:.7f}" if "equal_labels" in row else ""
        times = [f"{row['ratio']:.3f}", f"{low:.3f}-{high:.3f}", f"{row['seconds']:.3f}", f"{row['bare_seconds']:.3f}"]
        times += [f"{row[key]:.3f}" if key in row else "" for key in ("cpu_seconds", "bare_cpu_seconds")]
        table.add_row(row["name"], *times, *memory, equal, row["goal"])
    Console().print(table)
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "ratios": results})
    return results


if __name__ == "__main__":
    run_command(main)
