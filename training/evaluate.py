"""Measure open-vocabulary segmentation on images with masks. Options: `--help`."""

from spar_hf.evaluation.command import main
from spar_hf.utils.errors import run_command

if __name__ == "__main__":
    run_command(main)
