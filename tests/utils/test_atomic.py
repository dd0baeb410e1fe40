"""Files and folders are written completely or not at all, even if the process is killed."""

import json
from pathlib import Path

import pytest

from spar_hf.utils.atomic import write_atomically, write_json, writing_folder


def test_write_atomically__a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        write_atomically(path, half)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_write_json__nan_and_infinity_become_null(tmp_path):
    value = {"a": [1, float("nan"), (float("inf"), -2.5)], "b": {"c": float("-inf"), "d": "NaN", "e": None, "f": True}}
    write_json(tmp_path / "x.json", value)
    expected = {"a": [1, None, [None, -2.5]], "b": {"c": None, "d": "NaN", "e": None, "f": True}}
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == expected


def test_writing_folder__works_after_a_process_was_killed_while_writing_or_replacing(tmp_path):
    for name, text in ((".out.partial", "half"), ("out", "old"), (".out.old", "older")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
        (tmp_path / name / f"only {text}").touch()
    with writing_folder(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_writing_folder__after_an_error_the_old_folder_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with pytest.raises(OSError, match="disk"), writing_folder(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("new")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").read_text() == "old"


def stop_between_renames(monkeypatch, folder, error):
    """Make the rename to `folder` fail once, when the old folder is already renamed."""
    rename = Path.rename

    def stopping(path, target):
        if target == folder:
            monkeypatch.setattr(Path, "rename", rename)
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopping)


@pytest.mark.parametrize("error", [OSError("stopped"), KeyboardInterrupt("stopped")])
def test_writing_folder__an_error_between_the_renames_restores_the_old_folder(tmp_path, monkeypatch, error):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "file").write_text("old")
    stop_between_renames(monkeypatch, folder, error)
    with pytest.raises(type(error), match="stopped"), writing_folder(folder) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (folder / "file").read_text() == "old"


def test_writing_folder__after_a_kill_between_the_renames_the_next_call_restores_the_old_folder(tmp_path):
    """Then the old and the new folder have their temporary names."""
    for name, text in ((".out.old", "old"), (".out.partial", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    with pytest.raises(OSError, match="disk"), writing_folder(tmp_path / "out") as temporary:
        assert (tmp_path / "out" / "file").read_text() == "old"  # already, while the next one is written
        temporary.mkdir()
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").read_text() == "old"
