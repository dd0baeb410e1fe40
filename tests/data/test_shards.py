"""Images in WebDataset shards: keys with dots, several columns, broken sidecars, map-style and streamed."""

import io
import itertools
import json
import logging
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from spar_hf.data.order import StreamOrder, split_images
from spar_hf.data.sources import ImageOptions, open_sources
from spar_hf.distillation.stream import listings_as_before
from spar_hf.utils.errors import UsageError


def png(value):
    file = io.BytesIO()
    Image.new("L", (40, 40), value).save(file, "PNG")
    return file.getvalue()


def value_of(source):
    return int(np.asarray(Image.open(io.BytesIO(source)))[0, 0])


def write(path, contents):
    """A shard of (name, bytes) or (name, grey value)."""
    with tarfile.open(path, "w") as tar:
        for name, content in contents:
            data = png(content) if isinstance(content, int) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(path)


def read(*shards, **options):
    """Key -> grey value of the images of shards; both ways of reading must agree."""
    (source,) = open_sources(ImageOptions(images=list(shards), **options))
    found = {source.key(i): value_of(source.source(i)) for i in range(len(source))}
    (table,) = open_sources(ImageOptions(images=list(shards), streaming=True, **options))
    assert {row["__key__"]: value_of(row["image"]["bytes"]) for row in table} == found
    return found


def test_keys_with_dots_are_images_of_their_own(tmp_path):
    shard = write(tmp_path / "a.tar", [(f"v/frame.{i:04}.png", i) for i in range(12)])
    assert read(shard) == {f"v/frame.{i:04}": i for i in range(12)}
    shard = write(tmp_path / "b.tar", [(f"IMG.2024.05.{i:02}.jpg", i) for i in range(5)])
    assert list(read(shard).values()) == list(range(5))
    shard = write(tmp_path / "c.tar", [(f"clip.f{i}.rgb.png", i) for i in range(3)])
    assert read(shard) == {f"clip.f{i}": i for i in range(3)}


SEVERAL = [(f"{x}.{kind}.jpg", 10 * i + j) for i, x in enumerate("xyz") for j, kind in enumerate(("depth", "rgb"))]


def test_photographs_come_before_depth_and_a_note_says_so(tmp_path, caplog):
    shard = write(tmp_path / "a.tar", SEVERAL)
    with caplog.at_level(logging.WARNING):
        assert read(shard) == {"x": 1, "y": 11, "z": 21}
    assert "rgb.jpg is read, before depth.jpg" in caplog.text and "--image_column" in caplog.text


@pytest.mark.parametrize("column", ["depth.jpg", ".depth.jpg", "png;depth.jpg"])
def test_a_column_is_chosen_as_people_write_it(tmp_path, column):
    shard = write(tmp_path / "a.tar", SEVERAL)
    assert read(shard, image_column=column) == {"x": 0, "y": 10, "z": 20}


def test_an_unknown_column_is_refused_with_those_there_are(tmp_path):
    shard = write(tmp_path / "a.tar", SEVERAL)
    with pytest.raises(UsageError, match=r"depth\.jpg, rgb\.jpg.*--image_column"):
        read(shard, image_column="left.jpg")
    with pytest.raises(UsageError, match=r"no images"):
        read(write(tmp_path / "b.tar", [("a.json", b"{}")]))


def test_formats_are_mixed_without_a_note(tmp_path, caplog):
    shards = [write(tmp_path / "a.tar", [("a.jpg", 1), ("b.png", 2)]), write(tmp_path / "b.tar", [("c.webp", 3)])]
    with caplog.at_level(logging.WARNING):
        assert read(*shards) == {"a": 1, "b": 2, "c": 3}
    assert "column" not in caplog.text


def test_broken_sidecars_stop_nothing(tmp_path):
    contents = [
        ("a.jpg", 1),
        ("a.json", b"{broken"),
        ("b.jpg", 2),
        ("b.json", b"\xff\xfe"),
        ("c.jpg", 3),
        ("c.npy", b"no"),
    ]
    assert read(write(tmp_path / "a.tar", contents)) == {"a": 1, "b": 2, "c": 3}


def test_no_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UsageError, match=r"a\.tar is no uncompressed tar"):
        read(str(tmp_path / "a.tar"))


def test_streams_are_split_among_processes_and_leave_held_out_images(tmp_path):
    shards = [write(tmp_path / f"{s}.tar", [(f"{s}-{i}.jpg", 20 * s + i) for i in range(10)]) for s in range(2)]
    options = ImageOptions(images=shards, streaming=True, holdout_every=3, shuffle_buffer=3)
    (table,) = open_sources(options)
    orders = [StreamOrder(table, options, 0, process, 2) for process in range(2)]
    held_out = {sample.name for sample in orders[0].held_out()}
    epoch = [itertools.takewhile(lambda sample: sample.after[0] == 0, order) for order in orders]
    first = [{sample.name for sample in samples} for samples in epoch]
    assert not first[0] & first[1] and not held_out & (first[0] | first[1])
    assert len(held_out | first[0] | first[1]) == 20


@pytest.fixture
def uneven(tmp_path):
    """A stream of two shards with 5 and 2 images, none of them held out."""
    shards = [
        write(tmp_path / f"{s}.tar", [(f"{s}-{i}.jpg", 20 * s + i) for i in range(n)]) for s, n in ((0, 5), (1, 2))
    ]
    options = ImageOptions(images=shards, streaming=True, holdout_every=10**9, shuffle_buffer=3)
    return open_sources(options)[0], options


