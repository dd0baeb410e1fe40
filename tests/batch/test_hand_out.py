"""Work that is handed out among processes: a slow one holds nobody up, and what a killed one had is made by the next run."""

import multiprocessing
import os
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from spar_hf.batch.extractor import FeatureExtractor
from spar_hf.batch.tar_files import TarFolder
from spar_hf.cli.main import app
from spar_hf.model.pipeline import OpenVocabSegmentationPipeline
from spar_hf.utils.processes import Processes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked")
COUNT, LIMIT = 10, 120  # images; seconds until a test gives up


@pytest.fixture
def images(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def of_rank(index, port, arguments, before_batch, results):
    """Process `index` of two, as a launcher starts them; `before_batch(index)` is called before each batch."""
    rank = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in rank.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for owner, name in ((FeatureExtractor, "encode"), (OpenVocabSegmentationPipeline, "_encode")):
        inner = getattr(owner, name)
        setattr(owner, name, lambda self, items, inner=inner: (before_batch(index), inner(self, items))[1])
    result = CliRunner().invoke(app, arguments)
    results.put((index, result.exit_code, result.output))


def run_two(arguments, before_batch):
    """Exit status and output by rank, of those that were not killed."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    given = (port, [*map(str, arguments)], before_batch, results)
    processes = [context.Process(target=of_rank, args=(index, *given)) for index in range(2)]
    for process in processes:
        process.start()
    killed = 0
    for process in processes:
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            pytest.fail("the processes wait for one another")
        killed += process.exitcode == -signal.SIGKILL
    return {index: (status, output) for index, status, output in (results.get() for _ in range(2 - killed))}


def wait_until(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def features(base_folder, images, *options):
    return ["features", images, "--model", base_folder, "--shortest-edge", 32, "--workers", 0, *options]


def test_a_slow_process_holds_nobody_up(base_folder, images, tmp_path):
    output = tmp_path / "out"

    def slow(index):
        """The second process has its first image until all others are written: half of them would never be."""
        if index == 1:
            wait_until(lambda: len(list(output.rglob("*.safetensors"))) >= COUNT - 1)

    results = run_two(features(base_folder, images, "--batch-size", 1, "--output", output), slow)
    assert f"process 1 of 2: {COUNT - 1} done" in results[0][1], results
    assert "process 2 of 2: 1 done" in results[1][1], results
    assert [status for status, _ in results.values()] == [0, 0]
    assert len(list(output.rglob("*.safetensors"))) == COUNT


@pytest.mark.parametrize("victim", [0, 1])
def test_the_units_of_a_killed_process_are_made_by_the_next_run(base_folder, images, tmp_path, victim):
    job = features(base_folder, images, "--batch-size", 2, "--shard-images", 2, "--output", tmp_path / "out.tar")
    dying = tmp_path / "dying"

    def die(index):
        """The victim has its first unit, and the other one waits for that."""
        if index == victim:
            dying.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        wait_until(dying.exists)

    ((status, output),) = run_two(job, die).values()
    assert status == 1 and "--skip-existing" in output, output
    left = COUNT - 2 * len([n for n in range(COUNT // 2) if TarFolder(tmp_path / "out.tar").finished(n) is not None])
    assert left == 2 if victim == 1 else left >= 2  # the first process keeps the counter
    again = CliRunner().invoke(app, [*map(str, job), "--skip-existing"])
    assert again.exit_code == 0 and f"{left} done" in again.output, again.output
    folder = TarFolder(tmp_path / "out.tar")
    assert sorted(number for name in folder.files() for number in folder.check(name)[0]) == list(range(COUNT))


def test_two_processes_share_masks(base_folder, images, tmp_path):
    output = tmp_path / "masks"
    job = ["segment", images, "--model", base_folder, "--labels", "road;sky", "--background", "none", "--workers", 0]
    job += ["--shortest-edge", 32, "--format", "map,json", "--batch-size", 1, "--output", output]
    results = run_two(job, lambda index: None)
    done = [int(output.split(" of 2: ")[1].split()[0]) for _, (_, output) in sorted(results.items())]
    assert sum(done) == COUNT and [status for status, _ in results.values()] == [0, 0]
    (output / "3.map.png").unlink()
    again = CliRunner().invoke(app, [*map(str, job), "--skip-existing"])
    assert "1 done, 9 skipped" in again.output, again.output
    assert CliRunner().invoke(app, ["verify", str(output), str(images)]).exit_code == 0


def test_one_process_takes_all_units_in_their_order():
    assert list(Processes().hand_out([range(3), [], range(5, 7)])) == [0, 1, 2, 5, 6]
