"""What the student regresses onto, as losses."""

import torch
from torch import nn


def distillation_loss(student: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mean squared error of feature maps `(batch, dim, h, w)`; with the cells and weights of
    [`SlidingWindowTeacher.sample`] instead of a full target its gradient is that of the full error on average.
    """
    if weight is None:
        return nn.functional.mse_loss(student, target)
    r = target.shape[-1] // student.shape[-1]
    cells = student.repeat_interleave(r, 2).repeat_interleave(r, 3)  # (batch, dim, h, w) -> (batch, dim, h * r, w * r)
    return ((cells - target).square() * weight).sum() / student.numel()


def decision_loss(
    student: torch.Tensor, target: torch.Tensor, texts: torch.Tensor, scale: float, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the student's softmax over words from the teacher's, mean over patches; arguments as of
    [`distillation_loss`], and texts `(names, dim)` of unit length. Needs words, but no labels.

    The offset that all features share is far larger than what tells two classes apart, so features that are near in the
    mean squared error still decide otherwise.
    """
    logits = [
        torch.einsum("bdhw,nd->bnhw", nn.functional.normalize(x, dim=1), texts) * scale for x in (student, target)
    ]
    r = target.shape[-1] // student.shape[-1]
    found = logits[0].log_softmax(1).repeat_interleave(r, 2).repeat_interleave(r, 3)
    divergence = nn.functional.kl_div(found, logits[1].log_softmax(1), reduction="none", log_target=True)
    divergence = divergence.sum(1) if weight is None else divergence.sum(1) * weight
    return divergence.sum() / student[:, 0].numel()


@torch.no_grad()
def error_weights(targets: list[torch.Tensor], power: float) -> torch.Tensor:
    """
    The symmetric matrix `(dim, dim)` that scales each principal axis of the features by its variance to minus `power / 2`;
    a thousandth of the whole variance is added to each, so that axes of mere noise do not count.

    Where most variance lies along a few axes that tell little of what a pixel is (light, place), a plain mean squared
    error is small long before the student tells classes apart.
    """
    features = torch.cat([target.flatten(2).transpose(1, 2).flatten(0, 1) for target in targets])  # (patches, dim)
    variance, axes = torch.linalg.eigh(torch.cov(features.T))
    variance = variance.clamp(min=0) + 1e-3 * variance.sum()
    weights = (axes * variance ** (-power / 2)) @ axes.T
    return weights / weights.diagonal().square().mean().sqrt()
