"""
Options of a distillation, validated before any model is loaded.

Each part is a small dataclass that says what one step of the work needs; [`DistillationOptions`] composes them and checks
what they ask for together. On the command line and in YAML recipes (`recipes.py`) the options of all parts are flat.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spar_hf.data.augmentation import Views
from spar_hf.data.sources import ImageOptions
from spar_hf.distillation.presets import HELP_PRESET, PRESETS, with_later_options, with_preset
from spar_hf.distillation.trainable import ADAPTER_PARTS, BLOCK_PARTS, OTHER_PARTS
from spar_hf.model.vocabularies import VOCABULARIES
from spar_hf.utils.checkpoints import settings_of
from spar_hf.utils.errors import UsageError, as_usage_errors
from spar_hf.utils.fields import option, required
from spar_hf.utils.labels import label_text, parse_labels
from spar_hf.utils.options import (
    HELP,
    PRECISIONS,
    RUN_FREE,
    SCHEDULES,
    ComposedOptions,
    SafetyOptions,
    require_not_negative,
    require_one_of,
    require_positive,
    require_share,
)
from spar_hf.utils.run_options import TRACKERS
from spar_hf.windows import VARIANTS, default_stride

DEFAULT_STEPS = 1000
LONGEST = 4  # longer side of an image for the teacher over its --teacher_sides, which bounds the windows of a panorama
TEACHER_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# A resumed run may change these: they do not change what is learned.
FREE = {"output", "resume", "workers", "save_steps", "eval_steps", "picture_steps", "report_to", *RUN_FREE}
FREE |= {"preset", "dry_run", "teacher_compile", "save_dtype"}


@dataclass(kw_only=True)
class WindowOptions:
    """The model that teaches, and the windows that it runs on."""

    model: str = required(
        "Teacher, and start of the student: hub id or folder of a Transformers backbone or of a SPAR model."
    )
    stride: int | None = option(None, HELP["teacher_stride"])
    window_size: int | None = option(None, HELP["window_size"])
    rope_window_size: int | None = option(
        None, "Side of the windows in pixels for models without a position table (DINOv3), 384 in the paper."
    )
    window_batch_size: int = option(16, HELP["window_batch_size"])
    teacher_dtype: str | None = option(
        None,
        "Precision of the teacher's windows: fp32, fp16 or bf16. The teacher then holds weights of its own in it. Default: "
        "that of the weights, and of --mixed_precision.",
    )
    teacher_compile: bool = option(
        False, "Compile the teacher's encoder: a minute at the start for faster windows, most of all on GPUs."
    )

    def __post_init__(self):
        require_positive(self, "stride", "window_size", "rope_window_size", "window_batch_size")
        require_one_of(self, "teacher_dtype", TEACHER_DTYPES)


@dataclass(kw_only=True)
class TeacherOptions(WindowOptions):
    """The teacher, and how many of its windows make a target."""

    teacher_mode: str | None = option(
        None,
        "full: every window; sampled: an unbiased estimate from --teacher_windows of them; cached: feature "
        "maps that cache_teacher.py computed before. By default sampled if --teacher_windows is given, else full.",
    )
    teacher_windows: int | None = option(
        None, "Windows drawn per image for an unbiased estimate of the target; all by default."
    )
    teacher_variant: str = option(
        "spread", "How they are drawn: spread (far apart), tiling (near-tilings), windows (one by one)."
    )
    teacher_scales: list[float] | None = option(
        None,
        "Sizes of the image, over its own, that the teacher reads: the target is the mean of its features over "
        "them. The published teacher reads 1. With 1 0.5 its windows see outlines and whole scenes, and the student can "
        "become better than the published teacher. Of sampled windows each image gets one size.",
    )
    teacher_sides: list[int] | None = option(
        None,
        "Instead of --teacher_scales: the teacher reads the view, resized so that the whole image would have these shorter "
        "sides in pixels. A teacher is best where things are as large as in its own training; with 384 512 a student learns "
        f"at all its sizes what the teacher sees at these two. Images longer than {LONGEST} times that are read smaller.",
    )
    teacher_flip: bool = option(False, "The target is also the mean over the image and its mirror image.")
    teacher_cache: str | None = option(
        None,
        "Folder that cache_teacher.py wrote, for --teacher_mode cached. Its images are trained on; --images "
        "only provides the held-out ones.",
    )

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "teacher_windows")
        require_one_of(self, "teacher_mode", ("full", "sampled", "cached"))
        require_one_of(self, "teacher_variant", VARIANTS)
        if self.mode == "sampled" and self.teacher_windows is None:
            raise UsageError("--teacher_mode sampled needs --teacher_windows, for example --teacher_windows 20.")
        if self.mode != "sampled" and self.teacher_windows is not None:
            raise UsageError(f"--teacher_mode {self.mode} draws no windows. Leave out --teacher_windows.")
        if self.teacher_variant != "spread" and self.teacher_windows is None:
            raise UsageError("--teacher_variant needs --teacher_windows: without it no windows are drawn.")
        computed = ("teacher_scales", "teacher_sides", "teacher_flip", "teacher_dtype", "teacher_compile")
        if self.mode == "cached" and any(getattr(self, name) for name in computed):
            raise UsageError(f"--teacher_mode cached reads stored maps: leave out --{', --'.join(computed)}.")
        if self.teacher_scales is not None and not (self.teacher_scales and min(self.teacher_scales) > 0):
            raise UsageError("--teacher_scales are positive factors of the image's size, for example 1 0.5.")
        if self.teacher_sides is not None and not (self.teacher_sides and min(self.teacher_sides) > 0):
            raise UsageError("--teacher_sides are shorter sides of images in pixels, for example 384 512.")
        if self.teacher_sides and self.teacher_scales:
            raise UsageError(
                "--teacher_sides and --teacher_scales both say at which sizes the teacher reads. Leave one out."
            )
        if (self.mode == "cached") != (self.teacher_cache is not None):
            raise UsageError("--teacher_mode cached and --teacher_cache FOLDER belong together. Give both or neither.")

    @property
    def mode(self) -> str:
        """`full`, `sampled` or `cached`."""
        return self.teacher_mode or ("full" if self.teacher_windows is None else "sampled")

    def scales_for(self, image_size: tuple[float, float]) -> list[float] | None:
        """
        Sizes at which the teacher reads a view, over the view's own, for `--teacher_sides`; `None` leaves the teacher its
        own. `image_size` are the sides of the whole image at the size of the view, in pixels.

        Example:

        ```python
        >>> TeacherOptions(model="base", teacher_sides=[384, 512]).scales_for((256, 341))
        [1.5, 2.0]
        ```"""
        if self.teacher_sides is None:
            return None
        return [min(side / min(image_size), LONGEST * side / max(image_size)) for side in self.teacher_sides]


@dataclass(kw_only=True)
class StudentOptions:
    """Where the student starts, which of its weights are trained, and how it is stored."""

    student: list[str] = option(
        [],
        "Start of the student instead of the teacher's encoder: an earlier student, or several students of one "
        "teacher, whose weights are averaged.",
    )
    local_start: float | None = option(
        None,
        "Start the student with attention that prefers near patches: standard deviation of the Gaussian prior "
        "over distance, for example 0.3, in halves of the image's side; with --position_extent in teacher windows. Both "
        "are the same at two windows a side. For SigLIP and SigLIP2.",
    )
    position_extent: int | None = option(
        None,
        "Read the student's position table at one step per patch in images up to this many pixels, for example "
        "1024, instead of stretching it over each image (`SparConfig.position_extent`). In images of two windows a side "
        "the student starts unchanged. For SigLIP and SigLIP2.",
    )
    fit_prior: int = option(
        0,
        "Training images, with all windows of the teacher, on which the width of each block's Gaussian prior is "
        "fitted before training; for --local_start, or a --student that had it. For example 20; 0 fits nothing.",
    )
    train_layers: str = option("2", "Trained blocks: a number of last blocks, or 'all'.")
    train_parts: list[str] = option(
        [],
        f"Train only these parts: {', '.join(BLOCK_PARTS)} of the blocks that --train_layers names; "
        f"{', '.join(OTHER_PARTS)} outside the blocks. All by default.",
    )
    lora_rank: int | None = option(
        None,
        "Train low-rank adapters (peft) of this rank on the blocks of --train_layers, by default on attention "
        "and mlp. They are written to OUTPUT/adapter.",
    )
    lora_alpha: float | None = option(None, "Adapters are scaled by this over the rank; twice the rank by default.")
    merge: bool = option(False, "Also write a plain model with the adapters merged to OUTPUT/model.")
    save_dtype: str = option("float32", "Precision of the stored weights: float32, float16 or bfloat16.")

    def __post_init__(self):
        require_positive(self, "lora_rank", "lora_alpha", "local_start", "position_extent")
        require_not_negative(self, "fit_prior")
        require_one_of(self, "save_dtype", ("float32", "float16", "bfloat16"))
        if self.train_layers != "all" and not (self.train_layers.isdigit() and int(self.train_layers) > 0):
            raise UsageError(f"--train_layers {self.train_layers}: write 'all' or a number of last blocks, 1 or more.")
        if unknown := sorted(set(self.train_parts) - {*BLOCK_PARTS, *OTHER_PARTS}):
            raise UsageError(f"--train_parts {' '.join(unknown)}: use {', '.join((*BLOCK_PARTS, *OTHER_PARTS))}.")
        if self.fit_prior and self.local_start is None and not self.student:
            raise UsageError("--fit_prior needs a prior: give --local_start, or a --student that was trained with it.")
        if self.lora_rank is None:
            if self.merge or self.lora_alpha is not None:
                raise UsageError("--merge and --lora_alpha are for adapters. Give --lora_rank too, for example 8.")
        else:
            self._check_adapters()

    def _check_adapters(self):
        if self.local_start or self.fit_prior or self.position_extent:
            raise UsageError(
                "--local_start, --position_extent and --fit_prior change weights that adapters do not contain. Leave them "
                "or --lora_rank out."
            )
        if len(self.student) > 1:
            raise UsageError(
                "--lora_rank with several --student: adapters need the folder that they belong to, and the mean is in none. "
                "Write it first, with --steps 1 and without --lora_rank."
            )
        if outside := [part for part in self.train_parts if part not in ADAPTER_PARTS]:
            raise UsageError(
                f"--train_parts {' '.join(outside)}: adapters are made for linear layers of blocks "
                f"({', '.join(ADAPTER_PARTS)})."
            )


def words_of(entry: str) -> str:
    """
    An entry of `--words` as `a; b; c`, or the name of a built-in vocabulary.

    Raises:
        UsageError: a file that cannot be read; a class that stands twice; fewer than two names, so that there is nothing to
            tell apart.

    Example:

    ```python
    >>> _ = Path("words.txt").write_text("road\\ncar, automobile\\n")
    >>> words_of("@words.txt")
    'road; car, automobile'
    ```"""
    text = label_text(entry)
    with as_usage_errors():
        names = parse_labels(text).all_names
    if len(names) < 2:
        raise UsageError(
            f"--words {entry}: that is one name. Give classes as 'road; car, automobile; sky', a file with a class per line "
            f"as @FILE, or a built-in vocabulary: {', '.join(VOCABULARIES)}."
        )
    classes = "; ".join(part.strip() for part in text.replace("\n", ";").split(";") if part.strip())
    return f"; {classes}" if classes.startswith("@") else classes  # `@home; sky` would be read as the name of a file


@dataclass(kw_only=True)
class OptimisationOptions:
    """Loss, optimiser and schedule."""

    steps: int | None = option(None, f"Optimizer steps; {DEFAULT_STEPS} if --epochs is not given.")
    epochs: float | None = option(
        None, "How often every image (of a cache, every stored view) is seen, instead of --steps."
    )
    learning_rate: float = option(2e-5, HELP["learning_rate"])
    weight_decay: float = option(1e-4, HELP["weight_decay"])
    lr_scheduler_type: str = option("cosine", HELP["lr_scheduler_type"])
    warmup_ratio: float = option(0.05, HELP["warmup_ratio"])
    max_grad_norm: float = option(1.0, "Longer gradients are shortened to this norm; 0 leaves them as they are.")
    gradient_accumulation_steps: int = option(1, "Images per process and optimizer step.")
    same_size: int = option(
        0,
        "Draw one size for this many consecutive images. Give the number of processes, so that none waits for another's "
        "larger image; 0 draws a size for each image.",
    )
    whiten: float = option(
        0.0,
        "Divide the error along each principal axis of the teacher's features by its variance to this power: 0 "
        "is the paper's mean squared error, 1 weights all axes alike. Measured on the held-out images.",
    )
    words: list[str] = option(
        [],
        "Names of classes: built-in vocabularies (coco-stuff, cityscapes, ...), own ones as 'road; car, automobile; sky', "
        "or @FILE with a class per line. Beside the features, the student learns the teacher's class probabilities over "
        "the names of each vocabulary. For models with a text tower.",
    )
    words_weight: float = option(5.0, "Weight of the --words term beside the mean squared error.")
    words_balance: float = option(
        0.0,
        "Weigh patches in the --words term by how rare the teacher's classes are in the image, to this power: 0 weighs all "
        "patches alike, 1 all classes of an image.",
    )
    mixed_precision: str | None = option(None, HELP["mixed_precision"])
    seed: int = option(0, "Seed of the order of images, of their views and of drawn windows.")

    def __post_init__(self):
        require_positive(self, "steps", "epochs", "learning_rate", "gradient_accumulation_steps")
        require_not_negative(self, "weight_decay", "max_grad_norm", "same_size", "words_weight")
        require_share(self, "whiten", "warmup_ratio", "words_balance")
        require_one_of(self, "mixed_precision", PRECISIONS)
        require_one_of(self, "lr_scheduler_type", SCHEDULES)
        if self.words_balance and not self.words:
            raise UsageError(
                "--words_balance weighs the --words term, and there are no words. Give --words, or leave it out."
            )
        # What a file says, not where it lies, so that the recipe is whole and a resumed run has the same words.
        self.words = [words_of(entry) for entry in self.words]
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs both say when to stop. Leave one out.")

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps, unless `epochs` decides."""
        return DEFAULT_STEPS if self.steps is None and self.epochs is None else self.steps


