"""The runtime without torch: results of the pipeline, its inputs and options, and one line for what it cannot do."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import onnx
import pytest
import skimage
import torch
from PIL import Image
from transformers import pipeline

from spar_hf.model.segmentation import LabelMap, decide, give_to_background
from spar_hf.runtime import OnnxSegmenter, decisions
from spar_hf.runtime.folders import ExportedFolder

IMAGES = Path(skimage.__file__).parent / "data"
WORDS = ["cup, mug", "spoon", "table", "cat", "sky"]
FORBID = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors", "huggingface_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Forbidden())
"""


@pytest.fixture(scope="module")
def pipe():
    return pipeline("open-vocab-segmentation")


@pytest.fixture(scope="module")
def segmenter(classmap_folder):
    return OnnxSegmenter(classmap_folder, threads=1)


@pytest.fixture(scope="module")
def open_segmenter(request):
    """Segmenters of an engine and a folder, each opened once."""

    @cache
    def opened(engine, folder):
        pytest.importorskip(engine)
        return OnnxSegmenter(request.getfixturevalue(f"{folder}_folder"), engine=engine, threads=1)

    return opened


RESULTS = {}


def of_pipeline(pipe, name, options):
    """The pipeline's label map of an image, computed once."""
    key = (name, str(options))
    if key not in RESULTS:
        RESULTS[key] = pipe(IMAGES / name, WORDS, output="map", **options)
    return RESULTS[key]


