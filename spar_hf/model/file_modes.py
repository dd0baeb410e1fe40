"""Modes of written files: safetensors makes them readable by their owner only, whatever the umask says."""

import contextlib
import os
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Give a file, or a folder and all in it, the modes that new files have. Modes are widened, never narrowed."""
    mask = current_umask()
    for part in [path, *(path.rglob("*") if path.is_dir() else ())]:
        with contextlib.suppress(OSError):
            mode = part.stat().st_mode & 0o7777
            expected = mode | ((0o777 if part.is_dir() else 0o666) & ~mask)
            if expected != mode:
                part.chmod(expected)


def current_umask() -> int:
    """The umask of this process. Linux tells it without changing it, which would affect other threads."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="utf-8") as status:
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
