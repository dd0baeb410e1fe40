"""Options of training a panoptic head, checked before any model is loaded."""

from dataclasses import dataclass, field
from typing import Any

from spar_hf.heads.common import RunOptions
from spar_hf.utils.errors import UsageError
from spar_hf.utils.options import RUN_FREE, ComposedOptions, require_positive, require_share

# options that a resumed run may change: none of them changes what is learned
FREE = {"output", "resume", "workers", "save_steps", "report_to", *RUN_FREE}


@dataclass(kw_only=True)
class PanopticData:
    """Images with masks, and what in a mask is a segment."""

    dataset: str = field(
        metadata={
            "aliases": ["--data"],
            "help": "Folder with images/, masks/ (8-bit PNG of class numbers) and classes.txt.",
        }
    )
    classes: str | None = field(
        default=None,
        metadata={
            "help": "JSON file {class: [line of classes.txt, ...]} that merges classes; lines that it does not name are "
            "ignored. E.g. training/configs/coco_supercategories.json. By default each line of classes.txt is a class."
        },
    )
    things: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Countable classes: names, or one number N for the first N (COCO: 80, its supercategories: 12)."
        },
    )
    min_area: float = field(
        default=0.001,
        metadata={
            "help": "Regions of countable classes below this share of the image are ignored, in training and measuring."
        },
    )
    include: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={"help": "Only images whose stem matches one of these shell patterns,"},
    )
    exclude: list[str] = field(default_factory=list, metadata={"help": "and none of these."})
    holdout_every: int = field(
        default=5,
        metadata={
            "help": "Each n-th image (sorted by name) is held out to measure on; 0 measures on the training images."
        },
    )
    limit: int | None = field(
        default=None,
        metadata={"aliases": ["--photos"], "help": "Train on the first so many images only; by default on all."},
    )

    def __post_init__(self):
        require_positive(self, "limit")
        require_share(self, "min_area")
        if self.holdout_every < 0 or self.holdout_every == 1:
            raise UsageError(f"--holdout_every {self.holdout_every} must be 0 or at least 2.")


@dataclass(kw_only=True)
class PanopticViews:
    """How images are resized and augmented."""

    shortest_edge: int = field(default=512, metadata={"help": "Shorter side in pixels that images are resized to."})
    min_scale: float = field(default=0.75, metadata={"help": "In training, times a factor drawn between this ..."})
    max_scale: float = field(default=1.25, metadata={"help": "... and this."})
    flip_probability: float = field(default=0.5, metadata={"help": "Chance of a horizontal flip."})

    def __post_init__(self):
        require_positive(self, "shortest_edge")
        require_share(self, "flip_probability")
        if not 0 < self.min_scale <= self.max_scale:
            raise UsageError(f"--min_scale {self.min_scale} must be above 0 and at most --max_scale {self.max_scale}.")


@dataclass(kw_only=True)
class PanopticModel:
    """The backbone and the head that reads its features."""

    model: str = field(metadata={"help": "Hub id or folder of a SPAR model or a backbone of transformers."})
    out_features: list[str] = field(
        default_factory=lambda: ["features"],
        metadata={"help": "Stages of the backbone that the head reads: features, stage1, ..."},
    )
    hidden_dim: int = field(default=256, metadata={"help": "Width of the head."})
    decoder_layers: int = field(
        default=4, metadata={"help": "Predictions that the decoder makes: one before its layers and one after each."}
    )
    num_queries: int = field(default=100, metadata={"help": "Most segments per image."})
    train_num_points: int = field(default=12544, metadata={"help": "Points at which the loss of a mask is computed."})

    def __post_init__(self):
        require_positive(self, "hidden_dim", "decoder_layers", "num_queries", "train_num_points")


@dataclass(kw_only=True)
class PanopticTraining:
    """What is trained, and how."""

    steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Images per process and optimizer step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the head."})
    train_backbone: str = field(
        default="none", metadata={"help": "What is trained of the backbone: none, all or a number of last blocks."}
    )
    backbone_learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of the backbone."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Name of a transformers schedule."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps with rising learning rate."})

    def __post_init__(self):
        require_positive(self, "steps", "gradient_accumulation_steps", "learning_rate", "backbone_learning_rate")
        require_share(self, "warmup_ratio")
        blocks = self.train_backbone
        if blocks not in ("none", "all") and not (blocks.isdecimal() and int(blocks) > 0):
            raise UsageError(f"--train_backbone {blocks}: write none, all or a number of last blocks.")


@dataclass(kw_only=True)
class PanopticRun(RunOptions):
    """Where and how the training runs, and how often it reports."""

    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; the last two are kept."})
    workers: int = field(default=1, metadata={"help": "Processes that decode images."})
    log_steps: int = field(default=20, metadata={"help": "Steps between lines of the log."})
    eval_steps: int = field(
        default=500, metadata={"help": "Steps between measurements; OUTPUT/model is the best of those measured."}
    )
    threshold: float = field(
        default=0.5, metadata={"help": "Class probability from which a segment counts in a measurement."}
    )
    report_to: str | None = field(
        default=None,
        metadata={"help": "Tracker of accelerate, e.g. wandb; auto is TensorBoard where it is installed."},
    )

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "log_steps", "eval_steps")
        require_share(self, "threshold")


@dataclass(kw_only=True)
class PanopticOptions(ComposedOptions):
    """Options of training a panoptic head."""

    data: PanopticData
    views: PanopticViews
    model: PanopticModel
    training: PanopticTraining
    run: PanopticRun


def upgrade(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in a checkpoint of version 0.1 under the names of today; its --include took one pattern."""
    names = {"data": "dataset", "photos": "limit"}
    settings = {names.get(name, name): value for name, value in settings.items()}
    if isinstance(settings.get("include"), str):
        settings["include"] = [settings["include"]]
    return settings
