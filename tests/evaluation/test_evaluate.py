"""The command `evaluate` against a slow computation of its own, and the effect of its options."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from evaluating import CLASSES, LABELS, SIZES
from huggingface_hub import ModelCard
from launching import ENVIRONMENT, TRAINING, TWO_PROCESSES
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import randomise, tiny_config
from torch.nn import functional as F

from spar_hf import SlidingWindowTeacher, SparForOpenVocabSegmentation, SparImageProcessorPil, teacher
from spar_hf.data.segmentation_sets import IGNORE_INDEX, open_folder
from spar_hf.evaluation import command as script
from spar_hf.evaluation.candidates import Candidate
from spar_hf.evaluation.inference import average_logits, predict
from spar_hf.evaluation.runs import Run
from spar_hf.model.prompts import TEMPLATES, Vocabulary
from spar_hf.model.refine import REFINEMENTS
from spar_hf.utils.errors import UsageError


@torch.no_grad()
def slow_feature_map(model, pixels, stride):
    """One pass, or the mean over windows of 64 px on the grid of patches (strides that are multiples of the patch)."""
    pixels = F.pad(pixels, (0, -pixels.shape[3] % 16, 0, -pixels.shape[2] % 16))
    if stride is None:
        return model.vision_model(pixels).feature_map
    height, width = pixels.shape[2:]
    total, count = torch.zeros(1, 32, height // 16, width // 16), torch.zeros(height // 16, width // 16)
    for top in {*range(0, height - 64, stride), height - 64}:
        for left in {*range(0, width - 64, stride), width - 64}:
            rows, columns = slice(top // 16, top // 16 + 4), slice(left // 16, left // 16 + 4)
            window = pixels[:, :, top : top + 64, left : left + 64]
            total[:, :, rows, columns] += model.vision_model(window).feature_map
            count[rows, columns] += 1
    return total / count


@torch.no_grad()
def slow_predictions(checkpoint, tokenizer, dataset, shortest_edge=None, stride=None, names=LABELS):
    """The best name per pixel of every image, from PIL, the model's two towers and plain interpolation."""
    model = SparForOpenVocabSegmentation.from_pretrained(checkpoint)
    rows = []
    for name in names:
        ids = torch.tensor([tokenizer(t.format(name), padding="max_length").input_ids for t in TEMPLATES["short"]])
        prompts = F.normalize(model.get_text_features(ids).pooler_output, dim=-1)
        rows.append(F.normalize(prompts.mean(0), dim=0))
    text = torch.stack(rows)
    predictions = []
    for path in sorted((dataset / "images").iterdir()):
        image = Image.open(path)
        width, height = image.size
        if shortest_edge is not None:
            factor = shortest_edge / min(width, height)
            image = image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
        pixels = (torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
        features = F.normalize(slow_feature_map(model, pixels, stride), dim=1)
        logits = torch.einsum("bdhw,nd->bnhw", features, text)
        if shortest_edge is None:
            logits = F.interpolate(logits, scale_factor=16, mode="bilinear")[:, :, :height, :width]
        else:
            # pixel centres of the image on the padded working image, in grid_sample's coordinates from -1 to 1
            side = [16 * n for n in logits.shape[-2:]]
            y = (torch.arange(height) + 0.5) * image.height / height / side[0] * 2 - 1
            x = (torch.arange(width) + 0.5) * image.width / width / side[1] * 2 - 1
            grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None].float()
            logits = F.grid_sample(logits, grid, mode="bilinear", padding_mode="border", align_corners=False)
        predictions.append(logits[0].argmax(0).numpy())
    return predictions


def slow_iou(predictions, dataset, classes=6):
    """Per class over all images; NaN where the class is neither predicted nor labelled."""
    both, either = np.zeros(classes), np.zeros(classes)
    for prediction, path in zip(predictions, sorted((dataset / "masks").iterdir()), strict=True):
        reference = np.array(Image.open(path))
        for c in range(classes):
            predicted, labelled = (prediction == c) & (reference != IGNORE_INDEX), reference == c
            both[c] += (predicted & labelled).sum()
            either[c] += (predicted | labelled).sum()
    return [b / e if e else np.nan for b, e in zip(both, either, strict=True)]


