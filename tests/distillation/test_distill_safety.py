"""What a distillation refuses or survives: losses that are no numbers, changed images, a second run in its folder."""

import json
import math
import shutil

import pytest
import torch
from changing import change_weights
from distilling import distil, log_of
from interrupting import at_call
from launching import locked_elsewhere
from safetensors.torch import load_file
from transformers import AutoModel

from spar_hf.distillation import trainer
from spar_hf.distillation.held_out import HeldOut
from spar_hf.distillation.recipes import parse_options
from spar_hf.distillation.student import Student
from spar_hf.distillation.student_folders import held_out_errors
from spar_hf.distillation.trainer import Distillation
from spar_hf.utils.errors import NotFinite, UsageError, run_command
from spar_hf.utils.locks import Locked
from spar_hf.utils.sample_record import read_samples

SHORT = ("--steps", 6, "--teacher_windows", 2, "--log_steps", 1, "--picture_steps", 0, "--report_to", "none")
SHORT += ("--learning_rate", 1e-3, "--train_layers", "all")


def spoil(monkeypatch, steps, value=math.nan):
    """Make the loss of some steps, counted from 1, `value`; gradients included."""
    loss_of, calls = Distillation._loss, []

    def spoiled(run, sample, progress):
        calls.append(sample)
        loss = loss_of(run, sample, progress)
        return loss * value if len(calls) in steps else loss

    monkeypatch.setattr(Distillation, "_loss", spoiled)


def finite_json(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_few_bad_steps_are_skipped_and_counted(base_folder, image_folder, tmp_path, monkeypatch, value):
    spoil(monkeypatch, {2, 5}, value)
    found = distil(base_folder, image_folder, tmp_path / "run", *SHORT)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [row["loss"] is None for row in rows] == [False, True, False, False, True, False]
    assert [row.get("bad_steps", 0) for row in rows] == [0, 1, 1, 1, 2, 2]
    assert all(tensor.isfinite().all() for tensor in AutoModel.from_pretrained(found).state_dict().values())
    finite_json(found / "config.json")


def test_a_skipped_step_leaves_the_weights_as_they_were(base_folder, image_folder, tmp_path, monkeypatch):
    options = (*SHORT, "--steps", 1, "--holdout_images", 0)
    spoil(monkeypatch, {1})
    found = AutoModel.from_pretrained(distil(base_folder, image_folder, tmp_path / "run", *options)).state_dict()
    base = AutoModel.from_pretrained(base_folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())


def test_too_many_end_the_run_and_keep_the_last_good_student(base_folder, image_folder, tmp_path, monkeypatch):
    spoil(monkeypatch, {3, 4, 5, 6})
    options = ("--eval_steps", 1, "--max_bad_steps", 2, "--save_steps", 2)
    with pytest.raises(NotFinite, match=r"in 3 steps.*step 5 .*--learning_rate"):
        distil(base_folder, image_folder, tmp_path / "run", *SHORT, *options)
    kept = tmp_path / "run" / "model"
    after = finite_json(kept / "config.json")["distillation"]["held_out"]["after"]
    assert after["step"] <= 4 and math.isfinite(after["mse"])
    AutoModel.from_pretrained(kept)
    assert not (tmp_path / "run" / ".lock").exists()
    assert finite_json(tmp_path / "run" / "checkpoint-4" / "state.json")["bad_steps"] == [2, 0]


@pytest.mark.parametrize("held_out", [0, 2])
def test_a_learning_rate_that_is_far_too_high_is_no_success(base_folder, image_folder, tmp_path, capsys, held_out):
    options = (*SHORT, "--steps", 12, "--learning_rate", 1e30, "--holdout_images", held_out)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: distil(base_folder, image_folder, tmp_path / "run", *options))
    assert end.value.code == 1 and "--learning_rate" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "model").exists()


