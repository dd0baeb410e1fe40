"""Files and folders that are written completely or not at all."""

import contextlib
import errno
import glob
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from spar_hf.model.file_modes import follow_umask
from spar_hf.utils.errors import UsageError
from spar_hf.utils.locks import locked
from spar_hf.utils.texts import json_text

numbers = itertools.count()  # of temporary names in this process


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """
    Write under a temporary name and rename, so that an interrupted run leaves no half-written file. Its mode follows the
    umask, also where `write` made it readable by its owner only, as safetensors does.

    Args:
        path: the file; its folder is created.
        write: writes to the path it is given, which has the same suffix.

    Raises:
        OSError: the file cannot be written; also where safetensors or torch report that by errors of their own.

    Example:

    ```python
    >>> write_atomically(Path("out/notes.txt"), lambda temporary: temporary.write_text("done"))
    >>> Path("out/notes.txt").read_text()
    'done'
    ```"""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with as_disk_errors(path):
            write(temporary)
        follow_umask(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def temporary_name(path: Path) -> Path:
    """
    A name beside `path` that no other process and no other call uses. It is no longer than file systems allow, however long
    the name of the file is.
    """
    suffix = path.suffix if len(path.suffix.encode()) <= 16 else ""
    start = os.fsencode(path.name)[:100].decode("utf-8", "ignore")
    return path.with_name(f".{start}.{os.getpid()}-{next(numbers)}.partial{suffix}")


def is_temporary(path: Path) -> bool:
    """
    Whether a file has a name of [`temporary_name`]: a process that still runs may be writing it.

    Example:

    ```python
    >>> is_temporary(temporary_name(Path("out/a.png"))), is_temporary(Path("out/.a.png"))
    (True, False)
    ```"""
    return re.fullmatch(r"\..*\.\d+-\d+\.partial(\..*)?", path.name, re.DOTALL) is not None


@contextlib.contextmanager
def as_disk_errors(path: Path) -> Iterator[None]:
    """
    Report that a file cannot be written as `OSError`, whose number says why; safetensors and torch raise others.

    Example:

    ```python
    >>> with as_disk_errors(Path("model.safetensors")):
    ...     raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'model.safetensors'
    ```"""
    try:
        yield
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if type(error).__name__ == "SafetensorError" and number:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        # torch does not say why its writer failed; a full disk is what happens
        if isinstance(error, RuntimeError) and "PytorchStreamWriter failed" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


@contextlib.contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """
    Write a folder completely or not at all. It is locked while the block runs.

    Yields a path beside the folder that does not exist yet. When the block ends, that path is renamed to `folder` and
    replaces an older one. After an error the older folder is kept and the new one removed. A process that is killed between
    the two renames leaves the older folder as `.NAME.old`; the next call restores it first.

    Raises:
        Locked: another process writes the folder.
        OSError: the disk is full.

    Example:

    ```python
    >>> with writing_folder(Path("model")) as temporary:
    ...     temporary.mkdir()
    ...     write_text(temporary / "README.md", "A model.")
    >>> [path.name for path in Path("model").iterdir()]
    ['README.md']
    ```"""
    folder = Path(os.path.abspath(folder))
    with locked(folder.with_name(f".{folder.name}.lock"), str(folder)):
        for left in folder.parent.glob(f".{glob.escape(folder.name)}*.partial"):  # by killed processes
            if re.fullmatch(r"(\.\d+-\d+)?\.partial", left.name[len(folder.name) + 1 :]):
                shutil.rmtree(left, ignore_errors=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{next(numbers)}.partial")
        old = folder.with_name(f".{folder.name}.old")
        yield from replacing(folder, temporary, old)


def replacing(folder: Path, temporary: Path, old: Path) -> Iterator[Path]:
    """The steps of [`writing_folder`] under its lock."""

    def restore() -> None:
        if old.exists() and not folder.exists():
            old.rename(folder)

    restore()
    try:
        with as_disk_errors(folder):
            yield temporary
        follow_umask(temporary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        restore()
        shutil.rmtree(temporary, ignore_errors=True)


def check_inputs_stay(folders: Iterable[Path], options: Iterable[Any]) -> None:
    """
    Refuse to replace a folder that something is read from.

    Args:
        folders: those that will be replaced.
        options: values of options. Those that are a file or folder are inputs; all others are passed over.

    Raises:
        UsageError: an input is one of the folders, or lies in one.

    Example:

    ```python
    >>> Path("run/model").mkdir(parents=True)
    >>> check_inputs_stay([Path("run")], ["run/model", 3])
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: run/model is read, and would be lost when run is replaced. Name another --output.
    ```"""
    inputs = [value for value in options if isinstance(value, str | os.PathLike) and os.path.exists(value)]
    for folder, value in itertools.product(folders, inputs):
        if Path(value).resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{value} is read, and would be lost when {folder} is replaced. Name another --output.")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """
    Write JSON atomically. NaN and infinity, which JSON lacks, become null.

    Example:

    ```python
    >>> import json
    >>> write_json(Path("scores.json"), {"miou": 0.41, "loss": float("nan")})
    >>> json.loads(Path("scores.json").read_text())
    {'miou': 0.41, 'loss': None}
    ```"""
    write_text(path, json_text(finite_json(value), indent=2))


def finite_json(value: Any) -> Any:
    """
    A value for JSON with null for NaN and infinity, also inside lists and mappings.

    Example:

    ```python
    >>> finite_json({"loss": float("inf"), "curve": [1.0, float("nan")]})
    {'loss': None, 'curve': [1.0, None]}
    ```"""
    if isinstance(value, dict):
        return {key: finite_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
