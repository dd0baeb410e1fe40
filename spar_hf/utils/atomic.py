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
    Write under a temporary name and rename, so that no interrupted run leaves half a file.

    Args:
        path (`Path`): the file; its folder is made.
        write (`Callable[[Path], object]`): writes to the path it is given, which ends in the same suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # of this process alone: where two write the same file, neither takes the other's half away
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
    Write a folder as a whole or not at all: gives a path beside it that does not exist yet, and renames that at the end, in
    place of an older folder. After an error the older one stands, and what was written is removed. A run that is killed
    between the two renames leaves the older one as `.NAME.old`; the next one puts it back before it writes.

    ```python
    with writing_folder(Path("out/model")) as temporary:
        model.save_pretrained(temporary)
    ```
    """
    temporary, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed

    def put_back() -> None:
        if old.exists() and not folder.exists():
            old.rename(folder)

    put_back()
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        put_back()
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as a whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON as a whole or not at all; it knows no NaN and no infinity, which become null."""

    def finite(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: finite(part) for key, part in entry.items()}
        if isinstance(entry, (list, tuple)):
            return [finite(part) for part in entry]
        return None if isinstance(entry, float) and not math.isfinite(entry) else entry

    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
