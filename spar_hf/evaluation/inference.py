"""Ways of running a model on an image: one pass, sliding windows over features or logits, refined; with time and memory."""

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from spar_hf import SparForOpenVocabSegmentation, SparProcessor
from spar_hf.model.modeling_spar import SparVisionModelOutput, pad_to_patches
from spar_hf.model.prompts import Vocabulary, embed_names
from spar_hf.model.refine import refined_logits
from spar_hf.model.segmentation import WORKING_BYTES, LabelMap, decide, give_to_background
from spar_hf.teacher import SlidingWindowTeacher

WAYS = "NAME:single or NAME:sliding:STRIDE, with +REFINEMENT at the end if wanted, or NAME:sliding-logits:STRIDE"


@dataclass(frozen=True)
class Run:
    """
    One line of the table: a model and how it runs.

    Attributes:
        model: the name it was given.
        stride: step of its sliding window in pixels; `None` for one pass.
        average: what windows are averaged in. `"features"`, as in training (SPAR, section 3), or `"logits"`, as in the
            published evaluation of sliding windows.
        refinement: name of a refinement of the logits, see `spar_hf.model.refine`.
    """

    model: str
    stride: int | None = None
    average: str = "features"
    refinement: str | None = None

    @property
    def inference(self) -> str:
        """The way in words."""
        way = "single pass" if self.stride is None else f"sliding, stride {self.stride}"
        if self.average == "logits":
            way += ", mean of logits"
        return way if self.refinement is None else f"{way}, {self.refinement}"


def parse_models(items: Sequence[str]) -> dict[str, str]:
    """
    `NAME=FOLDER` or `FOLDER` -> `{name: folder}`; a folder without a name is called as it is.

    Raises:
        ValueError: two models of one name, or a name with a colon.
    """
    models: dict[str, str] = {}
    for item in items:
        name, separator, folder = item.partition("=")
        if not separator or Path(item).is_dir():  # a folder may have an equals sign in its own name
            name, folder = Path(item).name, item
        if name in models or ":" in name or not name or not folder:
            raise ValueError(
                f"Cannot call a model {name!r} in --model {item}: use NAME=FOLDER, with names that differ."
            )
        models[name] = folder
    return models


def parse_runs(items: Sequence[str] | None, models: dict[str, str]) -> list[Run]:
    """
    `NAME:single`, `NAME:sliding:STRIDE` (mean of features), `NAME:sliding-logits:STRIDE` (mean of logits) -> runs, in the
    same order. The first two may end in `+REFINEMENT`: `NAME:single+lposs`.

    Raises:
        ValueError: another form, a stride of 0, a refinement of `sliding-logits` (it has no features to refine by), a name
            that no model has, or a run that stands twice.
    """
    runs: list[Run] = []
    for item in items or [f"{name}:single" for name in models]:
        # the name is what stands before the first colon: it may hold a plus
        name, _, way = item.partition(":")
        way, plus, refinement = way.partition("+")
        kind, *stride = way.split(":")
        sliding = kind in ("sliding", "sliding-logits") and len(stride) == 1 and stride[0].isdecimal()
        if not (way == "single" or sliding) or bool(plus) != bool(refinement):
            raise ValueError(f"Cannot read --runs {item}: write {WAYS}, e.g. base:sliding:24.")
        if kind == "sliding-logits" and refinement:
            raise ValueError(f"--runs {item}: refinements go by features, and a mean of logits has none; use sliding.")
        if sliding and int(stride[0]) < 1:
            raise ValueError(f"--runs {item}: a stride is 1 pixel or more.")
        if name not in models:
            raise ValueError(f"--runs {item} names no model of --model; there are {sorted(models)}.")
        average = "logits" if kind == "sliding-logits" else "features"
        run = Run(name, int(stride[0]) if sliding else None, average, refinement or None)
        if run in runs:
            raise ValueError(f"--runs {item} stands twice.")
        runs.append(run)
    return runs


