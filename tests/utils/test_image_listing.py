"""The same files for every command: links, endings, patterns with brackets, and a count of what is passed over."""

import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from spar_hf.data.sources import list_images
from spar_hf.utils.image_files import find_images

ENDINGS = (".jpg", ".gif", ".jfif", ".jp2", ".ppm", ".pgm", ".tga", ".mpo", ".avif", ".heic", ".PNG", ".tiff")


def names(*arguments, **options):
    images, problems = find_images([str(argument) for argument in arguments], **options)
    assert not problems
    return [image.name for image in images]


def test_every_ending_in_every_command(tmp_path, caplog):
    for i, ending in enumerate(ENDINGS):
        (tmp_path / f"{i:02}{ending}").touch()
    for other in ("a.raw", "b.raw", "c.txt", "d"):
        (tmp_path / other).touch()
    expected = [f"{i:02}" for i in range(len(ENDINGS))]
    for found in (
        lambda: names(tmp_path),
        lambda: [p.stem for p in list_images(tmp_path)],
        lambda: names(tmp_path / "*"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert found() == expected
        assert "2 .raw, 1 .txt, 1 no ending" in caplog.text


def test_links_to_one_file_are_several_images(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1a2b").write_bytes(b"x")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (snapshot / name).symlink_to("../blobs/1a2b")
    assert names(snapshot) == ["a", "b", "c"] == names(snapshot / "*.jpg")
    assert names(snapshot / "a.jpg", snapshot / "c.jpg") == ["a", "c"]
    assert [path.name for path in list_images(snapshot)] == ["a.jpg", "b.jpg", "c.jpg"]
    # one file named twice is one
    assert names(snapshot, snapshot / "b.jpg", os.path.join(snapshot, ".", "b.jpg")) == ["a", "b", "c"]


def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "in" / "real").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in ("in/real/a.jpg", "in/b.jpg", "outside/c.jpg"):
        (tmp_path / path).touch()
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again").symlink_to("real")  # sorts before it
    (tmp_path / "in" / "far").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "far2").symlink_to(tmp_path / "outside")
    expected = ["b", "far/c", "real/a"]
    assert names(tmp_path / "in") == expected
    assert [str(path.relative_to(tmp_path / "in").with_suffix("")) for path in list_images(tmp_path / "in")] == expected
    assert len(names(tmp_path / "in" / "**" / "*.jpg")) == 3


@pytest.mark.parametrize("folder", ["photos [2024]", "a[1]", "x [a-z] y", "[all]/sub [1]"])
def test_brackets_of_folders_are_no_pattern(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir(parents=True)
    for name in ("1.jpg", "2.jpg", "3.png"):
        (tmp_path / folder / name).touch()
    monkeypatch.chdir(tmp_path)
    assert names(f"{folder}/*.jpg") == ["1", "2"]
    assert names(f"{tmp_path}/{folder}/[13].*") == ["1", "3"]
    assert names(folder) == ["1", "2", "3"]
    assert len(names(f"**/{Path(folder).name}/*.jpg")) == 2


def test_files_that_are_no_files_fail_by_name_and_are_not_dropped(tmp_path):
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    Image.new("RGB", (8, 8)).save(tmp_path / "c.jpg")
    assert names(tmp_path) == ["b", "c", "gone"] == names(tmp_path / "*.jpg")
    assert names(tmp_path / "b.jpg") == ["b"]


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a.raw").touch()
    _, [(_, message)] = find_images([str(tmp_path)])
    assert "1 .raw" in message
    with pytest.raises(FileNotFoundError, match=r"1 \.raw"):
        list_images(tmp_path)
