"""
Can the seams of images in tiles be seen? Labels in the overlaps of tiles against those of other tiles, in whose middle the
same pixels lie.

    python training/studies/seams.py --images IMAGES --tile 768 --overlaps 128 192 256 --output seams

Strips, one tile high, are put together from the images at their own size. Each is segmented in three phases, whose tiles are
shifted by a third of their distance. For the overlaps of one phase:

- *seam*: labels that equal those of the other phases, in the whole overlap / within two patches of its middle;
- *anywhere*: the same at all pixels;
- *changes*: how much more often neighbouring patches differ in label at the middle of an overlap (three borders of patches)
  than elsewhere / where that is most often the case between two seams. Boundaries in the images differ too, so that the
  second number is above 1 without tiles.

Prints a table, and writes `OUTPUT/seams.json`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import pipeline

import spar_hf
from spar_hf.data.sources import list_images
from spar_hf.model.image_input import read_rgb
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.tiling import TileAxis
from spar_hf.utils.atomic import write_json
from spar_hf.utils.checkpoints import check_replaceable
from spar_hf.utils.errors import UsageError, run_command
from spar_hf.utils.fields import option, required
from spar_hf.utils.options import HELP, parse_dataclasses

COMMON = (
    "sky; building; tree, vegetation; road, pavement; person; car; grass; water; mountain; wall; sand, ground; animal"
)
VOCABULARIES = {"12 common words": COMMON.split("; "), "the 150 of ADE20K": "ade20k"}
ROW = 768  # height in pixels of a row of images in a strip, at least
FINE = 4  # labels are compared at so many points per axis of a patch


@dataclass(kw_only=True)
class SeamOptions:
    """Options of the study."""

    images: str = required("Folder of images; those below 768 pixels on a side are left out.")
    model: str = option(spar_hf.SPAR_TINY, "Folder of a two-tower model.")
    output: str = option("seams", "Folder to write.")
    tile: int = option(768, "Side of a tile in pixels.")
    overlaps: list[int] = option([128, 192, 256], "Overlaps of tiles in pixels.")
    tiles: int = option(5, "Tiles per strip and phase.")
    strips: int = option(3, "Strips per overlap.")
    seed: int = option(0, "Seed of the strips.")
    overwrite: bool = option(False, HELP["overwrite"])

    def __post_init__(self):
        if not self.overlaps or not all(0 < overlap <= self.tile // 2 for overlap in self.overlaps):
            raise UsageError(f"--overlaps must be from 1 to half of --tile, {self.tile // 2}.")
        if self.tiles < 3 or self.strips < 1:
            raise UsageError("--tiles must be at least 3, and --strips at least 1.")


def make_strip(files: list[Path], height: int, width: int, seed: str) -> Image.Image:
    """Images side by side at their own size, in rows of equal height; smaller ones are enlarged to the row."""
    rng = random.Random(seed)
    strip = Image.new("RGB", (width, height))
    rows = max(1, round(height / ROW))
    tall = -(-height // rows)
    for row in range(rows):
        left = -rng.randrange(600)
        while left < width:
            image = read_rgb(rng.choice(files))
            if image.height < tall:
                image = image.resize((round(image.width * tall / image.height), tall))
            top = rng.randrange(image.height - tall + 1)
            strip.paste(image.crop((0, top, image.width, top + tall)), (left, row * tall))
            left += image.width
    return strip


@dataclass
class Phase:
    """Tiles side by side: the first patch of each, and its features `(dim, h, w)`."""

    starts: list[int]
    features: list[torch.Tensor]

    def blend(self, width: int) -> torch.Tensor:
        """The blended features of a strip of `width` patches, as of an image in tiles; zeros where there is no tile."""
        tile = self.features[0].shape[2]
        axis = TileAxis(self.starts[-1] - self.starts[0] + tile, tile, tuple(s - self.starts[0] for s in self.starts))
        blended = torch.zeros(*self.features[0].shape[:2], width)
        for start, weights, features in zip(self.starts, axis.weights, self.features, strict=True):
            blended[:, :, start : start + tile] += features * weights
        return blended


def compare(maps: list[torch.Tensor], starts: list[list[int]], tile: int, overlap: int, inside: slice) -> torch.Tensor:
    """
    Sums over the three phases, within the patch columns `inside`: equal labels and all labels of seam, band and anywhere;
    then, for every border between patches of a period, differing and all labels: `(3 + period, 2)`.
    """
    width, period = maps[0].shape[1] // FINE, tile - overlap
    sums = torch.zeros(3 + period, 2, dtype=torch.float64)
    used = torch.zeros(width, dtype=torch.bool)
    used[inside] = True
    for a, first in enumerate(starts):
        seam, band = torch.zeros(2, width, dtype=torch.bool)
        for start in first[1:]:
            seam[start : start + overlap] = True
            band[start + (overlap + 1) // 2 - 2 : start + overlap // 2 + 2] = True
        for other in ((a + 1) % 3, (a + 2) % 3):
            equal = (maps[a] == maps[other]).double().mean(0).view(width, FINE).mean(1)
            for row, chosen in enumerate((seam, band, torch.ones_like(seam))):
                sums[row] += torch.tensor([equal[chosen & used].sum(), (chosen & used).sum()])
        patches = maps[a][FINE // 2 :: FINE, FINE // 2 :: FINE]
        differ = (patches[:, 1:] != patches[:, :-1]).double().mean(0)[used[1:]]
        place = (torch.arange(1, width)[used[1:]] - first[1] - overlap // 2) % period
        sums[3:].index_add_(0, place, torch.stack([differ, torch.ones_like(differ)], 1))
    return sums


@torch.no_grad()
def measure(segment: Any, files: list[Path], options: SeamOptions, overlap: int) -> dict[str, list[float]]:
    """The numbers of an overlap in pixels, per vocabulary: seam, band, anywhere, changes at the middle, most changes."""
    patch = segment.model.config.patch_size
    tile, shared = options.tile // patch, -(-overlap // patch)
    step = tile - shared
    width = tile + (options.tiles - 1) * step + 2 * (step // 3)
    starts = [[phase * (step // 3) + k * step for k in range(options.tiles)] for phase in range(3)]
    # half a step from the ends of what all phases cover
    inside = slice(starts[2][0] + step // 2, starts[0][-1] + tile - step // 2)
    sums: dict[str, torch.Tensor] = {}
    for strip in range(options.strips):
        image = make_strip(files, tile * patch, width * patch, f"strip-{options.seed}-{strip}")

        def encode(start: int, image: Image.Image = image) -> torch.Tensor:
            part = image.crop((start * patch, 0, (start + tile) * patch, tile * patch))
            return segment.encode(part, size="native", max_tokens=tile**2).feature_map

        phases = [Phase(first, [encode(start) for start in first]) for first in starts]
        blended = [phase.blend(width) for phase in phases]
        for name, words in VOCABULARIES.items():
            labels = labeller(segment, Vocabulary.parse(words))
            found = compare([labels(features) for features in blended], starts, tile, shared, inside)
            sums[name] = sums.get(name, 0) + found
    return {name: summarise(found) for name, found in sums.items()}


def labeller(segment: Any, vocabulary: Vocabulary) -> Callable[[torch.Tensor], torch.Tensor]:
    """Features `(dim, h, w)` -> labels at `FINE` points per patch and axis."""
    embeds, classes = segment.text_embeds(vocabulary), vocabulary.name_to_class

    def labels(features: torch.Tensor) -> torch.Tensor:
        logits = segment.model.dense_logits(features[None], embeds)
        return classes[F.interpolate(logits, scale_factor=FINE, mode="bilinear")[0].argmax(0)]

    return labels


def summarise(sums: torch.Tensor) -> list[float]:
    """Shares of equal labels, and changes relative to their mean."""
    shares = sums[:, 0] / sums[:, 1].clamp(min=1)
    near = torch.tensor([-1, 0, 1])
    smooth = shares[3:][(torch.arange(len(shares) - 3)[:, None] + near) % (len(shares) - 3)].mean(1)
    elsewhere = torch.ones(len(smooth), dtype=torch.bool)
    elsewhere[near] = False
    return [*shares[:3].tolist(), float(smooth[0] / shares[3:][elsewhere].mean()), float(smooth.max() / smooth.mean())]


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run the study; returns what it writes."""
    (options,) = parse_dataclasses((SeamOptions,), args)
    check_replaceable([Path(options.output) / "seams.json"], options.overwrite)
    files = [path for path in list_images(options.images) if min(read_rgb(path).size) >= ROW]
    if not files:
        raise UsageError(f"{options.images} has no image of {ROW} or more pixels on both sides.")
    segment = pipeline("open-vocab-segmentation", model=options.model)
    table = Table(box=box.SIMPLE, title=f"Tiles of {options.tile} pixels")
    for column in ("overlap", "words", "seam: overlap / middle", "anywhere", "changes: middle / most"):
        table.add_column(column)
    report: dict[str, Any] = {"tile": options.tile, "strips": options.strips, "overlaps": {}}
    for overlap in options.overlaps:
        report["overlaps"][overlap] = measure(segment, files, options, overlap)
        for name, (seam, band, anywhere, changes, most) in report["overlaps"][overlap].items():
            shares = f"{seam:.1%} / {band:.1%}", f"{anywhere:.1%}"
            table.add_row(f"{overlap}", name, *shares, f"{changes:.2f} / {most:.2f}")
    Path(options.output).mkdir(parents=True, exist_ok=True)
    write_json(Path(options.output) / "seams.json", report)
    Console(width=120).print(table)
    return report


if __name__ == "__main__":
    run_command(main)
