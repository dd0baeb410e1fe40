"""Measurements that were cut off go on where they stopped, and stored reports are used again."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spar_hf.data.segmentation_sets import SegmentationSet
from spar_hf.evaluation import EvaluationOptions, evaluate_runs
from spar_hf.evaluation import command as script
from spar_hf.utils.errors import UsageError


def stop_at(monkeypatch, number):
    """Interrupt the next measurement at an image, which is read for the second time then; returns the numbers read."""
    seen, read = [], SegmentationSet.read

    def read_until_it_is_stopped(data, image):
        seen.append(image)
        if seen.count(number) == 2:  # it was checked before
            raise KeyboardInterrupt
        return read(data, image)

    monkeypatch.setattr(SegmentationSet, "read", read_until_it_is_stopped)
    return seen


def test_cut_off_measurement_goes_on_where_it_stopped(dataset, checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "report.json"
    command = ["--dataset", str(dataset), "--model", f"base={checkpoint('base')}", "--native", "--output", str(output)]
    command += ["--runs", "base:single", "base:sliding:32", "--save_seconds", "0"]
    whole = script.main(command)
    output.unlink()

    image = dataset / "images" / "image3.png"
    content, times = image.read_bytes(), (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    image.write_bytes(b"damaged")
    with pytest.raises(UsageError, match="Cannot read image3"):
        script.main(command)
    assert not list(tmp_path.glob("report.json*"))  # before any work, so that the command may leave it out
    image.write_bytes(content)
    os.utime(image, ns=times)

    seen = stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        script.main(command)
    assert not output.exists()
    with pytest.raises(UsageError, match=r"--native was true, is false.*--shortest_edge was null, is 64.*--output"):
        script.main([*[part for part in command if part != "--native"], "--shortest_edge", "64"])
    os.utime(image)
    with pytest.raises(UsageError, match="files of images was"):
        script.main(command)
    os.utime(image, ns=times)
    seen.clear()
    resumed = script.main(command)
    assert seen == [3, 4]
    for mine, expected in zip(resumed["runs"], whole["runs"], strict=True):
        np.testing.assert_equal(mine["classes"], expected["classes"])
        assert mine["mean_boundary_iou"] == expected["mean_boundary_iou"]
    assert resumed["images"] == 5
    assert not (tmp_path / "report.json.parts").exists()
    # finished: nothing is read, unless something else is asked for
    stored = evaluate_runs(EvaluationOptions.parse(command), reuse=True)
    assert stored["runs"][0]["mean_iou"] == whole["runs"][0]["mean_iou"]
    with pytest.raises(UsageError, match=r"--limit was null, is 2"):
        evaluate_runs(EvaluationOptions.parse([*command, "--limit", "2"]), reuse=True)
    Image.new("L", (90, 70)).save(dataset / "masks" / "image1.png")
    with pytest.raises(UsageError, match="files of images was"):
        evaluate_runs(EvaluationOptions.parse(command), reuse=True)


def test_stored_results_of_version_0_1_are_read(dataset, checkpoint, tmp_path, monkeypatch):
    """It called images photos, in settings and reports, and stored the precision as it was given."""
    output = tmp_path / "report.json"
    command = ["--dataset", str(dataset), "--model", f"base={checkpoint('base')}", "--native", "--output", str(output)]
    command += ["--no_warmup", "--save_seconds", "0"]
    script.main([*command, "--limit", "2"])
    two = json.loads(output.read_text())
    output.unlink()

    def as_before(settings):
        old = {"images": "photos", "files of images": "files of photos"}
        return {old.get(name, name): value for name, value in settings.items()} | {"--mixed_precision": "no"}

    settings, report = as_before(two["settings"]), two | {"photos": two["images"]}
    del report["images"]
    output.write_text(json.dumps(report | {"settings": settings}))
    stored = evaluate_runs(EvaluationOptions.parse([*command, "--limit", "2"]), reuse=True)
    assert stored["images"] == 2 and stored["runs"] == two["runs"]
    with pytest.raises(UsageError, match=r"--limit was 2, is null.*; images was"):
        evaluate_runs(EvaluationOptions.parse(command), reuse=True)
    output.unlink()

    seen = stop_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        script.main([*command, "--limit", "2"])
    file = Path(f"{output}.parts") / "settings.json"
    file.write_text(json.dumps(as_before(json.loads(file.read_text()))))
    seen.clear()
    resumed = script.main([*command, "--limit", "2"])
    assert seen == [1]
    assert [row["mean_iou"] for row in resumed["runs"]] == [row["mean_iou"] for row in two["runs"]]
