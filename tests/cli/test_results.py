"""Results that stay right: names of every kind, odd consoles, full disks, and settings that change between two runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from spar_hf.cli.main import app
from spar_hf.cli.result_record import RECORD, ResultRecord
from spar_hf.utils.image_files import InputImage, find_images

runner = CliRunner()


def run(command, *arguments, status=0):
    result = runner.invoke(app, [command, *map(str, arguments)], color=True)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output


def shell(*arguments, **environment):
    command = [sys.executable, "-m", "spar_hf.cli.main", *map(os.fspath, arguments)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment})


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.fixture
def images(tmp_path, picture):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b", "c"):
        picture.save(folder / f"{name}.png")
    return folder


SMALL = ["--shortest-edge", 32]
WORDS = ["--labels", "road; sky", "--templates", "plain", *SMALL]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--labels", "road; sky", "--threshold", 0.5, *SMALL, "--templates", "plain"], "threshold"),
        (["--labels", "road; sky", "--templates", "short", *SMALL], "templates"),
        (["--labels", "road; sky", "--templates", "plain", "--shortest-edge", 48], "size"),
        (["--labels", "road, street; sky", "--templates", "plain", *SMALL], "labels"),
        ([*WORDS, "--min-area", 0.2], "min_area"),
        ([*WORDS, "--refine", "pamr"], "refine"),
        ([*WORDS, "--background", "none"], "background"),
        ([*WORDS, "--keep-background", "--min-presence", 0.2], "keep_background"),
    ],
)
def test_skip_existing_refuses_results_of_other_settings(images, tmp_path, options, word):
    output = tmp_path / "out"
    run("segment", images, "--output", output, "--format", "json", *WORDS)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    text = run("segment", images, "--output", output, "--format", "json", *options, "--skip-existing", status=2)
    assert word in text and "omit --skip-existing" in " ".join(text.split())
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert "3 done" in run("segment", images, "--output", output, "--format", "json", *options)
    assert "3 skipped" in run("segment", images, "--output", output, "--format", "json", *options, "--skip-existing")


def test_skip_existing_refuses_results_of_another_model(images, tmp_path):
    from safetensors.torch import load_file, save_file

    from spar_hf import SPAR_TINY

    model = tmp_path / "model"
    shutil.copytree(SPAR_TINY, model)
    options = ["--output", tmp_path / "out", "--format", "json", *WORDS, "--model", model]
    run("segment", images, *options)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("fc1.weight"))
    weights[name][0, 0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "model" in run("segment", images, *options, "--skip-existing", status=2)


@pytest.mark.parametrize("part", ["templates", "presence"])
def test_skip_existing_refuses_results_of_what_a_file_said_before(images, tmp_path, part):
    """A file of templates with other prompts, and a checkpoint with other constants of presence."""
    from spar_hf import SPAR_TINY
    from spar_hf.model.templates import TemplateChoice

    model, choice = tmp_path / "model", tmp_path / "choice.json"
    shutil.copytree(SPAR_TINY, model)
    TemplateChoice(("{}",)).save(choice)
    words = ["--labels", "road; sky", "--templates", choice, *SMALL, "--min-presence", 0.1]
    options = [images, "--output", tmp_path / "out", "--format", "json", *words, "--model", model, "--skip-existing"]
    run("segment", *options)
    assert "3 skipped" in run("segment", *options)
    if part == "templates":
        TemplateChoice(("a drawing of a {}",)).save(choice)
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "presence_calibration": [0.4, -2.0]}))
    run("segment", *options, status=2)


def test_a_list_of_classes_of_the_users_own_is_kept(images, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    own = output / "classes.txt"
    own.write_text("road, street\nsky\n")
    options = ["--output", output, "--format", "map", "--labels", f"@{own}", "--templates", "plain", *SMALL]
    assert "classes.txt would be replaced" in " ".join(run("segment", images, *options, status=2).split())
    assert own.read_text() == "road, street\nsky\n" and sorted(output.iterdir()) == [own]
    own.rename(tmp_path / "words.txt")
    options[5] = f"@{tmp_path / 'words.txt'}"
    run("segment", images, *options)
    assert own.read_text() == "road\nsky\nbackground\n"
    run(
        "segment",
        images,
        "--output",
        output,
        "--format",
        "map",
        "--labels",
        "sky; tree",
        "--templates",
        "plain",
        *SMALL,
    )
    assert own.read_text() == "sky\ntree\nbackground\n"  # the list of an earlier run is replaced with its results


def test_results_of_a_mixed_folder_are_told_apart(images, tmp_path, picture):
    output = tmp_path / "out"
    options = ["--output", output, "--format", "json", *WORDS]
    run("segment", images, *options, "--threshold", 0.9)
    run("segment", images / "a.png", *options)  # only one is replaced
    assert "threshold" in run("segment", images, *options, "--skip-existing", status=2)
    run("segment", images, *options)
    Image.new("RGB", (70, 30)).save(images / "b.png")  # another image of the same name
    assert "1 done, 2 skipped" in run("segment", images, *options, "--skip-existing")
    assert json.loads((output / "b.json").read_text())["width"] == 70
    with (output / RECORD).open("a") as file:
        file.write('{"files": ["c.js')  # a run was killed here
    (output / "c.json").unlink()
    assert "1 done, 2 skipped" in run("segment", images, *options, "--skip-existing")
    assert "3 skipped" in run("segment", images, *options, "--skip-existing")


def test_the_coco_file_has_results_of_one_vocabulary(images, tmp_path):
    pytest.importorskip("pycocotools", reason="COCO's masks need pycocotools (extra coco)")
    output = tmp_path / "out"
    options = ["--output", output, "--format", "coco", "--background", "none", "--templates", "plain", *SMALL]
    run("segment", images, *options, "--labels", "road; sky; tree")
    (images / "b.png").write_text("no image")
    run("segment", images, *options, "--labels", "tree; road", status=1)
    merged = json.loads((output / "annotations.json").read_text())
    assert [Path(image["file_name"]).name for image in merged["images"]] == ["a.png", "c.png"]
    assert [category["name"] for category in merged["categories"]] == ["tree", "road"]
    text = " ".join(run("verify", output, "--finish", images, status=1).split())
    assert "other settings: b.coco.json: labels" in text and "not finished" in text
    (output / "b.coco.json").unlink()
    (images / "b.png").unlink()
    run("segment", images, *options, "--labels", "tree; road", "--skip-existing")
    assert len(json.loads((output / "annotations.json").read_text())["images"]) == 2


def test_the_latest_of_several_records_counts(tmp_path):
    """Processes record in files of their own, and the file that was changed last may hold an older entry."""
    result, image = tmp_path / "x.json", InputImage("http://a.com/x.jpg", "x")
    result.touch()
    ResultRecord(tmp_path, {"threshold": 0.5}, job="process-1").add(image, [result])
    ResultRecord(tmp_path, {"threshold": 0.3}, job="process-0").add(image, [result])
    other = InputImage("http://a.com/y.jpg", "y")
    ResultRecord(tmp_path, {"threshold": 0.3}, job="process-1").add(other, [tmp_path / "y.json"])
    assert ResultRecord(tmp_path, {"threshold": 0.3}).is_done(image, [result])


def test_a_folder_of_an_earlier_version_is_noted(images, tmp_path):
    output = tmp_path / "out"
    options = ["--output", output, "--format", "json", *WORDS]
    run("segment", images, *options)
    (output / RECORD).unlink()
    text = run("segment", images, *options, "--skip-existing")
    assert "3 skipped" in text and "no record" in text
    assert "no record" not in run("segment", images, *options, "--skip-existing")


def test_a_single_file_is_skipped_only_when_its_settings_are_known(images, tmp_path):
    options = ["--output", tmp_path / "a.json", "--format", "json", *WORDS]
    run("segment", images / "a.png", *options)
    assert not (tmp_path / RECORD).exists()
    assert "written" in run("segment", images / "a.png", *options, "--skip-existing")
    assert "1 skipped" in run("segment", images / "a.png", *options, "--skip-existing")
    run("segment", images / "a.png", *options, "--skip-existing", "--threshold", 0.5, status=2)


def test_results_of_another_url_are_not_kept(tmp_path):
    (tmp_path / "x.json").touch()
    ResultRecord(tmp_path, {}).add(InputImage("http://a.com/x.jpg", "x"), [tmp_path / "x.json"])
    again = ResultRecord(tmp_path, {})
    assert again.is_done(InputImage("http://a.com/x.jpg", "x"), [tmp_path / "x.json"])
    assert not again.is_done(InputImage("http://b.com/x.jpg", "x"), [tmp_path / "x.json"])
    assert not again.is_done(InputImage("http://a.com/x.jpg", "x", frame=3), [tmp_path / "x.json"])


def test_files_that_differ_in_their_suffix_have_results_of_their_own(tmp_path, picture):
    picture.save(tmp_path / "a.jpg")
    picture.save(tmp_path / "a.bmp")
    output = tmp_path / "out"
    run("segment", tmp_path / "a.*", "--output", output, "--format", "overlay,map,json", *WORDS)
    assert len(list(output.glob("a.*"))) == 6


@pytest.mark.parametrize("name", ["n" * 235, "街" * 78])
@pytest.mark.parametrize("command", ["segment", "features"])
def test_long_names(tmp_path, picture, name, command):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    picture.save(folder / f"{name}.png")
    picture.save(folder / "other.png")
    options = ["--format", "overlay,map,json", *WORDS] if command == "segment" else SMALL
    assert "2 done" in run(command, folder, "--output", output, *options)
    suffix = ".json" if command == "segment" else ".safetensors"
    assert (output / f"{name}{suffix}").is_file()
    assert not [path for path in output.iterdir() if "partial" in path.name]


def test_names_that_are_no_utf_8(tmp_path, picture):
    folder, output = os.fsencode(tmp_path) + b"/in", tmp_path / "out"
    os.mkdir(folder)
    for name in (b"caf\xe9.png", b"b.png"):
        with open(folder + b"/" + name, "wb") as file:
            picture.save(file, "PNG")
    with open(folder + b"/d\xe9.jpg", "wb") as file:
        file.write(b"no image")
    inputs = os.fsdecode(folder)
    text = run("segment", inputs, "--output", output, "--format", "overlay,map,json", *WORDS, status=1)
    assert "2 done, 1 failed" in text and "d\\udce9" in text
    (listed,) = [path for path in output.glob("caf*.json")]
    assert os.path.samefile(json.loads(listed.read_text())["image"], folder + b"/caf\xe9.png")
    for shards in ([], ["--shard-size", "1"]):
        target = tmp_path / f"features{len(shards)}"
        arguments = ["features", inputs, "--output", target, "--shortest-edge", 32, *shards]
        assert "2 done, 1 failed" in run(*arguments, status=1)
        assert "2 skipped" in run(*arguments, "--skip-existing", status=1)
    with safe_open(target / "features-000-00000.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["b", "caf\\udce9"]


@pytest.mark.slow
def test_a_console_without_the_letters_of_a_label_fails_nothing(images, tmp_path):
    output = tmp_path / "o.json"
    labels = "道路 road; \u200bsky 🐶; \x1b[31mhouse"
    options = ["--labels", labels, "--output", output, "--format", "json", "--templates", "plain"]
    done = shell("segment", images / "a.png", *options, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and b"written:" in done.stdout, done.stderr
    assert b"\x1b[31mhouse" not in done.stdout + done.stderr and output.is_file()


def test_escape_codes_never_reach_the_terminal(images, tmp_path):
    red, output = "\x1b[41mroad\x07", tmp_path / "o.json"
    for labels, status in ((f"{red}; sky", 0), (red, 0), (f"{red}; {red}", 2), (f"{red}!; {red}?", 2)):
        options = ["--output", output, "--format", "json", "--templates", "plain", *SMALL]
        text = run("segment", images / "a.png", "--labels", labels, *options, status=status)
        assert "\x1b[41m" not in text and "\x07" not in text
    shutil.copy(images / "a.png", images / "\x1b[41m.png")
    (images / "\x1b[42m.jpg").write_text("no image")
    assert "\x1b[4" not in run("features", images, "--output", tmp_path / "out", *SMALL, status=1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_word(images, tmp_path, encoding):
    words, output = tmp_path / "words.txt", tmp_path / "out"
    words.write_text("road\nsky\n", encoding=encoding)
    options = ["--labels", f"@{words}", "--output", output, "--format", "json", "--templates", "plain", *SMALL]
    run("segment", images, *options)
    assert json.loads((output / "a.json").read_text())["labels"] == ["road", "sky", "background"]
    (output / "classes.txt").write_text("road\nsky\nbackground\n", encoding=encoding)
    assert "3 skipped" in run("segment", images, *options, "--skip-existing")


@pytest.mark.parametrize("command", ["segment", "features"])
@pytest.mark.parametrize("pattern", ["{0}/*/../../other/*.png", "{0}/sub/../../*/x.png", "{0}/../*/x.png"])
def test_a_pattern_with_dots_writes_into_the_output_only(tmp_path, picture, command, pattern):
    base, output = tmp_path / "in", tmp_path / "deep" / "out"
    for folder in (base / "sub", tmp_path / "other"):
        folder.mkdir(parents=True)
        picture.save(folder / "x.png")
    before = {path for path in tmp_path.rglob("*")}
    options = ["--format", "json", *WORDS] if command == "segment" else SMALL
    run(command, pattern.format(base), "--output", output, *options)
    new = {path for path in tmp_path.rglob("*")} - before - {output.parent, output}
    assert new and all(path.is_relative_to(output) for path in new)
    images, _ = find_images([pattern.format(base)])
    assert all(".." not in Path(image.name).parts for image in images)


def test_a_full_disk_stops_features_with_one_line(tmp_path, images):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        for shards in ([], ["--shard-size", "0.01"], ["--shard-size", "1000"]):
            text = run("features", images, "--output", disk / "out", "--shortest-edge", 64, *shards, status=1)
            assert text.count("error:") == 1 and "No space left" in text
            assert not list(disk.rglob("*partial*"))
            shutil.rmtree(disk / "out", ignore_errors=True)  # an empty folder is removed
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("shards", [[], ["--shard-size", "1000"], ["--shard-size", "0.01"]])
def test_a_disk_that_is_full_for_the_writer_stops_features(tmp_path, images, monkeypatch, shards):
    from safetensors import SafetensorError

    from spar_hf.batch import features

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(features, "save_file", full)
    text = run("features", images, "--output", tmp_path / "out", *SMALL, *shards, status=1)
    assert text.count("error:") == 1 and "No space left" in text


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_features_held_for_a_shard_are_written_when_a_signal_stops_the_run(tmp_path, picture, number, status):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(30):
        picture.save(folder / f"{i:02}.png")
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with Ctrl-C ignored
from spar_hf.batch.extractor import FeatureExtractor
compute = FeatureExtractor.encode
def counted(self, images):
    if any(image.record["image"].endswith("12.png") for image in images):
        os.kill(os.getpid(), {int(number)})
        os.kill(os.getpid(), {int(number)})  # a launcher hands the signal on
    return compute(self, images)
FeatureExtractor.encode = counted
from spar_hf.cli.main import main
sys.argv[1:] = ["features", {str(folder)!r}, "--output", {str(output)!r}, "--shard-size", "1000", "--shortest-edge", "32"]
sys.argv += ["--batch-size", "4"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status and "12 done" in done.stdout, done.stderr
    index = json.loads((output / "features.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == [f"{i:02}" for i in range(12)]
    rest = run("features", folder, "--output", output, "--shard-size", 1000, *SMALL, "--skip-existing")
    assert "18 done, 12 skipped" in rest


def test_results_of_an_earlier_run_are_no_images(images, tmp_path, caplog):
    """Masks that were written into the folder of the photos; named themselves they are images."""
    segment = ("segment", images, *WORDS, "--format", "overlay,map,heatmap")
    run(*segment, "--output", images / "masks")
    (images / "masks" / "photo").mkdir()
    shutil.copy(images / "a.png", images / "masks" / "photo" / "new.png")  # not a result, wherever it lies
    for output in (images / "masks2", tmp_path / "far"):
        assert "4 done" in run(*segment, "--output", output)
    found = {Path(image.source).name for image in find_images([str(images)])[0]}
    assert found == {"a.png", "b.png", "c.png", "new.png"}
    assert f"{images}: passed over" in caplog.text and "results of spar-hf segment" in caplog.text
    assert len(find_images([str(images / "**" / "*.png")])[0]) == 4
    assert len(find_images([str(images / "*" / "*.map.png")])[1]) == 1  # nothing but results
    for named in (images / "masks", images / "masks" / "*.map.png", images / "masks" / "a.map.png"):
        found, problems = find_images([str(named)])
        assert not problems and any(image.source.endswith("a.map.png") for image in found)


@pytest.mark.parametrize("options", [["--format", "map"], ["--format", "overlay"]])
def test_maps_of_other_classes_are_not_left_under_a_new_list(images, tmp_path, options):
    output = tmp_path / "out"
    run("segment", images, "--output", output, *WORDS, "--format", "map")
    before = (output / "classes.txt").read_text()
    other = ["--labels", "cat; dog", "--templates", "plain", *SMALL, "--output", output]
    text = run("segment", images / "a.png", *other, *options, status=2)
    left = "a.map.png and 2 more" if options[1] == "overlay" else "b.map.png and 1 more"
    assert left in text.replace("\n", "") and (output / "classes.txt").read_text() == before
    run("segment", images, *other, "--format", "map")  # all are replaced
    assert (output / "classes.txt").read_text().split()[:2] == ["cat", "dog"]


def test_the_merged_coco_file_replaces_no_result(images, tmp_path, picture):
    picture.save(images / "annotations.png")
    text = run("segment", images, "--output", tmp_path / "out", *WORDS, "--format", "json,coco", status=2)
    assert "the COCO file of all images" in " ".join(text.split())
    run("segment", images, "--output", tmp_path / "out", *WORDS, "--format", "json")


def test_the_named_file_is_always_written(images, tmp_path):
    for number, (formats, name) in enumerate(
        [("map,json", "c.png"), ("map,json", "c.json"), ("overlay,coco", "c.json")]
    ):
        output = tmp_path / str(number) / name
        run("segment", images / "a.png", *WORDS, "--format", formats, "--output", output)
        assert output.is_file() and len(list(output.parent.iterdir())) == 2
    given = ("segment", images / "a.png", *WORDS, "--format", "overlay,map", "--map", tmp_path / "m.png")
    assert "Leave one out" in run(*given, "--output", tmp_path / "o.png", status=2)
