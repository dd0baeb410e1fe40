"""Losses of the pre-training: a softmax over names at each pixel, or over names of whole images."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spar_hf.data.segmentation_sets import IGNORE_INDEX
from spar_hf.pretraining.crops import CropSet
from spar_hf.pretraining.options import UNNAMED_WEIGHT, TrainingOptions
from spar_hf.pretraining.words import PROMPT_TEMPLATES

FOREIGN = -1  # class of a prompt whose word belongs to another set


@dataclass
class Prompts:
    """
    The prompts that a set is compared with in one step.

    Attributes:
        texts: one prompt per column of the logits.
        targets: of a set with masks the class behind each column, `FOREIGN` for words of other sets, which are wrong
            answers; of tagged images the right column of each image.
    """

    texts: list[str]
    targets: list[int]


def draw_prompts(
    sets: list[CropSet], labels: list[torch.Tensor], options: TrainingOptions, rng: random.Random
) -> list[Prompts]:
    """The prompts of one step for each set, given the labels of its crops."""
    drawn = []
    for crop_set, label in zip(sets, labels, strict=True):
        if crop_set.masks is None:
            words, targets = _words_of_images(crop_set, label, options, rng)
        else:
            words, targets = _words_of_classes(crop_set, sets, label, options, rng)
        drawn.append(Prompts([rng.choice(PROMPT_TEMPLATES).format(word) for word in words], targets))
    return drawn


def _words_of_images(
    crop_set: CropSet, label: torch.Tensor, options: TrainingOptions, rng: random.Random
) -> tuple[list[str], list[int]]:
    """Words of the images in the batch and of some others, and the right word's number for each image."""
    right = [rng.choice(crop_set.names[int(i)]) for i in label]
    count = min(options.tagged_names, len(crop_set.names))
    others = [rng.choice(names) for names in rng.sample(crop_set.names, count)]
    words = sorted(set(right) | set(others))
    return words, [words.index(word) for word in right]


def _words_of_classes(
    crop_set: CropSet, sets: list[CropSet], label: torch.Tensor, options: TrainingOptions, rng: random.Random
) -> tuple[list[str], list[int]]:
    """
    A word of each class in the crops, of other classes of the set, and of other sets; and the class of each word.

    Every second time the word of the unnamed class is among those of other sets, so that its pixels learn it too, and stay
    apart from the named classes without it.
    """
    present = [int(c) for c in label.unique() if c not in (IGNORE_INDEX, crop_set.unnamed)]
    rest = [c for c, names in enumerate(crop_set.names) if names and c not in present]
    rng.shuffle(rest)
    classes = present + rest[: max(0, options.names_per_set - len(present))]
    words = [rng.choice(crop_set.names[c]) for c in classes]
    own, word_of_rest = {word for names in crop_set.names for word in names}, crop_set.unnamed_word
    foreign = {rng.choice(names) for s in sets if s is not crop_set for names in s.names if names}
    # "traffic light" could be right where the set calls something "light"
    apart = [w for w in sorted(foreign - own - {word_of_rest}) if not any(part in own for part in w.split())]
    apart = rng.sample(apart, min(options.foreign_names, len(apart)))
    if word_of_rest is not None and rng.random() < 0.5:
        apart.append(word_of_rest)
    return words + apart, classes + [FOREIGN] * len(apart)


def pixel_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    classes: torch.Tensor,
    class_weights: torch.Tensor,
    unnamed: int | None = None,
    unnamed_weight: float = UNNAMED_WEIGHT,
) -> torch.Tensor:
    """
    Weighted mean of the cross entropy over labelled pixels; 0 if all pixels are ignored.

    A pixel of the unnamed class belongs to none of the set's other classes, so any word of another set is right: the loss
    there is minus the log of the probability of all foreign words together.

    Args:
        logits: `(crops, columns, grid, grid)`.
        labels: class of each pixel `(crops, grid, grid)`, 255 ignored.
        classes: class behind each column `(columns,)`, `FOREIGN` for words of other sets.
        class_weights: weight of a pixel of each class `(classes,)`.
        unnamed: the unnamed class, if the set has one.
        unnamed_weight: weight of its pixels.
    """
    named = classes >= 0
    column = torch.full((256,), -100)  # of each class; -100 is ignored by the cross entropy
    column[classes[named]] = torch.arange(int(named.sum()))
    weights = torch.ones(len(classes))
    weights[named] = class_weights[classes[named]]
    targets, weights = column.to(labels.device)[labels], weights.to(labels.device)
    loss = nn.functional.cross_entropy(logits, targets, weights, reduction="sum")
    total = (weights[targets.clamp(min=0)] * (targets >= 0)).sum()
    if unnamed is not None and not named.all():
        foreign = (~named).to(logits.device)
        to_foreign = logits.logsumexp(1) - logits[:, foreign].logsumexp(1)  # (crops, grid, grid)
        pixels = (labels == unnamed) * unnamed_weight
        loss, total = loss + (to_foreign * pixels).sum(), total + pixels.sum()
    return loss / total.clamp(min=1e-6)


def step_loss(
    towers: nn.Module,
    tokenizer: Any,
    sets: list[CropSet],
    groups: list[tuple[torch.Tensor, torch.Tensor]],
    options: TrainingOptions,
    rng: random.Random,
    device: torch.device,
    anchor: nn.Module | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The loss of one step, and that of each set. Each tower runs once, over all sets together.

    Args:
        towers: [`Towers`], perhaps wrapped by accelerate, on `device`; `tokenizer` is that of the text tower.
        groups: pixels and labels of every set, from [`CropBatches`].
        options: how many names are compared, and the weight of the distance from the anchor's features; `rng` draws names
            and their templates.
        anchor: the vision tower that the training started from; `None` leaves the distance out.
    """
    labels = [label for _, label in groups]
    prompts = draw_prompts(sets, labels, options, rng)
    texts = [text for of_set in prompts for text in of_set.texts]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    pixels = torch.cat([of_set for of_set, _ in groups]).to(device)
    outputs = towers(pixels, tokens["input_ids"].to(device))
    scale, counts = outputs["dense_logit_scale"], [len(label) for label in labels]
    embeddings = outputs["text_embeds"].split([len(of_set.texts) for of_set in prompts])
    features, pooled = outputs["feature_map"].split(counts), outputs["pooler_output"].split(counts)
    loss, parts = torch.zeros((), device=device), {}
    for i, (crop_set, of_set, label) in enumerate(zip(sets, prompts, labels, strict=True)):
        label = label.to(device)
        text = nn.functional.normalize(embeddings[i].float(), dim=-1)
        targets = torch.tensor(of_set.targets)
        if crop_set.masks is None:
            image = nn.functional.normalize(pooled[i].float(), dim=-1)
            part = nn.functional.cross_entropy(image @ text.T * scale, targets.to(device))
        else:
            dense = nn.functional.normalize(features[i].float(), dim=1)
            logits = torch.einsum("bdhw,nd->bnhw", dense, text) * scale
            logits = nn.functional.interpolate(logits, size=label.shape[-2:], mode="bilinear")
            part = pixel_loss(logits, label, targets, crop_set.class_weights, crop_set.unnamed, crop_set.unnamed_weight)
        loss = loss + part * counts[i] / sum(counts)
        parts[f"set{i}"] = part.detach()
    if anchor is not None:
        with torch.no_grad():
            before = anchor(pixels).feature_map.float()
        distance = nn.functional.mse_loss(outputs["feature_map"].float(), before)
        loss = loss + distance * options.anchor_weight
        parts["anchor"] = distance.detach()
    return loss, parts
