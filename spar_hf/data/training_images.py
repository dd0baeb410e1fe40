"""Training images: read, augmented and turned into tensors in the workers of a `DataLoader`."""

import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from spar_hf.data.augmentation import Crop, Views, cover_part, draw_crop, jitter_image, view_generator
from spar_hf.data.order import Sample, SampleList
from spar_hf.model.image_input import ImageRange, open_image, set_pixel_limit, to_rgb, turn_upright
from spar_hf.utils.checkpoints import cut_log
from spar_hf.utils.remote_files import is_remote, read_remote

logger = logging.getLogger(__name__)

MOST_DRAWS = 20  # of another image than the view's own, which a source named many times may be


@dataclass
class LoadedSample:
    """
    A view of an image as input of the model.

    Attributes:
        index, after: those of its [`Sample`].
        pixel_values: `(1, 3, height, width)`, sides multiples of the patch.
        target: feature map of the teacher `(1, dim, height / patch, width / patch)`, if it was computed before.
        teacher_pixel_values: what the teacher reads, `(1, 3, height, width)`; `None` if it reads `pixel_values` too.
        whole_size: width and height of the whole image at the size of the view, in pixels; `None` with a `target`.
    """

    index: int
    pixel_values: torch.Tensor
    after: list[int]
    target: torch.Tensor | None = None
    teacher_pixel_values: torch.Tensor | None = None
    whole_size: tuple[float, float] | None = None


@dataclass
class Skipped:
    """Name of an image that could not be read, and the reason."""

    name: str
    reason: str


