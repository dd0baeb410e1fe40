"""The data set of an evaluation: which images, which classes, which words."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from spar_hf.data.benchmarks import BENCHMARKS
from spar_hf.data.order import split_held_out
from spar_hf.data.segmentation_sets import IGNORE_INDEX, SegmentationSet, make_table, open_folder, table_of_lines
from spar_hf.evaluation.dataset import build_vocabulary, open_dataset, open_whole, open_with_words
from spar_hf.evaluation.options import DataOptions, WordOptions
from spar_hf.evaluation.protocols import spar
from spar_hf.model.prompts import Vocabulary
from spar_hf.pretraining.crops import load_sets
from spar_hf.utils.errors import MissingFiles, UsageError

WIDTHS = (3, 4, 5, 6, 7)


def set_of(classes):
    return SegmentationSet("set", None, (), *table_of_lines(classes), "set")


@pytest.fixture
def folder(tmp_path):
    """Five images `image0` to `image4` of one row of pixels, of different widths."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("road\nsky-other-merged\nnull\n")
    for i, width in enumerate(WIDTHS):
        Image.new("RGB", (width, 1)).save(tmp_path / "images" / f"image{i}.png")
        row = np.pad(np.array([0, 1, 255], np.uint8), (0, width - 3))
        Image.fromarray(row[None]).save(tmp_path / "masks" / f"image{i}.png")
    return tmp_path


def chosen(folder, **options):
    return list(open_dataset(DataOptions(dataset=str(folder), **options)).names)


def test_held_out_images_are_those_that_training_leaves(folder):
    spec = {"path": folder.name, "weight": 1, "crop": [1, 2], "holdout_every": 2, "exclude": ["*image1"]}
    (trained,) = load_sets(folder.parent, {"sets": [spec], "held_out": [], "synonyms": {}})
    assert [image.shape[1] for image in trained.images] == [WIDTHS[0], WIDTHS[3]]
    assert split_held_out(len(open_folder(folder, exclude=["*image1"])), every=2) == ([0, 2], [1, 3])
    kept = {"holdout_every": 2, "exclude": ["*image1"]}
    assert chosen(folder, **kept) == ["image2", "image4"]
    assert chosen(folder, **kept, holdout_rest=True) == ["image0", "image3"]
    # which images are held out does not depend on the other options
    assert chosen(folder, **kept, include=["*4", "*3"]) == ["image4"]
    assert chosen(folder, **kept, limit=1) == ["image2"]
    assert chosen(folder, include=["*4", "*3"]) == ["image3", "image4"]
    with pytest.raises(MissingFiles, match="leave no image"):
        chosen(folder, include=["*7"])


def test_names_of_classes_are_read_as_words(folder):
    data, vocabulary, scored = open_with_words(
        DataOptions(dataset=str(folder)), WordOptions(ignore_classes=["null"], only_classes=["sky"])
    )
    assert data.labels == vocabulary.labels == ("road", "sky") and scored == [1]
    assert data.read_mask(0).tolist() == [[0, 1, IGNORE_INDEX]]
    with pytest.raises(UsageError, match="Unknown template set 'none'"):
        open_with_words(DataOptions(dataset="nowhere"), WordOptions(templates="none"))


def test_a_class_that_is_named_twice_counts_once(folder):
    names = ["sky", "road", "Road", "road", "sky-other-merged"]
    _, _, scored = open_with_words(DataOptions(dataset=str(folder)), WordOptions(only_classes=names))
    assert scored == [1, 0]


def test_kinds_of_data_sets_are_not_mixed_up(folder):
    for options in ({"split": "val"}, {"classes": "names.txt"}, {"ignore_index": 0}):
        with pytest.raises(UsageError, match=r"--split.* are for Hugging Face data sets"):
            open_whole(DataOptions(dataset=str(folder), **options))
    with pytest.raises(UsageError, match=r"--split.* are for Hugging Face data sets"):
        open_whole(DataOptions(dataset=str(folder), benchmark="ade20k", split="val"))
    with pytest.raises(MissingFiles, match="is no folder"):
        open_whole(DataOptions(dataset=str(folder / "nowhere")))
    (folder / "classes.txt").rename(folder / "names.txt")
    with pytest.raises(MissingFiles, match="must hold `images/`"):
        open_whole(DataOptions(dataset=str(folder)))


