"""One export of spar-tiny for all tests of the runtime and of the page in the browser, and variants of it."""

import json
import shutil

import pytest

from spar_hf import SPAR_TINY


@pytest.fixture(scope="session")
def classmap_folder(tmp_path_factory):
    """spar-tiny as a graph that decides, with its text tower."""
    from spar_hf.export.exporting import export

    folder = tmp_path_factory.mktemp("exports") / "classmap"
    with pytest.MonkeyPatch.context() as patch:  # `tests/export` has the comparisons with PyTorch, which take seconds
        patch.setattr("spar_hf.export.exporting.verify", lambda *args: [])
        patch.setattr("spar_hf.export.exporting.verify_text", lambda *args: [])
        export(SPAR_TINY, folder, head="classmap")
    return folder


@pytest.fixture(scope="session")
def logits_folder(classmap_folder):
    """The same graph without the decision."""
    import onnx

    folder = classmap_folder.parent / "logits"
    shutil.copytree(classmap_folder, folder)
    path = folder / "onnx" / "vision_model.onnx"
    model = onnx.load(path)
    last = next(i for i, node in enumerate(model.graph.node) if "logits" in node.output)
    del model.graph.node[last + 1 :], model.graph.input[2:], model.graph.output[:]
    axes = ["batch", "names", "rows", "columns"]
    model.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, axes))
    onnx.save(model, path)
    change_record(folder, head="logits")
    return folder


@pytest.fixture(scope="session")
def baked_folder(classmap_folder):
    """The same graph with three classes in it, the last of which is the background."""
    import onnx
    from onnx import numpy_helper

    from spar_hf.runtime import OnnxSegmenter

    folder = classmap_folder.parent / "baked"
    shutil.copytree(classmap_folder, folder)
    found = OnnxSegmenter(folder).classes(["cup, mug", "table"], background=["wall", "floor"])
    path = folder / "onnx" / "vision_model.onnx"
    model = onnx.load(path)
    for name in ("text_embeds", "class_of_name"):
        model.graph.input.remove(next(value for value in model.graph.input if value.name == name))
        model.graph.initializer.append(numpy_helper.from_array(getattr(found, name), name))
    onnx.save(model, path)
    names = (["cup", "mug"], ["table"], ["wall", "floor"])
    classes = [{"label": label, "names": some} for label, some in zip(found.labels, names, strict=True)]
    change_record(folder, classes=classes, class_of_name=found.class_of_name.tolist(), background=2, text_graph=None)
    return folder


def change_record(folder, **values):
    """Change some entries of an export's record."""
    path = folder / "spar_export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
