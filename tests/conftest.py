"""Fixtures that several rooms use: tiny models of random weights, images, what transformers logs."""

import functools
import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from launching import reset_accelerate
from PIL import Image
from tiny_models import make_tokenizer, randomise, tiny_config
from transformers import PreTrainedTokenizerFast, pipeline

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor

torch.set_num_threads(1)  # two workers share two cores


# rooms whose tests share what takes long to make, such as exports or a running server: each room runs in one process
SHARED = ("batch/test_ray_engine", "distillation/test_distill_resume", "docs/test_commands", "export/")
SHARED += ("model/test_remote_code", "runtime/", "serving/", "test_wheel")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Slow tests first, so that no process waits for the other's last one; and rooms of `SHARED` together."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        for room in SHARED:
            if path.startswith(room):
                item.add_marker(pytest.mark.xdist_group(room))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """What one test told accelerate, half precision say, must not be inherited by the next one in this process."""
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture
def two_towers() -> SparForOpenVocabSegmentation:
    torch.manual_seed(0)
    return randomise(SparForOpenVocabSegmentation(tiny_config()))


@pytest.fixture
def vision_model(two_towers):
    return two_towers.vision_model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def segment(two_towers, tokenizer):
    """The pipeline of a tiny model of random weights."""
    processor = SparImageProcessorPil(size={"shortest_edge": 80})
    return pipeline("open-vocab-segmentation", model=two_towers, tokenizer=tokenizer, image_processor=processor)


@pytest.fixture
def forwards(two_towers):
    """Records the shape of every batch of the vision tower."""
    shapes: list[tuple[int, ...]] = []
    two_towers.vision_model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.fixture
def picture() -> Image.Image:
    """An image of noise whose sides are no multiple of a patch."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A saved two-tower model with its processor: a teacher for the training commands."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same in every run: how far it can be trained in a few steps is no matter of luck
        model = SparForOpenVocabSegmentation(tiny_config())
    randomise(model).save_pretrained(folder)
    SparProcessor(SparImageProcessorPil(size={"shortest_edge": 128}), make_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Six coloured images, `0.jpg` to `5.jpg`, 110 px high and 150 to 205 px wide."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((150 + 11 * i, 110), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


def warned(library: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """
    What a library warns of during the test, also what it says only once per process. The calls are recorded, so levels and
    handlers that earlier tests of this process left behind play no part.
    """
    messages: list[str] = []

    def record(logger, message, *args, **kwargs):
        said = logger.makeRecord(logger.name, logging.WARNING, "", 0, message, args, None)
        if logger.name.split(".")[0] == library and logger.filter(said):
            messages.append(said.getMessage())

    for name in ("warning", "error", "critical"):
        monkeypatch.setattr(logging.Logger, name, record)
    monkeypatch.setattr(logging.Logger, "warning_once", functools.cache(record))
    return messages


@pytest.fixture
def transformers_log(monkeypatch):
    """Warnings of transformers."""
    return warned("transformers", monkeypatch)


@pytest.fixture
def own_log(monkeypatch):
    """Warnings of this library."""
    return warned("spar_hf", monkeypatch)
