"""The benchmark runs on every family it knows and compares like with like."""

import pytest
import torch
from benchmark import Options, load, plain_pass, run
from conftest import randomise
from test_backbones import CONFIGS

from spar_hf import SparConfig, SparVisionModel


@pytest.mark.parametrize("readout", ["siglip", "maskclip", "dinov3", "dinov3txt"])
@torch.no_grad()
def test_both_sides_compute_the_same(readout, tmp_path):
    model = randomise(SparVisionModel(SparConfig(backbone_config=CONFIGS[readout](), readout=readout)))
    pixels = torch.randn(1, 3, 48, 64)
    features = model(pixels).feature_map.flatten(2).transpose(1, 2)
    torch.testing.assert_close(plain_pass(model, pixels), features, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    rows = run(Options(model=str(tmp_path), height=48, width=64, repeats=2, device="cpu"))
    assert len(rows) == 3 and all(row["ratio"] > 0 and row["seconds"] > 0 for row in rows)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="siglip2, openclip, dinov3txt"):
        load(Options(random="resnet"))
