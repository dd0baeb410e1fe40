"""Short fields for dataclasses of options, with the help text that `HfArgumentParser` shows."""

from dataclasses import field
from typing import Any, TypeVar

Value = TypeVar("Value")


def option(default: Value, help: str, **metadata: Any) -> Value:
    """
    An option with a default. Each instance gets its own copy of a list.

    Args:
        default: the default.
        help: text in `--help`.
        metadata: further keywords of `argparse`, and `aliases`: earlier names of the option.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> @dataclass(kw_only=True)
    ... class Run:
    ...     output: str = required("Folder to write.")
    ...     steps: int = option(10, "Optimizer steps.", aliases=["--iterations"])
    >>> Run(output="run")
    Run(output='run', steps=10)
    ```"""
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)  # type: ignore[return-value]
    return field(default=default, metadata=metadata)


def required(help: str, **metadata: Any) -> Any:
    """An option that must be given, see [`option`]."""
    return field(metadata={"help": help, **metadata})
