"""Measure open-vocabulary segmentation on images with masks. Options: `--help`."""

from spar_hf.evaluation.command import main
from spar_hf.utils.usage import run_script

if __name__ == "__main__":
    run_script(main)
