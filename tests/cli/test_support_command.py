"""`spar-hf support` and `spar-hf segment --support`."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from transformers import pipeline
from typer.testing import CliRunner

from spar_hf.cli.main import app


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def annotated(tmp_path):
    """Two images with masks: a dark half of class 1, a bright half of class 0, a corner that is ignored."""
    for part in ("images", "masks"):
        (tmp_path / "set" / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(2):
        image = rng.integers(200, 256, (64, 96, 3), dtype=np.uint8)
        image[:, 48:] //= 8
        mask = np.zeros((64, 96), np.uint8)
        mask[:, 48:] = 1
        mask[:16, :16] = 255
        Image.fromarray(image).save(tmp_path / f"set/images/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"set/masks/{i}.png")
    (tmp_path / "set/classes.txt").write_text("grass\ndog\nblack\n")
    return tmp_path / "set"


def test_a_folder_becomes_the_file_that_the_pipeline_writes(base_folder, annotated, tmp_path):
    made = tmp_path / "made.safetensors"
    text = run("support", annotated, "--output", made, "--model", base_folder)
    assert "grass" in text and "2 images" in text and f"written: {made}" in text and "black" not in text
    segment = pipeline("open-vocab-segmentation", model=str(base_folder))
    for i in range(2):
        mask = np.array(Image.open(annotated / f"masks/{i}.png"))
        image = str(annotated / f"images/{i}.png")
        segment.add_support([(image, mask == 0, "grass"), (image, mask == 1, "dog")])
    segment.save_support(tmp_path / "expected.safetensors")
    contents = []
    for path in (made, tmp_path / "expected.safetensors"):
        with safe_open(path, framework="np") as file:
            contents.append((file.metadata(), file.get_tensor("features").tolist()))
    assert contents[0] == contents[1] and json.loads(contents[0][0]["images"]) == [0, 0, 1, 1]
    few = run("support", annotated, "--output", made, "--overwrite", "--model", base_folder, "--labels", "Dog",
              "--images-per-class", 1)  # fmt: skip
    assert "1 image\n" in few and "grass" not in few


def test_a_mask_is_turned_upright_as_its_photo_is(base_folder, annotated, tmp_path):
    """Files that are shown turned by a quarter give what the same pixels, stored upright, give."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    features = []
    for name in ("upright", "turned"):
        for file in sorted(annotated.glob("*/0.png")):
            image = Image.open(file)
            image = image if name == "turned" else image.transpose(Image.Transpose.ROTATE_270)
            target = tmp_path / name / file.parent.name / file.name
            target.parent.mkdir(parents=True)
            image.save(target, exif=exif if name == "turned" else None)
        (tmp_path / name / "classes.txt").write_text("grass\ndog\n")
        run("support", tmp_path / name, "--output", tmp_path / f"{name}.safetensors", "--model", base_folder)
        with safe_open(tmp_path / f"{name}.safetensors", framework="np") as made:
            features.append(made.get_tensor("features").tolist())
    assert features[0] == features[1]


def test_segment_uses_it_and_records_it(base_folder, annotated, tmp_path):
    made, output = tmp_path / "made.safetensors", tmp_path / "out"
    run("support", annotated, "--output", made, "--model", base_folder)
    common = ("segment", annotated / "images", "--labels", "road; cat, grass; dog", "--templates", "plain",
              "--background", "none", "--model", base_folder, "--format", "map")  # fmt: skip
    run(*common, "--output", tmp_path / "words")
    run(*common, "--output", output, "--support", made)
    found, words = (np.array(Image.open(next(folder.glob("0*.png")))) for folder in (output, tmp_path / "words"))
    assert (found != words).any()
    segment = pipeline("open-vocab-segmentation", model=str(base_folder))
    segment.load_support(made)
    given = {"candidate_labels": ["road", "cat, grass", "dog"], "templates": "plain", "output": "map"}
    assert np.array_equal(found, segment(str(annotated / "images/0.png"), **given)["map"])
    assert "2 skipped" in run(*common, "--output", output, "--support", made, "--skip-existing")
    run("support", annotated, "--output", made, "--overwrite", "--model", base_folder, "--images-per-class", 1)
    text = run(*common, "--output", output, "--support", made, "--skip-existing", status=2)
    assert "error" in text and "support" in text


