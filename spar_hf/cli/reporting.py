"""Messages and exit status of the commands."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

import typer
from tqdm.auto import tqdm

from spar_hf.utils.errors import is_refusal
from spar_hf.utils.image_files import RunSummary, interruptible
from spar_hf.utils.terminal import printable

Errors = type[Exception] | tuple[type[Exception], ...]


def say(text: object, err: bool = False, colour: str | None = None) -> None:
    """
    Print text on stdout or stderr. Labels and file names in it reach the terminal without control characters, and none of
    their letters is too much for its encoding. A reader that has gone, such as `head`, is no error.
    """
    with contextlib.suppress(BrokenPipeError):
        typer.secho(printable(str(text), sys.stderr if err else sys.stdout), fg=colour, err=err)


def fail(message: object, status: int = 1) -> NoReturn:
    """Print one line on stderr and exit: status 1 if something failed, 2 for wrong usage."""
    say(f"error: {' '.join(str(message).split())}", err=True, colour="red")
    raise typer.Exit(status)


@contextlib.contextmanager
def exit_on_error(usage: Errors = ValueError, failure: Errors = (OSError, RuntimeError)) -> Iterator[None]:
    """
    Report an error of the block in one line and exit.

    Args:
        usage: errors that the user mends by other arguments; exit status 2.
        failure: errors of the work itself; exit status 1. All other errors keep their traceback, and so does a `ValueError`
            that is a bug, see [`is_refusal`].
    """
    try:
        yield
    except typer.Exit:  # a RuntimeError
        raise
    except Exception as error:
        status = 2 if isinstance(error, usage) else 1 if isinstance(error, failure) else None
        if status is None or not is_refusal(error):
            raise
        fail(error, status)


def report_failure(message: str) -> None:
    """Print a line about an image that failed above the progress bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        say(f"error: {' '.join(message.split())}", err=True, colour="red")


@contextlib.contextmanager
def work_bar(unit: str, result: str, total: int | None = None) -> Iterator[tqdm]:
    """
    A progress bar around a block that writes one result. Ctrl-C and SIGTERM say that the result was not written, and exit.

    Args:
        unit: what is counted, such as `"tile"`.
        result: what the block writes.
        total: how many there are, if that is known.
    """
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds between lines of a log file
    try:
        with interruptible(), tqdm(total=total, unit=unit, file=sys.stderr, mininterval=interval) as bar:
            yield bar
    except KeyboardInterrupt as stop:
        say(f"interrupted; no {result} is written", err=True)
        raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None


def finish(summary: RunSummary, line: str | None = None) -> NoReturn:
    """Print the line, if any, and exit with the status of the run."""
    if line is not None:
        say(line)
    raise typer.Exit(summary.exit_status)


def quiet_transformers() -> None:
    """Hide notices and progress bars of transformers, so that a command prints its own lines only."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """[`quiet_transformers`] whose progress bars come back after the block: that of many words that are embedded is ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    quiet_transformers()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
