"""Pre-train the base of spar-tiny from scratch. Options: `--help`."""

from spar_hf.pretraining.trainer import main
from spar_hf.utils.usage import run_script

if __name__ == "__main__":
    run_script(main)
