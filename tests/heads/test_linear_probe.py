"""Linear probing on images whose classes are colours, and its parts against plain torch."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from changing import change_weights
from datasets import Dataset
from interrupting import at_call, crash
from launching import ENVIRONMENT, TRAINING, TWO_PROCESSES
from PIL import Image
from safetensors.torch import load_file
from tiny_models import CONFIGS, randomise
from torch.nn import functional as F
from transformers import AutoModelForSemanticSegmentation, DINOv3ViTModel, pipeline

from spar_hf import SparForSemanticSegmentation, SparImageProcessorPil, SparVisionModel
from spar_hf.data.segmentation_sets import make_table, open_folder
from spar_hf.evaluation.metrics import MeanIoU
from spar_hf.heads import linear_probe
from spar_hf.heads.frozen_features import FrozenFeatures
from spar_hf.heads.linear_head import DrawnPixels, LinearHeads, batch_loss, logits_at_pixels
from spar_hf.heads.linear_probe import main
from spar_hf.heads.linear_probe_options import FeatureOptions, ProbeOptions
from spar_hf.heads.linear_probe_report import make_report
from spar_hf.model.segmentation import decide
from spar_hf.utils.errors import NotFinite, UsageError

SCRIPT = TRAINING / "linear_probe.py"
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 220]], np.uint8)
CLASSES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Eight images of odd sizes in blocks of three colours with noise; a stripe is ignored."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    rng = np.random.default_rng(0)
    for i in range(8):
        height, width = 90 + 7 * (i % 2), 131
        small = rng.integers(0, 3, (3, 4)).astype(np.uint8)
        labels = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))
        noise = rng.integers(-20, 20, (height, width, 3))
        Image.fromarray((COLOURS[labels] + noise).clip(0, 255).astype(np.uint8)).save(folder / "images" / f"p{i}.png")
        labels[:, :9] = 255
        Image.fromarray(labels).save(folder / "masks" / f"p{i}.png")
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A random DINOv3 as transformers saves it: no text tower, and nothing of SPAR."""
    folder = tmp_path_factory.mktemp("hub")
    randomise(DINOv3ViTModel(CONFIGS["dinov3"]())).save_pretrained(folder)
    statistics = {"image_processor_type": "DINOv3ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.3] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def arguments(backbone, dataset, output, *more):
    folders = ["--model", backbone, "--train_dataset", dataset, "--test_dataset", dataset, "--output", output]
    split = ["--train_exclude", "p6", "p7", "--test_include", "p[67]", "--shortest_edge", "64"]
    short = ["--steps", "60", "--batch_size", "3", "--pixels", "300", "--learning_rates", "1e-5", "3e-2"]
    return [str(argument) for argument in (*folders, *split, *short, *more)]


def test_probe_learns_and_its_folder_gives_the_masks_that_were_measured(backbone, dataset, tmp_path, caplog):
    report = main(arguments(backbone, dataset, tmp_path / "probe"))
    assert caplog.messages[-1] == f"written: {tmp_path / 'probe' / 'model'}"
    assert (report["train_images"], report["test_images"]) == (6, 2)
    low, high = (row["mean_iou"] for row in report["heads"])
    assert low < high and high > 0.6  # a learning rate of nothing learns nothing
    assert report["best"]["learning_rate"] == 3e-2

    assert json.loads((tmp_path / "probe" / "results.json").read_text()) == json.loads(json.dumps(report))
    folder = tmp_path / "probe" / "model"
    card = (folder / "README.md").read_text()
    assert f"{100 * high:.2f}" in card and str(tmp_path) not in card + (folder / "config.json").read_text()
    assert type(AutoModelForSemanticSegmentation.from_pretrained(folder)) is SparForSemanticSegmentation

    segment, metric = pipeline("image-segmentation", model=str(folder)), MeanIoU(3)
    for name in ("p6", "p7"):
        reference = np.array(Image.open(dataset / "masks" / f"{name}.png"))
        prediction = np.full(reference.shape, -1)
        for found in segment(str(dataset / "images" / f"{name}.png")):
            prediction[np.asarray(found["mask"]) == 255] = CLASSES.index(found["label"])
        metric.add(prediction=prediction, reference=reference)
    # the folder's features are not rounded to bfloat16
    assert metric.compute()["mean_iou"] == pytest.approx(high, abs=5e-3)


def test_features_are_made_once_and_give_the_same_probe_as_made_anew(backbone, dataset, tmp_path):
    short = ["--steps", "5"]
    anew = main(arguments(backbone, dataset, tmp_path / "anew", *short))
    first = main(arguments(backbone, dataset, tmp_path / "first", *short, "--cache", tmp_path / "cache"))
    again = main(arguments(backbone, dataset, tmp_path / "again", *short, "--cache", tmp_path / "cache"))
    assert (anew["features_made"], first["features_made"], again["features_made"]) == (5 * 3 + 2, 8, 0)
    assert anew["heads"] == first["heads"] == again["heads"]
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 8 and len(list((tmp_path / "cache").iterdir())) == 1

    files[0].write_bytes(files[0].read_bytes()[:50])  # a file that a full disk cut off
    assert (
        main(arguments(backbone, dataset, tmp_path / "again", *short, "--cache", tmp_path / "cache", "--overwrite"))[
            "heads"
        ]
        == (first["heads"])
    )
    # another size is another folder of features
    other = main(
        arguments(backbone, dataset, tmp_path / "o", *short, "--cache", tmp_path / "cache", "--shortest_edge", 48)
    )
    assert other["features_made"] == 8 and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.slow
def test_launched_in_two_processes_on_a_sliding_window_of_a_spar_folder(vision_model, dataset, tmp_path):
    vision_model.save_pretrained(tmp_path / "spar")
    SparImageProcessorPil().save_pretrained(tmp_path / "spar")
    more = ["--stride", "32", "--steps", "3", "--cache", tmp_path / "cache", "--shortest_edge", "96"]
    result = subprocess.run(
        [*TWO_PROCESSES, str(SCRIPT), *arguments(tmp_path / "spar", dataset, tmp_path / "probe", *more)],
        env={**ENVIRONMENT, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert report["features_made"] == 8 == len(list((tmp_path / "cache").rglob("*.safetensors")))
    assert "sliding window" in (tmp_path / "probe" / "model" / "README.md").read_text()
    saved = SparForSemanticSegmentation.from_pretrained(tmp_path / "probe" / "model")
    assert isinstance(saved.vision_model, SparVisionModel) and not saved.config.normalize_features

    # the folder's own head gives what both processes measured together
    metric = MeanIoU(3)
    for name in ("p6", "p7"):
        image = hashlib.sha256((dataset / "images" / f"{name}.png").read_bytes()).hexdigest()
        entry = load_file(next((tmp_path / "cache").rglob(f"{image[:32]}*")))
        logits = torch.einsum("dhw,nd->nhw", entry["features"].float(), saved.classifier.weight.detach())
        logits = logits + saved.classifier.bias.detach()[:, None, None]
        sizes = {key: tuple(entry[key].tolist()) for key in ("working_size", "photo_size")}
        labels = decide(
            logits, torch.arange(3), 16, working_size=sizes["working_size"], output_size=sizes["photo_size"]
        ).labels
        metric.add(prediction=labels, reference=np.array(Image.open(dataset / "masks" / f"{name}.png")))
    results = metric.compute()
    assert results["mean_iou"] == report["best"]["mean_iou"]
    assert results["per_category_iou"].tolist() == list(report["best"]["classes"].values())


def test_a_run_does_not_go_on_with_another_backbone(backbone, dataset, tmp_path, monkeypatch):
    own, options = shutil.copytree(backbone, tmp_path / "backbone"), ("--save_steps", 2, "--steps", 4)
    monkeypatch.setattr(linear_probe, "batch_loss", at_call(3, batch_loss, crash))
    with pytest.raises(MemoryError):
        main(arguments(own, dataset, tmp_path / "run", *options))
    monkeypatch.undo()
    change_weights(own)
    with pytest.raises(UsageError, match="those of --model changed since the run began"):
        main(arguments(own, dataset, tmp_path / "run", *options, "--resume"))


def test_a_killed_run_resumes_to_the_last_bit(backbone, dataset, tmp_path, monkeypatch):
    whole = main(arguments(backbone, dataset, tmp_path / "whole", "--save_steps", 20))
    assert not list((tmp_path / "whole").glob("checkpoint-*"))
    monkeypatch.setattr(linear_probe, "batch_loss", at_call(48, batch_loss, crash))
    with pytest.raises(MemoryError):
        main(arguments(backbone, dataset, tmp_path / "cut", "--save_steps", 20))
    monkeypatch.undo()
    with pytest.raises(UsageError, match="--resume"):
        main(arguments(backbone, dataset, tmp_path / "cut", "--save_steps", 20))
    with pytest.raises(UsageError, match=r"--pixels \(was 300, is 200\)"):
        main(arguments(backbone, dataset, tmp_path / "cut", "--pixels", 200, "--resume"))
    resumed = main(arguments(backbone, dataset, tmp_path / "cut", "--resume"))
    assert resumed["heads"] == whole["heads"] and resumed["features_made"] == 20 * 3 + 2
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    logs = [[json.loads(row) for row in (tmp_path / run / "log.jsonl").open()] for run in ("whole", "cut")]
    assert logs[0] == logs[1] and [(row["step"], len(row["losses"])) for row in logs[0]] == [(1, 2), (21, 2), (41, 2)]


def test_heads_without_their_norm_give_the_same_logits():
    heads = LinearHeads(12, 5, 3)
    features = torch.randn(200, 12) * torch.rand(12) * 9 + torch.randn(12) * 20
    for _ in range(9):
        heads(features)
    heads.eval()
    weight, bias = heads.without_norm()
    expected = heads(features).double()
    found = torch.einsum("pd,hcd->hpc", features.double(), weight) + bias[:, None]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_loss_reads_logits_where_masks_do():
    """An image of twice the working size, whose working size is no multiple of the patch."""
    logits = torch.randn(2, 4, 6, 3)
    up = F.interpolate(logits.permute(0, 3, 1, 2), scale_factor=32, mode="bilinear")[:, :, :100, :180]
    rows, columns = torch.randint(0, 100, (50,)), torch.randint(0, 180, (50,))
    image = DrawnPixels(torch.empty(12, 4, 6), rows, columns, torch.zeros(50), (50, 90), (100, 180))
    read = logits_at_pixels(logits, image, 16)
    torch.testing.assert_close(read, up[:, :, rows, columns].permute(0, 2, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--test_include", "*"], r"p0\.png .*--train_exclude"),
        (["--inference", "sliding"], "sliding:STRIDE"),
        (["--inference", "sliding:32", "--stride", "16"], "leave --inference out"),
        (["--learning_rates", "0"], "--learning_rates"),
    ],
)
def test_bad_options_name_the_fix(backbone, dataset, tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        main(arguments(backbone, dataset, tmp_path / "probe", *more))
    assert not (tmp_path / "probe").exists()


def test_masks_beyond_the_classes_are_refused(backbone, dataset, tmp_path):
    (tmp_path / "images").symlink_to(dataset / "images")
    (tmp_path / "masks").symlink_to(dataset / "masks")
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    with pytest.raises(UsageError, match=r"holds the values \[2\], which .*2 classes"):
        main(arguments(backbone, tmp_path, tmp_path / "probe", "--cache", tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # before any work


def test_a_run_of_version_0_1_resumes(backbone, dataset, tmp_path, monkeypatch):
    """It stored one pattern where there are lists now, and the stride as a part of --inference alone."""
    monkeypatch.setattr(linear_probe, "batch_loss", at_call(4, batch_loss, crash))
    with pytest.raises(MemoryError):
        main(arguments(backbone, dataset, tmp_path / "run", "--save_steps", 2))
    monkeypatch.undo()
    file = tmp_path / "run" / "checkpoint-2" / "state.json"
    state = json.loads(file.read_text())
    assert state["settings"]["mixed_precision"] == "no"
    assert (state["settings"]["train_include"], state["settings"]["test_include"]) == (["*"], ["p[67]"])
    assert (state["settings"].pop("stride"), state["settings"]["inference"]) == (None, "single")
    state["settings"] |= {"train_include": "*", "test_include": "p[67]"}
    file.write_text(json.dumps(state))
    assert main(arguments(backbone, dataset, tmp_path / "run", "--resume"))["steps"] == 60


def test_the_earlier_form_of_a_stride_is_the_same_option():
    options = FeatureOptions(model="m", stride=32)
    assert options == FeatureOptions(model="m", inference="sliding:32") == FeatureOptions(**vars(options))
    assert FeatureOptions(model="m") == FeatureOptions(model="m", inference="single")


def test_an_image_too_large_for_the_stride_is_a_usage_error(backbone, dataset, monkeypatch):
    monkeypatch.setattr("spar_hf.teacher.MAP_BYTES", 10**4)
    features = FrozenFeatures(FeatureOptions(model=str(backbone), stride=7), Accelerator(cpu=True))
    with pytest.raises(UsageError, match="Use a stride"):
        features(open_folder(dataset), 0)


def test_features_of_images_stored_in_a_data_set_are_those_of_the_files(backbone, dataset, tmp_path):
    """The bytes of an image name its features, wherever they come from; the keys of the file are those of version 0.1."""
    folder = open_folder(dataset)
    images = [{"bytes": Path(str(folder.file(i))).read_bytes(), "path": None} for i in range(8)]
    masks = [folder.file(i, "mask") for i in range(8)]
    rows = Dataset.from_dict({"image": images, "mask": masks}, features=folder.rows.features)
    stored = type(folder)("stored", rows, folder.names, folder.labels, make_table(range(3)), "stored")
    assert isinstance(stored.file(0), bytes) and isinstance(folder.file(0), str)
    options = FeatureOptions(model=str(backbone), shortest_edge=64, cache=str(tmp_path))
    features = FrozenFeatures(options, Accelerator(cpu=True))
    features.fill(folder)
    features.fill(stored)
    assert features.made == 8
    found, image = features(stored, 3), Image.open(dataset / "images" / "p3.png")
    assert found.image_size == image.size[::-1] and min(found.working_size) == 64
    tensors = load_file(next(tmp_path.rglob("*.safetensors")))
    assert set(tensors) == {"features", "working_size", "photo_size"} and tensors["features"].dtype == torch.bfloat16


@pytest.mark.parametrize(("asked", "side", "size"), [(64, 64, {"shortest_edge": 64}), (None, 90, {})])
def test_images_have_the_size_that_is_reported(backbone, dataset, tmp_path, asked, side, size):
    """Also on a folder that does not resize by itself."""
    folder = shutil.copytree(backbone, tmp_path / "hub")
    SparImageProcessorPil(do_resize=False, size={"shortest_edge": 48}).save_pretrained(folder)
    options = ProbeOptions.parse(arguments(folder, dataset, tmp_path / "probe", "--learning_rates", 1e-3))
    options.features.shortest_edge = asked
    features = FrozenFeatures(options.features, Accelerator(cpu=True))
    assert min(features(open_folder(dataset), 0).working_size) == side
    report = make_report(options, features, [{"mean_iou": 0.5}], 6, 2)
    assert report["size"] == size


def test_sigterm_stops_after_the_step_and_the_run_resumes(backbone, dataset, tmp_path, monkeypatch):
    whole = main(arguments(backbone, dataset, tmp_path / "whole"))
    monkeypatch.setattr(linear_probe, "batch_loss", at_call(7, batch_loss))
    assert main(arguments(backbone, dataset, tmp_path / "run")) is None
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-7"]
    assert main(arguments(backbone, dataset, tmp_path / "run", "--resume"))["heads"] == whole["heads"]


def test_a_run_with_a_mask_that_is_wholly_ignored_resumes(backbone, dataset, tmp_path, monkeypatch):
    own = shutil.copytree(dataset, tmp_path / "own")
    for name in ("p1", "p7"):  # one of the images to train on, one of those to test on
        mask = own / "masks" / f"{name}.png"
        Image.fromarray(np.full_like(np.array(Image.open(mask)), 255)).save(mask)
    whole = main(arguments(backbone, own, tmp_path / "whole", "--steps", "9"))
    assert (whole["train_images"], whole["test_images"]) == (5, 1)
    with monkeypatch.context() as patch:
        patch.setattr(linear_probe, "batch_loss", at_call(4, batch_loss))
        assert main(arguments(backbone, own, tmp_path / "run", "--steps", "9")) is None
    resumed = main(arguments(backbone, own, tmp_path / "run", "--steps", "9", "--resume"))
    assert resumed["heads"] == whole["heads"] and resumed["train_images"] == 5


def test_a_head_that_diverges_is_never_the_best(backbone, dataset, tmp_path, monkeypatch):
    """The gradients of the heads do not mix: the others learn what they would without it."""
    alone = main(arguments(backbone, dataset, tmp_path / "alone", "--steps", "9"))
    without_spoiling = batch_loss

    def spoiled(*args):
        losses = without_spoiling(*args)
        return torch.stack([losses[0], losses[1] * float("nan")])

    monkeypatch.setattr(linear_probe, "batch_loss", spoiled)
    report = main(arguments(backbone, dataset, tmp_path / "one", "--steps", "9"))
    assert report["heads"][1]["mean_iou"] is None and report["best"] == report["heads"][0] == alone["heads"][0]
    json.loads((tmp_path / "one" / "results.json").read_text(), parse_constant=pytest.fail)

    monkeypatch.setattr(linear_probe, "batch_loss", lambda *args: without_spoiling(*args) * float("inf"))
    with pytest.raises(NotFinite, match="All heads"):
        main(arguments(backbone, dataset, tmp_path / "all", "--steps", "9", "--max_bad_steps", "2"))
    assert not (tmp_path / "all" / "model").exists()


def test_images_that_changed_and_finished_runs_are_refused(backbone, dataset, tmp_path, monkeypatch):
    own = shutil.copytree(dataset, tmp_path / "own")
    with monkeypatch.context() as patch:
        patch.setattr(linear_probe, "batch_loss", at_call(1, batch_loss))
        assert main(arguments(backbone, own, tmp_path / "run", "--steps", "4")) is None
    for part in ("images", "masks"):
        shutil.copy(own / part / "p1.png", own / part / "p9.png")
    with pytest.raises(UsageError, match=r"1 added \(.*p9\.png\)"):
        main(arguments(backbone, own, tmp_path / "run", "--steps", "4", "--resume"))
    report = main(arguments(backbone, own, tmp_path / "run", "--steps", "4", "--resume", "--allow_changed_data"))
    assert (report["train_images"], report["test_images"]) == (7, 2)
    with pytest.raises(UsageError, match="--overwrite"):
        main(arguments(backbone, own, tmp_path / "run", "--steps", "4"))
