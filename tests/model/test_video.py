"""Frames of a video: the average over time against a plain loop, scene cuts, motion, memory and wrong arguments."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from spar_hf import SparImageProcessorPil
from spar_hf.model.image_streams import EncodedImage
from spar_hf.model.video import FrameAverage

WORDS = ["road", "sky"]


@pytest.fixture
def segment(two_towers, tokenizer):
    return pipeline(
        "open-vocab-segmentation", model=two_towers, tokenizer=tokenizer, image_processor=SparImageProcessorPil()
    )


def frame(features):
    return EncodedImage(features, torch.zeros(3, 16 * features.shape[1], 16 * features.shape[2]), (30, 40))


def features(seed, dim=6, height=4, width=5):
    return torch.rand(dim, height, width, generator=torch.Generator().manual_seed(seed)) + 0.1


def plain_average(maps, smoothing, motion):
    """One patch at a time, in numpy."""
    before = average = None
    for values in maps:
        unit = values.double().numpy()
        unit = unit / np.linalg.norm(unit, axis=0)
        if before is None:
            before, average = unit, unit
            continue
        new = np.empty_like(unit)
        height, width = unit.shape[1:]
        for i in range(height):
            for j in range(width):
                rows = range(max(0, i - motion), min(height, i + motion + 1))
                columns = range(max(0, j - motion), min(width, j + motion + 1))
                near = [(unit[:, i, j] @ before[:, k, m], k, m) for k in rows for m in columns]
                likeness, k, m = max(near)
                weight = smoothing * max(likeness, 0)
                new[:, i, j] = weight * average[:, k, m] + (1 - weight) * unit[:, i, j]
        before, average = unit, new
    return average


@pytest.mark.parametrize(("smoothing", "motion"), [(0.6, 0), (0.6, 1), (0.9, 2), (0.0, 1)])
def test_the_average_equals_a_plain_loop(smoothing, motion):
    maps = [features(seed) for seed in range(4)]
    average = FrameAverage(smoothing, motion, scene_cut=-1)
    for values in maps:
        found = average(frame(values)).feature_map
    np.testing.assert_allclose(found.numpy(), plain_average(maps, smoothing, motion), atol=1e-6)


def test_an_average_of_unit_features_is_an_average_of_logits():
    maps, words = [features(seed) for seed in range(3)], torch.nn.functional.normalize(torch.randn(7, 6), dim=1)
    average = FrameAverage(0.5, motion=0, scene_cut=-1)
    mean = before = None
    for values in maps:
        unit = torch.nn.functional.normalize(values, dim=0)
        logits = torch.einsum("kd,dhw->khw", words, unit)
        if mean is None:
            mean = logits
        else:
            weight = 0.5 * (unit * before).sum(0)
            mean = weight * mean + (1 - weight) * logits
        before = unit
        found = average(frame(values)).feature_map
    torch.testing.assert_close(torch.einsum("kd,dhw->khw", words, found), mean, atol=1e-5, rtol=0)


def test_what_moves_takes_its_average_along():
    maps = features(0)
    average = FrameAverage(0.8, motion=1)
    average(frame(maps))
    moved = torch.roll(maps, 1, dims=2)
    found = average(frame(moved)).feature_map
    unit = torch.nn.functional.normalize(moved, dim=0)
    torch.testing.assert_close(found[:, :, 1:], unit[:, :, 1:])  # the average of equal features is that feature
    standing = FrameAverage(0.8, motion=0)
    standing(frame(maps))
    assert (standing(frame(moved)).feature_map[:, :, 1:] - unit[:, :, 1:]).abs().max() > 0.05


def test_a_scene_cut_or_another_size_begins_anew():
    average = FrameAverage(0.9, scene_cut=0.5)
    average(frame(features(0)))
    other = -features(1)  # nothing alike
    torch.testing.assert_close(average(frame(other)).feature_map, torch.nn.functional.normalize(other, dim=0))
    assert average.cuts == 1
    larger = features(2, height=6)
    torch.testing.assert_close(average(frame(larger)).feature_map, torch.nn.functional.normalize(larger, dim=0))
    assert average.cuts == 1  # a change of size is no cut


def test_results_come_frame_by_frame_and_nothing_piles_up(segment):
    read = []

    def frames():
        for number in range(40):
            read.append(number)
            yield Image.new("RGB", (48, 32), (number, 100, 100))

    results = segment.stream(frames(), WORDS, output="map")
    assert read == []
    for number, found in enumerate(results):
        assert found["map"].shape == (32, 48) and len(read) <= number + 2
    assert number == 39


def test_without_smoothing_frames_are_those_of_the_pipeline(segment):
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)) for _ in range(3)]
    for found, image in zip(segment.stream(frames, WORDS, smoothing=0, output="map"), frames, strict=True):
        np.testing.assert_array_equal(found["map"], segment(image, candidate_labels=WORDS, output="map")["map"])


def test_options_of_the_call_reach_the_frames(segment):
    frames = [Image.new("RGB", (48, 32))]
    (found,) = segment.stream(frames, WORDS, size={"longest_edge": 96}, background="road", output="map")
    assert found["background"] == 0 and found["map"].shape == (32, 48)
    (segments,) = segment.stream(frames, WORDS)
    assert set(segments[0]) == {"label", "score", "mask"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 1.0}, "below 1"),
        ({"smoothing": -0.1}, "at least 0"),
        ({"motion": -1}, "whole number"),
        ({"scene_cut": 2}, "cosine"),
        ({"tile": 512}, "tile"),
    ],
)
def test_wrong_arguments_are_refused_before_a_frame_is_read(segment, options, message):
    with pytest.raises(ValueError, match=message):
        segment.stream(iter(["no image"]), WORDS, **options)
    with pytest.raises(ValueError, match="candidate_labels"):
        segment.stream(iter(["no image"]))


def test_a_frame_that_cannot_be_read_is_skipped_where_asked(segment, picture):
    frames = [picture, "/nowhere/frame.png", picture]
    found = list(segment.stream(frames, WORDS, output="map", on_error="skip"))
    assert "nowhere" in found[1]["error"] and set(found[1]) == {"error"}
    alone = list(segment.stream([picture, picture], WORDS, output="map"))
    assert all((found[i]["map"] == map_["map"]).all() for i, map_ in zip((0, 2), alone, strict=True))
    with pytest.raises(FileNotFoundError):
        list(segment.stream(frames, WORDS, output="map"))


def test_motion_beyond_the_frame_and_as_a_float(segment):
    """A frame of 3 rows of patches has nothing 4 rows away."""
    maps = [features(seed, height=3, width=12) for seed in (1, 2)]
    averages = [FrameAverage(0.5, motion) for motion in (4.0, 12)]
    found = [[average(frame(map_)).feature_map for map_ in maps] for average in averages]
    expected = plain_average(maps, 0.5, 12)
    torch.testing.assert_close(found[1][1], torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)
    assert found[0][1].shape == (6, 3, 12)


def test_frames_that_are_encoded_are_taken_as_they_are(segment, picture):
    encoded = segment.encode(picture)
    assert segment.encode(encoded) is encoded
    found = [next(iter(segment.stream([one], WORDS, output="map")))["map"] for one in (picture, encoded)]
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("one", [np.zeros((64, 96, 3), np.uint8), "clip.mp4", Image.new("RGB", (96, 64))])
def test_a_single_image_is_no_stream(segment, one):
    """The rows of an array would be taken for frames."""
    with pytest.raises(ValueError, match="several images, not one"):
        segment.stream(one, WORDS)
