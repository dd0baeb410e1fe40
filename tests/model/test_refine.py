"""Refinements against dense algebra and plain loops, their effect on masks, and their use in the pipeline."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import DINOv3ViTConfig, pipeline
from transformers.dynamic_module_utils import get_imports

import spar_hf.model.refine
import spar_hf.model.upsamplers
from spar_hf import SparImageProcessorPil
from spar_hf.model.refine import (
    LabelPropagation,
    PixelAdaptiveRefinement,
    finer_grid,
    refined_logits,
    resolve_refinement,
)
from spar_hf.model.upsamplers import PRESETS, resolve_upsampler, upsampled_features

scipy = pytest.importorskip("scipy")


def random_image(names=3, dim=8, height=5, width=7, cell=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((names, height, width), (dim, height, width), (3, height * cell, width * cell))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


# --- label propagation ---


def test_propagated_logits_solve_the_dense_equations():
    logits, features, pixels = random_image()
    propagation = LabelPropagation(alpha=0.9, neighbors=6)
    weights = propagation.feature_graph(features).toarray()
    assert (weights == weights.T).all() and (weights >= 0).all() and (weights.diagonal() == 0).all()
    root = np.sqrt(weights.sum(1))
    normalised = weights / root[:, None] / root[None, :]
    right = root[:, None] * logits.flatten(1).T.double().numpy()
    expected = 0.1 * np.linalg.solve(np.eye(35) - 0.9 * normalised, right) / root[:, None]
    refined = propagation(logits, features, pixels)
    np.testing.assert_allclose(refined.flatten(1).T.numpy(), expected, atol=2e-3)


def test_edges_join_each_patch_to_the_most_alike_ones():
    _, features, _ = random_image()
    flat = features.flatten(1).T
    centred = F.normalize(flat - flat.mean(0), dim=-1)
    weights = np.zeros((35, 35))
    for i in range(35):
        row = []
        for j in range(35):
            distance = np.hypot(i // 7 - j // 7, i % 7 - j % 7)
            row.append(max(0.0, float(centred[i] @ centred[j])) ** 2 * np.exp(-distance / 3))
        row[i] = -1
        for j in np.argsort(row)[-4:]:
            weights[i, j] = row[j]
    graph = LabelPropagation(neighbors=4, gamma=2, reach=3).feature_graph(features)
    np.testing.assert_allclose(graph.toarray(), (weights + weights.T) / 2, atol=1e-5)


def test_colour_edges_join_cells_up_to_two_apart():
    guide = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = np.zeros((24, 24))
    for i in range(24):
        for j in range(24):
            rows, columns = i // 6 - j // 6, i % 6 - j % 6
            if i != j and max(abs(rows), abs(columns)) <= 2:
                difference = guide[:, i // 6, i % 6] - guide[:, j // 6, j % 6]
                expected[i, j] = np.exp(-float(difference.square().sum()) / 0.5) / 2
    np.testing.assert_allclose(LabelPropagation(tau=0.5).colour_graph(guide).toarray(), expected, atol=1e-6)


@pytest.mark.parametrize("refine", ["lposs", "lposs+", "pamr"])
def test_refined_logits_are_means_of_logits(refine):
    """Refined logits stay within the range of the logits, and constant logits are unchanged."""
    logits, features, pixels = random_image(cell=8)
    logits[1] = 2.5
    refined = resolve_refinement(refine)(logits, features, pixels)
    assert refined.shape[1] % 5 == 0 and refined.shape[2] // 7 == refined.shape[1] // 5
    assert refined.min() >= logits.min() - 1e-2 and refined.max() <= logits.max() + 1e-2
    torch.testing.assert_close(refined[1], torch.full_like(refined[1], 2.5), atol=1e-2, rtol=0)


def test_propagation_takes_single_wrong_patches_back():
    generator = torch.Generator().manual_seed(0)
    left = (torch.arange(12) < 5).expand(10, 12)
    features = torch.where(left, 1.0, -1.0)[None] * torch.randn(16, 1, 1, generator=generator)
    features = features + 0.1 * torch.randn(16, 10, 12, generator=generator)
    logits = torch.stack([left.float(), 1 - left.float()])
    wrong = torch.rand(10, 12, generator=generator) < 0.2
    logits[:, wrong] = logits[:, wrong].flip(0)
    refined = LabelPropagation(alpha=0.9)(logits, features, torch.zeros(3, 160, 192))
    assert ((logits[0] > logits[1]) == left).float().mean() < 0.9
    assert ((refined[0] > refined[1]) == left).all()


def test_a_grid_of_one_patch_and_equal_features_are_no_trouble():
    for size in ((1, 1), (1, 2), (3, 3)):
        logits = torch.randn(2, *size)
        refined = LabelPropagation()(logits, torch.ones(4, *size), torch.zeros(3, size[0] * 16, size[1] * 16))
        assert refined.shape == logits.shape and refined.isfinite().all()


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"pip install spar-hf\[refine\]"):
        LabelPropagation()(*random_image())
    # a folder that carries this file loads without SciPy
    assert "scipy" not in get_imports(Path(spar_hf.model.refine.__file__))


# --- pixel-adaptive refinement ---


def test_pamr_is_the_mean_over_dilated_neighbours():
    logits, features, pixels = random_image(height=3, width=4, cell=2)
    refined = PixelAdaptiveRefinement(iterations=1, dilations=(1, 2))(logits, features, pixels)
    fine = F.interpolate(logits[None], scale_factor=2, mode="bilinear")[0]
    expected = torch.zeros_like(fine)
    offsets = [(d * y, d * x) for d in (1, 2) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    for i in range(6):
        for j in range(8):
            near = [(min(max(i + y, 0), 5), min(max(j + x, 0), 7)) for y, x in offsets]
            around = torch.stack([pixels[:, a, b] for a, b in near])
            spread = torch.cat([around, pixels[:, i, j][None]]).std(0)
            weights = (-((around - pixels[:, i, j]).abs() / (0.1 * spread + 1e-8)).mean(1)).softmax(0)
            expected[:, i, j] = sum(w * fine[:, a, b] for w, (a, b) in zip(weights, near, strict=True))
    torch.testing.assert_close(refined, expected, atol=1e-5, rtol=1e-5)


def test_pamr_moves_the_border_to_the_edge_of_the_image():
    """An edge within a patch: bilinear masks miss it by up to half a patch."""
    edge = 70
    pixels = (torch.arange(160) < edge).float().expand(3, 96, 160)
    share = pixels[0].view(6, 16, 10, 16).mean((1, 3))  # of each patch left of the edge
    logits = torch.stack([(share > 0.5).float(), (share <= 0.5).float()])
    truth = pixels[0] > 0.5
    plain = F.interpolate(logits[None], scale_factor=16, mode="bilinear")[0]
    refined = PixelAdaptiveRefinement(iterations=10)(logits, torch.zeros(4, 6, 10), pixels)
    assert refined.shape == plain.shape
    wrong = [((found[0] > found[1]) != truth).float().mean() for found in (plain, refined)]
    assert wrong[0] > 0.02 and wrong[1] < 0.5 * wrong[0]


def test_finer_grids_are_bounded_whatever_the_vocabulary():
    for names in (1, 150, 1000):
        for height, width in ((1, 1), (24, 32), (64, 128), (300, 300)):
            r = finer_grid(height, width, names, 16, 2**16)
            assert 16 % r == 0
            assert r == 1 or (height * width * r * r <= 2**16 and 4 * names * height * width * r * r <= 64 * 2**20)
    assert finer_grid(24, 32, 11, 16, 2**16) == 8


# --- in the model and the pipeline ---


@pytest.fixture
def outputs(two_towers):
    """Logits of an image and three texts, and the first arguments of `refined_logits`."""
    pixels = torch.randn(1, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made = two_towers(pixels, text_embeds=torch.randn(3, 32, generator=torch.Generator().manual_seed(1)))
    return pixels, made, (two_towers, made.feature_map[0], made.text_embeds, pixels[0])


def test_a_refinement_gets_one_grid_over_whole_cells(outputs):
    pixels, made, arguments = outputs
    seen = []

    def twice(logits, feature_map, pixel_values):
        seen.extend([logits.shape, feature_map.shape, pixel_values.shape])
        torch.testing.assert_close(pixel_values[:, :50, :70], pixels[0])
        assert (pixel_values[:, 50:, :70] == pixels[0, :, -1:]).all()  # the border is repeated
        return logits.repeat_interleave(2, 1).repeat_interleave(2, 2)

    logits, cell = refined_logits(*arguments, twice)
    assert seen == [(3, 4, 5), (32, 4, 5), (3, 64, 80)]
    assert cell == 8 and logits.shape == (3, 7, 9)  # ceil(50 / 8), ceil(70 / 8)
    torch.testing.assert_close(logits[:, ::2, ::2], made.logits[0])
    logits, cell = refined_logits(*arguments)
    assert cell == 16
    torch.testing.assert_close(logits, made.logits[0])


def test_an_upsampler_comes_before_the_logits(outputs):
    _, made, arguments = outputs

    def upsampler(image, features):
        assert image.shape == (1, 3, 64, 80) and torch.equal(features, made.feature_map)
        return F.interpolate(features, scale_factor=4, mode="bilinear")

    logits, cell = refined_logits(*arguments, upsampler=upsampler)
    fine = F.normalize(F.interpolate(made.feature_map, scale_factor=4, mode="bilinear"), dim=1)
    expected = torch.einsum("bdhw,nd->bnhw", fine, made.text_embeds)[0] * 40
    assert cell == 4
    torch.testing.assert_close(logits, expected[:, :13, :18], atol=1e-3, rtol=1e-4)
    finer, cell = refined_logits(*arguments, "pamr", upsampler)
    assert cell == 1 and finer.shape == (3, 50, 70)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": "nonsense"}, r"'lposs'.*'pamr'"),
        ({"refine": 3}, "callable"),
        ({"refine": lambda logits, features, pixels: logits[:, :-1]}, "divides 16"),
        (
            {"refine": lambda logits, features, pixels: logits.repeat_interleave(3, 1).repeat_interleave(3, 2)},
            "divides",
        ),
        ({"upsampler": lambda image, features: features[:, :5]}, "upsampler's features"),
    ],
)
def test_what_does_not_fit_is_refused(outputs, options, message):
    _, _, arguments = outputs
    with pytest.raises(ValueError, match=message):
        refined_logits(*arguments, **options)


@pytest.mark.parametrize("refine", ["lposs", "lposs+", "pamr"])
def test_pipeline_refines_masks_of_any_size(two_towers, tokenizer, refine):
    segment = pipeline(
        "open-vocab-segmentation",
        model=two_towers,
        tokenizer=tokenizer,
        image_processor=SparImageProcessorPil(size={"shortest_edge": 75}),
    )
    coarse = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((131, 90), Image.Resampling.BICUBIC)
    labels = {"candidate_labels": ["road", "sky", "tree"], "output": "map", "templates": "short"}
    plain, refined = segment(picture, **labels), segment(picture, refine=refine, **labels)
    assert refined["map"].shape == (90, 131)
    assert 0.5 < (refined["map"] == plain["map"]).mean() < 1
    assert (segment(picture, **labels)["map"] == plain["map"]).all()  # of that call only


def test_pipeline_runs_ones_own_refinement_and_upsampler(two_towers, tokenizer):
    segment = pipeline(
        "open-vocab-segmentation", model=two_towers, tokenizer=tokenizer, image_processor=SparImageProcessorPil()
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    labels = {"candidate_labels": ["road", "sky"], "output": "map", "templates": "short"}
    plain = segment(picture, **labels)["map"]
    same = segment(picture, refine=lambda logits, *_: logits, upsampler=lambda image, features: features, **labels)[
        "map"
    ]
    assert (plain == same).mean() > 0.999


# --- upsamplers: windows and names ---


def local_upsampler(image, features):
    """Reaches 4 patches far: a mean over 9 × 9 patches, beside colours of the image."""
    near = F.avg_pool2d(F.pad(features, (4, 4, 4, 4), mode="replicate"), 9, stride=1)
    fine = (features + near).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return fine + F.avg_pool2d(image, 2).mean(1, keepdim=True)


def test_a_local_upsampler_gives_the_same_in_windows_as_on_the_whole():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 40, 61, generator=generator)
    image = torch.randn(1, 3, 160, 244, generator=generator)
    seen, found = [], torch.zeros(5, 80, 122)

    def upsampler(image, features):
        seen.append(tuple(features.shape[-2:]))
        assert image.shape[-2:] == (4 * features.shape[-2], 4 * features.shape[-1])
        return local_upsampler(image, features)

    for place, fine, side in upsampled_features(upsampler, image, features, 4):
        assert side == 2 and (found[:, *place] == 0).all()
        found[:, *place] = fine
    assert len(seen) == 6 and max(max(size) for size in seen) == 32
    torch.testing.assert_close(found, local_upsampler(image, features[None])[0])


def test_windows_of_another_factor_are_refused():
    def upsampler(image, features):
        return features.repeat_interleave(features.shape[-1] // 12, 2).repeat_interleave(features.shape[-1] // 12, 3)

    with pytest.raises(ValueError, match="cells of 8 and of 16"):
        list(upsampled_features(upsampler, torch.zeros(1, 3, 32, 640), torch.zeros(2, 2, 40), 16))


def test_logits_of_windows_are_those_of_the_whole_map_and_a_refinement_gets_all_features(two_towers, monkeypatch):
    pixels = torch.randn(3, 16 * 34, 16 * 3 - 5, generator=torch.Generator().manual_seed(0))
    features = torch.randn(32, 34, 3, generator=torch.Generator().manual_seed(1))
    texts = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))

    def upsampler(image, features):
        return features.repeat_interleave(2, 2).repeat_interleave(2, 3)

    logits, cell = refined_logits(two_towers, features, texts, pixels, upsampler=upsampler)
    expected = two_towers.dense_logits(upsampler(None, features[None]), texts)[0]
    assert cell == 8
    torch.testing.assert_close(logits, expected)

    def refinement(logits, feature_map, pixel_values):
        torch.testing.assert_close(feature_map, upsampler(None, features[None])[0])
        return logits + 1

    refined, _ = refined_logits(two_towers, features, texts, pixels, refinement, upsampler)
    torch.testing.assert_close(refined, expected + 1)
    monkeypatch.setattr("spar_hf.model.refine.OUTPUT_BYTES", 4 * 3 * 68 * 6)
    with pytest.raises(ValueError, match="32 channels for a refinement on 68×6 cells"):
        refined_logits(two_towers, features, texts, pixels, refinement, upsampler)
    monkeypatch.setattr("spar_hf.model.refine.OUTPUT_BYTES", 4 * 3 * 68 * 6 - 1)
    with pytest.raises(ValueError, match="3 names on 68×6 cells"):
        refined_logits(two_towers, features, texts, pixels, upsampler=upsampler)


HUBCONF = """
import torch

