"""`spar-hf app`: a web page for trying words on images."""

from typing import Annotated

import typer

from spar_hf.cli.arguments import Device, Model
from spar_hf.cli.reporting import exit_on_error, say


def serve(
    model: Model = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Model of the sliding window. Default: the base of the embedded spar-tiny; for other models, --model."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve; 0.0.0.0 serves the whole network.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port. Default: the first free one from 7860 on.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    device: Device = None,
) -> None:
    """Serve a web page: drop an image, type words, see masks; one pass beside the sliding window."""
    with exit_on_error(usage=(), failure=(ImportError, ValueError, OSError, RuntimeError)):
        say("Loading the model.", err=True)  # imports take seconds
        from spar_hf.cli.web_page import build_page, launch_page

        page = build_page(model, base, device)
        launch_page(page, host, port, open_browser, say=lambda address: say(f"{address}  (Ctrl-C stops it)"))