def test_hugging_face_data_set_by_options(tmp_path):
    rows = {"image": [], "label": []}
    for i, values in enumerate(([0, 1, 2], [2, 1, 0])):
        Image.new("RGB", (3, 1)).save(tmp_path / f"{i}.png")
        Image.fromarray(np.array([values], np.uint8)).save(tmp_path / f"{i}_mask.png")
        rows["image"].append(str(tmp_path / f"{i}.png"))
        rows["label"].append(str(tmp_path / f"{i}_mask.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "disk")
    (tmp_path / "names.txt").write_text("cat\ntree\ndog\n")
    given = {"dataset": str(tmp_path / "disk"), "image_column": "image", "mask_column": "label"}
    data = open_dataset(DataOptions(**given, classes=str(tmp_path / "names.txt"), include=["row1"]))
    assert data.names == ("row1",) and data.read(0)[1].tolist() == [[2, 1, 0]]
    assert len(open_whole(DataOptions(**given), "cityscapes").labels) == 19
    with pytest.raises(UsageError, match="--classes FILE or --vocabulary NAME"):
        open_whole(DataOptions(**given))
    with pytest.raises(UsageError, match="'nonsense' is no vocabulary"):
        open_whole(DataOptions(**given), "nonsense")
    with pytest.raises(UsageError, match="holds one subset"):
        open_whole(DataOptions(**given, subset="rain", classes=str(tmp_path / "names.txt")))


def test_ignored_classes_of_a_set_with_16_bit_masks():
    labels = tuple(f"class {n}" for n in range(300))
    table = make_table(range(300), ignored=(65535,), mask_values=65536)
    vocabulary, data = build_vocabulary(SegmentationSet("set", None, (), labels, table, "set"), None, None, ["class 1"])
    assert len(vocabulary.labels) == 299 and data.ignore_index == 65535 and data.table.dtype == np.int32
    assert data.table[[0, 1, 2, 255, 299, 300, 65535]].tolist() == [0, 65535, 1, 254, 298, -1, 65535]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_opens_with_its_words(name, tmp_path):
    """Labels with hyphens or capitals (`post-it`, `Black-footed Albatross`) are classes like others."""
    entry = BENCHMARKS[name]
    folder = "city/" * entry.depth + "street"
    for pattern, mode in ((entry.images[0], "RGB"), (entry.masks[0][0], "L")):
        path = tmp_path / pattern.format(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (4, 3)).save(path)
    if entry.listing:
        (tmp_path / entry.listing).parent.mkdir(parents=True)
        (tmp_path / entry.listing).write_text("street\n")
    options = DataOptions(dataset=str(tmp_path), benchmark=name)
    data, words, scored = open_with_words(options, WordOptions(), spar(name, "siglip").vocabulary)
    assert scored == list(range(len(data.labels))) and words.labels == data.labels
    last = data.labels[-1]
    _, _, only = open_with_words(options, WordOptions(only_classes=[last, data.labels[0]]))
    assert only == [len(data.labels) - 1, 0]
    left, _, _ = open_with_words(options, WordOptions(ignore_classes=[last]))
    assert left.labels == data.labels[:-1]


def test_vocabulary(tmp_path):
    classes = ["null", "wall-merged", "Sports_ball", "wall-other", "dog"]
    words = tmp_path / "labels.json"
    words.write_text(json.dumps({"sports ball": ["football", "ball"], "wall-merged": "brick, wall"}))
    vocabulary, data = build_vocabulary(set_of(classes), class_names=str(words), ignore_classes=["Dog"])
    # what reads alike is one class, and names of a file are taken as they are
    assert vocabulary.labels == ("background", "wall", "sports ball")
    assert vocabulary.names == (("background",), ("brick, wall",), ("football", "ball"))
    assert data.labels == vocabulary.labels
    assert data.table[:5].tolist() == [0, 1, 2, 1, IGNORE_INDEX] and data.table[255] == IGNORE_INDEX
    assert (data.table[5:255] < 0).all()  # no mask of the set may hold these


def test_vocabulary__commas_separate_names_as_in_lists_of_words():
    vocabulary, data = build_vocabulary(set_of(["car, automobile", "sky", r"salt\, sea"]))
    assert vocabulary.names == Vocabulary.parse(["car, automobile", "sky", r"salt\, sea"]).names
    assert data.labels == vocabulary.labels == ("car, automobile", "sky", r"salt\, sea")


def test_vocabulary__names_that_are_replaced_or_left_out_are_not_read(tmp_path):
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"cat,": "cat"}))
    given, left = set_of(["cat,", "dog"]), set_of(["screen door, screen", "screen, cinema", "dog"])
    assert build_vocabulary(given, class_names=str(words))[0].names == (("cat",), ("dog",))
    assert build_vocabulary(given, ignore_classes=["cat,"])[0].labels == ("dog",)
    assert build_vocabulary(left, ignore_classes=["screen, cinema"])[0].labels == ("screen door, screen", "dog")
    for data in (given, left):
        with pytest.raises(UsageError, match="--class_names gives classes other words"):
            build_vocabulary(data)


def test_vocabulary__errors(tmp_path):
    with pytest.raises(UsageError, match="--ignore_classes: no class is called kat; there are cat, dog"):
        build_vocabulary(set_of(["cat", "dog"]), ignore_classes=["kat"])
    words = tmp_path / "labels.json"
    for text, message in (
        ("{'cat': 'kitten'}", "is not JSON"),
        ('["cat"]', "does not hold classes"),
        ('{"cat": 3}', "does not hold classes"),
    ):
        words.write_text(text)
        with pytest.raises(UsageError, match=r"--class_names .*labels.json " + message + r'.*Write \{"car": \["car"'):
            build_vocabulary(set_of(["cat", "dog"]), class_names=str(words))
    words.write_text(json.dumps({"cat": ["cat", "dog"]}))
    with pytest.raises(UsageError, match=r"two classes or twice: dog\. Merge or rename"):
        build_vocabulary(set_of(["cat", "dog"]), class_names=str(words))
    with pytest.raises(UsageError, match="256 classes"):
        set_of([str(i) for i in range(256)])


def test_vocabulary__published_words_keep_the_labels():
    labels = Vocabulary.parse("voc21").labels
    data = SegmentationSet("PASCAL VOC 2012", None, (), labels, make_table(range(21)), "voc21", "val")
    vocabulary, same = build_vocabulary(data, "voc21-spar")
    assert vocabulary.labels == data.labels == same.labels and same.split == "val"
    assert vocabulary.names[0][:2] == ("sky", "wall") and vocabulary.names[4] == ("ship",)
    assert "person in dress" in vocabulary.names[15]
    np.testing.assert_array_equal(same.table, data.table)
    with pytest.raises(UsageError, match="20 classes, but PASCAL VOC 2012 has 21"):
        build_vocabulary(data, "voc20")
