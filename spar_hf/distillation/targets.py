"""What makes the student's targets: the teacher's modes behind one call, `(pixel_values, index) -> (target, weight)`."""

import random
from pathlib import Path
from typing import Protocol

import torch
from torch.utils.data import Dataset

from spar_hf import SlidingWindowTeacher
from spar_hf.data.sources import Sample, Ticket
from spar_hf.distillation.teacher_cache import TeacherCache


class Target(Protocol):
    """
    The target of an image and how much each of its cells counts: `(1, dim, h, w)` and None where all patches count alike, or
    cells and weights as [`SlidingWindowTeacher.sample`] gives them. `index` is the image's place in the stream.
    """

    def __call__(self, pixel_values: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class FullTarget:
    """Every window of the teacher."""

    def __init__(self, teacher: SlidingWindowTeacher):
        self.teacher = teacher

    def __call__(self, pixel_values: torch.Tensor, index: int) -> tuple[torch.Tensor, None]:
        return self.teacher(pixel_values).feature_map, None


class SampledTarget:
    """
    An unbiased estimate from about `windows` windows. Which are drawn is a function of the seed and the image's place in
    the stream: the same after a resume, and on any number of processes.
    """

    def __init__(self, teacher: SlidingWindowTeacher, windows: int, seed: int, variant: str = "spread"):
        self.teacher, self.windows, self.seed = teacher, windows, seed
        self.variant = variant
        self.generator = torch.Generator()

    def __call__(self, pixel_values: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = random.Random(f"windows-{self.seed}-0-{index}").getrandbits(62)
        return self.teacher.sample(pixel_values, self.windows, self.generator.manual_seed(draw), variant=self.variant)


class CachedImages(Dataset):
    """
    The images of a teacher cache with their targets, in the place of images and teacher. As a listing for [`MapOrder`] it
    has a length and gives tickets; as a data set it gives the [`Sample`] of a ticket.

    An image or shard that changed ends the training: the targets would be of something else.
    """

    def __init__(self, cache: TeacherCache, held_out: list[Ticket]):
        """
        Raises:
            ValueError: the cache holds an image that is held out.
        """
        self.cache = cache
        cached = {cache.image(i).resolve() for i in range(len(cache))}
        if any(Path(ticket.source).resolve() in cached for ticket in held_out if isinstance(ticket.source, str)):
            raise ValueError(
                "The teacher cache holds images that are held out here. Give the --images, --exclude and --holdout_every "
                "that it was made with."
            )

    def __len__(self) -> int:
        return len(self.cache)

    def ticket(self, i: int, index: int, after: list[int]) -> Ticket:
        return Ticket(index, str(self.cache.image(i)), i, after)

    def __getitem__(self, ticket: Ticket) -> Sample:
        pixel_values, target = self.cache[ticket.source]
        return Sample(ticket.index, pixel_values, ticket.after, target=target)
