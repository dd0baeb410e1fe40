"""The held-out error: how far the student is from the full teacher on images that are not trained on."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from spar_hf import SlidingWindowTeacher
from spar_hf.data.augmentation import Views, draw_crop, view_generator
from spar_hf.data.order import Sample
from spar_hf.data.training_images import Skipped, SkippedList, TrainingImages
from spar_hf.distillation.pictures import compare_features
from spar_hf.utils.errors import NotFinite, as_usage_errors

PICTURED = 3  # images in a picture of feature maps


@dataclass
class TeacherPair:
    """
    A whole image and the full teacher's map of it.

    Attributes:
        image: the image that the teacher saw.
        pixel_values: `(1, 3, height, width)`.
        target: `(1, dim, h, w)`.
    """

    image: Image.Image
    pixel_values: torch.Tensor
    target: torch.Tensor


@torch.no_grad()
def teach(
    samples: Iterable[Sample],
    images: TrainingImages,
    views: Views,
    teacher: SlidingWindowTeacher,
    scales_for: Callable[[tuple[float, float]], Sequence[float] | None],
    skipped: SkippedList,
    seed: int | None = None,
    progress: bool = True,
) -> list[TeacherPair]:
    """
    Run the full teacher on a view of each image. Images that cannot be read are listed in `skipped`.

    Args:
        samples, images: the images, and what reads them.
        views: how views are drawn: as in training with this `seed`, or by the same numbers for all images.
        teacher: all its windows are run.
        scales_for: of [`TeacherOptions`], which says at which sizes.
        skipped: list of unreadable images.
        progress: whether to show a progress bar.

    Raises:
        NotFinite: the teacher's features are no numbers.
        UsageError: an image is too large for the teacher's stride.
    """
    pairs, device = [], next(teacher.parameters()).device
    for sample in tqdm(samples, "full teacher", disable=not progress):
        try:
            image = images.read(sample)
        except Exception as error:  # each of Pillow's decoders raises its own kind, and no file may end a training
            skipped.add(Skipped(sample.name, str(error) or type(error).__name__))
            continue
        rng = random.Random(0) if seed is None else view_generator(seed, sample.index)
        crop = draw_crop(image.size, images.window, images.patch_size, views, rng)
        view = crop.apply(image)
        pixel_values = images.pixels(view).to(device)
        with as_usage_errors():
            target = teacher(pixel_values, scales=scales_for(crop.whole_size(image.size))).feature_map
        if not target.isfinite().all():
            raise NotFinite(f"The teacher's features of {sample.name} are not finite. Use another --mixed_precision.")
        pairs.append(TeacherPair(view, pixel_values, target))
    return pairs


def largest_views(views: Views) -> Views:
    """The largest size of a recipe, without crop, flip, jitter or CutMix: what the held-out error is measured at."""
    return replace(
        views,
        min_scale=1.0,
        crop_probability=0.0,
        flip_probability=0.0,
        jitter_probability=0.0,
        jitter_student_only=False,
        cutmix_probability=0.0,
    )


class HeldOut:
    """
    Measures the student against the full teacher.

    Args:
        pairs: held-out images and the full teacher's maps of them.
    """

    def __init__(self, pairs: list[TeacherPair]):
        self.pairs = pairs
        self.kept_maps: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.pairs)

    @torch.no_grad()
    def error(
        self,
        features: Callable[[torch.Tensor], torch.Tensor],
        keep_maps: int = 0,
        decision: Callable[[torch.Tensor, torch.Tensor], float | None] | None = None,
    ) -> dict[str, float] | None:
        """
        Mean squared error (`mse`) and mean cosine of student and teacher over all patches; `None` without images.

        Args:
            features: the student, pixel values -> feature map.
            keep_maps: of how many images to keep the student's maps for [`HeldOut.picture`].
            decision: student's and teacher's map -> a mean over patches that is reported as `words`, or `None`.
        """
        squared, cosine, words, patches, has_words = 0.0, 0.0, 0.0, 0, False
        self.kept_maps = []
        for pair in self.pairs:
            found = features(pair.pixel_values).float()
            count = pair.target.shape[-2] * pair.target.shape[-1]
            squared += float((found - pair.target).square().mean(1).sum())
            cosine += float(nn.functional.cosine_similarity(found, pair.target, dim=1).sum())
            if decision is not None and (divergence := decision(found, pair.target)) is not None:
                words, has_words = words + divergence * count, True
            patches += count
            if len(self.kept_maps) < keep_maps:
                self.kept_maps.append(found[0])
        if not patches:
            return None
        errors = {"mse": round(squared / patches, 6), "cosine": round(cosine / patches, 4)}
        return {**errors, "words": round(words / patches, 6)} if has_words else errors

    def picture(self) -> Image.Image:
        """The images whose maps were kept, beside the maps of teacher and student."""
        shown = self.pairs[: len(self.kept_maps)]
        return compare_features([pair.image for pair in shown], [pair.target[0] for pair in shown], self.kept_maps)


@dataclass
class ErrorCurve:
    """
    The held-out errors of a run.

    Attributes:
        before: of the student before training; `None` without held-out images.
        points: of later steps, with a `step` each.
        words_weight: weight of `words` beside `mse`.
    """

    before: dict[str, float] | None = None
    points: list[dict[str, Any]] = field(default_factory=list)
    words_weight: float = 0.0

    @property
    def best(self) -> dict[str, Any] | None:
        """The point of the student that is kept: the smallest loss, without whitening."""
        return min(self.points, key=self.loss, default=None)

    def loss(self, point: dict[str, Any]) -> float:
        """The loss of a point: its mean squared error, and its divergence over words times their weight."""
        return point["mse"] + self.words_weight * point.get("words", 0.0)

    def add(self, point: dict[str, Any]) -> bool:
        """
        Add a point, and say whether its student is the best and must be written. A run that was resumed may have measured
        the same step before it was killed, on another number of processes: then the better of both counts.

        Example:

        ```python
        >>> curve = ErrorCurve(points=[{"step": 1, "mse": 3.0}, {"step": 4, "mse": 1.0}])
        >>> curve.add({"step": 2, "mse": 2.0}), curve.add({"step": 4, "mse": 1.1}), curve.add({"step": 4, "mse": 0.9})
        (False, False, True)
        >>> [point["mse"] for point in curve.points]
        [3.0, 2.0, 0.9]
        ```"""
        same = [other for other in self.points if other["step"] == point["step"]]
        others = [other for other in self.points if other["step"] != point["step"]]
        self.points = sorted([*others, min([point, *same], key=self.loss)], key=itemgetter("step"))
        return self.best is point
