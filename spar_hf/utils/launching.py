"""The processes of a run: whether as many work together as were launched, and signals in those that load images."""

import contextlib
import os
import signal
import threading
from collections.abc import Mapping

from spar_hf.utils.errors import UsageError

# number of processes, by torchrun and accelerate, and by the launchers of MPI
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_processes(processes: int) -> None:
    """
    Compare the number of processes that work together with what was launched.

    `accelerate launch --num_processes 2` starts one process on a CPU, and `--multi_gpu` without a GPU starts several that do
    not know each other.

    Args:
        processes: `accelerator.num_processes`.

    Raises:
        UsageError: they differ; the message names a command that works.
    """
    launched = max((int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdecimal()), default=None)
    if launched is not None and launched != processes:
        raise UsageError(
            f"{launched} processes were launched and {processes} would work together, each a training of its own: there is "
            f"no GPU for them. On CPUs: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {launched} …; "
            "one process: accelerate launch --num_processes 1 …"
        )
    if launched is None and asked_for_more(os.environ, parent_environment()):
        raise UsageError(
            "`accelerate launch` was asked for several processes and started one. On CPUs: ACCELERATE_USE_CPU=true "
            "accelerate launch --multi_gpu --num_processes 2 …; on GPUs: accelerate launch --multi_gpu --num_processes 2 "
            "…; one process: accelerate launch --num_processes 1 …"
        )


def asked_for_more(here: Mapping[str, str], parent: Mapping[str, str] | None) -> bool:
    """
    Whether `accelerate launch` started one process where several were asked for: only then does its plain launcher set
    `MASTER_ADDR`, and no size.

    Args:
        here: environment of this process.
        parent: that of the launcher; `None` if it cannot be read.

    Example:

    ```python
    >>> launched = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    >>> asked_for_more(launched, {}), asked_for_more(launched, {"MASTER_ADDR": "127.0.0.1"}), asked_for_more({}, {})
    (True, False, False)
    ```"""
    set_by_launcher = parent is None or "MASTER_ADDR" not in parent
    return "MASTER_ADDR" in here and "ACCELERATE_MIXED_PRECISION" in here and set_by_launcher


def parent_environment() -> dict[str, str] | None:
    """The environment that the parent process started with; `None` where the system does not tell."""
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return None
    return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)


def outlive_signals(worker: int) -> None:
    """
    `worker_init_fn` of a `DataLoader`: Ctrl-C and a SIGTERM to the whole process group, as schedulers send it, leave the
    workers alone, so that the main process can finish its step and write a checkpoint. It ends them itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which has no such signal
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while True:
            with contextlib.suppress(InterruptedError):
                if signal.sigwaitinfo({signal.SIGTERM}).si_pid in (parent, os.getpid()):
                    os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
