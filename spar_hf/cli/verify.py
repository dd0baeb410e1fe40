"""`spar-hf verify`: what is missing or damaged in a folder of results, and what jobs of an array leave to do at the end."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from spar_hf.cli.parts import open_parts, part_suffix
from spar_hf.cli.reporting import exit_on_error, say
from spar_hf.cli.result_paths import FORMATS
from spar_hf.cli.result_record import read_entries, record_files
from spar_hf.utils.atomic import is_temporary, write_text
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.folders import Folder
from spar_hf.utils.image_files import find_images
from spar_hf.utils.remote_files import is_remote
from spar_hf.utils.texts import json_text, storable

SHOWN = 20  # names of each kind in the report


@dataclass
class Findings:
    """
    What is in a folder.

    Attributes:
        kind: of its results.
        whole: number of images or shards that are complete.
        unit: what is counted: `images`, `files` or `shards`.
        missing: names of those that are not there.
        damaged: names of files that cannot be read, with the reason.
        failed: images that could not be processed, with the reason; their results are complete.
        listed: whether it is known which should be there.
    """

    kind: str
    unit: str
    whole: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)
    listed: bool = True

    @property
    def complete(self) -> bool:
        """Whether nothing is missing or damaged."""
        return not self.missing and not self.damaged


def verify(
    folder: Annotated[str, typer.Argument(help="Folder that features, segment or cache-teacher wrote.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(help="The images as they were named then. Without them only what is there can be checked."),
    ] = None,
    finish: Annotated[
        bool,
        typer.Option("--finish", help="If nothing is missing: write the index, manifest or COCO file of all jobs."),
    ] = False,
    delete_damaged: Annotated[
        bool, typer.Option("--delete-damaged", help="Remove damaged files, so that the same commands make them anew.")
    ] = False,
) -> None:
    """
    Say what is missing or damaged in a folder of results. Exit status: 0 all there, 1 not all, 2 wrong usage.
    """
    with exit_on_error():
        names = None
        if images:
            found, problems = find_images(images, exclude=folder)
            if problems:
                raise UsageError(problems[0][1])
            names = [image.name for image in found]
        checker = checker_of(folder)
        findings = checker.check(names)
    show(findings)
    if delete_damaged:
        with exit_on_error():
            checker.delete(findings.damaged)
        say(f"{len(findings.damaged)} damaged files removed")
    if finish and findings.complete and findings.listed:
        with exit_on_error():
            say(checker.merge())
    elif finish:
        say(
            "not finished: " + ("name the images to say what should be there" if findings.complete else "see above"),
            err=True,
        )
    raise typer.Exit(0 if findings.complete else 1)


def show(findings: Findings) -> None:
    """Print what was found, the first names of each kind."""
    parts = [f"{findings.whole} {findings.unit} are whole"]
    parts += [f"{len(findings.missing)} missing"] if findings.missing else []
    parts += [f"{len(findings.damaged)} damaged"] if findings.damaged else []
    parts += [f"{len(findings.failed)} of their images could not be processed"] if findings.failed else []
    say(f"{findings.kind}: {', '.join(parts)}")
    if not findings.listed:
        say("note: which images there should be is not known; name them to find missing ones.", err=True)
    lines = [f"missing: {name}" for name in findings.missing[:SHOWN]]
    lines += [f"damaged: {name}: {reason}" for name, reason in list(findings.damaged.items())[:SHOWN]]
    lines += [f"failed: {name}: {reason}" for name, reason in findings.failed[:SHOWN]]
    for line in lines:
        say(" ".join(line.split()))


class Checker:
    """Checks one kind of folder."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def check(self, names: list[str] | None) -> Findings:
        """
        Compare what is there with the names of the images, if they are known.

        Raises:
            UsageError: it is known to be made of other images.
        """
        raise NotImplementedError

    def merge(self) -> str:
        """Write what the last of several jobs should have; returns a line about it."""
        raise NotImplementedError

    def delete(self, damaged: Iterable[str]) -> None:
        """Remove damaged files."""
        for name in damaged:
            (self.folder / name).unlink(missing_ok=True)


def checker_of(folder: str) -> Checker:
    """
    The checker of a folder by what lies in it.

    Raises:
        MissingFiles: no such folder, or no results in it.
    """
    if part_suffix(folder) is None and Folder(folder).size("manifest.json") is not None:
        return CacheChecker(folder)
    if is_remote(folder) or part_suffix(folder) is not None:
        return PartChecker(folder)
    path = Path(folder)
    if path.is_dir() and record_files(path):
        return ResultChecker(folder)
    if path.is_dir() and next(path.rglob("*.safetensors"), None):
        return FeatureChecker(folder)
    raise MissingFiles(f"{folder} holds no results of features, segment or cache-teacher.")


