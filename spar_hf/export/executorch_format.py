"""
ExecuTorch programs: traced by transformers' exporter, with matrix products and convolutions delegated to XNNPACK.

XNNPACK's other operations are approximations: with its GELU, logits are off by 4e-3.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spar_hf.export.graphs import DenseGraph, TextGraph, quiet
from spar_hf.export.sources import Source, Words
from spar_hf.export.verification import Runner, Written
from spar_hf.model import positions

MAX_SIDE, MAX_NAMES = 640, 1000


def limits(source: Source) -> dict[str, int]:
    """
    Largest inputs: ExecuTorch reserves memory for them when a program is loaded, the scores of all pairs of patches
    among it.
    """
    return {"batch": 1, "side": max(MAX_SIDE, source.vision_model.config.image_size), "names": MAX_NAMES}


def write_graphs(
    folder: Path, source: Source, head: str, words: Words | None, dtypes: list[str], labels: str
) -> dict[str, Written]:
    """Write `executorch/vision_model.pte`."""
    graph, most = DenseGraph(source, head != "features", words), limits(source)
    shapes = graph.dynamic_shapes(max_side=most["side"], max_names=most["names"])
    del shapes["pixel_values"][0]
    path = folder / "executorch" / "vision_model.pte"
    lower(graph, graph.example(batch=1), shapes, path)
    return {"fp32": Written(str(path.relative_to(folder)), (load(path, list(shapes), head_output(head)), None))}


def write_text_tower(folder: Path, source: Source) -> Written:
    """Write `executorch/text_model.pte`, for up to 64 texts at once."""
    graph, path = TextGraph(source), folder / "executorch" / "text_model.pte"
    shapes = {"input_ids": {0: torch.export.Dim("names", min=1, max=64)}}
    lower(graph, graph.example(), shapes, path)
    return Written(str(path.relative_to(folder)), (load(path, ["input_ids"], "text_embeds"), None))


def head_output(head: str) -> str:
    """Name of the output of a head."""
    return "feature_map" if head == "features" else "logits"


def lower(graph: DenseGraph | TextGraph, example: dict[str, Any], shapes: dict[str, Any], path: Path) -> None:
    """Trace a graph and write its program."""
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter

    module: Any = graph  # the exporter takes any module, whatever its annotation says
    with quiet(), only_products(), steps_as_tensors():
        program, _ = ExecutorchExporter().export_program(module, example, ExecutorchConfig(dynamic_shapes=shapes))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        program.write_to_file(file)


@contextlib.contextmanager
def only_products() -> Iterator[None]:
    """In this block, transformers' exporter delegates matrix products and convolutions only."""
    from executorch.backends.xnnpack.partition.config import gemm_configs
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from transformers.exporters.exporter_executorch import _BACKEND_PREPARE

    prepare: dict[str, Any] = _BACKEND_PREPARE  # type: ignore[assignment]
    original = prepare["xnnpack"]
    configs = [getattr(gemm_configs, f"{name}Config") for name in ("Linear", "Addmm", "MM", "Convolution")]
    prepare["xnnpack"] = lambda model, inputs: (*original(model, inputs)[:2], [XnnpackPartitioner(configs=configs)])
    try:
        yield
    finally:
        prepare["xnnpack"] = original


@contextlib.contextmanager
def steps_as_tensors() -> Iterator[None]:
    """
    In this block, steps between positions are tensors: ExecuTorch freezes quotients of sizes that are numbers. An offset
    that is a tensor makes them so.
    """
    original = positions.bicubic_matrix

    def bicubic_matrix(source, target, device=None, offset=0.0, span=None):
        return original(source, target, device, torch.zeros(()) + offset, span)

    positions.bicubic_matrix = bicubic_matrix
    try:
        yield
    finally:
        positions.bicubic_matrix = original


def load(path: Path, inputs: list[str], output: str) -> Runner:
    """A function that runs a program; inputs have an order and no names there."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = method.execute([torch.from_numpy(values[name]) for name in inputs])
        return {output: found[0].numpy().copy()}

    return run
