"""How a student is written to disk: its card, its pictures, and never half a file."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny_models import randomise, tiny_config
from transformers import pipeline

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor, SparVisionModel
from spar_hf.distillation.held_out import ErrorCurve
from spar_hf.distillation.records import held_out_record
from spar_hf.distillation.student_folders import finish_folder, held_out_section, save_adapter, save_student, store_as
from spar_hf.distillation.trainer import Distillation
from spar_hf.utils.errors import NotFinite

IMAGE = Image.effect_mandelbrot((121, 90), (-2, -1, 1, 1), 20).convert("RGB")
RECORD = {"teacher": "org/base", "steps": 3}


RECIPE = {"output": "runs/student", "model": "/home/me/org/base", "student": ["org/base"], "steps": 3, "resume": False}


def write_student(folder, tokenizer=None):
    """A student as at the end of a run, with a text tower where there is a tokenizer."""
    model = randomise((SparVisionModel if tokenizer is None else SparForOpenVocabSegmentation)(tiny_config()))
    processor = SparImageProcessorPil(size={"shortest_edge": 80})
    state = (model if tokenizer is None else model.vision_model).state_dict()
    both = processor if tokenizer is None else SparProcessor(processor, tokenizer)
    save_student(model, both, state, folder, RECORD, RECIPE)
    return model


def cards(folder):
    """What the hub reads of the card, in the middle of a run and at its end."""
    found = [ModelCard.load(folder / "README.md").data]
    finish_folder(folder, RECORD, RECIPE, [])
    found.append(ModelCard.load(folder / "README.md").data)
    return [(data.library_name, data.pipeline_tag, data.tags) for data in found]


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_weights_beyond_half_precision_are_not_written(tmp_path, tokenizer, tower):
    model = randomise(SparForOpenVocabSegmentation(tiny_config()))
    with torch.no_grad():
        next(getattr(model, f"{tower}_model").parameters()).view(-1)[0] = 1e5
    both = SparProcessor(SparImageProcessorPil(), tokenizer)
    arguments = (model, both, model.vision_model.state_dict(), tmp_path / "model", RECORD, RECIPE)
    with pytest.raises(NotFinite, match=r"1 weights .* beyond the range of float16.*--save_dtype bfloat16"):
        save_student(*arguments, "float16")
    assert not (tmp_path / "model").exists()
    save_student(*arguments, "bfloat16")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_folder_is_stored_in_another_precision(tmp_path, tokenizer):
    model = write_student(tmp_path / "model", tokenizer)
    store_as(tmp_path / "model", "bfloat16")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name].bfloat16()) for name, tensor in stored.items())
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    store_as(tmp_path / "model", "bfloat16")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before
    again = SparForOpenVocabSegmentation.from_pretrained(tmp_path / "model")
    assert again.dtype == torch.float32


def test_the_card_of_two_towers_names_segmentation_by_words(tmp_path, tokenizer):
    folder = tmp_path / "model"
    write_student(folder, tokenizer)
    expected = ("transformers", "image-segmentation", ["spar", "open-vocabulary-segmentation"])
    assert cards(folder) == [expected] * 2
    words = pipeline("open-vocab-segmentation", model=str(folder))
    assert words(IMAGE, candidate_labels=["road", "sky"], templates="plain", output="map")["map"].shape == (90, 121)


def test_the_card_of_a_vision_tower_names_the_pipeline_that_runs_it(tmp_path):
    folder = tmp_path / "model"
    model = write_student(folder)
    assert cards(folder) == [("transformers", "image-feature-extraction", ["spar"])] * 2
    task = ModelCard.load(folder / "README.md").data.pipeline_tag
    found = torch.tensor(pipeline(task, model=str(folder))(IMAGE))
    pixels = SparImageProcessorPil(size={"shortest_edge": 80})(IMAGE, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).last_hidden_state  # as of every model in this pipeline
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_card_of_adapters_names_features(tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = get_peft_model(SparVisionModel(tiny_config()), config)
    save_adapter(wrapped, wrapped.state_dict(), folder, RECORD, RECIPE, "/home/me/org/base")
    assert cards(folder) == [("peft", "image-feature-extraction", ["spar"])] * 2


def test_a_copy_that_breaks_off_leaves_the_picture_before(tmp_path, monkeypatch):
    folder, curve = tmp_path / "model", tmp_path / "curve.png"
    write_student(folder)
    curve.write_bytes(b"first")
    finish_folder(folder, RECORD, RECIPE, [curve])
    assert (folder / "curve.png").read_bytes() == b"first" and "(curve.png)" in (folder / "README.md").read_text()
    names = sorted(path.name for path in folder.iterdir())

    def break_off(source, target):
        with open(target, "wb") as file:
            file.write(b"sec")
        raise OSError("disk full")

    monkeypatch.setattr("shutil.copyfile", break_off)
    with pytest.raises(OSError, match="disk full"):
        finish_folder(folder, RECORD, RECIPE, [curve])
    assert (folder / "curve.png").read_bytes() == b"first" and sorted(path.name for path in folder.iterdir()) == names


def test_a_picture_of_a_step_is_written_as_a_whole_or_not_at_all(tmp_path):
    class Half:
        def save(self, path):
            path.write_bytes(b"half")
            raise OSError("disk full")

    run = SimpleNamespace(output=tmp_path, accelerator=SimpleNamespace(trackers=[]))
    Distillation._show(run, IMAGE, 3)
    for step in (3, 4):
        with pytest.raises(OSError, match="disk full"):
            Distillation._show(run, Half(), step)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["step-000003.png"]
    assert Image.open(tmp_path / "pictures" / "step-000003.png").size == IMAGE.size


def test_the_card_says_which_error_was_smallest():
    """With words it is a sum, and the table shows both terms."""
    points = [
        {"step": 500, "mse": 0.010, "cosine": 0.95, "words": 0.10},
        {"step": 900, "mse": 0.012, "cosine": 0.94, "words": 0.02},
    ]
    curve = ErrorCurve({"mse": 0.1, "cosine": 0.5, "words": 0.5}, points, 5.0)
    card = held_out_section({"words_weight": 5.0, **held_out_record(curve, 3)})
    assert "step\n900, where the mean squared error plus 5 times the divergence over words was smallest" in card
    assert (
        "| 900 | 0.012 | 0.94 | 0.02 |" in card
        and "| step | mean squared error | cosine | divergence over words |" in card
    )
    for point in [curve.before, *points]:
        del point["words"]
    curve = ErrorCurve(curve.before, points, 0.0)
    card = held_out_section({"words_weight": 5.0, **held_out_record(curve, 3)})
    assert "step\n500, where the mean squared error was smallest" in card and "| 900 | 0.012 | 0.94 |\n" in card