@dataclass(frozen=True)
class Rules:
    """
    How logits become classes: scale of the cosines (`None`: the checkpoint's) and the rules for the background, see
    [`decide_as_published`].
    """

    scale: float | None = None
    threshold: float = 0.0
    min_area: float = 0.0


@dataclass
class Candidate:
    """A model on its device with its image processor, the embeddings of the vocabulary, and its settings."""

    model: SparForOpenVocabSegmentation
    image_processor: Any
    text_embeds: torch.Tensor
    resize: dict[str, Any] = field(default_factory=dict)
    rules: Rules = field(default_factory=Rules)

    @classmethod
    def load(cls, folder: str, device: torch.device) -> tuple["Candidate", Any]:
        """A candidate that knows no words yet, and its tokenizer."""
        model = SparForOpenVocabSegmentation.from_backbone(folder).to(device)
        processor = SparProcessor.from_backbone(folder)
        return cls(model, processor.image_processor, torch.empty(0)), processor.tokenizer

    def learn(self, tokenizer: Any, vocabulary: Vocabulary, templates: str | None) -> None:
        """Embed the words of a vocabulary."""
        self.text_embeds = embed_names(self.model, tokenizer, vocabulary.all_names, templates).float()


class LogitsOfWindows(nn.Module):
    """A vision tower whose "features" are the logits of the names, so that a sliding window averages those."""

    def __init__(self, candidate: Candidate):
        super().__init__()
        self.candidate = [candidate]  # in a list: its weights are no weights of this module

    @property
    def config(self) -> "LogitsOfWindows":
        """What the sliding window asks of a model's configuration."""
        return self

    @property
    def image_size(self) -> int:
        return self.candidate[0].model.config.image_size

    @property
    def patch_size(self) -> int:
        return self.candidate[0].model.config.patch_size

    @property
    def projection_dim(self) -> int:
        return len(self.candidate[0].text_embeds)

    def forward(self, pixel_values: torch.Tensor) -> SparVisionModelOutput:
        model = self.candidate[0].model
        feature_map = model.vision_model(pixel_values).feature_map.float()
        with torch.autocast(pixel_values.device.type, enabled=False):  # names of nearly the same cosine stay apart
            return SparVisionModelOutput(feature_map=model.dense_logits(feature_map, self.candidate[0].text_embeds))


def average_logits(candidate: Candidate, pixel_values: torch.Tensor, stride: int, window_batch_size: int):
    """
    Logits of every window, averaged: `(1, names, cells high, cells wide)`, and the side of a cell in pixels.

    Windows are averaged on the cells of [`SlidingWindowTeacher`], patches or parts of them, and upsampled to pixels
    afterwards. The published evaluation upsamples every window to pixels first, which differs only in the half patch at
    the borders of windows and needs names × pixels of memory. So would cells of a pixel here.

    Raises:
        ValueError: the logits would take more than 1 GiB, see [`SlidingWindowTeacher`]; a channel is a name there.
    """
    teacher = SlidingWindowTeacher(LogitsOfWindows(candidate), stride=stride, window_batch_size=window_batch_size)
    pixel_values = pad_to_patches(pixel_values, candidate.model.config.patch_size)
    plan = teacher.plan(*pixel_values.shape[-2:])
    sums, coverage = teacher.stitch(pixel_values, plan, plan.positions())
    return sums.div_(coverage), plan.cell


