"""One graph for any size: torch.compile, torch.export with dynamic sizes, torch.jit.trace; and dynamic quantisation."""

import os
import shutil

import pytest
import torch
from model_classes import CASES, READOUTS, make_inputs, make_model, semantic_config, spar_config
from tiny_models import randomise, tiny_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from spar_hf import SparForOpenVocabSegmentation, SparForSemanticSegmentation, SparVisionModel, compile_model

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


@torch.no_grad()
def test_compile_model_takes_a_square_image_first():
    """`dynamic=True` alone would take its sides for equal in every image."""
    torch._dynamo.reset()
    config = tiny_config()
    config.backbone_config.num_hidden_layers = 1  # a layer is compiled as two are
    model = randomise(SparForOpenVocabSegmentation(config))
    backend = CompileCounterWithBackend("eager")
    compiled = compile_model(model, backend=backend)
    for size, names in (((64, 64), 3), ((33, 50), 3), ((128, 128), 5), ((17, 200), 32)):
        inputs = open_vocab_inputs(size, names)
        inputs["pixel_values"] = inputs["pixel_values"][:1].clone()  # no view, whose base has sizes too
        assert_same(compiled(**inputs), model(**inputs), atol=1e-6)
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


@torch.no_grad()
def test_an_exported_classifier_holds_for_all_sizes_and_batches():
    names = [["road", "street"], ["car"], ["sky"], ["tree"]]
    model = randomise(SparForSemanticSegmentation(semantic_config("siglip", names=names)))
    dynamic_shapes = {"pixel_values": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    program = torch.export.export(model, (), kwargs=make_inputs("semantic"), dynamic_shapes=dynamic_shapes)
    exported = program.module()
    for batch, size in ((2, (30, 45)), (5, (40, 77)), (3, (64, 17))):
        inputs = make_inputs("semantic", batch, size)
        assert_same(exported(**inputs), model(**inputs), atol=1e-5)


@pytest.mark.parametrize("extent", [None, 64])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_a_traced_model_holds_for_all_sizes(readout, extent):
    """Sizes below and above the extent of the positions, which only read-outs with `bicubic` resampling have."""
    if extent and readout != "siglip":
        pytest.skip("no extent")
    model = randomise(SparVisionModel(spar_config(readout, position_extent=extent, return_dict=False)))
    traced = torch.jit.trace(model, make_inputs("vision", 1, (32, 48))["pixel_values"])
    for batch, size in ((1, (32, 48)), (2, (33, 50)), (1, (80, 120)), (3, (40, 24))):
        images = make_inputs("vision", batch, size)["pixel_values"]
        for found, expected in zip(traced(images), model(images), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["two towers", "semantic", "universal"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_heads_and_two_towers_can_be_traced(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    model.config.return_dict = False
    traced = torch.jit.trace(model, example_kwarg_inputs=inputs, check_trace=False)
    for batch, size in ((2, (30, 45)), (1, (61, 24))):
        inputs = make_inputs(kind, batch, size)
        for found, expected in zip(traced(**inputs), model(**inputs), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind, readout", CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_linear_layers_can_be_quantised(kind, readout):
    model, inputs = make_model(kind, readout), make_inputs(kind)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(part).__module__ for part in quantised.modules())
    outputs, expected = quantised(**inputs).to_tuple()[0], model(**inputs).to_tuple()[0]
    found, expected = (part[-1] if isinstance(part, tuple) else part for part in (outputs, expected))
    assert (found - expected).abs().mean() < 0.2 * expected.abs().mean()
