"""The images that arguments name, the names of their results, and the loop over them."""

import errno
from pathlib import Path

import pytest

from spar_hf.utils.image_files import InputImage, check_inputs_kept, find_images, process_images, url_to_file_name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Empty files: finding images opens none."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "in/b.jpg",
        "in/a.JPG",
        "in/sub/a.png",
        "in/notes.txt",
        "in/.hidden.png",
        "in/.cache/c.png",
        "x/a.jpg",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path


def names(*arguments, **options):
    images, problems = find_images(arguments, **options)
    assert not problems
    return {image.source: image.name for image in images}


def test_find_images__folders_keep_their_sub_folders_and_hidden_files_are_skipped(folder):
    assert names("in") == {"in/a.JPG": "a", "in/b.jpg": "b", "in/sub/a.png": "sub/a"}
    assert names("in", exclude=folder / "in/sub") == {"in/a.JPG": "a", "in/b.jpg": "b"}


def test_find_images__patterns_keep_the_path_below_their_first_wildcard(folder):
    assert names("in/**/*.png") == {"in/sub/a.png": "sub/a"}
    assert names("in/s*/*.png") == {"in/sub/a.png": "sub/a"}
    assert names("*/*.jpg") == {"in/b.jpg": "in/b", "x/a.jpg": "x/a"}


def test_find_images__an_image_that_is_named_twice_is_listed_once(folder):
    assert names("in/b.jpg", "in/*.jpg", str(folder / "in/b.jpg")) == {"in/b.jpg": "b"}


def test_find_images__a_name_with_brackets_is_a_file_before_it_is_a_pattern(folder):
    Path("in/b[1].jpg").touch()
    assert names("in/b[1].jpg") == {"in/b[1].jpg": "b[1]"}


def test_find_images__images_of_the_same_stem_keep_their_suffixes(folder):
    Path("in/B.png").touch()
    assert names("in") == {"in/B.png": "B.png", "in/a.JPG": "a", "in/b.jpg": "b.jpg", "in/sub/a.png": "sub/a"}


def test_find_images__urls_that_end_in_the_same_name_get_names_of_their_own(folder):
    urls = ["http://a.com/x.jpg", "http://b.com/X.jpg", "http://b.com/X.jpg?size=2", "http://b.com/y.png"]
    found = names("in/b.jpg", *urls)
    assert len({name.casefold() for name in found.values()}) == 5
    assert found[urls[0]].startswith("x-") and found["http://b.com/y.png"] == "y"
    assert names(*urls[:2])[urls[0]] == found[urls[0]]  # whatever else the run reads


def test_find_images__equal_paths_in_two_folders_are_refused(folder):
    Path("in/a.JPG").rename("in/a.jpg")
    with pytest.raises(ValueError, match=r"in/a.jpg and x/a.jpg would both be written as a"):
        find_images(["in", "x"])


def test_find_images__reading_and_writing_one_folder_is_refused(folder):
    for argument in ("in", "in/*.jpg"):
        with pytest.raises(ValueError, match="both input and output"):
            find_images([argument], exclude=Path("in"))
    images, _ = find_images(["in/b.jpg"])
    with pytest.raises(ValueError, match="would overwrite an input"):
        check_inputs_kept([Path("in/sub/../b.jpg")], images)


def test_find_images__arguments_without_images_are_reported_each(folder):
    Path("empty").mkdir()
    images, problems = find_images(["in/b.jpg", "gone.jpg", "empty", "in/*.gif"])
    assert [image.name for image in images] == ["b"]
    assert [argument for argument, _ in problems] == ["gone.jpg", "empty", "in/*.gif"]
    for (_, message), expected in zip(problems, ("neither a file", "contains no image", "matches"), strict=True):
        assert expected in message


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a/street%20view.jpg?size=2", "street_view.jpg"),
        ("https://host/%2e%2e%2fetc", "etc"),
        ("https://host", "image"),
        ("data:image/png;base64,AAAA", "image"),
    ],
)
def test_url_to_file_name(url, name):
    assert url_to_file_name(url) == name


IMAGES = [InputImage(f"{name}.jpg", name) for name in "abcd"]


def test_process_images__one_bad_image_stops_no_other(capsys):
    done, lines = [], []

    def work(image):
        if image.name == "b":
            raise MemoryError
        done.append(image.name)

    summary = process_images(IMAGES, work, lambda image: image.name == "c", lines.append, [("gone", "gone is missing")])
    assert done == ["a", "d"] and lines == ["gone is missing", "b.jpg: MemoryError"]
    assert (summary.done, summary.skipped, len(summary.failed), summary.exit_status) == (2, 1, 2, 1)
    assert "2 done, 1 skipped (already written), 2 failed" in str(summary)
    assert "4/4" in capsys.readouterr().err  # the bar


def test_process_images__ctrl_c_ends_with_a_summary_and_its_own_status():
    def work(image):
        if image.name == "b":
            raise KeyboardInterrupt

    summary = process_images(IMAGES, work, progress_bar=False)
    assert summary.done == 1 and summary.exit_status == 130 and "--skip-existing" in str(summary)


def test_process_images__a_full_disk_ends_the_run():
    tried = []

    def work(image):
        tried.append(image.name)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        process_images(IMAGES, work, progress_bar=False)
    assert tried == ["a"]
