"""The order of training images, and the hold-out rule."""

import json
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from spar_hf.data import order
from spar_hf.data.order import MapOrder, ShuffledStream, is_excluded, is_held_out, split_held_out, split_images
from spar_hf.data.sources import Files
from spar_hf.utils.errors import UsageError


def test_shuffled_stream__whoever_asks_and_one_shuffle_an_epoch(monkeypatch):
    """Against a shuffle of all numbers for every single one: in turn, from the middle, every third one, backwards."""
    seeds = []

    class Counted(random.Random):
        def __init__(self, seed):
            seeds.append(seed)
            super().__init__(seed)

    def anew(index):
        order = list(range(7))
        random.Random(f"order-3-{index // 7}").shuffle(order)
        return order[index % 7]

    expected = [anew(i) for i in range(30)]
    assert sorted(expected[7:14]) == list(range(7)) and expected[:7] != expected[7:14] != expected[14:21]
    monkeypatch.setattr(order.random, "Random", Counted)
    for asked in (range(30), range(11, 30), range(2, 30, 3), range(29, -1, -1)):
        stream = ShuffledStream(7, "order-3")
        seeds.clear()
        assert [stream[i] for i in asked] == [expected[i] for i in asked]
        assert len(seeds) == len({i // 7 for i in asked})


@pytest.mark.parametrize("every", [0, 1, 2, 5])
def test_hold_out_rule(every):
    train, held_out = split_held_out(12, every)
    assert held_out == [i for i in range(12) if is_held_out(i, every)]
    assert held_out == ([] if every == 0 else list(range(every - 1, 12, every)))
    assert sorted(train + held_out) == list(range(12))


def test_split__every_source_by_itself_and_after_exclusion():
    sources = [Files([f"a/{i}.jpg" for i in range(5)]), Files([f"b/{i}.jpg" for i in range(4)])]
    train, held_out = split_images(sources, exclude=["a/1"], holdout_every=2)
    assert [train.name(i) for i in range(len(train))] == ["a/0.jpg", "a/3.jpg", "b/0.jpg", "b/2.jpg"]
    assert [held_out.name(i) for i in range(len(held_out))] == ["a/2.jpg", "a/4.jpg", "b/1.jpg", "b/3.jpg"]
    with pytest.raises(UsageError, match="--exclude"):
        split_images(sources, exclude=["*"], holdout_every=2)
    assert is_excluded("a/1.jpg", ["1"]) and not is_excluded("a/1.jpg", ["1.jpg"])  # patterns of stems


def test_an_image_of_several_sources_is_held_out_of_all():
    """A folder and one within it, and rows of a table with one name: none is both trained on and measured."""
    folder = Files([f"a/{i}.jpg" for i in range(4)] + [f"a/b/{i}.jpg" for i in range(5)])
    within = Files([f"a/b/{i}.jpg" for i in range(5)])
    train, held_out = split_images([folder, within], exclude=[], holdout_every=3)
    trained, kept = ([part.name(i) for i in range(len(part))] for part in (train, held_out))
    assert not set(trained) & set(kept) and len(trained) + len(kept) == 14
    assert {"a/2.jpg", "a/b/1.jpg", "a/b/4.jpg", "a/b/2.jpg"} == set(kept)
    train, held_out = split_images([Files(["x.jpg", "y.jpg", "x.jpg", "z.jpg"])], exclude=[], holdout_every=3)
    assert [train.name(i) for i in range(len(train))] == ["y.jpg", "z.jpg"] and len(held_out) == 2


@pytest.mark.parametrize("other", ["absolute", "list elsewhere", "linked folder", "linked files"])
def test_an_image_is_held_out_under_whatever_name_it_is_given(tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "lists", "links"):
        Path(folder).mkdir()
    files = [Path("photos", f"{i}.jpg") for i in range(7)]
    for file in files:
        file.touch()
        Path("links", file.name).symlink_to(file.absolute())
    Path("linked").symlink_to("photos")
    again = {
        "absolute": [str(file.absolute()) for file in files],
        "list elsewhere": [f"lists/../{file}" for file in files],
        "linked folder": [f"linked/{file.name}" for file in files],
        "linked files": [f"links/{file.name}" for file in files],
    }[other]
    sources = [Files([str(file) for file in files]), Files(again[1:])]  # the first is left out, so positions differ
    parts = split_images(sources, exclude=[], holdout_every=3)
    names = [{Path(part.name(i)).name for i in range(len(part))} for part in parts]
    assert names == [{"0.jpg", "1.jpg", "4.jpg"}, {"2.jpg", "3.jpg", "5.jpg", "6.jpg"}]
    held_out = [parts[1].name(i) for i in range(len(parts[1]))]
    resumed = order.split_by_name(sources, [np.arange(7), np.arange(6)], held_out)
    assert [len(part) for part in resumed] == [len(part) for part in parts] == [5, 8]


def test_patterns_of_exclude_are_compared_with_whole_stems():
    """As those of `evaluate`: a dot is part of the stem, and the key of a row has no suffix."""
    assert is_excluded("photos/cat.2.jpg", ["cat.2"]) and is_excluded("photos/cat.2.jpg", ["cat*"])
    assert not is_excluded("photos/cat.2.jpg", ["cat"]) and not is_excluded("photos/cat.2.jpg", ["cat.2.*"])
    assert is_excluded("0001.left", ["0001.left"]) and not is_excluded("0001.left", ["0001"])


def test_map_order__processes_share_one_stream():
    images, _ = split_images([Files([f"{i}.jpg" for i in range(7)])], exclude=[], holdout_every=8)

    def first(count, process=0, processes=1, start=None):
        stream = iter(MapOrder(images, 3, process, processes, start))
        return [next(stream) for _ in range(count)]

    alone = first(12)
    assert [sample.index for sample in alone] == list(range(12))
    for process in range(3):
        assert first(4, process, 3) == [
            order.Sample(sample.index, sample.name, sample.source, [turn + 1])
            for turn, sample in enumerate(alone[process::3])
        ]
    assert first(4, start=alone[7].after) == alone[8:]
    assert len({sample.name for sample in alone[:7]}) == 7
    assert np.diff([sample.after[0] for sample in alone]).tolist() == [1] * 11


@pytest.mark.parametrize("changes", [(2, 1), (1, 3), (4, 2, 3, 1)])
@pytest.mark.parametrize("unread", [set(), {0, 2, 4, 9, 12, 13, 21}])
def test_map_order__another_number_of_processes_sees_what_is_left(changes, unread):
    """Simulated runs whose number of processes changes twice; the numbers in `unread` are of images that cannot be read."""
    images, _ = split_images([Files([f"{i}.jpg" for i in range(7)])], exclude=[], holdout_every=0)
    expected = {sample.index: sample.name for sample in islice(MapOrder(images, 3, 0, 1), 200)}
    seen, after = {}, [[0]] * changes[0]
    for stage, processes in enumerate(changes):
        start = after if len(after) == processes else [MapOrder.share(after, processes)] * processes
        after = []
        for process in range(processes):
            stream = iter(MapOrder(images, 3, process, processes, start[process]))
            count, last = 0, start[process]
            while count < 3 + stage:  # equally many readable images in each process
                sample = next(stream)
                assert sample.index not in seen
                seen[sample.index], last = sample.name, sample.after
                count += sample.index not in unread
            after.append(json.loads(json.dumps(last)))  # as a checkpoint keeps it
    rest = [sample.index for sample in islice(MapOrder(images, 3, 0, 1, MapOrder.share(after, 1)), 30)]
    assert rest == sorted(rest) and not seen.keys() & set(rest)
    assert seen.keys() | set(rest) == set(range(max(rest) + 1))  # no number is missing, so no image in any epoch
    assert all(expected[index] == name for index, name in seen.items())
