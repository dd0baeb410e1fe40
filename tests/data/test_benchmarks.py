"""Published benchmarks, on small copies of their layouts with masks made by hand."""

import numpy as np
import pytest
from PIL import Image

from spar_hf.data.benchmarks import BENCHMARKS, open_benchmark
from spar_hf.data.segmentation_sets import IGNORE_INDEX, INVALID
from spar_hf.model.prompts import Vocabulary
from spar_hf.utils.errors import MissingFiles, UsageError

PALETTE = [value for i in range(256) for value in (i, 255 - i, 7 * i % 256)]


def save_mask(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(np.array([values], np.uint8))
    if palette:
        mask.putpalette(PALETTE)
    mask.save(path)


def save_image(path, width, brightness=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 1), (brightness, 0, 0)).save(path, quality=95)


def listing(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def make_voc(root, values, masks="SegmentationClass", split="Segmentation", names=("2007_000033", "2007_000042")):
    listing(root / "ImageSets" / split / "val.txt", names)
    for name in (*names, "2007_000001"):  # the last one does not belong to the split
        save_image(root / "JPEGImages" / f"{name}.jpg", len(values))
        save_mask(root / masks / f"{name}.png", values, palette=True)


def make_coco(root, values, suffix, masks="annotations", images="images/val2017"):
    for name in ("000000000139", "000000000285"):
        save_image(root / images / f"{name}.jpg", len(values))
        save_mask(root / masks / "val2017" / f"{name}{suffix}.png", values)


def make_cityscapes(root, values, suffix):
    for city, frame in (("frankfurt", "frankfurt_000000_000294"), ("munster", "munster_000000_000019")):
        save_image(root / "leftImg8bit" / "val" / city / f"{frame}_leftImg8bit.png", len(values))
        save_mask(root / "gtFine" / "val" / city / f"{frame}_gtFine_{suffix}.png", values)
        save_mask(root / "gtFine" / "val" / city / f"{frame}_gtFine_instanceIds.png", values)


def make_ade(root, values):
    for name in ("ADE_val_00000001", "ADE_val_00000002"):
        save_image(root / "images" / "validation" / f"{name}.jpg", len(values))
        save_mask(root / "annotations" / "validation" / f"{name}.png", values)


# mask values -> labels, written by hand; None is ignored
VOC21 = {0: "background", 1: "aeroplane", 5: "bottle", 11: "dining table", 20: "tv monitor", 255: None}
VOC20 = VOC21 | {0: None}
CONTEXT60 = {0: "background", 1: "aeroplane", 2: "bag", 41: "road", 59: "wood", 255: None}
COCO_RAW = {0: "person", 9: "traffic light", 12: "stop sign", 89: "toothbrush", 91: "banner", 181: "wood", 255: None}
COCO_IDS = {0: "person", 9: "traffic light", 11: "stop sign", 79: "toothbrush", 80: "banner", 170: "wood", 255: None}
STUFF = ("banner", "wood", None)  # background for COCO-Object, and unlabelled pixels with it
OBJECTS = {0: "background", 1: "person", 10: "traffic light", 12: "stop sign", 80: "toothbrush", 255: None}
CITYSCAPES = {0: "road", 1: "sidewalk", 8: "vegetation", 13: "car", 18: "bicycle", 255: None}
CITYSCAPES_IDS = {
    **{7: "road", 8: "sidewalk", 11: "building", 17: "pole", 19: "traffic light", 21: "vegetation", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 33: "bicycle"},
    **dict.fromkeys((0, 1, 5, 6, 9, 14, 18, 29, 30, 255)),
}
ADE = {0: None, 1: "wall", 2: "building", 13: "person", 150: "flag"}


def as_objects(values):
    return {value: "background" if label in STUFF else label for value, label in values.items()}


LAYOUTS = {
    "voc21": ("voc21", lambda root, v: make_voc(root / "VOCdevkit" / "VOC2012", v), VOC21),
    "voc20": ("voc20", lambda root, v: make_voc(root, v), VOC20),
    "context60": (
        "context60",
        lambda root, v: make_voc(root / "VOC2010", v, "SegmentationClassContext", "SegmentationContext"),
        CONTEXT60,
    ),
    "context59": (
        "context59",
        lambda root, v: make_voc(root, v, "SegmentationClassContext", "SegmentationContext"),
        CONTEXT60 | {0: None},
    ),
    "object": ("coco-object", lambda root, v: make_coco(root, v, "_instanceTrainIds"), OBJECTS),
    "object from stuff": ("coco-object", lambda root, v: make_coco(root, v, "_labelTrainIds"), as_objects(COCO_IDS)),
    "object from raw": ("coco-object", lambda root, v: make_coco(root, v, "", "stuffthingmaps"), as_objects(COCO_RAW)),
    "stuff": ("coco-stuff", lambda root, v: make_coco(root / "coco_stuff164k", v, "_labelTrainIds"), COCO_IDS),
    "stuff from raw": (
        "coco-stuff",
        lambda root, v: make_coco(root, v, "", "stuffthingmaps", images="val2017"),
        COCO_RAW,
    ),
    "cityscapes": ("cityscapes", lambda root, v: make_cityscapes(root, v, "labelTrainIds"), CITYSCAPES),
    "cityscapes ids": ("cityscapes", lambda root, v: make_cityscapes(root, v, "labelIds"), CITYSCAPES_IDS),
    "ade20k": ("ade20k", lambda root, v: make_ade(root / "ADEChallengeData2016", v), ADE),
}


# MESS, written down from its code: classes, image, mask, first and last class
MESS = {
    "atlantis": (
        56,
        "atlantis/images_detectron2/test/1.jpg",
        "atlantis/annotations_detectron2/test/1.png",
        "bicycle",
        "wetland",
    ),
    "bdd100k": (19, "bdd100k/images/10k/val/a-1.jpg", "bdd100k/annotations_detectron2/val/a-1.png", "road", "bicycle"),
    "chase-db1": (
        *(2, "CHASEDB1/images_detectron2/test/Image_11L.jpg", "CHASEDB1/annotations_detectron2/test/Image_11L.png"),
        *("others", "blood vessels"),
    ),
    "corrosion-cs": (
        *(4, "Corrosion Condition State Classification/original/Test/images/1.jpeg"),
        *(
            "Corrosion Condition State Classification/original/Test/masks/1.png",
            "others",
            "steel with severe corrosion",
        ),
    ),
    "cryonuseg": (
        2,
        "CryoNuSeg/images_detectron2/1.png",
        "CryoNuSeg/annotations_detectron2/1.png",
        "others",
        "nuclei in cells",
    ),
    "cub-200": (
        *(201, "CUB_200_2011/images_detectron2/test/1.jpg", "CUB_200_2011/annotations_detectron2/test/1.png"),
        *("background", "Common Yellowthroat"),
    ),
    "cwfid": (
        3,
        "cwfid/images/001_image.png",
        "cwfid/annotations_detectron2/test/001_annotation.png",
        "ground",
        "weed",
    ),
    "dark-zurich": (
        *(20, "Dark_Zurich/rgb_anon/val/night/GOPR0356/G_1_rgb_anon.png"),
        *("Dark_Zurich/annotations_detectron2/val/G_1_gt_labelIds.png", "unlabeled", "bicycle"),
    ),
    "deepcrack": (
        *(2, "DeepCrack/test_img/1.jpg", "DeepCrack/annotations_detectron2/test/1.png", "concrete or asphalt", "crack"),
    ),
    "dram": (
        12,
        "DRAM_processed/images_detectron2/test/a_1.jpg",
        "DRAM_processed/annotations_detectron2/test/a_1.png",
        "bird",
        "background",
    ),
    "floodnet": (
        *(10, "FloodNet-Supervised_v1.0/images_detectron2/test/1.jpg"),
        *("FloodNet-Supervised_v1.0/annotations_detectron2/test/1.png", "background", "grass"),
    ),
    "foodseg103": (
        104,
        "FoodSeg103/Images/img_dir/test/1.jpg",
        "FoodSeg103/Images/ann_dir/test/1.png",
        "background",
        "other ingredients",
    ),
    "isaid": (16, "isaid/images_detectron2/val/1.png", "isaid/annotations_detectron2/val/1.png", "others", "pier"),
    "isprs-potsdam": (
        *(6, "ISPRS_Potsdam/images_detectron2/test/irrg/1.png", "ISPRS_Potsdam/annotations_detectron2/test/1.png"),
        *("road", "others"),
    ),
    "kvasir-instrument": (
        *(2, "kvasir-instrument/images_detectron2/test/1.png", "kvasir-instrument/annotations_detectron2/test/1.png"),
        *("others", "tool"),
    ),
    "mhp-v1": (
        19,
        "LV-MHP-v1/images_detectron2/test/1.jpg",
        "LV-MHP-v1/annotations_detectron2/test/1.png",
        "others",
        "torso skin",
    ),
    **{
        f"paxray-{part}": (
            *(
                2,
                "paxray_dataset/images_detectron2/test/1.png",
                f"paxray_dataset/annotations_detectron2/test/{part}/1.png",
            ),
            *("others", word),
        )
        for part, word in {
            "lungs": "lung",
            "mediastinum": "mediastinum",
            "bones": "bones",
            "diaphragm": "diaphragm",
        }.items()
    },
    "pst900": (
        5,
        "PST900_RGBT_Dataset/test/thermal/1.png",
        "PST900_RGBT_Dataset/test/labels/1.png",
        "background",
        "human",
    ),
    "suim": (
        8,
        "SUIM/TEST/images/1.jpg",
        "SUIM/annotations_detectron2/test/1.png",
        "background (waterbody)",
        "sea-floor and rocks",
    ),
    "uavid": (
        8,
        "uavid_v1.5/images_detectron2/val/1.png",
        "uavid_v1.5/annotations_detectron2/val/1.png",
        "others",
        "humans",
    ),
    "worldfloods": (
        3,
        "WorldFloods/images_detectron2/test/irrg/1.png",
        "WorldFloods/annotations_detectron2/test/1.png",
        "land",
        "cloud",
    ),
    "zerowaste-f": (
        *(
            5,
            "zerowaste-f/splits_final_deblurred/test/data/1.PNG",
            "zerowaste-f/splits_final_deblurred/test/sem_seg/1.PNG",
        ),
        *("background or trash", "soft plastic"),
    ),
}
MESS_CLASSES = {name: entry[0] for name, entry in MESS.items()}


@pytest.mark.parametrize("name", MESS)
def test_sets_of_mess(name, tmp_path):
    classes, image, mask, first, last = MESS[name]
    values = [0, classes - 1, 255]
    save_image(tmp_path / image, len(values))
    save_mask(tmp_path / mask, values)
    other = (tmp_path / image).parent / image.rsplit("/", 1)[1].replace("1", "2", 1)
    save_image(other, len(values))  # without a mask: of another split
    for folder in (tmp_path, tmp_path / image.split("/")[0]):
        data = open_benchmark(name, folder)
        assert len(data) == 1 and data.split == ("val" if "/val/" in image else "test") and data.source == name
        _, reference = data.read(0)
        assert reference[0].tolist() == [0, classes - 1, IGNORE_INDEX]
        assert (data.labels[0], data.labels[-1], len(data.labels)) == (first, last, classes)
    save_mask(tmp_path / mask, [classes, 0, 0])
    with pytest.raises(UsageError, match=rf"holds the values \[{classes}\]"):
        open_benchmark(name, tmp_path).read(0)


def test_ade20k_847_has_masks_of_16_bits(tmp_path):
    base = tmp_path / "ADE20K_2021_17_01"
    save_image(base / "images_detectron2" / "validation" / "ADE_val_00000001.jpg", 4)
    mask = base / "annotations_detectron2" / "validation" / "ADE_val_00000001.tif"
    mask.parent.mkdir(parents=True)
    Image.fromarray(np.array([[0, 255, 846, 65535]], np.uint16)).save(mask)
    data = open_benchmark("ade20k-847", tmp_path)
    _, reference = data.read(0)
    assert reference.dtype == np.uint16 and reference[0].tolist() == [0, 255, 846, 65535]
    assert data.ignore_index == 65535 and data.labels[846] == "adding machine" and data.labels[1] == "building"
    Image.fromarray(np.array([[0, 847, 1, 1]], np.uint16)).save(mask)
    with pytest.raises(UsageError, match=r"holds the values \[847\].*\(65535\)"):
        data.read(0)


def make_loveda(root, values):
    for name in ("2522", "2523"):
        save_image(root / "img_dir" / "val" / f"{name}.png", len(values))
        save_mask(root / "ann_dir" / "val" / f"{name}.png", values)


LOVEDA = {0: None, 1: "background", 2: "building", 7: "agricultural", 255: None}
LAYOUTS["loveda"] = ("loveda", lambda root, v: make_loveda(root / "loveDA", v), LOVEDA)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_ignored_pixels_and_background(layout, tmp_path):
    name, make, values = LAYOUTS[layout]
    make(tmp_path, list(values))
    data = open_benchmark(name, tmp_path)
    assert len(data) == 2 and list(data.rows.features) == ["image", "mask"]
    image, reference = data.read(1)
    assert image.mode == "RGB" and image.size == (len(values), 1)
    labels = [None if label == IGNORE_INDEX else data.labels[label] for label in reference[0]]
    assert labels == list(values.values())


def test_classes_are_those_of_the_literature():
    sizes = {name: len(Vocabulary.parse(entry.vocabulary).labels) for name, entry in BENCHMARKS.items()}
    assert sizes == {
        **{"voc21": 21, "voc20": 20, "context60": 60, "context59": 59},
        **{"coco-object": 81, "coco-stuff": 171, "cityscapes": 19, "ade20k": 150, "ade20k-847": 847, "loveda": 7},
        **MESS_CLASSES,
    }
    assert len(MESS_CLASSES) == 22 + 3  # PAXRay-4 is read as four sets
    for name, entry in BENCHMARKS.items():
        ignored = 65535 if name == "ade20k-847" else IGNORE_INDEX
        for _, table in entry.masks:  # every class has a mask value, and no value leads past the classes
            assert set(table.tolist()) - {ignored, INVALID} == set(range(sizes[name])), name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_another_layout_is_refused_with_the_expected_one(name, tmp_path):
    (tmp_path / "images").mkdir()
    pattern = BENCHMARKS[name].masks[0][0].format("NAME")
    with pytest.raises(MissingFiles, match="as expected: images") as error:
        open_benchmark(name, tmp_path)
    assert pattern in str(error.value)


def test_errors(tmp_path, monkeypatch):
    make_ade(tmp_path, [0, 1, 151])
    with pytest.raises(UsageError, match=r"ADE_val_00000001 holds the values \[151\], which ADE20K \(150 classes\)"):
        open_benchmark("ade20k", tmp_path).read(0)
    (tmp_path / "annotations" / "validation" / "ADE_val_00000002.png").unlink()
    with pytest.raises(MissingFiles, match=r"1 files of ADE20K are missing, the first is .*00000002\.png"):
        open_benchmark("ade20k", tmp_path)
    (tmp_path / "images" / "validation" / "ADE_val_00000001.jpg").write_bytes(b"no image")
    save_mask(tmp_path / "annotations" / "validation" / "ADE_val_00000002.png", [1])
    with pytest.raises(UsageError, match="Cannot read ADE_val_00000001 of ade20k"):
        open_benchmark("ade20k", tmp_path).read(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # ADE_val_00000002.jpg has three: more than twice as many
    with pytest.raises(UsageError, match=r"Cannot read ADE_val_00000002 of ade20k .*MAX_IMAGE_PIXELS.*--exclude"):
        open_benchmark("ade20k", tmp_path).read(1)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="no benchmark 'voc'; use one of voc21"):
        open_benchmark("voc", tmp_path)
