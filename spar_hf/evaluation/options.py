"""Options of an evaluation: small dataclasses, one for each step, that check themselves when they are made."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spar_hf.data.augmentation import RESAMPLINGS
from spar_hf.data.benchmarks import BENCHMARKS
from spar_hf.data.reading import ReadingOptions
from spar_hf.data.segmentation_sets import IGNORE_INDEX
from spar_hf.utils.errors import UsageError
from spar_hf.utils.fields import option, required
from spar_hf.utils.options import (
    HELP,
    PRECISIONS,
    ComposedOptions,
    formerly,
    require_not_negative,
    require_one_of,
    require_positive,
    require_share,
)


@dataclass(kw_only=True)
class DataOptions(ReadingOptions):
    """
    Choice of the images, and how they are read.

    Raises:
        UsageError: an option is out of range.
    """

    dataset: str = required(
        "Folder with `images/`, `masks/` and `classes.txt` (also in its parent); with --benchmark, the "
        "folder of that benchmark; else a Hugging Face data set: hub id, folder of save_to_disk or of parquet files."
    )
    benchmark: str | None = option(
        None, "Read --dataset in the published layout of this benchmark: " + ", ".join(BENCHMARKS)
    )
    split: str | None = option(None, "Split of a Hugging Face data set.")
    subset: str | None = option(
        None, "Configuration of a Hugging Face data set that has several, as on the hub's page."
    )
    image_column: str = option("image", "Column of images of a Hugging Face data set.")
    mask_column: str = option("mask", "Column of masks of a Hugging Face data set.")
    classes: str | None = option(
        None, "Text file with the classes of a Hugging Face data set, one per line, ordered by mask value."
    )
    ignore_index: int = option(IGNORE_INDEX, "Mask value that a Hugging Face data set ignores, in addition to 255.")
    reduce_zero_label: bool = option(
        False, "In a Hugging Face data set, mask value 0 is ignored and value v is class v - 1."
    )
    include: list[str] = option(["*"], HELP["include"])
    exclude: list[str] | None = option(None, HELP["exclude"])
    holdout_every: int = option(
        0,
        "Only every n-th image: those that training with `holdout_every: n` holds out. Counted after --exclude "
        "(give the one of the training) and before --include and --limit. 0: all images.",
    )
    holdout_rest: bool = option(False, "Only the images that --holdout_every does not hold out.")
    limit: int | None = option(None, "At most this many images, from the first one on.")

    def __post_init__(self):
        super().__post_init__()
        require_not_negative(self, "holdout_every")
        require_positive(self, "limit")
        if self.holdout_rest and not self.holdout_every:
            raise UsageError("--holdout_rest needs --holdout_every: 5, for example, for all but every fifth image.")


@dataclass(kw_only=True)
class WordOptions:
    """Choice of the classes and of the words for them."""

    vocabulary: str | None = option(
        None, "Built-in vocabulary with words for the classes, in the order of the data set's classes."
    )
    class_names: str | None = option(
        None,
        "JSON file {class: [name, …]} with words for some classes; the others keep theirs.",
        aliases=formerly("labels"),
    )
    templates: str | None = option(None, HELP["templates"])
    ignore_classes: list[str] | None = option(None, "Classes whose pixels are ignored and that are not predicted.")
    only_classes: list[str] | None = option(
        None, "Classes to average mIoU and accuracies over. All classes can still be predicted."
    )


@dataclass(kw_only=True)
class ResolutionOptions:
    """
    Size to which images are resized for the model, in pixels. Predictions are compared at the size of the mask.

    Raises:
        UsageError: a length is below 1, or several ways to resize are given.

    Example:

    ```python
    >>> ResolutionOptions(shortest_edge=384).resize
    {'do_resize': True, 'size': {'shortest_edge': 384}}
    ```"""

    shortest_edge: int | None = option(None, HELP["shortest_edge"])
    longest_edge: int | None = option(None, HELP["longest_edge"])
    size: list[int] | None = option(None, "Resize images to this height and width.")
    native: bool = option(False, "Do not resize images. Default: the size of the protocol, else of the checkpoint.")
    resample: str | None = option(None, HELP["resample"])

    def __post_init__(self):
        require_positive(self, "shortest_edge", "longest_edge")
        require_one_of(self, "resample", RESAMPLINGS)
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise UsageError(f"--size takes a height and a width of at least 1, got {self.size}.")
        if self.native + bool(self.size) + bool(self.shortest_edge or self.longest_edge) > 1:
            raise UsageError("Give one of --native, --size, or --shortest_edge and --longest_edge.")
        if self.native and self.resample:
            raise UsageError(f"--native resizes nothing: leave out --resample {self.resample}, or give a size.")

    @property
    def resize(self) -> dict[str, Any] | None:
        """Keywords of the image processor; `None` if no option is given."""
        if self.native:
            return {"do_resize": False}
        size = dict(zip(("height", "width"), self.size or (), strict=False))
        size |= {name: getattr(self, name) for name in ("shortest_edge", "longest_edge") if getattr(self, name)}
        return {"do_resize": True, "size": size} if size else None


@dataclass(kw_only=True)
class RuleOptions:
    """
    Rules that turn logits into classes, and the published protocol that fills in options left open.

    Raises:
        UsageError: an option is out of range.
    """

    protocol: str | None = option(
        None,
        "Published evaluation: spar. It sets resolution, resizing, windows, templates, scale, background rules and words "
        "for a benchmark. An option given here overrides it.",
    )
    dense_logit_scale: float | None = option(
        None, "Factor of the cosines before the softmax. Default: that of the checkpoint.", aliases=formerly("scale")
    )
    threshold: float | None = option(None, HELP["threshold"])
    exclude_area: float | None = option(
        None,
        "Before --threshold, exclude classes that win at most this share of the pixels outside the background. "
        "Their pixels go to the best remaining class, as in the published evaluation. (`min_area` of the pipeline gives "
        "them to the background.)",
        aliases=formerly("min_area"),
    )

    def __post_init__(self):
        require_positive(self, "dense_logit_scale")
        require_share(self, "threshold", "exclude_area")


@dataclass(kw_only=True)
class MeasurementOptions:
    """
    Models, the ways to run them, and what is measured.

    Raises:
        UsageError: an option is out of range, or has no effect beside the others.
    """

    model: list[str] = required(
        "Models with two towers: folder or hub id of a SPAR model or of a Transformers backbone, each as FOLDER "
        "or NAME=FOLDER."
    )
    runs: list[str] | None = option(
        None,
        "Runs in the order of the table: NAME:single; NAME:sliding:STRIDE (mean of the windows' features, as in "
        "training); NAME:sliding-logits:STRIDE (mean of their logits, as in the published evaluation). The first two "
        "may be refined: NAME:single+lposs. Default: every model in a single pass.",
    )
    window_size: int | None = option(None, HELP["window_size"])
    window_batch_size: int = option(16, HELP["window_batch_size"])
    mixed_precision: str | None = option(None, HELP["mixed_precision"])
    boundary: bool = option(True, "Measure boundary IoU as well.")
    flicker: bool = option(
        False,
        "For the frames of videos, in the order of their names: measure flicker, the share of the pixels that change their "
        "class from one frame to the next although the image stands still there. Frames of one video lie in one folder, and "
        "their names differ in one number.",
    )
    dilation_ratio: float | None = option(
        None, "Width of boundaries as a share of the image diagonal. Default: the protocol's, else 0.02."
    )
    warmup: bool = option(
        True,
        "Run every model once on the first image before times are taken. On a CPU, run it once more to measure "
        "peak memory, there and on every image with more pixels or a longer shape than all before.",
    )

    def __post_init__(self):
        require_positive(self, "window_size", "window_batch_size", "dilation_ratio")
        require_one_of(self, "mixed_precision", PRECISIONS)
        if self.dilation_ratio is not None and not self.boundary:
            raise UsageError("--no_boundary measures no boundaries: leave out --dilation_ratio.")

    def check_windows(self) -> None:
        """
        For the command, whose runs are these: the figures of the studies choose others with the same options.

        Raises:
            UsageError: an option of windows is given, and no run slides one.
        """
        windows = {
            "--window_size": self.window_size is not None,
            "--window_batch_size": self.window_batch_size != type(self).window_batch_size,
        }
        given = [name for name, is_given in windows.items() if is_given]
        if given and not any(":sliding" in run for run in self.runs or ()):  # names of models have no colon
            raise UsageError(
                f"No run slides a window: leave out {', '.join(given)}, or give --runs NAME:sliding:STRIDE."
            )


@dataclass(kw_only=True)
class OutputOptions:
    """
    Files to write.

    Raises:
        UsageError: `output` is a folder.
    """

    output: str | None = option(
        None,
        "JSON file for the report. Until it is written, partial counts are kept in OUTPUT.parts, and the same "
        "command continues an interrupted measurement.",
    )
    card_folder: str | None = option(
        None,
        "Folder for the results of each model: a model card NAME.md, and .eval_results/NAME.yaml for the leaderboard of the "
        "data set on the hub.",
    )
    compare: str | None = option(
        None, "published: print ours among the published figures on the same --benchmark, and what differs."
    )
    save_seconds: float = option(30, "Seconds between two writes of partial counts.")
    overwrite: bool = option(False, HELP["overwrite"])

    def __post_init__(self):
        require_one_of(self, "compare", ("published",))
        if self.output is not None and (Path(self.output).is_dir() or self.output.endswith(("/", os.sep))):
            example = Path(self.output) / "result.json"
            raise UsageError(f"--output {self.output} is a folder. Name the file of the report, for example {example}.")


@dataclass(kw_only=True)
class EvaluationOptions(ComposedOptions):
    """
    Options of an evaluation, one part for each step. The command line has all of them on one level.

    Raises:
        UsageError: options that need one another; the message names them as on the command line.

    Example:

    ```python
    >>> options = EvaluationOptions(
    ...     data=DataOptions(dataset="street"),
    ...     run=MeasurementOptions(model=["student=runs/student"]),
    ...     resolution=ResolutionOptions(shortest_edge=384),
    ... )
    >>> options == EvaluationOptions.from_flat(dataset="street", model=["student=runs/student"], shortest_edge=384)
    True
    ```"""

    data: DataOptions
    run: MeasurementOptions
    words: WordOptions = field(default_factory=WordOptions)
    resolution: ResolutionOptions = field(default_factory=ResolutionOptions)
    rules: RuleOptions = field(default_factory=RuleOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def __post_init__(self):
        if self.output.compare and self.data.benchmark is None:
            raise UsageError("--compare published compares results on a benchmark. Name it with --benchmark.")


PARTS = EvaluationOptions.parts()
