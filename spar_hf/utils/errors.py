"""Errors that a user can mend: reported in one line, without a traceback."""

import contextlib
import dis
import errno
import json
import logging
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from spar_hf.utils.terminal import printable

# what the operating system says of a file or folder that the user named; other OSErrors keep their traceback
PATH_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

# packages that read what users name, and refuse it by a plain ValueError
READERS = {"spar_hf", "transformers", "transformers_modules", "huggingface_hub", "tokenizers", "PIL", "tifffile"}

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # nowhere to write to


class UsageError(ValueError):
    """
    An option, file or folder that the user has to change. The message says what is wrong and how to mend it.

    A command reports it in one line and exits with status 2; every other `ValueError` is a bug and keeps its traceback.

    Example:

    ```python
    >>> raise UsageError("--steps 0 must be above 0.")
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: --steps 0 must be above 0.
    ```"""


class MissingFiles(UsageError, FileNotFoundError):
    """A folder or file that the user named, or a part of what it should hold, is not there."""


class NotFinite(RuntimeError):
    """
    NaN or infinity where a number is needed: a training diverged, or half precision overflowed. What was written before
    stays. A command reports it in one line and exits with status 1.
    """


class StopSignal:
    """
    The signal that ended a run of this process early, its checkpoint written; `None` if none did. A command exits with the
    status of that signal: 143 for SIGTERM, 130 for Ctrl-C.
    """

    number: int | None = None


def is_refusal(error: Exception) -> bool:
    """
    Whether an error refuses what the user gave. A plain `ValueError` does if a package in `READERS` raised it by a `raise`
    statement. One that Python raises by itself, as for too few values to unpack, is a bug, and so is one of another package.
    All other errors count as refusals.

    Example:

    ```python
    >>> try:
    ...     int("many")
    ... except ValueError as error:
    ...     is_refusal(error)
    False
    ```"""
    if not isinstance(error, ValueError) or isinstance(error, (UsageError, UnicodeError, json.JSONDecodeError)):
        return True
    place: Any = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    package = place.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    instruction = place.tb_frame.f_code.co_code[place.tb_lasti]
    return package in READERS and instruction == dis.opmap["RAISE_VARARGS"]


@contextlib.contextmanager
def as_usage_errors() -> Iterator[None]:
    """
    Report errors of code that reads what the user named as [`UsageError`]: the files that travel with a checkpoint, and
    transformers, raise plain `ValueError` and `OSError`. A `ValueError` that is a bug keeps its traceback, see
    [`is_refusal`].

    Example:

    ```python
    >>> with as_usage_errors():
    ...     raise OSError("nowhere is not a local folder.")
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: nowhere is not a local folder.
    ```"""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, UsageError) or not is_refusal(error):
            raise
        raise UsageError(str(error)) from error


def import_of_train(what: str, module: str) -> Any:
    """
    Import a module that needs the packages of the extra `train`, for `what` the user asked for.

    Raises:
        UsageError: one of them is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "spar_hf":
            raise
        raise UsageError(f"{what} needs the package {error.name}: pip install 'spar-hf[train]'") from error


def run_command(main: Callable[[], object]) -> None:
    """
    Run the `main` of a command: set up its log, and report a [`UsageError`] or a missing file in one line on stderr with
    exit status 2, as argparse does. A full disk and a training that diverged exit with status 1, a run that a signal
    stopped with that of the signal. Everything else is a bug and is raised.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it writes five lines for every checkpoint
    StopSignal.number = None
    try:
        main()
        if StopSignal.number is not None:
            sys.exit(128 + StopSignal.number)
    except (UsageError, *PATH_ERRORS) as error:
        exit_with(2, str(error))
    except NotFinite as error:
        exit_with(1, str(error))
    except OSError as error:
        if error.errno == errno.ECHILD:  # another process of the run has ended
            exit_with(1, str(error))
        if error.errno not in DISK_ERRORS:
            raise
        exit_with(1, f"{error}. What was complete before is kept; make room and run the command again.")


def exit_with(status: int, message: str) -> None:
    """End the program with a line on stderr."""
    sys.stderr.write(printable(f"error: {' '.join(message.split())}\n", sys.stderr))
    sys.exit(status)
