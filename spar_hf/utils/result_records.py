"""Reads the records that `spar-hf segment` leaves in folders of results: `.spar-hf*.jsonl`, one for each job."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def record_files(folder: Path) -> list[Path]:
    """The records in a folder, the oldest first: a later one of another job may replace results."""
    return sorted(folder.glob(".spar-hf*.jsonl"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def read_entries(records: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The lines of records that are whole."""
    for path in records:
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                if "settings" in entry and ("values" in entry or isinstance(entry["files"], list)):
                    yield entry
            except (ValueError, KeyError, TypeError):  # the last line of a killed run
                continue


def has_record(names: Iterable[str]) -> bool:
    """
    Whether one of the files of a folder is such a record.

    Example:

    ```python
    >>> has_record(["p0.png", ".spar-hf.jsonl"]), has_record(["p0.png"])
    (True, False)
    ```"""
    return any(name.startswith(".spar-hf") and name.endswith(".jsonl") for name in names)


def recorded_results(folder: Path) -> set[str]:
    """Paths of the files, and of the folders of heat maps, that the records in a folder name."""
    return {str(folder / name) for entry in read_entries(record_files(folder)) for name in entry.get("files", ())}
