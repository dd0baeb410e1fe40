"""
The images of a run by name, and of a stream its files, so that a resumed run notices that they changed: another list is
split in another way.
"""

import gzip
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from spar_hf.utils.atomic import write_atomically
from spar_hf.utils.errors import UsageError
from spar_hf.utils.remote_files import is_remote

logger = logging.getLogger(__name__)

RECORD = "images.json.gz"  # in the folder of the run


def write_samples(output: Path, samples: Mapping[str, Iterable[str]]) -> None:
    """Keep the names of the images of a run, by what they are for: `train`, `held_out`, …; `measured` are some of them."""
    text = json.dumps({part: list(names) for part, names in samples.items()})
    write_atomically(output / RECORD, lambda temporary: temporary.write_bytes(gzip.compress(text.encode(), mtime=0)))


def read_samples(output: Path) -> dict[str, list[str]] | None:
    """What [`write_samples`] wrote; `None` where an earlier version ran, which kept no list."""
    path = output / RECORD
    if not path.is_file():
        return None
    return json.loads(gzip.decompress(path.read_bytes()))


def earlier_samples(output: Path, found: Iterable[str], allow_changes: bool) -> dict[str, list[str]] | None:
    """
    The images of a run that is resumed, compared with those that are there now.

    Args:
        output: folder of the run.
        found: names of all images that are there now.
        allow_changes: goes on where they differ.

    Returns:
        The record of the run; `None` where an earlier version ran.

    Raises:
        UsageError: images were added or removed; the message says how many, and names some.
    """
    then = read_samples(output)
    if then is None:
        logger.info("The run in %s holds no list of its images, so whether they changed is unknown.", output)
        return None
    changes = describe_changes([name for part, names in then.items() if part != "measured" for name in names], found)
    if changes and not allow_changes:
        raise UsageError(
            f"The images of the run in {output} changed: {changes}. Other images would be trained on and held out. Put them "
            "back, or go on with --allow_changed_data, which keeps the images held out before."
        )
    if changes:
        logger.warning("The images of the run changed: %s. Those held out before stay held out.", changes)
    return then


def same_files(names: Iterable[str]) -> Iterator[str]:
    """
    For each name of an image a text that is the same for all names of one file: absolute and relative paths, paths through
    `..`, and symbolic links. Different URLs, and different rows of tables, have different texts.

    Example:

    ```python
    >>> Path("photos").mkdir()
    >>> Path("photos/a.jpg").touch()
    >>> one, other = same_files(["photos/a.jpg", f"{Path.cwd()}/photos/../photos/a.jpg"])
    >>> one == other
    True
    ```"""
    folders: dict[str, str] = {}  # few folders hold many files
    for name in names:
        if is_remote(name) or "\0" in name:
            yield name
            continue
        folder, file = os.path.split(name)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        path = os.path.join(folders[folder], file)
        yield os.path.realpath(path) if os.path.islink(path) else path


def split_as_before(names: Iterable[str], held_out: Collection[str]) -> tuple[list[int], list[int]]:
    """
    Numbers of the images to train on, and of those that are held out, such as those that an earlier run held out. A file is
    held out under whatever name it is given ([`same_files`]).

    Example:

    ```python
    >>> split_as_before(["a.jpg", "b.jpg", "new.jpg"], ["b.jpg", "gone.jpg"])
    ([0, 2], [1])
    ```"""
    known = set(same_files(held_out))
    numbers: tuple[list[int], list[int]] = ([], [])
    for number, file in enumerate(same_files(names)):
        numbers[file in known].append(number)
    return numbers


def describe_changes(then: Iterable[str], now: Iterable[str], shown: int = 3) -> str:
    """
    What was added and removed; empty if nothing was.

    Example:

    ```python
    >>> describe_changes(["a.jpg", "b.jpg"], ["b.jpg", "c.jpg", "d.jpg"])
    '2 added (c.jpg, d.jpg), 1 removed (a.jpg)'
    ```"""
    before, after = Counter(then), Counter(now)
    said = []
    for names, verb in ((after - before, "added"), (before - after, "removed")):
        if count := names.total():
            some = ", ".join(sorted(names)[:shown]) + (", …" if len(names) > shown else "")
            said.append(f"{count} {verb} ({some})")
    return ", ".join(said)
