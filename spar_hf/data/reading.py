"""Options of every command that reads images: values that need a stated range, and a limit on pixels."""

from dataclasses import dataclass

from spar_hf.model.image_input import check_range
from spar_hf.utils.errors import as_usage_errors
from spar_hf.utils.fields import option
from spar_hf.utils.options import HELP, require_positive


@dataclass(kw_only=True)
class ReadingOptions:
    """
    How image files are read, as in `spar-hf segment`.

    Raises:
        UsageError: an option is out of range.

    Example:

    ```python
    >>> ReadingOptions(image_range=[0, 4095]).image_range
    [0.0, 4095.0]
    ```"""

    image_range: list[float] | None = option(None, HELP["image_range"], metavar=("LOW", "HIGH"))
    max_pixels: int | None = option(None, HELP["max_pixels"])

    def __post_init__(self):
        require_positive(self, "max_pixels")
        if self.image_range is not None:
            with as_usage_errors():
                self.image_range = list(check_range(self.image_range) or ())
