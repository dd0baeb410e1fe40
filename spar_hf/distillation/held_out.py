"""
Held-out images: how far the student is from the full teacher there, and what that looks like: feature maps of both in the
colours of one PCA, and the curves of the errors.
"""

import copy
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from spar_hf import SlidingWindowTeacher
from spar_hf.data.sources import Skipped, SkippedList, Ticket, TrainingImages, augment
from spar_hf.utils.atomic import write_atomically

PICTURED = 3  # images in a picture of feature maps


class HeldOut:
    """
    Held-out images at the largest size of the recipe, without crop, flip or jitter, and the full teacher's maps of them.

    Attributes:
        targets: pixel values `(1, 3, height, width)` and the teacher's map `(1, dim, h, w)` of each image.
    """

    def __init__(
        self,
        tickets: list[Ticket],
        images: TrainingImages,
        teacher: SlidingWindowTeacher,
        skipped: SkippedList,
        progress: bool = True,
    ):
        fixed = copy.copy(images.options)
        fixed.min_scale, fixed.crop_probability, fixed.flip_probability = 1.0, 0.0, 0.0
        self.targets: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.pictured: list[Image.Image] = []
        device = next(teacher.parameters()).device
        for ticket in tqdm(tickets, "full teacher", disable=not progress):
            try:
                image = images.read(ticket)
            except Exception as error:  # as for images to train on: no file may end a training
                skipped.add(Skipped(ticket.name, str(error) or type(error).__name__))
                continue
            image = augment(image, images.window, images.patch_size, fixed, random.Random(0))
            pixel_values = images.pixels(image).to(device)
            self.targets.append((pixel_values, teacher(pixel_values).feature_map))
            self.pictured += [image] if len(self.pictured) < PICTURED else []

    @torch.no_grad()
    def error(
        self,
        features: Callable[[torch.Tensor], torch.Tensor],
        keep: int = 0,
        decision: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> dict[str, float] | None:
        """
        Mean squared error and mean cosine of student and full teacher; None without images.

        Args:
            features: the student, pixel values -> feature map.
            keep: of how many images to keep the student's maps for [`HeldOut.picture`].
            decision: student's and teacher's map -> the mean over patches that is given as `words`.
        """
        squared, cosine, words, patches = 0.0, 0.0, 0.0, 0
        self.found: list[torch.Tensor] = []
        for pixel_values, target in self.targets:
            found = features(pixel_values).float()
            squared += float((found - target).square().mean(1).sum())
            cosine += float(nn.functional.cosine_similarity(found, target, dim=1).sum())
            if decision is not None:
                words += float(decision(found, target)) * target.shape[-2] * target.shape[-1]
            patches += target.shape[-2] * target.shape[-1]
            self.found += [found[0]] if len(self.found) < keep else []
        if not patches:
            return None
        errors = {"mse": round(squared / patches, 6), "cosine": round(cosine / patches, 4)}
        return errors if decision is None else {**errors, "words": round(words / patches, 6)}

    def picture(self) -> Image.Image:
        """The images whose maps were kept, beside the maps of teacher and student."""
        teacher = [target[0] for _, target in self.targets[: len(self.found)]]
        return compare_features(self.pictured[: len(self.found)], teacher, self.found)


@torch.no_grad()
def feature_colours(maps: Sequence[torch.Tensor], basis_of: torch.Tensor) -> list[torch.Tensor]:
    """
    Feature maps `(dim, h, w)` as colours `(3, h, w)` in 0 to 1: their first three principal axes, all maps in the basis and
    the range of one of them, so that equal features have equal colours.
    """
    rows = basis_of.float().flatten(1).T  # (h * w, dim)
    mean = rows.mean(0)
    _, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean))
    axes = axes[:, -3:].flip(1)  # the largest last: (dim, 3)
    axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # a sign of its own, not the solver's whim
    low, high = torch.quantile((rows - mean) @ axes, torch.tensor([0.01, 0.99], device=rows.device), dim=0)
    colours = []
    for feature_map in maps:
        values = (feature_map.float().flatten(1).T - mean) @ axes  # (h * w, 3)
        values = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        colours.append(values.T.unflatten(1, feature_map.shape[1:]))
    return colours


def compare_features(
    images: Sequence[Image.Image], teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor], side: int = 360
) -> Image.Image:
    """A row per image: the image, the teacher's map `(dim, h, w)`, the student's, all `side` pixels high."""
    rows = []
    for image, target, found in zip(images, teacher, student, strict=True):
        panels = [image]
        for colours in feature_colours([target, found], target):
            pixels = (colours.permute(1, 2, 0) * 255).round().byte().cpu().numpy()  # (h, w, 3)
            panels.append(Image.fromarray(pixels).resize(image.size, Image.Resampling.NEAREST))
        width = max(1, round(image.width * side / image.height))
        panels = [panel.resize((width, side), Image.Resampling.LANCZOS) for panel in panels]
        row = Image.new("RGB", (3 * width + 16, side), "white")
        for i, panel in enumerate(panels):
            row.paste(panel, (i * (width + 8), 0))
        rows.append(row)
    sheet = Image.new("RGB", (max(row.width for row in rows), len(rows) * (side + 8) - 8), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * (side + 8)))
    return sheet


@torch.no_grad()
def whole_images(
    tickets: list[Ticket], images: TrainingImages, teacher: SlidingWindowTeacher, skipped: SkippedList
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Images at the random sizes of training but not cropped, as they are used later, and the full teacher's maps of them:
    `(1, 3, height, width)` and `(1, dim, h, w)` each. Those that cannot be read are listed.
    """
    whole, pairs, device = copy.copy(images), [], next(teacher.parameters()).device
    whole.options = copy.copy(images.options)
    whole.options.crop_probability = 0.0
    for ticket in tqdm(tickets, "full teacher"):
        sample = whole[ticket]
        if isinstance(sample, Skipped):
            skipped.add(sample)
            continue
        pixel_values = sample.pixel_values.to(device)
        pairs.append((pixel_values, teacher(pixel_values).feature_map))
    return pairs


def draw_curve(log: Path, held_out: list[dict[str, Any]], kept: dict[str, Any] | None, path: Path) -> None:
    """The training loss of `log.jsonl` and the held-out errors over the steps, the kept student's marked, as a picture."""
    from matplotlib.figure import Figure  # a second of import, once at the end; a figure by itself needs no display

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="0.6", label="training loss")
    if kept is not None:
        steps, errors = [point["step"] for point in held_out], [point["mse"] for point in held_out]
        axes.plot(steps, errors, "o-", color="C0", label="held-out mean squared error")
        axes.plot(kept["step"], kept["mse"], "o", color="C3", label=f"the student kept (step {kept['step']})")
    axes.set_xlabel("optimizer step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
