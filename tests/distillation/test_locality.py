"""A local start: attention that stays near, in the weights alone."""

import copy
import shutil

import pytest
import torch
from distilling import distil
from sklearn.datasets import load_sample_image
from tiny_models import randomise, tiny_config
from transformers import AutoModel, DINOv3ViTConfig, SiglipVisionConfig

from spar_hf import SPAR_TINY_BASE, SparConfig, SparImageProcessorPil, SparVisionModel
from spar_hf.distillation.locality import (
    fit_prior,
    fix_position_step,
    initialise_locality,
    position_subspace,
    project_out,
    scale_prior,
    token_writers,
)
from spar_hf.distillation.recipes import parse_options
from spar_hf.distillation.trainer import Distillation


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = tiny_config(backbone_config=SiglipVisionConfig(image_size=64, **shape), text_config=None)
    model = SparVisionModel(config)
    model.set_attn_implementation("eager")
    return randomise(model)


def distances(height, width):
    """Squared distance of every two patches in halves of the image's side: `(patches, patches)`."""
    rows, columns = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (height, width))
    place = torch.cartesian_prod(rows, columns)
    return torch.cdist(place, place).square()


def attention(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values, output_attentions=True).attentions


def test_attention_reaches_as_far_as_asked(model):
    # heads that prefer nothing by themselves: what they look at afterwards is the prior
    with torch.no_grad():
        for layer in model.backbone.encoder.layers:
            layer.self_attn.q_proj.weight *= 0.05
            layer.self_attn.q_proj.bias *= 0.05
    pixels, spread, apart = 0.1 * torch.randn(1, 3, 96, 128), 0.5, distances(6, 8)
    before = attention(model, pixels)
    initialise_locality(model, [0.1 * torch.randn(1, 3, 96, 96) for _ in range(4)], spread)
    after = attention(model, pixels)
    assert_gaussian(after, before, apart, spread)


