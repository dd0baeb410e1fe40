"""The commands: results, messages and exit status."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline
from transformers.utils import logging
from typer.testing import CliRunner

import spar_hf
from spar_hf.cli import pipelines
from spar_hf.cli.main import app
from spar_hf.cli.segment import show_classes
from spar_hf.model import prompts
from spar_hf.utils.image_files import InputImage

runner = CliRunner()
LABELS = "road; car, automobile; sky"


def run(*arguments, status=0):
    few_prompts = [] if "--templates" in arguments else ["--templates", "plain"]
    result = runner.invoke(app, ["segment", *map(str, arguments), *few_prompts])
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
    command += ["--templates", "plain"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert output.is_file()


def test_words_that_take_long_to_embed_are_counted_and_nothing_else_is(images, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "PROGRESS_AFTER", 0)
    logging.enable_progress_bar()  # another command run before in this process has switched bars off
    text = run(images / "street.png", "--labels", "zeppelin hangar; car", "--output", tmp_path / "out.png")
    assert "embedding names" in text and "Loading weights" not in text


def test_segment_writes_overlay_and_map(images, tmp_path):
    output, map_output = tmp_path / "out" / "street.png", tmp_path / "map.png"
    text = run(images / "street.png", "--labels", "sand; car", "--output", output, "--map", map_output)
    assert "written" in text and "sand" in text  # which noise looks like
    assert Image.open(output).width == 90
    label_map = np.asarray(Image.open(map_output))
    assert label_map.shape == (70, 90) and label_map.max() <= 2
    assert not list(tmp_path.rglob("*.partial*"))


def test_segment_lists_the_classes_that_have_pixels_and_counts_the_others(images, tmp_path):
    labels = "; ".join(f"thing {i}" for i in range(40))
    map_output = tmp_path / "map.png"
    options = ["--labels", labels, "--templates", "plain", "--output", tmp_path / "o.png", "--map", map_output]
    text = run(images / "street.png", *options, "--background", "none")
    found = {f"thing {i}" for i in np.unique(np.asarray(Image.open(map_output))).tolist()}
    assert 0 < len(found) < 40
    assert {line.split("  ")[0] for line in text.splitlines() if "of the image" in line} == found
    assert f"{40 - len(found)} of 40 classes not found" in text
    text = run(images / "street.png", *options)  # noise looks like sand
    assert "background" in text and np.asarray(Image.open(map_output)).max() == 40


def test_the_background_is_listed_last(capsys):
    show_classes({"map": np.array([[1, 0, 2]]), "labels": ["a", "rest", "b"], "scores": [0.5] * 3, "background": 1})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["a", "b", "rest"]


def test_a_folder_gives_every_format_and_bad_files_stop_no_other(images, tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="COCO's masks need pycocotools (extra coco)")
    output = tmp_path / "out"
    text = run(
        images,
        "--labels",
        "sand; flower, blossom; sky",
        "--output",
        output,
        "--format",
        "overlay,map,coco,json",
        status=1,
    )
    assert "3 done, 3 failed" in text
    for message in ("empty (0 bytes)", "Cannot decode", "no image that Pillow can read"):
        assert message in text
    assert "the file is damaged" in text and "closed" not in text
    assert (output / "classes.txt").read_text() == "sand\nflower\nsky\nbackground\n"
    merged = coco.COCO(output / "annotations.json")
    assert [c["name"] for c in merged.loadCats(merged.getCatIds())] == ["sand", "flower", "sky", "background"]
    by_file = {image["file_name"]: image["id"] for image in merged.loadImgs(merged.getImgIds())}
    assert len(by_file) == 3

    segment = pipeline("open-vocab-segmentation")
    words = {"candidate_labels": ["sand", "flower, blossom", "sky"], "templates": "plain", "background": "auto"}
    for source, name in (("street.png", "street.png"), ("street.jpg", "street.jpg"), ("sub/street.png", "sub/street")):
        plain = segment(str(images / source), **words)
        label_map = np.asarray(Image.open(output / f"{name}.map.png"))
        listed = json.loads((output / f"{name}.json").read_text())
        assert 3 in label_map and plain  # the background is in the map only
        overlay = Image.open(output / f"{name}.png")
        assert (overlay.width, listed["height"], listed["width"]) == (label_map.shape[1], *label_map.shape)
        assert [s["label"] for s in listed["segments"]] == [s["label"] for s in plain]
        annotations = merged.loadAnns(merged.getAnnIds(by_file[str(images / source)]))
        for entry, expected, annotation in zip(listed["segments"], plain, annotations, strict=True):
            mask = np.asarray(expected["mask"]) == 255
            index = ["sand", "flower", "sky"].index(entry["label"])
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
    run(images / "street.png", *options, "--background", "none")
    assert json.loads(output.read_text())["labels"] == ["road", "car", "sky"]
    output.unlink()
    assert "No pixel gets the background" in run(images / "street.png", *options, "--background", "sea, wall", status=2)
    assert not output.exists()
    run(images / "street.png", *options, "--background", "Sky")  # one of the classes
    run(images / "street.png", *options, "--threshold", 1, "--background", "other")
    listed = json.loads(output.read_text())
    assert listed["labels"] == ["road", "car", "sky", "other"] and listed["segments"] == []
    run(images / "street.png", *options, "--threshold", 1, "--background", "other", "--keep-background")
    listed = json.loads(output.read_text())
    assert [(s["label"], s["share"], s["bbox"]) for s in listed["segments"]] == [("other", 1.0, [0, 0, 90, 70])]


def test_presence_is_reported_when_asked_for(images, tmp_path):
    output = tmp_path / "street.json"
    options = ["--labels", "road; sky", "--output", output, "--format", "json"]
    text = run(images / "street.png", *options)
    assert ", presence" not in text and "presence" not in json.loads(output.read_text())
    text = run(images / "street.png", *options, "--presence")
    presence = json.loads(output.read_text())["presence"]
    assert set(presence) == {"road", "sky"} and all(0 <= value <= 1 for value in presence.values())
    assert all(f"presence {value:.2f}" in text for value in presence.values())
    text = run(images / "street.png", *options, "--min-presence", 1)
    assert "2 of 2 classes not found: road (presence" in text and json.loads(output.read_text())["segments"] == []


@pytest.mark.parametrize("output", ["maps", "maps.tar"])
def test_features_say_that_they_are_of_the_first_frame(tmp_path, output):
    frames = [Image.new("RGB", (48, 32), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "clip.tif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "single.png")
    for name, several in (("single.png", False), ("clip.tif", True)):
        options = ["--shortest-edge", 32, "--output", tmp_path / name[:4] / output]
        result = runner.invoke(app, ["features", str(tmp_path / name), *map(str, options)])
        assert result.exit_code == 0 and "1 done" in result.output, result.output
        assert ("clip.tif has several frames or pages" in result.output) == several


def test_frames_are_segmented_one_by_one(tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    rng = np.random.default_rng(0)
    frames = [
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((48, 32), Image.Resampling.NEAREST)
        for _ in range(3)
    ]
    for suffix in ("gif", "png", "tif"):
        frames[0].save(folder / f"clip.{suffix}", save_all=True, append_images=frames[1:])
    frames[2].save(tmp_path / "last.png")
    options = ["--labels", "road; sky", "--format", "map,json", "--shortest-edge", 32, "--background", "none"]
    text = run(folder, *options, "--output", output)
    assert "3 done" in text and "has several frames or pages; the first was taken" in text
    assert (output / "clip.gif.json").is_file()
    text = run(folder / "clip.png", *options, "--output", output, "--frames", "::2")
    assert "2 done" in text and "several frames" not in text
    assert json.loads((output / "clip-0002.json").read_text())["frame"] == 2
    run(tmp_path / "last.png", *options, "--output", output, "--frames", "all")  # a single frame keeps its name
    maps = [np.asarray(Image.open(output / f"{name}.map.png")) for name in ("clip-0000", "clip-0002", "last")]
    assert np.array_equal(maps[1], maps[2]) and not np.array_equal(maps[0], maps[1])
    one = ["--labels", "road; sky", "--format", "json", "--output", tmp_path / "one.json", "--frames"]
    run(folder / "clip.tif", *one, -1)
    assert json.loads((tmp_path / "one.json").read_text())["frame"] == 2
    assert "has 3 frames" in run(folder / "clip.tif", *one, 3, status=1)
    assert "FIRST:END" in run(folder / "clip.tif", *one, "1-2", status=2)


def test_heat_maps_of_the_classes_found_and_of_those_named(images, tmp_path):
    output = tmp_path / "out"
    options = ["--labels", "road; car; dog/cat", "--output", output]
    run(images / "street.png", *options, "--format", "map,heatmap", "--background", "none")
    label_map = np.asarray(Image.open(output / "street.map.png"))
    pictures = sorted(path.name for path in (output / "street.heatmaps").iterdir())
    names = ["000_road.png", "001_car.png", "002_dog_cat.png"]
    assert pictures == [names[i] for i in np.unique(label_map)]
    run(images / "street.png", *options, "--heatmap", "dog/cat", "--heatmap", "background")
    pictures = sorted((output / "street.heatmaps").iterdir())
    assert [path.name for path in pictures] == ["002_dog_cat.png", "003_background.png"]
    assert Image.open(pictures[0]).width == 90
    assert "'cow'" in run(images / "street.png", *options, "--heatmap", "cow", status=2)
    alone = ["--labels", LABELS, "--output", tmp_path / "o.png", "--format", "heatmap"]
    assert "must be a folder" in run(images / "street.png", *alone, status=2)


def test_heat_maps_of_many_classes_stay_small_and_look_the_same(monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((640, 480))
    pipe, words = pipelines.load_pipeline(), ["sand", "flower", "car"]
    options = {"heat": True, "templates": "plain", "size": {"shortest_edge": 96}}
    full = pipelines.segment_with_heat(pipe, image, words, **options)
    assert full["heat"].shape == (3, 480, 640)
    assert (full["heat"].argmax(0) == full["map"]).mean() > 0.98  # but for levels that are rounded alike
    for heat_bytes, shape in ((4 * 3 * 48 * 64, (3, 48, 64)), (1, (3, 6, 8))):  # never below the 6 × 8 patches
        monkeypatch.setattr(pipelines, "HEAT_BYTES", heat_bytes)
        small = pipelines.segment_with_heat(pipe, image, words, **options)["heat"]
        assert small.shape == shape
    large = np.stack(
        [np.asarray(Image.fromarray(part).resize((640, 480), Image.Resampling.BILINEAR)) for part in small]
    )
    assert np.abs(large.astype(int) - full["heat"]).mean() < 13  # of 255


@pytest.mark.parametrize("refine", [None, "pamr"])
def test_a_class_that_min_presence_drops_has_no_heat(monkeypatch, refine):
    """The map is as if it had not been listed, and so are the heat maps of the others."""
    stated = {"sand": 0.9, "flower": 0.2, "car": 0.6}
    monkeypatch.setattr(
        "spar_hf.model.pipeline.class_presence",
        lambda cache, features, words: [stated[label] for label in words.labels],
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    pipe, options = pipelines.load_pipeline(), {"heat": True, "templates": "plain", "refine": refine}
    found = pipelines.segment_with_heat(pipe, image, [*stated], min_presence=0.5, **options)
    fewer = pipelines.segment_with_heat(pipe, image, ["sand", "car"], **options)
    assert not found["heat"][1].any() and np.array_equal(found["heat"][[0, 2]], fewer["heat"])
    timed = pipelines.segment_timed(pipe, image, [*stated], min_presence=0.5, **options)  # as the page does
    assert np.array_equal(timed["heat"], found["heat"])
    nothing = pipelines.segment_with_heat(pipe, image, [*stated], min_presence=0.95, **options)
    assert nothing["heat"].shape == (3, 48, 64) and not nothing["heat"].any()


@pytest.mark.parametrize(("classes", "mode"), [(2, "P"), (256, "P"), (257, "I;16")])
def test_label_maps_are_class_numbers_with_the_colours_of_the_legend(classes, mode, tmp_path):
    from spar_hf.cli.overlays import palette
    from spar_hf.cli.result_files import write_results
    from spar_hf.data.segmentation_sets import SegmentationSet, from_files, make_table

    path = tmp_path / "map.png"
    label_map = np.zeros((6, 5), np.int32)
    label_map[2:] = classes - 1
    result = {"map": label_map, "labels": [str(i) for i in range(classes)], "scores": [0.5] * classes, "background": 0}
    write_results(Image.new("RGB", (5, 6)), result, {"map": path}, InputImage("image", "image"))
    written = Image.open(path)
    assert written.mode == mode and (np.array(written) == label_map).all()
    if mode == "P":
        colours = np.array(written.convert("RGB"))
        assert (colours == palette(classes, background=0)[label_map]).all() and len(set(colours[0, 0])) == 1
        assert path.read_bytes()[24:26] == bytes([8, 3])  # 8 bits, palette
        ignored = () if classes == 256 else (255,)
        table = make_table(range(classes), ignored)
        data = SegmentationSet("maps", from_files([path], [path]), ("map",), tuple(result["labels"]), table, "maps")
        assert (data.read_mask(0) == label_map).all()


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
        ({"--map": "./out.png"}, "--map out.png names the file of the overlay of --output"),
        (
            {"--map": "out/street.png", "--output": "out"},
            "--map out/street.png names the file of the overlay of --output",
        ),
        ({"--background": "none", "--keep-background": ""}, "leave out --keep-background"),
        ({"--templates": "nonsense"}, "template set"),
        ({"--threshold": "0.5", "--labels": "sky " * 60}, "tokens"),
        ({"--device": "nonsense"}, "is not available; there is cpu"),
    ],
)
def test_wrong_usage_gives_one_line_and_exit_status_2(images, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    given = {"--labels": LABELS, "--output": "out.png", **options}
    text = run(images / "street.png", *(part for item in given.items() for part in item if part), status=2)
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
    [
        ("road, sky, tree", '"road; sky"'),
        ("ade20", "Did you mean the built-in ade20k?"),
        ("car", None),  # looked for among stuff words
        ("sky; tree", None),
    ],
)
def test_a_hint_for_a_single_class(images, tmp_path, labels, message):
    text = run(images / "street.png", "--labels", labels, "--output", tmp_path / "o.png")
    assert message in text if message else "note:" not in text


def test_version():
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"spar-hf {spar_hf.__version__}\n")


def test_bake_prints_the_line_that_loads_its_folder(tmp_path):
    result = runner.invoke(
        app, ["bake", "--labels", "road; sky", "--output", str(tmp_path / "b"), "--templates", "plain"]
    )
    line = next(line for line in result.output.splitlines() if line.startswith("load it: "))
    scope = {}
    exec(line.removeprefix("load it: "), scope)
    found = scope["segment"](Image.new("RGB", (64, 48)))
    assert {part["label"] for part in found} <= {"road", "sky"}
    assert "trust_remote_code=True" in result.output
