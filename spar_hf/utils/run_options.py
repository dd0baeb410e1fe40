"""The options that every training of a head or of a new model has."""

from dataclasses import dataclass

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from spar_hf.utils.fields import option, required
from spar_hf.utils.options import HELP, PRECISIONS, SafetyOptions, require_one_of, require_positive

TRACKERS = ("auto", "none", *map(str, LOGGER_TYPE_TO_CLASS))  # those of accelerate


@dataclass(kw_only=True)
class TrainingRunOptions(SafetyOptions):
    """Where and how a training runs."""

    output: str = required("Folder of the run: checkpoints, results, and the trained model in `model`.")
    mixed_precision: str | None = option(None, HELP["mixed_precision"])
    seed: int = option(0, "Seed of weights, order, augmentation and drawn pixels.")
    save_steps: int = option(200, HELP["save_steps"])
    resume: bool = option(False, HELP["resume"])

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "save_steps")
        require_one_of(self, "mixed_precision", PRECISIONS)
