"""C-RADIO with the head of its SigLIP2 teacher: a checkpoint in the naming of the hub, compared with a plain formula."""

import pytest
import torch
from official_checkpoints import RADIO_HIDDEN, radio_head, write_radio
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import RadioModel, SiglipModel, pipeline
from typer.testing import CliRunner

from spar_hf import SparForOpenVocabSegmentation
from spar_hf.cli.main import app
from spar_hf.conversion import convert
from spar_hf.utils.errors import UsageError


def plain_head(tensors, prefix, x):
    def layer(name, x):
        x = F.layer_norm(x, (RADIO_HIDDEN,), tensors[f"{prefix}{name}.0.weight"], tensors[f"{prefix}{name}.0.bias"])
        return F.linear(F.gelu(x), tensors[f"{prefix}{name}.2.weight"], tensors[f"{prefix}{name}.2.bias"])

    x = F.linear(x, tensors[f"{prefix}fc1.weight"], tensors[f"{prefix}fc1.bias"])
    for i in range(2):
        x = x + layer(f"blocks.{i}", x)
    return layer("final", x)


@pytest.fixture
def folder(tmp_path):
    write_radio(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "prefix, adaptor",
    [("radio_model.adaptors.siglip2-g.head_mlp.", "siglip2-g"), ("_heads.siglip2-g.", "siglip2-g"), ("_heads.1.", "1")],
)
@torch.no_grad()
def test_features_face_texts(folder, prefix, adaptor, picture):
    generator = torch.Generator().manual_seed(0)
    tensors = radio_head(prefix, generator) | radio_head(prefix.replace(adaptor, "sam3"), generator)
    tensors |= {
        prefix.replace("head_mlp", "feat_mlp").replace("_heads", "_feature_projections") + "fc1.weight": torch.ones(2)
    }
    tensors["radio_model.model.blocks.0.norm1.weight"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors")
    arguments = [
        folder / "model.safetensors",
        "--family",
        "radio",
        "--base",
        folder / "base",
        "--output",
        folder / "out",
    ]
    arguments += ["--tokenizer", folder / "text", "--adaptor", adaptor]
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert done.exit_code == 0, done.output

    model = SparForOpenVocabSegmentation.from_pretrained(folder / "out")
    base, pixels = RadioModel.from_pretrained(folder / "base"), torch.rand(1, 3, 70, 42, generator=generator)
    theirs = base(pixels)
    expected = plain_head(tensors, prefix, theirs.features).transpose(1, 2).unflatten(2, (5, 3))
    found = model.vision_model(pixels, output_pooled=True)
    torch.testing.assert_close(found.feature_map, expected, atol=1e-5, rtol=0)
    token = theirs.last_hidden_state[:, int(adaptor) if adaptor.isdigit() else 0]
    torch.testing.assert_close(found.pooler_output, plain_head(tensors, prefix, token), atol=1e-5, rtol=0)
    ids = torch.randint(3, 64, (3, 16), generator=generator)
    texts = SiglipModel.from_pretrained(folder / "text").get_text_features(ids).pooler_output
    torch.testing.assert_close(model.get_text_features(ids).pooler_output, texts, atol=1e-5, rtol=0)

    segment = pipeline("open-vocab-segmentation", model=str(folder / "out"))
    assert segment(picture, candidate_labels=["road", "sky"], output="map")["map"].shape == (90, 131)
    # punctuation and case are not read, as SigLIP2's texts were
    assert segment.tokenizer("A ROAD.")["input_ids"] == segment.tokenizer("a road")["input_ids"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"adaptor": "dino_v3"}, "heads of siglip2-g, and none of dino_v3"),
        ({"tokenizer": None}, "--tokenizer"),
        ({"spectral": True}, "spectral"),
    ],
)
def test_what_does_not_fit_is_refused(folder, options, message):
    tensors = radio_head("_heads.siglip2-g.", torch.Generator().manual_seed(0))
    if options.pop("spectral", False):
        weight = tensors.pop("_heads.siglip2-g.fc1.weight")
        tensors["_heads.siglip2-g.fc1.parametrizations.weight.original"] = weight
    save_file(tensors, folder / "head.safetensors")
    named = {"tokenizer": str(folder / "text")} | options
    with pytest.raises(UsageError, match=message):
        convert(folder / "head.safetensors", "radio", str(folder / "base"), folder / "out", **named)
    assert not (folder / "out").exists()
