"""OpenVINO files: converted from the ONNX graph, which holds the decision, and run on the CPU."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import openvino

from spar_hf.export import onnx_format
from spar_hf.export.decision import decision_graph
from spar_hf.export.graphs import DenseGraph, TextGraph, quiet
from spar_hf.export.options import DECIDING, FORMATS
from spar_hf.export.sources import Source, Words
from spar_hf.export.verification import Runner, Written
from spar_hf.runtime.engines import kept_signal_stack, openvino_core

# Without a hint, OpenVINO computes in bfloat16 on processors that are fast at it, and labels change. fp16 halves the file:
# weights are stored in half precision and used in float32, as few processors compute in it.
PRECISION_HINTS = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}
HINT = "INFERENCE_PRECISION_HINT"


def write_graphs(
    folder: Path, source: Source, head: str, words: Words | None, dtypes: list[str], labels: str
) -> dict[str, Written]:
    """Write a vision graph per dtype to `openvino/`; for heads that decide, their logits can be run too."""
    traced = onnx_format.trace(DenseGraph(source, head != "features", words), fused=False)
    found = {}
    for dtype in dtypes:
        graph, run_dense = read(traced), None
        if dtype == "int8":
            graph = compress(graph, onnx_format.nodes_from(traced, source.vision_model.backbone.last_norm))
        name_precision(graph, dtype)
        if head in DECIDING:
            run_dense = load(graph)
            class_of_name = None if words is None else words.class_of_name.tolist()
            text = decision_graph(head, source.vision_model.config.patch_size, labels, class_of_name)
            graph = attach_decision(graph, read(onnx.parser.parse_model(text)))
            name_precision(graph, dtype)
        path = folder / "openvino" / f"vision_model{FORMATS['openvino'].dtypes[dtype]}.xml"
        save(graph, path, dtype)
        found[dtype] = Written(str(path.relative_to(folder)), (load(path), run_dense))
    return found


def write_text_tower(folder: Path, source: Source) -> Written:
    """Write `openvino/text_model.xml`."""
    path = folder / "openvino" / "text_model.xml"
    graph = read(onnx_format.trace(TextGraph(source), fused=False))
    name_precision(graph, "fp32")
    save(graph, path, "fp32")
    return Written(str(path.relative_to(folder)), (load(path), None))


def read(graph: onnx.ModelProto) -> openvino.Model:
    """An OpenVINO model of an ONNX model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_format.save(graph, path)
        return openvino_core().read_model(path).clone()  # weights are read from the file until they are copied


def name_precision(model: openvino.Model, dtype: str) -> None:
    """Put the precision of the computation among the options that every program reads from the file."""
    model.set_rt_info(PRECISION_HINTS[dtype], ["runtime_options", HINT])


def attach_decision(dense: openvino.Model, decision: openvino.Model) -> openvino.Model:
    """One model of two: the first gives the logits that the second decides, and both see the pixels."""
    own = {port.any_name: port for port in (*dense.inputs, *dense.outputs)}
    parameters = dense.get_parameters()
    for parameter in decision.get_parameters():
        shared = own.get(parameter.get_output_tensor(0).any_name)
        if shared is None:
            parameters.append(parameter)
            continue
        result = shared.get_node()
        value = result.input_value(0) if result.get_type_name() == "Result" else result.output(0)
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(value)
    return openvino.Model(decision.get_results(), parameters, "spar")


@contextlib.contextmanager
def kept_logger_class() -> Iterator[None]:
    """
    Keep the class of loggers that are made later. Importing nncf sets its own for all libraries, whose `warning_once` is
    not that of transformers.
    """
    before = logging.getLoggerClass()
    try:
        yield
    finally:
        logging.setLoggerClass(before)


def compress(model: openvino.Model, excluded: list[str]) -> openvino.Model:
    """The model with int8 weights, which are used in float32, but for nodes that are excluded."""
    present = {node.get_friendly_name() for node in model.get_ordered_ops()}
    with quiet(), kept_signal_stack(), kept_logger_class():  # nncf makes cores of its own
        import nncf

        scope = nncf.IgnoredScope(names=[name for name in excluded if name in present])
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=scope)


def save(model: openvino.Model, path: Path, dtype: str) -> None:
    """Write a graph and its weights, `.xml` and `.bin`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, path, compress_to_fp16=dtype in ("fp16", "bf16"))


def load(model: Path | openvino.Model) -> Runner:
    """A function that runs a graph on the CPU, in the precision that the graph names."""
    core = openvino_core()
    read = core.read_model(model) if isinstance(model, Path) else model
    hint = str(read.get_rt_info(["runtime_options", HINT]).value)
    compiled = core.compile_model(read, "CPU", {HINT: hint})
    inputs, outputs = ([port.any_name for port in ports] for ports in (compiled.inputs, compiled.outputs))

    def run(values: dict[str, Any]) -> dict[str, np.ndarray]:
        found = compiled({name: values[name] for name in inputs})
        return {name: np.array(found[name]) for name in outputs}

    return run
