"""What an installed package must contain and keep quiet about."""

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import spar_hf

ROOT = Path(__file__).parents[1]


def test_import_is_quiet_and_repeatable():
    code = "import spar_hf, importlib; importlib.reload(spar_hf); importlib.reload(spar_hf.model.pipeline)"
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_import_pulls_in_no_training_dependency():
    code = "import sys, spar_hf; print(*{'evaluate', 'matplotlib', 'datasets'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_everything_public_is_there():
    for name in spar_hf.__all__:
        assert getattr(spar_hf, name) is not None
    assert importlib.metadata.version("spar-hf") == spar_hf.__version__


def test_wheel_contains_the_embedded_model_with_its_licence(tmp_path):
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    if "No module named 'setuptools'" in run.stderr + run.stdout:
        pytest.skip("setuptools is not installed, so no wheel can be built offline")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        size = sum(wheel.getinfo(name).file_size for name in names if "assets/" in name)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "LICENSE", "base/model.safetensors"):
        assert f"spar_hf/assets/spar-tiny/{name}" in names
    assert "spar_hf/py.typed" in names
    assert size <= 25 * 2**20
