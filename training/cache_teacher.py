"""Compute teacher maps once, for `training/distill.py --teacher_mode cached`. Options: `--help`."""

from spar_hf.distillation.cache_teacher import main
from spar_hf.utils.errors import run_command

if __name__ == "__main__":
    run_command(main)