def test_it_runs_where_torch_and_transformers_are_not_installed(classmap_folder):
    code = f"""{FORBID}
import spar_hf
from spar_hf.runtime import OnnxSegmenter
found = OnnxSegmenter({str(classmap_folder)!r}, threads=1)({str(IMAGES / "coffee.png")!r}, candidate_labels=["cup", "table"],
    templates="plain", background=["wall"], size=96)
print([(segment["label"], segment["mask"].size) for segment in found])
assert not {{"torch", "transformers"}} & set(sys.modules)
try:
    spar_hf.SparConfig
except ModuleNotFoundError as error:
    print(error.name)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == ["[('cup', (600, 400)), ('table', (600, 400))]", "transformers"]


@pytest.mark.parametrize(
    "name, options",
    [
        ("coffee.png", {"background": "auto"}),
        ("coffee.png", {"size": "native"}),
        ("chelsea.png", {"size": (333, 250), "background": ["wall", "floor"], "templates": "short"}),
        ("rocket.jpg", {"size": {"longest_edge": 200}, "max_tokens": 50}),
    ],
)
@pytest.mark.parametrize(
    "engine, folder", [("onnxruntime", "classmap"), ("openvino", "classmap"), ("openvino", "logits")]
)
def test_label_maps_are_those_of_the_pipeline(engine, folder, name, options, pipe, open_segmenter):
    options = {"templates": "plain", **options}
    expected = of_pipeline(pipe, name, options)
    found = open_segmenter(engine, folder)(IMAGES / name, WORDS, output="map", **options)
    assert found["map"].dtype == expected["map"].dtype and found["map"].shape == expected["map"].shape
    # of pixels whose two best classes are equal up to rounding, one or two per image fall to the other
    assert (found["map"] != expected["map"]).sum() <= 3
    assert (found["labels"], found["background"]) == (expected["labels"], expected["background"])
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-3)


def test_segments_are_those_of_the_pipeline(pipe, segmenter):
    options = {"background": "auto", "templates": "plain"}
    expected, found = (run(str(IMAGES / "coffee.png"), WORDS, **options) for run in (pipe, segmenter))
    assert [segment["label"] for segment in found] == [segment["label"] for segment in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one["mask"].mode, one["mask"].size) == (other["mask"].mode, other["mask"].size)
        assert (np.asarray(one["mask"]) != np.asarray(other["mask"])).sum() <= 3
        assert abs(one["score"] - other["score"]) < 1e-3


def test_rules_move_the_pixels_that_the_pipeline_moves(pipe, segmenter):
    options = {"threshold": 0.5, "min_area": 0.02, "templates": "plain", "size": 128}
    expected, found = (run(IMAGES / "coffee.png", WORDS, output="map", **options) for run in (pipe, segmenter))
    assert found["labels"] == [*expected["labels"]] and found["background"] == len(found["labels"]) - 1
    # probabilities are float16, so pixels near the threshold may fall to the other side
    assert (found["map"] != expected["map"]).mean() < 1e-3
    best = segmenter(IMAGES / "coffee.png", WORDS, top_k=1, templates="plain", size=128)
    assert len(best) == 1 and best[0]["score"] == max(
        s["score"] for s in segmenter(IMAGES / "coffee.png", WORDS, templates="plain", size=128)
    )


def test_batches_of_several_sizes_sources_and_kinds_of_input(pipe, segmenter, tmp_path):
    array = np.asarray(Image.open(IMAGES / "coffee.png").resize((90, 70)))
    grey = (array[:, :, 0].astype(np.uint16) * 257)[:60]
    clear = Image.fromarray(np.dstack([array, np.full((70, 90), 128, np.uint8)]))
    Image.fromarray(array).save(tmp_path / "rows.png")
    inputs = [array, array / 255, grey, clear, tmp_path / "rows.png", (tmp_path / "rows.png").read_bytes(), array]
    options = {"output": "map", "templates": "plain", "size": "native"}
    expected, found = (run(inputs, WORDS, batch_size=4, **options) for run in (pipe, segmenter))
    for one, other in zip(found, expected, strict=True):
        assert (one["map"] != other["map"]).sum() <= 2
    lazy = segmenter(iter(inputs), WORDS, batch_size=3, **options)
    assert not isinstance(lazy, list)
    assert all((one["map"] == other["map"]).all() for one, other in zip(lazy, found, strict=True))
    assert (segmenter({"image": array}, WORDS, **options)["map"] == found[0]["map"]).all()
    batch = segmenter(np.stack([array, array]), WORDS, **options)
    assert len(batch) == 2 and (batch[1]["map"] == found[0]["map"]).all()
    failed = segmenter([array, "none.png"], WORDS, on_error="skip", **options)
    assert "map" in failed[0] and failed[1]["error"].startswith("FileNotFoundError")
    with pytest.raises(ValueError, match="image_range"):
        segmenter(np.full((20, 20), 7, np.uint16), WORDS, **options)


def test_data_sets_are_read_row_by_row(pipe, segmenter, tmp_path):
    """Tables, their columns and data sets by position, as the pipeline takes them; a damaged file ends nothing."""
    from transformers.pipelines.pt_utils import KeyDataset

    array = np.asarray(Image.open(IMAGES / "coffee.png").resize((90, 70)))
    for name in ("a", "b", "c"):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:90])
    files = [str(tmp_path / f"{name}.png") for name in ("a", "b", "c")]
    table = datasets.Dataset.from_dict({"image": files, "photo": files})
    table = table.cast_column("image", datasets.Image()).cast_column("photo", datasets.Image())
    options = {"candidate_labels": WORDS, "output": "map", "templates": "plain", "size": "native", "on_error": "skip"}
    expected = segmenter(files[0], **options)["map"]
    for inputs in (
        table,
        table["photo"],
        table.select_columns("image").to_iterable_dataset(),
        KeyDataset(table.select([0, 2]), "photo"),
    ):
        found = list(segmenter(inputs, **options))
        assert [("error" in one) for one in found] == ([False, True, False] if len(found) == 3 else [False, False])
        assert all((one["map"] == expected).all() for one in found if "map" in one)
        assert [sorted(one) for one in pipe(inputs, **options)] == [sorted(one) for one in found]


def test_classes_in_the_graph(pipe, baked_folder):
    segmenter = OnnxSegmenter(baked_folder)
    expected = pipe(IMAGES / "coffee.png", ["cup, mug", "table"], background=["wall", "floor"])
    found = segmenter(IMAGES / "coffee.png")
    assert [s["label"] for s in found] == [s["label"] for s in expected] == ["cup", "table"]
    for one, other in zip(found, expected, strict=True):
        assert (np.asarray(one["mask"]) != np.asarray(other["mask"])).mean() < 1e-4  # near ties of two classes
    assert segmenter(IMAGES / "coffee.png", output="map")["labels"] == ["cup", "table", "background"]
    for options in ({"candidate_labels": ["cup"]}, {"background": ["wall"]}, {"templates": "short"}):
        with pytest.raises(ValueError, match="has its classes in it"):
            segmenter(IMAGES / "coffee.png", **options)


def test_a_background_in_the_graph_is_not_exchanged(baked_folder, tmp_path):
    segmenter = OnnxSegmenter(baked_folder)
    expected = segmenter.classes(None)
    for same in ("auto", "background", "Background"):
        assert segmenter.classes(None, same).background == expected.background == 2
    for other in ("cup", "water"):
        with pytest.raises(ValueError, match=r"background in it.*--background"):
            segmenter(IMAGES / "coffee.png", background=other)
    shutil.copytree(baked_folder, tmp_path / "none")
    record = tmp_path / "none" / "spar_export.json"
    record.write_text(record.read_text().replace('"background": 2', '"background": null'))
    segmenter = OnnxSegmenter(tmp_path / "none")
    assert segmenter.classes(None, "cup").background == 0
    with pytest.raises(ValueError, match="--background auto"):
        segmenter(IMAGES / "coffee.png", background="auto")


@pytest.mark.parametrize("names", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 2]])
def test_decision_is_the_pipelines(names):
    generator = torch.Generator().manual_seed(0)
    logits, geometry = torch.randn(5, 4, 7, generator=generator) * 5, (16, (60, 107), (121, 83))
    expected = decide(logits, torch.tensor(names), *geometry)
    labels, probabilities = decisions.decide(logits.numpy(), np.array(names), *geometry)
    assert (labels != expected.labels.numpy()).sum() <= 1
    np.testing.assert_allclose(probabilities, expected.probabilities.numpy(), atol=1e-4)
    expected = give_to_background(
        LabelMap(torch.from_numpy(labels.copy()), torch.from_numpy(probabilities.copy())), 3, 0.6, 0.3
    )
    decisions.give_to_background(labels, probabilities, 3, 0.6, 0.3)
    assert (labels == expected.labels.numpy()).all() and (labels == 3).any()
    np.testing.assert_array_equal(probabilities, expected.probabilities.numpy())
    pixels, scores = decisions.class_scores(labels, probabilities, 5)
    wanted = expected.class_scores(5)
    assert pixels.tolist() == wanted[0].tolist()
    np.testing.assert_allclose(scores, wanted[1].numpy(), rtol=1e-6)


def test_results_are_the_same_with_any_number_of_threads(classmap_folder, segmenter):
    """An operation of ONNX Runtime whose threads overwrite each other's results is no part of the graph."""
    options = {"background": "auto", "templates": "plain", "output": "map"}  # a class of many names
    expected = segmenter(IMAGES / "coffee.png", WORDS, **options)["map"]
    several = OnnxSegmenter(classmap_folder, threads=4)
    for _ in range(5):
        assert (several(IMAGES / "coffee.png", WORDS, **options)["map"] != expected).sum() <= 2


