"""OpenVINO exports: the same decision inside the graph, in the precision that the file names."""

import gc
import logging
import signal
import subprocess
import sys

import numpy as np
import pytest

from spar_hf.export import export
from spar_hf.runtime import OnnxSegmenter
from spar_hf.runtime.engines import signal_stack

openvino = pytest.importorskip("openvino")


@pytest.mark.slow
def test_all_precisions_in_one_folder(model_folder, tmp_path):
    loggers = logging.getLoggerClass()
    record = export(model_folder, tmp_path / "model", format="openvino", dtypes=["fp32", "fp16", "bf16", "int8"])
    assert logging.getLoggerClass() is loggers  # nncf would have its own for every library
    rows = record["verification"]["vision"]
    assert all(row["labels_wrong"] == 0 and row["logit_error"] < 1e-4 for row in rows if row["dtype"] == "fp32")
    hints = {}
    for dtype, path in record["graphs"].items():
        graph = openvino.Core().read_model(tmp_path / "model" / path)
        hints[dtype] = str(graph.get_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"]).value)
        assert [port.any_name for port in graph.outputs] == ["labels", "confidence"]
    assert hints == {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}
    assert (tmp_path / "model" / record["text_graph"]).is_file()
    # a program that goes on after its segmenters are freed, and a signal that Python handles
    words, image = ["road", "sky"], np.zeros((40, 60, 3), np.uint8)
    segmenters = [OnnxSegmenter(tmp_path / "model", engine="openvino", dtype=dtype) for dtype in hints]
    maps = [segmenter(image, candidate_labels=words, output="map")["map"] for segmenter in segmenters]
    assert {found.shape for found in maps} == {(40, 60)}
    while segmenters:  # the oldest first
        segmenters.pop(0)
        gc.collect()
    if sys.platform == "linux":
        stack = signal_stack()
        with open("/proc/self/maps", encoding="utf-8") as file:
            areas = [[int(side, 16) for side in line.split()[0].split("-")] for line in file]
        assert not stack.address or any(low <= stack.address < high for low, high in areas)
    ended = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: ended.append(number))
    try:
        subprocess.run([sys.executable, "-c", ""], check=True)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert ended
