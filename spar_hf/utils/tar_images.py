"""Images in tar files on disk and in stores, such as WebDataset shards: each has a URL of its own, and none is unpacked."""

import tarfile
from pathlib import PurePosixPath
from typing import NamedTuple

from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_listing import is_image_name

SCHEME = "tar://"


class Member(NamedTuple):
    """A file in a tar file: its name, the path or URL of the tar file, and where the bytes are."""

    name: str
    shard: str
    offset: int
    size: int

    @property
    def url(self) -> str:
        """`tar://NAME::SHARD#OFFSET+SIZE`: what it takes to read the file without a look at others."""
        return f"{SCHEME}{self.name}::{self.shard}#{self.offset}+{self.size}"

    @classmethod
    def parse(cls, url: str) -> "Member":
        """
        The member of a URL.

        Raises:
            UsageError: it is none.

        Example:

        ```python
        >>> Member.parse("tar://sub/street.jpg::shards/000.tar#1536+20480")
        Member(name='sub/street.jpg', shard='shards/000.tar', offset=1536, size=20480)
        ```"""
        try:
            rest, _, place = url.removeprefix(SCHEME).rpartition("#")
            name, _, shard = rest.rpartition("::")
            offset, size = map(int, place.split("+"))
        except ValueError as error:
            raise UsageError(f"{url[:200]!r} is no image of a tar file. Name the tar file itself.") from error
        return cls(name, shard, offset, size)


def is_tar(name: str) -> bool:
    """Whether a file name is that of a tar file that is not compressed."""
    return name.lower().endswith(".tar")


def images_in_tar(shard: str, name: PurePosixPath, file: object) -> list[tuple[str, PurePosixPath]]:
    """
    URL and path of every image in a tar file; the path starts with the name of the tar file, since keys of two shards may be
    equal. Only headers are read; a store gives whole blocks.

    Args:
        shard: path or URL.
        name: of the tar file, with the sub-folders below the folder that was named: `train/000.tar`.
        file: opened to read bytes.

    Raises:
        UsageError: it is no tar file, or a compressed one.
    """
    folder, found = name.with_suffix(""), []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
            for entry in tar:
                path = PurePosixPath(entry.name)
                hidden = any(part.startswith(".") for part in path.parts)
                if entry.isreg() and not entry.issparse() and not hidden and is_image_name(path.name):
                    found.append((Member(entry.name, shard, entry.offset_data, entry.size).url, folder / path))
                tar.members = []  # tarfile would keep all headers
    except tarfile.TarError as error:
        raise UsageError(f"{shard} is no uncompressed tar file ({error}). Copy it again, or unpack it.") from error
    return found
