"""Distil a sliding-window teacher into a student that needs one pass. Options: `--help`."""

from spar_hf.distillation.trainer import main
from spar_hf.utils.errors import run_command

if __name__ == "__main__":
    run_command(main)
