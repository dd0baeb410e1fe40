"""Options that are composed of dataclasses, and the checks that every command makes; errors name the option as typed."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from spar_hf.utils.errors import UsageError


def parse_dataclasses(
    kinds: Iterable[Any], args: Sequence[str] | None = None, description: str | None = None, **kwargs: Any
) -> list[Any]:
    """
    Read a flat command line into several dataclasses with `HfArgumentParser`.

    Args:
        kinds: the dataclasses; no two have a field of the same name.
        args: the command line; `None` takes that of this process.
        description: text above the options in `--help`.
        kwargs: passed on to the parser.

    Raises:
        UsageError: an option that none of them has, or what the dataclasses raise.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Run:
    ...     steps: int = 10
    >>> parse_dataclasses([Run], ["--steps", "3"])
    [Run(steps=3)]
    >>> parse_dataclasses([Run], ["--step_count", "3"])
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: --step_count 3: no such option; --help lists them.
    ```"""
    from transformers import HfArgumentParser

    class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        """Keeps the lines of a description, which holds commands, and shows defaults; `None` is none."""

        def _get_help_string(self, action: argparse.Action) -> str | None:
            # the parser repeats the help of the option that is turned off
            if action.option_strings and action.option_strings[0] == f"--no_{action.dest}":
                return f"Turns --{action.dest} off."
            return action.help if action.default is None else super()._get_help_string(action)

    kwargs = {"formatter_class": HelpFormatter, **kwargs}
    parser = HfArgumentParser(tuple(kinds), description=description, **kwargs)  # type: ignore[arg-type]
    *found, unknown = parser.parse_args_into_dataclasses(
        args,
        look_for_args_file=False,
        return_remaining_strings=True,  # type: ignore[arg-type]
    )
    if unknown:
        raise UsageError(f"{' '.join(unknown)}: no such option; --help lists them.")
    return found


PRECISIONS = ("no", "fp16", "bf16")
# of transformers, those that need no arguments of their own, which have no options here
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
# help texts of options that several commands have: one name has one meaning
HELP = {
    "image_range": "Pixel values of black and white of images of floats or more than 8 bits: 0 4095 for 12 bits. Without it "
    "such images are refused if they cannot be scaled without guessing.",
    "max_pixels": "Refuse larger images, in pixels. Default: 89 million, about 0.3 GB in memory.",
    "templates": "Prompt templates: imagenet80, tcl, short, plain or a file of choose_templates. Default: the checkpoint's.",
    "mixed_precision": "no, fp16 or bf16. Default: what `accelerate launch` was told.",
    "shortest_edge": "Shorter side of the working size in pixels. Default: the checkpoint's.",
    "longest_edge": "Longer side of the working size in pixels; with --shortest_edge, an upper bound.",
    "stride": "Use the sliding window with this stride in pixels instead of one pass.",
    "teacher_stride": "Stride of the teacher's windows in pixels. Default: one and a half patches, 24 at patches of 16 px.",
    "window_size": "Side of the windows in pixels. Default: the model's image_size.",
    "window_batch_size": "Windows per forward pass of a sliding window.",
    "include": "Only images whose file stem matches one of these shell patterns.",
    "exclude": "No images whose file stem matches one of these shell patterns.",
    "report_to": "Tracker of accelerate (tensorboard, wandb, …) or none; auto is TensorBoard where it is installed.",
    "steps": "Optimizer steps.",
    "save_steps": "Steps between checkpoints; the last two are kept.",
    "log_steps": "Steps between rows of the log.",
    "overwrite": "Replace the results of an earlier run in --output, and its checkpoints.",
    "resume": "Go on from the last checkpoint in --output, as if never stopped.",
    "workers": "Processes that decode images; 0 uses the main process.",
    "learning_rate": "Peak learning rate.",
    "weight_decay": "Weight decay.",
    "warmup_ratio": "Share of the steps with rising learning rate.",
    "lr_scheduler_type": f"Schedule of Transformers: {', '.join(SCHEDULES)}.",
    "resample": "How images are resized: bicubic (antialiased, which keeps more of the image) or bilinear (without "
    "antialiasing, as published).",
    "shard": "For arrays of jobs: only every N-th shard from the I-th on, 0/8 to 7/8. A shard is an image, or a file of "
    "Parquet or of a teacher cache. A job that is repeated makes only what is missing; `spar-hf verify` says what that is.",
    "shard_range": "For arrays of jobs: only the shards from A to B - 1, from 0.",
    "threshold": "Pixels whose highest probability is below it become background.",
}


def formerly(*names: str) -> list[str]:
    """
    Earlier names of an option, for `aliases` in the metadata of its field. What was stored under them is read, see
    [`with_current_names`].

    Example:

    ```python
    >>> formerly("long_side")
    ['--long_side', '--long-side']
    ```"""
    return list(dict.fromkeys(form for name in names for form in (f"--{name}", f"--{name.replace('_', '-')}")))


def earlier_names(kinds: Iterable[Any]) -> dict[str, str]:
    """Earlier names of the options of dataclasses, each with the name of today."""
    return {
        alias.lstrip("-").replace("-", "_"): option.name
        for kind in kinds
        for option in fields(kind)
        for alias in option.metadata.get("aliases", ())
    }


def with_current_names(values: Mapping[str, Any], kinds: Iterable[Any]) -> dict[str, Any]:
    """
    Options of an earlier version under the names of today; what is no option of the dataclasses stays as it is.

    Raises:
        UsageError: an option is there under both names.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Run:
    ...     num_steps: int = field(default=10, metadata={"aliases": formerly("steps")})
    >>> with_current_names({"steps": 3, "seed": 0}, [Run])
    {'num_steps': 3, 'seed': 0}
    ```"""
    current = earlier_names(kinds)
    if twice := [name for name in values if current.get(name) in values]:
        raise UsageError(f"{twice[0]} is the earlier name of {current[twice[0]]}. Give one of them.")
    return {current.get(name, name): value for name, value in values.items()}


def require_positive(options: Any, *names: str) -> None:
    """
    Raises:
        UsageError: one of these options is given and not above 0.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> require_positive(SimpleNamespace(steps=0, epochs=None), "steps", "epochs")
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: --steps 0 must be above 0.
    ```"""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} {value} must be above 0.")


def require_not_negative(options: Any, *names: str) -> None:
    """
    Raises:
        UsageError: one of these options is given and below 0.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise UsageError(f"--{name} {value} must be 0 or above.")


def require_share(options: Any, *names: str) -> None:
    """
    Raises:
        UsageError: one of these options is given and does not lie in 0 to 1.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"--{name} {value} must lie in 0 to 1.")


def require_one_of(options: Any, name: str, known: Iterable[str]) -> None:
    """
    Raises:
        UsageError: this option is given and none of the known values.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> require_one_of(SimpleNamespace(mixed_precision="int8"), "mixed_precision", ["no", "fp16", "bf16"])
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: --mixed_precision int8: use one of no, fp16, bf16.
    ```"""
    value, known = getattr(options, name), list(known)
    if value is not None and value not in known:
        raise UsageError(f"--{name} {value}: use one of {', '.join(known)}.")


# what of these a resumed run may have otherwise
RUN_FREE = ("overwrite", "allow_changed_data", "max_bad_steps")


@dataclass(kw_only=True)
class SafetyOptions:
    """What a training run must be told before it replaces something, and when it gives up."""

    overwrite: bool = field(default=False, metadata={"help": HELP["overwrite"]})
    allow_changed_data: bool = field(
        default=False,
        metadata={
            "help": "With --resume: go on although images were added or removed since. Those held out stay held out."
        },
    )
    max_bad_steps: int = field(
        default=5,
        metadata={
            "help": "Steps of the run whose loss or gradient may be NaN or infinite: they are skipped and counted; with one "
            "more the run ends."
        },
    )

    def __post_init__(self):
        require_not_negative(self, "max_bad_steps")


class ComposedOptions:
    """
    Base of a dataclass whose fields are dataclasses of options, each owned by one room. On the command line and in recipes
    the options of all parts are flat, so no name may occur in two parts.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Output:
    ...     output: str
    >>> @dataclass
    ... class Training:
    ...     steps: int = 10
    >>> @dataclass
    ... class Options(ComposedOptions):
    ...     output: Output
    ...     training: Training
    >>> options = Options.from_flat(output="run")
    >>> options
    Options(output=Output(output='run'), training=Training(steps=10))
    >>> options.flat
    {'output': 'run', 'steps': 10}
    ```"""

    @classmethod
    def parts(cls) -> dict[str, Any]:
        """The dataclasses that the options are composed of, by the names of their fields."""
        return {part.name: part.type for part in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def parse(cls, args: Sequence[str] | None = None, description: str | None = None) -> Any:
        """
        The options on a command line, see [`parse_dataclasses`].

        Raises:
            UsageError: an unknown or invalid option.
        """
        return cls.from_parts(parse_dataclasses(cls.parts().values(), args, description))

    @classmethod
    def from_parts(cls, parts: Iterable[Any]) -> Any:
        """Options from an object of each class of [`ComposedOptions.parts`], in that order."""
        return cls(**dict(zip(cls.parts(), parts, strict=True)))

    @classmethod
    def with_current_names(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Options of an earlier version under the names of today, see [`with_current_names`]."""
        return with_current_names(values, cls.parts().values())

    @classmethod
    def from_flat(cls, **values: Any) -> Any:
        """
        Options under their names on the command line.

        Raises:
            UsageError: an unknown, missing or invalid option.
        """
        values = cls.with_current_names(values)
        names = {name: {option.name for option in fields(part)} for name, part in cls.parts().items()}
        if unknown := sorted(set(values).difference(*names.values())):
            raise UsageError(f"There is no option {', '.join(unknown)}; `--help` of the command lists them.")
        required = [
            option.name
            for part in cls.parts().values()
            for option in fields(part)
            if option.default is MISSING and option.default_factory is MISSING
        ]
        if missing := [name for name in required if name not in values]:
            raise UsageError(f"Give {', '.join(missing)}: there is no default.")
        given = {name: {key: values[key] for key in values.keys() & names[name]} for name in names}
        return cls(**{name: part(**given[name]) for name, part in cls.parts().items()})

    @property
    def flat(self) -> dict[str, Any]:
        """All options by their names on the command line."""
        values: dict[str, Any] = {}
        for name in self.parts():
            values |= asdict(getattr(self, name))
        return values
