"""Files and folders that are written completely or not at all."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """
    Write under a temporary name and rename, so that an interrupted run leaves no half-written file.

    Args:
        path: the file; its folder is created.
        write: writes to the path it is given, which has the same suffix.

    Example:

    ```python
    >>> write_atomically(Path("out/notes.txt"), lambda temporary: temporary.write_text("done"))
    >>> Path("out/notes.txt").read_text()
    'done'
    ```"""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the process id keeps two processes that write the same file from removing each other's temporary file
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """
    Write a folder completely or not at all.

    Yields a path beside the folder that does not exist yet. When the block ends, that path is renamed to `folder` and
    replaces an older one. After an error the older folder is kept and the new one removed. A process that is killed between
    the two renames leaves the older folder as `.NAME.old`; the next call restores it first.

    Example:

    ```python
    >>> with writing_folder(Path("model")) as temporary:
    ...     temporary.mkdir()
    ...     write_text(temporary / "README.md", "A model.")
    >>> [path.name for path in Path("model").iterdir()]
    ['README.md']
    ```"""
    temporary, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process

    def restore() -> None:
        if old.exists() and not folder.exists():
            old.rename(folder)

    restore()
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        restore()
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """
    Write JSON atomically. NaN and infinity, which JSON lacks, become null.

    Example:

    ```python
    >>> write_json(Path("scores.json"), {"miou": 0.41, "loss": float("nan")})
    >>> json.loads(Path("scores.json").read_text())
    {'miou': 0.41, 'loss': None}
    ```"""

    def finite(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: finite(part) for key, part in entry.items()}
        if isinstance(entry, (list, tuple)):
            return [finite(part) for part in entry]
        return None if isinstance(entry, float) and not math.isfinite(entry) else entry

    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
