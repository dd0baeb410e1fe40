"""
Files of object stores: `s3://`, `gs://`, `hf://` and whatever fsspec has a driver for.

`http(s)` and `data:` URLs of images are none of these: [`~spar_hf.model.image_input.read_image`] reads them. fsspec comes
with torch; the driver of a store is a package of its own, such as s3fs, which fsspec's message names.
"""

import os
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.image_listing import is_image_name
from spar_hf.utils.tar_images import SCHEME as TAR_SCHEME
from spar_hf.utils.tar_images import Member, images_in_tar, is_tar

NOT_STORES = ("http", "https", "data")
SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)  # two letters at least: C:// is a drive


def is_remote(source: Any) -> bool:
    """
    Whether a source is the URL of a file or folder in a store.

    Example:

    ```python
    >>> [is_remote(source) for source in ("s3://bucket/a.jpg", "https://host/a.jpg", "in/a.jpg", b"s3://")]
    [True, False, False, False]
    ```"""
    if not isinstance(source, str):
        return False
    scheme = SCHEME.match(source)
    return scheme is not None and scheme[1].lower() not in NOT_STORES


def open_store(url: str) -> tuple[Any, str]:
    """
    The file system of a URL and the path in it.

    Raises:
        UsageError: no driver for such URLs is installed, or its settings are wrong.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url} cannot be opened: {error}") from error


def read_remote(url: str) -> bytes:
    """
    The bytes of a file in a store, or of an image in a tar file, see [`Member`].

    Raises:
        OSError: it is not there, or the connection broke.
    """
    if url.startswith(TAR_SCHEME):
        member = Member.parse(url)
        store, path = open_store(member.shard)
        data = store.cat_file(path, start=member.offset, end=member.offset + member.size)
        if len(data) != member.size:
            raise OSError(f"{member.shard} ends within {member.name}: it was cut or changed.")
        return data
    store, path = open_store(url)
    with store.open(path, "rb") as file:
        return file.read()


def write_remote(url: str, data: bytes) -> None:
    """Write a file to a store. Object stores show it when all of it has arrived."""
    store, path = open_store(url)
    store.makedirs(os.path.dirname(path), exist_ok=True)
    store.pipe_file(path, data)


def remote_stamp(url: str) -> str | None:
    """
    Size and version of a file in a store, as far as the store tells; `None` for a file that is gone. Of an image in a tar
    file, its place and those of the tar file.
    """
    if url.startswith(TAR_SCHEME):
        member = Member.parse(url)
        whole = remote_stamp(member.shard)
        return None if whole is None else f"{member.offset}+{member.size} {whole}"
    store, path = open_store(url)
    try:
        found = store.info(path)
    except FileNotFoundError:
        return None
    version = next((found[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if found.get(key)), "")
    return f"{found.get('size')} {version}"


def remote_images(url: str, exclude: str | None = None) -> list[tuple[str, PurePosixPath]]:
    """
    URL and relative path of every image file below a folder of a store, sorted, or of the one file. A tar file, or a folder
    with tar files and no image, has the images in them. Hidden files and folders are skipped.

    Args:
        url: of the file or folder.
        exclude: URL of a folder to skip, such as the results of an earlier run.

    Raises:
        MissingFiles: there is no image.
        UsageError: a tar file cannot be read.

    Example:

    ```python
    >>> write_remote("memory://photos/sub/street.jpg", b"...")
    >>> remote_images("memory://photos")
    [('memory://photos/sub/street.jpg', PurePosixPath('sub/street.jpg'))]
    ```"""
    store, root = open_store(url)
    if store.isfile(root):
        name = PurePosixPath(PurePosixPath(root).name)
        return tar_images({url: name}) if is_tar(root) else [(url, name)]
    listed = [path for path in store.find(root) if is_image_name(path) or is_tar(path)] if store.exists(root) else []
    folder, files = f"{url.rstrip('/')}/", [PurePosixPath(path).relative_to(root) for path in sorted(listed)]
    files = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    if exclude is not None and exclude.startswith(folder):
        files = [path for path in files if not path.is_relative_to(exclude.removeprefix(folder))]
    images = [path for path in files if is_image_name(path.name)]
    if files and not images:
        return tar_images({f"{folder}{path}": path for path in files})
    if not images:
        raise MissingFiles(f"{url} contains no image, or does not exist.")
    return [(f"{folder}{path}", path) for path in images]


def tar_images(shards: Mapping[str, PurePosixPath]) -> list[tuple[str, PurePosixPath]]:
    """
    URL and path of every image in tar files, on disk or in a store, see [`images_in_tar`].

    Args:
        shards: path or URL of each, and its name.

    Raises:
        MissingFiles: there is no image in them.
        UsageError: a file is no tar file.
    """
    found: list[tuple[str, PurePosixPath]] = []
    for shard, name in shards.items():
        store, path = open_store(shard)
        with store.open(path, "rb") as file:
            found += images_in_tar(shard, name, file)
    if not found:
        where = f"{next(iter(shards))} contains" if len(shards) == 1 else "The tar files contain"
        raise MissingFiles(f"{where} no image.")
    return found
