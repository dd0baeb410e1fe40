"""Decisions among many names, from those that can win, against the logits of all names at every pixel."""

import os
import shutil

import pytest
import torch
from torch.nn import functional as F

from spar_hf.model import decisions, segmentation
from spar_hf.model.decisions import (
    ERROR_BOUND,
    CellRow,
    ClassMaxima,
    Rule,
    compiled_tile,
    decide_rows,
    decide_tile,
    tile_decider,
)
from spar_hf.model.segmentation import class_probabilities, decide
from spar_hf.model.upsampling import Axes


def smooth(names, height, width, scale, seed=0):
    """Logits that change slowly over the image, as a model's do."""
    coarse = torch.randn(1, names, 3, 4, generator=torch.Generator().manual_seed(seed)) * scale
    return F.interpolate(coarse, size=(height, width), mode="bicubic")[0]


def rough(names, height, width, scale, seed=0):
    return torch.randn(names, height, width, generator=torch.Generator().manual_seed(seed)) * scale


def both_ways(monkeypatch, *arguments, **options):
    """The decision with and without the logits of all names at every pixel."""
    found = decide(*arguments, **options)
    with monkeypatch.context() as patched:
        patched.setattr(segmentation, "pays", lambda *_: False)
        return found, decide(*arguments, **options)


SYNONYMS = torch.arange(90) % 37


@pytest.mark.parametrize("name_to_class", [torch.arange(90), SYNONYMS.sort().values, SYNONYMS])
@pytest.mark.parametrize(
    ("make", "scale"), [(smooth, 0), (smooth, 0.3), (smooth, 3), (smooth, 200), (rough, 0.01), (rough, 3), (rough, 60)]
)
def test_labels_are_the_same_and_probabilities_within_the_bound(monkeypatch, name_to_class, make, scale):
    logits = make(90, 5, 7, scale)
    logits[50] = logits[20]  # equal logits: the first name wins
    for excluded in (None, torch.arange(90) % 3 == 1):
        excluded = None if excluded is None else excluded[: int(name_to_class.max()) + 1]
        for scores in ("classes", "names"):
            geometry = (name_to_class, 16, (75, 101), (75, 101))
            found, plain = both_ways(monkeypatch, logits, *geometry, excluded=excluded, scores=scores)
            assert torch.equal(found.labels, plain.labels)
            assert float((found.probabilities - plain.probabilities).abs().max()) <= ERROR_BOUND


@pytest.mark.parametrize("output", [(40, 333), (75, 101), (301, 97)])
@pytest.mark.parametrize("working_bytes", [100_000, 2**26])
def test_at_any_size_of_the_image_and_from_rows_on_request(monkeypatch, output, working_bytes):
    logits = smooth(80, 5, 7, 4)
    geometry = (torch.arange(80), 16, (75, 101), output, working_bytes)
    found, plain = both_ways(monkeypatch, lambda first, last: logits[:, first:last], *geometry)
    assert torch.equal(found.labels, plain.labels)
    assert float((found.probabilities - plain.probabilities).abs().max()) <= ERROR_BOUND


def test_smooth_logits_are_read_at_few_nodes_and_rough_ones_at_every_pixel(monkeypatch):
    """What it costs: names at nodes and pixels, relative to all names at all pixels."""
    work = {"nodes": 0, "pixels": 0}
    denominators, exactly = CellRow.denominators, Rule.decide

    def count_nodes(row, cells, weights):
        work["nodes"] += len(cells) * len(weights)
        return denominators(row, cells, weights)

    def count_pixels(rule, pixels):
        assert pixels.numel() * 4 <= 2**20  # what a tile may take
        work["pixels"] += pixels[..., 0].numel()
        return exactly(rule, pixels)

    monkeypatch.setattr(CellRow, "denominators", count_nodes)
    monkeypatch.setattr(Rule, "decide", count_pixels)
    geometry = (torch.arange(300), 16, (160, 192), (160, 192), 2**20)
    decide(smooth(300, 10, 12, 1.5), *geometry)
    assert work["nodes"] > 0 and work["nodes"] + work["pixels"] < 0.15 * 160 * 192
    work["nodes"] = work["pixels"] = 0
    decide(rough(300, 10, 12, 0.01), *geometry)  # every name may win anywhere
    assert work["nodes"] == 0 and work["pixels"] == 160 * 192


def test_one_row_of_cells_against_float64():
    """The bound holds with half a patch at the borders, and against an exact denominator."""
    logits = smooth(70, 2, 5, 6).double()
    axes = Axes.of(16, (32, 80), (32, 80), torch.device("cpu"))
    above, below = logits.float().permute(1, 2, 0)
    rule = Rule(ClassMaxima.of(torch.arange(70)), torch.arange(70))
    rows = slice(8, 24)  # those between the two rows of patches
    name, probability = decide_rows(above, below, axes.rows[2][rows], axes.columns, rule, 2**26)
    expected = F.interpolate(logits[None], scale_factor=16, mode="bilinear")[0, :, rows].softmax(0).max(0)
    assert torch.equal(name[0], expected.indices)
    assert float((probability[0] - expected.values).abs().max()) <= ERROR_BOUND


