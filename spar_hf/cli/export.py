"""`spar-hf export`: a model as graphs that run without PyTorch."""

from pathlib import Path
from typing import Annotated

import typer

from spar_hf.cli.arguments import Templates
from spar_hf.cli.reporting import exit_on_error, quiet_transformers, say
from spar_hf.utils.options import HELP

Model = Annotated[str, typer.Argument(help="Folder or hub id of a SPAR model, of a linear head, or of a backbone.")]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
Format = Annotated[str, typer.Option(help="onnx, openvino, aoti, executorch or web (a page for browsers).")]
Head = Annotated[
    str, typer.Option(help="features, logits, classmap (class and probability of every pixel) or probabilities.")
]
Words = Annotated[
    str | None,
    typer.Option(
        help="Classes that become part of the graph, as --labels of `segment`: @FILE, a vocabulary, or the words. Default: "
        "their embeddings are an input, and the text tower is exported too."
    ),
]
Surroundings = Annotated[
    str | None,
    typer.Option(
        "--background", help="What surrounds the classes of --words: auto (common stuff words) or one of them."
    ),
]
Dtype = Annotated[str, typer.Option(help="Precisions, separated by commas: fp32, fp16, bf16, int8. A graph each.")]
Vendor = Annotated[
    Path | None,
    typer.Option(
        help="For --format web: folder in which the packages of the page were installed with npm; they are copied. Default: "
        "the page loads them from a public CDN."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help=HELP["overwrite"])]


def export(
    model: Model,
    output: Output,
    format: Format = "onnx",
    head: Head = "classmap",
    words: Words = None,
    templates: Templates = None,
    surroundings: Surroundings = None,
    dtype: Dtype = "fp32",
    vendor: Vendor = None,
    overwrite: Overwrite = False,
) -> None:
    """
    Write a folder with the graphs of a model for programs without PyTorch.

    Each graph is compared with PyTorch at sizes and numbers of names that it was not traced with; nothing is written unless
    all agree. The guide docs/export.md lists inputs and outputs.
    """
    quiet_transformers()
    dtypes = [part.strip() for part in dtype.split(",") if part.strip()]
    from spar_hf.export.options import check_options

    with exit_on_error(failure=()):
        check_options(format, head, dtypes)

    from spar_hf.export import NotVerified
    from spar_hf.export import export as export_model
    from spar_hf.export.verification import table
    from spar_hf.utils.atomic import check_inputs_stay
    from spar_hf.utils.labels import read_labels

    with exit_on_error(failure=(NotVerified, OSError)):
        vocabulary = None if words is None else read_labels(words)
        if words is not None and words.startswith("@"):
            check_inputs_stay([output], [words[1:]])
        record = export_model(
            model,
            output,
            format=format,
            head=head,
            words=vocabulary,
            templates=templates,
            background=surroundings,
            dtypes=dtypes,
            overwrite=overwrite,
            vendor=vendor,
            tell=lambda step: say(f"{step} …", err=True),
        )
    for line in table(record["verification"]["vision"]):
        say(line)
    for name in [*record["graphs"].values(), record["text_graph"]]:
        if name is not None:
            say(f"written: {output / name}, {(output / name).stat().st_size / 1e6:.1f} MB")
