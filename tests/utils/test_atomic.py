"""Files and folders are written completely or not at all, even if the process is killed."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from spar_hf.utils.atomic import write_atomically, write_json, writing_folder
from spar_hf.utils.errors import run_command


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


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_follow_the_umask_as_those_of_other_programs(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        plain, folder = ((tmp_path / name).stat().st_mode for name in ("file", "folder"))
        write_atomically(tmp_path / "a.safetensors", lambda path: save_file({"a": torch.ones(1)}, path))
        with writing_folder(tmp_path / "model") as temporary:
            temporary.mkdir()
            save_file({"a": torch.ones(1)}, temporary / "model.safetensors")
            write_json(temporary / "config.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode == plain
    assert {path.stat().st_mode for path in (tmp_path / "model").iterdir()} == {plain}
    assert (tmp_path / "model").stat().st_mode == folder


@pytest.mark.parametrize("name", ["a" * 245 + ".json", "字" * 83 + ".txt", "x." + "y" * 250, ".hidden", "ü" * 120])
def test_names_as_long_as_the_file_system_allows(tmp_path, name):
    write_atomically(tmp_path / name, lambda temporary: temporary.write_text("x"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def full_disk(kind):
    if kind == "safetensors":
        return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    if kind == "torch":
        return RuntimeError(
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/1"
        )
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "system"])
def test_a_full_disk_is_an_oserror_whoever_writes(tmp_path, kind):
    def write(path):
        path.write_bytes(b"half")
        raise full_disk(kind)

    with pytest.raises(OSError) as found:
        write_atomically(tmp_path / "file", write)
    assert found.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as found, writing_folder(tmp_path / "model") as temporary:
        temporary.mkdir()
        write(temporary / "file")
    assert found.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_command_says_in_one_line_that_the_disk_is_full(capsys):
    def main():
        raise full_disk("system")

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 1 and capsys.readouterr().err.count("\n") == 1
