"""`spar-hf bake`: a fixed vocabulary inside a vision-only model."""

from pathlib import Path
from typing import Annotated

import typer

from spar_hf.cli.arguments import Labels, Model, Templates
from spar_hf.cli.reporting import exit_on_error, fail, say
from spar_hf.utils.atomic import writing_folder
from spar_hf.utils.errors import PATH_ERRORS


def bake(
    labels: Labels,
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    model: Model = None,
    templates: Templates = None,
) -> None:
    """
    Combine a vision tower and a fixed vocabulary in a folder for pipeline("image-segmentation").

    That pipeline gives the masks of `segment` except for transparent, 16-bit and float images: transformers drops
    transparency, clips 16 bits to 255 and takes floats for 0–255. Convert such images to 8-bit RGB first.
    """
    if output.exists():
        fail(f"{output} exists. Name another folder.", 2)
    from spar_hf.utils.labels import read_labels

    with exit_on_error(failure=()):
        vocabulary = read_labels(labels)

    from spar_hf.cli.pipelines import load_pipeline
    from spar_hf.model.modeling_spar_semantic import bake_vocabulary

    with exit_on_error(usage=(ValueError, *PATH_ERRORS)):
        pipe = load_pipeline(model)
        baked = bake_vocabulary(pipe.model, pipe.tokenizer, vocabulary, templates)
        with writing_folder(output) as temporary:
            baked.save_pretrained(temporary)
            pipe.image_processor.save_pretrained(temporary)
    say(f"written: {output}, {baked.config.num_labels} classes with {len(baked.config.name_to_class)} names")
    load = f'pipeline("image-segmentation", model={str(output)!r}'
    say(f"load it: import spar_hf; from transformers import pipeline; segment = {load})")
    say(f"where spar_hf is not installed: {load}, trust_remote_code=True)")
