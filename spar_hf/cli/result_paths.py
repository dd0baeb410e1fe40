"""Where `spar-hf segment` writes the results of each image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import (
    InputImage,
    check_distinct_targets,
    check_inputs_kept,
    find_images,
    result_path,
)

# suffixes in a folder; heat maps are several pictures, in a folder of their own
FORMATS = {"overlay": ".png", "map": ".map.png", "coco": ".coco.json", "json": ".json", "heatmap": ".heatmaps"}
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of overlays
MERGED = "annotations.json"  # the COCO files of all images as one
# an --output with such a suffix is a file and not a folder; it may then be refused for its format
FILE_SUFFIXES = (*PICTURE_SUFFIXES, ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".json")


@dataclass(frozen=True)
class ResultPlan:
    """
    Images of a run and the files to write for each.

    Attributes:
        images: the images.
        problems: arguments without images, with the reason.
        paths: files of each image by format; empty for shards.
        formats: the formats asked for.
        folder: output folder; `None` if the results of a single image go to a file named by `--output`.
        several: whether the arguments name several images.
    """

    images: list[InputImage]
    problems: list[tuple[str, str]]
    paths: dict[InputImage, dict[str, Path]]
    formats: list[str]
    folder: Path | None
    several: bool


def parse_formats(text: str) -> list[str]:
    """
    Parse the option `--format`.

    Raises:
        UsageError: no format, or an unknown one.

    Example:

    ```python
    >>> parse_formats("overlay, JSON")
    ['overlay', 'json']
    ```"""
    formats = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if not formats or set(formats) - set(FORMATS):
        raise UsageError(f"--format {text!r} must be one or more of {', '.join(FORMATS)}, separated by commas.")
    return formats


def plan_results(
    arguments: Sequence[str],
    output: str | Path,
    formats: list[str],
    map_output: Path | None,
    frames: str | None = None,
    to_shards: bool = False,
) -> ResultPlan:
    """
    Find the images and name the files of their results, before any model is loaded.

    Args:
        arguments: files, folders, patterns and URLs.
        output: file for one image, or folder, of shards also in a store.
        formats: of the results.
        map_output: file for the label map of a single image, as an addition.
        frames: the option `--frames`; by default the first frame of every file, which is not opened here.
        to_shards: whether `output` is a folder of files with many images each: then no image has files of its own.

    Raises:
        UsageError: `output` or `map_output` does not fit the formats or the number of images, two results would have the
            same path, or one would overwrite an input image.
    """
    images, problems = find_images(arguments, exclude=output)
    output = Path(output)
    if frames is not None:
        from spar_hf.cli.frames import choose_frames, parse_frames  # imports torch

        images, unread = choose_frames(images, parse_frames(frames))
        problems = [*problems, *unread]
    several = len(images) + len(problems) > 1
    if to_shards:
        return ResultPlan(images, problems, {}, formats, output, several)
    single_file = not several and not output.is_dir() and output.suffix.lower() in FILE_SUFFIXES
    names_file = output.is_file() or (several and output.suffix.lower() in PICTURE_SUFFIXES and not output.is_dir())
    if images and not single_file and names_file:
        raise UsageError(f"--output {output} names a file, but results of several images need a folder.")
    paths = {}
    for image in images:
        paths[image] = single_file_paths(output, formats) if single_file else folder_paths(image, output, formats)
        if map_output is not None:
            check_map_output(map_output, several, formats, paths[image])
            paths[image]["map"] = map_output
    targets = [(path, image.source) for image, files in paths.items() for path in files.values()]
    if not single_file and "coco" in formats:
        targets.append((output / MERGED, "the COCO file of all images"))
    check_distinct_targets(targets)
    check_inputs_kept([path for path, _ in targets], images)
    return ResultPlan(images, problems, paths, formats, None if single_file else output, several)


def single_file_paths(output: Path, formats: list[str]) -> dict[str, Path]:
    """
    Files of a single image by format: `output` is the first of overlay, map, JSON and COCO that its suffix fits; the others
    lie beside it.

    Raises:
        UsageError: `output` has the wrong suffix.

    Example:

    ```python
    >>> paths = single_file_paths(Path("street.jpg"), ["overlay", "json"])
    >>> {name: str(path) for name, path in paths.items()}
    {'overlay': 'street.jpg', 'json': 'street.json'}
    >>> {name: str(path) for name, path in single_file_paths(Path("street.png"), ["json", "map"]).items()}
    {'json': 'street.json', 'map': 'street.png'}
    ```"""
    if formats == ["heatmap"]:
        raise UsageError(f"--output {output} must be a folder: heat maps are a picture per class.")
    suffixes = {"overlay": PICTURE_SUFFIXES, "map": (".png",), "json": (".json",), "coco": (".json",)}
    named = next((name for name in suffixes if name in formats and output.suffix.lower() in suffixes[name]), None)
    if named is None:
        fitting = dict.fromkeys(suffix for name in suffixes if name in formats for suffix in suffixes[name])
        raise UsageError(f"--output {output} must end in {' or '.join(fitting)} for --format {','.join(formats)}.")
    return {name: output if name == named else output.with_suffix(FORMATS[name]) for name in formats}


def folder_paths(image: InputImage, folder: Path, formats: list[str]) -> dict[str, Path]:
    """Files of an image by format in an output folder."""
    return {name: result_path(folder, image.name, FORMATS[name]) for name in formats}


def check_map_output(map_output: Path, several: bool, formats: list[str], others: dict[str, Path]) -> None:
    """Refuse a `--map` for several images, in a lossy format, beside the map of `--format`, or in the file of a result."""
    if "map" in formats:
        raise UsageError("--map and --format map both name the file of the one label map. Leave one out.")
    if several:
        raise UsageError("--map names the file of one image. For several images use --format overlay,map.")
    if map_output.suffix.lower() != ".png":
        raise UsageError(f"--map {map_output} must end in .png, since lossy formats change class numbers.")
    for name, path in others.items():
        if str(path.resolve()).casefold() == str(map_output.resolve()).casefold():
            raise UsageError(f"--map {map_output} names the file of the {name} of --output. Name another file.")
