"""Reading ahead: worker processes, groups of equal sizes and a writing thread change nothing but the speed."""

import errno
import pickle
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from spar_hf.batch.ahead import Buckets, Images, Unread, Work, process_ahead
from spar_hf.cli.main import app
from spar_hf.utils.image_files import InputImage


@dataclass
class Pixels:
    pixel_values: torch.Tensor
    image: Image.Image | None = None
    only_first: str = ""


def read(image):
    """An image whose name is its side."""
    if image.name == "bad":
        raise ValueError("it is damaged")
    return Pixels(torch.zeros(1, 3, 8, int(image.name)))


def images(*names):
    return [InputImage(f"{i}.png", str(name)) for i, name in enumerate(names)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_and_equal_sizes_together(workers):
    groups, written, failed = [], {}, []

    def compute(items):
        groups.append([item.pixel_values.shape[-1] for item in items])
        return [-size for size in groups[-1]]

    def write(image, item, result):
        assert threading.current_thread() is not threading.main_thread()
        written[image] = (item.pixel_values.shape[-1], result)

    work = Work(read, compute, write, 8, lambda image, reason: failed.append((image.name, reason)))
    todo = images(*[8, 16, 8, "bad", 16, 8, 24] * 3)
    summary = process_ahead(todo, work, lambda image: image is todo[0], None, [], False, workers, batch_size=2)
    assert (summary.done, summary.skipped, len(summary.failed)) == (17, 1, 3)
    assert failed == [("bad", "it is damaged")] * 3
    assert all(len(set(group)) == 1 and len(group) <= 2 for group in groups) and max(map(len, groups)) == 2
    assert written == {image: (int(image.name), -int(image.name)) for image in todo[1:] if image.name != "bad"}


def test_images_that_wait_are_bounded():
    buckets, waiting = Buckets(batch_size=4, patch_size=8), 0
    for image in images(*range(8, 200)):  # no two of one size
        waiting += 1 - sum(len(group) for group in buckets.add(image, read(image)))
        assert waiting <= 16
    assert sum(len(group) for group in buckets.rest()) == waiting


def test_an_image_of_a_rare_size_waits_for_eight_batches_at_most():
    """The file of many images that it belongs to is open until then, and lost if the run is stopped."""
    buckets, computed = Buckets(batch_size=4, patch_size=8), []
    for image in images(24, *[8] * 40):
        computed += [item.pixel_values.shape[-1] for group in buckets.add(image, read(image)) for _, item in group]
    assert 24 in computed and computed.index(24) <= 8 * 4


def test_pictures_that_are_kept_for_the_results_count_as_memory():
    buckets, waiting = Buckets(batch_size=4, patch_size=8), 0
    picture = Image.new("RGB", (8000, 4000))  # 96 million bytes
    for image in images(*range(8, 20)):
        item = Pixels(read(image).pixel_values, picture)
        waiting += 1 - sum(len(group) for group in buckets.add(image, item))
        assert waiting <= 2
    assert sum(len(group) for group in buckets.rest()) == waiting


def test_a_group_that_fails_together_is_tried_one_by_one():
    def compute(items):
        if len(items) > 1:
            raise torch.OutOfMemoryError("together")
        if items[0].pixel_values.shape[-1] == 16:
            raise ValueError("not this one")
        return ["result"]

    written = []
    work = Work(read, compute, lambda image, item, result: written.append(image.name), 8)
    summary = process_ahead(images(8, 8, 16, 16, 8), work, progress_bar=False, workers=0, batch_size=2)
    assert summary.done == 3 and written == ["8"] * 3
    assert [reason for _, reason in summary.failed] == ["not this one"] * 2


def test_a_full_disk_stops_the_run_and_another_error_of_writing_does_not():
    def write(image, item, result):
        raise OSError(number, "cannot write")

    work = Work(read, lambda items: items, write, 8)
    number = errno.EACCES
    assert len(process_ahead(images(8, 8), work, progress_bar=False, workers=0).failed) == 2
    number = errno.ENOSPC
    with pytest.raises(OSError, match="cannot write"):
        process_ahead(images(8, 8), work, progress_bar=False, workers=0)


def test_a_killed_worker_is_named():
    def die(image):
        import os

        if torch.utils.data.get_worker_info() is not None:
            os._exit(9)

    with pytest.raises(OSError, match="--workers"):
        process_ahead(images(8, 8), Work(die, lambda items: items, print, 8), progress_bar=False, workers=1)


def read_limited(image):
    """An image of 64 pixels, or none if that is above the limit."""
    if Image.MAX_IMAGE_PIXELS < 64:
        raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS}")
    return Pixels(torch.zeros(1, 3, 8, 8))


def test_workers_that_inherit_nothing_have_the_limit_on_pixels(monkeypatch):
    """As on macOS and Windows, and from Python 3.14 on also on Linux."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # as --max-pixels sets it
    sent = pickle.dumps(Images(images(8), read_limited))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)  # in a worker
    assert pickle.loads(sent)[0] == (0, Unread("more than 50"))


def test_commands_give_the_same_with_workers_and_batches(base_folder, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (48, 48 + 16 * (i % 2), 3), dtype=np.uint8)).save(folder / f"{i}.png")
    options = [str(folder), "--model", str(base_folder), "--shortest-edge", "48"]
    segment = ["segment", *options, "--labels", "road;sky;tree", "--format", "map,json"]
    for name, how in (("plain", ["0", "1"]), ("ahead", ["2", "4"])):
        for command, output in ((["features", *options], name), (segment, f"{name}-masks")):
            given = [*command, "--output", str(tmp_path / output), "--workers", how[0], "--batch-size", how[1]]
            result = CliRunner().invoke(app, given)
            assert result.exit_code == 0 and "6 done" in result.output, result.output
    for i in range(6):
        found, expected = (load_file(tmp_path / n / f"{i}.safetensors")["feature_map"] for n in ("ahead", "plain"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        maps = [np.array(Image.open(tmp_path / n / f"{i}.map.png")) for n in ("ahead-masks", "plain-masks")]
        assert maps[0].shape == (48, 48 + 16 * (i % 2)) and (maps[0] == maps[1]).mean() > 0.999
