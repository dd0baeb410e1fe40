"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Images = Annotated[
    list[str], typer.Argument(help='Images: files, folders (with sub-folders), patterns ("in/*.jpg") and URLs.')
]
Model = Annotated[
    str | None, typer.Option(help="Folder or hub id of a two-tower model. Default: the embedded spar-tiny.")
]
Labels = Annotated[
    str,
    typer.Option(
        help='Classes separated by ";", names of one class by ",": "road; car, automobile; sky". Or a built-in '
        "vocabulary: ade20k, voc21, … Or @FILE, a text file with a class per line."
    ),
]
Templates = Annotated[
    str | None, typer.Option(help="Prompt templates: imagenet80, short or plain. Default: the checkpoint's.")
]
ShortestEdge = Annotated[
    int | None, typer.Option(help="Shorter side of the working size in pixels. Default: the checkpoint's.", min=16)
]
SkipExisting = Annotated[
    bool, typer.Option("--skip-existing", help="Skip images that have results already, to continue a stopped run.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 or mps. Default: a GPU if there is one, else the CPU.")
]
ImageRange = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Pixel values of black and white of images of floats or more than 8 bits: 0 4095 for 12 bits. Without it such "
        "images are refused if they cannot be scaled without guessing.",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(help="Refuse larger images, in pixels. Default: 89 million, about 0.3 GB in memory.", min=1),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Limit on the patches of an image; larger ones are made smaller. Default: 16384.", min=1),
]