def class_iou(row):
    return [row["classes"][label]["iou"] for label in LABELS]


def test_runs_side_by_side_equal_a_slow_computation(dataset, checkpoint, tokenizer):
    base, student = checkpoint("base"), checkpoint("student", shift=0.5)
    command = ["--dataset", str(dataset), "--model", f"base={base}", f"student={student}", "--shortest_edge", "77"]
    report = script.main([*command, "--runs", "base:single", "base:sliding:32", "student:single"])
    rows = [(row["model"], row["stride"]) for row in report["runs"]]
    assert rows == [("base", None), ("base", 32), ("student", None)]
    settings = [(base, None), (base, 32), (student, None)]
    for row, (folder, stride) in zip(report["runs"], settings, strict=True):
        predictions = slow_predictions(folder, tokenizer, dataset, 77, stride)
        assert len(np.unique(np.concatenate([p.ravel() for p in predictions]))) > 3  # the model says different things
        expected = slow_iou(predictions, dataset)
        # a pixel or two may lie on a tie
        np.testing.assert_allclose(class_iou(row), expected, atol=1e-3)
        assert row["mean_iou"] == pytest.approx(np.nanmean(expected), abs=1e-3)
    assert len({row["mean_iou"] for row in report["runs"]}) == 3
    assert report["images"] == 5


@torch.no_grad()
@pytest.mark.parametrize("stride", [32, 24])
def test_mean_of_logits_is_that_of_the_published_evaluation(stride):
    """Which upsamples every window's logits to its pixels, and sums and counts them pixel by pixel."""
    torch.manual_seed(0)
    model = randomise(SparForOpenVocabSegmentation(tiny_config()))
    pixels, text = torch.randn(1, 3, 112, 160), F.normalize(torch.randn(5, 32), dim=-1)
    total, count = torch.zeros(5, 112, 160), torch.zeros(112, 160)
    seam = torch.zeros(112, 160, dtype=torch.bool)  # within half a patch of a window's border inside the image
    for top in {*range(0, 48, stride), 48}:
        for left in {*range(0, 96, stride), 96}:
            rows, columns = slice(top, top + 64), slice(left, left + 64)
            features = F.normalize(model.vision_model(pixels[:, :, rows, columns]).feature_map, dim=1)
            logits = 40 * torch.einsum("bdhw,nd->bnhw", features, text)
            total[:, rows, columns] += F.interpolate(logits, scale_factor=16, mode="bilinear")[0]
            count[rows, columns] += 1
            for row in {top, top + 64} - {0, 112}:
                seam[row - 8 : row + 8] = True
            for column in {left, left + 64} - {0, 160}:
                seam[:, column - 8 : column + 8] = True
    expected = total / count
    averaged, cell = average_logits(Candidate(model, None, text), pixels, stride, window_batch_size=5)
    assert averaged.shape == (1, 5, 112 // cell, 160 // cell)
    ours = F.interpolate(averaged, scale_factor=cell, mode="bilinear")[0]
    features = SlidingWindowTeacher(model.vision_model, stride=stride)(pixels).feature_map
    mean_of_features = F.interpolate(model.dense_logits(features, text), scale_factor=16, mode="bilinear")[0]
    if stride == 32:
        assert cell == 16 and 0.3 < seam.float().mean() < 0.9
        torch.testing.assert_close(ours[:, ~seam], expected[:, ~seam], atol=2e-4, rtol=0)
        assert (mean_of_features - expected)[:, ~seam].abs().mean() > 0.02
    else:
        # half patches stay half patches up to the last upsampling, which bends at their centres too: close, not equal
        assert cell == 8
        noise = (ours - expected).pow(2).mean() / expected.var()
        assert noise < 0.08
        assert (mean_of_features - expected).pow(2).mean() / expected.var() > 5 * noise


@torch.no_grad()
@pytest.mark.parametrize("run", [Run("a"), Run("a", 32), Run("a", 32, "logits")])
def test_features_that_are_not_finite_get_no_score(run):
    """The largest of NaN is the first class, which would be scored like any other."""
    model = SparForOpenVocabSegmentation(tiny_config())
    model.vision_model.backbone.encoder.layers[0].mlp.fc2.weight[0, 0] = torch.inf
    candidate = Candidate(model.eval(), SparImageProcessorPil(size=None), F.normalize(torch.randn(2, 32), dim=-1))
    arguments = (
        run,
        Image.new("RGB", (96, 80)),
        Vocabulary.parse(["road", "sky"]),
        Accelerator(cpu=True),
    )
    with pytest.raises(ValueError, match="not finite"):
        predict(candidate, *arguments)


@torch.no_grad()
def test_mean_of_logits__more_than_fits_is_refused_before_any_window(monkeypatch):
    candidate = Candidate(SparForOpenVocabSegmentation(tiny_config()), None, F.normalize(torch.randn(5, 32), dim=-1))
    pixels = torch.randn(1, 3, 96, 128)
    monkeypatch.setattr(teacher, "MAP_BYTES", 4 * 5 * 12 * 16)  # what cells of half a patch take
    averaged, cell = average_logits(candidate, pixels, 24, window_batch_size=5)
    assert averaged.shape == (1, 5, 12, 16) and cell == 8
    monkeypatch.setattr(candidate.model.vision_model, "forward", None)
    with pytest.raises(
        ValueError, match=r"5 channels on 96×128 cells of 1 px .* multiple of half a patch \(24\), smaller"
    ):
        average_logits(candidate, pixels, 25, window_batch_size=5)
    monkeypatch.setattr(teacher, "MAP_BYTES", 1)
    with pytest.raises(ValueError, match="Use smaller images, or fewer channels"):
        average_logits(candidate, pixels, 32, window_batch_size=5)


def test_an_image_too_large_for_the_stride_is_one_line(dataset, checkpoint, monkeypatch):
    monkeypatch.setattr(teacher, "MAP_BYTES", 10**4)
    base = checkpoint("base")
    for way in ("sliding:7", "sliding-logits:7"):
        with pytest.raises(UsageError, match="Use a stride"):
            script.main(["--dataset", str(dataset), "--model", f"base={base}", "--runs", f"base:{way}", "--native"])


def test_mean_of_logits__padding_of_the_image_is_cut_off(dataset, checkpoint):
    command = ["--dataset", str(dataset), "--model", f"base={checkpoint('base')}", "--native", "--no_warmup", "--runs"]
    row = script.main([*command, "base:sliding-logits:24"])["runs"][0]
    assert row["inference"] == "sliding, stride 24, mean of logits"
    assert sum(entry["predicted_pixels"] for entry in row["classes"].values()) > 0.5 * sum(h * w for h, w in SIZES)


def test_refined_run(dataset, checkpoint, monkeypatch):
    """A refinement gets logits, features and image of one size and may return a finer grid."""
    folder = checkpoint("base")
    command = ["--dataset", str(dataset), "--model", f"base={folder}", "--native", "--no_warmup", "--runs"]

    def twice(logits, feature_map, pixel_values):
        assert feature_map.shape == (32, *logits.shape[1:])
        # whole cells, whatever the image's size
        assert tuple(pixel_values.shape[1:]) == tuple(16 * side for side in logits.shape[1:])
        return F.interpolate(logits[None], scale_factor=2, mode="nearest")[0]

    monkeypatch.setitem(REFINEMENTS, "same", lambda: lambda logits, feature_map, pixel_values: logits)
    monkeypatch.setitem(REFINEMENTS, "double", lambda: twice)
    report = script.main([*command, "base:single", "base:single+same", "base:sliding:32+double"])
    plain, same, double = report["runs"]
    assert same["inference"] == "single pass, same" and double["refinement"] == "double"
    np.testing.assert_equal(same["classes"], plain["classes"])
    assert double["mean_iou"] != plain["mean_iou"]
    pamr, lposs = script.main([*command, "base:single+pamr", "base:single+lposs+"])["runs"]
    found = [[entry["predicted_pixels"] for entry in row["classes"].values()] for row in (plain, pamr, lposs)]
    assert found[0] not in found[1:]
    with pytest.raises(UsageError, match="Unknown refinement 'nonsense'"):
        script.main([*command, "base:single+nonsense"])


def test_background_rules_need_a_background(dataset, checkpoint):
    command = ["--dataset", str(dataset), "--model", str(checkpoint("base")), "--ignore_classes", "null"]
    with pytest.raises(UsageError, match="there is none among road, sky, tree"):
        script.main([*command, "--threshold", "0.2"])


def test_native_size_is_upsampled_by_the_patch_and_cropped(dataset, checkpoint, tokenizer):
    folder = checkpoint("base")
    report = script.main(["--dataset", str(dataset), "--model", str(folder), "--native"])
    expected = slow_iou(slow_predictions(folder, tokenizer, dataset), dataset)
    np.testing.assert_allclose(class_iou(report["runs"][0]), expected, atol=1e-3)


def test_working_resolution_comes_from_the_checkpoint_by_default(dataset, checkpoint):
    models = ["--model", str(checkpoint("base")), "--no_warmup"]
    default = script.main(["--dataset", str(dataset), *models])
    same = script.main(["--dataset", str(dataset), *models, "--shortest_edge", "96"])
    square = script.main(["--dataset", str(dataset), *models, "--size", "96", "96"])
    np.testing.assert_equal(default["runs"][0]["classes"], same["runs"][0]["classes"])
    assert default["runs"][0]["mean_iou"] != square["runs"][0]["mean_iou"]


def test_incomplete_weights_are_one_line(dataset, checkpoint):
    folder = checkpoint("incomplete")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "text_model" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UsageError, match=r"lacks \d+ weights of SparForOpenVocabSegmentation"):
        script.main(["--dataset", str(dataset), "--model", str(folder)])