def test_classes_of_several_names():
    maxima = ClassMaxima.of(torch.tensor([4, 0, 4, 2, 4]))
    values = torch.tensor([[1.0, 2, 3, 4, 3], [5, 0, 1, 2, 9]])
    assert maxima(values).tolist() == [[2, 4, 3], [0, 2, 9]]  # classes 0, 2 and 4
    best, names = maxima.best_names(values)
    assert best.tolist() == [[2, 4, 3], [0, 2, 9]] and names.tolist() == [[1, 3, 2], [1, 3, 4]]
    same = ClassMaxima.of(torch.arange(5, dtype=torch.int32))
    assert same.first is None and same(values) is values


# --- the best classes of every pixel ---


@pytest.mark.parametrize("name_to_class", [torch.arange(90), SYNONYMS.sort().values, SYNONYMS])
@pytest.mark.parametrize(("make", "scale"), [(smooth, 0), (smooth, 3), (rough, 0.01), (rough, 3)])
def test_the_best_classes_are_those_of_all_logits(monkeypatch, name_to_class, make, scale):
    logits = make(90, 5, 7, scale)
    logits[50] = logits[20]
    geometry = (name_to_class, 16, (75, 101), (75, 101))
    labels, probabilities = class_probabilities(logits, *geometry, top_k=5)
    one = decide(logits, *geometry)
    assert torch.equal(labels[0], one.labels) and len(labels) == 5
    with monkeypatch.context() as patched:
        patched.setattr(segmentation, "pays", lambda *_: False)
        plain_labels, plain = class_probabilities(logits, *geometry, top_k=5, working_bytes=100_000)
    assert torch.equal(labels, plain_labels)
    assert float((probabilities - plain).abs().max()) <= ERROR_BOUND
    # against the plain formula: the largest logit of each class, softmax, sorted
    up = F.interpolate(logits[None], scale_factor=16, mode="bilinear")[0, :, :75, :101]
    classes = int(name_to_class.max()) + 1
    expected = torch.stack([up[name_to_class == c].amax(0) for c in range(classes)]).softmax(0)
    torch.testing.assert_close(plain, expected.topk(5, 0).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(expected.gather(0, labels.long()), plain, atol=1e-5, rtol=0)


def test_the_best_classes_of_many_names_take_no_logits_of_all_pixels(monkeypatch):
    largest, upsample = 0, CellRow.upsample

    def watched(row, columns, down):
        nonlocal largest
        found = upsample(row, columns, down)
        largest = max(largest, found.numel() * 4)
        return found

    monkeypatch.setattr(CellRow, "upsample", watched)
    logits = smooth(2000, 10, 12, 3)
    found, _ = class_probabilities(logits, torch.arange(2000), 16, (160, 192), (160, 192), top_k=5, working_bytes=2**21)
    assert found.shape == (5, 160, 192) and largest <= 2**21


# --- one graph per tile, for GPUs ---


def tile(names, rows=5, columns=7, seed=0):
    """The arguments of `bilinear` for an image of 16 pixels per patch."""
    logits = smooth(names, 3, 4, 3, seed)
    axes = Axes.of(16, (48, 64), (rows, columns), torch.device("cpu"))
    return next(part for _, part in axes.parts(logits.permute(1, 2, 0).contiguous(), 0, rows, 0, names, 2**26))


RULES = [
    Rule(ClassMaxima(None), torch.arange(6)),
    Rule(ClassMaxima.of(torch.tensor([0, 1, 1, 2, 0, 1])), torch.tensor([0, 1, 1, 2, 0, 1]), top=3),
    Rule(ClassMaxima(None), torch.arange(6), torch.tensor([True, False, False, True, False, False])),
]


def check_compiled(compiled, rule):
    for rows, columns in ((5, 7), (9, 30), (31, 11)):
        part = tile(6, rows, columns)
        names, probabilities = compiled(rule, *part)
        expected = decide_tile(rule, *part)
        assert torch.equal(names, expected[0])
        torch.testing.assert_close(probabilities, expected[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES, ids=["names", "synonyms", "excluded"])
def test_a_tile_is_one_graph_for_all_sizes(rule):
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    check_compiled(torch.compile(decide_tile, fullgraph=True, dynamic=True, backend=count), rule)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
def test_a_compiled_tile_decides_alike():
    torch.compiler.reset()
    check_compiled(compiled_tile(), Rule(RULES[1].maxima, RULES[1].classes, RULES[2].excluded, top=2))


def test_large_decisions_are_compiled_on_cuda_only(monkeypatch):
    monkeypatch.setattr(decisions, "compiled_tile", lambda: "compiled")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert tile_decider(1000, 2048**2, cuda) == "compiled"
    assert (
        tile_decider(10, 2048**2, cuda)
        is tile_decider(1000, 64, cuda)
        is tile_decider(1000, 2048**2, cpu)
        is decide_tile
    )


def test_a_compiler_that_fails_costs_nothing_but_a_line(monkeypatch):
    tries = []

    def broken(graph, inputs):
        tries.append(graph)
        raise RuntimeError("no Triton here")

    said = []
    monkeypatch.setattr(decisions.logger, "warning", said.append)
    check_compiled(compiled_tile(backend=broken), RULES[0])
    assert len(tries) == len(said) == 1 and "torch.compile" in said[0]
