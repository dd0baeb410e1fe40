"""
Images with masks to measure on: the eight usual benchmarks from their folders on disk, any folder of `images/` and
`masks/`, any Hugging Face data set. All of them become a `datasets.Dataset` whose images are decoded one at a time.

The benchmarks, with labels, void and background as the published evaluations of open-vocabulary segmentation have them
(the data sets of mmsegmentation 0.x; COCO-Object as prepared for GroupViT, Xu et al., 2022). Masks are 8-bit PNG, 255 void.

- `voc21`: 0 background, 1 to 20 objects; outlines of objects are void.
- `voc20`: the same masks; background is void and no answer.
- `context60`: 0 background, 1 to 59 classes. `context59`: the same masks; background is void and no answer.
- `coco-object`: `*_instanceTrainIds.png`, 0 background, 1 to 80 objects. Where they are not: COCO-Stuff's masks, things by
  their number, all else background; pixels without a label too, as in the published preparation.
- `coco-stuff`: `*_labelTrainIds.png`, 0 to 170: 80 things, 91 stuff. Where they are not: the original masks, category - 1.
- `cityscapes`: `*_labelTrainIds.png`, 0 to 18. Where they are not: `*_labelIds.png`, the 19 of their 34 that count.
- `ade20k`: 1 to 150 classes; 0 (other objects) is void.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from spar_hf.data.segmentation_sets import VOID, open_segmentation_folder, readable_name
from spar_hf.model.image_input import to_rgb
from spar_hf.model.prompts import Vocabulary

UNKNOWN = -1  # in a table: a value that masks of the set do not hold


@dataclass(frozen=True)
class SegmentationSet:
    """
    Images with masks.

    Attributes:
        title: what reports call the set.
        images: columns `image` and `mask`, decoded when a row is read.
        names: a name per image, the file stem where there are files.
        labels: the classes; two values of a mask may be one class.
        table: class of every mask value, `VOID` for pixels that do not count and `UNKNOWN` for values that must not
            occur; `(256,)` int16.
        source: its name among the benchmarks or on the Hugging Face hub, else its folder's.
        split: which part of it this is, where that is known.
        subset: which configuration of a Hugging Face data set, where it was chosen.
    """

    title: str
    images: datasets.Dataset
    names: tuple[str, ...]
    labels: tuple[str, ...]
    table: np.ndarray
    source: str
    split: str | None = None
    subset: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def select(self, chosen: Sequence[int]) -> "SegmentationSet":
        """The images of these numbers, in this order."""
        return replace(self, images=self.images.select(chosen), names=tuple(self.names[i] for i in chosen))

    @property
    def stamp(self) -> str:
        """
        What tells these images and masks from others of the same names, without decoding any: sizes and times of files; of
        other data sets `datasets`' own fingerprint, which goes with what they were made of.
        """
        raw = datasets.Image(decode=False)
        columns = [self.images.cast_column(name, raw)[name] for name in ("image", "mask")]
        paths = [entry["path"] for column in columns for entry in column if entry and entry["bytes"] is None]
        if not paths:
            return self.images._fingerprint
        found = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]
        return hashlib.sha256(repr(found).encode()).hexdigest()

    def read(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """
        An image (RGB, upright) and its mask in the classes of the set, `(height, width)` uint8.

        Raises:
            ValueError: a file that is no image or too large for Pillow, a mask that is no map of 8-bit values, one of
                another size than its image, or a value that the set does not have.
        """
        name = self.names[number]
        try:
            row = self.images[number]
        except Exception as error:  # Pillow raises many kinds for damaged files, and one of its own for huge ones
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"Cannot read {name} of {self.source} ({reason}). Copy or download it again, or leave it out with --exclude."
            ) from error
        if row["image"] is None or row["mask"] is None:
            raise ValueError(f"{name} of {self.source} has no image or no mask.")
        image, mask = to_rgb(row["image"]), row["mask"]
        if mask.mode not in ("L", "P", "I", "I;16"):
            raise ValueError(
                f"The mask of {name} has mode {mask.mode}; a mask is a PNG of class numbers (mode L or P, one channel)."
            )
        values = np.asarray(mask)
        if values.shape != (image.height, image.width):
            raise ValueError(
                f"The mask of {name} has {values.shape[0]}×{values.shape[1]} pixels (height × width), its image "
                f"{image.height}×{image.width}. A mask lies on its image pixel by pixel: resize it to the image (nearest "
                "neighbour)."
            )
        present = np.unique(values)
        wrong = [int(value) for value in present if not 0 <= value <= 255 or self.table[value] == UNKNOWN]
        if wrong:
            raise ValueError(
                f"The mask of {name} holds the values {wrong}, which {self.title} ({len(self.labels)} classes) does not "
                f"have; void is {[int(v) for v in np.flatnonzero(self.table == VOID)]}."
            )
        return image, self.table[values].astype(np.uint8)


def make_table(values: dict[int, int] | range, void: Sequence[int] = (VOID,)) -> np.ndarray:
    """The table of a set from `{mask value: class}` (a range is its own) and the values that are void."""
    table = np.full(256, UNKNOWN, np.int16)
    for value, label in values.items() if isinstance(values, dict) else enumerate(values):
        table[value] = label
    table[list(void)] = VOID
    return table


def without_zero(classes: int) -> np.ndarray:
    """`reduce_zero_label`: 0 is void and value v is class v - 1."""
    return make_table({value: value - 1 for value in range(1, classes + 1)}, void=(0, VOID))


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
    table = make_table({value: label + 1 for value, label in things.items()}, void=())
    table[[*stuff, VOID]] = 0
    return table


@dataclass(frozen=True)
class Benchmark:
    """
    Where a benchmark lies on disk and what its masks mean. In the patterns `{}` is the name of an image.

    Attributes:
        title: what people call it.
        vocabulary: its class names in `spar_hf/vocabularies.py`.
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


