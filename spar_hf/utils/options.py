"""Checks of options that every command makes; the errors name the option as it is typed."""

from collections.abc import Iterable
from typing import Any

from spar_hf.utils.errors import UsageError


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
