"""
The common benchmarks of open-vocabulary segmentation, read from their folders on disk.

Labels, ignored pixels and background follow the published evaluations (the data sets of mmsegmentation 0.x, COCO-Object as
prepared for GroupViT, Xu et al., 2022, and MESS, Blumenstiel et al., 2023). Masks are 8-bit PNG files in which 255 is
ignored, unless stated. `docs/benchmarks.md` shows all layouts.

- `voc21`: 0 is background, 1 to 20 are objects; outlines of objects are ignored.
- `voc20`: the same masks without background, which is ignored and not predicted.
- `context60`: 0 is background, 1 to 59 are classes. `context59`: the same masks without background.
- `coco-object`: `*_instanceTrainIds.png`, 0 is background, 1 to 80 are objects. If they are missing, the masks of COCO-Stuff
  are read: things are objects, everything else, unlabelled pixels too, is background, as in the published preparation.
- `coco-stuff`: `*_labelTrainIds.png`, 80 things and 91 kinds of stuff. If they are missing, the original masks are read,
  whose values are the category minus 1.
- `cityscapes`: `*_labelTrainIds.png`, 0 to 18. If they are missing, `*_labelIds.png`, in which 19 of 34 classes count.
- `ade20k`: 1 to 150 are classes; 0 (other objects) is ignored.
- `ade20k-847`: 16-bit TIFF files prepared as for MaskFormer, 0 to 846; 65535 is ignored.
- `loveda`: 1 to 7 are classes; 0 is ignored. The layout is that of mmsegmentation's converter.
- The 22 sets of MESS as its scripts prepare them: 0 is the first class, which for many sets is the background, and counts.
  PAXRay-4 is four sets of one class and the rest each, whose mIoU are averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spar_hf.data.segmentation_sets import (
    IGNORE_INDEX,
    WIDE_IGNORE_INDEX,
    SegmentationSet,
    from_files,
    make_table,
)
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.vocabularies import vocabulary_lines
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.texts import read_text


def without_zero(classes: int) -> np.ndarray:
    """The table of masks in which 0 is ignored and value v is class v - 1: `reduce_zero_label` of transformers."""
    return make_table({value: value - 1 for value in range(1, classes + 1)}, ignored=(0, IGNORE_INDEX))


# category numbers that COCO does not use; the original masks of COCO-Stuff hold the category minus 1
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
COCO_THINGS = {
    value: label for label, value in enumerate(c - 1 for c in range(1, 91) if c not in COCO_GAPS)
}  # 80 of them
COCO_ORIGINAL = COCO_THINGS | {category - 1: category - 12 for category in range(92, 183)}
CITYSCAPES_IDS = dict(
    zip((7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33), range(19), strict=True)
)  # labelIds -> labelTrainIds


def things_only(things: dict[int, int], stuff: Sequence[int]) -> np.ndarray:
    """The table that reads masks of COCO-Stuff as COCO-Object: 0 for stuff and unlabelled pixels, then the things."""
    table = make_table({value: label + 1 for value, label in things.items()}, ignored=())
    table[[*stuff, IGNORE_INDEX]] = 0
    return table


@dataclass(frozen=True)
class Benchmark:
    """
    The layout of a benchmark on disk and the meaning of its masks. In the patterns `{}` is the name of an image.

    Attributes:
        title: its usual name.
        vocabulary: its class names in `spar_hf/model/vocabularies.py`.
        homes: folders in which the layout may start, relative to the one that a user names.
        images: patterns of the images. The first one that finds an image is used.
        masks: patterns of the masks, each with its table. The first one that finds the mask of the first image is used.
        listing: file with the names of the images. Without one, all images that `images` finds are used.
        depth: number of folders in an image's name.
        split: the split that is read.
        only_masked: whether images without a mask belong to other splits and are left out.
    """

    title: str
    vocabulary: str
    homes: tuple[str, ...]
    images: tuple[str, ...]
    masks: tuple[tuple[str, np.ndarray], ...]
    listing: str | None = None
    depth: int = 0
    split: str = "val"
    only_masked: bool = False

    @property
    def layout(self) -> str:
        """The layout in words, for error messages."""
        listing = f" listed in `{self.listing}`" if self.listing else ""
        images = " or ".join(f"`{pattern.format('NAME')}`" for pattern in self.images)
        masks = " or ".join(f"`{pattern.format('NAME')}`" for pattern, _ in self.masks)
        homes = " or ".join(f"`{home}/`" for home in self.homes if home)
        return f"images {images}{listing} and masks {masks}" + (f", in it or in its {homes}" if homes else "")

    def find(self, folder: Path) -> tuple[list[str], list[str], list[str], np.ndarray] | None:
        """Names, paths of images, paths of masks, and the table; `None` if the folder has another layout."""
        for base in (folder / home for home in self.homes):
            for images in self.images:
                names = self.list_names(base, images)
                if self.only_masked:
                    masked = set(self.find_names(base, self.masks[0][0]))
                    names = [name for name in names if name in masked]
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
        """Names of the images from the listing, or of those that the pattern finds."""
        if self.listing is not None:
            listing = base / self.listing
            return read_text(listing).split() if listing.is_file() else []
        return self.find_names(base, images)

    def find_names(self, base: Path, pattern: str) -> list[str]:
        """Names of all files that a pattern finds, sorted."""
        before, after = pattern.split("{}")
        paths = sorted(base.glob(pattern.format("/".join(["*"] * (self.depth + 1)))))
        names = [path.relative_to(base).as_posix()[len(before) : -len(after)] for path in paths]
        return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]  # hidden files


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
    "ade20k-847": Benchmark(
        title="ADE20K-847",
        vocabulary="ade20k-847",
        homes=("", "ADE20K_2021_17_01"),
        images=("images_detectron2/validation/{}.jpg",),
        masks=(
            (
                "annotations_detectron2/validation/{}.tif",
                make_table(range(847), ignored=(WIDE_IGNORE_INDEX,), mask_values=65536),
            ),
        ),
    ),
    "loveda": Benchmark(
        title="LoveDA",
        vocabulary="loveda",
        homes=("", "loveDA"),
        images=("img_dir/val/{}.png",),
        masks=(("ann_dir/val/{}.png", without_zero(7)),),
    ),
}

# MESS: name, title, split, folder, its images and masks, and the vocabulary unless it has the same name
IMAGES, MASKS = "images_detectron2/{split}/{}", "annotations_detectron2/{split}/{}.png"
MESS = (
    ("atlantis", "ATLANTIS", "test", "atlantis", f"{IMAGES}.jpg", MASKS),
    ("bdd100k", "BDD100K", "val", "bdd100k", "images/10k/{split}/{}.jpg", MASKS, "cityscapes"),
    ("chase-db1", "CHASE DB1", "test", "CHASEDB1", f"{IMAGES}.jpg", MASKS),
    (
        "corrosion-cs",
        "Corrosion CS",
        "test",
        "Corrosion Condition State Classification",
        "original/Test/images/{}.jpeg",
        "original/Test/masks/{}.png",
    ),
    ("cryonuseg", "CryoNuSeg", "test", "CryoNuSeg", "images_detectron2/{}.png", "annotations_detectron2/{}.png"),
    ("cub-200", "CUB-200", "test", "CUB_200_2011", f"{IMAGES}.jpg", MASKS),
    ("cwfid", "CWFID", "test", "cwfid", "images/{}_image.png", "annotations_detectron2/{split}/{}_annotation.png"),
    (
        "dark-zurich",
        "Dark Zurich",
        "val",
        "Dark_Zurich",
        "rgb_anon/{split}/night/GOPR0356/{}_rgb_anon.png",
        "annotations_detectron2/{split}/{}_gt_labelIds.png",
    ),
    ("deepcrack", "DeepCrack", "test", "DeepCrack", "test_img/{}.jpg", MASKS),
    ("dram", "DRAM", "test", "DRAM_processed", f"{IMAGES}.jpg", MASKS),
    ("floodnet", "FloodNet", "test", "FloodNet-Supervised_v1.0", f"{IMAGES}.jpg", MASKS),
    (
        "foodseg103",
        "FoodSeg103",
        "test",
        "FoodSeg103",
        "Images/img_dir/{split}/{}.jpg",
        "Images/ann_dir/{split}/{}.png",
    ),
    ("isaid", "iSAID", "val", "isaid", f"{IMAGES}.png", MASKS),
    ("isprs-potsdam", "ISPRS Potsdam", "test", "ISPRS_Potsdam", "images_detectron2/{split}/irrg/{}.png", MASKS),
    ("kvasir-instrument", "Kvasir-Instrument", "test", "kvasir-instrument", f"{IMAGES}.png", MASKS),
    ("mhp-v1", "MHP v1", "test", "LV-MHP-v1", f"{IMAGES}.jpg", MASKS),
    *(
        (
            f"paxray-{part}",
            f"PAXRay-4, {part}",
            "test",
            "paxray_dataset",
            f"{IMAGES}.png",
            f"annotations_detectron2/{{split}}/{part}/{{}}.png",
        )
        for part in ("bones", "diaphragm", "lungs", "mediastinum")
    ),
    ("pst900", "PST900", "test", "PST900_RGBT_Dataset", "{split}/thermal/{}.png", "{split}/labels/{}.png"),
    ("suim", "SUIM", "test", "SUIM", "TEST/images/{}.jpg", MASKS),
    ("uavid", "UAVid", "val", "uavid_v1.5", f"{IMAGES}.png", MASKS),
    ("worldfloods", "WorldFloods", "test", "WorldFloods", "images_detectron2/{split}/irrg/{}.png", MASKS),
    (
        "zerowaste-f",
        "ZeroWaste-f",
        "test",
        "zerowaste-f",
        "splits_final_deblurred/{split}/data/{}.PNG",
        "splits_final_deblurred/{split}/sem_seg/{}.PNG",
    ),
)


def mess_benchmark(
    name: str, title: str, split: str, folder: str, images: str, masks: str, words: str = ""
) -> Benchmark:
    """A set of MESS. Masks hold the numbers of the classes; only images with a mask belong to the split."""
    vocabulary = words or name
    return Benchmark(
        title=title,
        vocabulary=vocabulary,
        homes=("", folder),
        images=(images.replace("{split}", split),),
        masks=((masks.replace("{split}", split), make_table(range(len(vocabulary_lines(vocabulary))))),),
        split=split,
        only_masked=True,
    )


BENCHMARKS |= {entry[0]: mess_benchmark(*entry) for entry in MESS}


def open_benchmark(name: str, folder: str | Path) -> SegmentationSet:
    """
    Open a benchmark: its validation split, or the split that is published for it.

    Args:
        name: one of `BENCHMARKS`.
        folder: folder in which it was unpacked.

    Raises:
        UsageError: there is no benchmark of this name.
        MissingFiles: the folder has another layout, or an image or mask is missing. The message shows the layout.

    Example:

    ```python
    >>> from PIL import Image
    >>> for name, mode, value in (("img_dir", "RGB", 0), ("ann_dir", "L", 4)):
    ...     Path("loveDA", name, "val").mkdir(parents=True)
    ...     Image.new(mode, (8, 6), value).save(f"loveDA/{name}/val/1.png")
    >>> data = open_benchmark("loveda", "loveDA")
    >>> len(data), data.labels[data.read_mask(0)[0, 0]]  # 4 is the fourth class, as 0 is ignored
    (1, 'water')
    ```"""
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
    return SegmentationSet(
        benchmark.title, from_files(images, masks), tuple(names), labels, table, name, benchmark.split
    )
