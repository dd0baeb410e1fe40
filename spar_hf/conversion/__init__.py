"""Converts official checkpoints, of SPAR and of its base models, to folders that `AutoModel` and the pipeline load."""

from .convert import ConversionReport, convert

__all__ = ["ConversionReport", "convert"]
