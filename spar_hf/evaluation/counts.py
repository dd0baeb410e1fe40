"""
Counts of all runs of an evaluation, in integers: their sum is the same in every order and over any number of processes.
Partial counts are kept on disk, so that an interrupted measurement can be continued.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from spar_hf.data.segmentation_sets import IGNORE_INDEX
from spar_hf.evaluation.inference import Prediction
from spar_hf.evaluation.iou import count_boundaries, count_pixels
from spar_hf.evaluation.options import PARTS
from spar_hf.utils.atomic import write_atomically, write_json
from spar_hf.utils.errors import UsageError
from spar_hf.utils.options import earlier_names

SUMS = ("confusion", "boundary", "nanoseconds", "flicker")
# settings that change neither counts nor times; the mixed precision that was used has an entry of its own
FREE_SETTINGS = {"--output", "--card_folder", "--save_seconds", "--overwrite", "--max_pixels", "--mixed_precision"}
FREE_SETTINGS |= {"--compare"}
OLD_SETTINGS = {"photos": "images", "files of photos": "files of images"}  # names in version 0.1
OLD_SETTINGS |= {f"--{old}": f"--{name}" for old, name in earlier_names(PARTS.values()).items()}


class Counts:
    """
    Counts of all runs.

    Attributes:
        done: numbers of the counted images, `(images done,)` int64.
        confusion: see `iou.count_pixels`; `(runs, classes, classes)` int64.
        boundary: see `iou.count_boundaries`; `(runs, 3, classes)` int64.
        nanoseconds: of the vision forward and in total; `(runs, 2)` int64.
        flicker: pixels that stand still from the image before to a counted one, and those of them that change their class;
            `(runs, 2)` int64.
        memory: largest peak memory of an image in bytes, -1 if it was not measured; `(runs,)` int64.
    """

    def __init__(self, runs: int, classes: int):
        self.done = np.zeros(0, np.int64)
        self.confusion = np.zeros((runs, classes, classes), np.int64)
        self.boundary = np.zeros((runs, 3, classes), np.int64)
        self.nanoseconds = np.zeros((runs, 2), np.int64)
        self.flicker = np.zeros((runs, 2), np.int64)
        self.memory = np.full(runs, -1, np.int64)

    def add(
        self,
        number: int,
        reference: np.ndarray,
        predictions: Sequence[Prediction],
        dilation_ratio: float | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        """
        Count an image.

        Args:
            number: of the image.
            reference: its mask, `(height, width)`.
            predictions: of all runs.
            dilation_ratio: width of boundaries; `None` does not count them.
            ignore_index: label of pixels of the mask that are not counted.
        """
        classes = self.confusion.shape[1]
        for i, prediction in enumerate(predictions):
            self.confusion[i] += count_pixels(prediction.label_map, reference, classes, ignore_index)
            if dilation_ratio is not None:
                pair = (prediction.label_map, reference)
                self.boundary[i] += count_boundaries(*pair, classes, ignore_index, dilation_ratio)
            seconds = (prediction.vision_seconds, prediction.total_seconds)
            self.nanoseconds[i] += [round(1e9 * value) for value in seconds]
        self.done = np.append(self.done, number)

    def note_memory(self, run: int, peak: int | None) -> None:
        """Keep the larger of this peak memory and those before."""
        self.memory[run] = max(self.memory[run], -1 if peak is None else peak)

    def merge(self, other: "Counts") -> None:
        """Add the counts of other images."""
        self.done = np.append(self.done, other.done)
        for name in SUMS:
            getattr(self, name)[:] += getattr(other, name)
        self.memory = np.maximum(self.memory, other.memory)

    def over_processes(self, accelerator: Accelerator) -> "Counts":
        """The sum over all processes, on each of them; without the numbers of the images."""
        total = Counts(len(self.memory), self.confusion.shape[1])
        for name in SUMS:
            counts = torch.from_numpy(getattr(self, name)).to(accelerator.device)
            getattr(total, name)[:] = accelerator.reduce(counts, "sum").cpu().numpy()
        peaks = accelerator.gather(torch.from_numpy(self.memory).to(accelerator.device)[None])
        total.memory = peaks.view(-1, len(self.memory)).amax(0).cpu().numpy()
        return total

    def save(self, path: Path) -> None:
        """Write the counts to an `.npz` file, atomically."""
        arrays = {name: getattr(self, name) for name in ("done", *SUMS, "memory")}
        write_atomically(path, lambda temporary: np.savez(temporary, **arrays))

    def load(self, path: Path) -> None:
        """
        Take the counts that `save` wrote.

        Raises:
            UsageError: the file is damaged, or belongs to other runs or classes.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                known = [name for name in ("done", *SUMS, "memory") if name in stored or name != "flicker"]
                arrays = {name: stored[name] for name in known}  # earlier versions counted no flicker
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # a cut file raises the last two
            raise UsageError(
                f"{path} holds no counts ({error}). Delete it; its images will be measured again."
            ) from error
        for name, array in arrays.items():
            if name != "done" and array.shape != getattr(self, name).shape:
                raise UsageError(f"{path} holds counts of other runs or classes. Delete it.")
            setattr(self, name, array)


class PartialCounts:
    """
    The folder with the partial counts of a measurement: the settings, and one file for each process of each start. Every
    start writes its own files and adds those of earlier starts, so the number of processes may change in between.

    Args:
        folder: created if it does not exist.
        settings: everything that decides the counts, as JSON holds it.
        accelerator: all processes must make this object.

    Raises:
        UsageError: the folder holds counts made with other settings; the message names the differences.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], accelerator: Accelerator):
        self.folder = folder
        file = folder / "settings.json"
        if accelerator.is_main_process and not file.is_file():
            write_json(file, settings)
        accelerator.wait_for_everyone()
        check_same_settings(json.loads(file.read_text(encoding="utf-8")), settings, folder)
        self.found = sorted(folder.glob("[0-9]*.npz"))  # without incomplete files of killed runs
        start = 1 + max((int(path.stem.split("-")[0]) for path in self.found), default=0)
        self.path = folder / f"{start:04}-{accelerator.process_index:03}.npz"
        accelerator.wait_for_everyone()  # no process writes before all have listed the files

    def earlier(self, runs: int, classes: int) -> Counts:
        """The sum of the counts of earlier starts."""
        total = Counts(runs, classes)
        for path in self.found:
            part = Counts(runs, classes)
            part.load(path)
            total.merge(part)
        return total

    def remove(self) -> None:
        """Delete the files, and the folder if nothing else is in it."""
        for path in (*self.folder.glob("*.npz"), self.folder / "settings.json"):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def check_same_settings(stored: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """
    Compare stored settings, also those of version 0.1, with those of this measurement.

    Raises:
        UsageError: they differ; the message names `path` and the differences.

    Example:

    ```python
    >>> check_same_settings({"photos": "5d41", "--limit": 2}, {"images": "5d41", "--limit": 3}, Path("report.json"))
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: report.json was measured with other settings: --limit was 2, is 3. ...
    ```"""

    def shorten(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:57]}..."

    then = {OLD_SETTINGS.get(name, name): value for name, value in stored.items() if name not in FREE_SETTINGS}
    now = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    changed = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if changed:
        differences = (f"{name} was {shorten(then.get(name))}, is {shorten(now.get(name))}" for name in changed)
        raise UsageError(
            f"{path} was measured with other settings: {'; '.join(differences)}. Use the same settings to continue it, "
            "choose another --output, or delete it."
        )
