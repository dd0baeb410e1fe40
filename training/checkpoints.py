"""Checkpoints that survive a kill at any moment: written under a temporary name, renamed, the one before kept until then."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

from accelerate import Accelerator


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int = 2, **state: Any) -> Path:
    """
    Write `OUTPUT/checkpoint-STEP`: what accelerate knows (weights, optimizer, schedule, random numbers of every process) and
    `state` as JSON. All processes must call it. The last `keep` checkpoints stay.
    """
    target, temporary = output / f"checkpoint-{step}", output / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in list_checkpoints(output)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def list_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def load_checkpoint(accelerator: Accelerator, output: Path) -> dict[str, Any]:
    """
    Take up the last complete checkpoint; returns its `state`. Everything must be prepared already.

    Raises:
        FileNotFoundError: the run has none.
    """
    found = list_checkpoints(output)
    if not found:
        raise FileNotFoundError(f"{output} has no checkpoint to resume from. Start without --resume.")
    accelerator.load_state(str(found[-1]))
    return json.loads((found[-1] / "state.json").read_text())


def cut_log(path: Path, step: int) -> None:
    """Drop the rows after `step` that a killed run had already written; the resumed run writes them again."""
    if not path.is_file():
        return
    rows = [line for line in path.read_text().splitlines() if line.strip()]
    kept = []
    for line in rows:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(kept))
    temporary.replace(path)


class StopAtStep:
    """Ctrl-C asks for a stop at the end of the step, where weights and optimizer agree; a second one is at once."""

    def __init__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def restore(self):
        signal.signal(signal.SIGINT, self.before)
