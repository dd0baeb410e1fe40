"""What every training run has in common: its accelerator, its log, and the way it ends."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from spar_hf.utils.checkpoints import StopAtStep, cut_log, save_checkpoint
from spar_hf.utils.errors import UsageError

logger = logging.getLogger(__name__)


def start_accelerator(
    mixed_precision: str | None = None,
    seed: int | None = None,
    report_to: str | None = None,
    output: str | Path | None = None,
    **kwargs: Any,
) -> Accelerator:
    """
    The accelerator of a run. Library messages below WARNING come from the main process only.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`; `None` takes what `accelerate launch` was told.
        seed: of Python, NumPy and torch.
        report_to: tracker of accelerate by name; `auto` is TensorBoard where it is installed; `None` or `none` is none.
        output: folder of the run, where trackers write.
        kwargs: passed on to `Accelerator`.

    Raises:
        UsageError: float16 on a CPU, where accelerate would run in float32 and report float16.
    """
    if report_to == "auto":
        report_to = "tensorboard" if find_spec("tensorboard") else None
    tracker = None if report_to == "none" else report_to
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=tracker,
        project_dir=None if tracker is None or output is None else str(output),
        **kwargs,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("--mixed_precision fp16 needs an accelerator; on a CPU use bf16 or no.")
    logging.getLogger("spar_hf").setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    if seed is not None:
        set_seed(seed)
    return accelerator


class RunLog:
    """
    `log.jsonl`, one JSON object per line with at least a `step`, written by the main process only.

    Args:
        path: the file.
        accelerator: of the run; its trackers get every row too.
        resume_step: step that a resumed run goes on from; later rows of the killed run are dropped. `None` starts anew.
    """

    def __init__(self, path: Path, accelerator: Accelerator, resume_step: int | None = None):
        self.accelerator, self.file = accelerator, None
        if accelerator.is_main_process:
            if resume_step is not None:
                cut_log(path, resume_step)
            self.file = path.open("w" if resume_step is None else "a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and hand it to the trackers."""
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        self.accelerator.log(row, step=row["step"])

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


class Checkpointing:
    """
    Writes a checkpoint every few steps, and one more where Ctrl-C or SIGTERM ends the run early. It takes over these
    signals until it is closed.

    Args:
        accelerator: of the run.
        output: folder of the run.
        settings: options that a resumed run must share.
        every: steps between checkpoints.
        steps: of the whole run; none is written after the last.
    """

    def __init__(self, accelerator: Accelerator, output: Path, settings: dict[str, Any], every: int, steps: int):
        self.accelerator, self.output, self.settings = accelerator, output, settings
        self.every, self.steps = every, steps
        self.stop = StopAtStep(accelerator)

    def after_step(self, step: int, **state: Any) -> bool:
        """
        Whether the run must end here, its checkpoint written. All processes must call it after every step.

        Args:
            step: steps done so far.
            state: what the checkpoint keeps beside weights, optimizer and schedule, as JSON. A function among it is
                called only when a checkpoint is written, and then in all processes.
        """
        if step >= self.steps:
            return False
        stopped = self.stop.asked()
        if stopped or step % self.every == 0:
            values = {name: value() if callable(value) else value for name, value in state.items()}
            folder = save_checkpoint(self.accelerator, self.output, step, settings=self.settings, **values)
            if stopped:
                logger.info(
                    "Stopped after step %d; %s is complete. Go on with the same command and --resume.", step, folder
                )
        return stopped

    def close(self) -> None:
        """Give the signals back."""
        self.stop.restore()


def end_run(accelerator: Accelerator) -> None:
    """
    End trackers and process group. Delete every reference to what `accelerator.prepare` returned first. If DDP's reducer is
    the last to hold the process group, it waits for gloo's thread with the interpreter's lock held, and that thread waits
    for the lock.
    """
    accelerator.free_memory()
    accelerator.end_training()
