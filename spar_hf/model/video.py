"""Segmentation of the frames of a video: features are averaged over time, so that labels do not flicker."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .image_streams import EncodedImage, several_images
from .results import guarded, is_error

SCENE_CUT = 0.5  # mean cosine to the frame before; a frame below it begins a new scene


class FrameAverage:
    """
    Exponential average over time of the unit features of frames. Logits are linear in unit features, so it is an average of
    patch logits, in the memory of one frame for any number of words.

    A patch continues the average of the patch of the frame before that it looks most alike, among those at most `motion`
    patches away. The average counts less the less they look alike, so that what comes into view is not painted over. At a
    scene cut, or when the size of the frames changes, it starts anew.

    Args:
        smoothing: weight of the past, from 0 (none) to below 1.
        motion: how far things may move from frame to frame, in patches; 0 compares each patch with itself.
        scene_cut: mean cosine of a frame to the one before, below which a new scene begins.

    Attributes:
        cuts: number of scene cuts so far.

    Raises:
        ValueError: an argument is out of range.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline
    >>> import spar_hf

    >>> segment, average = pipeline("open-vocab-segmentation"), FrameAverage(smoothing=0.6)
    >>> frames = [Image.new("RGB", (96, 64), colour) for colour in ("skyblue", "lightblue")]
    >>> [average(segment.encode(frame)).feature_map.shape for frame in frames]
    [torch.Size([192, 24, 36]), torch.Size([192, 24, 36])]
    ```"""

    def __init__(self, smoothing: float = 0.6, motion: int = 1, scene_cut: float = SCENE_CUT):
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} must be at least 0 and below 1; 0 takes every frame by itself.")
        if motion < 0 or motion != int(motion):
            raise ValueError(f"motion={motion} must be a whole number of patches, 0 or more.")
        if not -1 <= scene_cut <= 1:
            raise ValueError(f"scene_cut={scene_cut} is a cosine: give -1 (no cuts) to 1.")
        self.smoothing, self.motion, self.scene_cut, self.cuts = smoothing, int(motion), scene_cut, 0
        self._before: torch.Tensor | None = None  # unit features of the frame before, (dim, h, w)
        self._average: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, frame: EncodedImage) -> EncodedImage:
        """The frame with the averaged features, `(dim, h, w)` float32."""
        unit = nn.functional.normalize(frame.feature_map.float(), dim=0)
        if self._before is None or self._average is None or self._before.shape != unit.shape:
            average = unit
        else:
            past, likeness = self._follow(unit, self._before, self._average)
            if float(likeness.mean()) < self.scene_cut:
                self.cuts += 1
                average = unit
            else:
                weight = self.smoothing * likeness.clamp(min=0)
                average = weight * past + (1 - weight) * unit
        self._before, self._average = unit, average
        return dataclasses.replace(frame, feature_map=average)

    def _follow(
        self, unit: torch.Tensor, before: torch.Tensor, average: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The average at the most similar patch of the frame before, `(dim, h, w)`, and the cosine to it, `(h, w)`."""
        best = torch.full(unit.shape[1:], -torch.inf, device=unit.device)
        past = torch.empty_like(average)
        height, width = unit.shape[1:]
        reach = range(-self.motion, self.motion + 1)
        # the nearest shifts first: of equal patches the one in place wins
        for down, right in sorted(((i, j) for i in reach for j in reach), key=lambda s: s[0] ** 2 + s[1] ** 2):
            here = _overlap(height, down), _overlap(width, right)
            there = _overlap(height, -down), _overlap(width, -right)
            likeness = (unit[:, *here] * before[:, *there]).sum(0)
            better = likeness > best[here]
            best[here] = torch.where(better, likeness, best[here])
            past[:, *here] = torch.where(better, average[:, *there], past[:, *here])
        return past, best


def _overlap(length: int, shift: int) -> slice:
    """
    Places along an axis that are still on it when moved back by `shift`.

    Example:

    ```python
    >>> _overlap(5, 2), _overlap(5, -2)
    (slice(2, 5, None), slice(0, 3, None))
    ```"""
    return slice(max(shift, 0), max(0, length + min(shift, 0)))


class FrameStreams:
    """The method `stream` of the pipeline."""

    def stream(
        self,
        frames: Iterable[Any],
        candidate_labels: Any = None,
        smoothing: float = 0.6,
        motion: int = 1,
        scene_cut: float = SCENE_CUT,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """
        Segment the frames of a video, one after the other, in the memory of one frame.

        Args:
            frames (`Iterable`): images in the order of time, in any form that the pipeline takes; read as they are needed.
            candidate_labels: the classes, as in the call.
            smoothing (`float`, *optional*, defaults to 0.6): weight of the past, see [`FrameAverage`]; 0 for none.
            motion (`int`, *optional*, defaults to 1): how far things may move from frame to frame, in patches.
            scene_cut (`float`, *optional*, defaults to 0.5): similarity of two frames below which a new scene begins.
            kwargs: `size`, `background`, `output` and others, as in the call; not `tile`.

        Returns:
            An iterator over the results of the frames, each as of one image.

        Raises:
            ValueError: an argument is out of range, `tile` or a single image is given; when a frame is read, one that is no
                image, unless `on_error="skip"`.

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers import pipeline
        >>> import spar_hf

        >>> segment = pipeline("open-vocab-segmentation")
        >>> frames = (Image.new("RGB", (96, 64), (90, 140, blue)) for blue in (200, 210, 220))
        >>> [found["map"].shape for found in segment.stream(frames, ["sky", "road"], output="map")]
        [(64, 96), (64, 96), (64, 96)]
        ```"""
        if kwargs.get("tile") is not None:
            raise ValueError("Frames are not read in tiles: leave out `tile`, and set `size` for large frames.")
        average = FrameAverage(smoothing, motion, scene_cut)
        reading = {name: kwargs.pop(name, None) for name in ("size", "max_tokens", "image_range")}
        pipe: Any = self
        many = several_images(frames, "The frames of a stream")
        skip = (kwargs.get("on_error") or pipe._preprocess_params.get("on_error")) == "skip"
        encoded = (guarded(skip, pipe.encode, frame, **reading) for frame in many)
        # words and options are checked once, before the first frame is read
        results = pipe((frame if is_error(frame) else average(frame) for frame in encoded), candidate_labels, **kwargs)
        return iter(results)
