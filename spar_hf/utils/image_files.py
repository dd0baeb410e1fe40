"""
The images that a command reads, the names of their results, and a loop in which one bad image stops no other.

Imports no torch, so that a command reports wrong arguments at once.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import signal
import sys
import threading
import time
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_listing import describe, files_matching, report_passed_over, scan_folder, split_pattern
from spar_hf.utils.remote_files import is_remote, remote_images, remote_stamp, tar_images
from spar_hf.utils.tar_images import is_tar

MAX_URL_NAME = 100  # characters of a file name for a URL, which may be as long as servers like
URL_PREFIXES = ("http://", "https://", "data:image/")  # as in `read_image`, whose module imports torch
ORIENTATION_TAG, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # EXIF orientations that exchange height and width
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # disk full or read-only: every further image would fail too


@dataclass(frozen=True)
class InputImage:
    """
    An image to process.

    Attributes:
        source: file or URL.
        name: path of its results below the output folder, without suffix: `"sub/street"`.
        frame: number of the frame or page, from 0; `None` for the image that a file shows first.
    """

    source: str
    name: str
    frame: int | None = field(default=None, repr=False)


def stamp(image: InputImage) -> list[int] | str | None:
    """
    Size in bytes and time of the last change of an image's file, and the number of a chosen frame; hash of a URL; `None` for
    a file that is gone. Of a file in a store, size and version.
    """
    if is_remote(image.source):
        return remote_stamp(image.source)
    if image.source.startswith(URL_PREFIXES):
        return hashlib.sha256(image.source.encode("utf-8", "surrogateescape")).hexdigest()[:16] + (
            "" if image.frame is None else f" {image.frame}"
        )
    try:
        found = Path(image.source).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, *([] if image.frame is None else [image.frame])]


@dataclass
class RunSummary:
    """
    How many images of a run were processed, skipped or failed.

    Attributes:
        done: number of images processed.
        skipped: number of images that had their results already.
        failed: source and message of every image that failed.
        signal: number of the signal that stopped the run, 0 for none.
        seconds: duration of the run.
        only_first: a file with several frames or pages of which the first was read; empty if there is none.

    Example:

    ```python
    >>> str(RunSummary(done=3, failed=[("street.png", "street.png is empty.")], seconds=1.25))
    '3 done, 1 failed in 1.2 s'
    ```"""

    done: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    signal: int = 0
    seconds: float = 0.0
    only_first: str = ""

    def add_failure(self, source: str, reason: str, report: Callable[[str], None] | None = None) -> None:
        """Count a failure, and report it in a line that names its image."""
        self.failed.append((source, reason))
        if report is not None:
            # most reasons contain the file's name; a data: URL is as long as its image
            report(reason if source[:80] in reason else f"{source[:80]}: {reason}")

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped the run."""
        return self.signal != 0

    @property
    def exit_status(self) -> int:
        """0 if every image succeeded, 1 if one failed, 130 after Ctrl-C and 143 after SIGTERM (the convention of shells)."""
        return 128 + self.signal if self.interrupted else int(bool(self.failed))

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
    return re.sub(r"[^\w.-]+", "_", last)[-MAX_URL_NAME:].strip("._") or "image"


def inside_folder(relative: PurePosixPath) -> PurePosixPath:
    """
    A relative path without `..`, so that a result named by it stays in the output folder.

    Example:

    ```python
    >>> str(inside_folder(PurePosixPath("b/../../other/street.png")))
    'other/street.png'
    ```"""
    parts: list[str] = []
    for part in relative.parts:
        if part == "..":
            parts = parts[:-1]
        elif part != relative.anchor:
            parts.append(part)
    return PurePosixPath(*parts)


