"""Graphs run by ONNX Runtime or OpenVINO on a CPU."""

import contextlib
import ctypes
import functools
import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ENGINES = ("onnxruntime", "openvino")
HINTS = {"bf16": "bf16"}  # of OpenVINO; weights in half precision or int8 are computed in float32


class Graph:
    """
    A graph that is ready to run. Threads may share it.

    Args:
        path: an ONNX file, or with OpenVINO also an `.xml` file.
        engine: `"onnxruntime"` or `"openvino"`.
        threads: threads of one run; the engine's choice by default.
        dtype: what OpenVINO computes in. Without the hint, it takes bfloat16 on CPUs that have it (AMX), for graphs in
            float32 too, which changes labels.

    Attributes:
        inputs, outputs: names.
        compiled: the engine's own object: an `InferenceSession` or a `CompiledModel`.

    Raises:
        ImportError: the engine is not installed.
        ValueError: an unknown engine, or a file that it cannot load.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    compiled: Any

    def __init__(self, path: Path, engine: str = "onnxruntime", threads: int | None = None, dtype: str = "fp32"):
        if engine not in ENGINES:
            raise ValueError(f"Unknown engine {engine!r}; use {' or '.join(map(repr, ENGINES))}.")
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise ValueError(f"`threads` is {threads!r}; it must be an integer of at least 1, or None.")
        try:
            self._run: Any = (open_onnxruntime if engine == "onnxruntime" else open_openvino)(
                self, path, threads, dtype
            )
        except ModuleNotFoundError as error:
            extra = "onnx" if engine == "onnxruntime" else "openvino"
            raise ImportError(
                f"engine={engine!r} needs the package {engine}: pip install 'spar-hf[{extra}]'"
            ) from error
        except Exception as error:  # engines have classes of their own
            reason = str(error).strip().splitlines()[-1][:300]
            raise ValueError(
                f"{engine} cannot load {str(path)!r}: {reason}. Export it again, or take another engine."
            ) from error

    def __call__(self, **values: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name, for inputs by name. Inputs that the graph has not got are left out."""
        return self._run({name: values[name] for name in self.inputs})


def open_onnxruntime(graph: Graph, path: Path, threads: int | None, dtype: str) -> Any:
    """Fill in the attributes of a graph; returns what runs it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or 0
    session = graph.compiled = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph.inputs = tuple(value.name for value in session.get_inputs())
    graph.outputs = tuple(value.name for value in session.get_outputs())

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(graph.outputs, session.run(list(graph.outputs), values), strict=True))

    return run


def open_openvino(graph: Graph, path: Path, threads: int | None, dtype: str) -> Any:
    """As [`open_onnxruntime`]."""
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS.get(dtype, "f32")}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    model = graph.compiled = openvino_core().compile_model(path, "CPU", settings)
    graph.inputs = tuple(port.get_any_name() for port in model.inputs)
    graph.outputs = tuple(port.get_any_name() for port in model.outputs)

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = model.create_infer_request().infer(values)  # a request of its own: threads may share the graph
        return {port.get_any_name(): np.array(found[port]) for port in model.outputs}

    return run


_core_lock = threading.Lock()


def openvino_core() -> Any:
    """
    The one `openvino.Core` of the process, which is never freed.

    On Linux, a core's CPU plugin gives the thread an alternate stack for signals. A plugin that is freed before a younger
    one leaves the address of freed memory behind, and the next signal that Python handles, such as Ctrl-C or the end of a
    child process, would end the process (seen with OpenVINO 2026.4).
    """
    with _core_lock:  # two threads would make two, and free one
        return _make_core()


@functools.cache
def _make_core() -> Any:
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
    return core


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def signal_stack() -> _SignalStack:
    """The alternate stack of this thread for signals; address `None` if it has none. Linux only."""
    stack = _SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Free the cores of OpenVINO that others made in the block, and give this thread its stack for signals back."""
    before = signal_stack() if sys.platform == "linux" else None
    try:
        yield
    finally:
        gc.collect()
        if before is not None:
            ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)
