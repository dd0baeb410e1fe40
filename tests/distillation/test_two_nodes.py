"""Two nodes, each a launcher with one process on this machine: shards of unequal size, and a node that is killed."""

import io
import signal
import socket
import subprocess
import sys
import tarfile
import time

import pytest
from distilling import log_of
from launching import ENVIRONMENT, TRAINING, signal_all
from transformers import AutoModel

pytestmark = pytest.mark.slow
STEPS = 30


@pytest.fixture(scope="module")
def shards(image_folder, tmp_path_factory):
    """Shards with 5 images and with 2."""
    folder, files = tmp_path_factory.mktemp("shards"), sorted(image_folder.glob("*.jpg"))
    for shard, count in (("a", 5), ("b", 2)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(count):
                data = files[i % len(files)].read_bytes()
                entry = tarfile.TarInfo(f"{shard}{i}.jpg")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return folder


def start_nodes(base_folder, shards, output, *options):
    """The same command on both nodes, which find each other at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "spar"]
    command += [TRAINING / "distill.py", "--model", base_folder, "--images", shards, "--output", output, "--streaming"]
    command += ["--steps", STEPS, "--save_steps", 2, "--log_steps", 1, "--teacher_windows", 2, "--train_layers", 1]
    command += ["--holdout_images", 0, "--holdout_every", 10**9, "--picture_steps", 0, "--workers", 0, *options]
    command = [*map(str, command), "--report_to", "none", "--mixed_precision", "no"]
    kept = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    return [subprocess.Popen(command, **kept) for _ in range(2)]


def test_a_killed_node_is_restarted_and_uneven_shards_do_not_wait(base_folder, shards, tmp_path):
    output = tmp_path / "run"
    first, second = start_nodes(base_folder, shards, output)
    while first.poll() is None and not list(output.glob("checkpoint-*")):
        time.sleep(0.02)
    assert first.poll() is None, first.communicate()[1][-4000:]
    signal_all(second, signal.SIGKILL)
    second.communicate()
    first.communicate(timeout=300)  # it does not wait for the other for ever
    assert first.returncode != 0 and not (output / "curve.png").exists()

    nodes = start_nodes(base_folder, shards, output, "--resume")
    for node in nodes:
        _, said = node.communicate(timeout=300)
        assert node.returncode == 0, said[-4000:]
    assert [row["step"] for row in log_of(output)] == list(range(1, STEPS + 1))
    assert AutoModel.from_pretrained(output / "model").config.distillation["steps"] == STEPS
