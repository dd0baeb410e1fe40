"""Options of a distillation from a command line, a YAML recipe and presets."""

import itertools
from pathlib import Path
from typing import Any

from spar_hf.distillation.options import DistillationOptions
from spar_hf.distillation.presets import REPLACES, with_preset
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.options import parse_dataclasses
from spar_hf.utils.texts import read_yaml

OFF = ("false", "no", "off", "f", "n", "0")  # as HfArgumentParser reads them
WITH_PRESET = ("preset", "output", "teacher_mode", *REPLACES)  # what decides how a preset is filled in
DESCRIPTION = """
Distil the sliding-window teacher of a backbone into a student that needs one pass. Options may also stand in a YAML file,
named first: `distill.py recipe.yaml --steps 100`. The command line takes precedence over the recipe, and the recipe over
--preset.
"""


def parse_options(arguments: list[str]) -> DistillationOptions:
    """
    Options of a command line `[RECIPE.yaml] [--name value ...]`. Options given there take precedence over the recipe's, and
    these over the preset's; `steps` and `epochs` replace each other. With `--dry_run`, model, images and output may be
    left out.

    Raises:
        UsageError: an invalid option, or a recipe that cannot be read.
    """
    recipe: dict[str, Any] = {}
    if arguments and Path(arguments[0]).suffix in (".yaml", ".yml"):
        recipe, arguments = read_recipe(Path(arguments[0])), arguments[1:]
    given = given_options(arguments)
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in given:
            recipe.pop(other, None)
    current = DistillationOptions.with_current_names(given)
    chosen: dict[str, Any] = {name: current[name] for name in WITH_PRESET if name in current}
    if "resume" in given:
        chosen["resume"] = given["resume"].lower() not in OFF
    filled = with_preset(recipe | chosen)
    if given.get("dry_run", "off").lower() not in OFF:  # what is needed to run is not needed to show the rest
        filled = {"model": "MODEL", "images": ["IMAGES"], "output": "OUTPUT"} | filled
    parts = DistillationOptions.parts()
    return DistillationOptions.from_parts(
        parse_dataclasses(parts.values(), to_arguments(filled) + arguments, DESCRIPTION, allow_abbrev=False)
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """
    The options in a YAML file, named as in `--help` without the dashes, also under earlier names.

    Raises:
        UsageError: an unknown option, or a file that is no mapping.
        MissingFiles: no such file.
    """
    if not path.is_file():
        raise MissingFiles(f"{path}: there is no such recipe.")
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise UsageError(f"{path} contains no options. Write them as `name: value`, one per line.")
    recipe = DistillationOptions.with_current_names(recipe)
    known = {name for part in DistillationOptions.parts().values() for name in part.__dataclass_fields__}
    if unknown := sorted(set(recipe) - known):
        raise UsageError(f"{path} names unknown options: {', '.join(unknown)}. `--help` lists them.")
    return recipe


def given_options(arguments: list[str]) -> dict[str, str]:
    """
    The options of a command line with their first value, as text.

    Example:

    ```python
    >>> given_options(["--preset", "spar", "--steps=7", "--resume"])
    {'preset': 'spar', 'steps': '7', 'resume': ''}
    ```"""
    given = {}
    for word, after in itertools.pairwise([*arguments, "--"]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name.replace("-", "_")] = value if equals else "" if after.startswith("--") else after
    return given


def to_arguments(values: dict[str, Any]) -> list[str]:
    """
    Options as words of a command line.

    Example:

    ```python
    >>> to_arguments({"images": ["a", "b"], "steps": 5, "epochs": None})
    ['--images', 'a', 'b', '--steps=5']
    ```"""
    arguments = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            arguments += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments
