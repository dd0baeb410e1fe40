"""The processes of one run, as `accelerate launch` starts them, and the work that is handed out among them."""

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

Part = TypeVar("Part")
hand_outs = itertools.count()  # of this process; all processes of a run make the same ones in the same order


@dataclass(frozen=True)
class Processes:
    """
    This process among those of a run.

    Attributes:
        index: of this process, from 0.
        count: number of processes.
        device: of this process; `None` leaves the choice to the caller.
        wait: waits until every process has called it. Raises `OSError` if one has ended before.
    """

    index: int = 0
    count: int = 1
    device: str | None = None
    wait: Callable[[], None] = lambda: None

    def share(self, images: Sequence[Part]) -> Sequence[Part]:
        """
        A fixed share for this process: every `count`-th one.

        Example:

        ```python
        >>> Processes(index=1, count=2).share("abcde")
        'bd'
        ```"""
        return images[self.index :: self.count]

    def hand_out(self, units: Sequence[Iterable[Part]]) -> Iterator[Part]:
        """
        The parts of units of work, each unit for one process alone: who has no work left takes the next unit that nobody has
        taken. All processes call this with the same units, in the same order of calls.

        A counter in the store that the processes met in (`torch.distributed`) says which unit is next. A unit whose process
        was killed is not handed out again in this run: what it lacks is made by the next one.

        Example:

        ```python
        >>> list(Processes().hand_out(["ab", "cde"]))
        ['a', 'b', 'c', 'd', 'e']
        ```"""
        if self.count == 1:
            yield from itertools.chain.from_iterable(units)
            return
        store, key = run_store(), f"spar-hf-hand-out-{next(hand_outs)}"
        while True:
            try:
                number = store.add(key, 1) - 1
            except RuntimeError:  # the process that keeps the store has ended; `wait` says so when all is written
                return
            if number >= len(units):
                return
            yield from units[number]


ALONE = Processes()


def run_store() -> Any:
    """The store that the processes of this run met in."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def in_units(count: int, size: int) -> list[range]:
    """
    The numbers below `count` in units of at most `size`.

    Example:

    ```python
    >>> in_units(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    ```"""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def waiting(wait: Callable[[], None]) -> Callable[[], None]:
    """
    A function that waits for all processes.

    Args:
        wait: does so; raises `RuntimeError` if one has ended.
    """

    def wait_for_all() -> None:
        try:
            wait()
        except RuntimeError as error:
            raise OSError(
                errno.ECHILD,
                "Another process of this run has ended. What was computed is kept: run the command again (with "
                "--skip-existing, if it has that option)",
            ) from error

    return wait_for_all


@contextlib.contextmanager
def launched_processes() -> Iterator[Processes]:
    """Join the processes that `accelerate launch` started. A single process needs no accelerate."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    import torch
    from accelerate import PartialState

    # without an accelerator, PartialState only joins the other processes if `cpu` is set
    cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true") or not torch.accelerator.is_available()
    # a process with large images is waited for; the default timeout is minutes
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))

    try:
        yield Processes(state.process_index, state.num_processes, str(state.device), waiting(state.wait_for_everyone))
    finally:
        state.destroy_process_group()
