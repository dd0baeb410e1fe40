"""The simulator of millions of images: its arithmetic against sums by hand, and a check against commands that run."""

import importlib.util
import json
import time

import pytest
from launching import TRAINING
from typer.testing import CliRunner

from spar_hf.cli.main import app
from spar_hf.utils.errors import UsageError


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("scale", TRAINING / "studies/scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLUSTER = "--images 1000000 --source 1000 1000 --source_kb 500 --working 512 512 --dim 100 --seconds_per_megapixel 0.1"
CLUSTER += (
    " --decide_seconds 0.01 --mask_bytes 0.05 --decode_megapixels 10 --cores 4 --read_mb 1000 --write_mb 100 --gpus 2"
)
CLUSTER += " --price 2 --start_seconds 36 --view 512 256 --window_size 256 --stride 128 --teacher_windows 2"


def test_estimates_by_hand(study, tmp_path, capsys):
    output = tmp_path / "scale.json"
    study.main([*CLUSTER.split(), "--output", str(output)])
    features, masks, full, sampled = json.loads(output.read_text())["estimates"]
    # 0.5 MB and 1 megapixel an image, 2 GPUs of 4 cores; 0.262144 megapixels are seen, 32 × 32 × 100 numbers written
    assert features["stages"] == pytest.approx({"read": 500, "decode": 12500, "compute": 13107.2, "write": 2048})
    assert (features["bottleneck"], features["hours"]) == ("compute", pytest.approx((36 + 13107.2) / 3600))
    assert features["cost"] == pytest.approx(4 * (36 + 13107.2) / 3600)
    assert features["terabytes"] == pytest.approx(0.2048)
    assert masks["stages"]["compute"] == pytest.approx(13107.2 + 5000)
    assert masks["stages"]["write"] == pytest.approx(500) and masks["terabytes"] == pytest.approx(0.05)
    # windows at 0, 128 and 256, each of 0.065536 megapixels; two of them if they are sampled
    assert full["stages"]["compute"] == pytest.approx(3 * 3276.8)
    assert sampled["stages"]["compute"] == pytest.approx(2 * 3276.8)
    assert full["bottleneck"] == sampled["bottleneck"] == "decode"
    assert full["terabytes"] == pytest.approx(0.1024) and sampled["terabytes"] == 0
    assert "1,000,000" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--overwrite"):
        study.main(["--output", str(output)])


def test_a_store_that_is_shared_limits_many_gpus(study):
    few, many = ("--gpus", "1"), ("--gpus", "1000")
    first, second = (study.main([*CLUSTER.split(), *gpus])["estimates"][0] for gpus in (few, many))
    assert (first["bottleneck"], second["bottleneck"]) == ("compute", "write")
    assert second["stages"]["write"] == first["stages"]["write"] == pytest.approx(2048)


@pytest.mark.slow
def test_commands_are_run_and_compared(study, monkeypatch):
    """In this process, since others are slow to start."""

    def run(product, images, output):
        start = time.process_time()
        result = CliRunner().invoke(app, study.arguments(product, images, output))
        assert result.exit_code == 0, result.output
        ran.append((product, len(list(images.iterdir())), len(list(output.glob("[0-9]*")))))
        return {"cpu": time.process_time() - start, "clock": 0.0}

    ran = []
    monkeypatch.setattr(study, "CALIBRATION", 8)
    monkeypatch.setattr(study, "run", run)
    rows = study.main(["--check", "3"])["check"]
    assert ran == [("features", 1, 1), ("features", 3, 3), ("masks", 1, 1), ("masks", 3, 3)]
    for row in rows:
        assert all(value > 0 for value in row["stages"].values())
        assert row["predicted"] == pytest.approx(row["start"] + 3 * sum(row["stages"].values()))
        assert row["error"] == pytest.approx(row["predicted"] / row["cpu"] - 1)
