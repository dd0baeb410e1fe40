"""A small model and its exports, shared by the tests of this folder: tracing takes seconds."""

import pytest
import torch
from tiny_models import SHAPE, make_tokenizer, randomise, tiny_config
from transformers import SiglipVisionConfig, pipeline

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor
from spar_hf.export import export


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A two-tower model with one block, which is traced faster than two."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(backbone_config=SiglipVisionConfig(image_size=64, **{**SHAPE, "num_hidden_layers": 1}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        randomise(SparForOpenVocabSegmentation(config)).save_pretrained(folder)
    SparProcessor(SparImageProcessorPil(size={"shortest_edge": 80}), make_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(model_folder, tmp_path_factory):
    """The class map with words as an input, as ONNX: the folder and its record."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    return folder, export(model_folder, folder, dtypes=["fp32", "int8"])


@pytest.fixture(scope="session")
def pipe(model_folder):
    """The pipeline of the model."""
    return pipeline("open-vocab-segmentation", model=str(model_folder))
