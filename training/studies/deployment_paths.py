"""
Ways to run a vision tower on a CPU, for `benchmark.py --suite deploy`. Each runs in a process of its own, so that its
threads, start-up and memory are its own. That process is this file, and what runs exported graphs imports no torch:

    python deployment_paths.py '{"path": "OpenVINO bf16", "folder": "work", "threads": 2}'

reads one request per line, `{"input": NPY, "output": NPY or null}`, and answers each with seconds on the clock, seconds of
computing, and those since the start of the process.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# from normalised images (batch, 3, height, width) to feature maps (batch, dim, rows, columns), both float32
Run = Callable[[np.ndarray], np.ndarray]


class Taken(NamedTuple):
    """
    What a run took.

    Attributes:
        seconds: on the clock.
        cpu_seconds: of computing, over all threads; other work on the machine adds little to them.
    """

    seconds: float
    cpu_seconds: float


class PathFailed(Exception):
    """A way to run the model that does not work here; the message is the last line of what it said."""


def torch_path(
    folder: Path, threads: int, dtype: str = "float32", autocast: bool = False, compile: bool = False
) -> Run:
    """The model in torch, with weights in `dtype`."""
    import torch

    torch.set_num_threads(threads)
    return as_run(load_model(folder, dtype), autocast, compile)


def load_model(folder: Path, dtype: str) -> Any:
    """The saved vision tower."""
    from transformers.utils import logging

    from spar_hf import SparVisionModel

    logging.disable_progress_bar()
    return SparVisionModel.from_pretrained(folder / "model", dtype=dtype).eval()


def as_run(model: Any, autocast: bool = False, compile: bool = False) -> Run:
    """A function on arrays."""
    import torch

    from spar_hf import compile_model

    forward = compile_model(model, fullgraph=True) if compile else model

    @torch.no_grad()
    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return forward(torch.from_numpy(pixels)).feature_map.float().numpy()

    return run


def torchao_path(folder: Path, threads: int, bits: int) -> Run:
    """Weights of linear layers in a few bits, computed in bfloat16 and compiled."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    torch.set_num_threads(threads)
    model = load_model(folder, "bfloat16")
    quantize_(model, Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    return as_run(model, compile=True)


def exported(folder: Path, format: str, dtype: str) -> str:
    """The file of an exported graph."""
    return json.loads((folder / "graphs.json").read_text(encoding="utf-8"))[f"{format} {dtype}"]


def onnx_path(folder: Path, threads: int, dtype: str) -> Run:
    """An exported graph in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    path, providers = exported(folder, "onnx", dtype), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    return lambda pixels: session.run(["feature_map"], {"pixel_values": pixels})[0]


def openvino_path(folder: Path, threads: int, dtype: str, precision: str) -> Run:
    """An exported graph in OpenVINO, with its precision hint."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(exported(folder, "openvino", dtype), "CPU", hints).create_infer_request()
    return lambda pixels: request.infer({"pixel_values": pixels})["feature_map"]


@dataclass(frozen=True)
class DeploymentPath:
    """
    A way to run the model.

    Attributes:
        load: `(folder, threads)` -> a function on arrays.
        packages: what it needs beside torch and transformers.
        export: the graph that it reads, as format and dtype of `spar_hf.export`.
    """

    load: Callable[[Path, int], Run]
    packages: tuple[str, ...] = ()
    export: tuple[str, str] | None = None

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


EAGER = "eager fp32"
PATHS = {
    EAGER: DeploymentPath(torch_path),
    "eager, bf16 weights": DeploymentPath(partial(torch_path, dtype="bfloat16")),
    "eager, bf16 autocast": DeploymentPath(partial(torch_path, autocast=True)),
    "torch.compile fp32": DeploymentPath(partial(torch_path, compile=True)),
    "torch.compile, bf16 weights": DeploymentPath(partial(torch_path, dtype="bfloat16", compile=True)),
    "torch.compile, bf16 autocast": DeploymentPath(partial(torch_path, compile=True, autocast=True)),
    "ONNX Runtime fp32": DeploymentPath(partial(onnx_path, dtype="fp32"), ("onnxruntime",), ("onnx", "fp32")),
    "ONNX Runtime int8": DeploymentPath(partial(onnx_path, dtype="int8"), ("onnxruntime",), ("onnx", "int8")),
    **{
        f"OpenVINO {dtype}": DeploymentPath(
            partial(openvino_path, dtype=dtype, precision=precision), ("openvino", "nncf"), ("openvino", dtype)
        )
        for dtype, precision in (("fp32", "f32"), ("bf16", "bf16"), ("int8", "f32"))
    },
    "torchao int8 weights": DeploymentPath(partial(torchao_path, bits=8), ("torchao",)),
    "torchao int4 weights": DeploymentPath(partial(torchao_path, bits=4), ("torchao",)),
}


class Worker:
    """
    A process that runs the model in one way.

    Attributes:
        start (`Taken`, *optional*): from the start of the process to its first result.
    """

    def __init__(self, path: str, folder: Path, threads: int):
        self.start: Taken | None = None
        self._log = folder / f"{'-'.join(path.replace(',', '').split())}.log"
        settings = json.dumps({"path": path, "folder": str(folder), "threads": threads})
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, settings],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    def run(self, pixels: Path, output: Path | None = None) -> Taken:
        """
        Run the image of a file, `(1, 3, height, width)`, and write its feature map to `output`.

        Raises:
            PathFailed: the process ended.
        """
        request = {"input": str(pixels), "output": None if output is None else str(output)}
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise PathFailed(said[-1][:300] if said else "the process ended without a word")
        found = json.loads(answer)
        if self.start is None:
            self.start = Taken(time.perf_counter() - self._started, found["process_seconds"])
        return Taken(found["seconds"], found["cpu_seconds"])

    def peak_bytes(self) -> int | None:
        """The most memory that the process has held; `None` where the system does not say."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next((1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:")), None)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


def serve(path: str, folder: str, threads: int) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    run = PATHS[path].load(Path(folder), threads)
    for line in sys.stdin:
        request = json.loads(line)
        pixels = np.load(request["input"])
        start, cpu_start = time.perf_counter(), time.process_time()
        features = run(pixels)
        found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        if request["output"]:
            np.save(request["output"], features)
        answers.write(json.dumps({**found, "process_seconds": time.process_time()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
