"""The probing script on images whose labels their colours tell, and its parts against plain torch."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import CONFIGS, randomise
from torch.nn import functional as F
from transformers import AutoModelForSemanticSegmentation, DINOv3ViTModel, pipeline

from spar_hf import SparForSemanticSegmentation, SparImageProcessorPil, SparVisionModel
from spar_hf.evaluation.metrics import MeanIoU
from spar_hf.heads import linear_probe
from spar_hf.heads.frozen_features import parse_inference
from spar_hf.heads.linear_probe import Heads, batch_loss, logits_at, main
from spar_hf.model.segmentation import decide

SCRIPT = Path(__file__).parents[2] / "training" / "linear_probe.py"
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 220]], np.uint8)
CLASSES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Eight images of odd sizes in blocks of three colours with noise; a stripe is void."""
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


def test_probe_learns_and_its_folder_gives_the_masks_that_were_measured(backbone, dataset, tmp_path):
    report = main(arguments(backbone, dataset, tmp_path / "probe"))
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
        main(arguments(backbone, dataset, tmp_path / "again", *short, "--cache", tmp_path / "cache"))["heads"]
        == (first["heads"])
    )
    # another size is another folder of features
    other = main(
        arguments(backbone, dataset, tmp_path / "o", *short, "--cache", tmp_path / "cache", "--shortest_edge", 48)
    )
    assert other["features_made"] == 8 and len(list((tmp_path / "cache").iterdir())) == 2


def test_launched_in_two_processes_on_a_sliding_window_of_a_spar_folder(vision_model, dataset, tmp_path):
    vision_model.save_pretrained(tmp_path / "spar")
    SparImageProcessorPil().save_pretrained(tmp_path / "spar")
    more = ["--inference", "sliding:32", "--steps", "3", "--cache", tmp_path / "cache", "--shortest_edge", "96"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    result = subprocess.run(
        [*command, str(SCRIPT), *arguments(tmp_path / "spar", dataset, tmp_path / "probe", *more)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
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


def test_a_killed_run_resumes_to_the_last_bit(backbone, dataset, tmp_path, monkeypatch):
    whole = main(arguments(backbone, dataset, tmp_path / "whole", "--save_steps", 20))
    assert not list((tmp_path / "whole").glob("checkpoint-*"))
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) > 47:
            raise MemoryError
        return batch_loss(*args)

    monkeypatch.setattr(linear_probe, "batch_loss", killed)
    with pytest.raises(MemoryError):
        main(arguments(backbone, dataset, tmp_path / "cut", "--save_steps", 20))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Go on with --resume"):
        main(arguments(backbone, dataset, tmp_path / "cut", "--save_steps", 20))
    with pytest.raises(ValueError, match=r"--pixels \(was 300, is 200\)"):
        main(arguments(backbone, dataset, tmp_path / "cut", "--pixels", 200, "--resume"))
    resumed = main(arguments(backbone, dataset, tmp_path / "cut", "--resume"))
    assert resumed["heads"] == whole["heads"] and resumed["features_made"] == 20 * 3 + 2
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_folding_the_norm_changes_nothing():
    heads = Heads(12, 5, 3)
    features = torch.randn(200, 12) * torch.rand(12) * 9 + torch.randn(12) * 20
    for _ in range(9):
        heads(features)
    heads.eval()
    weight, bias = heads.folded()
    expected = heads(features).double()
    folded = torch.einsum("pd,hcd->hpc", features.double(), weight) + bias[:, None]
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=1e-5)


def test_loss_reads_logits_where_masks_do():
    """An image of twice the working size, whose working size is no multiple of the patch."""
    logits = torch.randn(2, 4, 6, 3)
    up = F.interpolate(logits.permute(0, 3, 1, 2), scale_factor=32, mode="bilinear")[:, :, :100, :180]
    rows, columns = torch.randint(0, 100, (50,)), torch.randint(0, 180, (50,))
    read = logits_at(logits, rows, columns, 16, (50, 90), (100, 180))
    torch.testing.assert_close(read, up[:, :, rows, columns].permute(0, 2, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--test_include", "*"], r"trained and tested on, p0\.png"),
        (["--inference", "sliding"], "sliding:STRIDE"),
        (["--learning_rates", "0"], "positive"),
    ],
)
def test_bad_options_name_the_fix(backbone, dataset, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(arguments(backbone, dataset, tmp_path / "probe", *more))
    assert not (tmp_path / "probe").exists()


def test_masks_beyond_the_classes_are_refused(backbone, dataset, tmp_path):
    (tmp_path / "images").symlink_to(dataset / "images")
    (tmp_path / "masks").symlink_to(dataset / "masks")
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    with pytest.raises(ValueError, match=r"holds the values \[2\], but classes.txt has 2 lines"):
        main(arguments(backbone, tmp_path, tmp_path / "probe", "--cache", tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # before any work


def test_inference_is_read_as_documented():
    assert (parse_inference("single"), parse_inference("sliding:24")) == (None, 24)
