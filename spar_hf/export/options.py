"""What an export can be asked for: formats, heads and dtypes, which of them go together, and the packages they need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

from spar_hf.utils.errors import UsageError

HEADS = ("features", "logits", "classmap", "probabilities")
DECIDING = ("classmap", "probabilities")  # heads whose result has the size of the image
DTYPES = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Format:
    """
    A file format of exported graphs.

    Attributes:
        module: of `spar_hf.export`, which writes it.
        packages: what has to be installed, beside torch and transformers.
        install: what `pip install` needs for them.
        dtypes: file name suffix of each dtype that can be written.
        heads: heads that can be written.
        refusals: why a dtype or head cannot be written, and what to take instead.
    """

    module: str
    packages: tuple[str, ...]
    install: str
    dtypes: dict[str, str]
    heads: tuple[str, ...] = HEADS
    refusals: Mapping[str, str] = field(default_factory=dict)


DENSE = ("features", "logits")
DECIDE_OUTSIDE = dict.fromkeys(
    DECIDING,
    "The decision for every pixel is exported with --format onnx or openvino only. Take one of them, or --head logits and "
    "decide in the program.",
)
FORMATS = {
    "onnx": Format(
        "onnx_format",
        ("onnx", "onnxscript", "onnxruntime"),
        "'spar-hf[onnx]'",
        {"fp32": "", "fp16": "_fp16", "int8": "_quantized"},
        refusals={
            "bf16": "ONNX Runtime computes little in bfloat16. Take --format openvino --dtype bf16, or --dtype fp16."
        },
    ),
    "openvino": Format(
        "openvino_format",
        ("openvino", "onnx", "onnxscript", "onnxruntime"),  # it is converted from ONNX
        "'spar-hf[onnx,openvino]'",
        {"fp32": "", "fp16": "_fp16", "bf16": "_bf16", "int8": "_int8"},
    ),
    "aoti": Format(
        "aoti_format",
        (),
        "",
        {"fp32": "", "bf16": "_bf16"},
        DENSE,
        {
            **DECIDE_OUTSIDE,
            "fp16": "Processors are slow in float16. Take --dtype bf16, or for smaller files --format onnx --dtype fp16.",
            "int8": "--format aoti has no quantised graphs. Take --format openvino or onnx with --dtype int8.",
        },
    ),
    "executorch": Format(
        "executorch_format",
        ("executorch",),
        "executorch",  # in no extra: it needs newer packages than this library
        {"fp32": ""},
        DENSE,
        DECIDE_OUTSIDE
        | dict.fromkeys(
            ("fp16", "bf16", "int8"),
            "--format executorch computes in float32. Take --dtype fp32, or another format for other precisions.",
        ),
    ),
}
# formats that are one of the above with further files: name -> (format of the graph, module of `spar_hf.export`). Its
# `add_files(folder, record)` writes into the unfinished folder, whose graphs are verified.
EXTENSIONS = {"web": ("onnx", "web")}


def check_options(format: str, head: str, dtypes: Sequence[str]) -> Format:
    """
    The format of the graphs.

    Raises:
        UsageError: an unknown format, head or dtype, a combination that cannot be written, or a package is missing.

    Example:

    ```python
    >>> check_options("onnx", "classmap", ["bf16"])
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: ONNX Runtime computes little in bfloat16. Take --format openvino --dtype bf16, ...
    ```"""
    if format not in (*FORMATS, *EXTENSIONS):
        raise UsageError(f"--format {format} is unknown; use {', '.join((*FORMATS, *EXTENSIONS))}.")
    if head not in HEADS:
        raise UsageError(f"--head {head} is unknown; use {', '.join(HEADS)}.")
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown or not dtypes:
        raise UsageError(f"--dtype {','.join(unknown) or 'without a value'} is unknown; use {', '.join(DTYPES)}.")
    graph_format = EXTENSIONS[format][0] if format in EXTENSIONS else format
    found = FORMATS[graph_format]
    for name in (head, *dtypes):
        if name not in (*found.heads, *found.dtypes):
            raise UsageError(found.refusals[name])
    needed, install, option = found.packages, found.install, f"--format {format}"
    if graph_format == "openvino" and "int8" in dtypes:
        needed, install, option = (*needed, "nncf"), "'spar-hf[onnx,openvino,nncf]'", f"{option} --dtype int8"
    missing = [package for package in needed if find_spec(package) is None]
    if missing:
        raise UsageError(f"{option} needs {', '.join(missing)}: pip install {install}")
    return found
