"""Speed of a run: the progress bar, the rows of `log.jsonl`, and where the time goes."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from spar_hf.utils.devices import clock, peak_bytes


class SpeedMeter:
    """Times the work of a device in a run of `steps` steps, of which `first` are done, with images of all processes."""

    def __init__(self, first: int, steps: int, images_per_step: int, device: torch.device, show: bool = True):
        self.first, self.images_per_step, self.device = first, images_per_step, device
        self.bar = tqdm(initial=first, total=steps, disable=not show, mininterval=5, unit="step")
        self.start = clock(device)
        self.seconds = {"teacher": 0.0, "wait": 0.0}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the work in a `with` block to `teacher` or `wait`."""
        start = clock(self.device)
        yield
        self.seconds[name] += clock(self.device) - start

    def waiting(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items; the time until each is there counts as `wait`."""
        iterator = iter(items)
        while True:
            with self.timed("wait"):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def row(self, step: int, loss: float | None, learning_rate: float, skipped: int) -> dict[str, Any]:
        """A row of the log. Times and memory are those of this process since its start."""
        seconds = clock(self.device) - self.start
        row = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "images_per_second": round((step - self.first) * self.images_per_step / seconds, 3),
            "teacher_share": round(self.seconds["teacher"] / seconds, 3),
            "wait_share": round(self.seconds["wait"] / seconds, 3),
            "memory_gib": round(peak_bytes(self.device) / 2**30, 2),
            "skipped": skipped,
        }
        shown = "none" if loss is None else f"{loss:.4f}"
        self.bar.set_postfix_str(
            f"loss {shown}, {row['images_per_second']:.2f} images/s, teacher {row['teacher_share']:.0%}, "
            f"waiting {row['wait_share']:.0%}"
        )
        return row
