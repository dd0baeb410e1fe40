"""From an image to a label map: a single pass, sliding windows over features or logits, refined; with times."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from spar_hf.evaluation.candidates import Candidate, Rules
from spar_hf.evaluation.runs import Run
from spar_hf.model.modeling_spar import SparVisionModelOutput, pad_to_patches
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.refine import refined_logits
from spar_hf.model.results import check_finite_features
from spar_hf.model.segmentation import WORKING_BYTES, LabelMap, decide, give_to_background
from spar_hf.teacher import SlidingWindowTeacher
from spar_hf.utils.devices import clock


class LogitsOfWindows(nn.Module):
    """A vision tower whose feature map holds the logits of the names, so that [`SlidingWindowTeacher`] averages logits."""

    def __init__(self, candidate: Candidate):
        super().__init__()
        self.candidate = [candidate]  # in a list, so that the model is not registered as a submodule

    @property
    def config(self) -> "LogitsOfWindows":
        """[`SlidingWindowTeacher`] reads `image_size`, `patch_size` and `projection_dim` from it."""
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
        # in full precision, which can tell names of nearly the same cosine apart
        with torch.autocast(pixel_values.device.type, enabled=False):
            return SparVisionModelOutput(feature_map=model.dense_logits(feature_map, self.candidate[0].text_embeds))


def average_logits(
    candidate: Candidate, pixel_values: torch.Tensor, stride: int, window_batch_size: int
) -> tuple[torch.Tensor, int]:
    """
    Mean of the logits of all windows.

    Windows are averaged on the cells of [`SlidingWindowTeacher`] (patches or parts of them) and upsampled to pixels
    afterwards. The published evaluation upsamples every window first. That differs only within half a patch of the windows'
    borders, and needs memory for names × pixels.

    Args:
        candidate: the model and the embeddings of the names.
        pixel_values: one image `(1, 3, height, width)`.
        stride: step of the window in pixels.
        window_batch_size: windows per forward pass.

    Returns:
        Logits `(1, names, height / cell, width / cell)`, and the side of a cell in pixels.

    Raises:
        ValueError: the logits would take more than 1 GiB, see [`SlidingWindowTeacher`], whose channels are the names here.
    """
    vision: Any = LogitsOfWindows(candidate)
    teacher = SlidingWindowTeacher(vision, candidate.window_size, stride, window_batch_size)
    pixel_values = pad_to_patches(pixel_values, candidate.model.config.patch_size)
    plan = teacher.plan(*pixel_values.shape[-2:])
    sums, coverage = teacher.stitch(pixel_values, plan, plan.positions())
    return sums.div_(coverage), plan.cell


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

    First, classes that win at most `min_area` of the pixels outside the background are excluded. Their pixels go to the
    best remaining class, with the probability that it has beside all of them. Then pixels whose best probability is below
    `threshold` become background. (The rules of the pipeline are those of [`give_to_background`].)

    Args:
        logits: of one image, `(names, height / cell, width / cell)`.
        vocabulary: classes and names; with rules, one of the classes is called background.
        cell: side of a cell in pixels of the working image.
        working_size, output_size, working_bytes: see `decide`.
        rules: `threshold`, `min_area` and `scores` are used.

    Raises:
        ValueError: `threshold` is not in 0 to 1, or see `decide`.
    """
    geometry = (vocabulary.name_to_class, cell, working_size, output_size, working_bytes)
    decision = decide(logits, *geometry, scores=rules.scores)
    if not (rules.threshold or rules.min_area):
        return decision
    background = vocabulary.labels.index("background")
    if rules.min_area:
        pixels = torch.bincount(decision.labels.flatten(), minlength=len(vocabulary.labels))
        pixels[background] = 0
        small = pixels <= rules.min_area * pixels.sum()
        small[background] = False
        if (small & (pixels > 0)).any():
            decision = decide(logits, *geometry, excluded=small, scores=rules.scores)
    return give_to_background(decision, background, rules.threshold)


@dataclass
class Prediction:
    """
    Attributes:
        label_map: class of every pixel of the image, `(height, width)` on the CPU.
        vision_seconds: time of the vision forward. For a mean of logits it includes the products with the words.
        total_seconds: time from the image to the label map.
    """

    label_map: torch.Tensor
    vision_seconds: float
    total_seconds: float


@torch.no_grad()
def predict(
    candidate: Candidate,
    run: Run,
    image: Image.Image,
    vocabulary: Vocabulary,
    accelerator: Accelerator,
    window_batch_size: int = 16,
) -> Prediction:
    """
    Segment an image: image processor, vision forward, logits, refinement, decision.

    Args:
        candidate: the model.
        run: how to run it.
        image: RGB, any size.
        vocabulary: classes and names.
        accelerator: its device and precision are used for the vision forward.
        window_batch_size: windows per forward pass.
    """
    device, model = accelerator.device, candidate.model
    start = clock(device)
    pixel_values = candidate.pixel_values(image).to(device)
    height, width = pixel_values.shape[-2:]
    before = clock(device)
    with accelerator.autocast():
        if run.average == "logits":
            assert run.stride is not None
            dense, cell = average_logits(candidate, pixel_values, run.stride, window_batch_size)
        else:
            encoder = model.vision_model
            if run.stride is not None:
                encoder = SlidingWindowTeacher(encoder, candidate.window_size, run.stride, window_batch_size)
            dense, cell = encoder(pixel_values).feature_map, model.config.patch_size
    after = clock(device)
    check_finite_features(dense)
    if run.average == "logits":
        logits = dense[0]
    else:
        logits, cell = make_logits(candidate, dense, pixel_values, run.refinement)
    if candidate.rules.scale is not None:
        logits = logits * (candidate.rules.scale / model.config.dense_logit_scale)
    logits = logits[:, : -(-height // cell), : -(-width // cell)]  # without cells that hold only padding
    size = (image.height, image.width)
    decision = decide_as_published(logits, vocabulary, cell, (height, width), size, candidate.rules)
    label_map = decision.labels.cpu()
    return Prediction(label_map, after - before, clock(device) - start)


def make_logits(
    candidate: Candidate, feature_map: torch.Tensor, pixel_values: torch.Tensor, refinement: str | None
) -> tuple[torch.Tensor, int]:
    """
    Logits of the names `(names, height / cell, width / cell)`, perhaps refined, and the side of a cell in pixels. In full
    precision, which can tell names of nearly the same cosine apart.
    """
    model, text_embeds = candidate.model, candidate.text_embeds
    if refinement is not None:
        return refined_logits(model, feature_map[0].float(), text_embeds, pixel_values[0], refinement)
    return model.dense_logits(feature_map.float(), text_embeds)[0], model.config.patch_size