class SkippedList:
    """
    `skipped.jsonl`, the list of images that could not be read. All processes of a run append to it; an image is listed once.

    Example:

    ```python
    >>> skipped = SkippedList(Path("skipped.jsonl"))
    >>> skipped.add(Skipped("street.png", "the file is empty"))
    >>> skipped.count()
    1
    ```"""

    def __init__(self, path: Path):
        self.path = path
        self.listed: set[str] = set()

    def start(self, resume: bool) -> None:
        """Delete the list of an earlier run, or drop the line that a killed run left incomplete."""
        if resume:
            cut_log(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def names(self) -> set[str]:
        """Names of the listed images."""
        if not self.path.is_file():
            return set()
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return {row.get("image", row.get("photo")) for row in rows}  # version 0.1 wrote "photo"

    def count(self) -> int:
        """How many images are listed."""
        return len(self.names())

    def add(self, skipped: Skipped) -> None:
        """List an image, unless it is listed already."""
        if skipped.name not in self.listed and skipped.name not in (names := self.names()):
            self.listed |= names
            with self.path.open(
                "a", encoding="utf-8"
            ) as file:  # one write per line, so that processes do not mix lines
                file.write(json.dumps({"image": skipped.name, "reason": skipped.reason}) + "\n")
        self.listed.add(skipped.name)


class TrainingImages(Dataset):
    """
    Reads the image of a [`Sample`] and makes the view of it that the seed and its index determine (its name with
    `Views.fixed_views`), whichever worker does it. An image that cannot be read becomes a [`Skipped`].

    Args:
        sources: see `open_sources`.
        image_processor: normalises pixels.
        window: side of a teacher window in pixels.
        patch_size: side of a patch in pixels.
        views: distribution of the views.
        seed: of the views.
        min_side: images with a side below this many pixels are skipped.
        image_range: values of black and white of images of floats or more than 8 bits, see `to_rgb`.
        max_pixels: larger images are skipped; by default Pillow's limit.
        same_size: this many consecutive images of the stream get views of one size, if they have one shape; 0 draws a size
            for each.

    Attributes:
        others: images that may cover a part of a view (`Views.cutmix_probability`); none at first.
    """

    others: SampleList | None = None

    def __init__(
        self,
        sources: list[Any],
        image_processor,
        window: int,
        patch_size: int,
        views: Views,
        seed: int = 0,
        min_side: int = 32,
        image_range: ImageRange | None = None,
        max_pixels: int | None = None,
        same_size: int = 0,
    ):
        self.same_size = same_size
        self.sources, self.image_processor, self.window, self.patch_size = sources, image_processor, window, patch_size
        self.views, self.seed, self.min_side = views, seed, min_side
        self.image_range, self.max_pixels = image_range, max_pixels

    def read(self, sample: Sample) -> Image.Image:
        """The upright RGB image of a sample. Raises whatever its decoder raises if it cannot be read."""
        source = sample.source
        if isinstance(source, str) and is_remote(source):  # named by --images, or on the hub
            source = read_remote(source)
        if isinstance(source, tuple):
            source = self.sources[source[0]].source(source[1])
        if source is None:
            raise ValueError("the row holds no image")
        set_pixel_limit(self.max_pixels)  # here, since workers may be processes that inherit nothing
        image, name = open_image(source if isinstance(source, bytes) else Path(source), urls=False)
        check_side(image, self.min_side)
        return to_rgb(turn_upright(image, name), self.image_range)

    def __getitem__(self, sample: Sample) -> LoadedSample | Skipped:
        try:
            image = self.read(sample)
        except Exception as error:  # each of Pillow's decoders raises its own kind, and no file may stop a training run
            return Skipped(sample.name, str(error) or type(error).__name__)
        generator = view_generator(self.seed, sample.name if self.views.fixed_views else sample.index)
        size_generator = view_generator(self.seed, f"size {sample.index // self.same_size}") if self.same_size else None
        crop = draw_crop(image.size, self.window, self.patch_size, self.views, generator, size_generator)
        view, plain = self.view(image, crop, sample, generator)
        return LoadedSample(
            sample.index,
            self.pixels(view),
            sample.after,
            teacher_pixel_values=None if plain is None else self.pixels(plain),
            whole_size=crop.whole_size(image.size),
        )

    def view(
        self, image: Image.Image, crop: Crop, sample: Sample, generator: random.Random
    ) -> tuple[Image.Image, Image.Image | None]:
        """
        The view of a sample that `crop` cuts out of its image, and with `Views.jitter_student_only` the same view in the
        light of its images, `None` if that is no other.
        """
        plain = [crop.cut(image)]
        jitters = [crop.jitter]
        if cover := self.cover(sample, generator):
            plain.append(cover[0])
            jitters.append(cover[1])
        lit = [part if seed is None else jitter_image(part, seed) for part, seed in zip(plain, jitters, strict=True)]
        rectangle = generator.getstate()
        view = cover_part(lit[0], lit[1], generator) if cover else lit[0]
        if not self.views.jitter_student_only or not any(seed is not None for seed in jitters):
            return view, None
        generator.setstate(rectangle)  # the same for both
        return view, cover_part(plain[0], plain[1], generator) if cover else plain[0]

    def cover(self, sample: Sample, generator: random.Random) -> tuple[Image.Image, int | None] | None:
        """
        By chance a view of another image, in its own light, that covers a part of that of a sample, and the seed of its
        jitter. `None` also if that image cannot be read: it is listed as skipped when its own turn comes.
        """
        if not self.others or generator.random() >= self.views.cutmix_probability:
            return None
        for _ in range(MOST_DRAWS):
            other = self.others.sample(generator.randrange(len(self.others)), 0, [])
            if other.name != sample.name:
                break
        else:  # there is hardly another one
            return None
        try:
            image = self.read(other)
        except Exception:  # as above
            return None
        crop = draw_crop(image.size, self.window, self.patch_size, self.views, generator)
        return crop.cut(image), crop.jitter

    def squares(self, samples: list[Sample], side: int) -> Iterator[torch.Tensor]:
        """The readable images of samples, one by one, as squares of `side` pixels: `(1, 3, side, side)`."""
        for sample in samples:
            try:
                image = self.read(sample)
            except Exception as error:  # as above; training adds the image to the list of skipped ones
                logger.warning("%s is skipped: %s", sample.name, error)
                continue
            yield self.pixels(image.resize((side, side)))

    def pixels(self, image: Image.Image) -> torch.Tensor:
        return self.image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]


def check_side(image: Image.Image, min_side: int) -> None:
    """
    Raises:
        ValueError: a side of the image is shorter.
    """
    if min(image.size) < min_side:
        raise ValueError(f"{image.width}×{image.height} px; --min_side is {min_side}")


def only_item(item: Any) -> Any:
    """Collate function of a `DataLoader` of single items. Module level, so that it can be sent to worker processes."""
    return item
