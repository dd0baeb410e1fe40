"""Features on a real Ray: those of the model, every image exactly once, also where a worker or the driver is killed."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import psutil
import pytest
import torch
from launching import ENVIRONMENT
from PIL import Image
from typer.testing import CliRunner

# read when Ray is imported. Workers are as important as the test; by default they wait for whatever else the machine does
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "300"}
os.environ |= SETTINGS
ray = pytest.importorskip("ray", reason="extra ray")

from spar_hf.batch.arrays import read_array  # noqa: E402
from spar_hf.batch.callables import SparFeatures  # noqa: E402
from spar_hf.batch.extractor import FeatureExtractor  # noqa: E402
from spar_hf.batch.parquet_files import ParquetFolder  # noqa: E402
from spar_hf.batch.ray_engine import compute  # noqa: E402
from spar_hf.cli.main import app  # noqa: E402
from spar_hf.utils.image_files import InputImage  # noqa: E402
from spar_hf.utils.texts import storable  # noqa: E402

pytestmark = pytest.mark.slow
COUNT = 40


@pytest.fixture(scope="module")
def cluster():
    """A local Ray with two CPUs; its address."""
    context = ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False)
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of three sizes, one of them broken."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("ray")
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (48 + 16 * (i % 3), 64, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:300])
    return folder


def command(images, base_folder, output, address=None):
    options = [images, "--model", base_folder, "--shortest-edge", 48, "--shard-images", 2, "--output", output]
    return ["features", *map(str, options), "--engine", "ray", *(["--address", address] if address else [])]


def rows_of(output):
    import pyarrow.parquet as pq

    folder = ParquetFolder(output)
    return [row for name in folder.files() for row in pq.read_table(Path(output, name)).to_pylist()]


def check_each_once(output, images, base_folder, some=4):
    """Every number once, and the features of some images those of the model."""
    rows = rows_of(output)
    assert Counter(row["id"] for row in rows) == Counter(range(COUNT))
    assert [row["image"] for row in rows if row["error"]] == ["07"]
    extract = FeatureExtractor(str(base_folder), shortest_edge=48)
    for row in [row for row in rows if not row["error"]][:some]:
        expected = extract.encode([extract.prepare(row["source"])])[0]["feature_map"]
        torch.testing.assert_close(torch.tensor(np.array(read_array(row))), expected, rtol=1e-4, atol=1e-5)
    result = CliRunner().invoke(app, ["verify", str(output), str(images)])
    assert result.exit_code == 0 and f"{COUNT} images are whole" in result.output, result.output


def test_a_killed_worker_costs_no_image(cluster, images, base_folder, tmp_path):
    output, killed = tmp_path / "out.parquet", []

    def kill_a_model():
        end = time.monotonic() + 300
        while not killed and time.monotonic() < end:
            for process in psutil.process_iter(["name", "cmdline"]):
                line = " ".join(process.info["cmdline"] or [])
                if "PreparedFeatures" in line and line.startswith("ray::") and list(output.glob("*.parquet")):
                    process.kill()
                    killed.append(process.pid)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=kill_a_model)
    thread.start()
    result = CliRunner().invoke(app, command(images, base_folder, output, cluster))
    killed = killed or ["none"]
    thread.join()
    assert killed != ["none"] and result.exit_code == 1, result.output  # one image is broken
    assert f"{COUNT - 1} done, 1 failed" in result.output
    check_each_once(output, images, base_folder)
    assert len(list(output.glob("*.parquet"))) > 2  # the input is cut into blocks, not one task


def test_a_killed_driver_goes_on_where_it_stopped(cluster, images, base_folder, tmp_path):
    output = tmp_path / "out.parquet"
    arguments = command(images, base_folder, output)  # with a Ray of its own, which is killed too
    driver = subprocess.Popen([sys.executable, "-m", "spar_hf.cli.main", *arguments], env={**ENVIRONMENT, **SETTINGS})
    end = time.monotonic() + 300
    while len(list(output.glob("*.parquet"))) < 3 and driver.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    below = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    before = {row["id"] for row in rows_of(output)}
    whole = [row for row in rows_of(output) if not row["error"]]
    assert 0 < len(before) < COUNT
    (output / "cut.parquet").write_bytes(b"PAR1 half a file")  # what a driver that dies while writing leaves
    manifest = json.loads((output / "_spar-hf.json").read_text())
    assert manifest["images"] == COUNT
    missing = str(tmp_path / "missing.png")
    result = CliRunner().invoke(app, [*command(images, base_folder, output, cluster), missing, "--skip-existing"])
    assert f"{len(whole)} skipped" in result.output and "2 failed" in result.output, result.output
    assert result.exit_code == 1 and result.output.count("missing.png") == 1
    again = CliRunner().invoke(app, [*command(images, base_folder, output, cluster), "--skip-existing"])
    assert re.search(r"07\.png.*in an earlier run; remove \S+\.parquet to try it again", again.output), again.output
    check_each_once(output, images, base_folder)


def test_what_does_not_go_together_is_refused(images, tmp_path):
    for options, message in (
        (["--output", str(tmp_path / "out"), "--engine", "ray"], "out.parquet"),
        (["--output", str(tmp_path / "out"), "--engine", "spark"], "local or ray"),
        (["--output", str(tmp_path / "out"), "--address", "auto"], "--engine ray"),
        (["--output", str(tmp_path / "o.parquet"), "--engine", "ray", "--device", "cpu"], "omit them"),
        (["--output", str(tmp_path / "o.parquet"), "--engine", "ray", "--workers", "2"], "omit them"),
    ):
        result = CliRunner().invoke(app, ["features", str(images), *options])
        assert result.exit_code == 2 and message in result.output


def test_a_name_that_is_no_utf8_is_read(base_folder, images, tmp_path):
    name = tmp_path / os.fsdecode(b"caf\xe9.png")
    name.write_bytes((images / "00.png").read_bytes())
    features, folder, rows, tables = SparFeatures(str(base_folder), size=48), MagicMock(), MagicMock(), []
    folder.manifest, rows.map_batches.return_value, rows.repartition.return_value = {"shard_images": 2}, rows, rows
    data = MagicMock(from_arrow=lambda table: tables.append(table) or rows)
    compute(MagicMock(cluster_resources=dict), data, folder, [InputImage(str(name), "cafe")], features, [0], None)
    reading, computing = rows.map_batches.call_args_list
    batch = {column: np.array(tables[0][column].to_pylist(), object) for column in tables[0].column_names}
    found = computing.args[0](**computing.kwargs["fn_constructor_kwargs"])(
        reading.args[0](batch, **reading.kwargs["fn_kwargs"])
    )
    (row,) = found.to_pylist()
    assert row["error"] == "" and row["source"] == storable(str(name)) and read_array(row).shape[0] > 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_on_pixels_reaches_processes_that_inherit_nothing(monkeypatch, images, base_folder, tmp_path):
    features, folder = SparFeatures(str(base_folder), size=48), ParquetFolder(tmp_path / "out.parquet")
    names = [InputImage(str(images / f"{i:02}.png"), f"{i:02}") for i in (0, 1)]  # of 48 × 64 and 64 × 64 pixels
    folder.begin(features.settings, ["00", "01"], 2, False)
    rows = MagicMock()
    data = MagicMock(from_arrow=lambda table: rows)
    rows.repartition.return_value = rows.map_batches.return_value = rows
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3500)  # as --max-pixels sets it
    compute(MagicMock(cluster_resources=dict), data, folder, names, features, [0, 1], None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)  # in a process of Ray
    stage = rows.map_batches.call_args_list[0]
    found = stage.args[0]({"source": [image.source.encode() for image in names]}, **stage.kwargs["fn_kwargs"])
    assert found["error"][0] == "" and "3500" in found["error"][1]