def test_a_folder_without_image_processor_is_refused(dataset, checkpoint):
    # its mean and deviation would be a guess
    with pytest.raises(UsageError, match=r"preprocessor_config\.json"):
        script.main(["--dataset", str(dataset), "--model", str(checkpoint("bare", image_processor=False))])


def test_ignored_classes_are_neither_counted_nor_predicted(dataset, checkpoint, tokenizer):
    folder = checkpoint("base")
    names = ["road", "tree", "car", "dog"]
    report = script.main(
        ["--dataset", str(dataset), "--model", str(folder), "--native", "--ignore_classes", "sky", "null"]
    )
    row = report["runs"][0]
    assert list(row["classes"]) == names
    for path in (dataset / "masks").iterdir():
        mask = np.array(Image.open(path))
        mask = np.select(
            [mask == CLASSES.index(c) for c in ("road", "tree-merged", "car", "dog")], range(4), IGNORE_INDEX
        )
        Image.fromarray(mask.astype(np.uint8)).save(path)
    predictions = slow_predictions(folder, tokenizer, dataset, names=names)
    np.testing.assert_allclose(
        [c["iou"] for c in row["classes"].values()], slow_iou(predictions, dataset, 4), atol=1e-3
    )


def test_a_single_class_is_told(dataset, checkpoint, capsys):
    command = ["--dataset", str(dataset), "--model", str(checkpoint("base")), "--no_warmup", "--no_boundary", "--limit"]
    report = script.main([*command, "1", "--ignore_classes", *LABELS[1:]])
    assert report["runs"][0]["mean_iou"] == 1
    assert "note: A single class gets every pixel" in " ".join(capsys.readouterr().out.split())


def test_only_classes_restricts_the_means_not_the_answers(dataset, checkpoint):
    options = ["--dataset", str(dataset), "--model", str(checkpoint("base")), "--native", "--no_warmup"]
    everything = script.main(options)["runs"][0]
    report = script.main([*options, "--only_classes", "tree-merged", "null"])
    row = report["runs"][0]
    np.testing.assert_equal(row["classes"], everything["classes"])
    tree, background = row["classes"]["tree"], row["classes"]["background"]
    assert row["mean_iou"] == pytest.approx((tree["iou"] + background["iou"]) / 2)
    assert row["mean_iou"] != pytest.approx(everything["mean_iou"])
    correct = tree["correct_pixels"] + background["correct_pixels"]
    assert row["overall_accuracy"] == pytest.approx(correct / (tree["labelled_pixels"] + background["labelled_pixels"]))
    assert report["scored_classes"] == ["tree", "background"]


