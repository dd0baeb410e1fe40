"""The study of peak memory: features of earlier tiles stand in for later ones, and the whole image is decided."""

import importlib.util
import sys

import pytest
from launching import TRAINING

from spar_hf.utils.errors import UsageError


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("huge_memory", TRAINING / "studies/huge_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
def test_all_pixels_are_decided_with_few_runs_of_the_tower(study, monkeypatch, tmp_path, capsys):
    runs = []
    spare = study.spare_the_tower

    def watched(segment, tiles):
        encode = segment._encode
        segment._encode = lambda items: runs.append(len(items)) or encode(items)
        spare(segment, tiles)

    monkeypatch.setattr(study, "spare_the_tower", watched)
    sizes = ["--side", "320", "--tile", "96", "--overlap", "32", "--tower_tiles", "2"]
    report = study.main([*sizes, "--output", str(tmp_path / "memory.json")])
    assert report["pixels"] == 320 * 320 and runs == [1, 1]
    assert 0 < report["before_mib"] <= report["peak_mib"] and "MiB at the peak" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--overwrite"):
        study.main([*sizes, "--output", str(tmp_path / "memory.json")])
