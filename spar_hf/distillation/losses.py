"""What the student regresses onto, as losses."""

from collections.abc import Sequence

import torch
from torch import nn


class DistillationLoss:
    """
    The loss of one image: [`distillation_loss`], and the mean [`decision_loss`] of the vocabularies if there are any.

    Args:
        whitening (`torch.FloatTensor` of shape `(dim, dim)`, *optional*): applied to all features before the mean squared
            error, see [`error_weights`].
        vocabularies (`list[torch.FloatTensor]` of shapes `(names, dim)`): text embeddings of unit length, one tensor for
            each vocabulary.
        scale, balance: of [`decision_loss`].
        words_weight (`float`, *optional*, defaults to 0.0): weight of that term.
    """

    def __init__(
        self,
        whitening: torch.Tensor | None = None,
        vocabularies: Sequence[torch.Tensor] = (),
        scale: float = 1.0,
        words_weight: float = 0.0,
        balance: float = 0.0,
    ):
        self.whitening, self.vocabularies, self.scale = whitening, vocabularies, scale
        self.words_weight, self.balance = words_weight, balance

    def __call__(self, student: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """A scalar; arguments as of [`distillation_loss`]."""
        own, wanted = student, target
        if self.whitening is not None:
            own, wanted = (torch.einsum("ij,bjhw->bihw", self.whitening, x) for x in (student, target))
        loss = distillation_loss(own, wanted, weight)
        for texts in self.vocabularies:
            words = decision_loss(student, target, texts, self.scale, weight, self.balance)
            loss = loss + self.words_weight / len(self.vocabularies) * words
        return loss

    def decision(self, student: torch.Tensor, target: torch.Tensor) -> float | None:
        """The mean [`decision_loss`] of two feature maps, all patches weighted alike; `None` without vocabularies."""
        losses = [float(decision_loss(student, target, texts, self.scale)) for texts in self.vocabularies]
        return sum(losses) / len(losses) if losses else None


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
    student: torch.Tensor,
    target: torch.Tensor,
    texts: torch.Tensor,
    scale: float,
    weight: torch.Tensor | None = None,
    balance: float = 0.0,
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
        balance (`float`, *optional*, defaults to 0.0): power of [`rarity`], which weighs the patches.
    """
    logits = [
        torch.einsum("bdhw,nd->bnhw", nn.functional.normalize(x, dim=1), texts) * scale for x in (student, target)
    ]
    r = target.shape[-1] // student.shape[-1]
    found = logits[0].log_softmax(1).repeat_interleave(r, 2).repeat_interleave(r, 3)
    wanted = logits[1].log_softmax(1)
    divergence = nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(1)  # (batch, h * r, w * r)
    if balance:
        divergence = divergence * rarity(wanted.exp(), balance, weight)
    if weight is not None:
        divergence = divergence * weight
    return divergence.sum() / student[:, 0].numel()


def rarity(probabilities: torch.Tensor, power: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """
    Weights `(batch, h, w)` of mean 1 that are larger where the classes are rare in the image: a class that covers a share
    `s` of it counts `s ** -power`. Else a traffic sign of three patches hardly counts beside the sky.

    Args:
        probabilities (`torch.FloatTensor` of shape `(batch, classes, h, w)`): of each class at each place.
        power (`float`): 0 weighs all places alike; with 1 each class of an image weighs about as much as any other.
        weight (`torch.FloatTensor` of shape `(h, w)`, *optional*): how much each place counts in the shares and in the mean.

    Example:

    ```python
    >>> one_hot = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]])  # three places of a class, one of another
    >>> rarity(one_hot, 1.0)
    tensor([[[0.6667, 0.6667, 0.6667, 2.0000]]])
    ```"""
    weight = probabilities.new_ones(probabilities.shape[-2:]) if weight is None else weight
    shares = (probabilities * weight).sum((2, 3), keepdim=True) / weight.sum()  # (batch, classes, 1, 1)
    weights = (probabilities * shares.clamp(min=1e-6) ** -power).sum(1)
    return weights * weight.sum() / (weights * weight).sum((1, 2), keepdim=True)


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
