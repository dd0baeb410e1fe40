"""One writer at a time: a lock file says which process writes a folder, and the operating system drops a dead one's lock."""

import contextlib
import datetime
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from spar_hf.utils.errors import UsageError
from spar_hf.utils.texts import json_text

PATIENCE = 3.0  # seconds until a second writer is refused: a process that was killed needs a moment to be gone
RESULTS = ".spar-hf"  # start of the names of lock files in folders of results
# lock file -> thread that holds it in this process, and how often: record locks do not keep a process from itself
held: dict[Path, tuple[int, int]] = {}
guard = threading.Lock()


class Locked(UsageError):
    """Another process writes there."""


@contextlib.contextmanager
def one_writer(folder: Path | None, settings: Mapping[str, Any], job: str = "", process: int = 0) -> Iterator[None]:
    """
    Hold the lock of a job in a folder of results for the length of a `with` block. Jobs of one array, and processes of one
    launch, have a lock each, so that they write side by side.

    Args:
        folder: of the results; `None` for one that cannot be locked, such as in a store.
        settings: all that the results depend on beside the images; those who write side by side have the same.
        job: name of this job in an array; empty for all of the work.
        process: index of this process in its launch.

    Raises:
        Locked: another process runs the same job there, or one of other settings.

    Example:

    ```python
    >>> with one_writer(Path("masks"), {"labels": ["road"]}, job="0-of-2"):
    ...     [path.name for path in Path("masks").iterdir()]
    ['.spar-hf.0-of-2.lock']
    ```"""
    if folder is None:
        yield
        return
    key = hashlib.sha256(json_text(settings).encode()).hexdigest()[:16]
    name = ".".join(filter(None, [RESULTS, job, f"process-{process}" if process else "", "lock"]))
    with locked(folder / name, str(folder), settings=key):
        # each writes its own settings before it looks: of two that start together, one at least sees the other
        for other in folder.glob(f"{RESULTS}*.lock"):
            owner = living_owner(other)
            if owner.get("settings", key) != key:
                raise Locked(
                    f"{folder} is being written by {said_of(owner)} with other settings. Wait for it, stop it, or write to "
                    "another folder."
                )
        yield


@contextlib.contextmanager
def locked(path: Path, what: str, **note: str) -> Iterator[None]:
    """
    Hold a lock for the length of a `with` block. The lock of a process that died is taken over. The same thread may take a
    lock twice.

    Args:
        path: the lock file; its folder is created. It is removed at the end.
        what: what is written, for the message.
        note: what to write into the file, beside who holds it.

    Raises:
        Locked: another process, or another thread of this one, holds it.

    Example:

    ```python
    >>> with locked(Path("run/.lock"), "run"):
    ...     json.loads(Path("run/.lock").read_text())["pid"] == os.getpid()
    True
    >>> Path("run/.lock").exists()
    False
    ```"""
    path = Path(os.path.abspath(path))
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    thread = threading.get_ident()
    with guard:
        owner, count = held.get(path, (thread, 0))
        if owner != thread:
            raise Locked(f"{what} is being written by another thread of this process. Write to another folder.")
        file = acquire(path, what, **note) if count == 0 else None
        held[path] = (thread, count + 1)
    try:
        yield
    finally:
        with guard:
            held[path] = (thread, count)
            if file is not None:
                del held[path]
                with contextlib.suppress(OSError):
                    path.unlink()
                os.close(file)
                if is_new:
                    with contextlib.suppress(OSError):  # something was written
                        path.parent.rmdir()


def acquire(path: Path, what: str, **note: str) -> int:
    """
    Open and lock the file, and write into it who holds it, and the note.

    Raises:
        Locked: another process holds it.
    """
    end = time.monotonic() + PATIENCE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        found = read_owner(file)
        if not lock(file, found):
            os.close(file)
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
            raise Locked(
                f"{what} is being written by {said_of(found)}. Wait for it, stop it, or write to another folder. If that "
                f"process is gone, delete {path}."
            )
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file).st_ino:
                break
        os.close(file)  # its holder removed it in between
    start = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"pid": os.getpid(), "host": socket.gethostname(), "start": start, **note}
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, json.dumps(record).encode())
    return file


def read_owner(file: int) -> dict[str, Any]:
    """Who holds a lock file; empty if it does not say."""
    try:
        owner = json.loads(os.read(file, 4096))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def said_of(owner: Mapping[str, Any]) -> str:
    """The owner of a lock in words."""
    host = owner.get("host", "another machine")
    return f"process {owner.get('pid', '?')} on {host} since {owner.get('start', '?')}"


def living_owner(path: Path) -> dict[str, Any]:
    """Who holds a lock file, if that is another process that is alive; empty otherwise."""
    with guard:
        if Path(os.path.abspath(path)) in held:  # to open and close it would release it
            return {}
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:  # its holder removed it, or is another user
            return {}
        try:
            owner = read_owner(file)
            return {} if lock(file, owner) else owner
        finally:
            os.close(file)


def lock(file: int, owner: dict[str, Any]) -> bool:
    """
    Whether the file could be locked. Record locks hold across machines where the file system has them, and workers that are
    forked from the owner do not keep them alive. Without them, the owner's process id decides.
    """
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # the file system has no locks
            pass
    return not owner or (owner.get("host") == socket.gethostname() and not is_alive(owner.get("pid")))


def is_alive(pid: Any) -> bool:
    """Whether a process of this machine is there; `True` where that cannot be told."""
    if not isinstance(pid, int) or os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
