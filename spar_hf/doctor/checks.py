"""
The checks of `spar-hf doctor`. Each takes the subject and yields findings; what it compares with is written down here, or is
transformers' own code, and shares nothing with the code under test.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spar_hf.doctor.findings import NOTE, OK, SKIPPED, Finding, within
from spar_hf.model.modeling_spar import SparForOpenVocabSegmentation, SparVisionModel
from spar_hf.model.prompts import Vocabulary, embed_names
from spar_hf.teacher import SlidingWindowTeacher
from spar_hf.utils.devices import clock

TOLERANCE = 1e-4  # of features in float32, relative to their largest value
# pairs of words of which each should be nearer to the other than to all others
SYNONYMS = (("car", "automobile"), ("sofa", "couch"), ("road", "street"), ("cat", "kitten"), ("person", "human"))
REPEATS = 3  # of each side of a ratio


@dataclass
class Subject:
    """
    The model that is checked.

    Attributes:
        vision: its vision tower, float32, in evaluation mode, on the device.
        towers: with the text tower; `None` if it has none.
        processor: its image processor and tokenizer; `None` without a text tower.
        stride: step of the teacher in pixels.
    """

    vision: SparVisionModel
    towers: SparForOpenVocabSegmentation | None
    processor: Any
    stride: int

    @property
    def native(self) -> int:
        """Side in pixels of the images that the backbone was pre-trained on, see [`native_size`]."""
        return native_size(self.vision)

    def noise(self, height: int, width: int, batch: int = 1) -> torch.Tensor:
        """Smooth random images, the same in every run: `(batch, 3, height, width)`."""
        generator = torch.Generator().manual_seed(height * 10_000 + width)
        coarse = torch.randn(batch, 3, height // 16 + 2, width // 16 + 2, generator=generator)
        fine = 0.3 * torch.randn(batch, 3, height, width, generator=generator)
        image = nn.functional.interpolate(coarse, (height, width), mode="bicubic") + fine
        return image.to(self.vision.device)


def native_size(vision: SparVisionModel) -> int:
    """
    Side in pixels of the images that a backbone was pre-trained on, without what its patches leave over: 378 of 384 px at
    patches of 14. Backbones cut that off, while a single pass pads it to a patch of its own.
    """
    return vision.config.image_size // vision.config.patch_size * vision.config.patch_size


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value; NaN if either has one."""
    return float((found - expected).abs().max() / expected.abs().max())


def check_weights(subject: Subject) -> Iterator[Finding]:
    """Whether all weights are finite, and what kind of model this is."""
    model = subject.towers or subject.vision
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    parameters = sum(value.numel() for value in model.parameters()) / 1e6
    yield Finding(
        "weights are finite",
        "failed" if bad else OK,
        f"{len(bad)} tensors are not, {bad[0]} first" if bad else f"{parameters:.1f} M parameters",
        remedy="Convert or download the weights again." if bad else "",
    )


def own_model(vision: SparVisionModel) -> Any:
    """
    The backbone as transformers itself runs it, with the same weights. A read-out is a subclass of that class, which
    is the first one outside this library that is no read-out's helper.
    """
    mine = vision.backbone
    own: Any = next(c for c in type(mine).__mro__ if c.__module__.startswith("transformers.models."))
    model = own._from_config(mine.config)
    model.load_state_dict(mine.state_dict(), strict=False)
    return model.to(vision.device, torch.float32).eval()


@torch.no_grad()
def check_backbone(subject: Subject) -> Iterator[Finding]:
    """The tokens of every layer but the last against those of transformers' own forward, at the size of pre-training."""
    name, vision = "layers equal transformers' own", subject.vision
    if vision.config.readout == "naflex":
        yield Finding(name, SKIPPED, "NaFlex takes flattened patches in transformers")
        return
    side, native = vision.config.image_size, subject.native
    if vision.config.position_extent not in (None, side):
        yield Finding(name, SKIPPED, f"positions of this model span {vision.config.position_extent} px")
        return
    pixels = subject.noise(side, side, batch=2)
    found = vision(pixels[..., :native, :native], output_hidden_states=True).hidden_states
    expected = own_model(vision)(pixels, output_hidden_states=True).hidden_states
    # read-outs may take other things from the last layer than transformers does
    worst = max(relative(ours, theirs) for ours, theirs in zip(found[:-1], expected[:-1], strict=True))
    yield within(name, worst, TOLERANCE, "Report this with the version of transformers; results will be wrong.")


