"""Checkpoints that survive a kill at any moment: written under a temporary name, renamed, the one before kept until then."""

import json
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from spar_hf.utils.atomic import write_text


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
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"step": step, "processes": accelerator.num_processes, **state}
        (temporary / "state.json").write_text(json.dumps(state))
        if target.exists():
            discard(target)
        temporary.rename(target)
        for old in list_checkpoints(output)[:-keep]:
            discard(old)
    accelerator.wait_for_everyone()
    return target


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint under another name: half removed it must not look complete."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old.partial")  # a new one of that name may be half written
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


def settings_of(options: Any, free: set[str]) -> dict[str, Any]:
    """The fields of a dataclass that a resumed run must have as well, as JSON and YAML give them back."""
    return json.loads(json.dumps({name: value for name, value in asdict(options).items() if name not in free}))


def earlier_state(output: Path, resume: bool, settings: dict[str, Any], processes: int) -> dict[str, Any] | None:
    """
    The `state` of the last complete checkpoint where a run goes on; `None` where it begins.

    Raises:
        FileNotFoundError: there is none to go on from.
        ValueError: a run that begins would mix its checkpoints with another's, or one that goes on would compute something
            else than the first: with other `settings` or another number of processes.
    """
    if not resume:
        if list_checkpoints(output):
            raise ValueError(
                f"{output} holds checkpoints of an earlier run. Go on with --resume, or write to another folder."
            )
        return None
    state = read_state(output)
    if "settings" not in state or "processes" not in state:
        raise ValueError(f"The checkpoints in {output} are of an earlier version, which did not say how it ran.")
    if changed := differences(state["settings"], settings):
        raise ValueError(f"--resume goes on with the same options, but {changed}. Write another run to another folder.")
    if state["processes"] != processes:
        raise ValueError(
            f"The run had {state['processes']} processes and now has {processes}: images would be seen twice or never. "
            "Launch as many as before."
        )
    return state


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
