"""Readers of data sets on small fabricated copies of their layouts, and on real images where they are at hand."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from spar_hf.data import benchmarks
from spar_hf.data.benchmarks import open_benchmark, open_folder, open_hugging_face
from spar_hf.evaluation.options import Options, build_vocabulary, choose_images, open_set
from spar_hf.model.prompts import Vocabulary

VOID = 255
SHARED = Path(__file__).parents[3] / "shared" / "data"
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
    for name in (*names, "2007_000001"):  # the last one is no photo of the split
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


# mask values -> labels by hand; None is void
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_benchmark_labels_void_and_background(layout, tmp_path):
    name, make, values = LAYOUTS[layout]
    make(tmp_path, list(values))
    data = open_benchmark(name, tmp_path)
    assert len(data) == 2 and list(data.images.features) == ["image", "mask"]
    image, reference = data.read(1)
    assert image.mode == "RGB" and image.size == (len(values), 1)
    labels = [None if label == VOID else data.labels[label] for label in reference[0]]
    assert labels == list(values.values())


def test_benchmark_classes_are_those_of_the_literature():
    sizes = {name: len(Vocabulary.parse(entry.vocabulary).labels) for name, entry in benchmarks.BENCHMARKS.items()}
    assert sizes == {
        **{"voc21": 21, "voc20": 20, "context60": 60, "context59": 59},
        **{"coco-object": 81, "coco-stuff": 171, "cityscapes": 19, "ade20k": 150},
    }
    for name, entry in benchmarks.BENCHMARKS.items():
        for _, table in entry.masks:  # every class has a mask value, and no value leads past the classes
            assert set(table.tolist()) - {VOID, benchmarks.UNKNOWN} == set(range(sizes[name])), name


def test_benchmark__published_words_keep_the_labels(tmp_path):
    make_voc(tmp_path, [0, 1, 20])
    data = open_benchmark("voc21", tmp_path)
    vocabulary, same = build_vocabulary(data, Options(dataset="", model=[]), "voc21-spar")
    assert vocabulary.labels == data.labels == same.labels
    assert vocabulary.names[0][:2] == ("sky", "wall") and vocabulary.names[4] == ("ship",)
    assert "person in dress" in vocabulary.names[15]
    np.testing.assert_array_equal(same.table, data.table)
    with pytest.raises(ValueError, match="20 classes, but PASCAL VOC 2012 has 21"):
        build_vocabulary(data, Options(dataset="", model=[]), "voc20")


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_benchmark__another_layout_is_refused_with_the_one_expected(name, tmp_path):
    (tmp_path / "images").mkdir()
    pattern = benchmarks.BENCHMARKS[name].masks[0][0].format("NAME")
    with pytest.raises(FileNotFoundError, match="as expected: images") as error:
        open_benchmark(name, tmp_path)
    assert pattern in str(error.value)


def test_benchmark__errors(tmp_path, monkeypatch):
    make_ade(tmp_path, [0, 1, 151])
    with pytest.raises(ValueError, match=r"ADE_val_00000001 holds the values \[151\], which ADE20K \(150 classes\)"):
        open_benchmark("ade20k", tmp_path).read(0)
    (tmp_path / "annotations" / "validation" / "ADE_val_00000002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files of ADE20K are missing, the first is .*00000002\.png"):
        open_benchmark("ade20k", tmp_path)
    (tmp_path / "images" / "validation" / "ADE_val_00000001.jpg").write_bytes(b"no image")
    save_mask(tmp_path / "annotations" / "validation" / "ADE_val_00000002.png", [1])
    with pytest.raises(ValueError, match="Cannot read ADE_val_00000001 of ade20k"):
        open_benchmark("ade20k", tmp_path).read(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # ADE_val_00000002.jpg has three: more than twice as many
    with pytest.raises(
        ValueError, match=r"Cannot read ADE_val_00000002 of ade20k \(DecompressionBombError: .*leave it out"
    ):
        open_benchmark("ade20k", tmp_path).read(1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no benchmark 'voc'; use one of voc21"):
        open_benchmark("voc", tmp_path)
    with pytest.raises(ValueError, match=r"--split.* are for Hugging Face data sets"):
        open_set(Options(dataset=str(tmp_path), model=[], benchmark="ade20k", split="val"))


def hugging_face_rows(folder, values):
    rows = {"image": [], "label": []}
    for i, row in enumerate(values):
        save_image(folder / f"{i}.png", len(row), brightness=10 * i)
        save_mask(folder / f"{i}_mask.png", row)
        rows["image"].append(str(folder / f"{i}.png"))
        rows["label"].append(str(folder / f"{i}_mask.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    return datasets.Dataset.from_dict(rows, features=features)


def test_hugging_face_data_sets_from_disk_and_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = hugging_face_rows(tmp_path / "files", [[0, 1, 2], [0, 2, 7], [1, 1, 255]])
    datasets.DatasetDict({"validation": rows, "train": rows.select([0])}).save_to_disk(tmp_path / "disk")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "validation.parquet")
    columns = {"image_column": "image", "mask_column": "label"}
    for folder in ("disk", "parquet"):
        path = str(tmp_path / folder)
        data = open_hugging_face(path, ["Cat", "tree-merged", "dog"], "validation", ignore_index=7, **columns)
        assert data.labels == ("cat", "tree", "dog") and len(data) == 3
        assert [data.read(i)[1].tolist() for i in range(3)] == [[[0, 1, 2]], [[0, 2, VOID]], [[1, 1, VOID]]]
        assert data.read(2)[0].getpixel((0, 0)) == (20, 0, 0)
    data = open_hugging_face(path, ["tree", "dog"], reduce_zero_label=True, **columns)
    assert data.read(0)[1].tolist() == [[VOID, 0, 1]]
    with pytest.raises(ValueError, match=r"holds the values \[7\]"):
        data.read(1)
    with pytest.raises(ValueError, match="the splits validation, train"):
        open_hugging_face(str(tmp_path / "disk"), ["tree"], **columns)
    for wrong in (65535, -100):
        with pytest.raises(ValueError, match=f"--ignore_index {wrong}: masks hold the values 0 to 255"):
            open_hugging_face(path, ["tree"], ignore_index=wrong, **columns)
    with pytest.raises(ValueError, match="images are image, label: name two with --image_column"):
        open_hugging_face(path, ["tree"])


def test_subset_and_split_are_those_that_were_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, lines = tmp_path / "streets", ["---", "configs:"]
    for subset, values in (("rain", [0, 1]), ("snow", [1, 1, 0])):
        (folder / subset).mkdir(parents=True)
        rows = hugging_face_rows(tmp_path / subset, [values])
        rows.to_parquet(folder / subset / "test-00000-of-00001.parquet")
        lines += [f"- config_name: {subset}", f"  data_files: {subset}/*.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---"]))
    (tmp_path / "names.txt").write_text("road\nsky\n")
    given = {"model": [], "image_column": "image", "mask_column": "label", "classes": str(tmp_path / "names.txt")}
    given["dataset"] = str(folder)
    for subset, expected in (("rain", [[0, 1]]), ("snow", [[1, 1, 0]])):
        data = choose_images(Options(**given, subset=subset))
        assert data.read(0)[1].tolist() == expected
        assert (build_vocabulary(data, Options(**given))[1].subset, data.split) == (subset, "train")
    for wrong in (None, "fog"):
        with pytest.raises(ValueError, match=rf"rain.*snow.*by --subset \(now {wrong}\)"):
            open_set(Options(**given, subset=wrong))
    # of a folder with one split the name is known, and no other is taken for it
    datasets.load_dataset(str(folder), "rain", split="train").save_to_disk(tmp_path / "disk")
    given["dataset"] = str(tmp_path / "disk")
    assert open_set(Options(**given)).split == open_set(Options(**given, split="train")).split == "train"
    with pytest.raises(ValueError, match="holds the split train alone, not validation: leave --split out"):
        open_set(Options(**given, split="validation"))
    with pytest.raises(ValueError, match="leave --subset rain out"):
        open_set(Options(**given, subset="rain"))


def test_hugging_face_data_set_by_options(tmp_path):
    hugging_face_rows(tmp_path / "files", [[0, 1, 2], [2, 1, 0]]).save_to_disk(tmp_path / "disk")
    (tmp_path / "names.txt").write_text("cat\ntree\ndog\n")
    given = {"dataset": str(tmp_path / "disk"), "model": [], "image_column": "image", "mask_column": "label"}
    data = choose_images(Options(**given, classes=str(tmp_path / "names.txt"), include=["row1"]))
    assert data.names == ("row1",) and data.read(0)[1].tolist() == [[2, 1, 0]]
    assert len(open_set(Options(**given, vocabulary="cityscapes")).labels) == 19
    with pytest.raises(ValueError, match="--classes FILE or --vocabulary NAME"):
        open_set(Options(**given))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there: real images with masks")
@pytest.mark.parametrize("name", ["camvid/val", "coco", "clothing"])
def test_real_folders(name):
    data = open_folder(SHARED / name)
    lines = [
        line.strip()
        for line in next(
            path for path in (SHARED / name / "classes.txt", SHARED / name / ".." / "classes.txt") if path.is_file()
        )
        .read_text()
        .splitlines()
    ]
    image, reference = data.read(3)
    path = sorted((SHARED / name / "images").iterdir())[3]
    assert data.names[3] == path.stem
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))
    mask = np.asarray(Image.open(SHARED / name / "masks" / f"{path.stem}.png"))
    assert (reference[mask == VOID] == VOID).all()
    for value in np.unique(mask[mask != VOID]):
        (label,) = np.unique(reference[mask == value])
        assert benchmarks.class_label(lines[value]) == data.labels[label]
