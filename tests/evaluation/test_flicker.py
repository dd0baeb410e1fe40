"""Flicker counts pixels that stand still and change their class."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import spar_hf  # noqa: F401  # registers the pipeline
from spar_hf.data.segmentation_sets import open_folder
from spar_hf.evaluation.command import main
from spar_hf.evaluation.evaluator import count_images
from spar_hf.evaluation.flicker import Flicker
from spar_hf.evaluation.inference import Prediction
from spar_hf.utils.errors import UsageError


def test_against_a_plain_count():
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 40, (12, 17, 3), dtype=np.uint8)]
    for _ in range(4):
        frames.append(np.clip(frames[-1].astype(int) + rng.integers(-12, 13, (12, 17, 3)), 0, 255).astype(np.uint8))
    maps = [rng.integers(0, 3, (12, 17)) for _ in frames]
    flicker, still, changed = Flicker(tolerance=8), 0, 0
    for number, (frame, labels) in enumerate(zip(frames, maps, strict=True)):
        flicker.add(Image.fromarray(frame), labels)
        for i in range(12 if number else 0):
            for j in range(17):
                if all(abs(int(frame[i, j, c]) - int(frames[number - 1][i, j, c])) <= 8 for c in range(3)):
                    still += 1
                    changed += int(labels[i, j] != maps[number - 1][i, j])
    assert 0 < changed < still and flicker.value == changed / still


def test_sequences_of_other_sizes_begin_anew_and_nothing_is_no_number():
    flicker = Flicker()
    flicker.add(Image.new("RGB", (4, 3)), np.zeros((3, 4), int))
    flicker.add(Image.new("RGB", (5, 3)), np.ones((3, 5), int))
    assert math.isnan(flicker.value)
    flicker.begin()  # a video of the same size
    flicker.add(Image.new("RGB", (5, 3)), np.zeros((3, 5), int))
    assert flicker.still == 0
    with pytest.raises(ValueError, match="label map"):
        flicker.add(Image.new("RGB", (5, 3)), np.ones((5, 3), int))


class Repeat:  # of the model of a run: label maps that depend on the image alone
    runs = [None]

    def __init__(self, process, processes):
        self.accelerator = SimpleNamespace(
            process_index=process, num_processes=processes, is_main_process=False, device=torch.device("cpu")
        )
        self.accelerator.reduce = lambda counts, how: counts
        self.accelerator.gather = lambda peaks: peaks

    def __call__(self, image):
        return [(Prediction(torch.from_numpy(np.asarray(image)[..., 0] % 3).long(), 0.0, 0.0), None)]


def test_evaluate_counts_it_over_frames_however_they_are_shared_out(tmp_path, checkpoint):
    folder, rng = tmp_path / "clip", np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("cat\ndog\ngrass\n")
    frame = rng.integers(0, 256, (66, 90, 3))
    for number in range(6):  # a moving strip of noise; the last frames are of another size
        if number == 4:
            frame = frame[:, :80]
        frame = frame.copy()
        frame[:, 10 * number : 10 * number + 20] = rng.integers(0, 256, (66, 20, 3))
        Image.fromarray(frame.astype(np.uint8)).save(folder / "images" / f"{number:02}.png")
        Image.fromarray(np.zeros(frame.shape[:2], np.uint8)).save(folder / "masks" / f"{number:02}.png")
    model = checkpoint("base")
    arguments = [
        "--dataset",
        str(folder),
        "--model",
        str(model),
        "--shortest_edge",
        "64",
        "--no_boundary",
        "--no_warmup",
    ]
    report = main([*arguments, "--flicker"])

    segment, flicker = pipeline("open-vocab-segmentation", model=str(model)), Flicker()
    for path in sorted((folder / "images").iterdir()):
        image = Image.open(path)
        labels = ["cat", "dog", "grass"]
        found = segment(image, candidate_labels=labels, size={"shortest_edge": 64}, output="map")
        flicker.add(image, found["map"])
    assert 0 < flicker.changed < flicker.still
    assert report["runs"][0]["flicker"] == flicker.value
    assert "flicker" not in main(arguments)["runs"][0]

    data = open_folder(folder)

    def counts(process, processes):
        return count_images(data, Repeat(process, processes), None, None, 30, flicker=True).flicker

    whole = counts(0, 1)
    assert whole[0, 1] > 0
    for processes in (2, 3, 6):
        np.testing.assert_array_equal(sum(counts(i, processes) for i in range(processes)), whole)


def test_images_of_no_video_are_refused(dataset, checkpoint):
    for number, name in enumerate(("street", "park", "lake", "hill", "town")):
        for kind in ("images", "masks"):
            (dataset / kind / f"image{number}.png").rename(dataset / kind / f"{name}.png")
    command = ["--dataset", str(dataset), "--model", str(checkpoint("base")), "--flicker"]
    with pytest.raises(UsageError, match="no two images are frames of one video"):
        main(command)


def test_the_last_frame_of_a_video_and_the_first_of_the_next_are_no_pair(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "clips"
    videos = [["clip1_8.png", "clip1_9.png"], ["clip2_0.png", "clip2_1.png"], ["sub/clip2_2.png", "sub/clip2_3.png"]]
    (folder / "images" / "sub").mkdir(parents=True)
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("cat\ndog\ngrass\n")
    frame, expected = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8), np.zeros(2, int)
    for names in videos:
        flicker = Flicker()
        for name in names:  # all of them nearly alike: between videos pixels would stand still too
            frame = (frame ^ (rng.random(frame.shape) < 0.1)).astype(np.uint8)
            Image.fromarray(frame).save(folder / "images" / name)
            Image.new("L", (50, 40)).save(folder / "masks" / name.removeprefix("sub/"))
            flicker.add(Image.fromarray(frame), frame[..., 0] % 3)
        expected += (flicker.still, flicker.changed)
    data = open_folder(folder)
    for processes in (1, 4):  # of four, one begins with the second frame of a video
        found = [
            count_images(data, Repeat(i, processes), None, None, 30, flicker=True).flicker for i in range(processes)
        ]
        np.testing.assert_array_equal(sum(found)[0], expected)
    assert 0 < expected[1] < expected[0] == 3 * 40 * 50