def test_features_are_compared_with_words_by_their_cosine(logits_folder, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(logits_folder, folder)
    record = folder / "spar_export.json"
    record.write_text(record.read_text().replace('"head": "logits"', '"head": "features"'))
    weights = np.random.default_rng(0).standard_normal((192, 3, 16, 16)).astype(np.float32)
    side, axes = onnx.TensorProto.FLOAT, ["batch", "dim", "rows", "columns"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["pixel_values", "weights"], ["feature_map"], strides=[16, 16])],
        "features",
        [onnx.helper.make_tensor_value_info("pixel_values", side, axes)],
        [onnx.helper.make_tensor_value_info("feature_map", side, axes)],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.save(model, folder / "onnx" / "vision_model.onnx")
    segmenter = OnnxSegmenter(folder)
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    found = segmenter(image, WORDS, output="map", size="native", templates="plain")
    classes = segmenter.classes(WORDS, templates="plain")
    pixels = torch.from_numpy(segmenter.prepare(image, size="native").pixel_values)[None]
    features = torch.nn.functional.conv2d(pixels, torch.from_numpy(weights), stride=16)[0]
    cosines = torch.cosine_similarity(features, torch.from_numpy(classes.text_embeds)[:, :, None, None], dim=1)
    expected = decide(cosines * 40, torch.from_numpy(classes.class_of_name), 16, (64, 96), (64, 96))
    assert (found["map"] != expected.labels.numpy()).sum() <= 2


def test_openvino_computes_in_float32_unless_asked(logits_folder):
    pytest.importorskip("openvino")
    run = OnnxSegmenter(logits_folder, engine="openvino")
    half = OnnxSegmenter(logits_folder, engine="openvino", dtype="bf16")
    precision = [str(s.graph.compiled.get_property("INFERENCE_PRECISION_HINT")) for s in (run, half)]
    assert "float32" in precision[0] or "f32" in precision[0]
    assert precision[0] != precision[1] and half.dtype == "bf16"


