"""The optimiser step of a student, on any number of devices."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import get_scheduler

from spar_hf.distillation.options import OptimisationOptions
from spar_hf.distillation.student import Student
from spar_hf.utils.errors import as_usage_errors


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes share the weights (FSDP) instead of each holding all of them."""
    return accelerator.distributed_type == DistributedType.FSDP


def count_steps(options: OptimisationOptions, images: int | None, images_per_step: int) -> int:
    """Optimizer steps of a run on this many images, which must be known for `epochs`."""
    if options.max_steps is not None:
        return options.max_steps
    assert options.epochs is not None and images is not None  # DistillationOptions has checked that
    return max(1, math.ceil(options.epochs * images / images_per_step))


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, warmup_ratio: float, steps: int, accelerator: Accelerator
) -> torch.optim.lr_scheduler.LRScheduler:
    """
    A learning-rate schedule of transformers by name, such as `cosine`, to be passed to `accelerator.prepare`. Learning rates
    rise for a share `warmup_ratio` of the optimizer `steps`.

    Raises:
        UsageError: transformers has no schedule of this name.
    """
    processes = accelerator.num_processes  # accelerate steps the schedule once per process and optimizer step
    with as_usage_errors():
        return get_scheduler(name, optimizer, int(warmup_ratio * steps) * processes, steps * processes)


class Optimisation:
    """
    Optimiser and schedule of a student on its device, as accelerate prepares them.

    Attributes:
        wrapped: the student for training; its forward runs in the precision of the run.
    """

    def __init__(self, accelerator: Accelerator, student: Student, options: OptimisationOptions, steps: int):
        self.accelerator, self.student = accelerator, student
        self.max_grad_norm = options.max_grad_norm or math.inf
        if is_sharded(accelerator):
            # the blocks: the list of transformers also names embeddings, whose parts are called one by one
            names = {type(block).__name__: 0 for block in student.model.backbone.blocks}
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list(names)
        parameters = [parameter for parameter in student.trained.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
        schedule = make_schedule(options.lr_scheduler_type, optimizer, options.warmup_ratio, steps, accelerator)
        self.wrapped: Any
        self.wrapped, self.optimizer, self.schedule = accelerator.prepare(student.trained, optimizer, schedule)
        # between forward and backward FSDP exposes other tensors, so parameters are collected here
        self.parameters = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        # deterministic: the student regresses, and dropout or jittered positions would only blur the target
        self.wrapped.eval()

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.schedule.get_last_lr()[0]

    def continue_schedule(self, processes: int) -> None:
        """
        Go on from the checkpoint of so many processes, which lies between two optimizer steps: accelerate counts images per
        process, and steps of the schedule times processes.
        """
        self.accelerator.step, schedule = 0, self.schedule.scheduler
        schedule.last_epoch = schedule.last_epoch * self.accelerator.num_processes // processes

    def step(self, loss: torch.Tensor, is_bad: Callable[[Any], bool] = lambda norm: False) -> bool:
        """
        Back-propagate a loss. Call it within `accelerator.accumulate`.

        Args:
            loss: of one image.
            is_bad: norm of the gradients -> whether the step must be skipped; called when a step is complete.

        Returns:
            Whether that completed an optimizer step, done or skipped.
        """
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
            # the scaler of float16 must be asked in any case, and skips such steps by itself
            if not is_bad(norm) or self.accelerator.scaler is not None:
                self.optimizer.step()
                self.student.restore_positions()
        self.schedule.step()
        self.optimizer.zero_grad()
        return self.accelerator.sync_gradients

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The student's feature map in float32, like the full teacher's: half precision would blur the held-out error."""
        if is_sharded(self.accelerator):  # only the wrapped forward gathers the weights, in all processes
            return self.wrapped(pixel_values).feature_map
        # the class's forward: accelerate wraps the model's own in autocast
        return type(self.student.trained).forward(self.student.trained, pixel_values).feature_map

    def release(self) -> None:
        """Drop what accelerate prepared, so that the process group can end before DDP's reducer."""
        self.wrapped = self.optimizer = self.schedule = None
