"""
The usual benchmarks of open-vocabulary segmentation, read from their folders on disk.

Labels, ignored pixels and background are those of the published evaluations (the data sets of mmsegmentation 0.x;
COCO-Object as prepared for GroupViT, Xu et al., 2022). Masks are 8-bit PNG, 255 is ignored.

- `voc21`: 0 background, 1 to 20 objects; outlines of objects are ignored.
- `voc20`: the same masks; background is ignored and no answer.
- `context60`: 0 background, 1 to 59 classes. `context59`: the same masks; background is ignored and no answer.
- `coco-object`: `*_instanceTrainIds.png`, 0 background, 1 to 80 objects. Without them COCO-Stuff's masks are read: a thing
  is its number, everything else background; pixels without a label too, as in the published preparation.
- `coco-stuff`: `*_labelTrainIds.png`, 0 to 170: 80 things, 91 stuff. Without them the original masks, category - 1.
- `cityscapes`: `*_labelTrainIds.png`, 0 to 18. Without them `*_labelIds.png`, the 19 of their 34 that count.
- `ade20k`: 1 to 150 classes; 0 (other objects) is ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spar_hf.data.segmentation_sets import IGNORE_INDEX, SegmentationSet, from_files, make_table
from spar_hf.model.prompts import Vocabulary
from spar_hf.utils.errors import MissingFiles, UsageError


def without_zero(classes: int) -> np.ndarray:
    """Value v is class v - 1 and 0 is ignored: what transformers calls `reduce_zero_label`."""
    return make_table({value: value - 1 for value in range(1, classes + 1)}, ignored=(0, IGNORE_INDEX))


# COCO's categories have gaps; the original masks of COCO-Stuff hold category - 1
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
COCO_THINGS = {
    value: label for label, value in enumerate(c - 1 for c in range(1, 91) if c not in COCO_GAPS)
}  # 80 of them
COCO_ORIGINAL = COCO_THINGS | {category - 1: category - 12 for category in range(92, 183)}
CITYSCAPES_IDS = dict(
    zip((7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33), range(19), strict=True)
)  # labelIds -> labelTrainIds


def things_only(things: dict[int, int], stuff: Sequence[int]) -> np.ndarray:
    """COCO-Object from masks of COCO-Stuff: a thing is its number + 1; stuff and unlabelled pixels are background, 0."""
    table = make_table({value: label + 1 for value, label in things.items()}, ignored=())
    table[[*stuff, IGNORE_INDEX]] = 0
    return table


@dataclass(frozen=True)
class Benchmark:
    """
    Where a benchmark lies on disk and what its masks mean. In the patterns `{}` is the name of an image.

    Attributes:
        title: what people call it.
        vocabulary: its class names in `spar_hf/model/vocabularies.py`.
        homes: folders, relative to the one that a user names, in which the layout may start.
        images: patterns of the images; the first that finds any counts.
        masks: patterns of the masks and the table of each; the first that finds the first image's mask counts.
        listing: file with the names of the images; without one, all that `images` finds.
        depth: folders in an image's name.
    """

    title: str
    vocabulary: str
    homes: tuple[str, ...]
    images: tuple[str, ...]
    masks: tuple[tuple[str, np.ndarray], ...]
    listing: str | None = None
    depth: int = 0

    @property
    def layout(self) -> str:
        """The layout as a sentence of an error message."""
        listing = f" listed in `{self.listing}`" if self.listing else ""
        images = " or ".join(f"`{pattern.format('NAME')}`" for pattern in self.images)
        masks = " or ".join(f"`{pattern.format('NAME')}`" for pattern, _ in self.masks)
        homes = " or ".join(f"`{home}/`" for home in self.homes if home)
        return f"images {images}{listing} and masks {masks}" + (f", in it or in its {homes}" if homes else "")

    def find(self, folder: Path) -> tuple[list[str], list[str], list[str], np.ndarray] | None:
        """Names, images, masks and the table; `None` if the layout is not there."""
        for base in (folder / home for home in self.homes):
            for images in self.images:
                names = self.list_names(base, images)
                found = next(((p, t) for p, t in self.masks if names and (base / p.format(names[0])).is_file()), None)
                if found and (base / images.format(names[0])).is_file():
                    pattern, table = found
                    return (
                        names,
                        [str(base / images.format(name)) for name in names],
                        [str(base / pattern.format(name)) for name in names],
                        table,
                    )
        return None

    def list_names(self, base: Path, images: str) -> list[str]:
        if self.listing is not None:
            listing = base / self.listing
            return listing.read_text(encoding="utf-8").split() if listing.is_file() else []
        before, after = images.split("{}")
        paths = sorted(base.glob(images.format("/".join(["*"] * (self.depth + 1)))))
        return [path.relative_to(base).as_posix()[len(before) : -len(after)] for path in paths]


VOC: dict[str, Any] = {
    "title": "PASCAL VOC 2012",
    "homes": ("", "VOC2012", "VOCdevkit/VOC2012"),
    "images": ("JPEGImages/{}.jpg",),
    "listing": "ImageSets/Segmentation/val.txt",
}
CONTEXT: dict[str, Any] = {
    "title": "PASCAL Context",
    "homes": ("", "VOC2010", "VOCdevkit/VOC2010"),
    "images": ("JPEGImages/{}.jpg",),
    "listing": "ImageSets/SegmentationContext/val.txt",
}
COCO: dict[str, Any] = {"homes": ("", "coco_stuff164k"), "images": ("images/val2017/{}.jpg", "val2017/{}.jpg")}
COCO_MASKS = ("annotations/val2017/{}", "stuffthingmaps/val2017/{}")

BENCHMARKS: dict[str, Benchmark] = {
    "voc21": Benchmark(**VOC, vocabulary="voc21", masks=(("SegmentationClass/{}.png", make_table(range(21))),)),
    "voc20": Benchmark(**VOC, vocabulary="voc20", masks=(("SegmentationClass/{}.png", without_zero(20)),)),
    "context60": Benchmark(
        **CONTEXT, vocabulary="context60", masks=(("SegmentationClassContext/{}.png", make_table(range(60))),)
    ),
    "context59": Benchmark(
        **CONTEXT, vocabulary="context59", masks=(("SegmentationClassContext/{}.png", without_zero(59)),)
    ),
    "coco-object": Benchmark(
        **COCO,
        title="COCO-Object",
        vocabulary="coco-object",
        masks=tuple(
            (pattern + suffix, table)
            for suffix, table in (
                ("_instanceTrainIds.png", make_table(range(81))),
                ("_labelTrainIds.png", things_only({i: i for i in range(80)}, range(80, 171))),
                (".png", things_only(COCO_THINGS, range(91, 182))),
            )
            for pattern in COCO_MASKS
        ),
    ),
    "coco-stuff": Benchmark(
        **COCO,
        title="COCO-Stuff",
        vocabulary="coco-stuff",
        masks=tuple(
            (pattern + suffix, table)
            for suffix, table in (
                ("_labelTrainIds.png", make_table(range(171))),
                (".png", make_table(COCO_ORIGINAL)),
            )
            for pattern in COCO_MASKS
        ),
    ),
    "cityscapes": Benchmark(
        title="Cityscapes",
        vocabulary="cityscapes",
        homes=("", "cityscapes"),
        images=("leftImg8bit/val/{}_leftImg8bit.png",),
        masks=(
            ("gtFine/val/{}_gtFine_labelTrainIds.png", make_table(range(19))),
            (
                "gtFine/val/{}_gtFine_labelIds.png",
                make_table(CITYSCAPES_IDS, ignored=[*(i for i in range(34) if i not in CITYSCAPES_IDS), IGNORE_INDEX]),
            ),
        ),
        depth=1,
    ),
    "ade20k": Benchmark(
        title="ADE20K",
        vocabulary="ade20k",
        homes=("", "ADEChallengeData2016"),
        images=("images/validation/{}.jpg",),
        masks=(("annotations/validation/{}.png", without_zero(150)),),
    ),
}


def open_benchmark(name: str, folder: str | Path) -> SegmentationSet:
    """
    A benchmark's validation split.

    Raises:
        UsageError: no benchmark of this name.
        MissingFiles: the folder has another layout, or an image or mask is missing; the message has the layout.
    """
    if name not in BENCHMARKS:
        raise UsageError(f"There is no benchmark {name!r}; use one of {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    found = benchmark.find(Path(folder))
    if found is None:
        raise MissingFiles(f"{folder} does not hold {benchmark.title} as expected: {benchmark.layout}.")
    names, images, masks, table = found
    missing = [path for path in (*images, *masks) if not Path(path).is_file()]
    if missing:
        raise MissingFiles(
            f"{len(missing)} files of {benchmark.title} are missing, the first is {missing[0]}. Expected are "
            f"{benchmark.layout}."
        )
    labels = Vocabulary.parse(benchmark.vocabulary).labels
    return SegmentationSet(benchmark.title, from_files(images, masks), tuple(names), labels, table, name, "val")
