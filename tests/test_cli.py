"""The command line as people type it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from spar_hf.cli import app

runner = CliRunner()


def test_help_is_immediate_and_imports_no_torch():
    code = """
import sys
sys.argv = ["spar-hf", "segment", "--help"]
from spar_hf.cli import main
try:
    main()
except SystemExit as stop:
    print(stop.code, "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--labels" in run.stdout and run.stdout.split()[-2:] == ["0", "False"]


def test_the_installed_command_segments(tmp_path):
    photo, output = tmp_path / "street.png", tmp_path / "out.png"
    Image.new("RGB", (90, 70), "gray").save(photo)
    command = [Path(sys.executable).parent / "spar-hf", "segment", photo, "--labels", "road; sky", "--output", output]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    assert output.is_file()


def test_segment_writes_overlay_and_map(tmp_path):
    photo = tmp_path / "street.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(photo)
    output, map_output = tmp_path / "out" / "street.png", tmp_path / "map.png"
    labels = "road; car, automobile; sky"
    arguments = ["segment", str(photo), "--labels", labels, "--output", str(output), "--map", str(map_output)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "written" in result.output and "car" in result.output
    assert Image.open(output).width == 90
    label_map = np.asarray(Image.open(map_output))
    assert label_map.shape == (70, 90) and label_map.max() <= 2
    assert not list(tmp_path.rglob("*.partial*"))


def test_bad_input_is_one_line_and_exit_status_1(tmp_path):
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    for photo, labels, message in (
        (empty, "sky", "empty (0 bytes)"),
        (tmp_path / "missing.jpg", "sky", "neither a file nor a URL"),
        (empty, " ; ", "at least one class"),
    ):
        arguments = ["segment", str(photo), "--labels", labels, "--output", str(tmp_path / "o.png")]
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1
        assert message in result.output and "Traceback" not in result.output
