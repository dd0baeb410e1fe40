"""The training of panoptic heads: segments of a mask, the measure, the script really launched, and its resume."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_models import randomise, tiny_config
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline

from spar_hf import (
    SparImageProcessorPil,
    SparUniversalImageProcessorPil,
    SparUniversalSegmentationOutput,
    SparVisionModel,
)
from spar_hf.data.segmentation_sets import open_segmentation_folder
from spar_hf.heads import panoptic
from spar_hf.heads.panoptic import Options, measure
from spar_hf.heads.segments import PanopticImages, find_segments, only, thing_classes

CLASSES = ("person", "sky", "grass")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    randomise(SparVisionModel(tiny_config())).save_pretrained(folder)
    SparImageProcessorPil(image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images of different sizes: sky above grass, persons in front, in colours of their own."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    colours = np.array([[220, 60, 40], [80, 140, 230], [60, 170, 60]], np.uint8)
    rng = np.random.default_rng(0)
    for i in range(4):
        mask = np.full((70, 90 + 7 * i), 2, np.uint8)
        mask[: 30 + 3 * i] = 1
        mask[20:60, 10:30] = mask[25:65, 50 : 70 + i] = 0
        noise = rng.integers(-15, 16, (*mask.shape, 3))
        Image.fromarray((colours[mask] + noise).clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        mask[:3] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


def arguments(base, data, output, **kwargs) -> dict:
    small = {"hidden_dim": 32, "num_queries": 8, "train_num_points": 256, "decoder_layers": 3, "shortest_edge": 64}
    small |= {"workers": 0, "log_steps": 2, "things": ["person"], "gradient_accumulation_steps": 2}
    return {"model": str(base), "data": str(data), "output": str(output), **small, **kwargs}


def test_find_segments__regions_of_things_and_stuff_as_a_whole():
    mask = np.array(
        [
            [0, 0, 1, 1, 0, 0],
            [0, 1, 1, 1, 1, 0],
            [1, 0, 1, 2, 1, 1],
            [255, 1, 1, 1, 2, 0],
        ],
        np.uint8,
    )
    segments, classes = find_segments(mask, {0, 2}, min_area=0.0)
    # the left person touches its pixel below over a corner; the two of class 2 touch over a corner as well
    expected = [[0, 0, 3, 3, 1, 1], [0, 3, 3, 3, 3, 1], [3, 0, 3, 4, 3, 3], [-1, 3, 3, 3, 4, 2]]
    assert segments.tolist() == expected
    assert classes == {0: 0, 1: 0, 2: 0, 3: 1, 4: 2}

    segments, classes = find_segments(mask, {0, 2}, min_area=3 / 24)
    assert classes == {0: 0, 1: 0, 2: 1} and segments[3, 5] == segments[2, 3] == -1
    segments, classes = find_segments(mask, {0, 2}, min_area=0.0, most=2)
    assert classes == {0: 0, 1: 1} and segments[0].tolist() == [0, 0, 1, 1, -1, -1]
    assert find_segments(np.full((3, 3), 255, np.uint8), {0}, 0.0)[1] == {}


def test_thing_classes():
    assert thing_classes(["2"], CLASSES) == {0, 1}
    assert thing_classes(["grass", "person"], CLASSES) == {0, 2}
    with pytest.raises(ValueError, match="tree"):
        thing_classes(["person", "tree"], CLASSES)
    with pytest.raises(ValueError, match="9"):
        thing_classes(["9"], CLASSES)


def quality_by_hand(prediction, target, classes) -> dict[int, float]:
    """Panoptic quality per class as COCO defines it; both are lists of (class, mask), what is in no mask is void."""
    known = np.any([mask for _, mask in target], axis=0)
    result = {}
    for class_id in classes:
        found, wanted = ([mask for c, mask in side if c == class_id] for side in (prediction, target))
        overlaps = []
        for a in found:
            for b in wanted:
                union = (a & known) | b
                if (a & b).sum() > union.sum() / 2:
                    overlaps.append((a & b).sum() / union.sum())
        # a segment that lies mostly on void is not counted as false
        counted = [a for a in found if (a & ~known).sum() <= a.sum() / 2]
        total = 0.5 * (len(counted) + len(wanted))
        if total:
            result[class_id] = sum(overlaps) / total
    return result


def test_measure__the_definition_of_coco(data):
    """Right, wrong, missed and void segments against a computation by hand."""

    class Drawn(torch.nn.Module):
        """A 'model' whose queries are the segments drawn below."""

        def forward(self, pixel_values):
            height, width = pixel_values.shape[-2:]
            masks = torch.full((4, height, width), -30.0)
            masks[0, :28], masks[1, 18:60, 10:32] = 5, 15  # sky, one person; the other person and the grass are missed
            masks[2, 40:, 75:] = 5  # a person that is none
            masks[3, :3, 40:] = 15  # on void
            return SparUniversalSegmentationOutput(
                class_queries_logits=torch.nn.functional.one_hot(torch.tensor([[1, 0, 0, 2]]), 4).float() * 30,
                masks_queries_logits=masks[None],
                mask_sizes=torch.tensor([[height, width]]),
            )

    pairs = [(data / "images" / "0.png", data / "masks" / "0.png")]
    options = Options(model="", data="", output="")
    processor = SparUniversalImageProcessorPil(label_ids_to_fuse=[1, 2])
    row = measure(Drawn(), processor, open_segmentation_folder(data), pairs, {0}, options, Accelerator())

    mask = np.array(Image.open(pairs[0][1]))
    drawn = np.zeros(mask.shape, int)
    drawn[:28], drawn[40:, 75:] = 1, 3
    drawn[18:60, 10:32] = 2
    drawn[:3, 40:] = 4
    prediction = [(1, drawn == 1), (0, drawn == 2), (0, drawn == 3), (2, drawn == 4)]
    target = [(1, mask == 1), (2, mask == 2)]
    left = np.arange(mask.shape[1]) < 40
    target += [(0, (mask == 0) & left), (0, (mask == 0) & ~left)]
    by_hand = quality_by_hand(prediction, target, range(3))
    assert 0 < by_hand[0] < 0.6 < by_hand[1] and by_hand[2] == 0
    assert row["pq_things"] == pytest.approx(100 * by_hand[0], abs=0.01)
    assert row["pq_stuff"] == pytest.approx(50 * (by_hand[1] + by_hand[2]), abs=0.01)
    assert row["pq"] == pytest.approx(100 * np.mean(list(by_hand.values())), abs=0.01)
    assert (row["classes"], row["images"]) == (3, 1)


def test_images__the_same_whatever_the_workers_and_the_start(data, tmp_path):
    """Which image an item is, is told by a shuffle of its own; one without a segment is passed over."""
    pairs = [(path, data / "masks" / path.name) for path in sorted((data / "images").iterdir())]
    pairs[2] = pairs[2][0], tmp_path / "void.png"
    Image.new("L", Image.open(pairs[2][0]).size, 255).save(tmp_path / "void.png")
    options = Options(
        model="", data="", output="", seed=5, shortest_edge=64, flip_probability=0, max_scale=1, min_scale=1
    )
    processor = SparUniversalImageProcessorPil()

    def images(start, workers):
        made = PanopticImages(open_segmentation_folder(data), pairs, {0}, processor, options)
        return list(DataLoader(made, 1, sampler=range(start, 11), collate_fn=only, num_workers=workers))

    whole = images(0, workers=0)
    for i, item in enumerate(whole):
        order = list(range(4))
        random.Random(f"order-5-{i // 4}").shuffle(order)
        chosen = next(image for image in (order * 2)[i % 4 :] if image != 2)
        expected = processor(Image.open(pairs[chosen][0]), size={"shortest_edge": 64}, return_tensors="pt")
        assert torch.equal(item["pixel_values"], expected["pixel_values"]), i
    for start, workers in ((0, 2), (6, 0), (6, 1)):
        for item, expected in zip(images(start, workers), whole[start:], strict=True):
            assert torch.equal(item["pixel_values"], expected["pixel_values"])


def test_script__launched_in_two_processes(base, data, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(Path(__file__).parents[2] / "training" / "panoptic.py")]
    (tmp_path / "classes.json").write_text('{"person": ["person"], "outside": ["sky", "grass"]}')
    options = arguments(base, data, tmp_path / "run", steps=40, train_backbone="2", holdout_every=2, learning_rate=4e-3)
    options |= {"gradient_accumulation_steps": 1, "threshold": 0.1, "log_steps": 20, "out_features": ["stage1"]}
    options["classes"] = tmp_path / "classes.json"
    for name, value in options.items():
        command += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    folder = tmp_path / "run" / "model"
    model = AutoModelForUniversalSegmentation.from_pretrained(folder)
    before, after = SparVisionModel.from_pretrained(base).state_dict(), model.vision_model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # of the two blocks that may be trained, the one that the head reads is
    assert changed and all(name.startswith("backbone.encoder.layers.0.") for name in changed)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == [0.4, 0.5, 0.6] and processor.label_ids_to_fuse == [1]
    assert model.config.id2label == {0: "person", 1: "outside"}
    card = (folder / "README.md").read_text()
    assert "pq" in card and str(tmp_path) not in card
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]

    # each process measured its share; together they are what one finds
    measured = json.loads((tmp_path / "run" / "curve.json").read_text())[-1]
    images = open_segmentation_folder(data, classes=options["classes"])
    _, pairs = panoptic.split_pairs(images, Options(**options))
    again = measure(model.eval(), processor, images, pairs, {0}, Options(**options), Accelerator())
    assert again["images"] == 2 and again["pq"] > 0
    assert {"step": 40, **again} == measured


def test_training__learns_the_images_and_resumes_to_the_last_bit(base, data, tmp_path):
    # two images learned by heart, backbone frozen
    settings = {"steps": 120, "learning_rate": 4e-3, "holdout_every": 0, "images": 2, "save_steps": 60, "log_steps": 10}
    settings |= {"flip_probability": 0.0, "min_scale": 1.0, "max_scale": 1.0, "eval_steps": 120}
    settings |= {"gradient_accumulation_steps": 1}
    whole = tmp_path / "whole"
    folder = panoptic.train(Options(**arguments(base, data, whole, **settings)))
    curve = json.loads((whole / "curve.json").read_text())
    assert [point["step"] for point in curve] == [120]
    losses = [json.loads(line)["loss"] for line in (whole / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    assert curve[0]["pq"] > 50
    model = AutoModelForUniversalSegmentation.from_pretrained(folder)
    before, after = SparVisionModel.from_pretrained(base).state_dict(), model.vision_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = pipeline("image-segmentation", model=str(folder))(str(data / "images" / "0.png"), threshold=0.5)
    assert {"sky", "person"} <= {segment["label"] for segment in found}

    # as a run that was killed some steps after its first checkpoint left it
    killed = tmp_path / "killed"
    shutil.copytree(whole / "checkpoint-60", killed / "checkpoint-60")
    (killed / "log.jsonl").write_text("".join((whole / "log.jsonl").read_text().splitlines(keepends=True)[:8]))
    with pytest.raises(ValueError, match="Go on with --resume"):
        panoptic.train(Options(**arguments(base, data, killed, **settings)))
    with pytest.raises(ValueError, match=r"--seed \(was 0, is 1\)"):
        panoptic.train(Options(**arguments(base, data, killed, **settings, seed=1, resume=True)))
    resumed = panoptic.train(Options(**arguments(base, data, killed, **settings, resume=True)))
    assert json.loads((killed / "curve.json").read_text()) == curve
    rows = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, killed)]
    assert [(a["step"], a["loss"]) for a in rows[0]] == [(b["step"], b["loss"]) for b in rows[1]]
    expected = model.state_dict()
    for name, tensor in AutoModelForUniversalSegmentation.from_pretrained(resumed).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_options__bad_ones_are_refused(base, data, tmp_path):
    for wrong, message in [
        ({"train_backbone": "some"}, "--train_backbone"),
        ({"holdout_every": 1}, "--holdout_every"),
        ({"min_scale": 2.0}, "--min_scale"),
        ({"threshold": 1.5}, "--threshold"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0 must be above 0"),
        ({"eval_steps": 0}, "--eval_steps 0 must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Options(**arguments(base, data, tmp_path, **wrong))
    with pytest.raises(FileNotFoundError, match="masks"):
        panoptic.train(Options(**arguments(base, data / "images", tmp_path)))
    for wrong, message in [
        ({"holdout_every": 5}, "holds out none"),  # of four images: not to be called held out
        ({"holdout_every": 0, "train_backbone": "9"}, "9 blocks are to be trained, and the backbone has 2"),
        ({"holdout_every": 0, "min_area": 0.9, "things": list(CLASSES)}, "has a segment"),
    ]:
        with pytest.raises(ValueError, match=message):
            panoptic.train(Options(**arguments(base, data, tmp_path, **wrong)))
    assert not list(tmp_path.iterdir())
