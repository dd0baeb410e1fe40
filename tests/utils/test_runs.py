"""What every training run has in common: the lock of its folder, its log, the steps it skips."""

import json
import math
import signal
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType

from spar_hf.utils.errors import NotFinite, UsageError
from spar_hf.utils.locks import Locked
from spar_hf.utils.run_options import TrainingRunOptions
from spar_hf.utils.runs import BadSteps, RunFolder, RunLog, TrainingRun, start_accelerator


@pytest.mark.parametrize(("file", "lock"), [(False, "out/.lock"), (True, ".out.lock")])
def test_a_folder_or_report_has_one_writer(tmp_path, file, lock):
    accelerator = Accelerator(cpu=True)
    folder = RunFolder(accelerator, tmp_path / "out", file=file)
    assert (tmp_path / lock).is_file()
    refused = []

    def second():
        try:
            RunFolder(accelerator, tmp_path / "out", file=file)
        except Locked as error:
            refused.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert len(refused) == 1 and "out" in refused[0]
    folder.close()
    assert not list(tmp_path.iterdir())


def test_the_log_holds_no_bare_nan(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", Accelerator(cpu=True))
    log.write({"step": 1, "loss": math.nan, "parts": [math.inf, 2.0]})
    log.close()
    row = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "loss": None, "parts": [None, 2.0]}


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    """Instead of a run of hours that is tracked nowhere."""
    there = {"tensorboard": LoggerType.TENSORBOARD}
    for module in ("spar_hf.utils.runs", "accelerate.tracking"):
        monkeypatch.setattr(f"{module}.get_available_trackers", lambda: list(there.values()), raising=False)
    for tracker in ("wandb", "mlflow"):
        with pytest.raises(UsageError, match=f"--report_to {tracker}: .*pip install {tracker}"):
            start_accelerator(report_to=tracker, output=tmp_path, cpu=True)
    assert start_accelerator(report_to="tensorboard", output=tmp_path, cpu=True).log_with
    for none in ("none", None):
        assert not start_accelerator(report_to=none, output=tmp_path, cpu=True).log_with


def test_bad_steps_are_counted_over_the_whole_run():
    accelerator = Accelerator(cpu=True)
    steps = BadSteps(accelerator, most=2)
    assert [steps.is_bad(1, 0.5), steps.is_bad(2, math.nan), steps.is_bad(3, 0.5, norm=math.inf)] == [False, True, True]
    assert steps.mean(0.5, 3) == 0.5 and steps.mean(1.0, 2) == 0.5  # of one good step of three, then of two
    resumed = BadSteps(accelerator, 2, *steps.state())
    with pytest.raises(NotFinite, match=r"in 3 steps.*step 4"):
        resumed.is_bad(4, -math.inf)


def test_a_run_is_stopped_and_goes_on(tmp_path):
    """Three of four steps, a signal within the third; the rest; and an error before the first leaves no lock."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def train(resume):
        options = TrainingRunOptions(output=str(tmp_path / "run"), resume=resume)
        run = TrainingRun(Accelerator(cpu=True), options, {"seed": 0}, dict, [tmp_path / "run" / "model"])
        with run:
            run.accelerator.prepare(torch.nn.Linear(1, 1))
            run.earlier_samples(["a.jpg"])
            run.begin(4, {"train": ["a.jpg"]})
            for step in range(run.step, 4):
                if step == 2 and not resume:
                    signal.raise_signal(signal.SIGTERM)
                run.log.write({"step": step + 1})
                if run.after_step(step + 1, bad_steps=run.bad_steps.state):
                    break
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert not (tmp_path / "run" / ".lock").exists()
        return run.stopped

    assert train(resume=False)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-3", "images.json.gz", "log.jsonl"]
    assert not train(resume=True)
    assert [json.loads(row)["step"] for row in (tmp_path / "run" / "log.jsonl").open()] == [1, 2, 3, 4]
    with (
        pytest.raises(MemoryError),
        TrainingRun(Accelerator(cpu=True), TrainingRunOptions(output=str(tmp_path / "other")), {}, dict, []),
    ):
        raise MemoryError
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("read", ["run/model", ["other", "run/model/deeper"]])
def test_a_run_does_not_replace_what_it_reads(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    Path("run/model/deeper").mkdir(parents=True)
    Path("other").mkdir()
    options = TrainingRunOptions(output="run", overwrite=True)
    with pytest.raises(UsageError, match=r"run/model.* is read"):
        TrainingRun(Accelerator(cpu=True), options, {"seed": 0, "model": read}, dict, [Path("run/model")])
    with TrainingRun(Accelerator(cpu=True), options, {"seed": 0, "model": "other"}, dict, [Path("run/model")]):
        pass
