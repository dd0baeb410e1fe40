"""
Commands on many images: which images they read, where results go, and a loop in which one bad image stops no other.

Imports no torch, so that a command reports wrong arguments at once.
"""

import errno
import glob
import os
import re
import sys
import time
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
URL_STARTS = ("http://", "https://", "data:image/")  # what `read_image` takes for one; its file imports torch
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # every further image would fail alike


@dataclass(frozen=True)
class InputImage:
    """
    An image to work on.

    Attributes:
        source: file or URL.
        name: where its results go below the output folder, without a suffix: `"sub/street"`.
    """

    source: str
    name: str


@dataclass
class RunSummary:
    """
    What became of the images of a run.

    Attributes:
        done, skipped: how many were written, and how many had their results already.
        failed: source and message of every one that failed.
        interrupted: whether the run was stopped by hand.
        seconds: duration of the run.
    """

    done: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def exit_status(self) -> int:
        """0 where all went well, 1 where something failed, 130 where it was stopped by hand (as shells do)."""
        return 130 if self.interrupted else int(bool(self.failed))

    def __str__(self) -> str:
        parts = [f"{self.done} done"]
        parts += [f"{self.skipped} skipped (written before)"] if self.skipped else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        text = f"{', '.join(parts)} in {self.seconds:.1f} s"
        return text + ("; stopped, run again with --skip-existing to go on" if self.interrupted else "")


def url_name(url: str) -> str:
    """A file name for what a URL gives: the last part of its path, without what file systems bear badly."""
    last = "" if url.startswith("data:") else urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "_", last).strip("._") or "image"


def images_under(folder: Path, exclude: Path | None = None) -> list[Path]:
    """Image files of a folder and its sub-folders, sorted, without hidden ones and those under `exclude`."""
    found = []
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (exclude is None or (here / name).resolve() != exclude)
        ]
        found += [here / n for n in files if not n.startswith(".") and Path(n).suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found)


def expand(argument: str, exclude: Path | None = None) -> list[tuple[str, PurePosixPath]]:
    """
    The images of one argument, each with its path below the argument's folder: a file, a URL, a folder (with its
    sub-folders) or a pattern with `*`, `?`, `[…]` or `**`.

    Raises:
        FileNotFoundError: no such file, an empty folder, or a pattern that meets no image.
        ValueError: the argument is the folder `exclude` itself.
    """
    if argument.startswith(URL_STARTS):
        return [(argument, PurePosixPath(url_name(argument)))]
    path = Path(argument)
    if path.is_file():
        return [(argument, PurePosixPath(path.name))]
    suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
    if path.is_dir():
        refuse_same_folder(path, exclude)
        images = images_under(path, exclude)
        if not images:
            raise FileNotFoundError(f"{argument} holds no image ({suffixes}).")
        return [(str(image), PurePosixPath(image.relative_to(path).as_posix())) for image in images]
    if not glob.has_magic(argument):
        raise FileNotFoundError(
            f"{argument[:200]!r} is neither a file, a folder nor a URL (http://, https:// or data:image/). Check the "
            "spelling and, for a relative path, the working directory."
        )
    # the folder before the first part with a wildcard: what lies below it is kept in the names
    root = path
    while glob.has_magic(str(root)):
        root = root.parent
    refuse_same_folder(root, exclude)
    images = [
        image
        for image in map(Path, sorted(glob.glob(argument, recursive=True)))
        if image.is_file()
        and image.suffix.lower() in IMAGE_SUFFIXES
        and (exclude is None or exclude not in image.resolve().parents)
    ]
    if not images:
        raise FileNotFoundError(f"No image ({suffixes}) is named like {argument!r}.")
    return [(str(image), PurePosixPath(image.relative_to(root).as_posix())) for image in images]


def refuse_same_folder(folder: Path, output: Path | None) -> None:
    """Refuse to write among what is read: a second run would take the results of the first for images."""
    if output is not None and folder.resolve() == output:
        raise ValueError(f"{folder} is read and written at once. Name another --output, {folder / 'results'} say.")


