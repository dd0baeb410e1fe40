"""Train a panoptic head on SPAR features. Options: `--help`."""

from spar_hf.heads.panoptic import main
from spar_hf.utils.usage import run_script

if __name__ == "__main__":
    run_script(main)
