"""A folder on disk or in a store of fsspec (`s3://`, `memory://`, …), whose files appear when they are complete."""

import os
import shutil
from pathlib import Path
from typing import Any

from spar_hf.utils.atomic import write_atomically
from spar_hf.utils.remote_files import is_remote, open_store


class Folder:
    """
    Reads and writes the files of a folder by name.

    Args:
        url: path, or URL of a store.

    Example:

    ```python
    >>> folder = Folder("memory://bucket/results")
    >>> folder.write("notes.txt", b"done")
    >>> folder.names(), folder.read("notes.txt"), folder.size("gone.txt")
    (['notes.txt'], b'done', None)
    ```"""

    def __init__(self, url: str | os.PathLike):
        self.url = os.fspath(url).rstrip("/")
        self.is_remote = is_remote(self.url)
        self.root = open_store(self.url)[1]

    @property
    def store(self) -> Any:
        """
        The file system of fsspec. It is asked for anew, since those with threads do not survive the start of a process;
        fsspec keeps one for each process.
        """
        return open_store(self.url)[0]

    def path(self, name: str) -> str:
        """The path of a file within its file system."""
        return f"{self.root}/{name}"

    def names(self) -> list[str]:
        """Names of the files and folders that are there, sorted; not those below them."""
        found = self.store.ls(self.root, detail=False, refresh=True) if self.store.exists(self.root) else []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; `None` if it is not there."""
        try:
            return self.store.info(self.path(name), refresh=True)["size"]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> Any:
        """A file, opened to read bytes."""
        return self.store.open(self.path(name), "rb")

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of a file, or those from `start` to before `end`."""
        return self.store.cat_file(self.path(name), start=start, end=end)

    def write(self, name: str, data: bytes) -> None:
        """Write a file. Stores show it when all of it has arrived."""
        if self.is_remote:
            self.store.makedirs(self.root, exist_ok=True)
            self.store.pipe_file(self.path(name), data)
        else:
            write_atomically(Path(self.url, name), lambda path: path.write_bytes(data))

    def put(self, temporary: Path, name: str) -> None:
        """Make a local file that is complete one of the folder. It must lie on the same disk if the folder is local."""
        if self.is_remote:
            self.store.makedirs(self.root, exist_ok=True)
            self.store.put_file(str(temporary), self.path(name))
        else:
            shutil.move(temporary, Path(self.url, name))

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.size(name) is not None:
            self.store.rm_file(self.path(name))
