"""
Results of many images in a folder of files with a fixed number of images each, locally or in a store (`s3://`, …): what
Parquet and WebDataset shards share.

Which images a file holds follows from the list of images alone, so that any job can make any file, and a file that exists
needs not be made again. Files are written under a temporary name and appear when they are complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spar_hf.batch.ahead import Work
from spar_hf.batch.callables import SparFeatures
from spar_hf.batch.extractor import PreparedImage
from spar_hf.batch.features import ReadSource
from spar_hf.utils.errors import UsageError
from spar_hf.utils.folders import Folder
from spar_hf.utils.image_files import InputImage, RunSummary, stamp
from spar_hf.utils.locks import acquire, lock, read_owner
from spar_hf.utils.texts import json_text, storable

MANIFEST = "_spar-hf.json"  # readers of Parquet folders (Arrow, pandas, Spark) pass over names with _ in front
OLD_MANIFEST = "spar-hf.json"  # its name before, which made them fail; still read
PARTIAL, LOCK = ".partial-", "lock"  # folders of files that are being written, and a file in each
own_folders: set[str] = set()  # of this process


def stated_names(names: Sequence[str]) -> dict[str, Any]:
    """What a manifest states of the names of all images, in their order: number and hash."""
    digest = hashlib.sha256("\n".join(map(storable, names)).encode()).hexdigest()
    return {"images": len(names), "names": digest}


class PartFolder(Folder):
    """
    A folder of files `part-00000`, …: the N-th holds the images from N × `shard_images` on. `_spar-hf.json` states settings
    and images.

    Args:
        url: folder or URL of one.

    Attributes:
        manifest: `settings`, number of `images`, `shard_images` and a hash of the `names`; empty before the first run.
        suffix: of the files.
        kind: what the files are, for messages.
    """

    suffix: str
    kind: str

    def __init__(self, url: str | os.PathLike):
        super().__init__(url)
        self.manifest: dict[str, Any] = {}
        for name in (OLD_MANIFEST, MANIFEST):
            if self.size(name) is not None:
                self.manifest = json.loads(self.read(name))

    def file(self, number: int) -> str:
        """Name of a file."""
        return f"part-{number:05d}{self.suffix}"

    @property
    def count(self) -> int:
        """Number of files when all are there."""
        return -(-self.manifest["images"] // self.manifest["shard_images"])

    def images_of(self, number: int) -> range:
        """The numbers of the images in a file."""
        size = self.manifest["shard_images"]
        return range(number * size, min((number + 1) * size, self.manifest["images"]))

    def begin(self, settings: Mapping[str, Any], names: Sequence[str], shard_images: int, may_exist: bool) -> None:
        """
        State what is written, or compare it with what was stated when this object was made.

        Args:
            settings: all that the results depend on beside the images.
            names: of all images, in their order.
            shard_images: images in a file.
            may_exist: whether the files of an earlier run or another job are kept.

        Raises:
            UsageError: the folder holds files of another run, of other settings or other images.
        """
        stated = {"settings": settings, "shard_images": shard_images, **stated_names(names)}
        stated = json.loads(json_text(stated))
        if self.manifest and not may_exist:
            raise UsageError(
                f"{self.url} has results of an earlier run. Use --skip-existing to continue it, or name another folder."
            )
        if self.manifest and self.manifest != stated:
            then, now = ({**one["settings"], **one, "settings": ""} for one in (self.manifest, stated))
            differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
            said = "; ".join(f"{name} {str(then.get(name))[:80]}, now {str(now.get(name))[:80]}" for name in differing)
            raise UsageError(f"{self.url} holds results of other images or settings ({said}). Name another folder.")
        self.manifest = stated
        self.write(MANIFEST, json_text(stated, indent=1).encode())
        with contextlib.suppress(FileNotFoundError):  # another job was faster
            self.delete(OLD_MANIFEST)

    def check_names(self, names: Sequence[str]) -> None:
        """
        Compare the names of images, in their order, with what was stated.

        Raises:
            UsageError: the folder was made of other images.
        """
        if any(self.manifest[key] != value for key, value in stated_names(names).items()):
            raise UsageError(
                f"{self.url} was made of {self.manifest['images']} images, other than the {len(names)} named. Name those of "
                "its run, or none to check what is there; for other images make a new folder."
            )

    def files(self) -> list[str]:
        """Names of the files that are there."""
        return [name for name in self.names() if name.endswith(self.suffix) and not name.startswith(".")]

    def finished(self, number: int) -> list[tuple[str, str]] | None:
        """
        Name and error of each image of a complete file that failed; `None` for a file that is cut or not there. What says so
        is read once: in a store each read takes long. Features and masks are not read.
        """
        raise NotImplementedError

    def check(self, name: str) -> tuple[list[int], list[tuple[str, str]]]:
        """
        Read all of a file.

        Returns:
            The numbers of its images; name and error of each that failed.

        Raises:
            ValueError: it is damaged.
        """
        raise NotImplementedError

    def retry_name(self, name: str) -> str:
        """What to remove of a file so that the next run makes it again."""
        return name

    def finish(self, part: "OpenPart", number: int) -> None:
        """Make a file whose rows have all been added one of the folder."""
        self.put(part.complete(), self.file(number))


class OpenPart:
    """
    A file that is being written, in a folder of its own below `beside`, or of the system for `None`. The folder is locked
    while its process lives, see [`drop_abandoned`].

    Attributes:
        rows: number of those added.
    """

    suffix: str

    def __init__(self, beside: Path | None):
        self.folder = tempfile.TemporaryDirectory(prefix=PARTIAL, dir=beside)
        own_folders.add(os.path.abspath(self.folder.name))
        self.lock: int | None = acquire(Path(self.folder.name, LOCK), self.folder.name)
        self.path, self.rows = Path(self.folder.name, f"part{self.suffix}"), 0

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, or keep it for a while."""
        raise NotImplementedError

    def complete(self) -> Path:
        """Write what is left, and close the file."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""
        raise NotImplementedError

    def drop(self) -> None:
        """Remove what is left of it."""
        with contextlib.suppress(OSError, ValueError):
            self.close()
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
            own_folders.discard(os.path.abspath(self.folder.name))
        self.folder.cleanup()


def drop_abandoned(folder: Path) -> None:
    """Remove files that killed processes have left half written."""
    for left in folder.glob(f"{PARTIAL}*/{LOCK}"):
        with contextlib.suppress(OSError):  # another process was faster
            if os.path.abspath(left.parent) in own_folders:  # opening its lock would release it
                continue
            file = os.open(left, os.O_RDWR)
            try:
                if lock(file, read_owner(file)):
                    shutil.rmtree(left.parent)
            finally:
                os.close(file)


class PartWriter:
    """
    Writes rows to the files of a folder. A file appears when all its rows have been added, in any order; one that lacks rows
    at the end is dropped, and made by the next run.

    Args:
        folder: that [`PartFolder.begin`] was called on.
        open_part: starts a file, see [`OpenPart`].
        images: all images of the folder, also those of other jobs.
    """

    def __init__(self, folder: PartFolder, open_part: Callable[[Path | None], OpenPart], images: Sequence[InputImage]):
        self.folder, self.open_part = folder, open_part
        if not folder.is_remote:
            drop_abandoned(Path(folder.url))
        self.numbers = {image: number for number, image in enumerate(images)}
        self.there = {
            name.split(".")[0] for name in folder.names()
        }  # a store is not asked for each file that is missing
        self.done: dict[int, bool] = {}
        self.failed_before: list[tuple[str, str]] = []
        self.open: dict[int, OpenPart] = {}

    def is_done(self, image: InputImage) -> bool:
        """Whether the file of an image is there. It is compared with its images when it is made, not later."""
        number = self.numbers[image] // self.folder.manifest["shard_images"]
        if number not in self.done:
            name = self.folder.file(number)
            failed = self.folder.finished(number) if name.split(".")[0] in self.there else None
            self.done[number] = failed is not None
            hint = f"(in an earlier run; remove {self.folder.retry_name(name)} to try it again)"
            self.failed_before += [(image, f"{reason} {hint}") for image, reason in failed or ()]
        return self.done[number]

    def count_earlier_failures(self, summary: RunSummary, report: Callable[[str], None]) -> None:
        """
        Count and report the images that failed in an earlier run and were passed over with their files, so that a run whose
        images are not all there never ends as a success.
        """
        summary.skipped -= len(self.failed_before)
        for source, reason in self.failed_before:
            summary.add_failure(source, reason, report)

    def add(self, image: InputImage, row: Mapping[str, Any]) -> None:
        """Write the row of an image, one that failed too: its `error` says why."""
        identity = self.numbers[image]
        number = identity // self.folder.manifest["shard_images"]
        if number not in self.open:
            self.open[number] = self.open_part(None if self.folder.is_remote else Path(self.folder.url))
        part = self.open[number]
        own = {"id": identity, "image": storable(image.name), "source": storable(image.source)}
        part.add({**own, "stamp": json.dumps(stamp(image)), **row})
        part.rows += 1
        if part.rows == len(self.folder.images_of(number)):
            del self.open[number]
            self.folder.finish(part, number)
            part.drop()

    def close(self) -> None:
        """Drop what is not complete."""
        for part in self.open.values():
            part.drop()
        self.open = {}


def open_features_for(
    folder: PartFolder, images: Sequence[InputImage], shard_images: int, may_exist: bool, options: Mapping[str, Any]
) -> SparFeatures:
    """
    Load the model, and open the folder for its features.

    Args:
        folder: to write.
        images: all images, also those of other jobs.
        shard_images, may_exist: see [`PartFolder.begin`].
        options: of [`FeatureExtractor`].

    Raises:
        ValueError: what [`FeatureExtractor`] and [`PartFolder.begin`] refuse.
    """
    options = dict(options)
    edge = options.pop("shortest_edge", None)
    features = SparFeatures(**options, size=None if edge is None else {"shortest_edge": edge})
    features.start()
    folder.begin(features.settings, [image.name for image in images], shard_images, may_exist)
    return features


def part_work(features: SparFeatures, writer: PartWriter) -> Work:
    """What [`process_ahead`] does to write rows of features: an image that failed is a row too."""

    def write(image: InputImage, prepared: PreparedImage, row: dict[str, Any]) -> None:
        writer.add(image, {**row, "error": ""})

    def fail(image: InputImage, reason: str) -> None:
        writer.add(image, {**features.error_values, "error": reason})

    return Work(ReadSource(features.loaded.prepare), features.encode, write, features.patch_size, fail)
