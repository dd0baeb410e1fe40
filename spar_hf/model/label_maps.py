"""The decision for an image as the pipeline returns it: a label map with pixels and scores per class."""

import torch

from .segmentation import DenseLogits, LabelMap, class_probabilities, decide, give_to_background


def map_result(
    logits: DenseLogits,
    name_to_class: torch.Tensor,
    geometry: tuple[int, tuple[int, int], tuple[int, int]],
    classes: int,
    background: int = -1,
    threshold: float = 0.0,
    min_area: float = 0.0,
    top_k: int | None = None,
) -> dict[str, torch.Tensor]:
    """
    The decision for an image.

    Args:
        logits, name_to_class: as in [`decide`]; without names all pixels are background.
        geometry: side of a cell, working size, size of the image: the further arguments of [`decide`].
        classes: number of classes, with those that have no names.
        background: number of the background class.
        threshold, min_area: as in [`give_to_background`].
        top_k: how many of the best classes of every pixel are added, before pixels are moved to the background.

    Returns:
        `map` and, per class, `pixels` and `scores`; with `top_k` also `top_map` and `top_probabilities`.
    """
    top: dict[str, torch.Tensor] = {}
    if not len(name_to_class):
        labels = torch.full(geometry[2], background, dtype=torch.int32, device=name_to_class.device)
        decision = LabelMap(labels, torch.ones(geometry[2], device=labels.device))
    else:
        decision = decide(logits, name_to_class, *geometry)
    if top_k:
        if len(name_to_class):
            best = class_probabilities(logits, name_to_class, *geometry, top_k=top_k, classes=classes)
        else:  # all pixels are background; the other classes follow with a probability of 0
            order = [background, *(number for number in range(classes) if number != background)][:top_k]
            numbers = torch.tensor(order, dtype=torch.int32, device=decision.labels.device)[:, None, None]
            shares = (numbers == background).to(decision.probabilities.dtype)
            best = (numbers.expand(-1, *geometry[2]).clone(), shares.expand(-1, *geometry[2]).clone())
        top = dict(zip(("top_map", "top_probabilities"), best, strict=True))
    if threshold or min_area:
        decision = give_to_background(decision, background, threshold, min_area)
    pixels, scores = decision.class_scores(classes)
    return {"map": decision.labels, "pixels": pixels, "scores": scores, **top}
