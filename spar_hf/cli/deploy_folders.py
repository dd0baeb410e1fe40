"""`spar-hf space` and `spar-hf handler`: folders that hosting services run."""

from pathlib import Path
from typing import Annotated

import typer

from spar_hf.cli.reporting import exit_on_error, say
from spar_hf.utils.errors import PATH_ERRORS


def space(
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder or hub id of a two-tower model; with --static, the folder of `spar-hf export --format web`. "
            "Default: the embedded spar-tiny."
        ),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Write a page that runs in the browser, without Python.")
    ] = False,
) -> None:
    """Write a Hugging Face Space: the page of `spar-hf app`, also for ZeroGPU, or a static page."""
    with exit_on_error(usage=(ValueError, *PATH_ERRORS)):
        from spar_hf.export.space import write_space, write_static_space
        from spar_hf.utils.errors import UsageError

        if not static:
            write_space(model, output)
        elif model is None:
            raise UsageError("--static needs the folder of an exported page: spar-hf space WEB --static --output DIR.")
        else:
            write_static_space(model, output)
    say(f"written: {output}")
    say(f"upload it: hf upload OWNER/NAME {output} . --repo-type space")
    if not static:
        say(f"try it here: python {output / 'app.py'}")


def handler(
    folder: Annotated[Path, typer.Argument(help="Folder of a two-tower model, as save_pretrained writes it.")],
) -> None:
    """Write handler.py and requirements.txt into a model folder, for Hugging Face Inference Endpoints."""
    with exit_on_error(usage=(ValueError, *PATH_ERRORS)):
        from spar_hf.export.endpoint import write_handler

        for path in write_handler(folder):
            say(f"written: {path}")
