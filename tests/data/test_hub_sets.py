"""Hugging Face data sets on disk: folders of `save_to_disk` and of parquet files."""

import datasets
import pytest
from PIL import Image

from spar_hf.data.hub_sets import open_hugging_face
from spar_hf.data.segmentation_sets import IGNORE_INDEX
from spar_hf.utils.errors import UsageError


def hugging_face_rows(folder, values):
    """Images of height 1 with these mask values; the i-th image is red of level 10 i."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"image": [], "label": []}
    for i, row in enumerate(values):
        Image.new("RGB", (len(row), 1), (10 * i, 0, 0)).save(folder / f"{i}.png")
        mask = Image.new("L", (len(row), 1))
        mask.putdata(row)
        mask.save(folder / f"{i}_mask.png")
        rows["image"].append(str(folder / f"{i}.png"))
        rows["label"].append(str(folder / f"{i}_mask.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    return datasets.Dataset.from_dict(rows, features=features)


COLUMNS = {"image_column": "image", "mask_column": "label"}


def test_hugging_face_data_sets_from_disk_and_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = hugging_face_rows(tmp_path / "files", [[0, 1, 2], [0, 2, 7], [1, 1, 255]])
    datasets.DatasetDict({"validation": rows, "train": rows.select([0])}).save_to_disk(tmp_path / "disk")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "validation.parquet")
    for folder in ("disk", "parquet"):
        path = str(tmp_path / folder)
        data = open_hugging_face(path, ["Cat", "tree-merged", "dog"], "validation", ignore_index=7, **COLUMNS)
        assert data.labels == ("cat", "tree", "dog") and len(data) == 3
        assert [data.read(i)[1].tolist() for i in range(3)] == [
            [[0, 1, 2]],
            [[0, 2, IGNORE_INDEX]],
            [[1, 1, IGNORE_INDEX]],
        ]
        assert data.read(2)[0].getpixel((0, 0)) == (20, 0, 0)
    data = open_hugging_face(path, ["tree", "dog"], reduce_zero_label=True, **COLUMNS)
    assert data.read(0)[1].tolist() == [[IGNORE_INDEX, 0, 1]]
    with pytest.raises(UsageError, match=r"holds the values \[7\]"):
        data.read(1)
    with pytest.raises(UsageError, match=r"the splits validation, train.*--split"):
        open_hugging_face(str(tmp_path / "disk"), ["tree"], **COLUMNS)
    for wrong in (65535, -100):
        with pytest.raises(UsageError, match=f"--ignore_index {wrong}: masks hold the values 0 to 255"):
            open_hugging_face(path, ["tree"], ignore_index=wrong, **COLUMNS)
    with pytest.raises(UsageError, match=r"image, label.*--image_column"):
        open_hugging_face(path, ["tree"])


def test_stamp__follows_the_rows(tmp_path):
    """The stamp of images stored in a data set is its fingerprint, as in version 0.1."""
    rows = hugging_face_rows(tmp_path / "files", [[0, 1], [1, 1]])
    embedded = rows.map(lambda row: row)  # bytes instead of paths
    embedded.save_to_disk(tmp_path / "disk")
    data = open_hugging_face(str(tmp_path / "disk"), ["road", "sky"], **COLUMNS)
    again = open_hugging_face(str(tmp_path / "disk"), ["road", "sky"], **COLUMNS)
    assert data.stamp == again.stamp != data.select([1]).stamp


def test_subset_and_split_are_those_that_were_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, lines = tmp_path / "streets", ["---", "configs:"]
    for subset, values in (("rain", [0, 1]), ("snow", [1, 1, 0])):
        (folder / subset).mkdir(parents=True)
        rows = hugging_face_rows(tmp_path / subset, [values])
        rows.to_parquet(folder / subset / "test-00000-of-00001.parquet")
        lines += [f"- config_name: {subset}", f"  data_files: {subset}/*.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---"]))
    for subset, expected in (("rain", [[0, 1]]), ("snow", [[1, 1, 0]])):
        data = open_hugging_face(str(folder), ["road", "sky"], subset=subset, **COLUMNS)
        assert data.read(0)[1].tolist() == expected
        assert (data.subset, data.split) == (subset, "train")
    for wrong in (None, "fog"):
        with pytest.raises(UsageError, match=rf"rain.*snow.*--subset \(now {wrong}\)"):
            open_hugging_face(str(folder), ["road", "sky"], subset=wrong, **COLUMNS)
    # the split of a folder that holds one is known, and another one is refused
    datasets.load_dataset(str(folder), "rain", split="train").save_to_disk(tmp_path / "disk")
    disk = str(tmp_path / "disk")
    for split in (None, "train"):
        assert open_hugging_face(disk, ["road", "sky"], split, **COLUMNS).split == "train"
    with pytest.raises(UsageError, match=r"holds the split train only, not validation.*--split"):
        open_hugging_face(disk, ["road", "sky"], "validation", **COLUMNS)
    hugging_face_rows(tmp_path / "more", [[0, 1]]).save_to_disk(tmp_path / "unnamed")
    with pytest.raises(UsageError, match="one split without a name, not validation"):
        open_hugging_face(str(tmp_path / "unnamed"), ["road", "sky"], "validation", **COLUMNS)
    with pytest.raises(UsageError, match="--subset rain"):
        open_hugging_face(disk, ["road", "sky"], subset="rain", **COLUMNS)


def test_what_cannot_be_loaded_is_named_with_its_option(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"--dataset some/repo is neither a folder with images/, .* nor a data set"):
        open_hugging_face("some/repo", ["cat"])