def assert_gaussian(after, before, apart, spread):
    """Every head, after but not before, looks around itself as a Gaussian over squared distances `apart` would."""
    gauss = (-apart / (2 * spread**2)).softmax(-1)
    expected = (gauss * apart).sum(-1).mean()
    for layer in range(4):
        for untouched, head in zip(before[layer][0], after[layer][0], strict=True):
            assert (untouched * apart).sum(-1).mean() > 2 * expected
            assert 0.8 * expected < (head * apart).sum(-1).mean() < 2 * expected
            assert torch.corrcoef(torch.stack([head.flatten(), gauss.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("first", ["extent", "prior"])
def test_with_an_extent_attention_reaches_as_many_patches_in_every_image(model, first):
    with torch.no_grad():  # as above
        for layer in model.backbone.encoder.layers:
            layer.self_attn.q_proj.weight *= 0.05
            layer.self_attn.q_proj.bias *= 0.05
    untouched, spread = copy.deepcopy(model), 0.4
    squares = [0.1 * torch.randn(1, 3, 128, 128) for _ in range(4)]
    if first == "extent":
        fix_position_step(model, None, 320, 64)
        model.config.position_extent = 320
        initialise_locality(model, squares, spread)
    else:  # a student that had its local start with a stretched table
        directions = initialise_locality(model, squares, spread)
        fix_position_step(model, directions, 320, 64)
        model.config.position_extent = 320
    for height, width in ((80, 240), (192, 64), (320, 112)):
        pixels = 0.1 * torch.randn(1, 3, height, width)
        windows = torch.cartesian_prod(torch.arange(height // 16) / 4.0, torch.arange(width // 16) / 4.0)
        apart = torch.cdist(windows, windows).square()
        assert_gaussian(attention(model, pixels), attention(untouched, pixels), apart, spread)


@torch.no_grad()
def test_features_stay_nearly_what_they_were_at_two_windows_a_side():
    model = SparVisionModel.from_pretrained(SPAR_TINY_BASE)
    image = SparImageProcessorPil(size={"shortest_edge": 384})(load_sample_image("china.jpg"), return_tensors="pt")
    image = image["pixel_values"][..., :384]
    before = model(image).feature_map
    fix_position_step(model, None, 1024, 192)
    model.config.position_extent = 1024
    after = model(image).feature_map
    spread = (before - before.mean((2, 3), keepdim=True)).square().mean()
    assert (after - before).square().mean() < 0.01 * spread  # without any positions it is 0.07


def test_a_far_reaching_prior_changes_little(model):
    pixels = torch.randn(2, 3, 96, 128)
    far = copy.deepcopy(model)
    initialise_locality(far, [torch.randn(1, 3, 96, 96) for _ in range(4)], 1e3)
    with torch.no_grad():
        before, after = model(pixels).feature_map, far(pixels).feature_map
    assert torch.nn.functional.cosine_similarity(before, after, dim=1).mean() > 0.93
    near = copy.deepcopy(model)
    initialise_locality(near, [torch.randn(1, 3, 96, 96) for _ in range(4)], 0.3)
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(before, near(pixels).feature_map, dim=1).mean() < 0.93


def test_the_place_is_found_again__in_half_precision(model):
    assert position_subspace(model) is None
    directions = initialise_locality(model, [torch.randn(1, 3, 96, 96) for _ in range(4)], 0.5)
    found = position_subspace(model.half().float())
    torch.testing.assert_close(found @ found.T, directions @ directions.T, atol=1e-2, rtol=0)


def test_the_place_is_kept_whatever_training_writes(model):
    directions = initialise_locality(model, [torch.randn(1, 3, 96, 96) for _ in range(4)], 0.5)

    def place_of(pixels):
        with torch.no_grad():
            return torch.stack(model(pixels, output_hidden_states=True).hidden_states) @ directions

    images = torch.randn(1, 3, 96, 128), torch.randn(1, 3, 96, 128)
    randomise(model, seed=7)  # a step of training, in effect
    assert (place_of(images[0]) - place_of(images[1])).abs().max() > 0.1
    project_out(token_writers(model), directions)
    first, second = map(place_of, images)
    torch.testing.assert_close(first, second, atol=2e-5, rtol=0)  # of the image nothing
    torch.testing.assert_close(first, first[:1].expand_as(first), atol=2e-5, rtol=0)  # and in all layers the same


def test_four_times_the_exponent_is_half_the_spread(model):
    images = [torch.randn(1, 3, 96, 96) for _ in range(4)]
    narrow = copy.deepcopy(model)
    initialise_locality(narrow, images, 0.3)
    directions = initialise_locality(model, images, 0.6)
    for block in range(4):
        scale_prior(model, directions, block, 4.0)
    with torch.no_grad():
        found, expected = (m(torch.ones(1, 3, 96, 128)).feature_map for m in (model, narrow))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_priors_are_fitted_to_a_teacher(model):
    directions = initialise_locality(model, [torch.randn(1, 3, 96, 96) for _ in range(4)], 0.5)
    images = [torch.randn(1, 3, 96, 128) for _ in range(2)]
    own = [(image, model(image).feature_map.detach()) for image in images]
    weights = copy.deepcopy(model.state_dict())
    assert fit_prior(model, directions, own) == [1.0] * 4  # nothing is nearer to it than itself
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-5)
    teacher = copy.deepcopy(model)
    scale_prior(teacher, directions, 0, 1.4)
    scale_prior(teacher, directions, 3, 1 / 1.4**2)
    pairs = [(image, teacher(image).feature_map.detach()) for image in images]
    factors = fit_prior(model, directions, pairs)
    assert factors == pytest.approx([1.4, 1, 1, 1.4**-2])
    for unusable in ([], [(images[0], torch.full_like(own[0][1], float("nan")))]):
        with pytest.raises(ValueError, match=f"error on {len(unusable)}"):
            fit_prior(model, directions, unusable)
    with torch.no_grad():
        assert all(torch.allclose(model(image).feature_map, target, atol=1e-4) for image, target in pairs)


def test_a_local_run_resumes_to_the_last_bit(base_folder, image_folder, tmp_path):
    options = ("--steps", 4, "--save_steps", 2, "--train_layers", "all", "--learning_rate", 1e-3, "--local_start", 0.5)
    options += ("--position_extent", 128)
    options += ("--teacher_windows", 2, "--report_to", "none", "--holdout_images", 0, "--fit_prior", 2)
    whole = distil(base_folder, image_folder, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    half = distil(base_folder, image_folder, tmp_path / "half", *options, "--resume")
    weights, resumed = (AutoModel.from_pretrained(folder).state_dict() for folder in (whole, half))
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
    # the positions go with the student, and it can go on without being told
    assert AutoModel.from_pretrained(whole).config.position_extent == 128
    options = ("--steps", 1, "--student", whole, "--learning_rate", 1e-9, "--report_to", "none", "--holdout_images", 0)
    after = AutoModel.from_pretrained(distil(base_folder, image_folder, tmp_path / "after", *options))
    pixels = torch.randn(1, 3, 96, 200)
    with torch.no_grad():
        found, expected = (model(pixels).feature_map for model in (after, AutoModel.from_pretrained(whole)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="span 128 px"):
        distil(base_folder, image_folder, tmp_path / "other", *options, "--position_extent", 256)


def test_fitting_a_prior_leaves_the_teacher_as_it_is(base_folder, image_folder, tmp_path, monkeypatch):
    """The fit scales blocks that are not trained as well, which teacher and student otherwise hold once."""
    options = ("--steps", 1, "--report_to", "none", "--holdout_images", 0, "--teacher_windows", 1)
    start = distil(base_folder, image_folder, tmp_path / "start", *options, "--local_start", 0.5)
    runs = []
    train = Distillation.run
    monkeypatch.setattr(Distillation, "run", lambda run: runs.append(run) or train(run))
    monkeypatch.setattr(
        "spar_hf.distillation.trainer.fit_prior", lambda model, place, pairs: scale_prior(model, place, 0, 2.0)
    )
    options += ("--student", start, "--train_layers", 1, "--fit_prior", 1)
    written = AutoModel.from_pretrained(distil(start, image_folder, tmp_path / "run", *options)).state_dict()
    first = "backbone.encoder.layers.0.self_attn.q_proj.weight"
    before, teacher = AutoModel.from_pretrained(start).state_dict(), runs[0].models.teacher.model.state_dict()
    assert not torch.equal(written[first], before[first])
    assert all(torch.equal(teacher[name], weight) for name, weight in before.items())


def test_a_prior_is_fitted_in_the_light_that_the_teacher_reads(base_folder, image_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "spar_hf.distillation.trainer.fit_prior",
        lambda model, place, pairs: seen.append([pixels for pixels, _ in pairs]) or [],
    )
    options = ("--steps", 1, "--report_to", "none", "--holdout_images", 0, "--teacher_windows", 1, "--local_start", 0.5)
    options += ("--fit_prior", 3)
    for name, light in {
        "plain": (),
        "student": ("--jitter_probability", 1, "--jitter_student_only", True),
        "both": ("--jitter_probability", 1),
    }.items():
        distil(base_folder, image_folder, tmp_path / name, *options, *light)
    plain, student, both = seen
    assert all(torch.equal(own, other) for own, other in zip(plain, student, strict=True))
    assert not any(torch.equal(own, other) for own, other in zip(plain, both, strict=True))


def test_other_readouts_and_streams_are_refused(model):
    with pytest.raises(ValueError, match="none that can be read"):
        initialise_locality(model, [], 0.6)
    dinov3 = DINOv3ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="SigLIP read-out"):
        initialise_locality(SparVisionModel(SparConfig(backbone_config=dinov3)), [torch.zeros(1, 3, 32, 32)], 0.6)
    arguments = "--model m --images i --output o --local_start 0.6 --streaming"
    with pytest.raises(ValueError, match="--streaming"):
        parse_options(arguments.split())
    with pytest.raises(ValueError, match="adapters"):
        parse_options(arguments.replace("--streaming", "--lora_rank 4").split())
    with pytest.raises(ValueError, match="adapters"):
        parse_options(
            ["--model", "m", "--images", "i", "--output", "o", "--position_extent", "512", "--lora_rank", "4"]
        )
    with pytest.raises(ValueError, match="SigLIP read-out"):
        fix_position_step(SparVisionModel(SparConfig(backbone_config=dinov3)), None, 1024, 224)
    with pytest.raises(ValueError, match=r"at most 5\.8 windows, 371 px"):
        fix_position_step(model, None, 384, 64)
    with pytest.raises(ValueError, match="--fit_prior"):
        parse_options(["--model", "m", "--images", "i", "--output", "o", "--fit_prior", "4"])


@pytest.mark.parametrize("extent, message", [(100, "multiple of the patch"), (48, "at least the pre-training size")])
def test_an_extent_that_no_model_could_be_loaded_with_ends_no_training(
    base_folder, image_folder, tmp_path, extent, message
):
    with pytest.raises(ValueError, match=message):
        distil(base_folder, image_folder, tmp_path / "run", "--steps", 1, "--position_extent", extent)
    with pytest.raises(ValueError, match=message):
        SparVisionModel.from_pretrained(base_folder, position_extent=extent)


def test_a_prior_can_only_be_fitted_where_there_is_one(base_folder, image_folder, tmp_path):
    options = ("--steps", 1, "--holdout_images", 0, "--student", base_folder, "--fit_prior", 2)
    with pytest.raises(ValueError, match="--fit_prior"):
        distil(base_folder, image_folder, tmp_path / "run", *options)
