"""Train linear probes on frozen dense features. Options: `--help`."""

from spar_hf.heads.linear_probe import main
from spar_hf.utils.errors import run_command

if __name__ == "__main__":
    run_command(main)
