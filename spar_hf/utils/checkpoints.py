"""Checkpoints of runs. They survive a kill at any moment: each is written under a temporary name and then renamed."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from spar_hf.utils.atomic import as_disk_errors, check_inputs_stay, follow_umask, write_text
from spar_hf.utils.errors import MissingFiles, StopSignal, UsageError
from spar_hf.utils.texts import read_yaml

RESULT_FILES = (".json", ".md", ".csv", ".png", ".safetensors")  # endings of results that are files


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int = 2, **state: Any) -> Path:
    """
    Write `OUTPUT/checkpoint-STEP`: what accelerate knows (weights, optimizer, schedule, random numbers of every process) and
    `state` as JSON, `settings` among it for [`earlier_state`]. All processes must call it. The last `keep` checkpoints stay.
    """
    target, temporary = output / f"checkpoint-{step}", output / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        for left in output.glob(".checkpoint-*.partial"):  # by runs that were killed
            shutil.rmtree(left)
    accelerator.wait_for_everyone()
    with as_disk_errors(target):
        accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"step": step, "processes": accelerator.num_processes, **state}
        (temporary / "state.json").write_text(json.dumps(state))
        follow_umask(temporary)
        if target.exists():
            discard(target)
        temporary.rename(target)
        discard_checkpoints(output, keep)
    accelerator.wait_for_everyone()
    return target


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint, renamed first: half removed it must not look complete."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old.partial")  # a new one of that name may be half written
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def discard_checkpoints(output: Path, keep: int = 0) -> None:
    """Remove all complete checkpoints of a run but the last `keep`."""
    found = list_checkpoints(output)
    for checkpoint in found[: max(0, len(found) - keep)]:
        discard(checkpoint)


def list_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def read_state(output: Path) -> dict[str, Any]:
    """
    The `state` of the last complete checkpoint.

    Raises:
        MissingFiles: the run has none.
    """
    found = list_checkpoints(output)
    if not found:
        raise MissingFiles(f"{output} has no checkpoint to resume from. Start without --resume.")
    return json.loads((found[-1] / "state.json").read_text())


def settings_of(options: Any, free: set[str]) -> dict[str, Any]:
    """
    The options that a resumed run must share, as JSON and YAML return them. Options composed of dataclasses give the fields
    of each of them.

    Args:
        options: a dataclass.
        free: names of fields to leave out: what a resumed run may have otherwise.
    """
    settings: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            settings |= settings_of(value, free)
        elif field.name not in free:
            settings[field.name] = value
    return json.loads(json.dumps(settings))


def earlier_state(
    output: Path,
    resume: bool,
    settings: dict[str, Any],
    processes: int,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    results: Sequence[Path] = (),
    overwrite: bool = False,
    per_process: str | None = None,
) -> dict[str, Any] | None:
    """
    The `state` of the last complete checkpoint of a resumed run; `None` for a new run.

    Args:
        output: folder of the run.
        resume: whether the run goes on from there.
        settings: its options, see [`settings_of`].
        processes: how many take part.
        upgrade: gives the options of a run of an earlier version the names and values of today.
        results: what a run writes in the end, which a new run would replace.
        overwrite: whether a new run may replace an earlier one. Its checkpoints are removed once all options are checked,
            see [`TrainingRun.begin`]; its results stay until the first new ones are written.
        per_process: option that counts the images per process and step, of a run that any number of processes can go on
            with if the images per step stay the same.

    Raises:
        MissingFiles: there is no checkpoint to resume from.
        UsageError: a new run would mix its checkpoints with another's or replace its results or what it reads, or a resumed
            one would compute something else: its `settings` or number of processes differ.
    """
    if not resume:
        if overwrite:
            given = [value if isinstance(value, list) else [value] for value in settings.values()]
            check_inputs_stay(results, chain.from_iterable(given))
            return None
        if list_checkpoints(output):
            raise UsageError(
                f"{output} holds checkpoints of an earlier run. Go on with --resume, replace it with --overwrite, or write "
                "to another folder."
            )
        check_replaceable(results)
        return None
    if overwrite:
        raise UsageError("--resume goes on with a run and --overwrite replaces it. Leave one out.")
    state = read_state(output)
    if "settings" not in state or "processes" not in state:
        raise UsageError(f"The checkpoints in {output} are of an earlier version, which did not say how it ran.")
    then = state["settings"] if upgrade is None else upgrade(state["settings"])
    compared = settings
    if per_process is not None and state["processes"] != processes:
        check_images_per_step(per_process, then[per_process], state["processes"], settings[per_process], processes)
        compared = settings | {per_process: then[per_process]}
    if changed := differences(then, compared):
        raise UsageError(f"--resume goes on with the same options, but {changed}. Write another run to another folder.")
    if per_process is None and state["processes"] != processes:
        raise UsageError(
            f"The run had {state['processes']} processes and now has {processes}: images would be seen twice or never. "
            "Launch as many as before."
        )
    return state


def check_images_per_step(name: str, then: int, processes_then: int, now: int, processes: int) -> None:
    """
    Args:
        name: option that counts the images per process and step; `then` and `now` are its values.
        processes_then, processes: how many processes there were and are.

    Raises:
        UsageError: a run on another number of processes would have other steps.

    Example:

    ```python
    >>> check_images_per_step("batch_size", then=4, processes_then=2, now=8, processes=1)
    ```"""
    images = then * processes_then
    if now * processes == images:
        return
    remedy = f"give --{name} {images // processes}" if images % processes == 0 else f"launch {processes_then}"
    raise UsageError(
        f"The run had {images} images per step, from {processes_then} processes with --{name} {then}, and goes on with as "
        f"many. You launched {processes} with --{name} {now}: {remedy}."
    )


def check_replaceable(results: Iterable[Path], overwrite: bool = False) -> None:
    """
    Raises:
        UsageError: one of the finished results is there already, and nobody asked to replace it; or a folder lies where a
            file is to be written, which would fail after the work.
    """
    results = list(results)
    if folders := [path for path in results if path.suffix in RESULT_FILES and path.is_dir()]:
        raise UsageError(f"{folders[0]} is a folder, and a file of that name is to be written. Name another --output.")
    if found := [path for path in results if path.exists() and not overwrite]:
        raise UsageError(
            f"{found[0]} is the result of an earlier run. Replace it with --overwrite, or name another --output."
        )


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """
    The options that differ, for a message; empty where none does. A precision that one of both left to `accelerate launch`
    (`None`) is no difference, nor is an option that an earlier version did not have and that is off now.
    """
    changed = [name for name, value in now.items() if then.get(name, None if value else value) != value]
    if None in (then.get("mixed_precision"), now.get("mixed_precision")):
        changed = [name for name in changed if name != "mixed_precision"]
    return ", ".join(f"--{name} (was {then.get(name)!r}, is {now[name]!r})" for name in changed)


def is_finished(
    output: Path, written: Path, settings: dict[str, Any], upgrade: Callable[[dict[str, Any]], dict[str, Any]]
) -> bool:
    """
    Whether the last run in `output` is complete and had these settings: a run writes `recipe.yaml` when it starts, and at
    its end `curve.png` and then the card of the folder `written`. `upgrade` is that of [`earlier_state`].

    Raises:
        UsageError: it is complete, had other settings, and left no checkpoint.
    """
    marks = [output / "recipe.yaml", output / "curve.png", written / "README.md"]
    times = [mark.stat().st_mtime_ns for mark in marks if mark.is_file()]
    if len(times) < len(marks) or times != sorted(times):
        return False
    then = upgrade(read_yaml(marks[0]))
    changed = differences(then, settings)
    if changed and not list_checkpoints(output):
        raise UsageError(
            f"The run in {output} is complete ({written}), and a finished run has no checkpoint to go on from with "
            f"{changed}. Write another run to another folder; --student starts from a finished model."
        )
    return not changed


def load_checkpoint(accelerator: Accelerator, output: Path) -> dict[str, Any]:
    """Load the last complete checkpoint and return its [`read_state`]. Call it after `accelerator.prepare`."""
    state = read_state(output)
    accelerator.load_state(str(list_checkpoints(output)[-1]))
    return state


def cut_log(path: Path, step: int | None = None) -> None:
    """
    Drop the rows after `step` that a killed run had written, because the resumed run writes them again, and an incomplete
    last line.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if step is None or row["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class StopAtStep:
    """
    Turns Ctrl-C and SIGTERM into a stop at the end of the step, where weights and optimizer agree. A second signal stops at
    once, unless it comes within two seconds: launchers hand on signals that their processes got already.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.first: float | None = None
        self.number: int = signal.SIGTERM  # where another process was asked
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        if self.first is not None and time.monotonic() - self.first > 2:
            self.restore()
            signal.raise_signal(number)
            return
        if self.first is None:
            self.first, self.number = time.monotonic(), number

    def asked(self) -> bool:
        """Whether any process was asked to stop; all must call it, and all get the same answer."""
        if self.first is not None:
            self.accelerator.set_trigger()
        if not self.accelerator.check_trigger():
            return False
        StopSignal.number = self.number
        return True

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
