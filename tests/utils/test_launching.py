"""As many processes work together as were launched, or the run is refused; workers outlive a scheduler's SIGTERM."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from launching import ENVIRONMENT, TRAINING, TWO_PROCESSES
from torch.utils.data import DataLoader

from spar_hf.utils.errors import UsageError
from spar_hf.utils.launching import check_processes, outlive_signals

SCRIPT = """
from spar_hf.utils.errors import run_command
from spar_hf.utils.runs import start_accelerator
run_command(lambda: start_accelerator(images=3))
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
LAUNCH += ["--mixed_precision", "no", "--main_process_port", "0"]
MULTI_GPU = [*LAUNCH[:3], "--config_file", str(TRAINING / "configs" / "multi_gpu.yaml"), "--main_process_port", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "cpu", "said"),
    [
        ([*LAUNCH, "--cpu", "--num_processes", "2"], "true", "asked for several"),
        ([*LAUNCH, "--num_processes", "2"], "false", "asked for several"),
        # without a GPU, accelerate 1.12 starts two processes on the CPU, later ones start one
        ([*MULTI_GPU, "--mixed_precision", "no"], "false", "2 processes were launched and 1|2 processes on cpu"),
        (TWO_PROCESSES, "true", "2 processes on cpu × 3 images per step"),
        ([*LAUNCH, "--cpu", "--num_processes", "1"], "true", "1 processes on cpu × 3 images per step"),
        ([sys.executable], "true", "1 processes on cpu × 3 images per step"),
    ],
)
def test_launches(tmp_path, launcher, cpu, said):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": cpu, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*launcher, tmp_path / "script.py"], env=environment, capture_output=True, text=True)
    assert re.search(said, run.stderr), run.stderr[-3000:]
    assert (run.returncode == 0) == ("images per step" in run.stderr)
    if run.returncode:
        assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in run.stderr


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_the_size_of_every_launcher_is_compared(monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    check_processes(2)
    with pytest.raises(UsageError, match="2 processes were launched and 1"):
        check_processes(1)


def slow_square(number):
    time.sleep(0.05)
    return number**2


class Squares:
    def __len__(self):
        return 60

    def __getitem__(self, number):
        return slow_square(number)


def test_workers_outlive_signals_to_the_group_and_end_with_the_loader():
    loader = DataLoader(Squares(), batch_size=None, num_workers=2, worker_init_fn=outlive_signals)
    items = iter(loader)
    found = [next(items), next(items)]  # both workers have started
    workers = [worker.pid for worker in items._workers]
    for number in (signal.SIGTERM, signal.SIGINT):
        # a signal that the parent sends would end them: send it as a scheduler does, from another process
        subprocess.run([sys.executable, "-c", f"import os; [os.kill(p, {int(number)}) for p in {workers}]"], check=True)
        found.append(next(items))
    found.extend(items)
    assert found == [i**2 for i in range(60)]
    del items
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.1)