class Doubled(torch.nn.Module):
    def forward(self, image, features, output_size=None):
        self.image = image
        return torch.nn.functional.interpolate(features, size=output_size)

def {entry}(pretrained=True, device="cpu"):
    return Doubled().train()
"""
UPLIFT = """
import torch

class Uplift(torch.nn.Module):
    def enable_iterative(self, steps):
        self.steps = steps

    def forward(self, image, features, outsize=None):
        self.image = image
        return torch.nn.functional.interpolate(features, scale_factor=2**self.steps)

def {entry}(pretrained=True, include_extractor=True, **kwargs):
    assert not include_extractor  # that would be another backbone
    return Uplift().train()
"""
SPLUS = SimpleNamespace(
    readout="dinov3", projection_dim=384, backbone_config=DINOv3ViTConfig(hidden_size=384, use_gated_mlp=True)
)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("anyup", "wimmerth_anyup_main"), ("naf", "valeoai_NAF_main"), ("uplift", "mwalmer-umd_UPLiFT_main")],
)
def test_presets_are_loaded_from_the_cache_of_the_hub_or_name_what_to_install(tmp_path, monkeypatch, name, folder):
    """The hub's code is stood in for by one with its entry point and arguments."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(spar_hf.model.upsamplers, "find_spec", lambda package: None)
    processor = SparImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1])
    entry, repository = PRESETS[name].entry, PRESETS[name].repository
    missing = {"naf": "pip install natten einops; ", "uplift": "pip install omegaconf torchvision; "}.get(name, "")
    with pytest.raises(ImportError, match=f"{missing}python -c .*torch.hub.load.'{repository}', '{entry}'"):
        resolve_upsampler(name, processor, SPLUS)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "hubconf.py").write_text((UPLIFT if name == "uplift" else HUBCONF).format(entry=entry))
    monkeypatch.setattr(spar_hf.model.upsamplers, "find_spec", lambda package: True)
    upsampler = resolve_upsampler(name, processor, SPLUS)
    model = PRESETS[name].load()
    assert not model.training and PRESETS[name].load() is model  # loaded once
    colours = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # ImageNet's mean, in SPAR's normalisation
    image = (colours - torch.tensor(processor.image_mean).view(3, 1, 1)) / torch.tensor(processor.image_std).view(
        3, 1, 1
    )
    assert upsampler(image.expand(1, 3, 32, 48), torch.randn(1, 8, 2, 3)).shape == (1, 8, 8, 12)
    assert float(model.image.abs().max()) < 1e-6


