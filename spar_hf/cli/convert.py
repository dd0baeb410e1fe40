"""`spar-hf convert`: official checkpoints as folders for `AutoModel`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from spar_hf.cli.reporting import exit_on_error, quiet_transformers, say
from spar_hf.utils.errors import PATH_ERRORS
from spar_hf.utils.options import HELP

Checkpoint = Annotated[Path, typer.Argument(help="Official checkpoint: .ckpt, .pt, .pth or .safetensors.")]
# as in `spar_hf.conversion`, which imports torch
Family = StrEnum("Family", ["siglip2", "openclip", "dinov3txt", "radio"])
Base = Annotated[str, typer.Option(help="Hub id or folder of the base model in the format of transformers.")]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="Tokenizer for a base without one (dinov3txt: CLIP's, e.g. openai/clip-vit-base-patch16). radio: the SigLIP2 "
        "model that was the teacher, for its text tower too."
    ),
]
TextHeads = Annotated[
    int | None, typer.Option(help="Attention heads of the text tower (dinov3txt: 20 in the published ViT-L).", min=1)
]
ImageMean = Annotated[tuple[float, float, float] | None, typer.Option(help="Image mean. Default: that of the base.")]
ImageStd = Annotated[
    tuple[float, float, float] | None, typer.Option(help="Image standard deviation. Default: that of the base.")
]
VisionAct = Annotated[
    str | None,
    typer.Option(help="Activation of SigLIP's vision tower: gelu or gelu_pytorch_tanh (see the model card)."),
]
Adaptor = Annotated[str, typer.Option(help="radio: name or number of the head whose teacher has the text tower.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", "--force", help=HELP["overwrite"])]


def convert(
    checkpoint: Checkpoint,
    family: Annotated[Family, typer.Option(help="Family of the checkpoint.")],
    base: Base,
    output: Output,
    tokenizer: Tokenizer = None,
    text_heads: TextHeads = None,
    image_mean: ImageMean = None,
    image_std: ImageStd = None,
    vision_act: VisionAct = None,
    adaptor: Adaptor = "siglip2-g",
    overwrite: Overwrite = False,
    push: Annotated[
        str | None, typer.Option(help="OWNER/NAME: also upload the folder to this repository on the hub, with a card.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a public repository. Default: a private one.")] = False,
) -> None:
    """Convert an official checkpoint into a folder that AutoModel and the pipeline load."""
    from spar_hf.conversion import convert as convert_checkpoint
    from spar_hf.conversion.publishing import check_repository, publish

    quiet_transformers()
    with exit_on_error(usage=(ValueError, *PATH_ERRORS)):
        if push is not None:
            check_repository(push, replace=overwrite)
        report = convert_checkpoint(
            checkpoint,
            family.value,
            base,
            output,
            tokenizer=tokenizer,
            text_heads=text_heads,
            image_mean=None if image_mean is None else list(image_mean),
            image_std=None if image_std is None else list(image_std),
            vision_act=vision_act,
            adaptor=adaptor,
            force=overwrite,
        )
    say(report)
    if push is not None:
        with exit_on_error():
            say(f"uploaded: {publish(output, push, checkpoint, family.value, base, private=not public)}")
