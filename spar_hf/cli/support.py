"""`spar-hf support`: annotated images as a file for `spar-hf segment --support`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from tqdm.auto import tqdm

from spar_hf.cli.arguments import Device, MaxTokens, Model, ShortestEdge
from spar_hf.cli.reporting import exit_on_error, fail, say
from spar_hf.model.words import Vocabulary, normalise_name
from spar_hf.utils.errors import PATH_ERRORS, UsageError
from spar_hf.utils.image_files import check_distinct_masks, turned_image_hint
from spar_hf.utils.image_listing import images_under
from spar_hf.utils.options import HELP
from spar_hf.utils.texts import read_text

IGNORED = 255  # value of pixels that belong to no class


def support(
    folder: Annotated[
        str,
        typer.Argument(
            help="Folder with images/, masks/ (PNG of class numbers, of the same stem; 255 is ignored) and classes.txt."
        ),
    ],
    output: Annotated[Path, typer.Option(help="File to write: NAME.safetensors.")],
    labels: Annotated[
        str | None, typer.Option(help='Classes of classes.txt to take, separated by ";". Default: all.')
    ] = None,
    images_per_class: Annotated[
        int | None, typer.Option(help="At most so many images of a class, the first ones by name.", min=1)
    ] = None,
    model: Model = None,
    shortest_edge: ShortestEdge = None,
    device: Device = None,
    max_tokens: MaxTokens = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=HELP["overwrite"])] = False,
) -> None:
    """
    Write the features of annotated images to a file that corrects what words mean: `spar-hf segment --support`.

    A class called "background" is the background of `--background auto`.
    """
    if output.suffix != ".safetensors":
        fail(f"--output {output} must end in .safetensors.", 2)
    if output.exists() and not overwrite:
        fail(f"{output} exists. Name another file, or give --overwrite.", 2)
    if not output.parent.is_dir():
        fail(f"{output.parent} is no folder. Create it first.", 2)

    from spar_hf.cli.pipelines import load_pipeline
    from spar_hf.model.support import mask_shares

    small = 0
    with exit_on_error(usage=(ValueError, *PATH_ERRORS)):
        pairs, classes = annotated_images(Path(folder))
        most = math.inf if images_per_class is None else images_per_class
        left = dict.fromkeys(wanted_classes(labels, classes), most)
        pipe = load_pipeline(model, device)
        patch_size = pipe.model.config.patch_size
        size = None if shortest_edge is None else {"shortest_edge": shortest_edge}
        for image, mask in tqdm(pairs, desc="images", disable=None):
            values = read_mask(mask, len(classes))
            there = [value for value in np.unique(values).tolist() if left.get(value, 0) > 0]
            if not there:
                continue
            encoded = pipe.encode(str(image), size, max_tokens)
            if hint := turned_image_hint(str(image), encoded.original_size, values.shape):
                raise UsageError(f"{mask} has another size than {image}. {hint}")
            examples = []
            for value in there:
                with as_usage_error(mask):
                    shares = mask_shares(values == value, encoded.original_size, encoded.working_size, patch_size)
                small += not shares.any()
                if shares.any():
                    examples.append((encoded, values == value, classes[value]))
                    left[value] -= 1
            pipe.add_support(examples)  # at once: they are of one image
        pipe.save_support(output)
    for label, count in pipe.support.counts().items():
        say(f"{label:24} {count} image{'s' if count > 1 else ''}")
    if small:
        say(f"note: {small} masks are too small for any patch to see, and were left out.", err=True)
    say(f"written: {output}")


@contextmanager
def as_usage_error(mask: Path) -> Iterator[None]:
    """Name the file of a mask that does not fit its image."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{mask}: {error}") from error


def annotated_images(folder: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """
    Images with their masks, and the label that `segment` gives each line of the classes: the first of its names.

    Raises:
        UsageError: another layout, no image with a mask, two images with one mask, or a class that is listed twice.
    """
    names = folder / "classes.txt"
    if not all((folder / part).is_dir() for part in ("images", "masks")) or not names.is_file():
        raise UsageError(
            f"{folder} must hold images/, masks/ (PNG of the same stem) and classes.txt, a class per line."
        )
    masks = {path.stem: path for path in (folder / "masks").iterdir() if path.suffix.lower() == ".png"}
    images = images_under(folder / "images")
    pairs = [(image, masks[image.stem]) for image in images if image.stem in masks]
    if not pairs:
        raise UsageError(f"No image in {folder / 'images'} has a PNG of the same stem in masks/.")
    check_distinct_masks(pairs)
    classes = read_text(names).splitlines()
    if any(name.lstrip().startswith("#") for name in classes):
        raise UsageError(
            f"{names} holds a line that begins with #, but each line is a value of the masks: leave it out."
        )
    with as_usage_error(names):
        labels = iter(Vocabulary.parse([name for name in classes if name.strip()]).labels)
    return pairs, [next(labels) if name.strip() else "" for name in classes]


def wanted_classes(labels: str | None, classes: list[str]) -> list[int]:
    """
    Numbers of the classes that `--labels` names, of all by default.

    Raises:
        UsageError: one is none of the classes.
    """
    numbers = {normalise_name(name): number for number, name in enumerate(classes) if name.strip()}
    wanted = (
        [] if labels is None else list(Vocabulary.parse([part for part in labels.split(";") if part.strip()]).labels)
    )
    if unknown := [label for label in wanted if normalise_name(label) not in numbers]:
        raise UsageError(f"--labels: {unknown[0]!r} is not in classes.txt: {', '.join(classes[:20])}.")
    return [numbers[normalise_name(label)] for label in wanted] or list(numbers.values())


def read_mask(path: Path, classes: int) -> np.ndarray:
    """
    A mask as class numbers `(height, width)`, turned upright as its photo is.

    Raises:
        UsageError: more than one channel, or a number that is no class.
        ValueError: it cannot be decoded.
    """
    from spar_hf.model.image_input import class_numbers

    image = Image.open(path)
    values = class_numbers(image, str(path))
    if values.ndim != 2:
        raise UsageError(f"{path} has mode {image.mode}; a mask is a PNG of class numbers, with one channel.")
    wrong = [value for value in np.unique(values).tolist() if value >= classes and value != IGNORED]
    if wrong:
        raise UsageError(f"{path} holds the value {wrong[0]}, but classes.txt has {classes} lines, from 0 on.")
    return values
