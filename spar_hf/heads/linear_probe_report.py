"""Results of a linear probe: the report, its table in the terminal, and the folder of the best head."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from rich.console import Console
from rich.table import Table

from spar_hf.heads.frozen_features import FrozenFeatures
from spar_hf.heads.linear_probe_options import ProbeOptions
from spar_hf.utils.atomic import write_json, write_text, writing_folder
from spar_hf.utils.model_cards import model_card, rows, short_name

SLIDING_NOTE = """
The head was trained and measured on features of a sliding window. This folder runs one pass: its masks are worse than the
figures, unless a student distilled from that window takes the vision model's place.
"""


def make_report(
    options: ProbeOptions, features: FrozenFeatures, scores: list[dict[str, Any]], train_images: int, test_images: int
) -> dict[str, Any]:
    """What `results.json` holds; all processes must call it."""
    accelerator, training = features.accelerator, options.training
    heads = [{"learning_rate": rate, **score} for rate, score in zip(training.learning_rates, scores, strict=True)]
    reader = features.image_processor
    spent = torch.tensor([features.made, features.seconds], device=accelerator.device)  # no float64 on Apple's GPUs
    made, seconds = accelerator.reduce(spent, "sum").tolist()
    return {
        "model": short_name(options.features.model),
        "dataset": short_name(options.data.test_dataset),
        "inference": options.features.inference,
        "size": dict(reader.size or {}) if reader.do_resize else {},
        "train_images": train_images,
        "test_images": test_images,
        "steps": training.steps,
        "images_per_step": training.batch_size * accelerator.num_processes,
        "seed": options.run.seed,
        "features_made": int(made),
        "seconds_per_image": round(seconds / made, 4) if made else None,
        "best": max(heads, key=lambda head: -1.0 if head["mean_iou"] is None else head["mean_iou"]),
        "heads": heads,
    }


def write_results(model: Any, image_processor: Any, report: dict[str, Any], output: Path) -> None:
    """`OUTPUT/model` and `OUTPUT/results.json`."""
    with writing_folder(output / "model") as temporary:
        model.save_pretrained(temporary)
        image_processor.save_pretrained(temporary)
        write_text(temporary / "README.md", make_card(report, output.name))
    write_json(output / "results.json", report)


def make_card(report: dict[str, Any], name: str) -> str:
    """The model card of the best head."""
    best = report["best"]
    result = EvalResult(
        task_type="image-segmentation",
        dataset_type="folder",
        dataset_name=report["dataset"],
        metric_type="mean_iou",
        metric_value=round(100 * best["mean_iou"], 2),
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["spar", "semantic-segmentation", "linear-probe"],
        model_name=name,
        eval_results=[result],
    )
    keys = ("model", "inference", "size", "train_images", "test_images", "steps", "images_per_step", "seed")
    facts = {key: report[key] for key in keys} | {
        "learning rate": f"{best['learning_rate']:g}, the best of {len(report['heads'])} on the test images",
        "mIoU": f"{100 * best['mean_iou']:.2f}",
        "pixel accuracy": f"{100 * best['overall_accuracy']:.2f}",
    }
    classes = {label: "" if iou is None else f"{100 * iou:.1f}" for label, iou in best["classes"].items()}
    text = f"""
A linear probe: batch norm, absorbed into the layer that follows it, and one linear layer on frozen dense features. The
licences of the vision model and of the images apply to these weights.
{"" if report["inference"] == "single" else SLIDING_NOTE}
| probing | |
|---|---|
{rows(facts)}

| class | IoU |
|---|---|
{rows(classes)}
"""
    return model_card(name, text, data)


def show(report: dict[str, Any], console: Console) -> None:
    """Print a row for each head; the best is marked."""
    table = Table(
        title=f"{report['model']}, {report['inference']}: trained on {report['train_images']} images, "
        f"tested on {report['test_images']}"
    )
    for heading in ("learning rate", "mIoU %", "pixel acc. %"):
        table.add_column(heading, justify="right")
    for head in report["heads"]:
        shown = "diverged" if head["mean_iou"] is None else f"{100 * head['mean_iou']:.2f}"
        mark = " *" if head is report["best"] else ""
        table.add_row(f"{head['learning_rate']:g}", shown + mark, f"{100 * head['overall_accuracy']:.2f}")
    console.print(table)
