"""Models whose weights accelerate keeps elsewhere, on the CPU, on the disk or on several devices, give the same outputs."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from model_classes import CASES, KINDS, READOUTS, make_inputs, make_model
from transformers.modeling_layers import GradientCheckpointingLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*buffer for offloaded layers", "ignore:.*do not match any submodules")
each_case = pytest.mark.parametrize("kind, readout", CASES, ids=lambda part: part)


@torch.no_grad()
def run(model, kind):
    """All outputs; of a vision model the pooled embedding too, whose layers are not called by the dense path."""
    options = {"output_pooled": True} if kind == "vision" else {}
    return model(**make_inputs(kind), **options)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=0, rtol=0, msg=name)


@each_case
def test_offloaded_to_the_cpu(kind, readout):
    model = make_model(kind, readout)
    expected = run(model, kind)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=kind == "vision")
    for _ in range(2):
        assert_same(run(model, kind), expected)
        assert all(p.is_meta for p in model.parameters()), "weights are sent back after use"


@pytest.mark.parametrize("kind, readout", [("vision", readout) for readout in READOUTS], ids=lambda part: part)
def test_offloaded_to_the_disk(kind, readout, tmp_path):
    model = make_model(kind, readout)
    expected = run(model, kind)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert_same(run(model, kind), expected)


@each_case
def test_loaded_where_memory_is_short(kind, readout, tmp_path):
    model = make_model(kind, readout)
    model.save_pretrained(tmp_path / "model")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    options = {"device_map": "auto", "max_memory": {"cpu": int(0.7 * size)}, "offload_folder": str(tmp_path / "rest")}
    loaded = KINDS[kind][0].from_pretrained(tmp_path / "model", **options)
    assert "disk" in loaded.hf_device_map.values()
    assert_same(run(loaded, kind), run(model, kind))


@each_case
def test_layers_stay_whole_when_a_model_is_split(kind, readout):
    model = make_model(kind, readout)
    layers = [name for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)]
    whole = list(model._no_split_modules)
    splits = set()
    for share in (0.5, 0.7, 0.9):
        size = share * sum(p.numel() * p.element_size() for p in model.parameters())
        found = infer_auto_device_map(model, max_memory={0: int(size), "cpu": "1GB"}, no_split_module_classes=whole)
        splits.add(len(set(found.values())))
        assert not [name for name in found for layer in layers if name.startswith(f"{layer}.")]
    assert layers and 2 in splits
