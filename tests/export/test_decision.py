"""The decision inside ONNX graphs equals that of the library, for any geometry; and what is not verified is not written."""

from types import SimpleNamespace

import numpy as np
import onnx.parser
import onnxruntime
import pytest
import torch
from google.protobuf.message import EncodeError
from typer.testing import CliRunner

from spar_hf.cli.main import app
from spar_hf.export import NotVerified, decision, export, onnx_format
from spar_hf.export.verification import Written, check_row, dense_errors
from spar_hf.model.segmentation import class_probabilities, decide
from spar_hf.runtime.engines import openvino_core

PATCH = 8


def model_of(head, class_of_name, baked=False):
    text = decision.decision_graph(head, PATCH, "uint16", class_of_name.tolist() if baked else None)
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    return model


def run(head, class_of_name, inputs, baked=False):
    model = model_of(head, class_of_name, baked)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    given = {value.name for value in session.get_inputs()}
    return session.run(None, {name: value for name, value in inputs.items() if name in given})


@pytest.mark.parametrize(
    "working, image, names, classes, batch",
    [
        ((32, 40), (32, 40), 3, 3, 1),
        ((30, 37), (95, 61), 5, 2, 2),  # several names per class, a padded grid, another size
        ((61, 24), (17, 8), 70, 70, 1),  # smaller than what the model saw
        ((8, 5), (9, 30), 4, 3, 1),  # one patch
        ((40, 8), (1, 200), 1, 1, 3),  # one row, one name
        ((64, 64), (256, 256), 61, 2, 1),  # many names per class, in several threads
    ],
)
@pytest.mark.parametrize("values", [decision.STRIP_VALUES, 1], ids=["one strip", "a row per strip"])
def test_any_geometry(monkeypatch, working, image, names, classes, batch, values):
    monkeypatch.setattr(decision, "STRIP_VALUES", values)
    grid = [-(-side // PATCH) for side in working]
    logits = torch.randn(batch, names, *grid, generator=torch.Generator().manual_seed(sum(image))) * 4
    class_of_name = (torch.arange(names) * classes // names).long()
    inputs = {
        "logits": logits.numpy(),
        "pixel_values": np.zeros((batch, 3, *working), dtype=np.float32),
        "class_of_name": class_of_name.numpy(),
        "image_size": np.array(image),
    }
    baked = names % 2 == 1
    labels, confidence = run("classmap", class_of_name, inputs, baked)
    probabilities = run("probabilities", class_of_name, inputs, baked)[0]
    for i in range(batch):
        expected = decide(logits[i], class_of_name, PATCH, working, image)
        assert np.array_equal(labels[i], expected.labels)
        np.testing.assert_allclose(confidence[i], expected.probabilities, atol=2e-3)
        every = class_probabilities(logits[i], class_of_name, PATCH, working, image)[1]
        np.testing.assert_allclose(probabilities[i], every, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("head", ["classmap", "probabilities"])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_logit_that_is_not_finite_shows_in_all_of_its_image(engine, head, bad):
    """OpenVINO's maximum and exponential make numbers of NaN, and a class map would look right."""
    class_of_name = np.array([0, 1, 1, 2])
    logits = np.random.default_rng(0).normal(size=(3, 4, 3, 2)).astype(np.float32)
    logits[1, 2, 0, 1] = bad
    inputs = {"logits": logits, "pixel_values": np.zeros((3, 3, 24, 16), dtype=np.float32)}
    inputs |= {"class_of_name": class_of_name, "image_size": np.array([31, 20])}
    if engine == "onnxruntime":
        result = run(head, class_of_name, inputs)[-1]
    else:
        pytest.importorskip("openvino")
        core = openvino_core()
        graph = core.compile_model(core.read_model(model_of(head, class_of_name).SerializeToString()), "CPU")
        result = graph(inputs)[graph.outputs[-1]]
    assert np.isfinite(result[[0, 2]]).all() and not np.isfinite(result[1]).any()


def test_many_classes_need_more_than_a_byte():
    found = [decision.label_type(classes) for classes in (2, 256, 257, 65536, None)]
    assert found == ["uint8", "uint8", "uint16", "uint16", "uint16"]
    with pytest.raises(ValueError, match="limited to 65536 classes, not 65537"):
        decision.label_type(65537)


def test_what_differs_from_pytorch_is_not_written(model_folder, tmp_path, monkeypatch):
    def write_graphs(folder, source, *_):
        def wrong(inputs):
            rows, columns = (-(-side // 16) for side in inputs["pixel_values"].shape[2:])
            batch, names = len(inputs["pixel_values"]), len(inputs["text_embeds"])
            return {"logits": np.zeros((batch, names, rows, columns), dtype=np.float32)}

        return {"fp32": Written("onnx/vision_model.onnx", (wrong, None))}

    monkeypatch.setattr(onnx_format, "write_graphs", write_graphs)
    with pytest.raises(NotVerified, match=r"logit_error .* is above 0\.0001"):
        export(model_folder, tmp_path / "in" / "out", head="logits")
    result = CliRunner().invoke(
        app, ["export", str(model_folder), "--head", "logits", "--output", str(tmp_path / "out")]
    )
    assert result.exit_code == 1 and "Nothing was written" in result.output
    steps = [line for line in result.output.splitlines() if line.endswith("…")]
    assert [step.split()[0] for step in steps] == ["reading", "writing", "comparing"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_logits_of_a_head_without_cosines_are_compared_in_every_precision():
    row = {"case": "x", "size": (32, 32), "names": None}
    for dtype in ("fp32", "fp16", "int8"):
        check_row({**row, "dtype": dtype, "logit_error": 1e-5, "relative_error": 1e-6})
        for wrong in (float("nan"), 0.2):
            with pytest.raises(NotVerified, match="relative_error"):
                check_row({**row, "dtype": dtype, "logit_error": wrong, "relative_error": wrong})
    head = SimpleNamespace(has_classes=True, model=SimpleNamespace(config=SimpleNamespace(normalize_features=False)))
    expected = torch.tensor([[-8.0, 2.0]])
    errors = dense_errors(head, {"logits": np.array([[-8.0, 3.0]])}, expected)
    assert errors == {"logit_error": 1.0, "relative_error": 0.125}


def test_large_weights_lie_in_a_file_of_their_own(tmp_path, monkeypatch):
    """Protobuf serialises no message of 2 GB or more, nor tells its size; here none of 2 kB."""
    serialise = onnx.ModelProto.SerializeToString

    def limited(model, **options):
        if len(data := serialise(model, **options)) > 2000:
            raise EncodeError("Failed to serialize proto")
        return data

    weight = onnx.numpy_helper.from_array(np.ones((64, 64), dtype=np.float32), "weight")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 64]) for name in "xy"]
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    monkeypatch.setattr(onnx_format, "MAX_WEIGHT_BYTES", 1000)
    monkeypatch.setattr(onnx.ModelProto, "SerializeToString", limited)
    monkeypatch.setattr(onnx.ModelProto, "ByteSize", lambda model: len(limited(model)))
    onnx_format.save(model, tmp_path / "vision_model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vision_model.onnx", "vision_model.onnx_data"]
    # the same graph is run in memory and quantised afterwards
    for graph in (tmp_path / "vision_model.onnx", model, onnx_format.quantise(model, "none")):
        found = onnx_format.load(graph)({"x": np.ones((1, 64), dtype=np.float32)})
        np.testing.assert_allclose(found["y"], 64, rtol=0.01)
