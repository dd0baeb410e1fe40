"""What the student regresses onto, as losses."""

import torch
from torch import nn


class DistillationLoss:
    """
    The loss of one image: [`distillation_loss`], and [`decision_loss`] if there are texts.

    Args:
        whitening (`torch.FloatTensor` of shape `(dim, dim)`, *optional*): applied to all features before the mean squared
            error, see [`error_weights`].
        texts, scale: of [`decision_loss`].
        words_weight (`float`, *optional*, defaults to 0.0): weight of that term.
    """

    def __init__(
        self,
        whitening: torch.Tensor | None = None,
        texts: torch.Tensor | None = None,
        scale: float = 1.0,
        words_weight: float = 0.0,
    ):
        self.whitening, self.texts, self.scale, self.words_weight = whitening, texts, scale, words_weight

    def __call__(self, student: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """A scalar; arguments as of [`distillation_loss`]."""
        if self.whitening is not None:
            student, target = (torch.einsum("ij,bjhw->bihw", self.whitening, x) for x in (student, target))
        loss = distillation_loss(student, target, weight)
        if self.texts is not None:
            loss = loss + self.words_weight * decision_loss(student, target, self.texts, self.scale, weight)
        return loss

    def decision(self, student: torch.Tensor, target: torch.Tensor) -> float | None:
        """The unweighted [`decision_loss`] of two feature maps; `None` without texts."""
        return None if self.texts is None else float(decision_loss(student, target, self.texts, self.scale))


def distillation_loss(student: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mean squared error of feature maps.

    Args:
        student (`torch.FloatTensor` of shape `(batch, dim, h, w)`): features of patches.
        target (`torch.FloatTensor` of shape `(batch, dim, h * r, w * r)`): the full teacher's map, `r` = 1, or the cells
            that [`SlidingWindowTeacher.sample`] returned.
        weight (`torch.FloatTensor` of shape `(h * r, w * r)`, *optional*): the cells' weights, returned with them. The
            gradient then equals that of the full error on average.
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
    Kullback-Leibler divergence of the student's class probabilities from the teacher's, mean over patches. Needs names of
    classes, but no labels.

    All features share an offset that is far larger than the differences between classes, so a small mean squared error alone
    does not mean equal decisions.

    Args:
        student, target, weight: as of [`distillation_loss`].
        texts (`torch.FloatTensor` of shape `(names, dim)`): text embeddings of unit length.
        scale (`float`): multiplies the cosines before the softmax.
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
    The symmetric matrix `(dim, dim)` that scales each principal axis of the features by its variance to minus `power / 2`. A
    thousandth of the total variance is added to each axis, so that pure noise has little weight.

    Where most variance lies along a few axes that say little about the class of a pixel (light, position), a plain mean
    squared error is small long before the student tells classes apart.

    Args:
        targets (`list[torch.FloatTensor]` of shapes `(1, dim, h, w)`): feature maps of the teacher.
        power (`float`): 0 changes nothing, 1 makes all variances equal.
    """
    features = torch.cat([target.flatten(2).transpose(1, 2).flatten(0, 1) for target in targets])  # (patches, dim)
    variance, axes = torch.linalg.eigh(torch.cov(features.T))
    variance = variance.clamp(min=0) + 1e-3 * variance.sum()
    weights = (axes * variance ** (-power / 2)) @ axes.T
    return weights / weights.diagonal().square().mean().sqrt()
