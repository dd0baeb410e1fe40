"""The commands: results, messages and exit status."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from spar_hf.cli.main import app

runner = CliRunner()
LABELS = "road; car, automobile; sky"


def run(*arguments, status=0):
    result = runner.invoke(app, ["segment", *map(str, arguments)])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def images(tmp_path):
    """A folder with a sub-folder, two images of the same stem, an empty file, a truncated image and a text file."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("street.png", (70, 90)), ("street.jpg", (61, 50)), ("sub/street.png", (40, 83))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "empty.jpg").touch()
    (folder / "cut.png").write_bytes((folder / "street.png").read_bytes()[:900])
    (folder / "text.jpg").write_text("no image")
    return folder


def test_help_imports_neither_torch_nor_transformers():
    code = """
import sys
sys.argv = ["spar-hf"]
from spar_hf.cli.main import main
for command in ([], ["segment"], ["features"], ["app"], ["convert"], ["bake"]):
    sys.argv[1:] = [*command, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 0
print("torch" in sys.modules or "transformers" in sys.modules)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--labels" in process.stdout and "--stride" in process.stdout
    assert process.stdout.split()[-1] == "False"


def test_the_installed_command_segments(tmp_path):
    image, output = tmp_path / "street.png", tmp_path / "out.png"
    Image.new("RGB", (90, 70), "gray").save(image)
    command = [Path(sys.executable).parent / "spar-hf", "segment", image, "--labels", "road; sky", "--output", output]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert output.is_file()


def test_segment_writes_overlay_and_map(images, tmp_path):
    output, map_output = tmp_path / "out" / "street.png", tmp_path / "map.png"
    text = run(images / "street.png", "--labels", LABELS, "--output", output, "--map", map_output)
    assert "written" in text and "car" in text
    assert Image.open(output).width == 90
    label_map = np.asarray(Image.open(map_output))
    assert label_map.shape == (70, 90) and label_map.max() <= 2
    assert not list(tmp_path.rglob("*.partial*"))


def test_segment_lists_the_classes_that_have_pixels_and_counts_the_others(images, tmp_path):
    labels = "; ".join(f"thing {i}" for i in range(40))
    map_output = tmp_path / "map.png"
    options = ["--labels", labels, "--templates", "plain", "--output", tmp_path / "o.png", "--map", map_output]
    text = run(images / "street.png", *options)
    found = {f"thing {i}" for i in np.unique(np.asarray(Image.open(map_output))).tolist()}
    assert 0 < len(found) < 40
    assert {line.split("  ")[0] for line in text.splitlines() if "of the image" in line} == found
    assert f"{40 - len(found)} of 40 classes not found" in text


def test_a_folder_gives_every_format_and_bad_files_stop_no_other(images, tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="COCO's masks need pycocotools (extra coco)")
    output = tmp_path / "out"
    text = run(images, "--labels", LABELS, "--output", output, "--format", "overlay,map,coco,json", status=1)
    assert "3 done, 3 failed" in text
    for message in ("empty (0 bytes)", "Cannot decode", "no image that Pillow can read"):
        assert message in text
    assert "the file is damaged" in text and "closed" not in text
    assert (output / "classes.txt").read_text() == "road\ncar\nsky\n"
    merged = coco.COCO(output / "annotations.json")
    assert [c["name"] for c in merged.loadCats(merged.getCatIds())] == ["road", "car", "sky"]
    by_file = {image["file_name"]: image["id"] for image in merged.loadImgs(merged.getImgIds())}
    assert len(by_file) == 3

    segment = pipeline("open-vocab-segmentation")
    for source, name in (("street.png", "street.png"), ("street.jpg", "street.jpg"), ("sub/street.png", "sub/street")):
        plain = segment(str(images / source), candidate_labels=["road", "car, automobile", "sky"])
        label_map = np.asarray(Image.open(output / f"{name}.map.png"))
        listed = json.loads((output / f"{name}.json").read_text())
        overlay = Image.open(output / f"{name}.png")
        assert (overlay.width, listed["height"], listed["width"]) == (label_map.shape[1], *label_map.shape)
        assert [s["label"] for s in listed["segments"]] == [s["label"] for s in plain]
        annotations = merged.loadAnns(merged.getAnnIds(by_file[str(images / source)]))
        for entry, expected, annotation in zip(listed["segments"], plain, annotations, strict=True):
            mask = np.asarray(expected["mask"]) == 255
            index = ["road", "car", "sky"].index(entry["label"])
            assert (mask == (label_map == index)).all() and (merged.annToMask(annotation) == mask).all()
            assert entry["score"] == pytest.approx(expected["score"], abs=1e-5)
            assert entry["share"] == pytest.approx(mask.mean())
            left, top, right, bottom = Image.fromarray(mask).getbbox()
            assert entry["bbox"] == annotation["bbox"] == [left, top, right - left, bottom - top]
            assert annotation["category_id"] == index + 1 and annotation["area"] == mask.sum()


def test_skip_existing_continues_a_run_and_refuses_other_classes(images, tmp_path):
    output = tmp_path / "out"
    options = ["--labels", LABELS, "--output", output, "--format", "map,json"]
    run(images / "*.png", images / "street.jpg", *options, status=1)
    kept, lost = output / "street.png.map.png", output / "street.jpg.map.png"
    time = kept.stat().st_mtime_ns
    lost.unlink()
    text = run(images / "*.png", images / "street.jpg", *options, "--skip-existing", status=1)
    assert "1 done, 1 skipped (already written), 1 failed" in text
    assert lost.is_file() and kept.stat().st_mtime_ns == time
    others = ["--labels", "dog; cat", "--output", output, "--format", "map,json", "--skip-existing"]
    assert "results for other classes" in run(images / "*.png", images / "street.jpg", *others, status=2)


def test_labels_from_a_file_and_a_background_for_unsure_pixels(images, tmp_path):
    labels, output = tmp_path / "classes.txt", tmp_path / "street.json"
    labels.write_text("# streets\nroad\ncar, automobile\n\nsky\n", encoding="utf-8")
    options = ["--labels", f"@{labels}", "--output", output, "--format", "json"]
    run(images / "street.png", *options)
    assert json.loads(output.read_text())["labels"] == ["road", "car", "sky"]
    run(images / "street.png", *options, "--threshold", 1, "--background", "other")
    listed = json.loads(output.read_text())
    assert listed["labels"] == ["road", "car", "sky", "other"]
    assert [(s["label"], s["share"], s["bbox"]) for s in listed["segments"]] == [("other", 1.0, [0, 0, 90, 70])]


@pytest.mark.parametrize(("classes", "mode"), [(2, "L"), (257, "I;16")])
def test_label_maps_have_as_many_bits_as_the_classes_need(classes, mode, tmp_path):
    from spar_hf.cli.result_files import write_results

    label_map = np.zeros((6, 5), np.int32)
    label_map[2:] = classes - 1
    result = {"map": label_map, "labels": [str(i) for i in range(classes)], "scores": [0.5] * classes}
    write_results(Image.new("RGB", (5, 6)), result, {"map": tmp_path / "map.png"}, "image")
    written = Image.open(tmp_path / "map.png")
    assert written.mode == mode and (np.asarray(written) == label_map).all()


def test_without_pycocotools_the_error_names_the_extra_before_any_work(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    text = run(images, "--labels", LABELS, "--output", tmp_path / "out", "--format", "coco", status=2)
    assert "pip install 'spar-hf[coco]'" in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("image", "message"),
    [("empty.jpg", "empty (0 bytes)"), ("missing.jpg", "neither a file"), ("*.gif", "No image")],
)
def test_a_bad_image_gives_one_line_and_exit_status_1(images, tmp_path, image, message):
    text = run(images / image, "--labels", "sky", "--output", tmp_path / "o.png", status=1)
    assert message in text and text.count("error:") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--labels": " ; "}, "at least one class"),
        ({"--labels": "sky; Sky"}, "stand twice"),
        ({"--labels": "@nowhere.txt"}, "nowhere.txt"),
        ({"--format": "overlay,svg"}, "overlay, map, coco, json"),
        ({"--output": "out.gif"}, "must end in .png"),
        ({"--output": "out.jpg", "--format": "map"}, "must end in .png"),
        ({"--map": "map.jpg"}, "must end in .png"),
        ({"--templates": "nonsense"}, "template set"),
        ({"--threshold": "0.5", "--labels": "sky " * 60}, "tokens"),
        ({"--device": "nonsense"}, "is not available; there is cpu"),
    ],
)
def test_wrong_usage_gives_one_line_and_exit_status_2(images, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    given = {"--labels": LABELS, "--output": "out.png", **options}
    text = run(images / "street.png", *(part for item in given.items() for part in item), status=2)
    assert message in text and text.count("error:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_several_images_need_an_output_folder_other_than_the_input(images, tmp_path):
    def refuse(message, *options):
        assert message in run(images, "--labels", LABELS, *options, status=2)

    refuse("folder", "--output", tmp_path / "out.png")
    refuse("both input and output", "--output", images)
    refuse("one image", "--output", tmp_path / "out", "--map", tmp_path / "map.png")


def test_a_vision_only_folder_and_a_missing_folder_are_reported(images, tmp_path, vision_model):
    vision_model.save_pretrained(tmp_path / "vision")
    options = [images / "street.png", "--labels", LABELS, "--output", tmp_path / "o.png", "--model"]
    assert "has no text tower" in run(*options, tmp_path / "vision", status=2)
    for model, message in (("nowhere", "is neither a local folder"), ("vision/config.json", "is a file")):
        text = run(*options, tmp_path / model, status=1)
        assert f"{tmp_path / model} {message}" in text and text.count("\n") == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [("road, sky, tree", '"road; sky"'), ("ade20", "Did you mean the built-in ade20k?"), ("sky; tree", None)],
)
def test_a_hint_for_a_single_class(images, tmp_path, labels, message):
    text = run(images / "street.png", "--labels", labels, "--templates", "plain", "--output", tmp_path / "o.png")
    assert message in text if message else "note:" not in text
