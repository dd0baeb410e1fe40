"""Arguments and options that several commands share."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer

from spar_hf.cli.reporting import exit_on_error
from spar_hf.utils.options import HELP

Options = TypeVar("Options")


def as_command(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Turn a function of a dataclass of options into a command for Typer, with an option for each field."""

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: Any) -> None:
            with exit_on_error():
                options = kind(**values)
            function(options)

        command.__signature__ = inspect.signature(kind)  # type: ignore[attr-defined]
        return command

    return decorate


Images = Annotated[
    list[str],
    typer.Argument(help='Images: files, folders (with sub-folders), patterns ("in/*.jpg"), tar files and URLs.'),
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
Templates = Annotated[str | None, typer.Option(help=HELP["templates"])]
ShortestEdge = Annotated[int | None, typer.Option(help=HELP["shortest_edge"], min=16)]
SkipExisting = Annotated[
    bool, typer.Option("--skip-existing", help="Skip images that have results already, to continue a stopped run.")
]
Shard = Annotated[str | None, typer.Option(metavar="I/N", help=HELP["shard"])]
ShardRange = Annotated[str | None, typer.Option(metavar="A:B", help=HELP["shard_range"])]
Workers = Annotated[int | None, typer.Option(help=HELP["workers"], min=0)]
BatchSize = Annotated[int, typer.Option(help="Images of one size that share a forward pass at most.", min=1)]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 or mps. Default: a GPU if there is one, else the CPU.")
]
ImageRange = Annotated[tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help=HELP["image_range"])]
MaxPixels = Annotated[int | None, typer.Option(help=HELP["max_pixels"], min=1)]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Limit on the patches of an image; larger ones are made smaller. Default: 16384.", min=1),
]