def test_floats_and_12_bits_are_read_as_the_same_image_in_8_bits(dataset, checkpoint, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # set by --max_pixels
    command = [
        "--dataset",
        str(dataset),
        "--model",
        str(checkpoint("base")),
        "--native",
        "--no_warmup",
        "--no_boundary",
    ]
    command += ["--limit", "2"]
    paths = sorted((dataset / "images").iterdir())[:2]
    levels = [np.asarray(Image.open(path).convert("L")) for path in paths]

    def scores(convert, *options):
        for path, grey in zip(paths, levels, strict=True):
            path.unlink(missing_ok=True)
            Image.fromarray(convert(grey)).save(path.with_suffix(".tif"))
        return script.main([*command, *options])["runs"][0]["classes"]

    expected = scores(lambda grey: grey)
    np.testing.assert_equal(scores(lambda grey: (grey / 255).astype(np.float32)), expected)
    stated = ("--image_range", "0", str(255 * 16))
    np.testing.assert_equal(scores(lambda grey: grey.astype(np.uint16) * 16, *stated), expected)
    with pytest.raises(UsageError, match=r"image0.*--image-range"):
        script.main(command)  # 12 bits, or 16 that are dark
    with pytest.raises(UsageError, match="pixels exceed 4000"):
        script.main([*command, *stated, "--max_pixels", "4000"])


def test_images_without_labelled_pixels_have_no_score(dataset, checkpoint, tmp_path, caplog):
    for path in (dataset / "masks").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), IGNORE_INDEX)).save(path)
    output, cards = tmp_path / "report.json", tmp_path / "cards"
    command = ["--dataset", str(dataset), "--model", f"base={checkpoint('base')}", "--native", "--no_warmup"]
    report = script.main([*command, "--output", str(output), "--card_folder", str(cards)])
    assert "nothing is scored" in caplog.text
    means = ("mean_iou", "mean_boundary_iou", "overall_accuracy", "mean_accuracy")
    assert np.isnan([report["runs"][0][mean] for mean in means]).all()
    row = json.loads(output.read_text())["runs"][0]
    assert [row[mean] for mean in means] == [None] * 4 and row["vision_seconds"] > 0
    assert row["classes"]["road"] == report["runs"][0]["classes"]["road"] | dict.fromkeys(
        ("iou", "boundary_iou", "accuracy")
    )
    assert "results: []" in (cards / "base.md").read_text()
    # a finished report is replaced only when asked
    for outputs in (["--output", str(output)], ["--card_folder", str(cards)]):
        with pytest.raises(UsageError, match=r"result of an earlier run.*--overwrite"):
            script.main([*command, *outputs])
    script.main([*command, "--output", str(output), "--limit", "1", "--overwrite"])
    assert json.loads(output.read_text())["images"] == 1


def test_mask_must_fit_its_image(dataset, checkpoint):
    command = ["--dataset", str(dataset), "--model", str(checkpoint("base"))]
    path = dataset / "masks" / "image3.png"
    mask = Image.open(path).copy()
    mask.resize((66, 130)).save(path)
    with pytest.raises(UsageError, match=r"image3 has 130×66 pixels .* its image 131×66"):
        script.main(command)
    mask.point(lambda value: 6 if value == IGNORE_INDEX else value).save(path)
    with pytest.raises(UsageError, match=r"image3 holds the values \[6\], which set \(6 classes\)"):
        script.main(command)


def test_a_mask_of_an_image_that_exif_turns_is_not_to_be_resized(dataset):
    data, exif = open_folder(dataset), Image.Exif()
    for orientation, hint in ((6, "turn the mask in the same way, or remove the tag"), (3, "Resize the mask")):
        exif[0x0112] = orientation
        Image.new("RGB", (83, 80)).save(dataset / "images" / "image4.png", exif=exif)
        mask_size = (80, 83) if orientation == 6 else (79, 83)
        Image.new("L", mask_size[::-1]).save(dataset / "masks" / "image4.png")
        with pytest.raises(UsageError, match=hint):
            data.read(4)


def test_stride_above_the_window_is_refused_before_any_image(dataset, checkpoint, tmp_path):
    (dataset / "images" / "image0.png").write_bytes(b"damaged")
    command = ["--dataset", str(dataset), "--model", f"base={checkpoint('base')}", "--output", str(tmp_path / "r.json")]
    with pytest.raises(UsageError, match="stride=80 must lie between 1 and the window"):
        script.main([*command, "--runs", "base:single", "base:sliding-logits:80"])
    assert not list(tmp_path.glob("r.json*"))  # so that a corrected command finds no other settings


