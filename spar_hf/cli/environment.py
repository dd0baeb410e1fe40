"""`spar-hf env`: what a bug report needs to say about a machine and a model."""

from typing import Annotated

import typer

from spar_hf.cli.reporting import exit_on_error, quiet_transformers, say
from spar_hf.utils.errors import PATH_ERRORS

# packages of the extras: listed where they are installed
OPTIONAL = (
    "huggingface_hub",
    "accelerate",
    "datasets",
    "evaluate",
    "peft",
    "torchmetrics",
    "scipy",
    "gradio",
    "pycocotools",
    "pillow-heif",
    "av",
    "pyarrow",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "ray",
    "tifffile",
    "imagecodecs",
    "rasterio",
)


def environment(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder or hub id of a model or backbone: adds its kind and the fingerprints of its weights."
        ),
    ] = None,
) -> None:
    """Print versions, device and the fingerprints of a model, to paste into a bug report."""
    import torch

    from spar_hf.doctor.findings import PACKAGES, device_name, versions

    quiet_transformers()
    with exit_on_error(usage=(ValueError, *PATH_ERRORS)):
        found = versions(PACKAGES)
        found |= {name: value for name, value in versions(OPTIONAL).items() if value != "not installed"}
        found["CUDA of torch"] = torch.version.cuda or "none"
        found["device"] = device_name(torch.accelerator.current_accelerator() or torch.device("cpu"))
        if model is not None:
            found |= facts_of(model)
    for name, value in found.items():
        say(f"- {name}: {value}")


def facts_of(folder: str) -> dict[str, str]:
    """Read-out, sizes and fingerprints of the towers of a model, which are equal wherever its weights are equal."""
    import torch

    from spar_hf.doctor.examination import describe, load_subject
    from spar_hf.model.fingerprints import text_fingerprint, vision_fingerprint

    subject = load_subject(folder, torch.device("cpu"), stride=1)
    found = {"model": describe(subject), "vision fingerprint": vision_fingerprint(subject.vision)[:20]}
    if subject.towers is not None:
        tokenizer = subject.processor.tokenizer
        found["text fingerprint"] = text_fingerprint(subject.towers, tokenizer)[:20]
    return found
