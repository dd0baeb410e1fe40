"""
Many images through a model: worker processes read ahead of it, images of one size share a forward pass, and a thread writes.
"""

import errno
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from spar_hf.batch.extractor import same_size_groups
from spar_hf.utils.image_files import DISK_ERRORS, InputImage, RunSummary
from spar_hf.utils.processes import ALONE, Processes, in_units

HELD_BYTES = 256 * 2**20  # of images that wait for others of their size
BATCHES_BEHIND = 8  # that an image waits at most: the file of its results is not complete without it
PREFETCH = 4  # images that a worker reads ahead at least; all together a batch, which is then there when one is done


@dataclass
class Work:
    """
    What is done with an image.

    Attributes:
        read: reads an image; in the workers, so it must be picklable. What it returns has `pixel_values`
            `(1, 3, height, width)` and `only_first` (see [`PreparedImage`]), and may have the picture itself, in RGB, as
            `image`.
        compute: takes what was read of images of one size, and returns a result for each.
        write: takes the image, what was read, and the result; in a thread, one image at a time.
        fail: takes an image that failed in any of these, and the reason; in that thread.
        patch_size: of the model, in pixels.
    """

    read: Callable[[InputImage], Any]
    compute: Callable[[list[Any]], Sequence[Any]]
    write: Callable[[InputImage, Any, Any], None]
    patch_size: int
    fail: Callable[[InputImage, str], None] = lambda image, reason: None


@dataclass
class Unread:
    """Why an image could not be read."""

    reason: str


class Images(Dataset):
    """The images with their positions, read when they are asked for, under the limit on pixels that holds here."""

    def __init__(self, images: Sequence[InputImage], read: Callable[[InputImage], Any]):
        self.images, self.read, self.max_pixels = images, read, Image.MAX_IMAGE_PIXELS

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[int, Any]:
        Image.MAX_IMAGE_PIXELS = self.max_pixels  # here, since workers may be processes that inherit nothing
        try:
            return position, self.read(self.images[position])
        except Exception as error:  # each decoder raises its own kind
            return position, Unread(str(error) or type(error).__name__)