def result_path(folder: Path, name: str, suffix: str) -> Path:
    """
    The file of a result in an output folder.

    Raises:
        UsageError: the name leads out of the folder.
    """
    path = folder / f"{name}{suffix}"
    if ".." in PurePosixPath(name).parts or not path.is_relative_to(folder):
        raise UsageError(f"The result {name!r} would lie outside {folder}. Name the images without '..'.")
    return path


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with the number of the signal."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """
    Raise the first Ctrl-C or SIGTERM as [`Interrupted`] inside the block, so that what is held in memory can be written.
    Further signals are ignored for five seconds, since launchers hand on signals that their processes got already; later
    ones stop the process.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    first: list[float] = []

    def interrupt(number: int, frame: object) -> None:
        if not first:
            first.append(time.monotonic())
            raise Interrupted(number)
        if time.monotonic() - first[0] > 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def expand_argument(
    argument: str, exclude: Path | None = None, exclude_url: str | None = None
) -> list[tuple[str, PurePosixPath]]:
    """
    The images of one argument: a file, a URL, a folder (with sub-folders), a file or folder of a store (`s3://`, …) or a
    pattern with `*`, `?`, `[…]` or `**`. A tar file has the images in it, and so have the tar files of a folder or pattern
    without images.

    Args:
        argument: as typed.
        exclude: a folder to skip, resolved.
        exclude_url: a folder of a store to skip.

    Returns:
        Source and path of each image, the path relative to the folder or to the part of the pattern without wildcards.

    Raises:
        FileNotFoundError: no such file, a folder without images, or a pattern that matches no image.
        UsageError: the argument is the folder `exclude` itself.
    """
    if argument.startswith(URL_PREFIXES):
        return [(argument, PurePosixPath(url_to_file_name(argument)))]
    if is_remote(argument):
        return remote_images(argument, exclude_url)
    path = Path(argument)
    look: Callable[..., tuple[list[Path], Counter[str]]]
    if path.is_dir():
        root, look = path, partial(scan_folder, path, exclude)
    elif path.is_file() and is_tar(argument):
        return tar_images({argument: PurePosixPath(path.name)})
    elif path.exists() or path.is_symlink():
        return [(argument, PurePosixPath(path.name))]
    elif glob.has_magic(argument):
        root, look = split_pattern(argument)[0], partial(files_matching, argument, exclude)
    else:
        raise FileNotFoundError(
            f"{argument[:200]!r} is neither a file, a folder nor a URL (http://, https:// or data:image/). Check the "
            "spelling and, for a relative path, the working directory."
        )
    check_output_differs(root, exclude)
    images, others = look()
    if not images and others.get(".tar"):
        shards = [shard for shard in look(wanted=is_tar)[0] if shard.is_file()]
        return tar_images({str(shard): PurePosixPath(shard.relative_to(root).as_posix()) for shard in shards})
    if not images:
        where = f"{argument} contains no image" if path.is_dir() else f"No image matches {argument!r}"
        raise FileNotFoundError(f"{where}" + (f", but {describe(others)}." if others else "."))
    report_passed_over(argument, others)
    return [(str(image), PurePosixPath(image.relative_to(root).as_posix())) for image in images]


def check_output_differs(folder: Path, output: Path | None) -> None:
    """Refuse to write into the folder that is read: a second run would take the results of the first for images."""
    if output is not None and folder.resolve() == output:
        raise UsageError(f"{folder} is both input and output. Name another --output, for example {folder / 'results'}.")


