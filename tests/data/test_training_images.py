"""Training images from any source: the views of the recipe, the order, what is held out, and what cannot be read."""

import io
import shutil
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from spar_hf import SparImageProcessorPil
from spar_hf.data.augmentation import Views, draw_crop
from spar_hf.data.order import MapOrder, StreamOrder, split_images
from spar_hf.data.sources import ImageOptions, list_files, list_shards, open_sources, stream_contents
from spar_hf.data.training_images import Skipped, TrainingImages, only_item
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.remote_files import write_remote


def view(image, window, patch_size, views, seed):
    return draw_crop(image.size, window, patch_size, views, Random(seed)).apply(image)


def split(options):
    return split_images(open_sources(options), options.exclude, options.holdout_every)


@pytest.mark.parametrize("size", [(1600, 900), (480, 360), (200, 700), (60, 50)])
def test_augmented_images_follow_the_recipe(size):
    image = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    whole = Views(crop_probability=0.0, min_scale=1.0)
    width, height = view(image, 192, 16, whole, 0).size
    # the largest size that fits 4 × 2 windows, floored to patches, never distorted by more than a patch
    factor = min(768 / max(size), 384 / min(size))
    assert (width, height) == tuple(int(side * factor + 1e-3) // 16 * 16 for side in size)
    for seed in range(30):
        width, height = view(image, 192, 16, Views(), seed).size
        assert width % 16 == 0 and height % 16 == 0
        assert max(width, height) <= 768 and min(width, height) <= 384
        assert min(width, height) >= min(160, min(size) * factor * 0.5 - 16)


def test_augmentation_crops_the_right_place():
    """An image whose red channel is its column and green its row: values tell where a crop was taken."""
    rows, columns = np.mgrid[0:192, 0:256]
    image = Image.fromarray(np.stack([columns, rows, columns * 0], -1).astype(np.uint8))
    no_flip = Views(
        long_side_windows=4 / 3, short_side_windows=1.0, min_scale=1.0, flip_probability=0.0, crop_probability=1.0
    )
    for seed in range(10):
        crop = np.asarray(view(image, 96, 16, no_flip, seed)).astype(int)
        step = np.diff(crop[crop.shape[0] // 2, :, 0])
        assert (step.mean() == pytest.approx(2, abs=0.05)) and (
            np.diff(crop[:, 5, 1]).mean() == pytest.approx(2, abs=0.05)
        )


def test_split_holds_out_and_excludes(image_folder):
    kept = ImageOptions(images=[str(image_folder)], exclude=["1*"], holdout_every=2)
    train, held_out = split(kept)
    names = [[Path(part.name(i)).stem for i in range(len(part))] for part in (train, held_out)]
    assert names == [["0", "3", "5"], ["2", "4"]]
    with pytest.raises(ValueError, match="--exclude"):
        split(ImageOptions(images=[str(image_folder)], exclude=["*"]))


@pytest.fixture(scope="module")
def sources(image_folder, tmp_path_factory):
    """The same six images as a list, a saved table, a Parquet file and two WebDataset shards."""
    folder = tmp_path_factory.mktemp("sources")
    files = sorted(image_folder.glob("*.jpg"))
    (folder / "list.txt").write_text("# images\n" + "\n".join(map(str, files)) + "\n")
    rows = {"picture": [{"bytes": p.read_bytes(), "path": None} for p in files], "n": list(range(6))}
    table = datasets.Dataset.from_dict(
        rows, datasets.Features({"picture": datasets.Image(), "n": datasets.Value("int8")})
    )
    table.save_to_disk(folder / "saved")
    table.to_parquet(folder / "table.parquet")
    (folder / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for path in files[shard * 3 : shard * 3 + 3]:
                for suffix, data in (("jpg", path.read_bytes()), ("json", b'{"n": 1}')):
                    entry = tarfile.TarInfo(f"{path.stem}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


def make_images(opened, **views):
    return TrainingImages(opened, SparImageProcessorPil(), 64, 16, Views(**views))


@pytest.mark.parametrize("name", ["list.txt", "saved", "table.parquet", "shards"])
def test_every_source_gives_the_same_images(image_folder, sources, name, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    streams = []
    for images in (image_folder, sources / name):
        kept = ImageOptions(images=[str(images)], holdout_every=3)
        opened = open_sources(kept)
        train, held_out = split_images(opened, kept.exclude, kept.holdout_every)
        pictures = make_images(opened)
        streams.append([pictures[sample].pixel_values for sample in islice(MapOrder(train, 0, 0, 1), 6)])
        assert (len(train), len(held_out)) == (4, 2)
    assert all(torch.equal(a, b) for a, b in zip(*streams, strict=True))


def test_processes_draw_the_same_size_in_every_step(tmp_path):
    for i in range(12):
        Image.new("RGB", (160 + 16 * (i % 3), 120 + 12 * (i % 3))).save(tmp_path / f"{i}.png")  # one shape
    kept = ImageOptions(images=[str(tmp_path)])
    opened = open_sources(kept)
    train, _ = split_images(opened, kept.exclude, kept.holdout_every)

    def steps(same_size):
        images = TrainingImages(opened, SparImageProcessorPil(), 64, 16, Views(min_scale=0.3), same_size=same_size)
        streams = [islice(MapOrder(train, 0, process, 3), 12) for process in range(3)]
        return [[images[sample].pixel_values.shape for sample in step] for step in zip(*streams, strict=True)]

    alone, together = steps(0), steps(3)
    assert any(len(set(step)) > 1 for step in alone)
    assert all(len(set(step)) == 1 for step in together) and len({step[0] for step in together}) > 4


def test_unreadable_sources_are_named(tmp_path, sources):
    for images, message in [(tmp_path / "no.txt", r"no\.txt"), (tmp_path / "no.tar", r"no\.tar"),
                            (tmp_path, "no image"), (tmp_path / "nothing", "--images")]:  # fmt: skip
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            open_sources(ImageOptions(images=[str(images)]))
    with pytest.raises(ValueError, match="--streaming reads one"):
        open_sources(ImageOptions(images=[str(sources / "list.txt")], streaming=True))
    with pytest.raises(ValueError, match="no images among its columns picture, n"):
        open_sources(ImageOptions(images=[str(sources / "saved")], image_column="image"))


def test_streams__what_they_consist_of_is_recorded(sources, tmp_path):
    """Shards, the split of a saved table, and the files behind a name that `load_dataset` takes."""
    nested = tmp_path / "set" / "data"
    nested.mkdir(parents=True)
    shutil.copy(sources / "table.parquet", nested / "train-0.parquet")
    for images, name in ((sources / "shards", ".tar"), (sources / "saved", "fingerprint"), (nested.parent, ".parquet")):
        kept = ImageOptions(images=[str(images)], streaming=True)
        found = stream_contents(kept)
        assert found and all(name in part for part in found) and found == stream_contents(kept)
    (nested / "train-0.parquet").write_bytes((sources / "table.parquet").read_bytes() + b" ")
    assert stream_contents(kept) != found


def test_streams__images_without_a_name_have_one_and_are_not_excluded(sources):
    table = open_sources(ImageOptions(images=[str(sources / "saved")], streaming=True))[0].select_columns("picture")
    kept = ImageOptions(images=["saved"], streaming=True, holdout_every=3, shuffle_buffer=3)
    names = [sample.name for sample in islice(StreamOrder(table, kept, 0, 0, 1), 24)]
    assert len(set(names)) == len(set(names[:4])) < 6
    with pytest.raises(UsageError, match="--exclude needs names"):
        StreamOrder(table, replace(kept, exclude=["a"]), 0, 0, 1)


def test_streams__urls_that_rows_name_are_not_fetched(tmp_path):
    images = fsspec.filesystem("memory")
    with images.open("/private/a.png", "wb") as file:
        Image.new("RGB", (64, 64)).save(file, "PNG")
    column = [{"bytes": None, "path": f"memory://private/{name}.png"} for name in "ab"]
    pq.write_table(pa.table({"image": column}), tmp_path / "rows.parquet")
    kept = ImageOptions(images=[str(tmp_path / "rows.parquet")], streaming=True, holdout_every=10**6)
    opened = open_sources(kept)
    samples = list(islice(StreamOrder(opened[0], kept, 0, 0, 1), 2))
    assert {Path(sample.source).name for sample in samples} == {"a.png", "b.png"}
    for sample in samples:
        assert "is neither a file nor a URL" in make_images(opened)[sample].reason


@pytest.mark.parametrize("name", ["saved", "shards"])
def test_streams__order_holdout_and_going_on(sources, name):
    """Held-out images never come, epochs differ, and going on anywhere gives what would have come."""
    kept = ImageOptions(images=[str(sources / name)], streaming=True, holdout_every=3, shuffle_buffer=3)
    table = open_sources(kept)[0]
    order = StreamOrder(table, kept, 0, 0, 1)
    held_out = {sample.source for sample in order.held_out()}
    samples = list(islice(order, 12))
    epochs = [[t for t in samples if t.after[0] == epoch] for epoch in (0, 1)]
    assert 0 < len(held_out) < 6 and not held_out & {sample.source for sample in samples}
    assert {t.source for t in epochs[0]} == {t.source for t in epochs[1]} and len(epochs[0]) == 6 - len(held_out)
    assert len({t.index for t in samples}) == 12
    for cut in (1, 3, 5):
        again = list(islice(StreamOrder(table, kept, 0, 0, 1, samples[cut].after), 4))
        assert [(t.index, t.source) for t in again] == [(t.index, t.source) for t in samples[cut + 1 : cut + 5]]
    two = [list(islice(StreamOrder(table, kept, 0, process, 2), 2)) for process in (0, 1)]
    assert not {t.source for t in two[0]} & {t.source for t in two[1]} and two[0][0].index != two[1][0].index


def test_order_is_shared_by_processes_and_resumes(image_folder):
    kept = ImageOptions(images=[str(image_folder)], holdout_every=6)
    train, _ = split(kept)
    one = list(islice(MapOrder(train, 3, 0, 1), 20))
    two = [list(islice(MapOrder(train, 3, process, 2), 10)) for process in (0, 1)]
    assert [t.name for pair in zip(*two, strict=True) for t in pair] == [t.name for t in one]
    assert [t.index for t in one] == list(range(20))
    again = list(islice(MapOrder(train, 3, 0, 1, one[7].after), 5))
    assert [(t.index, t.name) for t in again] == [(t.index, t.name) for t in one[8:13]]
    for epoch in range(4):
        assert len({t.name for t in one[5 * epoch : 5 * epoch + 5]}) == 5


def load(images, train, workers, count):
    """The first images of a training, and what is skipped among them."""
    order = MapOrder(train, 0, 0, 1)
    return list(islice(DataLoader(images, None, sampler=order, num_workers=workers, collate_fn=only_item), count))


def test_damaged_images_are_skipped_whatever_the_workers(image_folder, tmp_path):
    for path in image_folder.glob("*.jpg"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:700])
    (tmp_path / "3.jpg").write_text("no image")
    Image.new("RGB", (300, 20)).save(tmp_path / "4.jpg")
    kept = ImageOptions(images=[str(tmp_path)], holdout_every=6)
    opened = open_sources(kept)
    train, _ = split_images(opened, kept.exclude, kept.holdout_every)
    seen = []
    for workers in (0, 2):
        seen.append(load(make_images(opened, jitter_probability=0.5), train, workers, 10))
    skipped = {Path(item.name).name: item.reason for item in seen[0] if isinstance(item, Skipped)}
    assert set(skipped) == {"1.jpg", "3.jpg", "4.jpg"} and "--min_side" in skipped["4.jpg"]
    for a, b in zip(*seen, strict=True):
        assert type(a) is type(b)
        assert isinstance(a, Skipped) or (a.index == b.index and torch.equal(a.pixel_values, b.pixel_values))


def test_cutmix__parts_of_other_training_images_the_same_whatever_the_workers(tmp_path):
    """Each image has one colour, so that a view shows its images. The third is held out, the fourth damaged."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    for i, colour in enumerate(colours):
        Image.new("RGB", (96, 80), colour).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    kept = ImageOptions(images=[str(tmp_path)], holdout_every=3)
    opened = open_sources(kept)
    train, _ = split_images(opened, kept.exclude, kept.holdout_every)
    runs = []
    for workers in (0, 2):
        images = make_images(opened, cutmix_probability=1.0)
        images.others = train
        runs.append([item for item in load(images, train, workers, 30) if not isinstance(item, Skipped)])
    made_of = set()
    for once, again in zip(*runs, strict=True):
        assert torch.equal(once.pixel_values, again.pixel_values)
        made_of.add(tuple(map(tuple, once.pixel_values[0].flatten(1).unique(dim=1).T.gt(0).tolist())))
    red, green = (True, False, False), (False, True, False)
    assert made_of == {(red,), (green,), (green, red)}  # of one colour where the other image was the damaged one
    alone = make_images(opened)
    alone.others = train
    loaded = [item for item in load(alone, train, 0, 12) if not isinstance(item, Skipped)]
    assert len(loaded) == 8 and all(len(item.pixel_values[0].flatten(1).unique(dim=1).T) == 1 for item in loaded)


def test_cutmix__another_image_than_the_views_own(tmp_path):
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (96, 80), colour).save(tmp_path / f"{i}.png")
    for names, colours in ((("0", "1"), 2), (("0",), 1)):
        entries = [str(tmp_path / f"{name}.png") for name in names] * 3
        (tmp_path / "list.txt").write_text("\n".join(entries))
        opened = open_sources(ImageOptions(images=[str(tmp_path / "list.txt")]))
        images = make_images(opened, cutmix_probability=1.0)
        images.others, _ = split_images(opened, [], 20)
        views = [images[sample].pixel_values[0].flatten(1) for sample in islice(MapOrder(images.others, 0, 0, 1), 20)]
        assert {len(view.unique(dim=1).T) for view in views} == {colours}


def test_light_changes_for_the_student_only(tmp_path):
    """The teacher's pixels have the colours of the files, at the same places as the student's. Each image has one colour."""
    colours = torch.tensor([(200, 40, 40), (40, 200, 40)])
    for i, colour in enumerate(colours.tolist()):
        Image.new("RGB", (96, 80), tuple(colour)).save(tmp_path / f"{i}.png")
    opened = open_sources(ImageOptions(images=[str(tmp_path)]))
    images = make_images(opened, cutmix_probability=0.5, jitter_probability=0.7, jitter_student_only=True)
    images.others, _ = split_images(opened, [], 20)
    bright = ((colours / 255 - 0.5) / 0.5).T[:, None]  # (3, 1, colours)
    kinds = set()
    for item in load(images, images.others, 0, 40):
        shared = item.teacher_pixel_values is None
        own = item.pixel_values[0].flatten(1)  # (3, pixels)
        clean = own if shared else item.teacher_pixel_values[0].flatten(1)
        distances = (clean[:, :, None] - bright).abs().amax(0)  # (pixels, colours)
        assert distances.amin(1).max() < 1e-5
        shown = distances.argmin(1)
        for colour in shown.unique():  # what is one colour for the teacher is about one for the student, but for a blur
            part = own[:, shown == colour]
            assert (part - part.median(1, keepdim=True).values).abs().amax(0).lt(0.02).float().mean() > 0.8
        assert shared == torch.equal(own, clean)
        kinds.add((len(shown.unique()), shared))
    assert kinds == {(1, True), (1, False), (2, True), (2, False)}
    same = make_images(opened, jitter_probability=1.0)
    assert next(iter(load(same, images.others, 0, 1))).teacher_pixel_values is None


def test_an_image_is_read_once_for_student_and_teacher(tmp_path, monkeypatch):
    """Between two reads a file can change or a store fail, and the two would see different images."""
    for i in range(2):
        Image.new("RGB", (96, 80), (90 * i, 40, 40)).save(tmp_path / f"{i}.png")
    opened = open_sources(ImageOptions(images=[str(tmp_path)]))
    images = make_images(opened, cutmix_probability=1.0, jitter_probability=1.0, jitter_student_only=True)
    images.others, _ = split_images(opened, [], 20)
    reads, read = [], images.read
    monkeypatch.setattr(images, "read", lambda sample: reads.append(sample.name) or read(sample))
    for sample in islice(MapOrder(images.others, 0, 0, 1), 5):
        reads.clear()
        images[sample]
        assert len(reads) == len(set(reads)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_whose_names_tell_splits_are_read_by_split(sources, tmp_path, streaming):
    """As a clone of a data set of the hub holds them; also shards of WebDataset."""

    def named(folder, split):
        if not folder.name.startswith("parquet"):
            return [Path(path).name for path in list_shards(str(folder), split)]
        options = ImageOptions(images=[str(folder)], split=split, streaming=streaming)
        opened = open_sources(options)
        return len(list(opened[0]) if streaming else opened[0])  # images

    def refused(folder, split, named_splits):
        with pytest.raises(
            UsageError, match=f"no shards of the split {split!r}; choose one of {named_splits} with --split"
        ):
            list_shards(str(folder), split)

    folder = tmp_path / "parquet"
    folder.mkdir()
    rows = datasets.load_dataset("parquet", data_files=str(sources / "table.parquet"), split="train")
    for name, numbers in (("train-00000-of-00002", [0, 1]), ("train-00001-of-00002", [2]), ("validation-0", [3, 4])):
        rows.select(numbers).to_parquet(folder / f"{name}.parquet")
    assert (named(folder, "train"), named(folder, "validation"), named(folder, "val")) == (3, 2, 2)
    refused(folder, "test", "train, validation")
    tars = tmp_path / "tars"
    tars.mkdir()
    for name in ("val_0.tar", "VAL_1.tar", "trainers.tar"):
        (tars / name).touch()
    assert named(tars, "train") == sorted(["val_0.tar", "VAL_1.tar", "trainers.tar"])  # one split, and the default
    refused(tars, "test", "validation")
    (tars / "train_0.tar").touch()
    (tars / "._train_0.tar").touch()  # beside each file that macOS writes on other disks
    assert named(tars, "train") == ["train_0.tar"] and named(tars, "dev") == ["VAL_1.tar", "val_0.tar"]


def test_lists_name_urls_too(tmp_path, image_folder):
    (tmp_path / "list.txt").write_text(f"a.png\n{image_folder / '0.jpg'}\ns3://bucket/b.png\n")
    found = list_files(str(tmp_path / "list.txt"))
    assert found == [str(tmp_path / "a.png"), str(image_folder / "0.jpg"), "s3://bucket/b.png"]
    write_remote("memory://lists/street/list.txt", b"# two\na/1.png\ns3://bucket/b.png\n")
    assert list_files("memory://lists/street/list.txt") == ["memory://lists/street/a/1.png", "s3://bucket/b.png"]
    (tmp_path / "web.txt").write_text("a.png\nhttps://host/b.jpg\n")
    with pytest.raises(UsageError, match=r"web\.txt names https://host/b\.jpg.*download"):
        list_files(str(tmp_path / "web.txt"))
    with pytest.raises(MissingFiles, match=r"no list memory://lists/none\.txt"):
        list_files("memory://lists/none.txt")
