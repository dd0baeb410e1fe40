"""The training of panoptic heads: segments of a mask, the measure, the script really launched, and its resume."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from changing import change_weights
from interrupting import at_call
from launching import ENVIRONMENT, TRAINING, TWO_PROCESSES, signal_all
from PIL import Image
from safetensors.torch import load_file
from tiny_models import randomise, tiny_config
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline

from spar_hf import (
    SparForUniversalSegmentation,
    SparImageProcessorPil,
    SparUniversalImageProcessorPil,
    SparUniversalSegmentationOutput,
    SparVisionModel,
)
from spar_hf.data.segmentation_sets import open_folder
from spar_hf.heads.panoptic import PanopticTrainer, load_image_processor, main, split_data
from spar_hf.heads.panoptic_options import FREE, PanopticOptions, PanopticViews, upgrade
from spar_hf.heads.panoptic_quality import measure_quality
from spar_hf.heads.segments import PanopticImages, find_segments, first_item, thing_classes
from spar_hf.utils.checkpoints import settings_of
from spar_hf.utils.errors import MissingFiles, NotFinite, UsageError
from spar_hf.utils.sample_record import read_samples

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


def arguments(base, data, output, **options) -> list[str]:
    """A command line of a small head."""
    small = {"hidden_dim": 32, "num_queries": 8, "train_num_points": 256, "decoder_layers": 3, "shortest_edge": 64}
    small |= {"workers": 0, "log_steps": 2, "things": ["person"], "gradient_accumulation_steps": 2}
    values = {"model": base, "dataset": data, "output": output, **small, **options}
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [part for name, value in lists.items() for part in (f"--{name}", *map(str, value))]


def test_a_head_reads_images_as_its_model_does(base, tmp_path):
    """Everything that the folder says of pixels but the size, which is that of the training."""
    shutil.copytree(base, tmp_path / "base")
    SparImageProcessorPil(do_normalize=False, do_resize=False, rescale_factor=1 / 510).save_pretrained(
        tmp_path / "base"
    )
    image_processor = load_image_processor(str(tmp_path / "base"), 64, [1, 2])
    image_processor.save_pretrained(tmp_path / "head")
    for reader in (image_processor, AutoImageProcessor.from_pretrained(tmp_path / "head")):
        pixels = reader(Image.new("RGB", (160, 80), "white"), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 64, 128) and torch.equal(pixels, torch.full_like(pixels, 0.5))
        assert type(reader) is SparUniversalImageProcessorPil and reader.label_ids_to_fuse == [1, 2]


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
    with pytest.raises(UsageError, match="tree"):
        thing_classes(["person", "tree"], CLASSES)
    with pytest.raises(UsageError, match="9"):
        thing_classes(["9"], CLASSES)


def quality_by_hand(prediction, target, classes) -> dict[int, float]:
    """Panoptic quality per class as COCO defines it; both are lists of (class, mask), what is in no mask is ignored."""
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
        # a segment that lies mostly on ignored pixels is not counted as false
        counted = [a for a in found if (a & ~known).sum() <= a.sum() / 2]
        total = 0.5 * (len(counted) + len(wanted))
        if total:
            result[class_id] = sum(overlaps) / total
    return result


def test_measure_quality__the_definition_of_coco(data):
    """Right, wrong, missed and ignored segments against a computation by hand."""

    class Drawn(torch.nn.Module):
        """A 'model' whose queries are the segments drawn below."""

        def forward(self, pixel_values):
            height, width = pixel_values.shape[-2:]
            masks = torch.full((4, height, width), -30.0)
            masks[0, :28], masks[1, 18:60, 10:32] = 5, 15  # sky, one person; the other person and the grass are missed
            masks[2, 40:, 75:] = 5  # a person that is none
            masks[3, :3, 40:] = 15  # on ignored pixels
            return SparUniversalSegmentationOutput(
                class_queries_logits=torch.nn.functional.one_hot(torch.tensor([[1, 0, 0, 2]]), 4).float() * 30,
                masks_queries_logits=masks[None],
                mask_sizes=torch.tensor([[height, width]]),
            )

    processor = SparUniversalImageProcessorPil(label_ids_to_fuse=[1, 2])
    images = open_folder(data).select([0])
    row = measure_quality(Drawn(), processor, images, {0}, 0.001, threshold=0.5, accelerator=Accelerator())

    mask = np.array(Image.open(data / "masks" / "0.png"))
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
    """The order is a shuffle with a seed of its own; an image without a segment is passed over."""
    shutil.copytree(data, tmp_path / "data")
    Image.new("L", Image.open(data / "masks" / "2.png").size, 255).save(tmp_path / "data" / "masks" / "2.png")
    views = PanopticViews(shortest_edge=64, flip_probability=0, max_scale=1, min_scale=1)
    processor = SparUniversalImageProcessorPil()

    def images(start, workers):
        made = PanopticImages(open_folder(tmp_path / "data"), {0}, 0.001, 100, processor, views, seed=5)
        return list(DataLoader(made, 1, sampler=range(start, 11), collate_fn=first_item, num_workers=workers))

    whole = images(0, workers=0)
    for i, item in enumerate(whole):
        order = list(range(4))
        random.Random(f"order-5-{i // 4}").shuffle(order)
        chosen = next(image for image in (order * 2)[i % 4 :] if image != 2)
        expected = processor(
            Image.open(data / "images" / f"{chosen}.png"), size={"shortest_edge": 64}, return_tensors="pt"
        )
        assert torch.equal(item["pixel_values"], expected["pixel_values"]), i
    for start, workers in ((0, 2), (6, 0), (6, 1)):
        for item, expected in zip(images(start, workers), whole[start:], strict=True):
            assert torch.equal(item["pixel_values"], expected["pixel_values"])


@pytest.mark.slow
def test_script__launched_in_two_processes(base, data, tmp_path):
    (tmp_path / "classes.json").write_text('{"person": ["person"], "outside": ["sky", "grass"]}')
    options = {"steps": 40, "train_backbone": "2", "holdout_every": 2, "learning_rate": 4e-3, "segment_threshold": 0.1}
    options |= {"gradient_accumulation_steps": 1, "log_steps": 20, "out_features": ["stage1"]}
    options["merge_classes"] = tmp_path / "classes.json"
    command = [*TWO_PROCESSES, str(TRAINING / "panoptic.py"), *arguments(base, data, tmp_path / "run", **options)]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
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
    folder_options = PanopticOptions.parse(arguments(base, data, tmp_path, **options)).data
    _, held_out = split_data(open_folder(data, options["merge_classes"]), folder_options)
    again = measure_quality(model.eval(), processor, held_out, {0}, 0.001, 0.1, Accelerator())
    assert again["images"] == 2 and again["pq"] > 0
    assert {"step": 40, **again} == measured


def as_version_0_1_stored_it(file):
    """Rewrites the settings in a checkpoint under the option names of version 0.1."""
    state = json.loads(file.read_text())
    settings = state["settings"]
    assert settings["include"] == ["*"] and settings["mixed_precision"] == "no"
    settings |= {"data": settings.pop("dataset"), "photos": settings.pop("limit"), "include": "*"}
    del state["start_weights"]
    file.write_text(json.dumps(state))


@pytest.mark.slow
def test_training__learns_the_images_and_resumes_to_the_last_bit(base, data, tmp_path):
    # two images learned by heart, backbone frozen
    settings = {"steps": 120, "learning_rate": 4e-3, "holdout_every": 0, "limit": 2, "save_steps": 60, "log_steps": 10}
    settings |= {"flip_probability": 0.0, "min_scale": 1.0, "max_scale": 1.0, "eval_steps": 120}
    settings |= {"gradient_accumulation_steps": 1}
    whole = tmp_path / "whole"
    folder = main(arguments(base, data, whole, **settings))
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
    with pytest.raises(UsageError, match="--resume"):
        main(arguments(base, data, killed, **settings))
    with pytest.raises(UsageError, match=r"--seed \(was 0, is 1\)"):
        main(arguments(base, data, killed, **settings, seed=1, resume=True))
    kept = shutil.copytree(base, tmp_path / "base")
    change_weights(base)
    with pytest.raises(UsageError, match="those of --model changed since the run began"):
        main(arguments(base, data, killed, **settings, resume=True))
    shutil.copytree(kept, base, dirs_exist_ok=True)
    as_version_0_1_stored_it(killed / "checkpoint-60" / "state.json")
    old = settings | {"photos": settings["limit"]}
    resumed = main(arguments(base, data, killed, **{k: v for k, v in old.items() if k != "limit"}, resume=True))
    assert json.loads((killed / "curve.json").read_text()) == curve
    rows = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, killed)]
    assert [(a["step"], a["loss"]) for a in rows[0]] == [(b["step"], b["loss"]) for b in rows[1]]
    expected = model.state_dict()
    for name, tensor in AutoModelForUniversalSegmentation.from_pretrained(resumed).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_training__sigterm_stops_after_the_step(base, data, tmp_path, monkeypatch):
    settings = {"steps": 6, "holdout_every": 0, "eval_steps": 6, "log_steps": 1}
    whole = main(arguments(base, data, tmp_path / "whole", **settings))
    # at the first of two images of the third step
    monkeypatch.setattr(PanopticTrainer, "_train_on", at_call(5, PanopticTrainer._train_on))
    assert main(arguments(base, data, tmp_path / "run", **settings)) is None
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3"]
    assert not (tmp_path / "run" / "model").exists()
    resumed = main(arguments(base, data, tmp_path / "run", **settings, resume=True))
    weights = [load_file(folder / "model.safetensors") for folder in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_training__sigterm_to_all_processes_leaves_a_checkpoint(base, data, tmp_path):
    """As schedulers send it: to the workers that decode images, too."""
    options = arguments(base, data, tmp_path / "run", steps=100_000, holdout_every=0, workers=1, log_steps=1)
    run = subprocess.Popen(
        [sys.executable, str(TRAINING / "panoptic.py"), *options], env=ENVIRONMENT, stderr=subprocess.PIPE
    )
    log = tmp_path / "run" / "log.jsonl"
    while run.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.2)
    signal_all(run, signal.SIGTERM)
    _, said = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM and b"written:" not in said, said[-3000:]
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_options__names_of_version_0_1():
    options = PanopticOptions.parse(["--model", "m", "--data", "d", "--photos", "3", "--output", "o"])
    assert (options.data.dataset, options.data.limit) == ("d", 3)
    assert options.run.mixed_precision is None  # what `accelerate launch` was told counts


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [("classes", "merge_classes", "c.json"), ("min_area", "min_region_area", 0.5), ("threshold", "segment_threshold", 0.1),
     ("data", "dataset", "d"), ("photos", "limit", 3)],
)  # fmt: skip
def test_options__earlier_names_are_read(old, new, value):
    given = {"model": "m", "dataset": "d", "output": "o"}
    options = PanopticOptions.from_flat(**(given | {new: value}))
    given.pop(new, None)
    command = [word for name, text in (given | {old: value}).items() for word in (f"--{name}", str(text))]
    assert PanopticOptions.parse(command) == PanopticOptions.from_flat(**given, **{old: value}) == options
    stored = settings_of(options, FREE)
    assert upgrade({old if name == new else name: value for name, value in stored.items()}) == stored


def test_options__bad_ones_are_refused(base, data, tmp_path):
    for wrong, message in [
        ({"train_backbone": "some"}, "--train_backbone"),
        ({"holdout_every": 1}, "--holdout_every"),
        ({"min_scale": 2.0}, "--min_scale"),
        ({"segment_threshold": 1.5}, "--segment_threshold"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0 must be above 0"),
        ({"eval_steps": 0}, "--eval_steps 0 must be above 0"),
        ({"workers": -1}, "--workers -1"),
        ({"report_to": "tensorbord"}, "--report_to tensorbord: use one of auto, none, .*tensorboard"),
    ]:
        with pytest.raises(UsageError, match=message):
            PanopticOptions.parse(arguments(base, data, tmp_path, **wrong))
    with pytest.raises(MissingFiles, match="masks"):
        main(arguments(base, data / "images", tmp_path))
    for wrong, message in [
        ({"holdout_every": 5}, "holds out none"),  # of four images: not to be called held out
        ({"holdout_every": 0, "train_backbone": "9"}, "9: the backbone has 2 blocks"),
        (
            {"holdout_every": 0, "train_backbone": "1", "out_features": "stage1"},
            "reads none after block 1.*Give 2 or more",
        ),
        ({"holdout_every": 0, "min_region_area": 0.9, "things": list(CLASSES)}, "has a segment"),
    ]:
        with pytest.raises(UsageError, match=message):
            main(arguments(base, data, tmp_path, **wrong))
    assert not list(tmp_path.iterdir())


def test_training__a_few_bad_steps_are_skipped_and_more_end_it(base, data, tmp_path, monkeypatch):
    settings = {"steps": 4, "holdout_every": 0, "eval_steps": 1, "log_steps": 1}
    forward, calls = SparForUniversalSegmentation.forward, []

    def spoiled(model, *args, **kwargs):
        outputs = forward(model, *args, **kwargs)
        if outputs.loss is not None:
            calls.append(args)
            if len(calls) in bad:
                outputs.loss = outputs.loss * float("nan")
        return outputs

    monkeypatch.setattr(SparForUniversalSegmentation, "forward", spoiled)
    bad = {3}  # the first of two images of the second step
    folder = main(arguments(base, data, tmp_path / "run", **settings))
    rows = [json.loads(row, parse_constant=pytest.fail) for row in (tmp_path / "run" / "log.jsonl").open()]
    assert [row["loss"] is None for row in rows] == [False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())

    bad, calls = set(range(3, 9)), []
    with pytest.raises(NotFinite, match="in 2 steps"):
        main(arguments(base, data, tmp_path / "all", **settings, max_bad_steps=1))
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "all/model/model.safetensors").values())
    with pytest.raises(UsageError, match="--overwrite"):
        main(arguments(base, data, tmp_path / "all", **settings))


def test_training__held_out_images_stay_so_when_images_are_added(base, data, tmp_path, monkeypatch):
    own = shutil.copytree(data, tmp_path / "own")
    settings = {"steps": 2, "holdout_every": 3, "eval_steps": 2, "log_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(PanopticTrainer, "_train_on", at_call(1, PanopticTrainer._train_on))
        assert main(arguments(base, own, tmp_path / "run", **settings)) is None
    before = read_samples(tmp_path / "run")
    for part in ("images", "masks"):
        first = sorted((own / part).iterdir())[0]
        shutil.copy(first, first.with_name(f"000{first.suffix}"))
    with pytest.raises(UsageError, match=r"1 added \(.*000"):
        main(arguments(base, own, tmp_path / "run", **settings, resume=True))
    command = [*arguments(base, own, tmp_path / "run", **settings, resume=True), "--allow_changed_data", "true"]
    assert main(command)
    after = read_samples(tmp_path / "run")
    assert after["held_out"] == before["held_out"] and len(after["train"]) == len(before["train"]) + 1
