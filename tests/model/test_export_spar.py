"""One graph for any size: torch.compile and torch.export with dynamic height and width."""

import os
import shutil

import pytest
import torch
from tiny_models import randomise, tiny_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from spar_hf import SparForOpenVocabSegmentation, SparVisionModel

SIZES = [
    (64, 64),
    (32, 128),
    (128, 32),
    (160, 96),
    (67, 71),
    (33, 50),
    (17, 200),
]  # native grid, as many patches, …
# torch specialises on sizes of 1, so a graph is valid for images of more than one patch per axis
SIDE = {"min": 17, "max": 4096}

pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")


def images(size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


def vision_inputs(size):
    return {"pixel_values": images(size)}


def open_vocab_inputs(size, names=3):
    text_embeds = torch.randn(names, 32, generator=torch.Generator().manual_seed(names))
    return {"pixel_values": images(size), "text_embeds": text_embeds}


MODELS = {
    "vision": (SparVisionModel, vision_inputs, {}),
    "two towers": (SparForOpenVocabSegmentation, open_vocab_inputs, {}),
    "positions of an extent": (SparVisionModel, vision_inputs, {"position_extent": 112}),
}
each_model = pytest.mark.parametrize("model_class, inputs, options", MODELS.values(), ids=MODELS)


def assert_same(actual, expected, atol):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@each_model
@torch.no_grad()
def test_compiles_once_as_one_graph_for_all_sizes(model_class, inputs, options):
    torch._dynamo.reset()
    model = randomise(model_class(tiny_config(**options)))
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for size in [(80, 112), *SIZES]:
        assert_same(compiled(**inputs(size)), model(**inputs(size)), atol=1e-6)
    assert backend.frame_count == 1


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_compiles_with_inductor():
    torch._dynamo.reset()
    config = tiny_config(text_config=None)
    config.backbone_config.num_hidden_layers = 1  # a layer is compiled as two are
    model = randomise(SparVisionModel(config))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in [(80, 112), *SIZES]:
        assert_same(compiled(images(size)), model(images(size)), atol=5e-5)


@pytest.mark.parametrize("strict, traced_at", [(False, (64, 64)), (True, (83, 119))], ids=["default", "strict"])
@each_model
@torch.no_grad()
def test_exported_graph_holds_for_all_sizes(model_class, inputs, options, traced_at, strict):
    model = randomise(model_class(tiny_config(**options)))
    dynamic_shapes = {"pixel_values": {2: Dim("height", **SIDE), 3: Dim("width", **SIDE)}}
    if model_class is SparForOpenVocabSegmentation:
        dynamic_shapes["text_embeds"] = {0: Dim("names", min=1, max=1000)}
    program = torch.export.export(model, (), kwargs=inputs(traced_at), dynamic_shapes=dynamic_shapes, strict=strict)
    exported = program.module()
    for size in [traced_at, *SIZES]:
        assert_same(exported(**inputs(size)), model(**inputs(size)), atol=1e-6)
    if model_class is SparForOpenVocabSegmentation:  # the vocabulary is an input, not baked in
        for names in (1, 2, 150):
            expected = model(**open_vocab_inputs((48, 80), names))
            assert_same(exported(**open_vocab_inputs((48, 80), names)), expected, atol=1e-6)
