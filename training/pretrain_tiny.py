"""Pre-train the base of spar-tiny from scratch. Options: `--help`."""

from spar_hf.pretraining.trainer import main
from spar_hf.utils.errors import run_command

if __name__ == "__main__":
    run_command(main)