def test_windows_have_the_size_that_is_asked_for(dataset, checkpoint):
    command = ["--dataset", str(dataset), "--model", f"base={checkpoint('base')}", "--no_warmup", "--limit", "2"]
    command += ["--runs", "base:sliding:16", "base:sliding-logits:16"]
    default, small = (script.main([*command, *more])["runs"] for more in ([], ["--window_size", "32"]))
    assert [row["window_size"] for row in default + small] == [None, None, 32, 32]
    same = script.main([*command, "--window_size", "64"])["runs"]  # that of the model
    for i in range(2):
        np.testing.assert_array_equal(class_iou(same[i]), class_iou(default[i]))
        assert not np.array_equal(class_iou(small[i]), class_iou(default[i]))
    with pytest.raises(UsageError, match="window"):
        script.main([*command, "--window_size", "40"])


def test_results_block_of_a_model_card(dataset, checkpoint, tmp_path):
    base, student = checkpoint("base"), checkpoint("student", shift=0.5)
    command = ["--dataset", str(dataset), "--model", f"base={base}", f"student={student}", "--native", "--no_warmup"]
    command += ["--runs", "base:single", "student:single", "base:sliding:64", "--card_folder", str(tmp_path / "cards")]
    rows = script.main(command)["runs"]
    card = ModelCard.load(tmp_path / "cards" / "base.md")
    results = {result.metric_name: result for result in card.data.eval_results}
    assert card.data.model_name == "base" and len(results) == 6
    result = results["mIoU, sliding, stride 64"]
    assert result.metric_value == pytest.approx(100 * rows[2]["mean_iou"], abs=0.006)
    assert (result.task_type, result.metric_type, result.dataset_name) == ("image-segmentation", "mean_iou", "set")
    assert results["boundary mIoU, single pass"].metric_value == pytest.approx(
        100 * rows[0]["mean_boundary_iou"], abs=0.006
    )
    assert (tmp_path / "cards" / "student.md").is_file()


@pytest.mark.slow
def test_two_processes_count_the_same_pixels(dataset, checkpoint, tmp_path):
    arguments = ["--dataset", str(dataset), "--model", str(checkpoint("base")), "--runs", "base:single"]
    arguments += ["base:sliding:24", "--shortest_edge", "90", "--no_warmup"]
    one = script.main(arguments)
    assert one["processes"] == 1
    output = tmp_path / "new" / "report.json"
    command = [*TWO_PROCESSES, TRAINING / "evaluate.py", *arguments, "--output", output]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("mIoU") == 1  # one table

    def no_constant(name):
        raise ValueError(f"{name} is no JSON")

    two = json.loads(output.read_text(encoding="utf-8"), parse_constant=no_constant)
    assert [path.name for path in output.parent.iterdir()] == ["report.json"]
    assert two["processes"] == 2 and two["images"] == 5  # of which one process has three, the other two
    counts = [f"{kind}_pixels" for kind in ("labelled", "predicted", "correct")]
    for row_of_one, row_of_two in zip(one["runs"], two["runs"], strict=True):
        for label in LABELS:
            for count in counts:
                assert row_of_two["classes"][label][count] == row_of_one["classes"][label][count]
        for mean in ("mean_iou", "mean_boundary_iou", "overall_accuracy", "mean_accuracy"):
            assert row_of_two[mean] == row_of_one[mean]  # to the last digit
        assert 0 < row_of_two["vision_seconds"] <= row_of_two["total_seconds"]
    assert two["runs"][0]["classes"]["dog"]["accuracy"] is None  # no mask holds it


def test_commands_do_not_import_the_package_evaluate(tmp_path):
    """`training/evaluate.py` hides it for scripts of that folder."""
    program = f"""
import runpy, sys
sys.argv = [{str(TRAINING / "evaluate.py")!r}, "--help"]
sys.path[0] = {str(TRAINING)!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
assert "spar_hf.evaluation.evaluator" in sys.modules
assert "evaluate" not in sys.modules and "spar_hf.evaluation.metrics" not in sys.modules
"""
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "--shortest_edge" in process.stdout
