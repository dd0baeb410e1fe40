"""What the results in a folder were computed with, so that `--skip-existing` keeps no result of other words or models."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, stamp
from spar_hf.utils.result_records import read_entries, record_files
from spar_hf.utils.texts import json_text

RECORD = ".spar-hf.jsonl"


class ResultRecord:
    """
    The record of a folder: a file of JSON lines, one for each job of an array. A line holds settings, or the files of an
    image with their settings, and size and time of the image's file.

    Args:
        folder: of the results.
        settings: all that the results depend on beside the image.
        trust_unknown: whether to keep results of a folder without a record, which an earlier version wrote.
        job: name of this job in an array, which has a file of its own; empty for all of the work.

    Example:

    ```python
    >>> street = InputImage("street.png", "street")
    >>> Path("street.json").touch()
    >>> ResultRecord(Path(), {"threshold": 0.5}).add(street, [Path("street.json")])
    >>> ResultRecord(Path(), {"threshold": 0.5}).is_done(street, [Path("street.json")])
    True
    >>> ResultRecord(Path(), {"threshold": 0.3}).is_done(street, [Path("street.json")])
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: . contains results for other settings (street.json: threshold 0.5, now 0.3). Name ...
    ```"""

    def __init__(self, folder: Path, settings: Mapping[str, Any], trust_unknown: bool = False, job: str = ""):
        self.folder, self.path = folder, folder / (f".spar-hf.{job}.jsonl" if job else RECORD)
        self.settings = json.loads(json_text(settings))  # tuples become lists, as in the file
        self.key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]
        self.known: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.trusted = 0
        self.trust_unknown = trust_unknown and not record_files(folder)
        self.read()

    def read(self) -> None:
        """Read the records of all jobs, also what other processes have added since."""
        for entry in read_entries(record_files(self.folder)):
            if "values" in entry:
                self.known[entry["settings"]] = entry["values"]
                continue
            for name in entry["files"]:  # processes of several runs may have recorded a file: the latest replaced it
                if entry.get("time", 0) >= self.files.get(name, {}).get("time", 0):
                    self.files[name] = entry

    def is_current(self, path: Path) -> bool:
        """Whether a file is recorded as computed with the settings of this run."""
        return self.files.get(self._name(path), {}).get("settings") == self.key

    def is_done(self, image: InputImage, paths: Sequence[Path]) -> bool:
        """
        Whether all files of an image exist and were computed from the same image with the same settings.

        Raises:
            UsageError: they were computed with other settings.
        """
        if not all(path.exists() for path in paths):
            return False
        entries = [self.files.get(self._name(path)) for path in paths]
        for path, entry in zip(paths, entries, strict=True):
            if entry is not None and entry["settings"] != self.key:
                then = self.known.get(entry["settings"], {})
                other = "settings" if then.get("labels") == self.settings.get("labels") else "classes"
                what = describe_differences(then, self.settings)
                raise UsageError(
                    f"{self.folder} contains results for other {other} ({path.name}: {what}). Name another --output, or "
                    "omit --skip-existing to replace all results."
                )
        if self.trust_unknown and not any(entries):
            self.trusted += 1
            self.add(image, paths)
            return True
        return all(entry is not None and entry["stamp"] == stamp(image) for entry in entries)

    def add(self, image: InputImage, paths: Sequence[Path]) -> None:
        """Record the files of an image that were written."""
        entry: dict[str, Any] = {
            "files": [self._name(path) for path in paths],
            "settings": self.key,
            "stamp": stamp(image),
            "time": time.time(),
            **({} if image.frame is None else {"frame": image.frame}),
        }
        lines = [] if self.key in self.known else [{"settings": self.key, "values": self.settings}]
        self.known[self.key] = self.settings
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() == 0 or not self._ends_a_line():
                file.write("\n")  # a killed run may have left half a line
            file.write("".join(json_text(line) for line in [*lines, entry]))
        self.files.update(dict.fromkeys(entry["files"], entry))

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read() == b"\n"

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path.absolute())

    def differences(self, then_key: str, now_key: str) -> str:
        """What differs between two recorded settings."""
        return describe_differences(self.known.get(then_key, {}), self.known.get(now_key, {}))


def describe_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """
    The settings that differ, with both values.

    Example:

    ```python
    >>> describe_differences({"threshold": 0.5, "size": 32}, {"threshold": None, "size": 32})
    'threshold 0.5, now null'
    ```"""
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    values = {name: (json.dumps(then.get(name)), json.dumps(now.get(name))) for name in differing}
    return "; ".join(f"{name} {old[:80]}, now {new[:80]}" for name, (old, new) in values.items()) or "unknown ones"