def test_a_held_out_error_that_is_no_number_is_never_the_least(base_folder, image_folder, tmp_path, monkeypatch):
    error, calls = HeldOut.error, []

    def spoiled(*args):
        calls.append(args)
        found = error(*args)
        return found | {"mse": math.nan} if len(calls) == 3 else found  # before training, step 2, step 4

    monkeypatch.setattr(HeldOut, "error", spoiled)
    with pytest.raises(NotFinite, match="held-out"):
        distil(base_folder, image_folder, tmp_path / "run", *SHORT, "--eval_steps", 2)
    after = finite_json(tmp_path / "run" / "model" / "config.json")["distillation"]["held_out"]["after"]
    assert after["step"] == 2


@pytest.fixture
def own_images(image_folder, tmp_path):
    return shutil.copytree(image_folder, tmp_path / "images")


def stopped_run(base_folder, images, output, monkeypatch, *options):
    """A run that SIGTERM stops after its third step."""
    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "_loss", at_call(3, Distillation._loss))
        assert distil(base_folder, images, output, *SHORT, *options) is None
    assert (output / "checkpoint-3").is_dir()


def test_changed_images_are_refused_and_held_out_ones_stay_so(base_folder, own_images, tmp_path, monkeypatch, caplog):
    output = tmp_path / "run"
    stopped_run(base_folder, own_images, output, monkeypatch)
    before = read_samples(output)
    assert [name[-5:] for name in before["held_out"]] == ["2.jpg", "5.jpg"]  # every third
    shutil.copy(own_images / "0.jpg", own_images / "00.jpg")  # moves all positions behind it
    shutil.copy(own_images / "0.jpg", own_images / "9.jpg")
    (own_images / "5.jpg").unlink()
    with pytest.raises(
        UsageError, match=r"2 added \(.*00\.jpg, .*9\.jpg\), 1 removed \(.*5\.jpg\).*allow_changed_data"
    ):
        distil(base_folder, own_images, output, *SHORT, "--resume")
    seen, read = [], trainer.readable_samples

    def watching(loader, skipped):
        seen.append(loader.sampler.images)
        return read(loader, skipped)

    monkeypatch.setattr(trainer, "readable_samples", watching)
    assert distil(base_folder, own_images, output, *SHORT, "--resume", "--allow_changed_data")
    (trained,) = seen
    assert sorted(trained.name(i)[-6:].strip("/s") for i in range(len(trained))) == [
        "0.jpg", "00.jpg", "1.jpg", "3.jpg", "4.jpg", "9.jpg",
    ]  # fmt: skip
    after = read_samples(output)
    assert [name[-5:] for name in after["held_out"]] == ["2.jpg"] and set(after["measured"]) <= set(before["measured"])
    assert after["train"] == [trained.name(i) for i in range(len(trained))]


def test_errors_on_fewer_held_out_images_are_not_compared_with_earlier_ones(
    base_folder, own_images, tmp_path, monkeypatch, caplog
):
    output, options = tmp_path / "run", ("--eval_steps", 1)
    stopped_run(base_folder, own_images, output, monkeypatch, *options)
    before = json.loads((output / "checkpoint-3" / "state.json").read_text())
    assert [point["step"] for point in before["curve"]] == [1, 2, 3]
    (own_images / "5.jpg").unlink()
    folder = distil(base_folder, own_images, output, *SHORT, *options, "--resume", "--allow_changed_data")
    held_out = json.loads((folder / "config.json").read_text())["distillation"]["held_out"]
    assert [point["step"] for point in held_out["curve"]] == [4, 5, 6] and held_out["images"] == 1
    assert held_out["before"] != before["before"] and "measured anew" in caplog.text


