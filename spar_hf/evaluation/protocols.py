"""
Published evaluations by name: working resolution, templates, scale, background rules and words.

A protocol fills in the options that a user leaves open.
"""

from collections.abc import Callable
from dataclasses import dataclass

from spar_hf.data.benchmarks import BENCHMARKS
from spar_hf.utils.errors import UsageError


@dataclass(frozen=True)
class Protocol:
    """
    Settings of a published evaluation. `None` leaves a setting to the checkpoint or to the data set.

    Attributes:
        size: working resolution as the image processor takes it; lengths in pixels.
        resample: how images are resized, see `candidates.Candidate`.
        window_size: side of sliding windows in pixels.
        templates: name of the prompt templates.
        scale: factor of the cosines before the softmax. It changes probabilities, but not which name is the best.
        threshold: pixels whose best probability is below this become background.
        min_area: before that, classes that win at most this share of the pixels outside the background are excluded; see
            `inference.decide_as_published`.
        scores: what the softmax runs over, `"classes"` or `"names"`; the thresholds belong to it.
        vocabulary: built-in vocabulary with the words for the classes.
        dilation_ratio: width of boundaries as a share of the image diagonal, see `iou.count_boundaries`.
    """

    size: dict[str, int] | None = None
    resample: str | None = None
    window_size: int | None = None
    templates: str | None = None
    scale: float | None = None
    threshold: float = 0.0
    min_area: float = 0.0
    scores: str = "classes"
    vocabulary: str | None = None
    dilation_ratio: float = 0.02


def spar(benchmark: str | None, readout: str) -> Protocol:
    """
    The evaluation of SPAR (arXiv 2604.02252, section 4, and its code) on a benchmark, or on another data set (`None`).

    The shorter side is 672 px (Cityscapes: 1024), the longer side at most 2048, resized by bilinear interpolation without
    antialiasing. (Antialiased bicubic interpolation, the default elsewhere, keeps more of the image.) Prompts are the 80
    ImageNet templates; compound names are written together in all sets but COCO and MESS. Sliding windows are the model's
    `image_size` wide, those of DINOv3, which has no position table, 384 px. The scale is 40; for VOC21 it is 65, and
    with the MaskCLIP read-out the probability and area thresholds are 0.1; for Context60 it is 50 and the probability
    threshold is 0.1. The softmax runs over all names, synonyms included. Boundary IoU is not part of it; its width
    follows Cheng et al. (2021).

    Example:

    ```python
    >>> spar("context60", "siglip").scale, spar("context60", "siglip").threshold
    (50.0, 0.1)
    ```"""
    renamed = ("voc20", "voc21", "context59", "context60", "cityscapes", "ade20k")
    words = {name: f"{name}-spar" for name in renamed}
    if benchmark in BENCHMARKS:
        words.setdefault(benchmark, BENCHMARKS[benchmark].vocabulary)
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
        resample="bilinear",
        window_size=384 if readout.startswith("dinov3") else None,
        templates="imagenet80",
        scores="names",
        vocabulary=None if benchmark is None else words.get(benchmark, benchmark),
        **rules,
    )


PROTOCOLS: dict[str, Callable[[str | None, str], Protocol]] = {"spar": spar}


def find_protocol(name: str | None, benchmark: str | None = None, readout: str = "") -> Protocol:
    """
    The protocol of this name for a benchmark and for models with this read-out. Without a name, one that sets nothing.

    Raises:
        UsageError: there is no protocol of this name.
    """
    if name is None:
        return Protocol()
    if name not in PROTOCOLS:
        raise UsageError(f"There is no protocol {name!r}; use one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name](benchmark, readout)
