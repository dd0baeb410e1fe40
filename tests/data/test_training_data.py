"""Folder layouts of the training scripts, and the order of images."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from spar_hf.data import segmentation_sets as data
from spar_hf.data.segmentation_sets import (
    ShuffledStream,
    check_pairs,
    list_images,
    open_segmentation_folder,
    read_mask,
    readable_name,
)
from spar_hf.model.prompts import Vocabulary


@pytest.fixture
def folder(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    for name in ("b_1", "a_2", "a_1"):
        Image.new("RGB", (8, 6)).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(np.full((6, 8), 1, np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def test_opens_sorted_and_filtered(folder):
    opened = open_segmentation_folder(folder, exclude=["b_*"])
    assert opened.classes == ("sky", "road")
    assert [image.stem for image, _ in opened.pairs] == ["a_1", "a_2"]
    assert [image.stem for image, _ in open_segmentation_folder(folder, include="b_*").pairs] == ["b_1"]
    assert len(list_images(folder / "images")) == 3


def test_splits_share_the_parents_classes(folder):
    split = folder / "train"
    split.mkdir()
    for part in ("images", "masks"):
        (folder / part).rename(split / part)
    assert open_segmentation_folder(split).classes == ("sky", "road")


def test_what_is_missing_is_named(folder):
    (folder / "masks" / "a_1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a_1\.jpg has no mask"):
        open_segmentation_folder(folder)
    with pytest.raises(FileNotFoundError, match="No image"):
        open_segmentation_folder(folder, include="zzz")
    with pytest.raises(FileNotFoundError, match="must hold `images/`"):
        open_segmentation_folder(folder / "images")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        list_images(folder / "nowhere")


def test_an_empty_line_among_the_classes_is_refused(folder):
    """Passed over, it would give all later classes another mask value."""
    (folder / "classes.txt").write_text("sky\n\nroad\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*classes\.txt is empty"):
        open_segmentation_folder(folder)
    (folder / "classes.txt").write_text("sky\nroad\n\n")
    assert open_segmentation_folder(folder).classes == ("sky", "road")


def test_checked_pairs_are_those_with_a_label(folder):
    opened = open_segmentation_folder(folder)
    Image.new("L", (8, 6), 255).save(folder / "masks" / "a_2.png")
    found = check_pairs(opened, opened.pairs, Accelerator(cpu=True))
    assert [image.stem for image, _ in found] == ["a_1", "b_1"]
    with pytest.raises(ValueError, match="are void"):
        check_pairs(opened, opened.pairs[1:2], Accelerator(cpu=True))


def test_masks_are_class_numbers_also_from_palettes(folder):
    path = folder / "masks" / "a_1.png"
    palette = Image.fromarray(np.array([[0, 3], [255, 1]], np.uint8))
    palette.putpalette([7] * 768)
    palette.save(path)
    assert read_mask(path).tolist() == [[0, 3], [255, 1]]
    Image.new("RGB", (2, 2)).save(path)
    with pytest.raises(ValueError, match="mode L or P"):
        read_mask(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("floor-other-merged", "floor"), ("door-stuff", "door"), ("wall-brick", "wall brick"), ("Sign Symbol", "sign symbol"),
     ("great_white_shark", "great white shark"), ("t-shirt", "t shirt")],
)  # fmt: skip
def test_readable_names(name, words):
    assert readable_name(name) == words


def test_shuffled_stream__whoever_asks_and_one_shuffle_an_epoch(monkeypatch):
    """Against a shuffle of all numbers for every single one: in turn, from the middle, every third one, backwards."""
    seeds = []

    class Counted(random.Random):
        def __init__(self, seed):
            seeds.append(seed)
            super().__init__(seed)

    def anew(index):
        order = list(range(7))
        random.Random(f"order-3-{index // 7}").shuffle(order)
        return order[index % 7]

    expected = [anew(i) for i in range(30)]
    assert sorted(expected[7:14]) == list(range(7)) and expected[:7] != expected[7:14] != expected[14:21]
    monkeypatch.setattr(data.random, "Random", Counted)
    for asked in (range(30), range(11, 30), range(2, 30, 3), range(29, -1, -1)):
        stream = ShuffledStream(7, "order-3")
        seeds.clear()
        assert [stream[i] for i in asked] == [expected[i] for i in asked]
        assert len(seeds) == len({i // 7 for i in asked})


def test_classes_are_merged_in_the_order_of_the_file(folder):
    (folder / "classes.txt").write_text("sky\nroad\nkerb\ncar\n")
    values = np.array([[0, 1, 2, 3, 255, 0]] * 6 + [[3, 3, 3, 1, 1, 2]] * 2, np.uint8).T
    Image.fromarray(values).save(folder / "masks" / "a_1.png")
    (folder / "merged.json").write_text('{"ground": ["kerb", "road"], "car": ["car"]}')
    opened = open_segmentation_folder(folder, classes=folder / "merged.json")
    assert opened.classes == ("ground", "car")
    number = {0: 255, 1: 0, 2: 0, 3: 1, 255: 255}
    labels = opened.read_mask(opened.pairs[0][1], (6, 8))
    assert labels.dtype == np.uint8 and labels.tolist() == [[number[v] for v in row] for row in values.tolist()]
    np.testing.assert_array_equal(open_segmentation_folder(folder).read_mask(opened.pairs[0][1], (6, 8)), values)
    with pytest.raises(ValueError, match=r"its image \(8, 6\)"):
        opened.read_mask(opened.pairs[0][1], (8, 6))
    (folder / "classes.txt").write_text("road\nkerb\ncar\n")
    with pytest.raises(ValueError, match=r"the values \[3\], but classes.txt has 3 lines"):
        open_segmentation_folder(folder, classes=folder / "merged.json").read_mask(opened.pairs[0][1], (6, 8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["sky", "tree"]}', "tree: no such line among the 2"),
        ('{"a": ["sky"], "b": ["road", "sky"]}', "sky: named more than once"),
        ('{"a": "sky"}', "must hold {class:"),
        ("[]", "must hold {class:"),
        ("sky", "is no JSON"),
    ],
)
def test_classes_that_cannot_be_merged_are_named(folder, text, message):
    (folder / "merged.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_segmentation_folder(folder, classes=folder / "merged.json")


def test_supercategories_of_coco__the_first_twelve_are_its_things():
    file = Path(__file__).parents[2] / "training" / "configs" / "coco_supercategories.json"
    groups = [[readable_name(name) for name in group] for group in json.loads(file.read_text()).values()]
    things, stuff = ([name for group in part for name in group] for part in (groups[:12], groups[12:]))
    assert sorted(things) == sorted({*Vocabulary.parse("coco-object").labels} - {"background"})
    assert (len(groups), len(things), len(stuff)) == (27, 80, 53)
