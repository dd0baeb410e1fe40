"""ONNX files: graphs traced by transformers' exporter, with the decision attached, and run by ONNX Runtime."""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import onnxruntime
import torch
from transformers.exporters import OnnxConfig, OnnxExporter

from spar_hf.export.decision import decision_graph
from spar_hf.export.graphs import DenseGraph, TextGraph, quiet
from spar_hf.export.options import DECIDING, FORMATS
from spar_hf.export.sources import Source, Words
from spar_hf.export.verification import Runner, Written
from spar_hf.utils.errors import UsageError

MAX_WEIGHT_BYTES = 2**31 - 2**26  # in one file; a protobuf message ends at 2 GiB, and the nodes are in it too
AXES = {
    "pixel_values": ("batch", 3, "height", "width"),
    "text_embeds": ("names", None),
    "input_ids": ("names", None),
    "logits": ("batch", "names", "rows", "columns"),
    "feature_map": ("batch", None, "rows", "columns"),
}


def trace(graph: DenseGraph | TextGraph, fused: bool = True) -> onnx.ModelProto:
    """
    An ONNX model of a graph, whose axes may have any size.

    Args:
        graph: the module.
        fused: whether to use operations of ONNX Runtime (`com.microsoft`). Without its attention, the scores of all pairs of
            patches are in memory: 1 GiB per head at 2048×2048 pixels and a patch of 16. Other programs do not know them.
    """
    config = OnnxConfig(dynamic_shapes=graph.dynamic_shapes(), ort_fusions="cpu" if fused else None)
    module: Any = graph  # the exporter takes any module, whatever its annotation says
    with quiet():
        try:
            exporter = OnnxExporter()
        except ImportError as error:  # of a torch that is too old for it
            raise UsageError(str(error)) from error
        program, _ = exporter.export_program(module, graph.example(), config)
    model = onnx_ir.to_proto(program)
    del model.graph.value_info[:]  # its axes have names of the trace
    for value in (*model.graph.input, *model.graph.output):
        name_axes(value, AXES[value.name])
    return model


def name_axes(value: Any, names: tuple[str | int | None, ...]) -> None:
    """Name the axes of an input or output that may have any size; `None` keeps the size."""
    for axis, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
        if isinstance(name, str):
            axis.dim_param = name


def attach_decision(
    dense: onnx.ModelProto, head: str, patch_size: int, labels: str, class_of_name: list[int] | None
) -> onnx.ModelProto:
    """A copy of a model of logits that ends in the decision, see [`decision_graph`]."""
    decision = onnx.parser.parse_model(decision_graph(head, patch_size, labels, class_of_name)).graph
    model = onnx.ModelProto()
    model.CopyFrom(dense)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.input.extend(value for value in decision.input if value.name not in known)
    model.graph.node.extend(decision.node)
    model.graph.initializer.extend(decision.initializer)
    del model.graph.output[:]
    model.graph.output.extend(decision.output)
    return model


def is_large(model: onnx.ModelProto) -> bool:
    """Whether the weights of a model are too large for one file. The model itself cannot say: its `ByteSize` fails then."""
    types = onnx.helper.tensor_dtype_to_np_dtype
    sizes = (math.prod(weight.dims) * types(weight.data_type).itemsize for weight in model.graph.initializer)
    return sum(sizes) > MAX_WEIGHT_BYTES


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file; weights of 2 GB or more go to a second one, `NAME.onnx_data`. The model keeps its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_large(model):  # `onnx.save` would take the weights out of the model
        onnx_ir.save(onnx_ir.from_proto(model), path, external_data=f"{path.name}_data")
    else:
        onnx.save(model, path)


def load(graph: Path | onnx.ModelProto) -> Runner:
    """A function that runs a graph with ONNX Runtime on the CPU."""
    if not isinstance(graph, Path) and is_large(graph):  # it cannot be handed over in memory
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps what is open
            path = Path(folder) / "model.onnx"
            save(graph, path)
            return load(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    model = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = session.run(outputs, {name: values[name] for name in inputs})
        return dict(zip(outputs, found, strict=True))

    return run


def write_graphs(
    folder: Path, source: Source, head: str, words: Words | None, dtypes: list[str], labels: str
) -> dict[str, Written]:
    """Write a vision graph per dtype to `onnx/`; for heads that decide, their logits can be run too."""
    found, traced = {}, dict[str, onnx.ModelProto]()
    for dtype in dtypes:
        weights = "fp32" if dtype == "int8" else dtype
        if weights not in traced:
            traced[weights] = trace(DenseGraph(source, head != "features", words, weights))
        graph = traced[weights]
        if dtype == "int8":
            graph = quantise(graph, source.vision_model.backbone.last_norm)
        path = folder / "onnx" / f"vision_model{FORMATS['onnx'].dtypes[dtype]}.onnx"
        run_dense = None
        if head in DECIDING:
            run_dense = load(graph)
            class_of_name = None if words is None else words.class_of_name.tolist()
            graph = attach_decision(graph, head, source.vision_model.config.patch_size, labels, class_of_name)
        save(graph, path)
        found[dtype] = Written(str(path.relative_to(folder)), (load(path), run_dense))
    return found


def write_text_tower(folder: Path, source: Source) -> Written:
    """Write `onnx/text_model.onnx`."""
    path = folder / "onnx" / "text_model.onnx"
    save(trace(TextGraph(source)), path)
    return Written(str(path.relative_to(folder)), (load(path), None))


def quantise(dense: onnx.ModelProto, last_norm: str) -> onnx.ModelProto:
    """
    A copy whose matrix products before the last norm have int8 weights per column, and activations that are quantised as
    they come (`onnxruntime.quantization.quantize_dynamic`).

    Args:
        dense: the model.
        last_norm: name of the last norm in the backbone.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        with quiet():
            quantize_dynamic(
                dense,
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=nodes_from(dense, last_norm),
                use_external_data_format=is_large(dense),
                extra_options={
                    "DefaultTensorType": onnx.TensorProto.FLOAT
                },  # of results of ONNX Runtime's own operations
            )
        return onnx.load(path)


def nodes_from(graph: onnx.ModelProto, last_norm: str) -> list[str]:
    """Names of the nodes from the last norm of the backbone on, by the names of its weights."""
    found, reached = [], set[str]()
    for node in graph.graph.node:
        if any(f"backbone.{last_norm}." in name for name in node.input) or reached.intersection(node.input):
            reached.update(node.output)
            found.append(node.name)
    return found
