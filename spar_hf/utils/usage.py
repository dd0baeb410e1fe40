"""A wrong option or a missing folder is one line and exit status 2, as argparse has it, and no traceback."""

import sys
import traceback
from collections.abc import Callable

from accelerate import Accelerator

_work = {"begun": False}


def check_precision(accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: float16 on a CPU, where accelerate runs in float32 and says float16.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs an accelerator; on a CPU use bf16 or no.")


def work_begins() -> None:
    """The checks are over: from here on an error keeps its traceback."""
    _work["begun"] = True


def run_script(main: Callable[[], object]) -> None:
    """
    Run the `main` of a script.

    Before [`work_begins`], a ValueError that somebody raised on purpose (not one that a line of arithmetic ran into) and
    every OSError tell of options, files and folders: they are one line on stderr. All else is a bug, and raised.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        on_purpose = type(error) is ValueError and line.startswith("raise ")
        if _work["begun"] or not (on_purpose or isinstance(error, OSError)):
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