@dataclass(kw_only=True)
class RunOptions(SafetyOptions):
    """Where a run writes, how often it measures and saves, and whether it resumes."""

    output: str = required("Folder of the run; the student is written to OUTPUT/model.")
    preset: str | None = option(None, HELP_PRESET)
    dry_run: bool = option(False, "Print all options with their defaults and the published values, and stop.")
    holdout_images: int = option(8, "Held-out images that the error is measured on.")
    log_steps: int = option(20, HELP["log_steps"])
    save_steps: int = option(500, HELP["save_steps"])
    eval_steps: int = option(
        500, "Steps between held-out errors; the student with the smallest is kept in OUTPUT/model."
    )
    picture_steps: int = option(500, "Steps between held-out errors with pictures of the feature maps; 0 draws none.")
    resume: bool = option(False, HELP["resume"])
    report_to: str = option("auto", HELP["report_to"])

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "log_steps", "save_steps", "eval_steps")
        require_not_negative(self, "holdout_images", "picture_steps")
        require_one_of(self, "report_to", TRACKERS)
        require_one_of(self, "preset", PRESETS)


@dataclass(kw_only=True)
class DistillationOptions(ComposedOptions):
    """
    All options of a distillation.

    Args:
        images ([`ImageOptions`]): which images are read, and which of them are held out.
        views ([`Views`]): how views of them are drawn.
        teacher ([`TeacherOptions`]): model, windows, and how targets are made.
        student ([`StudentOptions`]): start and trained weights of the student.
        optimisation ([`OptimisationOptions`]): loss, optimiser and schedule.
        run ([`RunOptions`]): output folder and intervals.

    Raises:
        UsageError: options that exclude each other; the message names them as on the command line.

    Example:

    ```python
    >>> options = DistillationOptions.from_flat(model="base", images=["photos"], output="run", preset="spar-all")
    >>> options.student.train_layers, options.optimisation.epochs, options.teacher.mode
    ('all', 10, 'full')
    ```"""

    images: ImageOptions
    views: Views
    teacher: TeacherOptions
    student: StudentOptions
    optimisation: OptimisationOptions
    run: RunOptions

    def __post_init__(self):
        if self.images.streaming and self.optimisation.epochs is not None:
            raise UsageError(
                "--streaming does not know how many images an epoch has. Give --steps instead of --epochs."
            )
        if self.teacher.mode == "cached" and self.views.jitter_student_only:
            raise UsageError(
                "--teacher_mode cached has maps of stored views, which student and teacher share. Leave out "
                "--jitter_student_only, or the cache."
            )
        if self.teacher.mode == "cached" and (self.images.streaming or self.views.jitter_probability):
            raise UsageError(
                "--teacher_mode cached reads stored maps of stored views: leave out --streaming, and give "
                "--jitter_probability to cache_teacher.py instead."
            )
        if self.views.cutmix_probability and (self.teacher.mode == "cached" or self.images.streaming):
            raise UsageError(
                "--cutmix_probability draws other images at random; --teacher_mode cached has maps of whole images, and "
                "--streaming only the next image. Leave one out."
            )
        if self.optimisation.same_size and (self.teacher.mode == "cached" or self.views.fixed_views):
            raise UsageError(
                "--same_size draws sizes anew for every step, and --teacher_mode cached and --fixed_views keep those of "
                "each image. Leave one out."
            )
        if self.optimisation.same_size and self.images.streaming:
            raise UsageError(
                "--same_size needs to know which images make a step, and a stream finds out while it reads which of its "
                "images are held out. Leave --same_size or --streaming out."
            )
        if (self.student.local_start is not None or self.student.fit_prior) and self.images.streaming:
            raise UsageError("--local_start and --fit_prior need images from all of the set: leave out --streaming.")
        if self.optimisation.whiten and not self.run.holdout_images:
            raise UsageError("--whiten is measured on held-out images, and there are none; set --holdout_images.")

    @classmethod
    def from_flat(cls, **values: Any) -> "DistillationOptions":
        """
        Options under their names on the command line. A `preset` fills in what is not given.

        Raises:
            UsageError: an unknown, missing or invalid option.
        """
        return super().from_flat(**with_preset(cls.with_current_names(values)))

    @classmethod
    def with_current_names(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Options of an earlier version under the names of today; those of a run are completed ([`with_later_options`])."""
        return with_later_options(super().with_current_names(values))

    @property
    def flat(self) -> dict[str, Any]:
        """
        All options by their names on the command line, as `recipe.yaml` keeps them. Defaults that depend on other options
        (`teacher_mode`, `steps`) are resolved, and the stride as for patches of 16 px until the model is known.
        """
        return super().flat | self.resolved

    @property
    def resolved(self) -> dict[str, Any]:
        """Values of the options whose defaults depend on other options."""
        stride = default_stride(16) if self.teacher.stride is None else self.teacher.stride
        return {"teacher_mode": self.teacher.mode, "steps": self.optimisation.max_steps, "stride": stride}

    @property
    def settings(self) -> dict[str, Any]:
        """The options that a resumed run must share, as JSON returns them."""
        return settings_of(self, FREE) | self.resolved

    @property
    def folders(self) -> list[Path]:
        """The folders that are written: adapters, the whole student, or both."""
        output, adapters = Path(self.run.output), self.student.lora_rank is not None
        plain = not adapters or self.student.merge
        return [output / "adapter"] * adapters + [output / "model"] * plain
