"""
How published evaluations run a model: working resolution, templates, scale, background rules, words, by name.

A protocol only fills in what a user leaves open.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """
    Settings of one evaluation.

    Attributes:
        size: working resolution as the image processor takes it; lengths in pixels.
        templates: name of the prompt templates.
        scale: factor of the cosines before the softmax. It moves probabilities, never the best name.
        threshold: pixels whose best probability is below it become background.
        min_area: classes that win at most this share of what is not background are struck off before that, and their
            pixels go to the best class that is left; see `inference.decide_as_published`.
        vocabulary: built-in vocabulary with the words for the classes; `None` for the set's own names.
        dilation_ratio: width of boundaries in diagonals, see `BoundaryIoU`.
    """

    size: dict[str, int]
    templates: str
    scale: float
    threshold: float = 0.0
    min_area: float = 0.0
    vocabulary: str | None = None
    dilation_ratio: float = 0.02


def spar(benchmark: str | None, readout: str) -> Protocol:
    """
    The evaluation of SPAR (arXiv 2604.02252, section 4 and its code) on a benchmark, or on any other set (`None`).

    Short side 672 (Cityscapes 1024), long side at most 2048, the 80 ImageNet templates. The scale is 40; VOC21 has 65, and
    with MaskCLIP probability and area thresholds of 0.1; Context60 has 50 and a probability threshold of 0.1.
    Boundaries are no part of it; their width is that of Cheng et al. (2021).
    """
    words = {name: f"{name}-spar" for name in ("voc20", "voc21", "context59", "context60", "cityscapes")}
    rules: dict[str, float] = {"scale": 40.0}
    if benchmark == "voc21":
        rules = {"scale": 65.0}
        if readout == "maskclip":
            rules |= {"threshold": 0.1, "min_area": 0.1}
    elif benchmark == "context60":
        rules = {"scale": 50.0, "threshold": 0.1}
    elif benchmark == "cityscapes":
        rules |= {"dilation_ratio": 0.005}
    return Protocol(
        size={"shortest_edge": 1024 if benchmark == "cityscapes" else 672, "longest_edge": 2048},
        templates="imagenet80",
        vocabulary=None if benchmark is None else words.get(benchmark, benchmark),
        **rules,
    )


PROTOCOLS: dict[str, Callable[[str | None, str], Protocol]] = {"spar": spar}