def test_names_of_upsamplers():
    assert resolve_upsampler(None, None) is None and resolve_upsampler(local_upsampler, None) is local_upsampler
    with pytest.raises(ValueError, match=r"nonsense.*'anyup', 'naf', 'uplift'"):
        resolve_upsampler("nonsense", None)


@pytest.mark.parametrize(
    "other", [{"hidden_size": 768, "use_gated_mlp": True}, {"hidden_size": 384}, {"hidden_size": 384, "patch_size": 14}]
)
def test_weights_for_the_features_of_one_backbone_are_refused_for_others(other):
    config = SimpleNamespace(readout="dinov3", projection_dim=384, backbone_config=DINOv3ViTConfig(**other))
    with pytest.raises(ValueError, match=r"ViT-S\+/16.*'anyup', 'naf'"):
        resolve_upsampler("uplift", None, config)


def test_the_pipeline_asks_for_the_features_of_its_model(two_towers, tokenizer):
    segment = pipeline(
        "open-vocab-segmentation", model=two_towers, tokenizer=tokenizer, image_processor=SparImageProcessorPil()
    )
    with pytest.raises(ValueError, match=r"ViT-S\+/16"):
        segment(Image.new("RGB", (64, 48)), candidate_labels=["road", "sky"], upsampler="uplift")


@pytest.mark.parametrize(
    "options",
    [
        {"refine": lambda logits, features, image: logits + features.zero_().sum()},
        {"upsampler": lambda image, features: features.mul_(2).repeat_interleave(2, -1).repeat_interleave(2, -2)},
    ],
    ids=["refine", "upsampler"],
)
def test_what_others_do_to_features_stays_there(two_towers, tokenizer, picture, options):
    """An encoded image serves any number of later calls."""
    processor = SparImageProcessorPil()
    pipe = pipeline("open-vocab-segmentation", model=two_towers, tokenizer=tokenizer, image_processor=processor)
    encoded = pipe.encode(picture)
    before = encoded.feature_map.clone()
    pipe(encoded, candidate_labels=["road", "sky"], **options)
    assert torch.equal(encoded.feature_map, before)
