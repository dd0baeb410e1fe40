"""Time and memory of work on any device."""

import ctypes
import resource
import sys
import time
from pathlib import Path

import torch


def synchronize(device: torch.device | str) -> None:
    """Wait for all work that the device was given; a CPU has always done it."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def clock(device: torch.device | str) -> float:
    """Seconds on a clock that only runs forward, read after all work that the device was given."""
    synchronize(device)
    return time.perf_counter()


def resident_bytes(entry: str = "VmRSS") -> int:
    """Memory of this process on Linux: `VmRSS`, what it holds now, or `VmHWM`, the most since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def peak_bytes(device: torch.device | str) -> int:
    """The most memory that this process has held so far: on a GPU what torch allocated, else its resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(torch.device(device))
    try:  # the peak that `getrusage` gives on Linux may be that of the process that started this one
        return resident_bytes("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class PeakMemory:
    """
    Measures the bytes that the work in a `with` block holds at most, beyond what was held before.

    On a GPU torch's allocator counts them. On a CPU (Linux only) it is the rise of the process's resident memory. Freed
    memory is handed back to the system first, or reusing it would not be seen. That takes time: do not time the same work.

    Attributes:
        bytes (`int`, *optional*): the result after the block; `None` where it cannot be measured.

    Example:

    ```python
    >>> with PeakMemory("cpu") as peak:
    ...     total = torch.ones(10 * 2**18).sum()
    >>> peak.bytes is None or peak.bytes > 5 * 2**20
    True
    ```"""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.bytes: int | None = None
        self.before: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            try:
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak
                self.before = resident_bytes()
            except (OSError, AttributeError):
                self.before = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.before is None:
            return
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self.bytes = max(0, resident_bytes("VmHWM") - self.before)
