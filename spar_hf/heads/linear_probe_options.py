"""Options of linear probing, checked before any model is loaded."""

from dataclasses import dataclass
from typing import Any

from spar_hf.data.reading import ReadingOptions
from spar_hf.utils.errors import UsageError
from spar_hf.utils.fields import option, required
from spar_hf.utils.options import HELP, RUN_FREE, ComposedOptions, require_not_negative, require_positive, require_share
from spar_hf.utils.run_options import TrainingRunOptions

# options that a resumed run may change: none of them changes what is learned
FREE = {"output", "resume", "save_steps", "cache", "window_batch_size", *RUN_FREE}


@dataclass(kw_only=True)
class ProbeData(ReadingOptions):
    """Images with masks to train on and to test on."""

    train_dataset: str = required(
        "Folder with `images/`, `masks/` (8-bit PNG, 255 ignored) and `classes.txt` (also in its parent)."
    )
    test_dataset: str = required("Folder of held-out images with the same layout and classes.")
    train_include: list[str] = option(["*"], "Train on images whose stem matches one of these shell patterns,")
    train_exclude: list[str] | None = option(None, "and none of these,")
    train_every: int = option(1, "and of those on each n-th.")
    test_include: list[str] = option(["*"], "Test on images whose stem matches one of these shell patterns,")
    test_exclude: list[str] | None = option(None, "and none of these.")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "train_every")


@dataclass(kw_only=True)
class FeatureOptions:
    """How the frozen features are made."""

    model: str = required("Hub id or folder of a SPAR model or a backbone of transformers.")
    stride: int | None = option(None, HELP["stride"])
    inference: str = option("", "Earlier form of --stride: single or sliding:STRIDE.")
    shortest_edge: int | None = option(None, HELP["shortest_edge"])
    longest_edge: int | None = option(None, HELP["longest_edge"])
    window_batch_size: int = option(16, HELP["window_batch_size"])
    cache: str | None = option(
        None,
        "Folder to keep features in (2 bytes per number). They are used again for the same model, size, "
        "inference and image, also by later runs. By default features are made each time an image is drawn.",
    )

    def __post_init__(self):
        require_positive(self, "stride", "shortest_edge", "longest_edge", "window_batch_size")
        if self.inference:
            stride = parse_inference(self.inference)
            if self.stride not in (None, stride):
                raise UsageError(f"--stride {self.stride} and --inference {self.inference}: leave --inference out.")
            self.stride = stride
        self.inference = "single" if self.stride is None else f"sliding:{self.stride}"

    @property
    def size(self) -> dict[str, int]:
        """The size for the image processor; empty for its own."""
        edges = {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge}
        return {name: length for name, length in edges.items() if length is not None}


def parse_inference(text: str) -> int | None:
    """
    The stride of `sliding:STRIDE`, and `None` for `single`.

    Raises:
        UsageError: another form.

    Example:

    ```python
    >>> parse_inference("sliding:24"), parse_inference("single")
    (24, None)
    ```"""
    kind, _, stride = text.partition(":")
    if text == "single":
        return None
    if kind == "sliding" and stride.isdecimal() and int(stride) > 0:
        return int(stride)
    raise UsageError(f"--inference {text}: write single or sliding:STRIDE, e.g. sliding:24.")


@dataclass(kw_only=True)
class ProbeTraining:
    """How the heads are trained."""

    learning_rates: list[float] = option(
        [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "Peak learning rates; a head is trained with each."
    )
    weight_decay: float = option(1e-4, HELP["weight_decay"])
    steps: int = option(1000, HELP["steps"])
    batch_size: int = option(8, "Images per step and process.")
    pixels: int = option(4096, "Labelled pixels drawn from every image.")
    warmup_ratio: float = option(0.1, HELP["warmup_ratio"])

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
    run: TrainingRunOptions


def upgrade(settings: dict[str, Any]) -> dict[str, Any]:
    """
    Settings of a checkpoint under the names of today: earlier ones have no --stride, and the --train_include and
    --test_include of version 0.1 took one pattern.
    """
    one = {name for name in ("train_include", "test_include") if isinstance(settings.get(name), str)}
    settings = {"stride": parse_inference(settings["inference"])} | settings
    return {name: [value] if name in one else value for name, value in settings.items()}
