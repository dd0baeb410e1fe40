"""What a distillation can be told, in one dataclass; recipes by name and from YAML; checks before any work starts."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from transformers import HfArgumentParser
from transformers.trainer_utils import SchedulerType

from spar_hf.distillation.student import BLOCK_PARTS, OTHER_PARTS
from spar_hf.teacher import VARIANTS
from spar_hf.utils.checkpoints import settings_of

# SPAR, section 4: images fit 4 x 2 windows times U(0.5, 1); the third recipe's go up to 2560 px, 5 of its windows of 512 px
RECIPE: dict[str, Any] = {
    "epochs": 10,
    "learning_rate": 2e-5,
    "weight_decay": 1e-4,
    "stride": 24,
    "long_side": 4.0,
    "short_side": 2.0,
    "min_scale": 0.5,
    "crop_probability": 0.5,
    "flip_probability": 0.5,
}
PRESETS: dict[str, dict[str, Any]] = {
    "spar": RECIPE | {"train_layers": "2"},
    "spar-all": RECIPE | {"train_layers": "all"},
    "spar-all-hires": RECIPE | {"train_layers": "all", "long_side": 5.0, "short_side": 2.5},
}
# what a resumed run may have otherwise: none of it changes what is learned
FREE = {"output", "resume", "workers", "save_steps", "eval_steps", "picture_steps", "report_to", "preset"}
# what an image's view is drawn with; of stored maps the cache says it
VIEW = ["long_side", "short_side", "min_scale", "crop_probability", "flip_probability", "jitter_probability"]
# what the written folder says of its making as it was given
RECORDED = [
    "teacher_mode",
    "teacher_variant",
    "exclude",
    "preset",
    "train_layers",
    "train_parts",
    "lora_rank",
    "whiten",
    "words",
    "words_weight",
    "local_start",
    "fit_prior",
    "learning_rate",
    "weight_decay",
    "seed",
]


@dataclass(kw_only=True)
class TeacherViews:
    """
    What the teacher sees of which images: the options that distillation and the cache of its maps have both. Sizes of images
    are in windows, so that the recipe fits every backbone.
    """

    exclude: list[str] = field(default_factory=list, metadata={"help": "Shell patterns of file stems never read."})
    holdout_every: int = field(
        default=20,
        metadata={
            "help": "Each n-th image of every folder (sorted by name) or data set is kept for the held-out error; of a "
            "stream those whose checksum is a multiple of n."
        },
    )
    stride: int = field(default=24, metadata={"help": "Stride of the teacher's windows in pixels."})
    window_size: int | None = field(
        default=None, metadata={"help": "Teacher's window; the model's image_size by default."}
    )
    window_batch_size: int = field(default=16, metadata={"help": "Windows per forward pass of the teacher."})
    long_side: float = field(default=4.0, metadata={"help": "Images fit this many windows along their longer side ..."})
    short_side: float = field(default=2.0, metadata={"help": "... and this many along their shorter side,"})
    min_scale: float = field(default=0.5, metadata={"help": "times a factor drawn between this and 1."})
    crop_probability: float = field(
        default=0.5, metadata={"help": "Chance of a random crop to 0.4 or more of each side."}
    )
    flip_probability: float = field(default=0.5, metadata={"help": "Chance of a horizontal flip."})
    jitter_probability: float = field(
        default=0.0,
        metadata={
            "help": "Chance that light, contrast and colour of an image are changed at random, for teacher and student "
            "alike (0 in the paper). Where images are few, the student else learns their light by heart."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order of images and of their views."})

    def __post_init__(self):
        if not 0 < self.min_scale <= 1 or self.holdout_every < 2:
            raise ValueError("--min_scale lies in (0, 1] and --holdout_every is at least 2.")
        for name in ("crop_probability", "flip_probability", "jitter_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie in 0 to 1.")
        check_positive(self, "long_side short_side window_batch_size")


def check_positive(options: Any, names: str) -> None:
    """
    Raises:
        ValueError: one of these options is given and not above 0.
    """
    for name in names.split():
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise ValueError(f"--{name} {getattr(options, name)} must be above 0.")


@dataclass(kw_only=True)
class Options(TeacherViews):
    """Options of the distillation."""

    model: str = field(
        metadata={
            "help": "Teacher, and start of the student: hub id or folder of a backbone of transformers or a SPAR model."
        }
    )
    images: list[str] = field(
        metadata={
            "help": "Images, no labels needed: folders, lists (.txt, a path a line), data sets of `datasets` (a folder of "
            "save_to_disk, .arrow and .parquet files, hub ids), WebDataset shards (.tar). One named twice counts twice."
        }
    )
    output: str = field(metadata={"help": "Folder to write the student to."})
    preset: str | None = field(
        default=None,
        metadata={
            "help": f"Recipe of the paper by name ({', '.join(PRESETS)}): last two blocks, everything, everything on larger "
            "images. Options given beside it win."
        },
    )
    student: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Start of the student, where it is not the teacher's encoder: an earlier student, or several that go "
            "back to one, whose weights are averaged."
        },
    )
    local_start: float | None = field(
        default=None,
        metadata={
            "help": "Start the student with attention that stays near (training/local_start.py): standard deviation of the "
            "Gaussian prior over distance in halves of the image's side, 0.3 say; with --position_extent in windows, which "
            "is the same at two windows a side. For SigLIP and SigLIP2."
        },
    )
    position_extent: int | None = field(
        default=None,
        metadata={
            "help": "Let the student read its position table at one step per patch in images up to this many pixels, 1024 "
            "say, instead of stretching it over each (`SparConfig.position_extent`). It begins as it was at two windows a "
            "side. For SigLIP and SigLIP2."
        },
    )
    fit_prior: int = field(
        default=0,
        metadata={
            "help": "Training images, with all windows of the teacher, on which the strength of each block's prior is set "
            "before training: of --local_start, or of a --student that had one; 20 say, 0 for none."
        },
    )
    whiten: float = field(
        default=0.0,
        metadata={
            "help": "Divides the error along each principal axis of the teacher's features by their variance there to this "
            "power: 0 is the paper's mean squared error, 1 counts all axes alike."
        },
    )
    words: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Built-in vocabularies (coco-stuff, cityscapes, ...) over which the student is to decide as the teacher "
            "does, beside the paper's error of the features; for models with a text tower."
        },
    )
    words_weight: float = field(default=5.0, metadata={"help": "Weight of that term beside the mean squared error."})
    split: str = field(default="train", metadata={"help": "Split of the data sets among --images that have several."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images in data sets; found by its type by default."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read data sets and shards in passing, without an index or a copy on disk."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Images among which a stream is shuffled."})
    min_side: int = field(default=32, metadata={"help": "Images with a shorter side in pixels are skipped and listed."})
    holdout_images: int = field(default=8, metadata={"help": "Held-out images the error is measured on."})
    steps: int | None = field(default=None, metadata={"help": "Optimizer steps; 1000 where --epochs is not given."})
    epochs: float | None = field(default=None, metadata={"help": "How often every image is seen, instead of --steps."})
    train_layers: str = field(default="2", metadata={"help": "Trainable: number of last blocks, or 'all'."})
    train_parts: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Only these parts: {', '.join(BLOCK_PARTS)} of the blocks that --train_layers names; "
            f"{', '.join(OTHER_PARTS)} outside of the blocks. Everything there by default."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train low-rank adapters (peft) of this rank on the blocks of --train_layers, by default on attention "
            "and mlp; OUTPUT/adapter holds them."
        },
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Adapters are scaled by this over the rank; twice the rank by default."}
    )
    merge: bool = field(
        default=False, metadata={"help": "Write the adapters merged into a plain OUTPUT/model as well."}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Name of a transformers schedule."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps with rising learning rate."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Images per process and optimizer step."})
    teacher_mode: str | None = field(
        default=None,
        metadata={
            "help": "full: every window; sampled: an unbiased estimate from --teacher_windows of them; cached: maps "
            "computed before. By default sampled where --teacher_windows is given, else full."
        },
    )
    teacher_windows: int | None = field(
        default=None,
        metadata={"help": "Windows drawn per image for an unbiased estimate of the target; all by default."},
    )
    teacher_variant: str = field(
        default="spread",
        metadata={"help": "How they are drawn: spread (far apart), tiling (near-tilings), windows (one by one)."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that training/cache_teacher.py wrote, for --teacher_mode cached: its images are trained on; "
            "--images only gives those that are held out."
        },
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16 or bf16; by default what accelerate's configuration says."}
    )
    save_dtype: str = field(
        default="float32", metadata={"help": "Precision of the stored weights: float32, float16 or bfloat16."}
    )
    workers: int = field(default=1, metadata={"help": "Processes that decode images."})
    log_steps: int = field(default=20, metadata={"help": "Steps between lines of the log."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; the last two are kept."})
    eval_steps: int = field(
        default=500, metadata={"help": "Steps between held-out errors; OUTPUT/model is the student with the least."}
    )
    picture_steps: int = field(
        default=500,
        metadata={"help": "Steps between held-out errors with pictures of the feature maps; 0 draws none."},
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in --output, as if never stopped."}
    )
    report_to: str = field(
        default="auto",
        metadata={
            "help": "Tracker of accelerate by name (tensorboard, wandb, ...), none; auto: tensorboard if installed."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.train_layers != "all" and not (self.train_layers.isdigit() and int(self.train_layers) > 0):
            raise ValueError(f"--train_layers {self.train_layers}: write 'all' or a number of last blocks, 1 or more.")
        for name in ("whiten", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie in 0 to 1.")
        check_positive(
            self,
            "steps epochs teacher_windows gradient_accumulation_steps shuffle_buffer lora_rank lora_alpha local_start "
            "position_extent log_steps save_steps eval_steps learning_rate",
        )
        for name in ("holdout_images", "picture_steps", "workers", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be 0 or above.")
        for name, known in (
            ("save_dtype", ["float32", "float16", "bfloat16"]),
            ("mixed_precision", [None, "no", "fp16", "bf16"]),
            ("teacher_mode", [None, "full", "sampled", "cached"]),
            ("teacher_variant", [*VARIANTS]),
            ("lr_scheduler_type", [str(kind.value) for kind in SchedulerType]),
            ("report_to", ["auto", "none", *map(str, LOGGER_TYPE_TO_CLASS)]),
            ("preset", [None, *PRESETS]),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: use one of {', '.join(k for k in known if k)}.")
        unknown = set(self.train_parts) - {*BLOCK_PARTS, *OTHER_PARTS}
        if unknown:
            known_parts = ", ".join((*BLOCK_PARTS, *OTHER_PARTS))
            raise ValueError(f"--train_parts {' '.join(sorted(unknown))}: use {known_parts}.")
        self._check_combinations()
        self.teacher_mode = self.teacher_mode or ("full" if self.teacher_windows is None else "sampled")
        if self.steps is None and self.epochs is None:
            self.steps = 1000

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must have as well, as JSON and YAML give it back."""
        return settings_of(self, FREE)

    @property
    def folders(self) -> list[Path]:
        """What is written: the adapters, the whole student, or both."""
        adapter = [Path(self.output) / "adapter"] if self.lora_rank is not None else []
        return adapter + ([Path(self.output) / "model"] if not adapter or self.merge else [])

    def _check_combinations(self):
        if self.steps is not None and self.epochs is not None:
            raise ValueError("--steps and --epochs both say when to stop. Leave one out.")
        if self.streaming and self.epochs is not None:
            raise ValueError(
                "--streaming does not know how many images an epoch has. Give --steps instead of --epochs."
            )
        if self.teacher_mode == "sampled" and self.teacher_windows is None:
            raise ValueError("--teacher_mode sampled draws --teacher_windows of the windows: say how many, 20 say.")
        if self.teacher_mode in ("full", "cached") and self.teacher_windows is not None:
            raise ValueError(f"--teacher_mode {self.teacher_mode} draws no windows. Leave --teacher_windows out.")
        if self.teacher_variant != "spread" and self.teacher_windows is None:
            raise ValueError("--teacher_variant says how --teacher_windows are drawn, and none are.")
        if (self.teacher_mode == "cached") != (self.teacher_cache is not None):
            raise ValueError("--teacher_mode cached and --teacher_cache FOLDER belong together. Give both or neither.")
        if self.teacher_mode == "cached" and (self.streaming or self.jitter_probability):
            raise ValueError(
                "--teacher_mode cached reads stored maps of stored crops: leave out --streaming, and give "
                "--jitter_probability to training/cache_teacher.py instead."
            )
        if (self.local_start or self.fit_prior or self.position_extent) and self.lora_rank is not None:
            raise ValueError(
                "--local_start, --position_extent and --fit_prior change weights that adapters do not hold, and --lora_rank "
                "writes adapters. Leave one out."
            )
        if self.fit_prior < 0 or (self.fit_prior and self.local_start is None and not self.student):
            raise ValueError(
                "--fit_prior takes a number of images, for --local_start or a --student that had one. Give one of them."
            )
        if (self.local_start is not None or self.fit_prior) and self.streaming:
            raise ValueError(
                "--local_start and --fit_prior look at images from all over the set first. Leave --streaming out."
            )
        if self.whiten and not self.holdout_images:
            raise ValueError("--whiten measures the axes on held-out images, and there are none; set --holdout_images.")
        if self.lora_rank is not None and len(self.student) > 1:
            raise ValueError(
                "Adapters go with the folder they were trained on, and the mean of several --student is in none: write it "
                "first, with --steps 1 and without --lora_rank."
            )
        if self.lora_rank is None and (self.merge or self.lora_alpha is not None):
            raise ValueError("--merge and --lora_alpha are about adapters. Give --lora_rank too, 8 say.")
        outside = [part for part in self.train_parts if part not in ("qkv", "attention", "mlp")]
        if self.lora_rank is not None and outside:
            raise ValueError(
                f"Adapters lie on linear layers of blocks (qkv, attention, mlp), not on {' '.join(outside)}."
            )


