"""Outputs that are folders of files with many images each: `DIR.parquet` and `DIR.tar`. Imports no torch at first."""

from typing import TYPE_CHECKING

from spar_hf.utils.errors import UsageError
from spar_hf.utils.remote_files import is_remote

if TYPE_CHECKING:
    from spar_hf.batch.part_files import PartFolder

PARQUET, TAR = ".parquet", ".tar"


def part_suffix(output: object) -> str | None:
    """
    The ending of an output that is a folder of files with many images each, or `None`.

    Example:

    ```python
    >>> part_suffix("s3://bucket/features.parquet"), part_suffix("masks.tar/"), part_suffix("masks")
    ('.parquet', '.tar', None)
    ```"""
    name = str(output).rstrip("/")
    return next((suffix for suffix in (PARQUET, TAR) if name.endswith(suffix)), None)


def open_parts(output: str) -> "PartFolder":
    """
    The folder of an output with such an ending. In a store any other is one of Parquet too, as earlier versions took it.

    Raises:
        UsageError: a store has no driver here.
    """
    if part_suffix(output) == TAR:
        from spar_hf.batch.tar_files import TarFolder

        return TarFolder(output)
    from spar_hf.batch.parquet_files import ParquetFolder

    return ParquetFolder(output)


def check_store(output: str, example: str) -> None:
    """
    Raises:
        UsageError: an output in a store without such an ending.
    """
    if is_remote(output) and part_suffix(output) is None:
        raise UsageError(f"Stores take files with many images each: name it {output.rstrip('/')}/{example}.")
