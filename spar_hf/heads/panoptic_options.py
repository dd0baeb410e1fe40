"""Options of training a panoptic head, checked before any model is loaded."""

from dataclasses import dataclass
from typing import Any

from spar_hf.data.reading import ReadingOptions
from spar_hf.utils.errors import UsageError
from spar_hf.utils.fields import option, required
from spar_hf.utils.options import (
    HELP,
    RUN_FREE,
    SCHEDULES,
    ComposedOptions,
    formerly,
    require_not_negative,
    require_one_of,
    require_positive,
    require_share,
)
from spar_hf.utils.run_options import TRACKERS, TrainingRunOptions

# options that a resumed run may change: none of them changes what is learned
FREE = {"output", "resume", "workers", "save_steps", "report_to", *RUN_FREE}


@dataclass(kw_only=True)
class PanopticData(ReadingOptions):
    """Images with masks, and what in a mask is a segment."""

    dataset: str = required(
        "Folder with images/, masks/ (8-bit PNG of class numbers) and classes.txt.", aliases=formerly("data")
    )
    merge_classes: str | None = option(
        None,
        "JSON file {class: [line of classes.txt, ...]} that merges classes; lines that it does not name are "
        "ignored. E.g. training/configs/coco_supercategories.json. By default each line of classes.txt is a class.",
        aliases=formerly("classes"),
    )
    things: list[str] = option(
        [], "Countable classes: names, or one number N for the first N (COCO: 80, its supercategories: 12)."
    )
    min_region_area: float = option(
        0.001,
        "Regions of countable classes below this share of the image are ignored, in training and measuring.",
        aliases=formerly("min_area"),
    )
    include: list[str] = option(["*"], HELP["include"])
    exclude: list[str] = option([], HELP["exclude"])
    holdout_every: int = option(
        5, "Each n-th image (sorted by name) is held out to measure on; 0 measures on the training images."
    )
    limit: int | None = option(
        None, "Train on the first so many images only; by default on all.", aliases=formerly("photos")
    )

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "limit")
        require_share(self, "min_region_area")
        if self.holdout_every < 0 or self.holdout_every == 1:
            raise UsageError(f"--holdout_every {self.holdout_every} must be 0 or at least 2.")


@dataclass(kw_only=True)
class PanopticViews:
    """How images are resized and augmented."""

    shortest_edge: int = option(512, HELP["shortest_edge"].partition(" Default")[0])
    min_scale: float = option(0.75, "In training, times a factor drawn between this ...")
    max_scale: float = option(1.25, "... and this.")
    flip_probability: float = option(0.5, "Chance of a horizontal flip.")

    def __post_init__(self):
        require_positive(self, "shortest_edge")
        require_share(self, "flip_probability")
        if not 0 < self.min_scale <= self.max_scale:
            raise UsageError(f"--min_scale {self.min_scale} must be above 0 and at most --max_scale {self.max_scale}.")


@dataclass(kw_only=True)
class PanopticModel:
    """The backbone and the head that reads its features."""

    model: str = required("Hub id or folder of a SPAR model or a backbone of transformers.")
    out_features: list[str] = option(["features"], "Stages of the backbone that the head reads: features, stage1, ...")
    hidden_dim: int = option(256, "Width of the head.")
    decoder_layers: int = option(4, "Predictions that the decoder makes: one before its layers and one after each.")
    num_queries: int = option(100, "Most segments per image.")
    train_num_points: int = option(12544, "Points at which the loss of a mask is computed.")

    def __post_init__(self):
        require_positive(self, "hidden_dim", "decoder_layers", "num_queries", "train_num_points")


@dataclass(kw_only=True)
class PanopticTraining:
    """What is trained, and how."""

    steps: int = option(2000, HELP["steps"])
    gradient_accumulation_steps: int = option(4, "Images per process and optimizer step.")
    learning_rate: float = option(1e-3, "Peak learning rate of the head.")
    train_backbone: str = option("none", "What is trained of the backbone: none, all or a number of last blocks.")
    backbone_learning_rate: float = option(1e-4, "Peak learning rate of the backbone.")
    weight_decay: float = option(0.05, HELP["weight_decay"])
    lr_scheduler_type: str = option("cosine", HELP["lr_scheduler_type"])
    warmup_ratio: float = option(0.05, HELP["warmup_ratio"])

    def __post_init__(self):
        require_positive(self, "steps", "gradient_accumulation_steps", "learning_rate", "backbone_learning_rate")
        require_share(self, "warmup_ratio")
        require_one_of(self, "lr_scheduler_type", SCHEDULES)
        blocks = self.train_backbone
        if blocks not in ("none", "all") and not (blocks.isdecimal() and int(blocks) > 0):
            raise UsageError(f"--train_backbone {blocks}: write none, all or a number of last blocks.")


@dataclass(kw_only=True)
class PanopticRun(TrainingRunOptions):
    """Where and how the training runs, and how often it reports."""

    save_steps: int = option(500, HELP["save_steps"])
    workers: int = option(1, HELP["workers"])
    log_steps: int = option(20, HELP["log_steps"])
    eval_steps: int = option(500, "Steps between measurements; OUTPUT/model is the best of those measured.")
    segment_threshold: float = option(
        0.5, "Class probability from which a segment counts in a measurement.", aliases=formerly("threshold")
    )
    report_to: str | None = option(None, HELP["report_to"])

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "log_steps", "eval_steps")
        require_not_negative(self, "workers")
        require_share(self, "segment_threshold")
        require_one_of(self, "report_to", TRACKERS)


@dataclass(kw_only=True)
class PanopticOptions(ComposedOptions):
    """Options of training a panoptic head."""

    data: PanopticData
    views: PanopticViews
    model: PanopticModel
    training: PanopticTraining
    run: PanopticRun


def upgrade(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint under the names of today; the --include of version 0.1 took one pattern."""
    settings = PanopticOptions.with_current_names(settings)
    if isinstance(settings.get("include"), str):
        settings["include"] = [settings["include"]]
    return settings
