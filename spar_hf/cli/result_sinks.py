"""Where `spar-hf segment` puts its results: files of each image, or WebDataset shards with many images each."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spar_hf.cli.reporting import report_failure, say
from spar_hf.cli.result_files import merge_coco, write_results
from spar_hf.cli.result_paths import FORMATS, MERGED, ResultPlan
from spar_hf.cli.result_record import ResultRecord
from spar_hf.cli.segment_options import SegmentOptions
from spar_hf.utils.atomic import write_text
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, RunSummary
from spar_hf.utils.processes import Processes, in_units
from spar_hf.utils.result_records import record_files
from spar_hf.utils.texts import json_text, read_text, storable

CLASSES = "classes.txt"  # the line number, from 0, is the pixel value in label maps
ENDINGS = {"overlay": "overlay.png", "map": "png", "coco": "coco.json", "json": "json"}  # in shards


class FileSink:
    """
    Files of each image in a folder, with a record of their settings, or beside a file that `--output` names.

    Args:
        options: of the command.
        plan: the images, and the files of each.
        settings: what the results depend on beside the image.
        class_names: labels in the order of their numbers.
        processes: that share the work.
        heat_classes: classes to draw heat maps of; those with pixels by default.

    Attributes:
        images: those of this job, or all.
        units: positions among them of the images of this job that one process takes together.

    Raises:
        UsageError: a continued run finds results for other classes, of other settings or another model.
    """

    def __init__(
        self,
        options: SegmentOptions,
        plan: ResultPlan,
        settings: Mapping[str, Any],
        class_names: Sequence[str],
        processes: Processes,
        heat_classes: Sequence[int] | None = None,
    ):
        self.options, self.plan, self.heat_classes, self.processes = options, plan, heat_classes, processes
        self.images: Sequence[InputImage] = options.job.pick(plan.images)
        self.units = in_units(len(self.images), options.batch_size)
        self.record = self._open_record(settings)
        self.done: set[InputImage] = set()
        if options.skip_existing and self.record is not None:  # other settings are refused before anything is written
            share = processes.share(self.images)
            self.done = {item for item in share if self.record.is_done(item, self._files(item))}
            if self.record.trusted:
                say(
                    f"note: {self.record.trusted} results in {self.record.folder} are of a version that kept no record of "
                    "its settings; they are kept unchecked.",
                    err=True,
                )
        if plan.folder is not None:
            if options.skip_existing:
                check_class_list(plan.folder / CLASSES, class_names)
            else:
                check_own_class_list(plan.folder / CLASSES, class_names)
                self._check_maps_left(plan.folder / CLASSES, class_names)
            processes.wait()  # nothing is written before all have looked
            write_text(plan.folder / CLASSES, class_list(class_names))

    def _files(self, item: InputImage) -> list[Path]:
        return list(self.plan.paths[item].values())

    def _open_record(self, settings: Mapping[str, Any]) -> ResultRecord | None:
        """A single file has a record beside it only with `--skip-existing`, which needs to know how the file was made."""
        plan = self.plan
        if plan.folder is None and not self.options.skip_existing:
            return None
        folder = self._files(plan.images[0])[0].parent if plan.folder is None else plan.folder
        names = [self.options.job.name, f"process-{self.processes.index}" if self.processes.count > 1 else ""]
        trusted = plan.folder is not None
        return ResultRecord(folder, settings, trust_unknown=trusted, job="-".join(filter(None, names)))

    def _check_maps_left(self, path: Path, names: Sequence[str]) -> None:
        """
        Raises:
            UsageError: label maps of other classes would stay beside the new list of classes.
        """
        if self.record is None or not lists_others(path, names):
            return
        listed = read_text(path).splitlines()
        if listed == list(names[: len(listed)]):  # a background came behind them: the numbers still say the same
            return
        written = {file for files in self.plan.paths.values() for file in files.values()}
        maps = (self.record.folder / name for name in self.record.files if name.endswith(FORMATS["map"]))
        if left := sorted(str(file) for file in maps if file not in written and file.is_file()):
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UsageError(
                f"{path} would list other classes than those that the numbers in {left[0]}{more} mean, which this run does "
                "not replace. Name another --output, or remove them."
            )

    def is_done(self, item: InputImage) -> bool:
        """Whether an image has its results already."""
        if item in self.done or self.processes.count == 1 or self.record is None or not self.options.skip_existing:
            return item in self.done
        return self.record.is_done(item, self._files(item))  # another process looked at it at the start

    def write(self, item: InputImage, image: Any, result: Mapping[str, Any]) -> None:
        """Write the pipeline's `output="map"` of an image."""
        write_results(image, result, self.plan.paths[item], item, self.options.keep_background, self.heat_classes)
        if self.record is not None:
            self.record.add(item, self._files(item))

    def fail(self, item: InputImage, reason: str) -> None:
        """An image that failed has no results."""

    def close(self) -> None:
        """Every file is complete when it is written."""

    def count_earlier_failures(self, summary: RunSummary) -> None:
        """An image that failed has no results, so that it is tried again."""

    def finish(self) -> None:
        """
        Write the COCO file of all images, which all processes have written. Files of other settings, which an image that
        failed has from an earlier run, are left out.
        """
        folder, record = self.plan.folder, self.record
        if self.processes.index == 0 and folder is not None and record is not None and "coco" in self.plan.formats:
            record.read()
            files = [paths["coco"] for paths in self.plan.paths.values()]
            parts = [file for file in files if file.is_file() and record.is_current(file)]
            write_text(folder / MERGED, json_text(merge_coco(parts)))