def test_positions_that_openvino_cannot_multiply_are_refused(classmap_folder, open_segmenter):
    """In numbers of 32 bits half of the pixels would get other patches' classes, without a word."""
    long = np.zeros((40, 33_000, 3), np.uint8)
    segmenter = open_segmenter("openvino", "classmap")
    with pytest.raises(ValueError, match=r"40×33000 pixels at 40×33000. Give a smaller `size`, or take engine='onnx"):
        segmenter(long, candidate_labels=WORDS, size="native", templates="plain")
    found = segmenter(long, candidate_labels=WORDS, size=16, templates="plain", output="map")
    assert found["map"].shape == (40, 33_000)


def test_a_batch_size_of_none_is_one(segmenter):
    read = []

    def images():
        for number in range(3):
            read.append(number)
            yield np.zeros((32, 32, 3), np.uint8)

    results = segmenter(images(), candidate_labels=WORDS, templates="plain", batch_size=None)
    next(results)
    assert read == [0]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"refine": "pamr"}, "`refine` is an option of the pipeline only"),
        ({"presence": True}, "`presence` is an option of the pipeline only"),
        ({"output": "logits"}, "output 'logits'"),
        ({"output": "map", "top_k": 2}, "`top_k`"),
        ({"threshold": 2}, "`threshold`"),
        ({"size": "big"}, "`size`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"on_error": "ignore"}, "on_error 'ignore'"),
        ({"candidate_labels": None}, "`candidate_labels` is missing"),
        ({"candidate_labels": ["road", "road."]}, "have the same tokens"),
        ({"candidate_labels": ["a", "the " * 40]}, "tokens, but the text tower reads 24"),
    ],
)
def test_bad_calls_name_the_fix(options, words, segmenter):
    with pytest.raises(ValueError, match=words):
        segmenter(np.zeros((32, 32, 3), np.uint8), **{"candidate_labels": WORDS, **options})
    with pytest.raises(TypeError, match="'scale'"):
        segmenter(np.zeros((32, 32, 3), np.uint8), WORDS, scale=3)


def test_bad_folders_name_the_fix(classmap_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="spar-hf export"):
        OnnxSegmenter(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="spar-hf export"):
        OnnxSegmenter(tmp_path)
    for options, words in (
        ({"engine": "tensorrt"}, "'onnxruntime' or 'openvino'"),
        ({"dtype": "fp8"}, "Unknown dtype 'fp8'"),
        ({"threads": 0}, "`threads`"),
    ):
        with pytest.raises(ValueError, match=words):
            OnnxSegmenter(classmap_folder, **options)
    with pytest.raises(FileNotFoundError, match="dtype='fp16'"):
        OnnxSegmenter(classmap_folder, dtype="fp16")
    copy = tmp_path / "copy"
    shutil.copytree(classmap_folder, copy)
    (copy / "onnx" / "vision_model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="Export it again"):
        OnnxSegmenter(copy)
    (copy / "onnx" / "vision_model.onnx").unlink()
    with pytest.raises(FileNotFoundError, match="repeat it"):
        OnnxSegmenter(copy)
    (copy / "spar_export.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        OnnxSegmenter(copy)
    (copy / "spar_export.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="upgrade"):
        ExportedFolder.open(copy)


def test_without_the_engine_the_extra_is_named(classmap_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"spar-hf\[onnx\]"):
        OnnxSegmenter(classmap_folder)


@pytest.mark.parametrize(
    "engine, folder", [("onnxruntime", "classmap"), ("openvino", "classmap"), ("openvino", "logits")]
)
def test_results_that_are_not_finite_are_no_mask(engine, folder, open_segmenter, monkeypatch):
    """Half precision overflows without an error, and the largest of NaN is some class."""
    segmenter = open_segmenter(engine, folder)
    whole = segmenter.graph

    def overflowing(pixel_values, **values):
        return whole(pixel_values=pixel_values * np.float32(np.nan), **values)

    monkeypatch.setattr(segmenter, "graph", overflowing)
    options = {"candidate_labels": WORDS, "templates": "plain", "size": 96}
    with pytest.raises(ValueError, match="not finite"):
        segmenter(IMAGES / "coffee.png", **options)
    assert "not finite" in segmenter([IMAGES / "coffee.png"], on_error="skip", **options)[0]["error"]
