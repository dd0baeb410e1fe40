"""The command line, `spar-hf`: one module per command, assembled in `main`."""