def now(device: torch.device) -> int:
    """Nanoseconds, after all work that the device was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter_ns()


def decide_as_published(
    logits: torch.Tensor,
    vocabulary: Vocabulary,
    cell: int,
    working_size: tuple[int, int],
    output_size: tuple[int, int],
    rules: Rules,
    working_bytes: int = WORKING_BYTES,
) -> LabelMap:
    """
    [`decide`] with the background rules of the published evaluation, in its order. Without rules it is `decide`.

    First the classes that win at most `min_area` of the pixels outside the background are struck off, and their pixels go
    to the best class that is left, with the probability that it has among all names. Then the pixels whose best
    probability is below `threshold` become background. (The pipeline's rules are those of [`give_to_background`].)

    Args:
        logits: of one image, on its cells; `(names, cells high, cells wide)`.
        vocabulary: classes and names; with rules, one of the classes is called background.
        cell: side of a cell in pixels of the working image.
        working_size, output_size, working_bytes: see `decide`.
        rules: of these, `threshold` and `min_area`.

    Raises:
        ValueError: `threshold` is not in 0 to 1, and see `decide`.
    """
    geometry = (vocabulary.name_to_class, cell, working_size, output_size, working_bytes)
    decision = decide(logits, *geometry)
    if not (rules.threshold or rules.min_area):
        return decision
    background = vocabulary.labels.index("background")
    if rules.min_area:
        pixels = torch.bincount(decision.labels.flatten(), minlength=len(vocabulary.labels))
        pixels[background] = 0
        small = pixels <= rules.min_area * pixels.sum()
        small[background] = False
        if (small & (pixels > 0)).any():
            decision = decide(logits, *geometry, barred=small)
    return give_to_background(decision, background, rules.threshold)


@torch.no_grad()
def predict(
    candidate: Candidate,
    run: Run,
    image: Image.Image,
    vocabulary: Vocabulary,
    accelerator: Accelerator,
    window_batch_size: int = 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Label map `(height, width)` of an image, and nanoseconds of the vision forward and in all: `(2,)`.

    The vision forward of a run that averages logits includes the dot products with the words, window by window.
    """
    device = accelerator.device
    model, rules = candidate.model, candidate.rules
    cell = model.config.patch_size
    start = now(device)
    inputs = candidate.image_processor(image, return_tensors="pt", **candidate.resize)
    pixel_values = inputs["pixel_values"].to(device)
    height, width = pixel_values.shape[-2:]
    before = now(device)
    with accelerator.autocast():
        if run.average == "logits":
            assert run.stride is not None
            logits, cell = average_logits(candidate, pixel_values, run.stride, window_batch_size)
        else:
            encoder = model.vision_model
            if run.stride is not None:
                encoder = SlidingWindowTeacher(encoder, stride=run.stride, window_batch_size=window_batch_size)
            feature_map = encoder(pixel_values).feature_map
    after = now(device)
    # in float32 from here on: half precision could not tell names of nearly the same cosine apart
    if run.refinement is not None:
        parts = (feature_map[0].float(), candidate.text_embeds, pixel_values[0])
        logits, cell = refined_logits(model, *parts, run.refinement)
    elif run.average == "features":
        logits = model.dense_logits(feature_map.float(), candidate.text_embeds)[0]
    else:
        logits = logits[0]
    if rules.scale is not None:
        logits = logits * (rules.scale / model.config.dense_logit_scale)
    # cells that hold nothing but the model's own padding: only there where cells are smaller than patches
    logits = logits[:, : -(-height // cell), : -(-width // cell)]
    decision = decide_as_published(logits, vocabulary, cell, (height, width), (image.height, image.width), rules)
    labels = decision.labels.cpu()
    return labels, torch.tensor([after - before, now(device) - start])


class PeakMemory:
    """
    Bytes that the work in a `with` block adds at most to what was held before: `.bytes` after it, `None` where that cannot
    be measured.

    On a GPU as torch's allocator counts them. On a CPU, Linux only, as the rise of the process's resident memory; what
    was freed is handed back to the system first, or it would be used again unseen. That costs time, so time other work.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            try:
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
                self.before = self.resident("VmRSS")
            except (OSError, AttributeError):
                self.before = None
        return self

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif self.device.type == "cpu" and self.before is not None:
            self.bytes = max(0, self.resident("VmHWM") - self.before)

    @staticmethod
    def resident(entry: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))
