"""
Linear probing: batch norm and one linear layer on the frozen dense features of a SPAR vision model or of any backbone of
transformers that SPAR reads, with or without a text tower; mean intersection over union on held-out images.

    accelerate launch training/linear_probe.py --model BASE --inference sliding:24 --shortest_edge 384 \
        --train_dataset DATA/camvid/train --train_exclude "0001TP_*" \
        --test_dataset DATA/camvid/train --test_include "0001TP_*" --cache runs/features --output runs/probe

Features are made once per image and kept on disk in bfloat16 (`--cache`), or made anew each time an image is drawn. Heads of
several learning rates are trained on the same features in one run. The loss is the cross entropy at pixels drawn at random
from every image, where logits are read between patch centres as the masks read them: the mean over all pixels without
the memory of all pixels. `OUTPUT/model` is the best head with its vision model, for `pipeline("image-segmentation")`; batch
norm is folded into its linear layer. The learning rate is chosen on the test images, as usual in linear probing; the table
has them all.

Images are split over processes. Batch norm sees the batch of its process.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from huggingface_hub import EvalResult, ModelCardData
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_scheduler

from spar_hf import SparForSemanticSegmentation
from spar_hf.data.segmentation_sets import VOID, ShuffledStream, check_pairs, open_segmentation_folder
from spar_hf.evaluation.metrics import MeanIoU
from spar_hf.heads.frozen_features import FrozenFeatures, parse_inference
from spar_hf.model.segmentation import decide, patch_coordinates
from spar_hf.utils.atomic import write_json, write_text, writing_folder
from spar_hf.utils.checkpoints import (
    discard,
    earlier_state,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    settings_of,
)
from spar_hf.utils.usage import check_precision, work_begins

# what a resumed run may have otherwise: none of it changes what is learned
FREE = {"output", "resume", "save_steps", "cache", "window_batch_size"}


@dataclass
class Options:
    """Options of linear probing; lengths are in pixels."""

    model: str = field(metadata={"help": "Hub id or folder of a SPAR model or a backbone of transformers."})
    train_dataset: str = field(
        metadata={
            "help": "Folder with `images/`, `masks/` (8-bit PNG, 255 = void) and `classes.txt` (also in its parent)."
        }
    )
    test_dataset: str = field(metadata={"help": "Folder of held-out photos of the same layout and classes."})
    output: str = field(metadata={"help": "Folder to write `results.json` and the best head's `model` to."})
    inference: str = field(
        default="single",
        metadata={"help": "How features are made: 'single' (one pass) or 'sliding:STRIDE' (sliding window)."},
    )
    train_include: str = field(default="*", metadata={"help": "Train on images whose stem matches this shell pattern,"})
    train_exclude: list[str] | None = field(default=None, metadata={"help": "and none of these,"})
    train_every: int = field(default=1, metadata={"help": "and of those on each n-th."})
    test_include: str = field(default="*", metadata={"help": "Test on images whose stem matches this shell pattern,"})
    test_exclude: list[str] | None = field(default=None, metadata={"help": "and none of these."})
    shortest_edge: int | None = field(
        default=None, metadata={"help": "Resize images to this shorter side. Default: the image processor's size."}
    )
    longest_edge: int | None = field(
        default=None, metadata={"help": "Resize to this longer side; beside --shortest_edge it is an upper bound."}
    )
    window_batch_size: int = field(default=16, metadata={"help": "Windows per forward pass of a sliding window."})
    cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder to keep features in (2 bytes per number). Files of the same model, size, inference and image "
            "are used again, also by later runs. Default: features are made each time."
        },
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        metadata={"help": "Peak learning rates; a head is trained with each."},
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW weight decay."})
    steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Images per step and process."})
    pixels: int = field(default=4096, metadata={"help": "Labelled pixels drawn from every image."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps with rising learning rate."})
    mixed_precision: str = field(default="no", metadata={"help": "Of the vision model: no, fp16 or bf16."})
    seed: int = field(default=0, metadata={"help": "Seed of heads, order and pixels."})
    save_steps: int = field(default=200, metadata={"help": "Steps between checkpoints; the last two are kept."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in --output, as if never stopped."}
    )

    def __post_init__(self):
        for name in ("steps", "batch_size", "pixels", "train_every", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"--learning_rates {self.learning_rates} must be positive numbers, one or more.")
        if not 0 <= self.warmup_ratio <= 1 or self.weight_decay < 0:
            raise ValueError("--warmup_ratio lies in 0 to 1, and --weight_decay is 0 or above.")
        parse_inference(self.inference)


class Heads(nn.Module):
    """Batch norm and one linear layer per learning rate; the norm (without weights of its own) is common to all."""

    def __init__(self, dim: int, classes: int, heads: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.linear = nn.ModuleList(nn.Linear(dim, classes) for _ in range(heads))
        for layer in self.linear:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(patches, dim)` -> `(heads, patches, classes)`, in float32: `--mixed_precision` is the vision model's."""
        with torch.autocast(features.device.type, enabled=False):
            features = self.norm(features)
            return torch.stack([layer(features) for layer in self.linear])

    @torch.no_grad()
    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights `(heads, classes, dim)` and biases `(heads, classes)` that do without the norm, in float64."""
        scale = (self.norm.running_var.double() + self.norm.eps).rsqrt()
        weight = torch.stack([layer.weight for layer in self.linear]).double() * scale
        bias = torch.stack([layer.bias for layer in self.linear]).double()
        return weight, bias - weight @ self.norm.running_mean.double()


def logits_at(
    logits: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    patch_size: int,
    working_size: tuple[int, int],
    image_size: tuple[int, int],
) -> torch.Tensor:
    """Bilinear logits at pixels of the image: `(heads, h, w, classes)` -> `(heads, pixels, classes)`, as masks read them."""
    down = patch_coordinates(image_size[0], working_size[0], patch_size, logits.shape[1], logits.device)
    across = patch_coordinates(image_size[1], working_size[1], patch_size, logits.shape[2], logits.device)
    top, bottom, low = (values[rows] for values in down)
    left, right, far = (values[columns] for values in across)
    upper = torch.lerp(logits[:, top, left], logits[:, top, right], far[:, None])
    lower = torch.lerp(logits[:, bottom, left], logits[:, bottom, right], far[:, None])
    return torch.lerp(upper, lower, low[:, None])


def batch_loss(heads, batch: list[dict[str, Any]], patch_size: int) -> torch.Tensor:
    """Cross entropy of every head, mean over the pixels drawn: `(heads,)`. A batch holds what `draw` gives."""
    counts = [item["features"][0].numel() for item in batch]
    # of every image (dim, h, w) -> (h * w, dim), all under one another
    logits = heads(torch.cat([item["features"].flatten(1).T for item in batch]))
    read, labels = [], []
    for item, part in zip(batch, logits.split(counts, dim=1), strict=True):
        grid = part.unflatten(1, item["features"].shape[1:])
        read.append(
            logits_at(grid, item["rows"], item["columns"], patch_size, item["working_size"], item["photo_size"])
        )
        labels.append(item["labels"])
    pixels, wanted = torch.cat(read, dim=1), torch.cat(labels)
    losses = [nn.functional.cross_entropy(of_head, wanted) for of_head in pixels]
    return torch.stack(losses)


def draw(entry: dict[str, torch.Tensor], mask: np.ndarray, pixels: int, seed: list[int], device) -> dict[str, Any]:
    """Features and up to `pixels` labelled pixels of an image, on the device."""
    labelled = np.flatnonzero(mask != VOID)
    if len(labelled) > pixels:
        labelled = np.random.default_rng(seed).choice(labelled, pixels, replace=False, shuffle=False)
    rows, columns = np.unravel_index(labelled, mask.shape)
    return {
        "features": entry["features"].to(device).float(),
        "rows": torch.from_numpy(rows).to(device),
        "columns": torch.from_numpy(columns).to(device),
        "labels": torch.from_numpy(mask.ravel()[labelled].astype(np.int64)).to(device),
        "working_size": tuple(entry["working_size"].tolist()),
        "photo_size": tuple(entry["photo_size"].tolist()),
    }


def probe(options: Options) -> dict[str, Any]:
    """Train and measure the heads; every process gets the report."""
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    check_precision(accelerator)
    device, main = accelerator.device, accelerator.is_main_process
    set_seed(options.seed)
    output, settings = Path(options.output), settings_of(options, FREE)
    state = earlier_state(output, options.resume, settings, accelerator.num_processes)
    train = open_segmentation_folder(options.train_dataset, options.train_include, options.train_exclude)
    test = open_segmentation_folder(options.test_dataset, options.test_include, options.test_exclude)
    if train.classes != test.classes:
        raise ValueError(
            f"{train.path} and {test.path} have different lines in classes.txt; a probe is measured on its own classes."
        )
    pairs = train.pairs[:: options.train_every]
    both = {image.resolve() for image, _ in pairs} & {image.resolve() for image, _ in test.pairs}
    if both:
        raise ValueError(
            f"{len(both)} images are to be trained and tested on, {min(both).name} among them. Tell them apart by "
            "--train_exclude and --test_include."
        )
    edges = {"shortest_edge": options.shortest_edge, "longest_edge": options.longest_edge}
    features = FrozenFeatures(
        options.model,
        accelerator,
        inference=options.inference,
        size={name: length for name, length in edges.items() if length is not None},
        window_batch_size=options.window_batch_size,
        cache=options.cache,
    )
    pairs, test_pairs = check_pairs(train, pairs, accelerator), check_pairs(test, test.pairs, accelerator)
    work_begins()
    features.fill([image for image, _ in (*pairs, *test_pairs)])

    patch_size, classes = features.model.config.patch_size, len(train.classes)
    heads = Heads(features.model.config.projection_dim, classes, len(options.learning_rates))
    groups = [
        {"params": layer.parameters(), "lr": rate}
        for layer, rate in zip(heads.linear, options.learning_rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    # accelerate steps the schedule once per process and optimizer step
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=int(options.warmup_ratio * options.steps) * accelerator.num_processes,
        num_training_steps=options.steps * accelerator.num_processes,
    )
    wrapped, optimizer, schedule = accelerator.prepare(heads, optimizer, schedule)
    if state is not None:
        load_checkpoint(accelerator, output)
    wrapped.train()
    order = ShuffledStream(len(pairs), options.seed)
    done = 0 if state is None else state["step"]
    bar = tqdm(
        range(done, options.steps), "training", initial=done, total=options.steps, disable=not main, mininterval=2
    )
    for step in bar:
        first = (step * accelerator.num_processes + accelerator.process_index) * options.batch_size
        batch = []
        for index in range(first, first + options.batch_size):
            image, mask = pairs[order[index]]
            entry = features(image)
            labels = train.read_mask(mask, tuple(entry["photo_size"].tolist()))
            batch.append(draw(entry, labels, options.pixels, [options.seed, index], device))
        losses = batch_loss(wrapped, batch, patch_size)
        accelerator.backward(losses.sum())  # no head sees another's gradient
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{losses.min().item():.3f}")
        if (step + 1) % options.save_steps == 0 and step + 1 < options.steps:
            save_checkpoint(accelerator, output, step + 1, settings=settings)

    # statistics of the norm differ between the processes after the last step; measured is what is written
    weight, bias = (broadcast(tensor.float()) for tensor in accelerator.unwrap_model(wrapped).folded())
    metrics = [MeanIoU(classes, ignore_index=VOID) for _ in options.learning_rates]
    share = test_pairs[accelerator.process_index :: accelerator.num_processes]
    for image, mask in tqdm(share, desc="test", disable=not main):
        entry = features(image)
        labels = test.read_mask(mask, tuple(entry["photo_size"].tolist()))
        grid = entry["features"].to(device).float()
        for metric, head_weight, head_bias in zip(metrics, weight, bias, strict=True):
            logits = torch.einsum("dhw,nd->nhw", grid, head_weight) + head_bias[:, None, None]
            decision = decide(
                logits,
                torch.arange(classes),
                patch_size,
                working_size=tuple(entry["working_size"].tolist()),
                output_size=tuple(entry["photo_size"].tolist()),
            )
            metric.add(prediction=decision.labels, reference=labels)
    matrices = torch.from_numpy(np.stack([metric.confusion_matrix for metric in metrics])).to(device)
    rows = []
    for rate, matrix in zip(options.learning_rates, accelerator.reduce(matrices, "sum").cpu().numpy(), strict=True):
        metric = MeanIoU(classes, ignore_index=VOID)
        metric.merge(matrix)
        results = metric.compute()
        iou = dict(zip(train.classes, results["per_category_iou"].tolist(), strict=True))
        rows.append(
            {
                "learning_rate": rate,
                "mean_iou": results["mean_iou"],
                "overall_accuracy": results["overall_accuracy"],
                # JSON knows no NaN: classes that occur nowhere get null
                "classes": {name: value if value == value else None for name, value in iou.items()},
            }
        )
    best = max(range(len(rows)), key=lambda i: rows[i]["mean_iou"])
    spent = torch.tensor([features.made, features.seconds], dtype=torch.float64, device=device)
    made, seconds = accelerator.reduce(spent, "sum").tolist()
    report = {
        "model": "/".join(Path(options.model).parts[-2:]),  # names no machine's folders
        "dataset": "/".join(Path(options.test_dataset).parts[-2:]),
        "inference": options.inference,
        "size": dict(features.image_processor.size or {}),
        "train_images": len(pairs),
        "test_images": len(test_pairs),
        "steps": options.steps,
        "images_per_step": options.batch_size * accelerator.num_processes,
        "seed": options.seed,
        "features_made": int(made),
        "seconds_per_image": round(seconds / made, 4) if made else None,
        "best": rows[best],
        "heads": rows,
    }
    if main:
        model = SparForSemanticSegmentation.from_weights(features.model, train.classes, weight[best], bias[best])
        write(model, features.image_processor, report, output)
        for checkpoint in list_checkpoints(output):  # a probe is short, and often repeated in its folder
            discard(checkpoint)
        show(report, Console(markup=False, highlight=False))
    # before the process group, see distill.py
    wrapped, optimizer, schedule = accelerator.free_memory(wrapped, optimizer, schedule)
    accelerator.end_training()
    return report


def write(model, image_processor, report: dict[str, Any], output: Path) -> None:
    """`OUTPUT/model` and `OUTPUT/results.json`."""
    with writing_folder(output / "model") as temporary:
        model.save_pretrained(temporary)
        image_processor.save_pretrained(temporary)
        write_text(temporary / "README.md", model_card(report, output.name))
    write_json(output / "results.json", report)


def model_card(report: dict[str, Any], name: str) -> str:
    best = report["best"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["spar", "semantic-segmentation", "linear-probe"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                dataset_type="folder",
                dataset_name=report["dataset"],
                metric_type="mean_iou",
                metric_value=round(100 * best["mean_iou"], 2),
            )
        ],
    )
    keys = ("model", "inference", "size", "train_images", "test_images", "steps", "images_per_step", "seed")
    table = "\n".join(f"| {key} | {report[key]} |" for key in keys)
    classes = "\n".join(
        f"| {label} | {'' if iou is None else format(100 * iou, '.1f')} |" for label, iou in best["classes"].items()
    )
    note = ""
    if report["inference"] != "single":
        note = (
            "\nThe head was trained and measured on features of a sliding window. This folder runs one pass: its masks are "
            "worse than the figures unless a student of that window takes the vision model's place.\n"
        )
    return f"""---
{data.to_yaml()}
---
# {name}

A linear probe: batch norm (folded) and one linear layer on frozen dense features. The licences of the vision model and of
the images apply to these weights.
{note}
| probing | |
|---|---|
{table}
| learning rate | {best["learning_rate"]:g}, the best of {len(report["heads"])} on the test images |
| mIoU | {100 * best["mean_iou"]:.2f} |
| pixel accuracy | {100 * best["overall_accuracy"]:.2f} |

| class | IoU |
|---|---|
{classes}
"""


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report as a table."""
    title = (
        f"{report['model']}, {report['inference']}: {report['train_images']} images, tested on {report['test_images']}"
    )
    table = Table(title=title)
    for heading in ("learning rate", "mIoU %", "pixel acc. %"):
        table.add_column(heading, justify="right")
    for row in report["heads"]:
        mark = " *" if row is report["best"] else ""
        table.add_row(
            f"{row['learning_rate']:g}", f"{100 * row['mean_iou']:.2f}{mark}", f"{100 * row['overall_accuracy']:.2f}"
        )
    console.print(table)


def main(args: list[str] | None = None) -> dict[str, Any]:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses(args)
    return probe(options)
