"""Options of all commands: one name has one meaning, and every command reads images in the same way."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import HfArgumentParser
from typer.main import get_command

from spar_hf.cli.main import app
from spar_hf.cli.training import COMMANDS
from spar_hf.data.augmentation import Crop
from spar_hf.data.sources import open_sources
from spar_hf.distillation.cache_teacher import CacheOptions, make_cache
from spar_hf.distillation.models import Models
from spar_hf.distillation.options import DistillationOptions
from spar_hf.distillation.stream import open_stream
from spar_hf.evaluation.dataset import open_with_words
from spar_hf.evaluation.options import EvaluationOptions
from spar_hf.heads.linear_probe import open_datasets
from spar_hf.heads.linear_probe_options import ProbeOptions
from spar_hf.heads.panoptic import open_data
from spar_hf.heads.panoptic_options import PanopticOptions
from spar_hf.pretraining.crops import load_sets
from spar_hf.pretraining.options import PretrainingOptions
from spar_hf.utils.runs import TrainingRun

TRAININGS = {
    "distill": DistillationOptions,
    "cache-teacher": CacheOptions,
    "evaluate": EvaluationOptions,
    "probe": ProbeOptions,
    "panoptic": PanopticOptions,
    "pretrain": PretrainingOptions,
}
# names whose help differs between commands, which were read beside one another: details differ, the meaning does not
REVIEWED = {
    "adaptor": "convert doctor",
    "base": "convert app doctor",
    "batch_size": "probe pretrain segment features",
    "dataset": "evaluate panoptic",
    "dtype": "features export",
    "eval_steps": "distill panoptic",
    "folder": "handler support verify",
    "holdout_every": "distill cache-teacher evaluate panoptic",
    "image_column": "distill evaluate",
    "images": "distill cache-teacher segment features verify",
    "labels": "segment bake support",
    "layers": "features pretrain",  # which blocks, how many blocks
    "learning_rate": "distill panoptic pretrain",
    "limit": "evaluate panoptic",
    "min_scale": "distill cache-teacher panoptic",
    "model": "distill cache-teacher evaluate probe panoptic segment support features bake export app space doctor env",
    "output": "distill cache-teacher evaluate probe panoptic pretrain segment support features bake convert export space "
    "doctor",
    "seed": "distill cache-teacher probe panoptic pretrain",
    "shard_images": "segment features",
    "shortest_edge": "evaluate probe panoptic segment support features",
    "split": "distill evaluate",
    "steps": "distill probe panoptic pretrain",
    "stride": "distill cache-teacher probe features doctor",
    "window_size": "distill cache-teacher evaluate pretrain features",
    "words": "distill export",
}


def meanings():
    """The help text of every option of every command, from the parsers: `{name: {command: text}}`."""
    found = defaultdict(dict)
    for command, options in TRAININGS.items():
        for action in HfArgumentParser(tuple(options.parts().values()))._actions:
            found[action.dest][command] = action.help
    for command, parsed in get_command(app).commands.items():
        if command not in COMMANDS:  # those pass their arguments on
            for parameter in parsed.params:
                found[parameter.name][command] = parameter.help
    return found


def test_one_name_has_one_meaning():
    # typer 0.16 keeps the texts of positional arguments to itself
    told = {name: texts for name, texts in meanings().items() if None not in texts.values()}
    differing = {name: set(texts) for name, texts in told.items() if len(set(texts.values())) > 1}
    assert differing == {name: set(commands.split()) for name, commands in REVIEWED.items() if name in told}


def test_one_meaning_has_one_name():
    names = defaultdict(set)
    for name, texts in meanings().items():
        for text in set(texts.values()) - {None}:
            names[text].add(name)
    assert {text: names for text, names in names.items() if len(names) > 1} == {}


@pytest.fixture
def twelve_bits(tmp_path):
    """Four grey images of 12 bits, too dark for 16, with masks; and the first one in 8 bits."""
    folder, rng = tmp_path / "set", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("sky\nroad\n")
    mask = Image.fromarray(np.repeat([0, 1], 20)[:, None].repeat(48, 1).astype(np.uint8))
    greys = rng.integers(0, 256, (4, 40, 48), dtype=np.uint8)
    for number, grey in enumerate(greys):
        Image.fromarray(grey.astype(np.uint16) * 16).save(folder / "images" / f"{number}.png")
        mask.save(folder / "masks" / f"{number}.png")
    return folder, Image.fromarray(greys[0]).convert("RGB")


def open_training_images(options):
    models = Models.load(options.teacher, torch.device("cpu"))
    sources = open_sources(options.images)
    stream = open_stream(sources, options.images, options.views, models, seed=0, holdout_images=0)
    return stream.images.read(stream.train.sample(0, 0, []))


def open_panoptic_images(options):
    with TrainingRun(Accelerator(cpu=True), options.run, {}, dict, [Path("model")]) as run:
        return open_data(options.data, run)[0].read_image(0)


# command: its options for a folder, and the first image as the command reads it
READERS = {
    "distill": ({"images": ["images"], "holdout_every": 4}, open_training_images),
    "cache-teacher": ({"images": ["images"], "holdout_every": 4, "stride": 32}, make_cache),
    "evaluate": ({"dataset": "."}, lambda options: open_with_words(options.data, options.words)[0].read_image(0)),
    "probe": (
        {"train_dataset": ".", "test_dataset": ".", "train_include": ["[01]"], "test_include": ["[23]"]},
        lambda options: open_datasets(options.data)[0].read_image(0),
    ),
    "panoptic": ({"dataset": ".", "holdout_every": 4}, open_panoptic_images),
    "pretrain": (
        {"data": "."},
        lambda options: load_sets(
            Path(options.recipe.data),
            {"sets": [{"path": ".", "weight": 1, "crop": [8, 16]}], "held_out": [], "synonyms": {}},
            reading=options.recipe,
        )[0].images[0],
    ),
}


@pytest.mark.parametrize("command", TRAININGS)
def test_images_of_12_bits_are_read_as_told_and_large_ones_refused(command, twelve_bits, base_folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # set by --max_pixels
    folder, expected = twelve_bits
    monkeypatch.chdir(folder)
    values, read = READERS[command]
    if command != "pretrain":
        values = values | {"model": [str(base_folder)] if command == "evaluate" else str(base_folder)}

    def first_image(output, **more):
        return read(TRAININGS[command].from_flat(**values, **more, output=output))

    with pytest.raises(ValueError, match=r"--image-range|no image could be read"):
        first_image("refused")
    with pytest.raises(ValueError, match=r"pixels exceed 1000|no image could be read"):
        first_image("large", image_range=[0, 4080], max_pixels=1000)
    found = first_image("read", image_range=[0, 4080], max_pixels=2000)
    if command == "cache-teacher":
        view = Crop(**found.shards[0]["maps"][0]["crop"]).apply(expected)
        expected = found.image_processor(view, do_resize=False, return_tensors="pt")["pixel_values"]
        found = found.pixel_values(0)
        with pytest.raises(ValueError, match="image_range is"):  # what was stored depends on it
            first_image("read", image_range=[0, 4095], max_pixels=2000)
    assert np.array_equal(found, expected)