def find_images(
    arguments: Iterable[str], exclude: str | Path | None = None
) -> tuple[list[InputImage], list[tuple[str, str]]]:
    """
    The images of all arguments, each once, with distinct names: URLs that end in the same file name get eight digits of
    their hash, and files that differ in their suffix only keep it.

    Args:
        arguments: files, folders, patterns and URLs.
        exclude: a folder to skip, such as the results of an earlier run; or the URL of one in a store.

    Returns:
        The images; and every argument without images, with the reason.

    Raises:
        UsageError: images of two folders have the same relative path, so one result would overwrite the other; or an
            argument is the folder `exclude` itself.
    """
    exclude_url = str(exclude) if is_remote(exclude) else None
    folder = None if exclude is None or exclude_url is not None else Path(exclude).resolve()
    found: dict[str, tuple[str, PurePosixPath]] = {}
    seen: set[str] = set()
    problems = []
    for argument in arguments:
        try:
            for source, relative in expand_argument(argument, folder, exclude_url):
                relative = inside_folder(relative)
                if source.startswith(URL_PREFIXES) or is_remote(source):
                    found.setdefault(source, (source, relative))
                    continue
                # links to one file are several images, but a file that two arguments name is one
                named, real = os.path.abspath(source), f"{Path(source).resolve()} as {relative}"
                if named not in seen and real not in seen:
                    found[named] = (source, relative)
                seen |= {named, real}
        except OSError as error:
            problems.append((argument, str(error)))
    # compared without case: on many file systems Street.png and street.png are the same file
    twice = Counter(str(relative).casefold() for _, relative in found.values())
    for key, (source, relative) in found.items():
        if source.startswith(URL_PREFIXES) and twice[str(relative).casefold()] > 1:  # a.com/x.jpg and b.com/x.jpg
            digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:8]
            found[key] = source, relative.with_stem(f"{relative.stem}-{digest}")
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


def check_distinct_masks(pairs: Iterable[tuple[Path, Path]]) -> None:
    """
    Refuse two images that have one mask.

    Args:
        pairs: files of each image and its mask.

    Raises:
        UsageError: names both images.
    """
    images: dict[Path, Path] = {}
    for image, mask in pairs:
        if mask in images:
            raise UsageError(f"{images[mask]} and {image} would share the mask {mask}. Rename or remove one of them.")
        images[mask] = image


def turned_image_hint(image: str | bytes, image_size: Sequence[int], mask_size: Sequence[int]) -> str:
    """
    What to do about a mask that has the size of its image before the EXIF orientation turned it. To resize that mask would
    ruin its labels. Empty if that is not why their sizes differ.

    Args:
        image: the path or the bytes of its file.
        image_size: its height and width, upright.
        mask_size: height and width of the mask.
    """
    from spar_hf.model.image_input import open_image  # imports torch

    if tuple(mask_size) == tuple(image_size) or tuple(mask_size) != tuple(image_size)[::-1]:
        return ""
    if open_image(image, urls=False)[0].getexif().get(ORIENTATION_TAG) not in QUARTER_TURNS:
        return ""
    return (
        "The image is turned by its EXIF orientation, and its mask is not: turn the mask in the same way, or remove the tag "
        "from the image."
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
    images: Iterable[InputImage],
    process: Callable[[InputImage], None],
    is_done: Callable[[InputImage], bool] = lambda image: False,
    report: Callable[[str], None] | None = None,
    problems: Sequence[tuple[str, str]] = (),
    progress_bar: bool = True,
) -> RunSummary:
    """
    Process every image, with a progress bar for several; an image that fails is reported and the others go on.

    Args:
        images: the images; of an iterator the next one is asked for when the one before is done.
        process: processes one image.
        is_done: whether an image can be skipped.
        report: receives a line about every failure as it happens.
        problems: arguments that failed already, with the reason; reported first.
        progress_bar: whether to show progress.

    Returns:
        [`RunSummary`]. Ctrl-C ends the run early, inside [`interruptible`] SIGTERM too.

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

    for source, message in problems:
        summary.add_failure(source, message, report)
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; in a log file a line every half minute is enough
    disable = not progress_bar or (isinstance(images, Sized) and len(images) < 2)
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
                    summary.add_failure(image.source, str(error) or type(error).__name__, report)
                else:
                    summary.done += 1
        except KeyboardInterrupt as stop:
            summary.signal = getattr(stop, "number", signal.SIGINT)
    summary.seconds = time.perf_counter() - start
    return summary
