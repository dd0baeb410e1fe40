"""
The images that a command reads, the names of their results, and a loop in which one bad image stops no other.

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

from spar_hf.utils.errors import UsageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
URL_PREFIXES = ("http://", "https://", "data:image/")  # as in `read_image`, whose module imports torch
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # disk full or read-only: every further image would fail too


@dataclass(frozen=True)
class InputImage:
    """
    An image to process.

    Attributes:
        source: file or URL.
        name: path of its results below the output folder, without suffix: `"sub/street"`.
    """

    source: str
    name: str


@dataclass
class RunSummary:
    """
    How many images of a run were processed, skipped or failed.

    Attributes:
        done: number of images processed.
        skipped: number of images that had their results already.
        failed: source and message of every image that failed.
        interrupted: whether the run was stopped with Ctrl-C.
        seconds: duration of the run.

    Example:

    ```python
    >>> str(RunSummary(done=3, failed=[("street.png", "street.png is empty.")], seconds=1.25))
    '3 done, 1 failed in 1.2 s'
    ```"""

    done: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def exit_status(self) -> int:
        """0 if every image succeeded, 1 if one failed, 130 after Ctrl-C (the convention of shells)."""
        return 130 if self.interrupted else int(bool(self.failed))

    def __str__(self) -> str:
        parts = [f"{self.done} done"]
        parts += [f"{self.skipped} skipped (already written)"] if self.skipped else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        text = f"{', '.join(parts)} in {self.seconds:.1f} s"
        return text + ("; interrupted, repeat with --skip-existing to continue" if self.interrupted else "")


def url_to_file_name(url: str) -> str:
    """
    File name for a downloaded URL: the last part of its path, without characters that file systems reject.

    Example:

    ```python
    >>> url_to_file_name("https://host/a/street%20view.jpg?size=2")
    'street_view.jpg'
    ```"""
    last = "" if url.startswith("data:") else urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "_", last).strip("._") or "image"


def images_under(folder: Path, exclude: Path | None = None) -> list[Path]:
    """Image files in a folder and its sub-folders, sorted. Hidden ones and the folder `exclude` are skipped."""
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


def expand_argument(argument: str, exclude: Path | None = None) -> list[tuple[str, PurePosixPath]]:
    """
    The images of one argument: a file, a URL, a folder (with sub-folders) or a pattern with `*`, `?`, `[…]` or `**`.

    Args:
        argument: as typed.
        exclude: a folder to skip, resolved.

    Returns:
        Source and path of each image, the path relative to the folder or to the part of the pattern without wildcards.

    Raises:
        FileNotFoundError: no such file, a folder without images, or a pattern that matches no image.
        UsageError: the argument is the folder `exclude` itself.
    """
    if argument.startswith(URL_PREFIXES):
        return [(argument, PurePosixPath(url_to_file_name(argument)))]
    path = Path(argument)
    if path.is_file():
        return [(argument, PurePosixPath(path.name))]
    suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
    if path.is_dir():
        check_output_differs(path, exclude)
        images = images_under(path, exclude)
        if not images:
            raise FileNotFoundError(f"{argument} contains no image ({suffixes}).")
        return [(str(image), PurePosixPath(image.relative_to(path).as_posix())) for image in images]
    if not glob.has_magic(argument):
        raise FileNotFoundError(
            f"{argument[:200]!r} is neither a file, a folder nor a URL (http://, https:// or data:image/). Check the "
            "spelling and, for a relative path, the working directory."
        )
    root = path
    while glob.has_magic(str(root)):
        root = root.parent
    check_output_differs(root, exclude)
    images = [
        image
        for image in map(Path, sorted(glob.glob(argument, recursive=True)))
        if image.is_file()
        and image.suffix.lower() in IMAGE_SUFFIXES
        and (exclude is None or exclude not in image.resolve().parents)
    ]
    if not images:
        raise FileNotFoundError(f"No image ({suffixes}) matches {argument!r}.")
    return [(str(image), PurePosixPath(image.relative_to(root).as_posix())) for image in images]


def check_output_differs(folder: Path, output: Path | None) -> None:
    """Refuse to write into the folder that is read: a second run would take the results of the first for images."""
    if output is not None and folder.resolve() == output:
        raise UsageError(f"{folder} is both input and output. Name another --output, for example {folder / 'results'}.")


def find_images(
    arguments: Iterable[str], exclude: Path | None = None
) -> tuple[list[InputImage], list[tuple[str, str]]]:
    """
    The images of all arguments, each once, with distinct names.

    Args:
        arguments: files, folders, patterns and URLs.
        exclude: a folder to skip, such as the results of an earlier run.

    Returns:
        The images; and every argument without images, with the reason.

    Raises:
        UsageError: images of two folders have the same relative path, so one result would overwrite the other; or an
            argument is the folder `exclude` itself.
    """
    exclude = None if exclude is None else exclude.resolve()
    found: dict[str, tuple[str, PurePosixPath]] = {}
    problems = []
    for argument in arguments:
        try:
            for source, relative in expand_argument(argument, exclude):
                key = source if source.startswith(URL_PREFIXES) else str(Path(source).resolve())
                found.setdefault(key, (source, relative))
        except OSError as error:
            problems.append((argument, str(error)))
    # compared without case: on many file systems Street.png and street.png are the same file
    stems = Counter(str(relative.with_suffix("")).casefold() for _, relative in found.values())
    images = []
    for source, relative in found.values():
        stem = relative.with_suffix("")
        images.append(InputImage(source, str(relative if stems[str(stem).casefold()] > 1 else stem)))
    check_distinct_targets((image.name, image.source) for image in images)
    return images, problems


def check_distinct_targets(targets: Iterable[tuple[str | Path, str]]) -> None:
    """
    Refuse two images whose results would have the same path.

    Args:
        targets: path of a result and source of its image.

    Raises:
        UsageError: names both images.
    """
    by_target = defaultdict(list)
    for target, source in targets:
        by_target[str(target).casefold()].append(source)
    for target, sources in by_target.items():
        if len(sources) > 1:
            raise UsageError(
                f"{sources[0]} and {sources[1]} would both be written as {target}. Name the folder that contains both, "
                "or process them one after the other into two output folders."
            )


def check_inputs_kept(targets: Iterable[Path], images: Sequence[InputImage]) -> None:
    """
    Refuse results that would overwrite an input image.

    Raises:
        UsageError: names the result.
    """
    inputs = {Path(image.source).resolve() for image in images if not image.source.startswith(URL_PREFIXES)}
    for target in targets:
        if target.resolve() in inputs:
            raise UsageError(f"The result {target} would overwrite an input image. Name another output folder.")


def process_images(
    images: Sequence[InputImage],
    process: Callable[[InputImage], None],
    is_done: Callable[[InputImage], bool] = lambda image: False,
    report: Callable[[str], None] | None = None,
    problems: Sequence[tuple[str, str]] = (),
    progress_bar: bool = True,
) -> RunSummary:
    """
    Process every image, with a progress bar for several; an image that fails is reported and the others go on.

    Args:
        images: the images.
        process: processes one image.
        is_done: whether an image can be skipped.
        report: receives a line about every failure as it happens.
        problems: arguments that failed already, with the reason; reported first.
        progress_bar: whether to show progress.

    Returns:
        [`RunSummary`]. Ctrl-C ends the run early.

    Raises:
        OSError: the disk is full or read-only.

    Example:

    ```python
    >>> summary = process_images([InputImage("a.png", "a"), InputImage("b.png", "b")], print, progress_bar=False)
    InputImage(source='a.png', name='a')
    InputImage(source='b.png', name='b')
    >>> summary.done, summary.exit_status
    (2, 0)
    ```"""
    summary, start = RunSummary(), time.perf_counter()

    def fail(source: str, message: str) -> None:
        summary.failed.append((source, message))
        if report is not None:
            # most messages contain the file's name; a data: URL is as long as its image
            report(message if source[:80] in message else f"{source[:80]}: {message}")

    for source, message in problems:
        fail(source, message)
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; in a log file a line every half minute is enough
    disable = not progress_bar or len(images) < 2
    with tqdm(images, unit="image", disable=disable, mininterval=interval, file=sys.stderr) as progress:
        try:
            for image in progress:
                if is_done(image):
                    summary.skipped += 1
                    continue
                try:
                    process(image)
                except Exception as error:
                    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                        raise
                    fail(image.source, str(error) or type(error).__name__)
                else:
                    summary.done += 1
        except KeyboardInterrupt:
            summary.interrupted = True
    summary.seconds = time.perf_counter() - start
    return summary
