"""`spar-hf verify`: what is missing or damaged in a folder of results, and what jobs of an array leave to do at the end."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from spar_hf.cli.parts import open_parts, part_suffix
from spar_hf.cli.reporting import exit_on_error, say
from spar_hf.cli.result_paths import FORMATS, MERGED
from spar_hf.cli.result_record import ResultRecord, describe_differences
from spar_hf.utils.atomic import is_temporary, write_text
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.folders import Folder
from spar_hf.utils.image_files import find_images
from spar_hf.utils.remote_files import is_remote
from spar_hf.utils.result_records import record_files
from spar_hf.utils.texts import json_text, storable

OF_IMAGES = (
    "image",
    "original_size",
    "working_size",
    "stamp",
    "photos",
    "round",
    "format",
)  # metadata beside settings
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
        others: names of whole files that were made with other settings than the latest, with what differs.
        failed: images that could not be processed, with the reason; their results are complete.
        listed: whether it is known which should be there.
    """

    kind: str
    unit: str
    whole: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)
    listed: bool = True

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, damaged or of other settings."""
        return not self.missing and not self.damaged and not self.others


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
        checkers = checkers_of(folder)
    complete = True
    for checker in checkers:
        with exit_on_error():
            findings = checker.check(names)
        show(findings)
        complete = complete and findings.complete
        if delete_damaged:
            with exit_on_error():
                checker.delete(findings.damaged)
            say(f"{len(findings.damaged)} damaged files removed")
        if finish and findings.complete and findings.listed:
            with exit_on_error():
                say(checker.merge())
        elif finish:
            todo = "name the images to say what should be there" if findings.complete else "see above"
            say(f"not finished: {todo}", err=True)
    raise typer.Exit(0 if complete else 1)


def show(findings: Findings) -> None:
    """Print what was found, the first names of each kind."""
    parts = [f"{findings.whole} {findings.unit} are whole"]
    parts += [f"{len(findings.missing)} missing"] if findings.missing else []
    parts += [f"{len(findings.damaged)} damaged"] if findings.damaged else []
    parts += [f"{len(findings.others)} of other settings than the latest"] if findings.others else []
    parts += [f"{len(findings.failed)} of their images could not be processed"] if findings.failed else []
    say(f"{findings.kind}: {', '.join(parts)}")
    if not findings.listed:
        say("note: which images there should be is not known; name them to find missing ones.", err=True)
    lines = [f"missing: {name}" for name in findings.missing[:SHOWN]]
    lines += [f"damaged: {name}: {reason}" for name, reason in list(findings.damaged.items())[:SHOWN]]
    lines += [f"other settings: {name}: {what}" for name, what in list(findings.others.items())[:SHOWN]]
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


def checkers_of(folder: str) -> list[Checker]:
    """
    The checkers of a folder by what lies in it: masks and features may share one.

    Raises:
        MissingFiles: no such folder, or no results in it.
    """
    if part_suffix(folder) is None and Folder(folder).size("manifest.json") is not None:
        return [CacheChecker(folder)]
    if is_remote(folder) or part_suffix(folder) is not None:
        return [PartChecker(folder)]
    path = Path(folder)
    checkers: list[Checker] = []
    if path.is_dir() and record_files(path):
        checkers.append(ResultChecker(folder))
    # beside masks there may be safetensors of something else, such as support images
    if path.is_dir() and any(not checkers or holds_features(file) for file in path.rglob("*.safetensors")):
        checkers.append(FeatureChecker(folder))
    if checkers:
        return checkers
    raise MissingFiles(f"{folder} holds no results of features, segment or cache-teacher.")


def holds_features(file: Path) -> bool:
    """Whether `spar-hf features` wrote a file of safetensors; one that is cut says nothing."""
    from spar_hf.batch.features import read_header

    try:
        _, metadata = read_header(file)
    except UsageError:
        return False
    return "working_size" in metadata or "photos" in metadata


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
        made: dict[str, dict[str, Any]] = {}  # settings of each file
        others = (file for file in self.folder.rglob("*.safetensors") if not is_temporary(file))
        for file in shards or sorted(others):
            name = file.relative_to(self.folder).as_posix()
            try:
                keys, metadata = read_header(file)
            except UsageError as error:
                findings.damaged[name] = str(error)
                continue
            made[name] = shared_settings(metadata)
            records = json.loads(metadata.get("photos", "{}"))
            found |= set(records or keys) if shards else {name.removesuffix(".safetensors")}
        findings.whole = len(found)
        findings.missing = [name for name in names or () if storable(name) not in found]
        latest = max(made, key=lambda name: (self.folder / name).stat().st_mtime_ns, default=None)
        for name in made:
            if latest is not None and made[name] != made[latest]:
                findings.others[name] = describe_differences(made[name], made[latest])
        findings.whole -= 0 if shards else len(findings.others)
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
        if key not in OF_IMAGES:
            try:
                settings[key] = value if key in ("model", "fingerprint", "dtype") else json.loads(value)
            except ValueError:
                settings[key] = value
    return settings


class ResultChecker(Checker):
    """
    Results of `segment`: every recorded file is read. An image is whole if it has all formats that any image has, of the
    settings of the latest one. Which frames of a file there should be is not known.
    """

    def __init__(self, folder: str):
        super().__init__(folder)
        self.coco: list[str] = []  # what can be merged

    def check(self, names: list[str] | None) -> Findings:
        findings = Findings("results of segment", "images", listed=names is not None)
        record, known = ResultRecord(self.folder, {}), None if names is None else frozenset(names)
        found: dict[str, dict[str, dict[str, Any]]] = {}  # image or frame -> format -> its entry
        for file, entry in record.files.items():
            image, result, format_name = self._result(file, entry, known)
            if known is None or image in known:
                found.setdefault(result, {})[format_name] = {**entry, "file": file, "image": image}
        formats = [name for name in FORMATS if any(name in results for results in found.values())]
        newest = {
            name: max((results[name] for results in found.values() if name in results), key=lambda e: e.get("time", 0))
            for name in formats
        }
        for result, results in sorted(found.items()):
            reasons = {name: self._problem(results[name]["file"]) if name in results else "gone" for name in formats}
            findings.missing += [f"{result}{FORMATS[name]}" for name, reason in reasons.items() if reason == "gone"]
            broken = {results[name]["file"]: reason for name, reason in reasons.items() if reason not in ("", "gone")}
            others = {
                entry["file"]: record.differences(entry["settings"], newest[name]["settings"])
                for name, entry in results.items()
                if entry["settings"] != newest[name]["settings"] and not reasons[name]
            }
            findings.damaged |= broken
            findings.others |= others
            findings.whole += not any(reasons.values()) and not others
            self.coco += [results["coco"]["file"]] if "coco" in results else []
        there = {entry["image"] for results in found.values() for entry in results.values()}
        findings.missing += [name for name in names or () if name not in there]
        return findings

    def _result(self, file: str, entry: dict[str, Any], known: frozenset[str] | None) -> tuple[str, str, str]:
        """The image that a file is a result of, the same with its frame, and the format."""
        stems = {name: file.removesuffix(end) for name, end in FORMATS.items() if file.endswith(end)}
        frame = f"-{entry['frame']:04}" if "frame" in entry else ""
        images = {name: stem.removesuffix(frame) for name, stem in stems.items()}  # clip-0003.png is a result of clip
        # p.map.png is the map of p, or the overlay of an image called p.map
        fitting = [name for name in stems if images[name] in (known or ())] or sorted(
            stems, key=lambda n: len(stems[n])
        )
        if not fitting:  # one that --output named
            return file, file, "overlay"
        return images[fitting[0]], stems[fitting[0]], fitting[0]

    def _problem(self, file: str) -> str:
        from PIL import Image

        path = self.folder / file
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

        if not self.coco:
            return "nothing to merge: there are no COCO files"
        parts = [self.folder / file for file in sorted(self.coco)]
        write_text(self.folder / MERGED, json_text(merge_coco(parts)))
        return f"{MERGED} written, of {len(parts)} images"


class CacheChecker(Checker):
    """A teacher cache: the checksum of every shard is compared."""

    def __init__(self, folder: str):
        super().__init__(folder)
        self.files = Folder(folder)

    def check(self, names: list[str] | None) -> Findings:
        from spar_hf.distillation.cache_teacher import verify_shards

        whole, missing, damaged = verify_shards(self.files)
        skipped = [(entry["image"], entry["reason"]) for shard in whole for entry in shard["skipped"]]
        return Findings("teacher cache", "shards", len(whole), missing, damaged, failed=skipped)

    def merge(self) -> str:
        from spar_hf.distillation.cache_teacher import verify_shards, write_manifest
        from spar_hf.distillation.teacher_cache import read_manifest

        count = len(verify_shards(self.files)[0])
        write_manifest(self.files, read_manifest(self.files.url)["setting"], count)
        return "manifest written: the cache is complete"

    def delete(self, damaged: Iterable[str]) -> None:
        for name in damaged:
            self.files.delete(name)
