"""Options of the pre-training, checked before any image is read."""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from spar_hf.data.reading import ReadingOptions
from spar_hf.pretraining.optimizers import OPTIMIZERS, check_optimizer
from spar_hf.utils.errors import UsageError
from spar_hf.utils.fields import option, required
from spar_hf.utils.options import (
    HELP,
    RUN_FREE,
    ComposedOptions,
    formerly,
    require_not_negative,
    require_one_of,
    require_positive,
)
from spar_hf.utils.run_options import TrainingRunOptions
from spar_hf.utils.texts import read_yaml

# options that a resumed run may change: where it is written, and the length of its schedule
FREE = {"output", "resume", "workers", "save_steps", "steps", *RUN_FREE}
RECIPE = Path(__file__).with_name("spar_tiny_data.yaml")
SET_KEYS = ("path", "weight", "crop")
LISTS = ("sets", "tagged", "held_out", "held_out_tags", "groups", "words")
MORE_KEYS = {
    "sets": ("exclude", "holdout_every", "unnamed", "unnamed_weight", "even_classes", "balance", "labels"),
    "tagged": (),
}
PATCH_SIZE = 16  # of a new model, in pixels
BALANCE = 0.35  # power of the share of a class: rare classes count more, but not equally
UNNAMED_WEIGHT = 0.3  # of a pixel of the unnamed class; the weights of all classes have a mean of 1 over the pixels
WITH_CONTENT = " with content "