def take(table, options, process, processes, start, count):
    return list(itertools.islice(StreamOrder(table, options, 0, process, processes, start), count))


def by_epoch(samples):
    """Names of the images seen in each epoch, in the order they were seen."""
    epochs = {}
    for sample in samples:
        epochs.setdefault(sample.index >> 40, []).append(sample.name)
    return epochs


def test_uneven_shards__each_process_begins_its_epochs_when_it_is_ready(uneven):
    first, second = (by_epoch(take(*uneven, process, 2, None, 40)) for process in (0, 1))
    assert {len(first[epoch]) for epoch in range(5)} == {2, 5}  # shards change their process from epoch to epoch
    for epoch in range(5):
        assert len(set(first[epoch] + second[epoch])) == len(first[epoch] + second[epoch]) == 7


@pytest.mark.parametrize(("before", "changes"), [((3, 1), [1]), ((3, 3), [3]), ((2, 1), [1, 3]), ((4,), [2, 1])])
def test_a_stream_on_another_number_of_processes_sees_every_image_once_an_epoch(uneven, before, changes):
    """Also those of an epoch that one process had finished and another had not, and after a second change."""
    runs = [take(*uneven, process, len(before), None, count) for process, count in enumerate(before)]
    seen = [sample for run in runs for sample in run]
    for number, processes in enumerate(changes):
        begun = [json.loads(json.dumps(run[-1].after)) for run in runs]  # as a checkpoint keeps it
        starts = [StreamOrder.share(begun, process, processes) for process in range(processes)]
        count = 2 if number + 1 < len(changes) else 30
        runs = [take(*uneven, process, processes, start, count) for process, start in enumerate(starts)]
        seen += [sample for run in runs for sample in run]
    assert len({sample.index for sample in seen}) == len(seen)
    epochs = by_epoch(seen)
    for epoch in range(4):
        assert len(set(epochs[epoch])) == len(epochs[epoch]) == 7


def test_several_columns_of_a_table(tmp_path, caplog):
    kinds = datasets.Features({"depth": datasets.Image(), "photo": datasets.Image(), "thumbnail": datasets.Image()})
    row = {name: [{"bytes": png(i), "path": None}] for i, name in enumerate(kinds)}
    datasets.Dataset.from_dict(row, features=kinds).save_to_disk(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        (source,) = open_sources(ImageOptions(images=[str(tmp_path / "saved")]))
    assert value_of(source.source(0)) == 1 and "photo is read, before depth, thumbnail" in caplog.text
    (source,) = open_sources(ImageOptions(images=[str(tmp_path / "saved")], image_column="depth"))
    assert value_of(source.source(0)) == 0


def test_equal_keys_of_several_shards_are_images_of_their_own(tmp_path):
    """Each shard numbers its images from 0. Names decide what is held out, and what a resumed run measures."""
    shards = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shards += [write(tmp_path / folder / f"{n}.tar", [(f"{i:04}.png", i) for i in range(9)]) for n in range(3)]
    sources = open_sources(ImageOptions(images=shards))
    train, held_out = split_images(sources, [], 20)
    assert (len(train), len(held_out)) == (52, 2)
    names = {listing.name(i) for listing in (train, held_out) for i in range(len(listing))}
    assert len(names) == 54
    again = listings_as_before(sources, [], [held_out.name(i) for i in range(2)])
    assert [len(listing) for listing in again] == [52, 2]
    assert sources[0].key(3) == "0003" and len(split_images(sources, ["0003"], 20)[0]) == 46  # patterns see keys alone
    (single,) = open_sources(ImageOptions(images=shards[:1]))
    assert single.name(3) == "a/0.tar 0003"


def test_equal_keys_of_rows_are_images_of_their_own(tmp_path):
    images = [Image.new("L", (40, 40), value) for value in range(4)]
    table = datasets.Dataset.from_dict({"image": images, "file_name": ["x.png", "y.png", "x.png", "z.png"]})
    table.save_to_disk(tmp_path / "rows")
    sources = open_sources(ImageOptions(images=[str(tmp_path / "rows")]))
    names = [sources[0].name(i) for i in range(4)]
    assert len(set(names)) == 4 and names[1].endswith("rows y.png")
    train, held_out = split_images(sources, [], 3)
    assert (len(train), len(held_out)) == (3, 1)


def test_data_sets_of_one_short_name_have_images_of_their_own(tmp_path):
    """One given twice, also by another path, is the same images; so their names say."""
    for folder in ("day", "dusk"):
        images = [Image.new("L", (40, 40), value) for value in range(4)]
        table = datasets.Dataset.from_dict({"image": images, "file_name": [f"{i}.png" for i in range(4)]})
        table.save_to_disk(tmp_path / folder / "street" / "train")
    day, dusk = (str(tmp_path / folder / "street" / "train") for folder in ("day", "dusk"))
    again = str(tmp_path / "dusk" / ".." / "day" / "street" / "train")
    first, second = open_sources(ImageOptions(images=[day, dusk]))
    assert not {first.name(i) for i in range(4)} & {second.name(i) for i in range(4)}
    first, second = open_sources(ImageOptions(images=[day, again]))
    assert first.name(0) == second.name(0) == "street/train 0.png"
