"""Runs that are cut short: functions that get a signal, or fail, at one of their calls."""

import itertools
import signal


def sigterm() -> None:
    """Asks this process to stop, as schedulers do."""
    signal.raise_signal(signal.SIGTERM)


def crash() -> None:
    """Ends a run without a word, as a kill does."""
    raise MemoryError


def at_call(number: int, function, act=sigterm):
    """The function, with `act()` before its `number`-th call."""
    calls = itertools.count(1)

    def acting(*args, **kwargs):
        if next(calls) == number:
            act()
        return function(*args, **kwargs)

    return acting
