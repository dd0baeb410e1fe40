"""OpenVINO exports: the same decision inside the graph, in the precision that the file names."""

import pytest

from spar_hf.export import export

openvino = pytest.importorskip("openvino")


@pytest.mark.slow
def test_all_precisions_in_one_folder(model_folder, tmp_path):
    record = export(model_folder, tmp_path / "model", format="openvino", dtypes=["fp32", "fp16", "bf16", "int8"])
    rows = record["verification"]["vision"]
    assert all(row["labels_wrong"] == 0 and row["logit_error"] < 1e-4 for row in rows if row["dtype"] == "fp32")
    hints = {}
    for dtype, path in record["graphs"].items():
        graph = openvino.Core().read_model(tmp_path / "model" / path)
        hints[dtype] = str(graph.get_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"]).value)
        assert [port.any_name for port in graph.outputs] == ["labels", "confidence"]
    assert hints == {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}
    assert (tmp_path / "model" / record["text_graph"]).is_file()
