"""
`spar-hf distill`, `evaluate`, `probe`, `panoptic` and `cache-teacher`: the same commands as the scripts in `training/`.

Each command parses its own arguments, so they are passed on as they are. In several processes:
`accelerate launch -m spar_hf.cli.main distill …`
"""

import sys
from collections.abc import Callable
from typing import Any

import typer

from spar_hf.utils.errors import import_of_train, run_command

# command: the module with its `main(args)`, and what it does
COMMANDS = {
    "distill": ("spar_hf.distillation.trainer", "Distil a sliding-window teacher into a student that needs one pass."),
    "evaluate": ("spar_hf.evaluation.command", "Measure open-vocabulary segmentation on images with masks."),
    "probe": ("spar_hf.heads.linear_probe", "Train linear probes on frozen dense features."),
    "panoptic": ("spar_hf.heads.panoptic", "Train a panoptic head on dense features."),
    "cache-teacher": ("spar_hf.distillation.cache_teacher", "Compute the teacher's feature maps once, for distill."),
}
# arguments, `--help` among them, are left to the command
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add_training_commands(app: typer.Typer) -> None:
    """Add all of them to the command line."""
    for name, (module, text) in COMMANDS.items():
        app.command(name, help=text, context_settings=dict(SETTINGS))(make_command(name, module))


def make_command(name: str, module: str) -> Callable[[typer.Context], None]:
    """A command that imports its module, and with it torch, when it is called."""

    def command(context: typer.Context) -> None:
        sys.argv[0] = f"spar-hf {name}"  # what argparse calls the program in its messages
        run_command(lambda: load_main(name, module)(context.args))

    return command


def load_main(name: str, module: str) -> Callable[[list[str]], Any]:
    """
    The `main` of a command.

    Raises:
        UsageError: a package of the extra `train` is not installed.
    """
    return import_of_train(f"spar-hf {name}", module).main