VOC = {
    "title": "PASCAL VOC 2012",
    "homes": ("", "VOC2012", "VOCdevkit/VOC2012"),
    "images": ("JPEGImages/{}.jpg",),
    "listing": "ImageSets/Segmentation/val.txt",
}
CONTEXT = {
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
                make_table(CITYSCAPES_IDS, void=[*(i for i in range(34) if i not in CITYSCAPES_IDS), VOID]),
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


def from_files(images: Sequence[str], masks: Sequence[str]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return datasets.Dataset.from_dict({"image": list(images), "mask": list(masks)}, features=features)


def open_benchmark(name: str, folder: str | Path) -> SegmentationSet:
    """
    A benchmark's validation split.

    Raises:
        ValueError: no benchmark of this name.
        FileNotFoundError: the folder has another layout, or an image or mask is missing; the message has the layout.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}; use one of {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    found = benchmark.find(Path(folder))
    if found is None:
        raise FileNotFoundError(f"{folder} does not hold {benchmark.title} as expected: {benchmark.layout}.")
    names, images, masks, table = found
    missing = [path for path in (*images, *masks) if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} files of {benchmark.title} are missing, the first is {missing[0]}. Expected are "
            f"{benchmark.layout}."
        )
    labels = Vocabulary.parse(benchmark.vocabulary).labels
    return SegmentationSet(benchmark.title, from_files(images, masks), tuple(names), labels, table, name, "val")


def class_label(name: str) -> str:
    """A data set's class as a person would call it; `null` says nothing, `background` does."""
    word = readable_name(name)
    return "background" if word == "null" else word


def table_of_lines(lines: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """
    Labels and table of a list of classes in the order of the mask values, 255 void.

    Classes that read alike (`wall-merged`, `wall-other`) are one class: no word could tell them apart.

    Raises:
        ValueError: more classes than 8-bit masks hold.
    """
    if len(lines) > VOID:
        raise ValueError(f"There are {len(lines)} classes, but 8-bit masks hold {VOID} classes and void.")
    words = [class_label(line) for line in lines]
    labels = tuple(dict.fromkeys(words))
    return labels, make_table({value: labels.index(word) for value, word in enumerate(words)})


def open_folder(folder: str | Path) -> SegmentationSet:
    """
    A folder with `images/`, `masks/` (8-bit PNG of the same stem, 255 void) and `classes.txt`.

    Raises:
        FileNotFoundError: the layout is incomplete.
        ValueError: more than 255 classes.
    """
    found = open_segmentation_folder(folder)
    labels, table = table_of_lines(found.classes)
    images, masks = ([str(path) for path in paths] for paths in zip(*found.pairs, strict=True))
    names = tuple(Path(image).stem for image in images)
    place = found.path.resolve()
    name, split = (place.name, None) if (place / "classes.txt").is_file() else (place.parent.name, place.name)
    return SegmentationSet(name, from_files(images, masks), names, labels, table, name, split)


def load(path: str, split: str | None, subset: str | None) -> Any:
    """
    `save_to_disk`'s folders by `load_from_disk`, all else (parquet folders, hub ids) by `load_dataset`.

    Raises:
        ValueError: a folder of `save_to_disk` that is another split or, as all of them, has no subsets; what
            `load_dataset` does not find.
    """
    folder = Path(path)
    if not (folder / "dataset_dict.json").is_file() and not (folder / "dataset_info.json").is_file():
        try:
            return datasets.load_dataset(path, subset, split=split)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"Cannot load {path}: {reason}. Choose by --subset (now {subset}) and --split (now {split})."
            ) from error
    if subset is not None:
        raise ValueError(f"{path} is a folder of save_to_disk, which holds one subset: leave --subset {subset} out.")
    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.Dataset):
        if split is not None and loaded.split is not None and str(loaded.split) != split:
            raise ValueError(f"{path} holds the split {loaded.split} alone, not {split}: leave --split out.")
        return loaded
    return loaded.get(split, loaded)


def open_hugging_face(
    path: str,
    classes: Sequence[str],
    split: str | None = None,
    subset: str | None = None,
    image_column: str = "image",
    mask_column: str = "mask",
    ignore_index: int = VOID,
    reduce_zero_label: bool = False,
) -> SegmentationSet:
    """
    Any Hugging Face data set with a column of images and one of masks.

    Args:
        path: hub id, or a local folder of `save_to_disk` or of parquet files.
        classes: the classes in the order of the mask values.
        split: needed where there are several.
        subset: configuration, which hub ids and folders with a `README.md` may have several of.
        image_column, mask_column: names of the columns, both of type `datasets.Image`.
        ignore_index: mask value that is void, beside 255.
        reduce_zero_label: 0 is void and value v is class v - 1, as transformers' image processors call it.

    Raises:
        ValueError: several splits or subsets, or no such split, subset or columns; the message has what there is. A
            void value that 8-bit masks cannot hold.
    """
    if not 0 <= ignore_index <= VOID:
        raise ValueError(
            f"--ignore_index {ignore_index}: masks hold the values 0 to {VOID}. Change the masks, to {VOID} for void say."
        )
    loaded = load(path, split, subset)
    if not isinstance(loaded, datasets.Dataset):
        if len(loaded) != 1 or split is not None:
            raise ValueError(f"{path} has the splits {', '.join(loaded)}. Choose one with --split.")
        split, loaded = next(iter(loaded.items()))
    elif split is None and loaded.split is not None:
        split = str(loaded.split)
    if image_column == mask_column:
        raise ValueError(
            f"--image_column and --mask_column are both {image_column!r}: images and masks are two columns."
        )
    columns = {name: kind for name, kind in loaded.features.items() if isinstance(kind, datasets.Image)}
    if image_column not in columns or mask_column not in columns:
        raise ValueError(
            f"{path} has no image columns {image_column!r} and {mask_column!r}. Of its columns "
            f"{', '.join(loaded.features)}, images are {', '.join(columns) or 'none'}: name two with --image_column and "
            "--mask_column."
        )
    labels, table = table_of_lines(classes)
    if reduce_zero_label:
        table = np.concatenate([[VOID], table[:255]]).astype(np.int16)
    table[[ignore_index, VOID]] = VOID
    images = loaded.select_columns([image_column, mask_column])
    images = images.rename_columns({image_column: "image", mask_column: "mask"})
    names = tuple(f"row{i}" for i in range(len(images)))
    name = Path(path).resolve().name if Path(path).is_dir() else path
    return SegmentationSet(name, images, names, labels, table, name, split, subset)
