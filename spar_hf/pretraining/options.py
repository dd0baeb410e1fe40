"""Options of the pre-training, checked before any image is read."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from spar_hf.utils.errors import UsageError
from spar_hf.utils.options import (
    RUN_FREE,
    ComposedOptions,
    SafetyOptions,
    require_not_negative,
    require_one_of,
    require_positive,
)

# options that a resumed run may change: where it is written, and the length of its schedule
FREE = {"output", "resume", "workers", "save_steps", "steps", *RUN_FREE}
RECIPE = Path(__file__).with_name("spar_tiny_data.yaml")


@dataclass(kw_only=True)
class RecipeOptions:
    """The training images and their words."""

    data: str = field(metadata={"help": "Folder that the paths of the recipe are relative to."})
    recipe: str = field(
        default=str(RECIPE), metadata={"help": "YAML file with the sets, their words, and the held-out words."}
    )


@dataclass(kw_only=True)
class NewModelOptions:
    """Sizes and words of a model that starts from scratch; `--start` takes those of another model."""

    window: int = field(default=192, metadata={"help": "Side of the crops in pixels: the model's image_size."})
    hidden_size: int = field(default=192, metadata={"help": "Width of both towers."})
    layers: int = field(default=8, metadata={"help": "Blocks of the vision tower."})
    text_layers: int = field(default=1, metadata={"help": "Blocks of the text tower."})
    vocab_size: int = field(default=6144, metadata={"help": "Upper bound of the tokenizer's vocabulary."})
    text_steps: int = field(default=800, metadata={"help": "Steps that first teach the words, without images."})
    text_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a sentence encoder (all-MiniLM-L6-v2) that the words are learned from; by default words "
            "get random directions."
        },
    )
    common_words: int = field(
        default=3500, metadata={"help": "Number of frequent words of the sentence encoder that are taught as well."}
    )

    def __post_init__(self):
        require_positive(self, "window", "hidden_size", "layers", "text_layers", "vocab_size")
        require_not_negative(self, "text_steps", "common_words")

    def changed(self) -> list[str]:
        """Names of the options that are not at their defaults."""
        return [part.name for part in fields(self) if getattr(self, part.name) != part.default]


@dataclass(kw_only=True)
class TrainingOptions:
    """How the vision tower is trained."""

    start: str | None = field(
        default=None,
        metadata={"help": "Finished model of this command to train further; its sizes and words stay as they are."},
    )
    steps: int = field(default=4000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=24, metadata={"help": "Crops per step."})
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak of the cosine schedule."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps of linear warm-up."})
    names_per_set: int = field(default=28, metadata={"help": "Class names compared per set and step."})
    foreign_names: int = field(default=8, metadata={"help": "Names of other sets added as wrong answers."})
    tagged_names: int = field(
        default=64, metadata={"help": "Number of names that an image with a name but no mask is compared with."}
    )

    def __post_init__(self):
        require_positive(self, "steps", "batch_size", "learning_rate", "names_per_set", "tagged_names")
        require_not_negative(self, "weight_decay", "warmup_steps", "foreign_names")


@dataclass(kw_only=True)
class RunOptions(SafetyOptions):
    """Where and how the training runs."""

    output: str = field(metadata={"help": "Folder to write: checkpoints, log and the finished model."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; by default what `accelerate launch` was told."}
    )
    workers: int = field(default=1, metadata={"help": "Processes that cut crops."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and augmentation."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; the last two are kept."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in --output, as if never stopped."}
    )

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "save_steps")
        require_not_negative(self, "workers")
        require_one_of(self, "mixed_precision", ("no", "bf16", "fp16"))


@dataclass(kw_only=True)
class PretrainingOptions(ComposedOptions):
    """
    Options of the pre-training.

    Raises:
        UsageError: `start` together with sizes or words of a new model.
    """

    recipe: RecipeOptions
    new_model: NewModelOptions
    training: TrainingOptions
    run: RunOptions

    def __post_init__(self):
        if self.training.start is not None and (given := self.new_model.changed()):
            raise UsageError(
                f"--start keeps that model's sizes and words; leave out {', '.join(f'--{name}' for name in given)}."
            )
