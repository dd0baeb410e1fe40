"""AOTInductor packages: graphs compiled for the processor of this machine, which torch and C++ programs load."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

from spar_hf.export.graphs import DenseGraph, TextGraph, quiet
from spar_hf.export.options import FORMATS
from spar_hf.export.sources import Source, Words
from spar_hf.export.verification import Runner, Written
from spar_hf.utils.errors import UsageError


def write_graphs(
    folder: Path, source: Source, head: str, words: Words | None, dtypes: list[str], labels: str
) -> dict[str, Written]:
    """Compile a vision graph per dtype to `aoti/`."""
    found = {}
    for dtype in dtypes:
        graph = DenseGraph(source, head != "features", words, dtype)
        path = folder / "aoti" / f"vision_model{FORMATS['aoti'].dtypes[dtype]}.pt2"
        compile_graph(graph, path)
        found[dtype] = Written(str(path.relative_to(folder)), (load(path, graph), None))
    return found


def write_text_tower(folder: Path, source: Source) -> Written:
    """Write `aoti/text_model.pt2`."""
    path, graph = folder / "aoti" / "text_model.pt2", TextGraph(source)
    compile_graph(graph, path)
    return Written(str(path.relative_to(folder)), (load(path, graph), None))


def compile_graph(graph: DenseGraph | TextGraph, path: Path) -> None:
    """
    Trace and compile a graph.

    Raises:
        UsageError: there is no C++ compiler.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UsageError(
            "--format aoti needs a C++ compiler: install g++, or name yours in CXX. --format onnx needs none."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet(), torch.no_grad():
        program = torch.export.export(graph, (), kwargs=graph.example(), dynamic_shapes=graph.dynamic_shapes())
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def load(path: Path, graph: nn.Module) -> Runner:
    """A function that runs a package; `graph` names its inputs."""
    compiled = torch._inductor.aoti_load_package(str(path))

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = compiled(**{name: torch.from_numpy(values[name]) for name in graph.example()})  # type: ignore[operator]
        return {name: value.numpy() for name, value in found.items()}

    return run
