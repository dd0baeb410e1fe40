"""Official SPAR checkpoints and the bases they started from, to folders that `AutoModel` and the pipeline load."""

from .convert import ConversionReport, convert

__all__ = ["ConversionReport", "convert"]
