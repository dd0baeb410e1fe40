"""Checkpoints on disk: whole ones only, the last two, and none lost to what a killed run or a bad copy left."""

import json

from accelerate import Accelerator

from spar_hf.utils.checkpoints import list_checkpoints, read_state, save_checkpoint


def test_the_last_two_stay(tmp_path):
    for step in (5, 10, 15):
        save_checkpoint(Accelerator(cpu=True), tmp_path, step, curve=[step])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-15"]
    assert read_state(tmp_path)["curve"] == [15]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-15"]


def test_a_folder_of_that_name_gives_way_to_the_new_checkpoint(tmp_path):
    """As a copy that was cut off leaves one: without its state it is no checkpoint, and must not cost the next."""
    save_checkpoint(Accelerator(cpu=True), tmp_path, 5)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "half").write_text("")
    save_checkpoint(Accelerator(cpu=True), tmp_path, 10, curve=[1])
    assert json.loads((tmp_path / "checkpoint-10" / "state.json").read_text())["curve"] == [1]
    assert not (tmp_path / "checkpoint-10" / "half").exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-10"]
