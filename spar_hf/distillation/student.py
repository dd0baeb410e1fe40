"""The student in training: how its positions are prepared, which weights are trained, and what is kept after each step."""

from collections.abc import Iterable
from typing import Any

import torch

from spar_hf import SparVisionModel
from spar_hf.distillation.locality import (
    fix_position_step,
    initialise_locality,
    position_subspace,
    project_out,
    token_writers,
)
from spar_hf.distillation.models import Models
from spar_hf.distillation.options import StudentOptions
from spar_hf.distillation.trainable import add_adapters, choose_parameters
from spar_hf.utils.errors import UsageError


def prepare_positions(
    models: Models, options: StudentOptions, squares: Iterable[torch.Tensor], kept: list[list[float]] | None = None
) -> torch.Tensor | None:
    """
    Give the student the `position_extent` and the prior over distance that the options ask for, in place.

    Args:
        models: student and window size.
        options: of the student.
        squares: training images, `(1, 3, 2 * window, 2 * window)` each; read only for a prior.
        kept: position subspace of the run that is resumed, whose images may be others now.

    Returns:
        the position subspace of a student with a prior, new or from an earlier run, see `locality.py`; else `None`.

    Raises:
        UsageError: the student already has another `position_extent`, or cannot have what is asked for.
    """
    student, window = models.student, models.teacher.window_size
    directions = position_subspace(student)
    extent, held = options.position_extent, student.config.position_extent
    if extent is not None and held is None:
        models.set_position_extent(extent)
        fix_position_step(student, directions, extent, window)
    elif extent not in (None, held):
        start = (options.student or ["--model"])[0]
        raise UsageError(f"--position_extent {extent}: the positions of {start} span {held} px. Leave it out.")
    if kept is not None:
        return torch.tensor(kept)
    if options.local_start is not None:
        directions = initialise_locality(student, squares, options.local_start, window)
    return directions


class Student:
    """
    What is trained.

    Args:
        model ([`SparVisionModel`]): the vision tower.
        options ([`StudentOptions`]): which weights are trained.
        directions (`torch.FloatTensor` of shape `(hidden_size, 5)`, *optional*): position subspace to keep.

    Attributes:
        trained: the model, or adapters around it.
    """

    def __init__(self, model: SparVisionModel, options: StudentOptions, directions: torch.Tensor | None = None):
        # contiguous as they are read from a checkpoint, since products in another layout differ in the last bits
        self.model, self.directions = model, None if directions is None else directions.contiguous()
        self.trained: Any = model
        if options.lora_rank is None:
            choose_parameters(model, options.train_layers, options.train_parts)
        else:
            self.trained = add_adapters(
                model, options.train_layers, options.train_parts, options.lora_rank, options.lora_alpha
            )
        self.writers = [] if directions is None else [p for p in token_writers(model) if p.requires_grad]

    def to(self, device: torch.device) -> "Student":
        """Move it, in place."""
        self.trained.to(device)
        if self.directions is not None:
            self.directions = self.directions.to(device)
        return self

    def restore_positions(self) -> None:
        """After an optimizer step: remove what the trained weights would write into the position subspace."""
        if self.directions is not None:
            project_out(self.writers, self.directions)
