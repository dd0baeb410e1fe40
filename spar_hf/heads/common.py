"""Options and the learning-rate schedule that the training of a probe and that of a panoptic head share."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from transformers import get_scheduler

from spar_hf.data.segmentation_sets import SegmentationSet
from spar_hf.utils.errors import UsageError
from spar_hf.utils.options import SafetyOptions, require_one_of, require_positive


@dataclass(kw_only=True)
class RunOptions(SafetyOptions):
    """Where and how a training runs."""

    output: str = field(metadata={"help": "Folder of the run: checkpoints, results, and the trained model in `model`."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16 or bf16; by default what `accelerate launch` was told."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, order, augmentation and drawn pixels."})
    save_steps: int = field(default=200, metadata={"help": "Steps between checkpoints; the last two are kept."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in --output, as if never stopped."}
    )

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "save_steps")
        require_one_of(self, "mixed_precision", ("no", "fp16", "bf16"))


def file_names(data: SegmentationSet) -> list[str]:
    """Names of the images of a set, for the record of a run; numbers where they are no files."""
    files = (data.file(number) for number in range(len(data)))
    return [str(number) if isinstance(file, bytes) else str(file) for number, file in enumerate(files)]


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, warmup_ratio: float, steps: int, accelerator: Accelerator
) -> torch.optim.lr_scheduler.LRScheduler:
    """
    A learning-rate schedule of transformers by name, to be passed to `accelerator.prepare`.

    Args:
        name: such as `cosine`.
        optimizer: whose learning rates follow it.
        warmup_ratio: share of the steps with rising learning rate.
        steps: optimizer steps of the run.
        accelerator: steps the schedule once per process and optimizer step, so all counts are multiplied.

    Raises:
        UsageError: transformers has no schedule of this name.
    """
    processes = accelerator.num_processes
    try:
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=int(warmup_ratio * steps) * processes,
            num_training_steps=steps * processes,
        )
    except ValueError as error:
        raise UsageError(f"--lr_scheduler_type {name}: {error}") from error
