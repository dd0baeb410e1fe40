"""
`spar-hf`: the commands, assembled.

Modules of the commands import torch and transformers inside their functions, so that `spar-hf --help` is immediate.
"""

import sys
from typing import Annotated

import typer

from spar_hf.cli.app import serve
from spar_hf.cli.bake import bake
from spar_hf.cli.convert import convert
from spar_hf.cli.deploy_folders import handler, space
from spar_hf.cli.doctor import doctor
from spar_hf.cli.environment import environment
from spar_hf.cli.export import export
from spar_hf.cli.features import features
from spar_hf.cli.segment import segment
from spar_hf.cli.support import support
from spar_hf.cli.training import add_training_commands
from spar_hf.cli.verify import verify

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def print_version(wanted: bool) -> None:
    """Print the version and exit if the option is given."""
    if wanted:
        from spar_hf import __version__

        typer.echo(f"spar-hf {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version)]


@app.callback()
def root(version: Version = False) -> None:
    """Dense, open-vocabulary vision features in one pass at any resolution."""


app.command()(segment)
app.command()(support)
app.command()(features)
app.command()(verify)
app.command()(bake)
app.command()(convert)
app.command()(doctor)
app.command("env")(environment)
app.command()(export)
app.command("app")(serve)
app.command()(space)
app.command()(handler)
add_training_commands(app)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