@torch.no_grad()
def check_resolution(subject: Subject) -> Iterator[Finding]:
    """Grids of odd sizes, and that a batch gives what its images give."""
    vision, patch = subject.vision, subject.vision.config.patch_size
    native = subject.native
    remedy = "Report this with the version of torch."
    for height, width in ((native + 1, native // 2 + 3), (native // 2 + 5, 2 * native - 7)):
        pixels = subject.noise(height, width, batch=2)
        maps = vision(pixels).feature_map
        grid = tuple(-(-side // patch) for side in (height, width))
        if maps.shape[-2:] != grid:
            found = f"{maps.shape[-2]}×{maps.shape[-1]}"
            yield Finding(f"grid of {height}×{width}", "failed", found, f"{grid[0]}×{grid[1]}", remedy)
            continue
        alone = torch.cat([vision(image[None]).feature_map for image in pixels])
        yield within(f"{height}×{width}: batch equals single images", relative(maps, alone), TOLERANCE, remedy)


def plain_teacher(vision: SparVisionModel, pixels: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """
    The teacher as its definition reads: one window at a time, its features spread over the pixels, summed, divided by the
    number of windows over each pixel, and averaged over the patches' two middle cells as bilinear resizing does.

    Args:
        pixels: `(1, 3, height, width)`, sides multiples of the patch and at least a window long.

    Returns:
        `(1, dim, height / patch, width / patch)`.
    """
    patch = vision.config.patch_size
    cell = next(size for size in range(patch, 0, -1) if patch % size == 0 and stride % size == 0)
    height, width = (side // cell for side in pixels.shape[-2:])
    sums, counts = torch.zeros(()), pixels.new_zeros(height, width)
    tops, lefts = ([*range(0, side - window, stride), side - window] for side in pixels.shape[-2:])
    for top in tops:
        for left in lefts:
            features = vision(pixels[:, :, top : top + window, left : left + window]).feature_map
            if sums.ndim == 0:
                sums = features.new_zeros(1, features.shape[1], height, width)
            fine = nn.functional.interpolate(features, size=(window // cell, window // cell), mode="bilinear")
            rows, columns = (slice(start // cell, (start + window) // cell) for start in (top, left))
            sums[:, :, rows, columns] += fine
            counts[rows, columns] += 1
    size = tuple(side // patch for side in pixels.shape[-2:])
    return nn.functional.interpolate(sums / counts, size=size, mode="bilinear")


@torch.no_grad()
def check_teacher(subject: Subject) -> Iterator[Finding]:
    """The teacher against its definition, on two windows and a bit in each direction."""
    vision, patch, stride = subject.vision, subject.vision.config.patch_size, subject.stride
    window = subject.native
    extra = -(-2 * stride // patch) * patch
    pixels = subject.noise(window + extra, window + extra + patch)
    found = SlidingWindowTeacher(vision, window, stride)(pixels).feature_map
    expected = plain_teacher(vision, pixels, window, stride)
    name = f"teacher at stride {stride} equals one window at a time"
    yield within(name, relative(found, expected), TOLERANCE, "Report this with the version of torch.")


@torch.no_grad()
def check_words(subject: Subject) -> Iterator[Finding]:
    """Whether the tokenizer belongs to the text tower: synonyms are each other's nearest words."""
    if subject.towers is None:
        yield Finding("words", SKIPPED, "the model has no text tower")
        return
    words = [word for pair in SYNONYMS for word in pair]
    embeds = embed_names(
        subject.towers, subject.processor.tokenizer, Vocabulary.parse(words).all_names, "plain"
    ).float()
    embeds = nn.functional.normalize(embeds, dim=-1)
    cosines = (embeds @ embeds.T).fill_diagonal_(-2)
    partners = torch.arange(len(words)) ^ 1  # of word 2k and 2k + 1
    right = int((cosines.argmax(1).cpu() == partners).sum())
    found = f"{right} of {len(words)} words are nearest to their synonym"
    advice = "; few: the tokenizer, its lower casing or the text weights may belong to another model"
    yield Finding("words", OK if 2 * right > len(words) else NOTE, found + ("" if 2 * right > len(words) else advice))


@torch.no_grad()
def check_precision(subject: Subject) -> Iterator[Finding]:
    """The error of half precision, as a share of the features' length."""
    pixels = subject.noise(subject.native, subject.native)
    exact = subject.vision(pixels).feature_map
    for dtype in (torch.bfloat16, torch.float16):
        teacher = SlidingWindowTeacher(subject.vision, subject.native, subject.native, dtype=dtype)
        error = (teacher(pixels).feature_map - exact).norm() / exact.norm()
        yield Finding(f"relative error in {str(dtype).removeprefix('torch.')}", NOTE, f"{float(error):.4f}")


def ratio(first: Callable[[], object], second: Callable[[], object], device: torch.device) -> float:
    """Median of the times of the first over the second, which run in turn."""
    first(), second()
    ratios = []
    for _ in range(REPEATS):
        times = []
        for work in (first, second):
            start = clock(device)
            work()
            times.append(clock(device) - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


@torch.no_grad()
def check_speed(subject: Subject) -> Iterator[Finding]:
    """One pass against transformers' own forward, and the teacher against one pass. Timings are notes, never failures."""
    vision, native = subject.vision, subject.native
    device = vision.device
    if vision.config.readout != "naflex":
        own, whole = own_model(vision), subject.noise(vision.config.image_size, vision.config.image_size)
        pixels = whole[..., :native, :native]
        found = ratio(lambda: vision(pixels), lambda: own(whole), device)
        yield Finding(f"one pass over transformers' own forward, {native}×{native}", NOTE, f"{found:.2f} ×", "about 1")
    height, width = native, 2 * native
    image, teacher = subject.noise(height, width), SlidingWindowTeacher(vision, native, subject.stride)
    windows = len(teacher.plan(height, width))
    found = ratio(lambda: teacher(image), lambda: vision(image), device)
    name = f"teacher at stride {subject.stride}, {windows} windows, over one pass, {height}×{width}"
    yield Finding(name, NOTE, f"{found:.1f} ×")


CHECKS: dict[str, Callable[[Subject], Iterator[Finding]]] = {
    "weights": check_weights,
    "backbone": check_backbone,
    "resolution": check_resolution,
    "teacher": check_teacher,
    "words": check_words,
    "precision": check_precision,
    "speed": check_speed,
}
