"""The image files of folders and patterns: the one list of endings and the one walk that all commands share."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from spar_hf.utils.result_records import has_record, recorded_results

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif", ".avifs", ".heic", ".heif", ".hif"),
}


def is_image_name(name: str | Path) -> bool:
    """
    Whether a file name has an ending of images.

    Example:

    ```python
    >>> is_image_name("street.JPG"), is_image_name("street.raw")
    (True, False)
    ```"""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def scan_folder(
    folder: Path, exclude: Path | None = None, wanted: Callable[[str], bool] = is_image_name
) -> tuple[list[Path], Counter[str]]:
    """
    The image files in a folder and its sub-folders, sorted, and how many others there are of each ending. `wanted` says by
    their names which files to list in place of images.

    Results that `spar-hf segment` recorded in a sub-folder are passed over, and counted in a warning; those in `folder`
    itself are listed, since somebody named that.

    Links to files keep their own names, so that several links to one file are several images. Linked folders are followed,
    each folder once: what lies inside `folder` itself is taken first, so that a link never replaces the real name or loops.
    Hidden files and folders, and the folder `exclude` (resolved), are skipped.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()
    results: set[str] = set()
    passed_over = 0
    visited: set[str] = {str(exclude)} if exclude is not None else set()
    waiting = [str(folder)]  # linked folders, looked into after the real ones
    while waiting:
        for parent, folders, files in os.walk(waiting.pop(0)):
            real = os.path.realpath(parent)
            if real in visited:
                folders[:] = []
                continue
            visited.add(real)
            if has_record(files) and real != os.path.realpath(folder):
                results |= recorded_results(Path(parent))
            folders[:] = sorted(
                name for name in folders if not name.startswith(".") and os.path.join(parent, name) not in results
            )
            waiting += [os.path.join(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
            for name in files:
                if os.path.join(parent, name) in results:
                    passed_over += wanted(name)
                elif wanted(name) and not name.startswith("."):
                    found.append(Path(parent) / name)
                elif not name.startswith("."):
                    others[Path(name).suffix.lower() or "no ending"] += 1
    report_results(folder, passed_over)
    return sorted(found), others


def report_results(where: str | Path, count: int) -> None:
    """Log a warning that files were passed over because they are results."""
    if count:
        logger.warning("%s: passed over %d results of spar-hf segment. Name their folder to read them.", where, count)


def images_under(folder: Path, exclude: Path | None = None) -> list[Path]:
    """The image files of [`scan_folder`]. Says how many files of which ending were passed over if there are images."""
    found, others = scan_folder(folder, exclude)
    if found:
        report_passed_over(folder, others)
    return found


def report_passed_over(where: str | Path, others: Counter[str]) -> None:
    """Log a warning that names the endings of files that were passed over."""
    if others:
        logger.warning("%s: passed over %s, which are no images by their ending.", where, describe(others))


def describe(others: Counter[str]) -> str:
    """
    Counts by ending, the most frequent first.

    Example:

    ```python
    >>> describe(Counter({".txt": 1, ".raw": 3}))
    '3 .raw, 1 .txt'
    ```"""
    ordered = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {ending}" for ending, count in ordered)


def split_pattern(pattern: str) -> tuple[Path, str]:
    """
    The folder of a pattern without wildcards, and a pattern for `glob` in which the brackets of existing folders are meant
    literally.

    Example:

    ```python
    >>> Path("photos [2024]").mkdir()
    >>> split_pattern("photos [2024]/*.jpg")
    (PosixPath('photos [2024]'), 'photos [[]2024]/*.jpg')
    ```"""
    parts = Path(pattern).parts
    known = next((number for number in range(len(parts), 0, -1) if Path(*parts[:number]).is_dir()), 0)
    rest = parts[known:]
    while rest and not glob.has_magic(rest[0]):
        known, rest = known + 1, rest[1:]
    root = Path(*parts[:known])
    return root, os.path.join(glob.escape(str(root)), *rest) if known else os.path.join(*rest)


def files_matching(
    pattern: str, exclude: Path | None = None, wanted: Callable[[str], bool] = is_image_name
) -> tuple[list[Path], Counter[str]]:
    """
    The image files that match a pattern, and how many other files match by ending. `exclude` and `wanted` as in
    [`scan_folder`].

    A folder that `**` reaches by several links is read once, by its shortest path.
    """
    _, escaped = split_pattern(pattern)
    found = glob.glob(escaped, recursive=True)
    if not found and "[" in pattern:  # brackets of a folder behind a wildcard
        found = glob.glob(escaped.replace("[[]", "[").replace("[", "[[]"), recursive=True)
    paths = [path for path in map(Path, sorted(found)) if not path.is_dir()]
    if exclude is not None:
        paths = [path for path in paths if exclude not in path.resolve().parents]
    if "**" in pattern:
        paths = each_folder_once(paths)
    results = results_below(split_pattern(pattern)[0], paths)
    report_results(pattern, sum(wanted(path.name) for path in paths if str(path) in results))
    paths = [path for path in paths if str(path) not in results]
    others = Counter(path.suffix.lower() or "no ending" for path in paths if not wanted(path.name))
    return [path for path in paths if wanted(path.name)], others


def results_below(root: Path, paths: Iterable[Path]) -> set[str]:
    """What `spar-hf segment` recorded in the folders between `root` and these paths, `root` itself excepted."""
    folders = {parent for path in paths for parent in path.parents if root in parent.parents}
    return {name for folder in folders for name in recorded_results(folder)}


def each_folder_once(paths: Iterable[Path]) -> list[Path]:
    """Leave out files that are reached again through links to folders."""
    paths = list(paths)
    parents: dict[str, Path] = {}
    for parent in sorted({path.parent for path in paths}, key=lambda path: (len(path.parts), str(path))):
        parents.setdefault(os.path.realpath(parent), parent)
    kept = set(parents.values())
    return [path for path in paths if path.parent in kept]