def find_images(
    arguments: Iterable[str], exclude: Path | None = None
) -> tuple[list[InputImage], list[tuple[str, str]]]:
    """
    The images of all arguments, each once, with names that differ.

    Args:
        arguments (`Iterable[str]`): files, folders, patterns and URLs.
        exclude (`Path`, *optional*): a folder that is not searched: the results of an earlier run.

    Returns:
        The images, and the arguments that gave none with the reason.

    Raises:
        ValueError: images of two folders have the same path in them, so that one would overwrite the other; a folder
            is `exclude` itself.
    """
    exclude = None if exclude is None else exclude.resolve()
    found: dict[str, tuple[str, PurePosixPath]] = {}
    problems = []
    for argument in arguments:
        try:
            for source, below in expand(argument, exclude):
                key = source if source.startswith(URL_STARTS) else str(Path(source).resolve())
                found.setdefault(key, (source, below))
        except OSError as error:
            problems.append((argument, str(error)))
    # compared without case: many file systems do not tell Street.png from street.png
    plain = Counter(str(below.with_suffix("")).casefold() for _, below in found.values())
    images = [
        InputImage(source, str(below if plain[str(below.with_suffix("")).casefold()] > 1 else below.with_suffix("")))
        for source, below in found.values()
    ]
    refuse_twins((image.name, image.source) for image in images)
    return images, problems


def refuse_twins(targets: Iterable[tuple[str | Path, str]]) -> None:
    """
    Refuse two images whose results would have the same path.

    Raises:
        ValueError: names both images.
    """
    by_target = defaultdict(list)
    for target, source in targets:
        by_target[str(target).casefold()].append(source)
    for target, sources in by_target.items():
        if len(sources) > 1:
            raise ValueError(
                f"{sources[0]} and {sources[1]} would both be written as {target}. Name the folder that holds both, or "
                "run them one after the other into two output folders."
            )


def refuse_overwriting(targets: Iterable[Path], images: Sequence[InputImage]) -> None:
    """
    Refuse results that would replace an image that is read.

    Raises:
        ValueError: names the image.
    """
    read = {Path(image.source).resolve() for image in images if not image.source.startswith(URL_STARTS)}
    for target in targets:
        if target.resolve() in read:
            raise ValueError(f"The result {target} would overwrite an image that is read. Name another output folder.")


def process_images(
    images: Sequence[InputImage],
    work: Callable[[InputImage], None],
    is_done: Callable[[InputImage], bool] = lambda image: False,
    report: Callable[[str], None] | None = None,
    problems: Sequence[tuple[str, str]] = (),
    bar: bool = True,
) -> RunSummary:
    """
    Work on every image, with a bar and an estimate where there are several; an image that fails loses no other.

    Args:
        images (`Sequence[Image]`): what to work on.
        work (`Callable[[Image], None]`): does one image.
        is_done (`Callable[[Image], bool]`, *optional*): whether an image may be left out.
        report (`Callable[[str], None]`, *optional*): takes a line about every failure, as it happens.
        problems (`Sequence[tuple[str, str]]`, *optional*): arguments that have failed already, to be reported too.
        bar (`bool`, *optional*, defaults to `True`): whether to show progress.

    Returns:
        [`RunSummary`]. A full disk ends the run; so does Ctrl-C.

    Raises:
        OSError: the disk is full or read-only.
    """
    summary, start = RunSummary(), time.perf_counter()

    def fail(source: str, message: str) -> None:
        summary.failed.append((source, message))
        if report is not None:
            # a data: URL is as long as its image; most messages name the file already
            report(message if source[:80] in message else f"{source[:80]}: {message}")

    for source, message in problems:
        fail(source, message)
    # in a log file a line every half minute is enough
    pause = 0.1 if sys.stderr.isatty() else 30
    quiet = not bar or len(images) < 2
    with tqdm(images, unit="image", disable=quiet, mininterval=pause, file=sys.stderr) as progress:
        try:
            for image in progress:
                if is_done(image):
                    summary.skipped += 1
                    continue
                try:
                    work(image)
                except Exception as error:
                    if isinstance(error, OSError) and error.errno in DISK_FULL:
                        raise
                    fail(image.source, str(error) or type(error).__name__)
                else:
                    summary.done += 1
        except KeyboardInterrupt:
            summary.interrupted = True
    summary.seconds = time.perf_counter() - start
    return summary