def test_the_best_student_after_the_last_checkpoint_is_not_forgotten(base_folder, image_folder, tmp_path, monkeypatch):
    """Also where the resumed run measures at other steps: the card is that of the weights beside it."""
    output, options = tmp_path / "run", ("--save_steps", 2)
    loss = Distillation._loss

    def killed(self, sample, progress):
        if len(self.curve.points) == 3:
            raise KeyboardInterrupt
        return loss(self, sample, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distillation, "_loss", killed)
        errors = iter([9.0, 8.0, 7.0, 6.0])  # before training, and of a student that gets better
        patch.setattr(Distillation, "_held_out_error", lambda *args: {"mse": next(errors), "cosine": 0.0})
        distil(base_folder, image_folder, output, *SHORT, *options, "--eval_steps", 1)
    assert max(int(path.name[11:]) for path in output.glob("checkpoint-*")) == 2
    file = output / "model" / "model.safetensors"
    written, weights = held_out_errors(output / "model")["curve"], file.read_bytes()
    assert written[-1]["step"] == 3  # after the checkpoint
    other = shutil.copytree(output, tmp_path / "other")
    monkeypatch.setattr(Distillation, "_held_out_error", lambda *args: {"mse": 1e3, "cosine": 0.0})
    folder = distil(base_folder, image_folder, output, *SHORT, *options, "--eval_steps", 6, "--resume")
    held_out = json.loads((folder / "config.json").read_text())["distillation"]["held_out"]
    assert held_out["after"] == written[-1] and [point["step"] for point in held_out["curve"]] == [1, 2, 3, 6]
    assert file.read_bytes() == weights
    # but not that of another run, which was to be replaced
    config = json.loads((other / "model" / "config.json").read_text())
    config["distillation"]["held_out"]["before"]["mse"] += 1
    (other / "model" / "config.json").write_text(json.dumps(config))
    distil(base_folder, image_folder, other, *SHORT, *options, "--eval_steps", 6, "--resume")
    assert [point["step"] for point in held_out_errors(other / "model")["curve"]] == [1, 2, 6]


def test_a_position_subspace_stays_that_of_the_run_whatever_images_come_later(
    base_folder, own_images, tmp_path, monkeypatch
):
    output, options = tmp_path / "run", ("--local_start", 0.3, "--holdout_images", 0)
    stopped_run(base_folder, own_images, output, monkeypatch, *options)
    kept = json.loads((output / "checkpoint-3" / "state.json").read_text())["position_subspace"]
    shutil.copy(own_images / "0.jpg", own_images / "00.jpg")
    seen, restore = [], Student.restore_positions

    def watching(self):
        seen.append(self.directions.clone())
        restore(self)

    monkeypatch.setattr(Student, "restore_positions", watching)
    assert distil(base_folder, own_images, output, *SHORT, *options, "--resume", "--allow_changed_data")
    assert len(seen) == 3 and all(torch.equal(directions, torch.tensor(kept)) for directions in seen)


@pytest.mark.parametrize(("part", "named"), [("vision_model", "--model"), ("text_model", "--model's text tower")])
def test_a_run_does_not_go_on_with_another_teacher(base_folder, own_images, tmp_path, monkeypatch, part, named):
    """A checkpoint holds the student alone."""
    base, output = shutil.copytree(base_folder, tmp_path / "base"), tmp_path / "run"
    stopped_run(base, own_images, output, monkeypatch)
    change_weights(base, part)
    with pytest.raises(UsageError, match=f"those of {named} changed since the run began"):
        distil(base, own_images, output, *SHORT, "--resume")


def test_a_run_does_not_go_on_with_other_settings_of_the_teacher(base_folder, own_images, tmp_path, monkeypatch):
    """The activation leaves no trace in the weights."""
    base, output = shutil.copytree(base_folder, tmp_path / "base"), tmp_path / "run"
    stopped_run(base, own_images, output, monkeypatch)
    config = json.loads((base / "config.json").read_text())
    assert config["backbone_config"].get("hidden_act") != "relu"
    config["backbone_config"]["hidden_act"] = "relu"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="those of --model changed since the run began"):
        distil(base, own_images, output, *SHORT, "--resume")


def test_a_run_does_not_go_on_from_another_start(base_folder, own_images, tmp_path, monkeypatch):
    student, output = shutil.copytree(base_folder, tmp_path / "student"), tmp_path / "run"
    options = ("--student", student)
    stopped_run(base_folder, own_images, output, monkeypatch, *options)
    change_weights(student, "vision_model")
    with pytest.raises(UsageError, match="those of --student changed since the run began"):
        distil(base_folder, own_images, output, *SHORT, *options, "--resume")


