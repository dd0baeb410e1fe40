"""`spar-hf segment --tile` with a label map as output: images larger than memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer

from spar_hf.cli.reporting import exit_on_error, say, work_bar
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage, check_inputs_kept, find_images

MAP_SUFFIXES = (".tif", ".tiff", ".npy")  # as in `spar_hf.batch.huge_images`, which imports torch


def writes_strips(output: Path) -> bool:
    """Whether an output is a label map that is written strip by strip."""
    return output.suffix.lower() in MAP_SUFFIXES and not output.is_dir()


def parse_tile(tile: int | None, overlap: int | None) -> dict[str, int] | None:
    """
    The pipeline's `tile` from the two options.

    Raises:
        UsageError: an overlap without tiles.

    Example:

    ```python
    >>> parse_tile(1536, None), parse_tile(1536, 256)
    ({'size': 1536}, {'size': 1536, 'overlap': 256})
    ```"""
    if tile is None and overlap is not None:
        raise UsageError("--tile-overlap needs --tile, the size of the tiles.")
    if tile is None:
        return None
    return {"size": tile} if overlap is None else {"size": tile, "overlap": overlap}


def check_strip_options(tile: dict[str, int] | None, output: Path, options: Mapping[str, Any]) -> None:
    """
    Refuse options that need an image in memory.

    Raises:
        UsageError: one of `options` is given, or there is no `tile`.
    """
    if tile is None:
        raise UsageError(f"--output {output} is a label map that is written in strips: add --tile, such as --tile 768.")
    if given := [name for name, value in options.items() if value]:
        raise UsageError(
            f"--output {output} is a label map that is written in strips: leave out {', '.join(given)}, or name a PNG."
        )


def the_only_image(arguments: Sequence[str], output: Path) -> InputImage:
    """
    Raises:
        UsageError: several images, or the output is the image.
        OSError: no image.
    """
    images, problems = find_images(arguments)
    if problems:
        raise OSError(problems[0][1])
    if len(images) != 1:
        raise UsageError(f"--output {output} is the label map of one image, not of {len(images)}.")
    check_inputs_kept([output], images)
    return images[0]


def segment_to_map(
    arguments: Sequence[str], labels: str, output: Path, model: str | None, device: str | None, options: dict[str, Any]
) -> NoReturn:
    """
    Segment one image of any size, with a progress bar, print what was found, and exit.

    Args:
        arguments, labels, output, model, device: as given to the command.
        options: of [`segment_huge`], and `support`; `background` as given to the command.
    """
    from PIL import Image

    from spar_hf import SPAR_TINY, SparImageProcessorPil
    from spar_hf.batch.huge_images import open_windows, segment_huge
    from spar_hf.batch.tiff_files import import_tifffile
    from spar_hf.cli.overlays import palette
    from spar_hf.cli.pipelines import load_pipeline, quiet_loading
    from spar_hf.cli.segment import show_counts
    from spar_hf.utils.labels import parse_background, read_labels, single_class_hint

    with exit_on_error(usage=(ValueError, ImportError, OSError)):
        vocabulary = read_labels(labels)
        if output.suffix.lower() != ".npy":
            import_tifffile()
    given = {name: value for name, value in options.items() if value is not None}
    support = given.pop("support", None)
    with exit_on_error():
        rules = bool(options.get("threshold") or options.get("min_area"))
        given["background"] = parse_background(options["background"], vocabulary, rules)
    reading: dict[str, Any] = {name: given.pop(name) for name in ("image_range", "max_pixels") if name in given}
    with exit_on_error(usage=(UsageError, ImportError), failure=(ValueError, OSError)):
        image = the_only_image(arguments, output)
    with exit_on_error(), quiet_loading():
        of_model = SparImageProcessorPil.from_backbone(SPAR_TINY if model is None else model).image_range
    with exit_on_error(usage=(UsageError, ImportError), failure=(ValueError, OSError)):
        open_windows(image.source, **{"image_range": of_model, **reading})  # reported before the weights are loaded
    with exit_on_error():
        pipe = load_pipeline(model, device, support=support)
    with exit_on_error(failure=()):  # and wrong words or options before the first tile
        pipe(Image.new("RGB", (32, 32)), candidate_labels=vocabulary, output="map", **given)
    if hint := single_class_hint(labels, vocabulary):
        say(f"note: {hint}", err=True)
    with exit_on_error(usage=(), failure=(ValueError, OSError, RuntimeError)), work_bar("tile", "label map") as bar:

        def progress(done: int, tiles: int) -> None:
            bar.total = tiles
            bar.update(done - bar.n)

        options = {**given, **reading, "colours": palette, "progress": progress}
        found = segment_huge(pipe, image.source, output, vocabulary, **options)
    show_counts(found.labels, found.pixels, found.scores, found.background)
    say(f"written: {output}")
    raise typer.Exit(0)
