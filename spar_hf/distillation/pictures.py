"""Pictures of a run: feature maps of teacher and student in the colours of one PCA, and the curves of the errors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spar_hf.utils.atomic import write_atomically

PICTURE_HEIGHT = 360  # pixels of a row


@torch.no_grad()
def feature_colours(maps: Sequence[torch.Tensor], reference: torch.Tensor) -> list[torch.Tensor]:
    """
    Feature maps as colours in 0 to 1: their first three principal components. All maps share axes and range, so equal
    features have equal colours.

    Args:
        maps (`Sequence[torch.FloatTensor]` of shapes `(dim, h, w)`): the maps.
        reference (`torch.FloatTensor` of shape `(dim, h, w)`): the map whose principal axes and range are used.

    Returns:
        a tensor `(3, h, w)` for each map.
    """
    features = reference.float().flatten(1).T  # (h * w, dim)
    mean = features.mean(0)
    _, axes = torch.linalg.eigh((features - mean).T @ (features - mean))
    axes = axes[:, -3:].flip(1)  # the largest is last: (dim, 3)
    axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # the sign that the solver returns is arbitrary
    low, high = torch.quantile((features - mean) @ axes, torch.tensor([0.01, 0.99], device=features.device), dim=0)
    colours = []
    for feature_map in maps:
        values = (feature_map.float().flatten(1).T - mean) @ axes  # (h * w, 3)
        values = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        colours.append(values.T.unflatten(1, feature_map.shape[1:]))
    return colours


def compare_features(
    images: Sequence[Image.Image], teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]
) -> Image.Image:
    """A row per image: the image, the teacher's map `(dim, h, w)` and the student's."""
    rows = []
    for image, target, found in zip(images, teacher, student, strict=True):
        panels = [image]
        for colours in feature_colours([target, found], target):
            pixels = (colours.permute(1, 2, 0) * 255).round().byte().cpu().numpy()  # (h, w, 3)
            panels.append(Image.fromarray(pixels).resize(image.size, Image.Resampling.NEAREST))
        width = max(1, round(image.width * PICTURE_HEIGHT / image.height))
        row = Image.new("RGB", (3 * width + 16, PICTURE_HEIGHT), "white")
        for i, panel in enumerate(panels):
            row.paste(panel.resize((width, PICTURE_HEIGHT), Image.Resampling.LANCZOS), (i * (width + 8), 0))
        rows.append(row)
    height = len(rows) * (PICTURE_HEIGHT + 8) - 8
    sheet = Image.new("RGB", (max(row.width for row in rows), height), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * (PICTURE_HEIGHT + 8)))
    return sheet


def draw_curve(log: Path, held_out: list[dict[str, Any]], kept: dict[str, Any] | None, path: Path) -> None:
    """
    Draw the training loss of a `log.jsonl` and the held-out errors over the steps, as the picture `path`. Points have a
    `step` and an `mse`; that of the student that is kept is marked.
    """
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
