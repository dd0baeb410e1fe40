"""Atomic files, checkpoints of runs, fingerprints and errors that every other room uses."""
