"""Options of linear probing, checked before any model is loaded."""

from dataclasses import dataclass, field
from typing import Any

from spar_hf.heads.common import RunOptions
from spar_hf.heads.frozen_features import parse_inference
from spar_hf.utils.errors import UsageError
from spar_hf.utils.options import RUN_FREE, ComposedOptions, require_not_negative, require_positive, require_share

# options that a resumed run may change: none of them changes what is learned
FREE = {"output", "resume", "save_steps", "cache", "window_batch_size", *RUN_FREE}


@dataclass(kw_only=True)
class ProbeData:
    """Images with masks to train on and to test on."""

    train_dataset: str = field(
        metadata={
            "help": "Folder with `images/`, `masks/` (8-bit PNG, 255 ignored) and `classes.txt` (also in its parent)."
        }
    )
    test_dataset: str = field(metadata={"help": "Folder of held-out images with the same layout and classes."})
    train_include: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={"help": "Train on images whose stem matches one of these shell patterns,"},
    )
    train_exclude: list[str] | None = field(default=None, metadata={"help": "and none of these,"})
    train_every: int = field(default=1, metadata={"help": "and of those on each n-th."})
    test_include: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={"help": "Test on images whose stem matches one of these shell patterns,"},
    )
    test_exclude: list[str] | None = field(default=None, metadata={"help": "and none of these."})

    def __post_init__(self):
        require_positive(self, "train_every")


@dataclass(kw_only=True)
class FeatureOptions:
    """How the frozen features are made."""

    model: str = field(metadata={"help": "Hub id or folder of a SPAR model or a backbone of transformers."})
    inference: str = field(
        default="single", metadata={"help": "single (one pass) or sliding:STRIDE (sliding window, stride in pixels)."}
    )
    shortest_edge: int | None = field(
        default=None,
        metadata={"help": "Shorter side in pixels that images are resized to; by default the image processor's size."},
    )
    longest_edge: int | None = field(
        default=None, metadata={"help": "Longer side in pixels; with --shortest_edge it is an upper bound."}
    )
    window_batch_size: int = field(default=16, metadata={"help": "Windows per forward pass of a sliding window."})
    cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder to keep features in (2 bytes per number). They are used again for the same model, size, "
            "inference and image, also by later runs. By default features are made each time an image is drawn."
        },
    )

    def __post_init__(self):
        require_positive(self, "shortest_edge", "longest_edge", "window_batch_size")
        parse_inference(self.inference)

    @property
    def size(self) -> dict[str, int]:
        """The size for the image processor; empty for its own."""
        edges = {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge}
        return {name: length for name, length in edges.items() if length is not None}


@dataclass(kw_only=True)
class ProbeTraining:
    """How the heads are trained."""

    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        metadata={"help": "Peak learning rates; a head is trained with each."},
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW weight decay."})
    steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Images per step and process."})
    pixels: int = field(default=4096, metadata={"help": "Labelled pixels drawn from every image."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps with rising learning rate."})

    def __post_init__(self):
        require_positive(self, "steps", "batch_size", "pixels")
        require_share(self, "warmup_ratio")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UsageError(f"--learning_rates {self.learning_rates} must be positive numbers, one or more.")
        require_not_negative(self, "weight_decay")


@dataclass(kw_only=True)
class ProbeOptions(ComposedOptions):
    """Options of linear probing."""

    features: FeatureOptions
    data: ProbeData
    training: ProbeTraining
    run: RunOptions


def upgrade(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in a checkpoint of version 0.1, whose --train_include and --test_include took one pattern."""
    one = {name for name in ("train_include", "test_include") if isinstance(settings.get(name), str)}
    return {name: [value] if name in one else value for name, value in settings.items()}