class PartChecker(Checker):
    """Files with many images each: every one is read, with its checksums; every number of an image must be there once."""

    def __init__(self, folder: str):
        super().__init__(folder)
        self.parts = open_parts(folder)
        if not self.parts.manifest:
            raise MissingFiles(f"{folder} holds no {self.parts.kind}.")

    def check(self, names: list[str] | None) -> Findings:
        if names is not None:
            self.parts.check_names(names)
        findings, seen = Findings(self.parts.kind, "images"), set[int]()
        for file in self.parts.files():
            try:
                numbers, failed = self.parts.check(file)
            except ValueError as error:
                findings.damaged[file] = str(error)
                continue
            if twice := seen & set(numbers):
                findings.damaged[file] = f"images {sorted(twice)[:3]} are in another file too."
                continue
            seen |= set(numbers)
            findings.failed += failed
        findings.whole = len(seen)
        gone = sorted(set(range(self.parts.manifest["images"])) - seen)
        findings.missing = [f"image {i} {names[i] if names else ''}".strip() for i in gone]
        return findings

    def merge(self) -> str:
        return "nothing to merge: the folder is one data set"

    def delete(self, damaged: Iterable[str]) -> None:
        for name in damaged:
            self.parts.delete(name)


class FeatureChecker(Checker):
    """Features as safetensors: every file is opened, which finds cut ones."""

    def check(self, names: list[str] | None) -> Findings:
        from spar_hf.batch.features import list_shards, read_header

        findings = Findings("features", "images", listed=names is not None)
        shards, found = list_shards(self.folder), set[str]()
        others = (file for file in self.folder.rglob("*.safetensors") if not is_temporary(file))
        for file in shards or sorted(others):
            name = file.relative_to(self.folder).as_posix()
            try:
                keys, metadata = read_header(file)
            except UsageError as error:
                findings.damaged[name] = str(error)
                continue
            records = json.loads(metadata.get("photos", "{}"))
            found |= set(records or keys) if shards else {name.removesuffix(".safetensors")}
        findings.whole = len(found)
        findings.missing = [name for name in names or () if storable(name) not in found]
        return findings

    def merge(self) -> str:
        from spar_hf.batch.features import ShardWriter, list_shards, read_header

        shards = list_shards(self.folder)
        if not shards:
            return "nothing to merge: every image has a file of its own"
        ShardWriter(self.folder, shared_settings(read_header(shards[0])[1]), shard_bytes=1).write_index()
        return "index written"


def shared_settings(metadata: dict[str, str]) -> dict[str, Any]:
    """The settings in the metadata of a shard: strings that are no JSON are strings."""
    settings: dict[str, Any] = {}
    for key, value in metadata.items():
        if key not in ("photos", "round", "format"):
            try:
                settings[key] = value if key in ("model", "fingerprint", "dtype") else json.loads(value)
            except ValueError:
                settings[key] = value
    return settings


class ResultChecker(Checker):
    """Results of `segment`: every recorded file is read. Which frames of a file there should be is not known."""

    def check(self, names: list[str] | None) -> Findings:
        findings = Findings("results of segment", "images", listed=names is not None)
        entries = [entry for entry in read_entries(record_files(self.folder)) if "files" in entry]
        groups = {tuple(entry["files"]) for entry in entries}
        for files in sorted(groups):
            reasons = {name: self._problem(self.folder / name) for name in files}
            findings.missing += [name for name, reason in reasons.items() if reason == "gone"]
            findings.damaged |= {name: reason for name, reason in reasons.items() if reason not in ("", "gone")}
            findings.whole += not any(reasons.values())
        recorded = {name for files in groups for name in files}
        for entry in entries:
            if "frame" in entry:  # clip-0003.png is a result of clip
                recorded |= {name.replace(f"-{entry['frame']:04}.", ".") for name in entry["files"]}
        for name in names or ():
            if not any(f"{name}{end}" in recorded for end in FORMATS.values()):
                findings.missing.append(name)
        return findings

    def _problem(self, path: Path) -> str:
        from PIL import Image

        if not path.exists():
            return "gone"
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.is_file():
                with Image.open(path) as image:
                    image.load()
        except (OSError, ValueError, SyntaxError) as error:
            return str(error)
        return ""

    def merge(self) -> str:
        from spar_hf.cli.result_files import merge_coco

        parts = sorted(self.folder.rglob("*.coco.json"))
        if not parts:
            return "nothing to merge: there are no COCO files"
        write_text(self.folder / "annotations.json", json_text(merge_coco(parts)))
        return f"annotations.json written, of {len(parts)} images"


class CacheChecker(Checker):
    """A teacher cache: the checksum of every shard is compared."""

    def __init__(self, folder: str):
        super().__init__(folder)
        self.files = Folder(folder)

    def check(self, names: list[str] | None) -> Findings:
        from spar_hf.distillation.cache_teacher import verify_shards

        whole, missing, damaged = verify_shards(self.files)
        skipped = [(entry["image"], entry["reason"]) for shard in whole for entry in shard["skipped"]]
        return Findings("teacher cache", "shards", len(whole), missing, damaged, skipped)

    def merge(self) -> str:
        from spar_hf.distillation.cache_teacher import verify_shards, write_manifest
        from spar_hf.distillation.teacher_cache import read_manifest

        count = len(verify_shards(self.files)[0])
        write_manifest(self.files, read_manifest(self.files.url)["setting"], count)
        return "manifest written: the cache is complete"

    def delete(self, damaged: Iterable[str]) -> None:
        for name in damaged:
            self.files.delete(name)
