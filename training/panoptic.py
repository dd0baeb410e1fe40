"""Train a panoptic head on SPAR features. Options: `--help`."""

from spar_hf.heads.panoptic import main
from spar_hf.utils.errors import run_command

if __name__ == "__main__":
    run_command(main)