def read_recipe(file: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """
    The sets of the pre-training, their words, and the held-out words. What a recipe may leave out is that of the recipe
    `based_on`, a path beside it, and empty if there is none.

    Args:
        file: YAML.
        above: recipes that are based on this one.

    Raises:
        UsageError: the file is not a recipe, has parts that nothing reads or of the wrong kind, or recipes are based on each
            other in a circle.
    """
    recipe = read_yaml(file)
    if isinstance(recipe, dict) and (other := recipe.pop("based_on", None)):
        path, files = Path(file).parent / str(other), (*above, Path(file).resolve())
        if path.resolve() in files:
            raise UsageError(f"{file} is based on {other}, which is based on it: recipes must not form a circle.")
        if not path.is_file():
            raise UsageError(f"{file} is based on {other}, and there is no {path}.")
        recipe = {**read_recipe(str(path), files), **recipe}
    if not isinstance(recipe, dict) or not {"sets", "held_out"} <= recipe.keys():
        raise UsageError(f"{file} is not a recipe of pretrain_tiny.py: it has no `sets` or no `held_out`.")
    if unknown := [str(name) for name in recipe if name not in (*LISTS, "synonyms")]:
        raise UsageError(
            f"{file}: {', '.join(unknown)} is not read. A recipe has {', '.join(LISTS)}, synonyms, based_on."
        )
    given = {name: value for name, value in recipe.items() if value is not None}
    if wrong := [name for name in LISTS if not isinstance(given.get(name, []), list)]:
        raise UsageError(f"{file}: {wrong[0]} must be a list, such as {wrong[0]}: [...], and is {given[wrong[0]]!r}.")
    synonyms = given.get("synonyms", {})
    if not isinstance(synonyms, dict) or not all(isinstance(words, list) for words in synonyms.values()):
        raise UsageError(f"{file}: synonyms must be lists by the word that they stand for, such as {{sky: [clouds]}}.")
    words = [word for name in ("held_out", "held_out_tags", "words") for word in given.get(name, [])]
    words += [word for name, alike in synonyms.items() for word in (name, *alike)]
    if wrong := [word for word in words if not isinstance(word, str)]:
        raise UsageError(f"{file}: {wrong[0]!r} is no word to YAML. Put it in quotes.")
    return {**{name: [] for name in LISTS}, "synonyms": {}, **given}


def check_sets(file: str, recipe: dict[str, Any]) -> None:
    """
    Raises:
        UsageError: a set of the recipe lacks its path, weight or sizes of crops, has impossible ones or keys that nothing
            reads; or there is none.
    """
    for part in ("sets", "tagged"):
        for number, spec in enumerate(recipe[part], 1):
            if missing := [name for name in SET_KEYS if not isinstance(spec, dict) or name not in spec]:
                raise UsageError(
                    f"{file}: number {number} of `{part}` has no {', '.join(missing)}. Write each as "
                    "{path: FOLDER, weight: 4, crop: [SMALLEST, LARGEST]}."
                )
            known = (*SET_KEYS, *MORE_KEYS[part])
            if unknown := [str(name) for name in spec if name not in known]:
                raise UsageError(
                    f"{file}: number {number} of `{part}`, {spec['path']}: {', '.join(unknown)} is not read. A set of "
                    f"`{part}` has {', '.join(known)}."
                )
            if problem := wrong_values(spec):
                raise UsageError(f"{file}: number {number} of `{part}`, {spec['path']}: {problem}.")
    if not [spec for spec in (*recipe["sets"], *recipe["tagged"]) if spec.get("labels", True)]:
        raise UsageError(f"{file} names no set to train on" + (" whose labels are read." if recipe["sets"] else "."))


def wrong_values(spec: dict[str, Any]) -> str:
    """
    What is wrong with the values of a set; empty if nothing is.

    Example:

    ```python
    >>> wrong_values({"weight": 4, "crop": [60, 300]}), wrong_values({"weight": 0, "crop": [60, 300]})
    ('', 'weight 0 must be a number above 0')
    ```"""
    weight, crop, every = spec["weight"], spec["crop"], spec.get("holdout_every", 0)
    if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        return f"weight {weight!r} must be a number above 0"
    numbers = isinstance(crop, list) and len(crop) == 2 and all(isinstance(side, int | float) for side in crop)
    if not numbers or not 0 < crop[0] <= crop[1]:
        return f"crop {crop!r} must be [SMALLEST, LARGEST] side in pixels"
    if not isinstance(every, int) or every == 1 or every < 0:
        return f"holdout_every {every!r} must be 0 or at least 2: of 1, every image would be held out"
    for name in ("labels", "even_classes"):
        if not isinstance(spec.get(name, True), bool):
            return f"{name} {spec[name]!r} must be true or false"
    balance = spec.get("balance", BALANCE)
    if not isinstance(balance, int | float) or not 0 <= balance <= 1:
        return f"balance {balance!r} must lie between 0 and 1"
    unnamed_weight = spec.get("unnamed_weight", UNNAMED_WEIGHT)
    if "unnamed_weight" in spec and "unnamed" not in spec:
        return "unnamed_weight weighs the pixels of the class that `unnamed` names: name it, or leave the weight out"
    if not isinstance(unnamed_weight, int | float) or not 0 <= unnamed_weight < float("inf"):
        return f"unnamed_weight {unnamed_weight!r} must be a number of at least 0"
    if not spec.get("labels", True) and (
        idle := [name for name in ("unnamed_weight", "balance", "even_classes") if name in spec]
    ):
        return f"{idle[0]} is about labelled pixels, and with labels: false there are none: leave it out"
    return ""


def recipe_name(file: str, recipe: dict[str, Any]) -> str:
    """What a resumed run compares of a recipe: the name of its file, which may have moved, and a checksum of its content."""
    text = json.dumps(recipe, sort_keys=True, default=str)
    return f"{Path(file).name}{WITH_CONTENT}{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(kw_only=True)
class RecipeOptions(ReadingOptions):
    """The training images, how they are read, and their words."""

    data: str = required("Folder that the paths of the recipe are relative to.")
    recipe: str = option(str(RECIPE), "YAML file with the sets, their words, and the held-out words.")


@dataclass(kw_only=True)
class NewModelOptions:
    """Sizes and words of a model that starts from scratch; `--start` takes those of another model."""

    window_size: int = option(192, "Side of the crops in pixels: the model's image_size.", aliases=formerly("window"))
    hidden_size: int = option(192, "Width of both towers.")
    layers: int = option(8, "Blocks of the vision tower.")
    text_layers: int = option(1, "Blocks of the text tower.")
    vocab_size: int = option(6144, "Upper bound of the tokenizer's vocabulary.")
    text_steps: int = option(800, "Steps that first teach the words, without images.")
    text_teacher: str | None = option(
        None,
        "Folder of a sentence encoder (all-MiniLM-L6-v2) that the words are learned from; by default words "
        "get random directions.",
    )
    common_words: int = option(3500, "Number of frequent words of the sentence encoder that are taught as well.")

    def __post_init__(self):
        require_positive(self, "window_size", "hidden_size", "layers", "text_layers", "vocab_size")
        require_not_negative(self, "text_steps", "common_words")
        if self.window_size % PATCH_SIZE:
            nearest = max(1, round(self.window_size / PATCH_SIZE)) * PATCH_SIZE
            raise UsageError(
                f"--window_size {self.window_size} must be a multiple of the patch of {PATCH_SIZE} px, such as {nearest}: "
                "labels and features of a crop would not lie on each other."
            )

        if self.text_teacher is None and "common_words" in self.changed():
            raise UsageError("--common_words are those of a sentence encoder: name it with --text_teacher.")

    def changed(self) -> list[str]:
        """Names of the options that are not at their defaults."""
        return [part.name for part in fields(self) if getattr(self, part.name) != part.default]


@dataclass(kw_only=True)
class TrainingOptions:
    """How the vision tower is trained."""

    start: str | None = option(
        None,
        "Finished model of this command, or a student of one, to train further; its sizes and words stay as they are.",
    )
    crop_sides: list[int] | None = option(
        None,
        "With --start: crops have one of these sides in pixels, drawn for each step, for a student that is to read all of "
        "them. A side given twice is drawn twice as often. By default crops have the model's image_size.",
    )
    anchor_weight: float = option(
        0.0,
        "With --start: weight of the mean squared distance of the feature maps from those of that model, so that it keeps "
        "what the labels say nothing about.",
    )
    steps: int = option(4000, HELP["steps"])
    batch_size: int = option(24, "Crops per step and process.")
    optimizer: str = option(
        "adamw", "adamw, or muon: AdamW, but Muon for the weight matrices of the vision tower's blocks."
    )
    learning_rate: float = option(6e-4, HELP["learning_rate"])
    weight_decay: float = option(0.05, HELP["weight_decay"])
    warmup_steps: int = option(200, "Steps of linear warm-up.")
    names_per_set: int = option(28, "Class names compared per set and step.")
    foreign_names: int = option(8, "Names of other sets added as wrong answers.")
    tagged_names: int = option(64, "Number of names that an image with a name but no mask is compared with.")

    def __post_init__(self):
        require_one_of(self, "optimizer", OPTIMIZERS)
        check_optimizer(self.optimizer)
        require_positive(self, "steps", "batch_size", "learning_rate", "names_per_set", "tagged_names")
        require_not_negative(self, "weight_decay", "warmup_steps", "foreign_names", "anchor_weight")
        if self.start is None and (self.crop_sides is not None or self.anchor_weight):
            raise UsageError("--crop_sides and --anchor_weight go on from a model: name it with --start.")
        if wrong := [side for side in self.crop_sides or [] if side < PATCH_SIZE or side % PATCH_SIZE]:
            raise UsageError(f"--crop_sides {wrong[0]} must be a multiple of the patch of {PATCH_SIZE} px.")


@dataclass(kw_only=True)
class PretrainingRun(TrainingRunOptions):
    """Where and how the training runs."""

    save_steps: int = option(500, HELP["save_steps"])
    workers: int = option(1, HELP["workers"])

    def __post_init__(self):
        super().__post_init__()
        require_not_negative(self, "workers")


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
    run: PretrainingRun

    def __post_init__(self):
        if self.training.start is not None and (given := self.new_model.changed()):
            raise UsageError(
                f"--start keeps that model's sizes and words; leave out {', '.join(f'--{name}' for name in given)}."
            )
