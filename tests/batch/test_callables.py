"""The batch callables: columns in, columns out, the same under `datasets`, pandas and by hand."""

import json
import pickle
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets.fingerprint import Hasher
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline

from spar_hf import SlidingWindowTeacher, SparBackbone
from spar_hf.batch.arrays import as_arrays, read_array
from spar_hf.batch.callables import SparFeatures, SparSegmenter, SparTeacher
from spar_hf.model.templates import TemplateChoice
from spar_hf.utils.errors import UsageError
from spar_hf.utils.remote_files import write_remote

LABELS = ["road", "sky", "tree"]


@pytest.fixture(scope="module")
def pictures():
    """Five images, three of one size."""
    rng = np.random.default_rng(0)
    sizes = [(70, 90), (64, 64), (70, 90), (50, 120), (70, 90)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def png(picture):
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def batch(pictures, tmp_path_factory):
    """The images as bytes, as a path and in a store, one of them broken; and their ids."""
    file = tmp_path_factory.mktemp("in") / "b.png"
    pictures[1].save(file)
    write_remote("memory://callables/c.png", png(pictures[2]))
    images = [png(pictures[0]), str(file), "memory://callables/c.png", png(pictures[3])[:90], pictures[4]]
    column = np.empty(len(images), dtype=object)
    column[:] = images
    return {"image": column, "id": np.arange(10, 15)}


def rows(columns):
    return [{name: values[i] for name, values in columns.items()} for i in range(len(columns["error"]))]


def pixel_values(folder, picture, shortest_edge=64):
    processor = AutoImageProcessor.from_pretrained(folder)
    return processor(picture, size={"shortest_edge": shortest_edge}, return_tensors="pt")["pixel_values"]


def assert_maps(columns, pictures, expected, name="features", **tolerance):
    """Compares the features of all images but the broken one."""
    for i, (row, picture) in enumerate(zip(rows(columns), pictures, strict=True)):
        if i == 3:
            assert row["error"] and row["features"] == b"" and list(row["shape"]) == [0, 0, 0]
        else:
            found = torch.tensor(np.array(read_array(row, name)))
            torch.testing.assert_close(found, expected(picture), **tolerance)


def test_features_are_those_of_the_model_and_a_bad_image_is_a_row(base_folder, batch, pictures):
    features = SparFeatures(str(base_folder), size=64, dtype="float32")
    features.start()
    seen = []
    features.loaded.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    found = features(batch)
    model = AutoModel.from_pretrained(base_folder)

    @torch.no_grad()
    def expected(picture):
        return model(pixel_values(base_folder, picture)).feature_map[0]

    assert_maps(found, pictures, expected, rtol=1e-4, atol=1e-5)
    assert sorted(seen) == [(1, 3, 64, 64), (3, 3, 64, 82)]  # equal sizes share a pass
    assert found["id"].tolist() == [10, 11, 12, 13, 14] and "image" not in found
    assert list(found["original_size"]) == [[70, 90], [64, 64], [70, 90], [0, 0], [70, 90]]
    assert "damaged" in found["error"][3] and len(set(found["fingerprint"]) - {""}) == 1
    features.batch_size = 2
    seen.clear()
    assert_maps(features(batch), pictures, expected, rtol=1e-4, atol=1e-5)
    assert sorted(shape[0] for shape in seen) == [1, 1, 2]


def test_tokens_of_blocks_are_those_of_the_backbone_interface(base_folder, batch, pictures):
    found = SparFeatures(str(base_folder), size=64, dtype="float32", layers="1,features")(batch)
    backbone = SparBackbone.from_pretrained(base_folder, out_features=["stage1", "features"])
    for number, name in enumerate(("layer_1", "features")):

        @torch.no_grad()
        def expected(picture, number=number):
            return backbone(pixel_values(base_folder, picture)).feature_maps[number][0]

        assert_maps(found, pictures, expected, name, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="no block 9: it has 2"):
        SparFeatures(str(base_folder), layers=[9])(batch)
    with pytest.raises(UsageError, match="3,6,9,features"):
        SparFeatures(str(base_folder), layers="1,last")


def test_one_vector_per_image(base_folder, pictures):
    model, batch = AutoModel.from_pretrained(base_folder), {"image": [png(picture) for picture in pictures]}
    with torch.no_grad():
        outputs = [model(pixel_values(base_folder, picture), output_pooled=True) for picture in pictures]
    expected = {
        "mean": torch.stack([output.feature_map[0].flatten(1).mean(1) for output in outputs]),
        "head": torch.cat([output.pooler_output for output in outputs]),
    }
    for pool, vectors in expected.items():
        found = SparFeatures(str(base_folder), size=64, dtype="float32", pool=pool, normalize=True)(batch)
        arrays = torch.tensor(np.stack([read_array(row) for row in rows(found)]))
        torch.testing.assert_close(arrays, torch.nn.functional.normalize(vectors, dim=1), rtol=1e-4, atol=1e-5)


def test_the_teacher_is_the_sliding_window(base_folder, batch, pictures):
    windows = {"stride": 24, "window_size": 48, "scales": (1.0, 0.5)}
    teacher = SlidingWindowTeacher(AutoModel.from_pretrained(base_folder), **windows)
    found = SparTeacher(str(base_folder), size=64, **windows)(batch)
    plain = SparFeatures(str(base_folder), size=64)({"image": batch["image"][:1]})
    assert found["dtype"][0] == "bfloat16" and found["fingerprint"][0] != plain["fingerprint"][0]
    assert_maps(found, pictures, lambda p: teacher(pixel_values(base_folder, p)).feature_map[0], rtol=0.01, atol=0.01)


def test_masks_are_those_of_the_pipeline(base_folder, batch, pictures):
    from pycocotools.mask import decode

    options = {"candidate_labels": LABELS, "background": "unsure", "threshold": 0.35, "size": 64}
    found = SparSegmenter(str(base_folder), **options)(batch)
    runs = SparSegmenter(str(base_folder), masks="coco", **options)(batch)
    segment = pipeline("open-vocab-segmentation", model=str(base_folder))
    for i in (0, 1, 2, 4):
        expected = segment(pictures[i], output="map", **options)
        label_map = np.array(Image.open(BytesIO(found["map"][i])))
        assert (label_map == expected["map"]).mean() > 0.999  # sums of a batch differ in the last bit
        assert found["labels"][i] == [*LABELS, "unsure"] and found["background"][i] == 3
        assert found["scores"][i] == pytest.approx(expected["scores"], abs=1e-3)
        for mask in json.loads(runs["masks"][i]):
            area = decode({"size": mask["size"], "counts": mask["counts"]}).astype(bool)
            assert np.array_equal(area, label_map == found["labels"][i].index(mask["label"]))
    assert found["map"][3] == b"" and found["error"][3]
    with pytest.raises(ValueError, match="threshold"):  # wrong for all images, so no row's error
        SparSegmenter(str(base_folder), candidate_labels=LABELS, threshold=7.0)(batch)


def test_a_column_of_the_name_of_a_result_is_refused(base_folder, pictures):
    column = np.empty(1, dtype=object)
    column[0] = pictures[0]
    segment = SparSegmenter(str(base_folder), candidate_labels=LABELS, size=64)
    with pytest.raises(UsageError, match="columns labels, map would be replaced"):
        segment({"image": column, "labels": ["mine"], "map": [b""]})
    with pytest.raises(UsageError, match="shape"):
        SparFeatures(str(base_folder), size=64)({"image": column, "shape": [1]})
    # one callable after another on the same rows
    found = segment(SparFeatures(str(base_folder), size=64)({"image": column, "id": [7]}) | {"image": column})
    assert found["id"] == [7] and len(found["features"]) == 1 and found["labels"][0] == LABELS
    # results that all of them have are not somebody's own columns
    for own in ({"error": ["my note"]}, {"original_size": ["1200x800"]}):
        with pytest.raises(UsageError, match="would be replaced"):
            segment({"image": column, **own})


def test_an_error_stays_where_another_callable_follows(base_folder):
    column = np.empty(2, dtype=object)
    column[:] = [np.full((64, 96, 3), 4.0, np.float32), np.zeros((64, 96, 3), np.uint8)]
    rows = SparFeatures(str(base_folder), size=64)({"image": column})
    assert "image_range" in rows["error"][0] and rows["error"][1] == ""
    segment = SparSegmenter(str(base_folder), candidate_labels=LABELS, size=64, image_range=(0, 5))
    found = segment({**rows, "image": column})
    assert found["error"].tolist() == rows["error"].tolist() and found["map"][0]
    with pytest.raises(ValueError, match="image_range"):
        read_array({name: values[0] for name, values in found.items()})


def test_presence_is_a_column_and_other_options_are_refused(base_folder, batch, pictures):
    found = SparSegmenter(str(base_folder), candidate_labels=LABELS, size=64, presence=True)(batch)
    segment = pipeline("open-vocab-segmentation", model=str(base_folder))
    expected = segment(pictures[0], candidate_labels=LABELS, size=64, presence=True, output="map")["presence"]
    assert list(found["presence"][0]) == pytest.approx(expected, abs=1e-3) and list(found["presence"][3]) == [0.0] * 3
    for option in ({"tile": 64}, {"top_k": 1}, {"output": "segments"}, {"nonsense": 3}):
        with pytest.raises(UsageError, match=f"Unknown options {next(iter(option))}"):
            SparSegmenter(str(base_folder), candidate_labels=LABELS, **option)


def test_a_file_of_templates_counts_by_its_content(base_folder, tmp_path):
    file = tmp_path / "choice.json"
    prints = []
    for prompt in ("{}", "a drawing of a {}"):
        TemplateChoice((prompt,)).save(file)
        segment = SparSegmenter(str(base_folder), candidate_labels=LABELS, templates=str(file))
        segment.start()
        prints.append((segment.fingerprint, Hasher.hash(segment)))
    assert prints[0][0] != prints[1][0] and prints[0][1] != prints[1][1]


def test_the_same_object_in_datasets_and_pandas(base_folder, pictures):
    pandas = pytest.importorskip("pandas")
    columns = {"image": [png(pictures[0]), b"no image", png(pictures[2])], "id": [1, 2, 3]}
    for make in (SparFeatures, SparSegmenter):
        more = {"candidate_labels": LABELS} if make is SparSegmenter else {"dtype": "float32"}
        function = make(str(base_folder), size=64, **more)
        by_hand = function(columns)
        table = datasets.Dataset.from_dict(columns).map(
            function, batched=True, batch_size=2, with_rank=True, remove_columns="image"
        )
        frames = list(function.map_pandas(iter([pandas.DataFrame(columns)])))
        for i, row in enumerate(rows(by_hand)):
            for name, value in row.items():
                if name in ("features", "scores"):  # sums of a batch of two differ in the last bit
                    continue
                assert np.array_equal(table[i][name], value) and np.array_equal(frames[0][name][i], value), name
        if make is SparFeatures:
            arrays = table.with_transform(as_arrays)[:]["features"]
            assert arrays[0].shape == (32, 4, 6) and arrays[1] is None
            part = table.select_columns(["features", "shape", "dtype"]).with_transform(as_arrays)[:]["features"]
            assert np.array_equal(part[0], arrays[0]) and part[1] is None
            alone = table.select_columns(["features", "id"]).with_transform(as_arrays)[:]["features"]
            assert alone[0] == table[0]["features"]  # nobody knows its shape
        # every batch has the same types, also where all images failed and where none did
        good, bad = (pa.table(function({"image": columns["image"][i : i + 1], "id": [1]})).schema for i in (0, 1))
        assert good == bad == pa.table(by_hand).schema and not any(pa.types.is_null(kind) for kind in good.types)


def test_names_of_images_stay_in_every_batch(base_folder, pictures, tmp_path):
    """A missing or other kind of name in one batch must not change the columns in the middle of a job."""
    pictures[0].save(tmp_path / "a.png")
    name, features = str(tmp_path / "a.png"), SparFeatures(str(base_folder), size=64)
    batches = [[name, name], [name, None], [Path(name), float("nan")], [None], []]
    found = [features({"image": cells}) for cells in batches]
    assert [list(columns["image"]) for columns in found] == [[name, name], [name, None], [name, None], [None], []]
    assert [error == "" for columns in found[:3] for error in columns["error"]] == [
        True,
        True,
        True,
        False,
        True,
        False,
    ]
    table = datasets.Dataset.from_dict({"image": [name] * 3 + [None]})
    assert table.map(features, batched=True, batch_size=2, remove_columns="image").num_rows == 4
    assert "image" not in features({"image": [name, png(pictures[0])]})  # images themselves
    assert "image" not in features({"image": [None]})  # and then also where all of them are missing
    assert "image" in features({"image": [name]})  # of another data set
    images = SparFeatures(str(base_folder), size=64)
    assert not any("image" in images({"image": cells}) for cells in ([None], [png(pictures[0])], [None, None]))


def test_columns_of_an_empty_batch_have_the_types_of_the_others(base_folder, pictures):
    segment = SparSegmenter(str(base_folder), candidate_labels=LABELS, size=64, presence=True)
    full, empty = segment({"image": pictures[:1]}), segment({"image": []})
    assert {name: column.dtype for name, column in empty.items()} == {
        name: column.dtype for name, column in full.items()
    }
    assert not any(len(column) for column in empty.values())


def test_an_object_travels_without_its_model(base_folder, pictures):
    features = SparFeatures(str(base_folder), size=64)
    before = Hasher.hash(features)
    first = features({"image": pictures[:1]})
    assert len(pickle.dumps(features)) < 5_000 and Hasher.hash(features) == before
    again = pickle.loads(pickle.dumps(features))({"image": pictures[:1]})
    assert again["features"][0] == first["features"][0]
    assert Hasher.hash(SparFeatures(str(base_folder), size=80)) != before
    with pytest.raises(UsageError, match="no column 'image'"):
        features({"photo": pictures[:1]})
