"""Checkpoints that survive a kill at any moment: written under a temporary name, renamed, the one before kept until then."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from spar_hf.files import write_text


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int = 2, **state: Any) -> Path:
    """
    Write `OUTPUT/checkpoint-STEP`: what accelerate knows (weights, optimizer, schedule, random numbers of every process) and
    `state` as JSON. All processes must call it. The last `keep` checkpoints stay.
    """
    target, temporary = output / f"checkpoint-{step}", output / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        for left in output.glob(".checkpoint-*.partial"):  # by runs that were killed
            shutil.rmtree(left)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}))
        if target.exists():
            discard(target)
        temporary.rename(target)
        for old in list_checkpoints(output)[:-keep]:
            discard(old)
    accelerator.wait_for_everyone()
    return target


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint under another name: half removed it must not look complete."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def list_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def read_state(output: Path) -> dict[str, Any]:
    """
    The `state` of the last complete checkpoint.

    Raises:
        FileNotFoundError: the run has none.
    """
    found = list_checkpoints(output)
    if not found:
        raise FileNotFoundError(f"{output} has no checkpoint to resume from. Start without --resume.")
    return json.loads((found[-1] / "state.json").read_text())


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """The options that were otherwise, as a message has them; empty where none was."""
    changed = [name for name, value in now.items() if then.get(name) != value]
    return ", ".join(f"--{name} (was {then.get(name)!r}, is {now[name]!r})" for name in changed)


def is_finished(output: Path, written: Path, settings: dict[str, Any]) -> bool:
    """
    Whether the last run in `output` has come to its end, with these settings: it writes `recipe.yaml` when it starts, at its
    end `curve.png` and then the card of the folder `written`.

    Raises:
        ValueError: it has, with other settings, and left no checkpoint.
    """
    marks = [output / "recipe.yaml", output / "curve.png", written / "README.md"]
    times = [mark.stat().st_mtime_ns for mark in marks if mark.is_file()]
    if len(times) < len(marks) or times != sorted(times):
        return False
    then = yaml.safe_load(marks[0].read_text(encoding="utf-8"))
    changed = differences(then, settings)
    if changed and not list_checkpoints(output):
        raise ValueError(
            f"The run in {output} is complete ({written}), and a finished run has no checkpoint to go on from with "
            f"{changed}. Write another run to another folder; --student starts from a finished model."
        )
    return not changed


def load_checkpoint(accelerator: Accelerator, output: Path) -> dict[str, Any]:
    """Take up the last complete checkpoint and return its [`read_state`]. Everything must be prepared already."""
    state = read_state(output)
    accelerator.load_state(str(list_checkpoints(output)[-1]))
    return state


def cut_log(path: Path, step: int | None = None) -> None:
    """
    Drop the rows after `step` that a killed run had already written, the resumed run writes them again; and the line that
    was being written.
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
    Ctrl-C, or the SIGTERM of a cluster that wants its machine back, asks for a stop at the end of the step, where weights
    and optimizer agree; a second one is at once. A launcher hands on what its processes got already: within two seconds
    that is no second one.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.first: float | None = None
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        if self.first is not None and time.monotonic() - self.first > 2:
            self.restore()
            signal.raise_signal(number)
            return
        self.first = self.first or time.monotonic()

    def asked(self) -> bool:
        """Whether any process was asked to stop; all must call it, and all get the same answer."""
        if self.first is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