def test_words_of_an_earlier_version_are_not_mixed_with_those_of_today(base_folder, own_images, tmp_path, monkeypatch):
    """They had another loss. What is stored in the end is in the precision of the command that ended it."""
    output, words = tmp_path / "run", ("--words", "road; sky", "--save_dtype", "bfloat16")
    stopped_run(base_folder, own_images, output, monkeypatch, *words)
    (state,) = output.glob("checkpoint-*/state.json")
    then = state.read_text()
    settings = json.loads(then)["settings"]
    del settings["words_balance"]
    state.write_text(json.dumps(json.loads(then) | {"settings": settings}))
    with pytest.raises(UsageError, match=r"earlier version.*--student"):
        distil(base_folder, own_images, output, *SHORT, *words, "--resume")
    state.write_text(then)
    folder = distil(base_folder, own_images, output, *SHORT, *words[:2], "--save_dtype", "float16", "--resume")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}


def test_a_folder_given_twice_is_measured_on_the_same_images_when_resumed(
    base_folder, own_images, tmp_path, monkeypatch
):
    output, twice = tmp_path / "run", ("--images", own_images, own_images, own_images, "--holdout_images", 3)
    stopped_run(base_folder, own_images, output, monkeypatch, *twice)
    before = read_samples(output)["measured"]
    assert len(before) == 3
    distil(base_folder, own_images, output, *SHORT, *twice, "--resume")
    assert read_samples(output)["measured"] == before


def test_the_same_images_resume_and_a_run_without_a_record_says_so(
    base_folder, own_images, tmp_path, monkeypatch, caplog
):
    stopped_run(base_folder, own_images, tmp_path / "run", monkeypatch)
    (tmp_path / "run" / "images.json.gz").unlink()  # as an earlier version left it
    with caplog.at_level("INFO"):
        assert distil(base_folder, own_images, tmp_path / "run", *SHORT, "--resume")
    assert "no list of its images" in caplog.text and read_samples(tmp_path / "run") is not None
    whole = distil(base_folder, own_images, tmp_path / "whole", *SHORT)
    rows = [[(row["step"], row["loss"]) for row in log_of(tmp_path / name)] for name in ("run", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    weights = [AutoModel.from_pretrained(folder).state_dict() for folder in (tmp_path / "run" / "model", whole)]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_a_finished_run_is_replaced_only_when_asked(base_folder, image_folder, tmp_path):
    first = distil(base_folder, image_folder, tmp_path / "run", *SHORT, "--steps", 1)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UsageError, match="--overwrite"):
        distil(base_folder, image_folder, tmp_path / "run", *SHORT, "--steps", 1)
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="Leave one out"):
        distil(base_folder, image_folder, tmp_path / "run", *SHORT, "--steps", 1, "--overwrite", "--resume")
    distil(base_folder, image_folder, tmp_path / "run", *SHORT, "--steps", 2, "--save_steps", 1, "--overwrite")
    assert (first / "model.safetensors").stat().st_mtime_ns > stamp
    distil(base_folder, image_folder, tmp_path / "run", *SHORT, "--steps", 4, "--save_steps", 3, "--overwrite")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]  # none of the old ones


@pytest.mark.parametrize("options", [(), ("--resume",), ("--overwrite",)])
def test_a_second_run_beside_a_living_one_is_refused(base_folder, image_folder, tmp_path, options):
    with locked_elsewhere(tmp_path / "run"), pytest.raises(Locked, match="being written"):
        distil(base_folder, image_folder, tmp_path / "run", *SHORT, *options)


def test_a_failed_start_leaves_no_lock(base_folder, tmp_path):
    arguments = ["--model", str(base_folder), "--images", str(tmp_path / "none"), "--output", str(tmp_path / "run")]
    with pytest.raises(UsageError):
        Distillation(parse_options(arguments))
    assert not (tmp_path / "run").exists()
