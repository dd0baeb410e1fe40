"""`spar-hf`: the command line. Heavy imports stand inside the commands, so that `--help` is immediate."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Dense, open-vocabulary vision features in one pass at any resolution."""


@app.command()
def segment(
    image: Annotated[str, typer.Argument(help="Photo: a file or a URL.")],
    labels: Annotated[
        str,
        typer.Option(
            help='Classes separated by ";", names of one class by ",": "road; car, automobile; sky"; or ade20k, voc21, …'
        ),
    ],
    output: Annotated[Path, typer.Option(help="Picture to write: the photo under its masks, with a legend.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id; the embedded spar-tiny by default.")] = None,
    templates: Annotated[
        str | None, typer.Option(help="Prompt templates: imagenet80, short or plain; the checkpoint's by default.")
    ] = None,
    shortest_edge: Annotated[
        int | None,
        typer.Option(help="Shorter side of the working image in pixels; the checkpoint's by default.", min=16),
    ] = None,
    map_output: Annotated[
        Path | None, typer.Option("--map", help="Also write the class numbers as an 8- or 16-bit PNG.")
    ] = None,
) -> None:
    """Segment a photo by words and write the masks over it."""
    from spar_hf.image_processing_spar import read_image, to_rgb

    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise typer.BadParameter(f"{output} must end in .png, .jpg or .webp.", param_hint="--output")
    if map_output is not None and map_output.suffix.lower() != ".png":
        raise typer.BadParameter(
            f"{map_output} must end in .png: class numbers bear no lossy format.", param_hint="--map"
        )
    classes = [item.strip() for item in labels.split(";") if item.strip()]
    try:
        from spar_hf.prompts import Vocabulary
        from spar_hf.vocabularies import VOCABULARIES

        # one entry alone may be the name of a built-in vocabulary; a single class would cover the whole photo
        built_in = len(classes) == 1 and classes[0].lower() in VOCABULARIES
        vocabulary = Vocabulary.parse(classes[0] if built_in else classes)
        photo = to_rgb(read_image(image))
        pipe = load_pipeline(model)
        options: dict[str, Any] = {} if shortest_edge is None else {"size": {"shortest_edge": shortest_edge}}
        if templates is not None:
            options["templates"] = templates
        result = pipe(photo, candidate_labels=vocabulary, output="map", **options)
        from spar_hf.visualization import overlay

        write_image(overlay(photo, result["map"], result["labels"]), output)
        if map_output is not None:
            write_image(label_image(result["map"]), map_output)
    except (ValueError, OSError, RuntimeError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    share = [(result["map"] == i).mean() for i in range(len(result["labels"]))]
    for label, score, area in zip(result["labels"], result["scores"], share, strict=True):
        typer.echo(f"{label:24} {area:7.1%} of the photo" + (f", score {score:.2f}" if area else ""))
    typer.echo(f"written: {output}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Official checkpoint: .ckpt, .pt, .pth or .safetensors.")],
    family: Annotated[str, typer.Option(help="siglip2, openclip or dinov3txt.")],
    base: Annotated[str, typer.Option(help="Hub id or folder of the base in transformers' format.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer where the base has none (dinov3txt: CLIP's).")
    ] = None,
    text_heads: Annotated[
        int | None,
        typer.Option(help="Attention heads of the text tower (dinov3txt: 20 in the published ViT-L).", min=1),
    ] = None,
    image_mean: Annotated[
        tuple[float, float, float] | None, typer.Option(help="Image mean, where it is not the base's.")
    ] = None,
    image_std: Annotated[
        tuple[float, float, float] | None, typer.Option(help="Image standard deviation, where it is not the base's.")
    ] = None,
    vision_act: Annotated[
        str | None, typer.Option(help="Activation of SigLIP's vision tower: gelu or gelu_pytorch_tanh (see the card).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
) -> None:
    """Convert an official checkpoint into a folder that AutoModel and the pipeline load."""
    from spar_hf.conversion import convert as run

    try:
        quiet_transformers()
        report = run(
            checkpoint,
            family,
            base,
            output,
            tokenizer=tokenizer,
            text_heads=text_heads,
            image_mean=None if image_mean is None else list(image_mean),
            image_std=None if image_std is None else list(image_std),
            vision_act=vision_act,
            force=force,
        )
    except (ValueError, OSError, RuntimeError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(report)


@app.command()
def bake(
    labels: Annotated[str, typer.Option(help='Classes as of "segment": "road; car, automobile; sky"; or ade20k, …')],
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id; the embedded spar-tiny by default.")] = None,
    templates: Annotated[
        str | None, typer.Option(help="Prompt templates: imagenet80, short or plain; the checkpoint's by default.")
    ] = None,
) -> None:
    """Make a vision-only folder of a model and a vocabulary, for pipeline("image-segmentation")."""
    import shutil

    from transformers import AutoProcessor

    from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation, bake_vocabulary
    from spar_hf.vocabularies import VOCABULARIES

    classes = [item.strip() for item in labels.split(";") if item.strip()]
    built_in = len(classes) == 1 and classes[0].lower() in VOCABULARIES
    temporary = output.with_name(f".{output.name}.partial")
    try:
        if output.exists():
            raise FileExistsError(f"{output} exists. Name another folder.")
        quiet_transformers()
        folder = SPAR_TINY if model is None else model
        towers: Any = SparForOpenVocabSegmentation.from_pretrained(folder)
        processor: Any = AutoProcessor.from_pretrained(folder)
        baked = bake_vocabulary(towers, processor.tokenizer, classes[0].lower() if built_in else classes, templates)
        shutil.rmtree(temporary, ignore_errors=True)
        baked.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)
        temporary.rename(output)
    except (ValueError, OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"written: {output}, {baked.config.num_labels} classes of {len(baked.config.name_to_class)} names")


def quiet_transformers() -> None:
    """No notices and bars of transformers among the command's own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_pipeline(model: str | None):
    """The pipeline of a folder or hub id, or the embedded one, without transformers' notices."""
    from transformers import pipeline

    from spar_hf import SPAR_TINY

    quiet_transformers()
    task: Any = "open-vocab-segmentation"  # transformers types only its own tasks
    return pipeline(task, model=SPAR_TINY if model is None else model)


def label_image(label_map):
    """Class numbers as an image: mode L up to 256 classes, else 16 bit."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(label_map.astype(np.uint8 if label_map.max() < 256 else np.uint16))


def write_image(image, path: Path) -> None:
    """Write under a temporary name and rename, so that an interrupted run leaves no half picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial{path.suffix}")
    image.save(temporary)
    temporary.replace(path)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())
