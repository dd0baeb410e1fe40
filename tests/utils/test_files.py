"""Which images a command reads, where it writes, and that nothing is lost on the way."""

import errno
import json
from pathlib import Path

import pytest

from spar_hf.utils.files import (
    InputImage,
    find_images,
    refuse_overwriting,
    url_name,
    work_through,
    write_atomically,
    write_json,
    writing_folder,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files by name alone: finding images opens none."""
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


def test_find_images__folders_keep_their_sub_folders_and_hidden_files_stay_out(folder):
    assert names("in") == {"in/a.JPG": "a", "in/b.jpg": "b", "in/sub/a.png": "sub/a"}
    assert names("in", leave_out=folder / "in/sub") == {"in/a.JPG": "a", "in/b.jpg": "b"}


def test_find_images__patterns_keep_what_is_below_their_first_wildcard(folder):
    assert names("in/**/*.png") == {"in/sub/a.png": "sub/a"}
    assert names("in/s*/*.png") == {"in/sub/a.png": "sub/a"}
    assert names("*/*.jpg") == {"in/b.jpg": "in/b", "x/a.jpg": "x/a"}


def test_find_images__a_image_named_twice_is_one(folder):
    assert names("in/b.jpg", "in/*.jpg", str(folder / "in/b.jpg")) == {"in/b.jpg": "b"}


def test_find_images__a_name_with_brackets_is_a_file_before_it_is_a_pattern(folder):
    Path("in/b[1].jpg").touch()
    assert names("in/b[1].jpg") == {"in/b[1].jpg": "b[1]"}


def test_find_images__two_of_one_stem_keep_their_suffixes(folder):
    Path("in/B.png").touch()
    assert names("in") == {"in/B.png": "B.png", "in/a.JPG": "a", "in/b.jpg": "b.jpg", "in/sub/a.png": "sub/a"}


def test_find_images__twins_of_two_folders_are_refused(folder):
    Path("in/a.JPG").rename("in/a.jpg")
    with pytest.raises(ValueError, match=r"in/a.jpg and x/a.jpg would both be written as a"):
        find_images(["in", "x"])


def test_find_images__reading_and_writing_one_folder_is_refused(folder):
    for argument in ("in", "in/*.jpg"):
        with pytest.raises(ValueError, match="read and written at once"):
            find_images([argument], leave_out=Path("in"))
    images, _ = find_images(["in/b.jpg"])
    with pytest.raises(ValueError, match="would overwrite an image"):
        refuse_overwriting([Path("in/sub/../b.jpg")], images)


def test_find_images__what_gives_nothing_is_a_problem_of_its_own(folder):
    Path("void").mkdir()
    images, problems = find_images(["in/b.jpg", "gone.jpg", "void", "in/*.gif"])
    assert [image.name for image in images] == ["b"]
    assert [argument for argument, _ in problems] == ["gone.jpg", "void", "in/*.gif"]
    for (_, message), expected in zip(problems, ("neither a file", "holds no image", "is named like"), strict=True):
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
def test_url_name(url, name):
    assert url_name(url) == name


def test_write_atomically__a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        write_atomically(path, half)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_write_json__what_is_no_finite_number_is_null(tmp_path):
    value = {"a": [1, float("nan"), (float("inf"), -2.5)], "b": {"c": float("-inf"), "d": "NaN", "e": None, "f": True}}
    write_json(tmp_path / "x.json", value)
    expected = {"a": [1, None, [None, -2.5]], "b": {"c": None, "d": "NaN", "e": None, "f": True}}
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == expected


def test_writing_folder__also_after_a_run_that_was_killed_while_writing_or_replacing(tmp_path):
    for name, text in ((".out.partial", "half"), ("out", "old"), (".out.old", "older")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
        (tmp_path / name / f"only {text}").touch()
    with writing_folder(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_writing_folder__after_an_error_the_old_one_stands(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with pytest.raises(OSError, match="disk"), writing_folder(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("new")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").read_text() == "old"


def stop_between_renames(monkeypatch, folder, error):
    """Make the rename to `folder` fail once: the older one has its other name by then."""
    rename = Path.rename

    def stopping(path, target):
        if target == folder:
            monkeypatch.setattr(Path, "rename", rename)
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopping)


@pytest.mark.parametrize("error", [OSError("stopped"), KeyboardInterrupt("stopped")])
def test_writing_folder__an_error_between_the_renames_puts_the_old_one_back(tmp_path, monkeypatch, error):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "file").write_text("old")
    stop_between_renames(monkeypatch, folder, error)
    with pytest.raises(type(error), match="stopped"), writing_folder(folder) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (folder / "file").read_text() == "old"


def test_writing_folder__a_kill_between_the_renames_is_made_good_by_the_next_run(tmp_path):
    """What is left on the disk then: no folder, the older one under its other name, the new one under its own."""
    for name, text in ((".out.old", "old"), (".out.partial", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    with pytest.raises(OSError, match="disk"), writing_folder(tmp_path / "out") as temporary:
        assert (tmp_path / "out" / "file").read_text() == "old"  # already, while the next one is written
        temporary.mkdir()
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").read_text() == "old"


IMAGES = [InputImage(f"{name}.jpg", name) for name in "abcd"]


def test_work_through__one_bad_image_loses_no_other(capsys):
    done, lines = [], []

    def work(image):
        if image.name == "b":
            raise MemoryError
        done.append(image.name)

    tally = work_through(IMAGES, work, lambda image: image.name == "c", lines.append, [("gone", "gone is missing")])
    assert done == ["a", "d"] and lines == ["gone is missing", "b.jpg: MemoryError"]
    assert (tally.done, tally.skipped, len(tally.failed), tally.exit_status) == (2, 1, 2, 1)
    assert "2 done, 1 skipped (written before), 2 failed" in str(tally)
    assert "4/4" in capsys.readouterr().err  # the bar


def test_work_through__ctrl_c_ends_with_a_summary_and_its_own_status():
    def work(image):
        if image.name == "b":
            raise KeyboardInterrupt

    tally = work_through(IMAGES, work, bar=False)
    assert tally.done == 1 and tally.exit_status == 130 and "--skip-existing" in str(tally)


def test_work_through__a_full_disk_is_not_tried_again_for_every_image():
    tried = []

    def work(image):
        tried.append(image.name)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        work_through(IMAGES, work, bar=False)
    assert tried == ["a"]
