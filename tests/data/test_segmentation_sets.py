"""Folders of images with masks, and the checks that all segmentation sets share."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from spar_hf.data.segmentation_sets import (
    IGNORE_INDEX,
    check_readable,
    class_label,
    labelled_images,
    open_folder,
    readable_name,
    table_of_lines,
)
from spar_hf.data.sources import list_images
from spar_hf.model.prompts import Vocabulary
from spar_hf.utils.errors import MissingFiles, UsageError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def folder(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    for name in ("b_1", "a_2", "a_1"):
        Image.new("RGB", (8, 6)).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(np.full((6, 8), 1, np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def test_images_are_sorted_and_filtered(folder):
    opened = open_folder(folder)
    assert opened.labels == ("sky", "road") and opened.names == ("a_1", "a_2", "b_1")
    for chosen in (opened.filter(exclude=["b_*"]), open_folder(folder, exclude=["b_*"])):
        assert chosen.names == ("a_1", "a_2") and len(chosen) == 2
    for chosen in (opened.filter(include=["b_*"]), open_folder(folder, include=["b_*"])):
        assert chosen.names == ("b_1",) and chosen.file(0) == str(folder / "images" / "b_1.jpg")
    assert opened.select([2, 0]).names == ("b_1", "a_1")
    assert len(list_images(folder / "images")) == 3


def test_splits_share_the_classes_of_their_parent(folder):
    split = folder / "train"
    split.mkdir()
    for part in ("images", "masks"):
        (folder / part).rename(split / part)
    opened = open_folder(split)
    assert opened.labels == ("sky", "road")
    assert (opened.source, opened.split) == (folder.name, "train")


def test_what_is_missing_is_named(folder):
    (folder / "masks" / "a_1.png").unlink()
    with pytest.raises(MissingFiles, match=r"a_1\.jpg has no mask"):
        open_folder(folder)
    assert len(open_folder(folder, exclude=["a_1"])) == 2  # an excluded image needs no mask
    for opened in (lambda: open_folder(folder, include=["zzz"]), lambda: open_folder(folder, exclude=["*"])):
        with pytest.raises(MissingFiles, match="--include"):
            opened()
    with pytest.raises(MissingFiles, match="--include"):
        open_folder(folder, exclude=["a_1"]).filter(include=["zzz"])
    with pytest.raises(MissingFiles, match="must hold `images/`"):
        open_folder(folder / "images")
    with pytest.raises(MissingFiles, match="is no folder"):
        list_images(folder / "nowhere")


def test_two_images_of_one_stem_are_refused(folder):
    Image.new("RGB", (8, 6)).save(folder / "images" / "a_1.png")
    with pytest.raises(UsageError, match=r"a_1\.jpg and .*a_1\.png would share the mask"):
        open_folder(folder)


def test_images_of_one_stem_in_two_folders_are_refused(folder):
    """They are no neighbours in the sorted list: x/a_1, x/a_2, y/a_1."""
    for name in ("x/a_1", "x/a_2", "y/a_1"):
        (folder / "images" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / "images" / f"{name}.jpg")
    for name in ("a_1", "a_2", "b_1"):
        (folder / "images" / f"{name}.jpg").unlink()
    with pytest.raises(UsageError, match=r"x/a_1\.jpg and .*y/a_1\.jpg would share the mask"):
        open_folder(folder)
    assert open_folder(folder, exclude=["a_1"]).names == ("a_2",)


def test_an_empty_line_among_the_classes_is_refused(folder):
    """Skipping it would give all later classes another mask value."""
    (folder / "classes.txt").write_text("sky\n\nroad\n")
    with pytest.raises(UsageError, match=r"Line 2 of .*classes\.txt is empty"):
        open_folder(folder)
    (folder / "classes.txt").write_text("# streets\nsky\nroad\n")
    with pytest.raises(UsageError, match=r"Line 1 of .*classes\.txt begins with #"):
        open_folder(folder)
    (folder / "classes.txt").write_text("sky\nroad\n\n")
    assert open_folder(folder).labels == ("sky", "road")


def test_a_class_that_stands_twice_is_refused(folder):
    """Scores by name would keep one of the two. Where lines are read as words, they are one class."""
    (folder / "classes.txt").write_text("sky\nroad\nsky\n")
    with pytest.raises(UsageError, match=r"Lines 1 and 3 of .*classes\.txt are one class, 'sky'"):
        open_folder(folder)
    assert open_folder(folder, readable=True).labels == ("sky", "road")


def test_labelled_images_are_those_with_a_pixel_that_counts(folder):
    opened = open_folder(folder)
    Image.new("L", (8, 6), IGNORE_INDEX).save(folder / "masks" / "a_2.png")
    accelerator = Accelerator(cpu=True)
    assert labelled_images(opened, accelerator).names == ("a_1", "b_1")
    assert check_readable(opened, accelerator) == [0, 2]
    with pytest.raises(UsageError, match=r"No pixel .* belongs to a class: all are ignored \(255\)"):
        labelled_images(opened.select([1]), accelerator)
    Image.new("RGB", (8, 1)).save(folder / "images" / "b_1.jpg")
    Image.new("L", (8, 1)).save(folder / "masks" / "b_1.png")
    with pytest.raises(UsageError, match=r"b_1 has 1×8 pixels .*--exclude"):
        check_readable(opened, accelerator)


def grey_png(rows, bits):
    """A grey PNG of 2 or 4 bits, which Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = ["".join(f"{value:0{bits}b}" for value in row) for row in rows]
    packed = b"".join(
        b"\0" + int(line.ljust(-(-len(line) // 8) * 8, "0"), 2).to_bytes(-(-len(line) // 8), "big") for line in lines
    )
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")


def test_masks_are_class_numbers_also_from_palettes(folder):
    path, opened = folder / "masks" / "a_1.png", open_folder(folder)
    palette = Image.fromarray(np.array([[0, 1], [255, 1]], np.uint8))
    palette.putpalette([7] * 768)
    palette.save(path)
    assert opened.read_mask(0).tolist() == [[0, 1], [255, 1]]
    Image.fromarray(np.array([[0, 1], [255, 1]], np.uint16)).save(path)
    assert opened.read_mask(0).tolist() == [[0, 1], [255, 1]]
    for bits in (2, 4):  # which Pillow stretches to 0-255
        path.write_bytes(grey_png([[0, 1], [1, 0]], bits))
        assert opened.read_mask(0).tolist() == [[0, 1], [1, 0]]
    for wrong, message in ((Image.new("RGB", (2, 2)), "mode L or P"), (Image.new("L", (2, 2), 2), r"the values \[2\]")):
        wrong.save(path)
        with pytest.raises(UsageError, match=message):
            opened.read_mask(0)
    path.write_bytes(b"damaged")
    with pytest.raises(UsageError, match="Cannot read a_1"):
        opened.read_mask(0)


def test_images_and_masks_are_turned_alike(folder):
    """A camera stores an image on its side and says so; a labelling tool may copy that to the mask."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (8, 6)).save(folder / "images" / "a_1.jpg", exif=exif)
    Image.fromarray(np.array([[0, 1, 1, 1, 1, 1, 1, 1]] * 6, np.uint8)).save(folder / "masks" / "a_1.png", exif=exif)
    image, mask = open_folder(folder).read(0)
    assert image.size == (6, 8) and mask.shape == (8, 6)
    assert mask[0].tolist() == [0] * 6 and (mask[1:] == 1).all()


def test_stamp_changes_with_files(folder):
    opened = open_folder(folder)
    stamp = opened.stamp
    assert open_folder(folder).stamp == stamp != opened.select([0]).stamp
    os.utime(folder / "masks" / "a_2.png", (0, 0))
    assert open_folder(folder).stamp != stamp


@pytest.mark.parametrize(
    ("name", "words"),
    [("floor-other-merged", "floor"), ("door-stuff", "door"), ("wall-brick", "wall brick"), ("Sign Symbol", "sign symbol"),
     ("great_white_shark", "great white shark"), ("t-shirt", "t shirt")],
)  # fmt: skip
def test_readable_names(name, words):
    assert readable_name(name) == words


def test_readable_labels__lines_that_read_alike_are_one_class(folder):
    (folder / "classes.txt").write_text("wall-merged\nnull\nwall-other\n")
    opened = open_folder(folder, readable=True)
    assert opened.labels == ("wall", "background") and opened.table[:3].tolist() == [0, 1, 0]
    with pytest.raises(UsageError, match="256 classes"):
        table_of_lines([str(i) for i in range(256)])


def test_classes_are_merged_in_the_order_of_the_file(folder):
    (folder / "classes.txt").write_text("sky\nroad\nkerb\ncar\n")
    values = np.array([[0, 1, 2, 3, 255, 0]] * 6 + [[3, 3, 3, 1, 1, 2]] * 2, np.uint8).T
    Image.fromarray(values).save(folder / "masks" / "a_1.png")
    (folder / "merged.json").write_text('{"ground": ["kerb", "road"], "car": ["car"]}')
    opened = open_folder(folder, classes=folder / "merged.json")
    assert opened.labels == ("ground", "car")
    number = {0: 255, 1: 0, 2: 0, 3: 1, 255: 255}
    labels = opened.read_mask(0, (6, 8))
    assert labels.dtype == np.uint8 and labels.tolist() == [[number[v] for v in row] for row in values.tolist()]
    np.testing.assert_array_equal(open_folder(folder).read_mask(0, (6, 8)), values)
    with pytest.raises(UsageError, match=r"6×8 pixels .*its image 8×6"):
        opened.read_mask(0, (8, 6))
    (folder / "classes.txt").write_text("road\nkerb\ncar\n")
    with pytest.raises(UsageError, match=r"the values \[3\]"):
        open_folder(folder, classes=folder / "merged.json").read_mask(0, (6, 8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["sky", "tree"]}', "tree: not among the 2 lines"),
        ('{"a": ["sky"], "b": ["road", "sky"]}', "sky: named more than once"),
        ('{"a": "sky"}', "must hold {class:"),
        ("[]", "must hold {class:"),
        ("sky", "is not JSON"),
    ],
)
def test_classes_that_cannot_be_merged_are_named(folder, text, message):
    (folder / "merged.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        open_folder(folder, classes=folder / "merged.json")


def test_supercategories_of_coco__the_first_twelve_are_its_things():
    file = Path(__file__).parents[2] / "training" / "configs" / "coco_supercategories.json"
    groups = [[readable_name(name) for name in group] for group in json.loads(file.read_text()).values()]
    things, stuff = ([name for group in part for name in group] for part in (groups[:12], groups[12:]))
    assert sorted(things) == sorted({*Vocabulary.parse("coco-object").labels} - {"background"})
    assert (len(groups), len(things), len(stuff)) == (27, 80, 53)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there: real images with masks")
@pytest.mark.parametrize("name", ["camvid/val", "coco", "clothing"])
def test_real_folders(name):
    data = open_folder(SHARED / name, readable=True)
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
    assert (reference[mask == IGNORE_INDEX] == IGNORE_INDEX).all()
    for value in np.unique(mask[mask != IGNORE_INDEX]):
        (label,) = np.unique(reference[mask == value])
        assert class_label(lines[value]) == data.labels[label]
