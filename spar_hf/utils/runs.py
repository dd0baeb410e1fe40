"""What every training run has in common: its accelerator, its log, and the way it ends."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, set_seed

from spar_hf.utils.atomic import finite_json
from spar_hf.utils.checkpoints import (
    StopAtStep,
    cut_log,
    discard_checkpoints,
    earlier_state,
    load_checkpoint,
    save_checkpoint,
)
from spar_hf.utils.errors import NotFinite, UsageError
from spar_hf.utils.launching import check_processes
from spar_hf.utils.locks import Locked, locked
from spar_hf.utils.sample_record import earlier_samples, write_samples

logger = logging.getLogger(__name__)


def start_accelerator(
    mixed_precision: str | None = None,
    seed: int | None = None,
    report_to: str | None = None,
    output: str | Path | None = None,
    images: int | None = None,
    **kwargs: Any,
) -> Accelerator:
    """
    The accelerator of a run. Library messages below WARNING come from the main process only.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`; `None` takes what `accelerate launch` was told.
        seed: of Python, NumPy and torch.
        report_to: tracker of accelerate by name; `auto` is TensorBoard where it is installed; `None` or `none` is none.
        output: folder of the run, where trackers write.
        images: per process and step, by default `gradient_accumulation_steps`; is logged with the number of processes.
        kwargs: passed on to `Accelerator`.

    Raises:
        UsageError: the package of the tracker is not installed; float16 on a CPU, where accelerate would run in float32 and
            report float16; fewer processes work together than were launched.
    """
    if report_to == "auto":
        report_to = "tensorboard" if find_spec("tensorboard") else None
    tracker = None if report_to == "none" else report_to
    if tracker is not None and tracker not in map(str, get_available_trackers()):  # accelerate would go on without it
        raise UsageError(
            f"--report_to {tracker}: {tracker} is not installed. Run `pip install {tracker}`, or give none."
        )
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=tracker,
        project_dir=None if tracker is None or output is None else str(output),
        **kwargs,
    )
    check_processes(accelerator.num_processes)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("--mixed_precision fp16 needs an accelerator; on a CPU use bf16 or no.")
    logging.getLogger("spar_hf").setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    images = kwargs.get("gradient_accumulation_steps") if images is None else images
    work = "" if images is None else f" × {images} images per step"
    logger.info("%d processes on %s%s.", accelerator.num_processes, accelerator.device.type, work)
    if seed is not None:
        set_seed(seed)
    return accelerator


class RunFolder(contextlib.ExitStack):
    """
    The folder of a run, locked for as long as the run lasts: a second one there is refused at its start.

    Args:
        accelerator: of the run; its main process holds the lock.
        output: the folder.
        file: whether `output` is a file instead, whose lock lies beside it.

    Raises:
        Locked: another run writes there; raised by all processes.
    """

    def __init__(self, accelerator: Accelerator, output: Path, file: bool = False):
        super().__init__()
        problem: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                lock = output.with_name(f".{output.name}.lock") if file else output / ".lock"
                self.enter_context(locked(lock, str(output)))
            except Locked as error:
                problem = [str(error)]
        if accelerator.num_processes > 1:
            broadcast_object_list(problem)
        if problem[0] is not None:
            raise Locked(problem[0])


class BadSteps:
    """
    Counts the steps whose loss or gradient is not finite. They must be skipped, which keeps the weights as they are.

    Args:
        accelerator: of the run.
        most: how many the run may have.
        count: those that a resumed run had before.

    Attributes:
        count: in the whole run.
        recent: since the last row of the log.
    """

    def __init__(self, accelerator: Accelerator, most: int, count: int = 0, recent: int = 0):
        self.accelerator, self.most, self.count, self.recent = accelerator, most, count, recent
        self.last_bad = False

    def is_bad(self, step: int, loss: float, norm: Any = None) -> bool:
        """
        Whether a step must be skipped. All processes must call it once per optimizer step, and get the same answer.

        Args:
            step: number of the step, for messages.
            loss: of this process.
            norm: of the gradients, the same in all processes. In float16 it is left out: there accelerate's scaler skips
                steps while it looks for its scale.

        Raises:
            NotFinite: there were more than `most`.
        """
        finite = math.isfinite(loss)
        if norm is not None and self.accelerator.scaler is None:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of weights that FSDP shards
            finite = finite and bool(torch.as_tensor(norm).isfinite())
        bad = torch.tensor(0.0 if finite else 1.0, device=self.accelerator.device)
        self.last_bad = bool(self.accelerator.reduce(bad, "sum") > 0)
        if self.last_bad:
            self.count, self.recent = self.count + 1, self.recent + 1
            logger.warning("Step %d is skipped: its loss or gradient is not finite (%d so far).", step, self.count)
            if self.count > self.most:
                raise NotFinite(
                    f"The training diverged: loss or gradient was not finite in {self.count} steps, the last of them step "
                    f"{step} (--max_bad_steps {self.most}). Lower --learning_rate, or use --mixed_precision bf16 instead of "
                    "fp16. What was written before is kept."
                )
        return self.last_bad

    def state(self) -> list[int]:
        """What a checkpoint keeps: count and recent."""
        return [self.count, self.recent]

    def mean(self, total: float, steps: int) -> float | None:
        """The mean loss of the good ones of the last `steps` steps, whose sum is `total`; starts counting anew."""
        good, self.recent = steps - self.recent, 0
        return total / good if good > 0 else None


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
            self.file.write(json.dumps(finite_json(row), allow_nan=False) + "\n")
            self.file.flush()
        self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=row["step"])

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


class TrainingRun:
    """
    The life of a training in its folder. The folder is locked from here to the end of a `with` block, which a reader of a
    trainer sees as

    ```python
    with TrainingRun(accelerator, options.run, settings, upgrade, results) as run:
        ...  # read images, build models, `accelerator.prepare`
        run.begin(steps, samples)
        for step in range(run.step, steps):
            ...
            if run.after_step(step + 1, bad_steps=run.bad_steps.state):
                break
        ...  # write results unless `run.stopped`, and drop what was prepared
    ```

    Args:
        accelerator: of the run.
        options: `output`, `resume`, `overwrite`, `save_steps`, `allow_changed_data` and `max_bad_steps` of the command.
        settings: options that a resumed run must share, see [`settings_of`].
        upgrade: see [`earlier_state`].
        results: what the run writes in the end; the last one is named in its last message.
        per_process: see [`earlier_state`].

    Attributes:
        state: what the checkpoint of a resumed run kept; `None` for a new run.
        step: steps that are done when the run starts.
        stopped: whether Ctrl-C or SIGTERM ended it early, its checkpoint written.
        log: the rows in `log.jsonl`, once the steps have begun.

    Raises:
        Locked: another run writes there.
        UsageError: see [`earlier_state`].
    """

    log: RunLog

    def __init__(
        self,
        accelerator: Accelerator,
        options: Any,
        settings: dict[str, Any],
        upgrade: Callable[[dict[str, Any]], dict[str, Any]],
        results: Sequence[Path],
        per_process: str | None = None,
    ):
        self.accelerator, self.options, self.output = accelerator, options, Path(options.output)
        self.settings = settings | {"mixed_precision": accelerator.mixed_precision}
        self.results, self.stopped = results, False
        self.start_weights: dict[str, str] = {}
        resume, overwrite, processes = options.resume, options.overwrite, accelerator.num_processes
        with contextlib.ExitStack() as exits:
            exits.enter_context(RunFolder(accelerator, self.output))
            given = (processes, upgrade, results, overwrite, per_process)
            self.state = earlier_state(self.output, resume, self.settings, *given)
            self.step: int = 0 if self.state is None else self.state["step"]
            self.exits = exits.pop_all()

    @cached_property
    def bad_steps(self) -> BadSteps:
        """Counts the steps that are skipped, from what the checkpoint says."""
        return BadSteps(self.accelerator, self.options.max_bad_steps, *(self.state or {}).get("bad_steps", ()))

    def earlier_samples(self, found: Iterable[str]) -> dict[str, list[str]] | None:
        """The images of the run that is resumed, compared with those there are now, see [`earlier_samples`]."""
        return None if self.state is None else earlier_samples(self.output, found, self.options.allow_changed_data)

    def check_start_weights(self, **fingerprints: str) -> None:
        """
        Remember the weights that the run reads from model folders, and refuse to resume it with others. A checkpoint holds
        what is trained, and neither a teacher nor the frozen part of a model. Call it before `begin`.

        Args:
            fingerprints: such as [`~spar_hf.model.fingerprints.vision_fingerprint`], by the option that names the folder.

        Raises:
            UsageError: they are not those that the run began with.
        """
        self.start_weights = fingerprints
        then = (self.state or {}).get("start_weights", fingerprints)  # earlier versions kept none
        if changed := [f"--{name}" for name, found in fingerprints.items() if then.get(name, found) != found]:
            raise UsageError(
                f"--resume goes on with the same weights, but those of {changed[0]} changed since the run began. Bring them "
                "back, or write another run to another folder."
            )

    def track(self, project: str, record: dict[str, Any]) -> None:
        """Start the trackers, if there are any, and tell them how the model is trained."""
        if self.accelerator.log_with:
            plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in record.items()}
            self.accelerator.init_trackers(project, config=plain)

    def begin(self, steps: int, samples: Mapping[str, Iterable[str]], first_row: int = 1) -> None:
        """
        Load the checkpoint of a resumed run, remove those of a replaced one, and open the log. Until the last step, Ctrl-C
        and SIGTERM end the run after a checkpoint. Call it in all processes after `accelerator.prepare`.

        Args:
            steps: of the whole run.
            samples: names of the images for [`write_samples`].
            first_row: number of the first step in the log.
        """
        self.steps = steps
        self.output.mkdir(parents=True, exist_ok=True)
        if self.state is not None:
            load_checkpoint(self.accelerator, self.output)
        elif self.accelerator.is_main_process:
            discard_checkpoints(self.output)  # of a run that --overwrite replaces
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_samples(self.output, samples)
        resume_step = None if self.state is None else self.step - 1 + first_row
        self.log = RunLog(self.output / "log.jsonl", self.accelerator, resume_step)
        self.exits.callback(self.log.close)
        if self.step < steps:
            self.stop = StopAtStep(self.accelerator)
            self.exits.callback(self.stop.restore)

    def after_step(self, step: int, **state: Any) -> bool:
        """
        Whether the run must end here, its checkpoint written. All processes must call it after every step.

        Args:
            step: steps done so far.
            state: what the checkpoint keeps beside weights, optimizer and schedule, as JSON. A function among it is
                called only when a checkpoint is written, and then in all processes.
        """
        is_last = step >= self.steps
        self.stopped = not is_last and self.stop.asked()
        if self.stopped or (not is_last and step % self.options.save_steps == 0):
            values = {name: value() if callable(value) else value for name, value in state.items()}
            folder = save_checkpoint(
                self.accelerator, self.output, step, settings=self.settings, start_weights=self.start_weights, **values
            )
            if self.stopped:
                text = "Stopped after step %d; %s is complete. Go on with the same command and --resume."
                logger.info(text, step, folder)
        if self.stopped or is_last:
            self.stop.restore()
        return self.stopped

    def close(self) -> None:
        """Release the folder of a run that ends before its `with` block."""
        self.exits.close()

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self.exits:
            if kind is None:
                self.accelerator.wait_for_everyone()
                end_run(self.accelerator)
        if kind is None and not self.stopped:
            logger.info("written: %s", self.results[-1])


def end_run(accelerator: Accelerator) -> None:
    """
    End trackers and process group. Delete every reference to what `accelerator.prepare` returned first. If DDP's reducer is
    the last to hold the process group, it waits for gloo's thread with the interpreter's lock held, and that thread waits
    for the lock.
    """
    accelerator.free_memory()
    accelerator.end_training()