def test_a_line_with_commas_has_the_label_that_segment_gives_it(base_folder, annotated, tmp_path):
    made, classes = tmp_path / "made.safetensors", annotated / "classes.txt"
    classes.write_text("grass, lawn\ndog\n")
    assert "grass   " in run("support", annotated, "--output", made, "--model", base_folder)
    text = run("segment", annotated / "images", "--labels", f"@{classes}", "--output", tmp_path / "out", "--support", made,
               "--model", base_folder)  # fmt: skip
    assert "take no part" not in text
    run("support", annotated, "--output", made, "--overwrite", "--model", base_folder, "--labels", "grass")
    classes.write_text("animal, grass\nanimal, dog\n")
    text = run("support", annotated, "--output", made, "--overwrite", "--model", base_folder, status=2)
    assert "classes.txt" in text and "stand twice: animal" in text
    classes.write_text("# values\ngrass\ndog\n")
    text = run("support", annotated, "--output", made, "--overwrite", "--model", base_folder, status=2)
    assert "begins with #" in text


def test_wrong_usage_is_one_line(base_folder, annotated, tmp_path):
    model = ("--model", base_folder)
    made = tmp_path / "made.safetensors"
    made.write_bytes(b"")
    for arguments, message in (
        ((annotated, "--output", tmp_path / "made.npz"), "safetensors"),
        ((annotated, "--output", made), "exists"),
        ((annotated, "--output", tmp_path / "none/made.safetensors"), "no folder"),
        ((tmp_path, "--output", tmp_path / "x.safetensors"), "classes.txt"),
        ((annotated, "--output", tmp_path / "x.safetensors", "--labels", "dog; moss"), "'moss'"),
    ):
        assert message in run("support", *arguments, *model, status=2)
    (annotated / "classes.txt").write_text("grass\ndog\nGrass\n")
    assert "stand twice: Grass, grass" in run(
        "support", annotated, "--output", tmp_path / "x.safetensors", *model, status=2
    )
    (annotated / "classes.txt").write_text("grass\ndog\n")
    Image.fromarray(np.full((64, 96), 7, np.uint8)).save(annotated / "masks/0.png")
    text = run("support", annotated, "--output", tmp_path / "x.safetensors", *model, status=2)
    assert "value 7" in text and not (tmp_path / "x.safetensors").exists()
    Image.fromarray(np.zeros((60, 96), np.uint8)).save(annotated / "masks/0.png")
    text = run("support", annotated, "--output", tmp_path / "x.safetensors", *model, status=2)
    assert "0.png" in text and "(60, 96)" in text
    exif, photo = Image.Exif(), Image.open(annotated / "images/0.png")
    exif[0x0112] = 6
    photo.save(annotated / "images/0.png", exif=exif)
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(annotated / "masks/0.png")
    text = run("support", annotated, "--output", tmp_path / "x.safetensors", *model, status=2)
    assert "turned by its EXIF orientation, and its mask is not" in text
    photo.save(annotated / "images/0.png")
    image = annotated / "images/0.png"
    text = run(
        "segment", image, "--labels", "a; b", "--output", tmp_path / "o.png", "--support", made, *model, status=2
    )
    assert "safetensors file, or damaged" in text


def test_only_images_are_read_and_none_shares_a_mask(base_folder, annotated, tmp_path):
    options = (annotated, "--output", tmp_path / "made.safetensors", "--model", base_folder)
    (annotated / "images/0.json").write_text("{}")
    (annotated / "images/.0.png").write_bytes(b"what some systems write beside a file")
    (annotated / "masks/.0.png").write_bytes(b"")
    assert "2 images" in run("support", *options)
    (annotated / "images/sub").mkdir()
    (annotated / "images/1.png").rename(annotated / "images/sub/1.png")
    assert "2 images" in run("support", *options, "--overwrite")
    Image.open(annotated / "images/0.png").save(annotated / "images/0.jpg")
    text = " ".join(run("support", *options, "--overwrite", status=2).split())
    assert "0.jpg" in text and "0.png" in text and "share the mask" in text
