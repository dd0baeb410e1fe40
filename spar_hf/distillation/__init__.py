"""Distils a sliding-window teacher into a student that needs one pass."""
