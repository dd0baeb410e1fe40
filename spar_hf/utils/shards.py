"""Which part of the work a job does: `--shard I/N` and `--shard-range A:B`, for arrays of jobs. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from spar_hf.utils.errors import UsageError

Part = TypeVar("Part")


@dataclass(frozen=True)
class ShardChoice:
    """
    The shards of a job. Which these are depends on the number of shards alone, and on nothing that exists already: jobs that
    run at the same time never share one, and a job that is repeated has the same.

    Args:
        shard: `"I/N"`: every N-th one, from the I-th on; I is 0 to N - 1.
        shard_range: `"A:B"`: those from A to B - 1.

    Raises:
        UsageError: both, or a malformed one.

    Example:

    ```python
    >>> ShardChoice("1/3").pick("abcdefg"), ShardChoice(None, "2:4").pick("abcdefg"), ShardChoice().pick("ab")
    (['b', 'e'], ['c', 'd'], ['a', 'b'])
    >>> ShardChoice("3/3")
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: --shard '3/3' must be I/N with I from 0 to N - 1, such as 0/8 to 7/8.
    ```"""

    shard: str | None = None
    shard_range: str | None = None

    def __post_init__(self):
        if self.shard is not None and self.shard_range is not None:
            raise UsageError("Give --shard or --shard-range, not both.")
        if self.shard is not None:
            found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
            if not found or not int(found[1]) < int(found[2]):
                raise UsageError(f"--shard {self.shard!r} must be I/N with I from 0 to N - 1, such as 0/8 to 7/8.")
        if self.shard_range is not None:
            found = re.fullmatch(r"(\d+):(\d+)", self.shard_range)
            if not found or not int(found[1]) < int(found[2]):
                raise UsageError(f"--shard-range {self.shard_range!r} must be A:B with A below B, such as 0:100.")

    @property
    def is_part(self) -> bool:
        """Whether this job does only a part."""
        return self.shard is not None or self.shard_range is not None

    @property
    def option(self) -> str:
        """The option that was given, for messages; empty for all of the work."""
        return "--shard" if self.shard is not None else "--shard-range" if self.shard_range is not None else ""

    @property
    def number(self) -> int:
        """A number that jobs of one array do not share: I or A; 0 for all of the work."""
        return int(re.split("[/:]", self.shard or self.shard_range or "0")[0])

    @property
    def name(self) -> str:
        """A name for files of this job alone: `1-of-3`, `20-40`; empty for all of the work."""
        return (self.shard or "").replace("/", "-of-") or (self.shard_range or "").replace(":", "-")

    def pick(self, parts: Sequence[Part]) -> list[Part]:
        """The parts of this job."""
        if self.shard is not None:
            first, step = map(int, self.shard.split("/"))
            return list(parts[first::step])
        if self.shard_range is not None:
            first, end = map(int, self.shard_range.split(":"))
            return list(parts[first:end])
        return list(parts)
