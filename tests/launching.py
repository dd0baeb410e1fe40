"""Processes that tests start, and the state of accelerate that they leave in this one."""

import contextlib
import os
import sys
import threading
from pathlib import Path

import psutil

TRAINING = Path(__file__).parents[1] / "training"
# one thread for each process: sums in another order could change the last bit
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
TWO_PROCESSES += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TWO_PROCESSES += ["--main_process_port", "0"]

# start of a program in which spar_hf cannot be imported
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "spar_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def reset_accelerate() -> None:
    """Forgets the device, the precision and the processes that accelerate chose once for this process."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def signal_all(run, number) -> None:
    """Sends a signal to a process and all below it. A launcher gives each a session of its own: a group is not enough."""
    launched = psutil.Process(run.pid)
    for process in [launched, *launched.children(recursive=True)]:
        process.send_signal(number)


@contextlib.contextmanager
def locked_elsewhere(folder):
    """Another thread writes the folder of a run while the block runs."""
    from spar_hf.utils.locks import locked

    ready, done = threading.Event(), threading.Event()

    def hold():
        with locked(Path(folder) / ".lock", str(folder)):
            ready.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()