class ShardSink:
    """
    WebDataset shards: `KEY.png` (class numbers), `KEY.json`, `KEY.overlay.png` and `KEY.coco.json`, as far as they are asked
    for. Arguments and errors as of [`FileSink`].
    """

    def __init__(
        self,
        options: SegmentOptions,
        plan: ResultPlan,
        settings: Mapping[str, Any],
        class_names: Sequence[str],
        processes: Processes,
        heat_classes: Sequence[int] | None = None,
    ):
        from spar_hf.batch.tar_files import TarFolder, tar_masks

        self.options, self.plan = options, plan
        self.folder = TarFolder(options.output)
        processes.wait()  # all have seen what is there before one writes
        given = {**settings, "formats": sorted(plan.formats)}
        self.folder.begin(given, [image.name for image in plan.images], options.shard_images, options.skip_existing)
        self.writer = tar_masks(self.folder, plan.images)
        self.images: Sequence[InputImage] = plan.images
        self.units = [self.folder.images_of(part) for part in options.job.pick(range(self.folder.count))]
        self.folder.write(CLASSES, class_list(class_names).encode())

    def is_done(self, item: InputImage) -> bool:
        return self.writer.is_done(item)

    def write(self, item: InputImage, image: Any, result: Mapping[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            files = {name: Path(temporary, f"image{FORMATS[name]}") for name in self.plan.formats}
            named = replace(item, source=storable(item.source))  # readers of the shards take UTF-8 only
            write_results(image, result, files, named, self.options.keep_background)
            members = {ENDINGS[name]: path.read_bytes() for name, path in files.items()}
        self.writer.add(item, {"members": members, "error": ""})

    def fail(self, item: InputImage, reason: str) -> None:
        self.writer.add(item, {"error": reason})

    def close(self) -> None:
        """Drop shards that are not complete."""
        self.writer.close()

    def count_earlier_failures(self, summary: RunSummary) -> None:
        self.writer.count_earlier_failures(summary, report_failure)

    def finish(self) -> None:
        """Every shard is complete when it is written."""


def class_list(names: Sequence[str]) -> str:
    """The text of `classes.txt`."""
    return "".join(f"{name}\n" for name in names)


def lists_others(path: Path, names: Sequence[str]) -> bool:
    """Whether a `classes.txt` is there and lists other classes."""
    return path.is_file() and read_text(path).split("\n") != [*names, ""]


def check_own_class_list(path: Path, names: Sequence[str]) -> None:
    """
    Raises:
        UsageError: the file says something else, and nothing beside it is of this command.
    """
    if not record_files(path.parent) and lists_others(path, names):
        raise UsageError(
            f"{path} would be replaced by the list of the classes, and it is not of this command. Name another --output."
        )


def check_class_list(path: Path, names: Sequence[str]) -> None:
    """
    Raises:
        UsageError: the folder contains results for other classes.
    """
    if lists_others(path, names):
        raise UsageError(
            f"{path.parent} contains results for other classes ({path.name}). Name another --output, or omit "
            "--skip-existing to replace all results."
        )