def default_workers(images: int) -> int:
    """Processes that read: up to four, one less than there are cores, and none for a few images."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if images < 8 else max(0, min(4, cores - 1))


def leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches the whole group of processes; the main one ends its workers when it has written what it holds."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def as_it_is(item: Any) -> Any:
    """What a `DataLoader` hands on: no tensors are made of it."""
    return item


def held_bytes(item: Any) -> int:
    """Memory of what [`Work.read`] returned: the pixels for the model, and the picture where it is kept."""
    picture = getattr(item, "image", None)
    return item.pixel_values.nbytes + (0 if picture is None else 3 * picture.width * picture.height)


class Buckets:
    """
    Images that wait for others of their size.

    Args:
        batch_size: images that share a forward pass.
        patch_size: of the model, in pixels.
    """

    def __init__(self, batch_size: int, patch_size: int):
        self.batch_size, self.patch_size = batch_size, patch_size
        # groups in the order in which their first images came
        self.waiting: dict[torch.Size, list[tuple[InputImage, Any]]] = {}
        self.first: dict[torch.Size, int] = {}  # number of the first image of a group
        self.added = self.count = self.bytes = 0  # images so far; images that wait, and their memory

    def add(self, image: InputImage, item: Any) -> Iterator[list[tuple[InputImage, Any]]]:
        """
        Take an image, and yield groups that are full, one that has waited for eight batches, and the largest where too many
        images wait.
        """
        shape = item.pixel_values.shape
        self.first.setdefault(shape, self.added)
        self.waiting.setdefault(shape, []).append((image, item))
        self.added, self.count, self.bytes = self.added + 1, self.count + 1, self.bytes + held_bytes(item)
        if len(self.waiting[shape]) == self.batch_size:
            yield from self._take(shape)
        oldest = next(iter(self.waiting), None)
        if oldest is not None and self.added - self.first[oldest] > BATCHES_BEHIND * self.batch_size:
            yield from self._take(oldest)
        while self.count > 4 * self.batch_size or self.bytes > HELD_BYTES:
            yield from self._take(max(self.waiting, key=lambda shape: len(self.waiting[shape])))

    def rest(self) -> Iterator[list[tuple[InputImage, Any]]]:
        """All groups that are left."""
        for shape in list(self.waiting):
            yield from self._take(shape)

    def _take(self, shape: torch.Size) -> Iterator[list[tuple[InputImage, Any]]]:
        group = self.waiting.pop(shape)
        del self.first[shape]
        self.count, self.bytes = self.count - len(group), self.bytes - sum(held_bytes(item) for _, item in group)
        for places in same_size_groups([item for _, item in group], self.patch_size, self.batch_size):
            yield [group[place] for place in places]


class Run:
    """
    One run of [`process_ahead`].

    Attributes:
        summary: how many images were processed so far.
    """

    def __init__(self, work: Work, report: Callable[[str], None] | None, progress: Any):
        self.work, self.report, self.progress = work, report, progress
        self.summary = RunSummary()
        self.writer = ThreadPoolExecutor(1)
        self.pending: deque[tuple[InputImage, Future]] = deque()

    def fail(self, image: InputImage, reason: str) -> None:
        """An image that failed: the progress goes on."""
        self.summary.add_failure(image.source, reason, self.report)
        self.progress.update()
        self.writer.submit(self.work.fail, image, reason).result()

    def compute(self, group: list[tuple[InputImage, Any]], most_pending: int) -> None:
        """Compute a group, one by one where that fails, and hand the results to the thread that writes."""
        try:
            results = self.work.compute([item for _, item in group])
        except Exception as error:
            if len(group) == 1:
                self.fail(group[0][0], str(error) or type(error).__name__)
                return
            for one in group:  # perhaps out of memory together
                self.compute([one], most_pending)
            return
        for (image, item), result in zip(group, results, strict=True):
            self.pending.append((image, self.writer.submit(self.work.write, image, item, result)))
        self.settle(most_pending)

    def left_over(
        self, positions: Iterable[int], images: Sequence[InputImage], is_done: Callable[[InputImage], bool]
    ) -> Iterator[int]:
        """Those of the positions whose images are not done; the others are counted."""
        for position in positions:
            if is_done(images[position]):
                self.summary.skipped += 1
            else:
                yield position

    def settle(self, most: int = 0) -> None:
        """
        Wait until at most `most` images are left to write.

        Raises:
            OSError: the disk is full or read-only.
        """
        while len(self.pending) > most:
            image, future = self.pending.popleft()
            try:
                future.result()
            except Exception as error:
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                    raise
                self.fail(image, str(error) or type(error).__name__)
            else:
                self.summary.done += 1
                self.progress.update()


def process_ahead(
    images: Sequence[InputImage],
    work: Work,
    is_done: Callable[[InputImage], bool] = lambda image: False,
    report: Callable[[str], None] | None = None,
    problems: Sequence[tuple[str, str]] = (),
    progress_bar: bool = True,
    workers: int | None = None,
    batch_size: int = 8,
    units: Sequence[Iterable[int]] | None = None,
    processes: Processes = ALONE,
) -> RunSummary:
    """
    Process every image, with a progress bar for several; an image that fails is reported and the others go on. Results come
    in no fixed order. Memory is bounded, whatever the number of images.

    Args:
        images: the images.
        work: what is done with each.
        is_done, report, problems: as in [`~spar_hf.utils.image_files.process_images`].
        progress_bar: whether the first of the processes shows progress.
        workers: processes that read; 0 reads in this one. Default: [`default_workers`].
        batch_size: images of one size that share a forward pass at most.
        units: positions of images that one process takes together. Default: `batch_size` images each.
        processes: those that share the images, see [`Processes.hand_out`]. Each calls this with the same images and units.

    Returns:
        [`RunSummary`] of this process. Ctrl-C ends the run early, inside [`~spar_hf.utils.image_files.interruptible`]
        SIGTERM too; what was computed is written.

    Raises:
        OSError: the disk is full or read-only, or a process that reads was killed.
    """
    start, units = time.perf_counter(), in_units(len(images), batch_size) if units is None else units
    count = sum(len(list(unit)) for unit in units)
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; in a log file a line every half minute is enough
    shown = progress_bar and processes.index == 0 and count > 1
    todo: Iterable[int]
    if processes.count == 1:
        todo = [position for unit in units for position in unit if not is_done(images[position])]
        skipped, total = count - len(todo), len(todo)
    else:  # how many there are is known at the end
        todo, skipped, total = processes.hand_out(units), 0, None
    workers = default_workers(count if total is None else total) if workers is None else workers
    with tqdm(total=total, unit="image", disable=not shown, mininterval=interval, file=sys.stderr) as progress:
        run = Run(work, report, progress)
        run.summary.skipped = skipped
        for source, reason in problems:
            run.summary.add_failure(source, reason, report)
        buckets = Buckets(batch_size, work.patch_size)
        if total is None:
            todo = run.left_over(todo, images, is_done)
        try:
            for position, item in read_in_order(images, todo, work.read, workers, batch_size):
                if isinstance(item, Unread):
                    run.fail(images[position], item.reason)
                    continue
                run.summary.only_first = run.summary.only_first or item.only_first
                for group in buckets.add(images[position], item):
                    run.compute(group, 2 * batch_size)
            for group in buckets.rest():
                run.compute(group, 2 * batch_size)
            run.settle()
        except KeyboardInterrupt as stop:
            run.summary.signal = getattr(stop, "number", signal.SIGINT)
            run.settle()
        finally:
            run.writer.shutdown(cancel_futures=True)
    run.summary.seconds = time.perf_counter() - start
    return run.summary


def read_in_order(
    images: Sequence[InputImage],
    todo: Iterable[int],
    read: Callable[[InputImage], Any],
    workers: int,
    batch_size: int,
) -> Iterator[tuple[int, Any]]:
    """
    The positions in `todo`, which are asked for as workers become free, and what `read` returns of each image, or
    [`Unread`]. The workers together are at least `batch_size` images ahead.

    Raises:
        OSError: a worker was killed.
    """
    options: dict[str, Any] = {"sampler": todo, "batch_size": None, "collate_fn": as_it_is, "num_workers": workers}
    if workers:
        ahead = max(PREFETCH, -(-batch_size // workers))
        options |= {"prefetch_factor": ahead, "worker_init_fn": leave_signals_to_the_main_process}
    try:
        yield from DataLoader(Images(images, read), **options)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            errno.ECHILD,
            "A process that reads images was killed, perhaps for want of memory or of shared memory (/dev/shm). Use fewer "
            "--workers; 0 reads in the main process",
        ) from error
