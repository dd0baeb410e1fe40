"""The options that every training of a head or of a new model has."""

from dataclasses import dataclass

from spar_hf.utils.fields import option, required
from spar_hf.utils.options import SafetyOptions, require_one_of, require_positive


@dataclass(kw_only=True)
class RunOptions(SafetyOptions):
    """Where and how a training runs."""

    output: str = required("Folder of the run: checkpoints, results, and the trained model in `model`.")
    mixed_precision: str | None = option(None, "no, fp16 or bf16; by default what `accelerate launch` was told.")
    seed: int = option(0, "Seed of weights, order, augmentation and drawn pixels.")
    save_steps: int = option(200, "Steps between checkpoints; the last two are kept.")
    resume: bool = option(False, "Go on from the last checkpoint in --output, as if never stopped.")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "save_steps")
        require_one_of(self, "mixed_precision", ("no", "fp16", "bf16"))
