"""
What runs have counted, in whole numbers: sums are the same in every order and over any number of processes. Partial
counts lie on disk, so that a measurement that was cut off goes on where it stopped.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from spar_hf.evaluation.metrics import BoundaryIoU, MeanIoU
from spar_hf.utils.atomic import write_atomically, write_json

ARRAYS = ("confusion", "boundary", "nanoseconds", "memory")


class Tally:
    """
    Counts of all runs.

    Attributes:
        done: numbers of the images that are counted, `(images done,)` int64.
        confusion: see `MeanIoU.counts`; `(runs, classes, classes)` int64.
        boundary: see `BoundaryIoU.counts`; `(runs, 3, classes)` int64.
        nanoseconds: of the vision forward and in all; `(runs, 2)` int64.
        memory: bytes that an image adds at most; -1 where that was not measured; `(runs,)` int64. On a CPU only some images
            are measured, those with more pixels or a longer shape than all before them.
    """

    def __init__(self, runs: int, classes: int):
        self.done = np.zeros(0, np.int64)
        self.confusion = np.zeros((runs, classes, classes), np.int64)
        self.boundary = np.zeros((runs, 3, classes), np.int64)
        self.nanoseconds = np.zeros((runs, 2), np.int64)
        self.memory = np.full(runs, -1, np.int64)

    def add(
        self,
        number: int,
        area: MeanIoU,
        boundary: BoundaryIoU | None,
        predictions: list[torch.Tensor],
        reference: np.ndarray,
        spent: list[torch.Tensor],
    ) -> None:
        """Count an image: the label maps and times of all runs."""
        wanted = reference.astype(np.int64)
        for i, prediction in enumerate(predictions):
            area.add(prediction=prediction, reference=wanted)
            self.confusion[i] += area.counts
            area.reset()
            if boundary is not None:
                boundary.add(prediction=prediction, reference=wanted)
                self.boundary[i] += boundary.counts
                boundary.reset()
            self.nanoseconds[i] += spent[i].numpy()
        self.done = np.append(self.done, number)

    def note_memory(self, run: int, peak: int | None) -> None:
        self.memory[run] = max(self.memory[run], -1 if peak is None else peak)

    def absorb(self, other: "Tally") -> None:
        """Add the counts of other images."""
        self.done = np.append(self.done, other.done)
        for name in ARRAYS[:-1]:
            getattr(self, name)[:] += getattr(other, name)
        self.memory = np.maximum(self.memory, other.memory)

    def over_processes(self, accelerator: Accelerator) -> "Tally":
        """The sum over all processes, on every one of them; which images they did is not carried over."""
        total = Tally(len(self.memory), self.confusion.shape[1])
        for name in ARRAYS[:-1]:
            counts = torch.from_numpy(getattr(self, name)).to(accelerator.device)
            getattr(total, name)[:] = accelerator.reduce(counts, "sum").cpu().numpy()
        peaks = accelerator.gather(torch.from_numpy(self.memory).to(accelerator.device)[None])
        total.memory = peaks.view(-1, len(self.memory)).amax(0).cpu().numpy()
        return total

    def save(self, path: Path) -> None:
        """Write whole or not at all."""
        arrays = {name: getattr(self, name) for name in ("done", *ARRAYS)}
        write_atomically(path, lambda temporary: np.savez(temporary, **arrays))

    def load(self, path: Path) -> None:
        """
        Take over what `save` wrote.

        Raises:
            ValueError: the file belongs to other runs or classes, or is none of these.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in ("done", *ARRAYS)}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # a cut file raises the last two
            raise ValueError(f"{path} holds no counts ({error}). Delete it; its images are measured again.") from error
        for name, array in arrays.items():
            if name != "done" and array.shape != getattr(self, name).shape:
                raise ValueError(f"{path} holds counts of other runs or classes. Delete it.")
            setattr(self, name, array)


class PartialCounts:
    """
    The folder of a measurement's partial counts: one file per process and start, and the settings they were made under.

    Every start counts into files of its own and adds up those it finds, so the number of processes may change.

    Args:
        folder: made if it is not there.
        settings: what decides the counts, as JSON holds it.
        accelerator: all processes must come here.

    Raises:
        ValueError: the folder holds counts that were made under other settings; the message names them.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], accelerator: Accelerator):
        self.folder = folder
        file = folder / "settings.json"
        if accelerator.is_main_process and not file.is_file():
            write_json(file, settings)
        accelerator.wait_for_everyone()
        refuse_others(json.loads(file.read_text(encoding="utf-8")), settings, folder)
        self.found = sorted(folder.glob("[0-9]*.npz"))  # no half files of killed runs
        start = 1 + max((int(path.stem.split("-")[0]) for path in self.found), default=0)
        self.path = folder / f"{start:04}-{accelerator.process_index:03}.npz"
        accelerator.wait_for_everyone()  # nobody writes before everybody has looked

    def earlier(self, runs: int, classes: int) -> Tally:
        """The sum of what earlier starts counted."""
        total = Tally(runs, classes)
        for path in self.found:
            part = Tally(runs, classes)
            part.load(path)
            total.absorb(part)
        return total

    def remove(self) -> None:
        """Delete the folder's files and the folder; other files in it stay, and so does it then."""
        for path in (*self.folder.glob("*.npz"), self.folder / "settings.json"):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def refuse_others(stored: dict[str, Any], settings: dict[str, Any], place: Path) -> None:
    """
    Raises:
        ValueError: `place` holds results of other settings than these; the message names the differences.
    """

    def shorten(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:57]}..."

    changed = [name for name in sorted(stored.keys() | settings.keys()) if stored.get(name) != settings.get(name)]
    if changed:
        differences = (f"{name} was {shorten(stored.get(name))}, is {shorten(settings.get(name))}" for name in changed)
        raise ValueError(
            f"{place} was measured under other settings: {'; '.join(differences)}. Give the same ones to go on with it, "
            "another --output, or delete it."
        )