def to_arguments(values: dict[str, Any]) -> list[str]:
    """`{"images": ["a", "b"], "steps": 5}` -> `["--images", "a", "b", "--steps=5"]`, for the parser to read."""
    arguments = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            arguments += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def read_recipe(path: Path) -> dict[str, Any]:
    """
    The options in a YAML file, under the names of `--help` without the dashes.

    Raises:
        ValueError: an option that does not exist, or a file that is no mapping.
    """
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no options. Write them as `name: value`, one a line.")
    unknown = sorted(set(recipe) - {option.name for option in fields(Options)})
    if unknown:
        raise ValueError(f"{path} names options that do not exist: {', '.join(unknown)}. `--help` lists them.")
    return recipe


def parse_options(arguments: list[str]) -> Options:
    """
    Options of a command line `[RECIPE.yaml] [--name value ...]`: the preset's, then the recipe's, then those given. What is
    said later wins; `--steps` and `--epochs` stand in for each other.
    """
    recipe = {}
    if arguments and Path(arguments[0]).suffix in (".yaml", ".yml"):
        recipe, arguments = read_recipe(Path(arguments[0])), arguments[1:]
    given = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    parser = HfArgumentParser(Options, allow_abbrev=False)  # type: ignore[arg-type]
    named = [word.partition("=")[2] or (arguments[i + 1] if i + 1 < len(arguments) else "")
             for i, word in enumerate(arguments) if word == "--preset" or word.startswith("--preset=")]  # fmt: skip
    preset = dict(PRESETS.get(named[-1] if named else recipe.get("preset"), {}))
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in given:
            recipe.pop(other, None)
        if one in given or one in recipe:
            preset.pop(other, None)
    (options,) = parser.parse_args_into_dataclasses(to_arguments(preset | recipe) + arguments)
    return options
