"""Atomic files, options, checkpoints of runs, time and memory, and errors: what every other room uses."""
