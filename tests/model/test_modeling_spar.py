"""SparVisionModel and SparForOpenVocabSegmentation: exact at any size, precision and attention implementation."""

import math

import pytest
import torch
from tiny_models import attention_of, prompts, random_images, tiny_config
from torch.nn import functional as F
from transformers import (
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from spar_hf import SparConfig, SparVisionModel
from spar_hf.model.modeling_spar import pad_to_patches
from spar_hf.model.positions import resample_positions

PATCH, HEADS, EPS = 16, 2, 1e-6
SIZES = {
    "native": (64, 64),
    "as many patches": (32, 128),
    "portrait": (112, 48),
    "larger": (160, 128),
    "odd": (67, 71),
    "smaller than the window": (40, 33),
    "smaller than a patch": (5, 7),
}
at_sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


# --- the independent computation: plain torch on the state dict ---


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(state, name, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(state, name, x, approximate):
    return linear(state, f"{name}.fc2", F.gelu(linear(state, f"{name}.fc1", x), approximate=approximate))


def layers(state, prefix, x, approximate="none"):
    for i in range(2):
        layer = f"{prefix}.{i}"
        y = layer_norm(state, f"{layer}.layer_norm1", x)
        query, key, value = (
            linear(state, f"{layer}.self_attn.{name}_proj", y).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for name in "qkv"
        )
        weights = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(-1)
        x = x + linear(state, f"{layer}.self_attn.out_proj", (weights @ value).transpose(1, 2).flatten(2))
        x = x + mlp(state, f"{layer}.mlp", layer_norm(state, f"{layer}.layer_norm2", x), approximate)
    return x


def reference_tokens(state, pixel_values):
    """Embeddings and post-norm tokens of a SigLIP vision tower, positions resampled by torch's own bicubic."""
    height, width = (math.ceil(side / PATCH) for side in pixel_values.shape[-2:])
    padded = torch.zeros(*pixel_values.shape[:2], height * PATCH, width * PATCH)
    padded[..., : pixel_values.shape[2], : pixel_values.shape[3]] = pixel_values
    patches = F.unfold(padded, PATCH, stride=PATCH).transpose(1, 2)  # (batch, h * w, 3 * patch * patch)
    embed = "vision_model.backbone.embeddings"
    kernel = state[f"{embed}.patch_embedding.weight"]
    table = state[f"{embed}.position_embedding.weight"]
    side = math.isqrt(len(table))
    positions = F.interpolate(table.T.reshape(1, -1, side, side), size=(height, width), mode="bicubic")
    embeddings = patches @ kernel.flatten(1).T + state[f"{embed}.patch_embedding.bias"] + positions[0].flatten(1).T
    tokens = layers(state, "vision_model.backbone.encoder.layers", embeddings)
    return embeddings, layer_norm(state, "vision_model.backbone.post_layernorm", tokens)


def reference_features(state, pixel_values):
    """SPAR's dense features: the pooling head on every token, its attention replaced by the value path."""
    _, tokens = reference_tokens(state, pixel_values)
    head = "vision_model.backbone.head"
    dim = tokens.shape[-1]
    values = tokens @ state[f"{head}.attention.in_proj_weight"][2 * dim :].T
    values = linear(state, f"{head}.attention.out_proj", values + state[f"{head}.attention.in_proj_bias"][2 * dim :])
    features = values + mlp(state, f"{head}.mlp", layer_norm(state, f"{head}.layernorm", values), "none")
    height, width = (math.ceil(side / PATCH) for side in pixel_values.shape[-2:])
    return features.transpose(1, 2).reshape(len(features), dim, height, width)


def reference_texts(state, input_ids):
    embed = "text_model.embeddings"
    x = state[f"{embed}.token_embedding.weight"][input_ids] + state[f"{embed}.position_embedding.weight"]
    x = layer_norm(state, "text_model.final_layer_norm", layers(state, "text_model.encoder.layers", x, "tanh"))
    return linear(state, "text_model.head", x[:, -1])


@pytest.fixture
def state(two_towers):
    return two_towers.state_dict()


def close(actual, expected, atol=5e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def cosine(a, b):
    return F.cosine_similarity(a.float(), b.float(), dim=1).min()


# --- features ---


@at_sizes
@torch.no_grad()
def test_features_equal_an_independent_formula(vision_model, state, size):
    close(vision_model(random_images(size)).feature_map, reference_features(state, random_images(size)))


@at_sizes
@torch.no_grad()
def test_tokens_and_pooled_output_equal_the_model_of_transformers(vision_model, size):
    siglip = SiglipVisionModel(vision_model.config.backbone_config).eval()
    siglip.load_state_dict(vision_model.backbone.state_dict())
    height, width = (math.ceil(side / PATCH) * PATCH for side in size)
    padded = F.pad(random_images(size), (0, width - size[1], 0, height - size[0]))
    expected = siglip(padded, interpolate_pos_encoding=True)
    outputs = vision_model(random_images(size), output_pooled=True)
    close(outputs.last_hidden_state, expected.last_hidden_state)
    close(outputs.pooler_output, expected.pooler_output)


def test_pooling_head_runs_only_on_request(vision_model, monkeypatch):
    def refuse(*args):
        raise AssertionError("the pooling head ran")

    monkeypatch.setattr(vision_model.backbone.head, "forward", refuse)
    assert vision_model(random_images((64, 64))).pooler_output is None


@at_sizes
@torch.no_grad()
def test_padding_is_zeros_right_and_bottom_after_normalisation(vision_model, size):
    feature_map = vision_model(random_images(size)).feature_map
    height, width = (math.ceil(side / PATCH) for side in size)
    assert feature_map.shape == (2, 32, height, width)
    padded = torch.zeros(2, 3, height * PATCH, width * PATCH)
    padded[..., : size[0], : size[1]] = random_images(size)
    assert torch.equal(pad_to_patches(random_images(size), PATCH), padded)
    assert torch.equal(vision_model(padded).feature_map, feature_map)


@at_sizes
@torch.no_grad()
def test_a_batch_equals_single_images(vision_model, size):
    images = random_images(size, batch=3)
    singles = torch.cat([vision_model(image[None]).feature_map for image in images])
    close(vision_model(images).feature_map, singles, atol=1e-5)


@pytest.mark.parametrize("side", [4, 12, 32])
@pytest.mark.parametrize(
    "grid", [(4, 4), (2, 8), (1, 1), (1, 9), (12, 12), (9, 16), (31, 33), (64, 128), (7, 3)], ids=str
)
def test_positions_equal_bicubic_interpolation(side, grid):
    table = torch.randn(side * side, 8, generator=torch.Generator().manual_seed(3))
    image = table.T.reshape(1, 8, side, side)
    expected = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)[0].flatten(1).T
    close(resample_positions(table, *grid, "bicubic"), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_positions_are_untouched_on_the_native_grid(dtype):
    table = torch.randn(144, 8).to(dtype)
    assert torch.equal(resample_positions(table, 12, 12, "bicubic"), table.float())
    with torch.autocast("cpu", torch.bfloat16):  # mixed precision leaves positions as they are
        assert torch.equal(resample_positions(table, 12, 12, "bicubic"), table.float())


@pytest.mark.parametrize("grid", [(4, 4), (9, 14), (12, 3), (14, 14), (14, 30), (31, 9)], ids=str)
def test_positions_of_an_extent_have_one_step_in_every_image(grid):
    table = torch.randn(36, 8, generator=torch.Generator().manual_seed(4))
    reach = max(*grid, 14)  # patches that the table spans
    # places in halves of the table, the image in its middle; grid_sample's bicubic kernel is interpolate's
    rows, columns = ((torch.arange(n) + 0.5 - n / 2) * 2 / reach for n in grid)
    where = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[None]
    image = table.T.reshape(1, 8, 6, 6)
    expected = F.grid_sample(image, where, mode="bicubic", padding_mode="border", align_corners=False)[0].flatten(1).T
    close(resample_positions(table, *grid, "bicubic", 14), expected, atol=2e-5)


@torch.no_grad()
def test_an_image_in_the_middle_of_a_larger_one_has_its_positions(vision_model):
    config = tiny_config(text_config=None, position_extent=192)
    model = SparVisionModel(config).eval()
    model.load_state_dict(vision_model.state_dict())
    stems = [
        model(torch.zeros(1, 3, *size), output_hidden_states=True).hidden_states[0] for size in ((128, 96), (64, 160))
    ]
    large, wide = (stem[0].unflatten(0, grid) for stem, grid in zip(stems, ((8, 6), (4, 10)), strict=True))
    close(large[2:6], wide[:, 2:8], atol=1e-5)
    stretched = vision_model(torch.zeros(1, 3, 128, 96), output_hidden_states=True).hidden_states[0]
    assert not torch.allclose(stems[0], stretched, atol=1e-2)


def test_unknown_resampling_is_refused():
    with pytest.raises(ValueError, match=r"bilinear.*bicubic"):
        resample_positions(torch.zeros(16, 8), 4, 4, "bilinear")


# --- words ---


@torch.no_grad()
def test_text_features_equal_an_independent_formula_and_the_model_of_transformers(two_towers, state):
    features = two_towers.get_text_features(prompts()).pooler_output
    close(features, reference_texts(state, prompts()))
    siglip = SiglipTextModel(two_towers.config.text_config).eval()
    siglip.load_state_dict(two_towers.text_model.state_dict())
    close(features, siglip(prompts()).pooler_output)
    # tokenizers return masks, but SigLIP's text towers were trained without
    masked = two_towers.get_text_features(prompts(), attention_mask=(prompts() > 30).long())
    assert torch.equal(masked.pooler_output, features)


@at_sizes
@torch.no_grad()
def test_logits_are_the_cosine_times_the_scale(two_towers, state, size):
    two_towers.config.dense_logit_scale = 65.0
    features, texts = reference_features(state, random_images(size)), reference_texts(state, prompts())
    cosines = torch.stack([F.cosine_similarity(features, text[None, :, None, None]) for text in texts], dim=1)
    outputs = two_towers(random_images(size), input_ids=prompts())
    close(outputs.logits, 65.0 * cosines, atol=65 * 5e-5)
    close(outputs.text_embeds, texts / texts.norm(dim=1, keepdim=True))
    close(outputs.feature_map, features)
    given = two_towers(random_images(size), text_embeds=7 * texts)  # of any length
    close(given.logits, outputs.logits, atol=65 * 5e-5)


def test_words_must_be_given_once(two_towers):
    for words in ({}, {"input_ids": prompts(), "text_embeds": torch.randn(3, 32)}):
        with pytest.raises(ValueError, match="either `input_ids` or `text_embeds`"):
            two_towers(random_images((64, 64)), **words)


def test_gradients_reach_both_towers(two_towers):
    logits = two_towers(random_images((48, 80)), input_ids=prompts()).logits
    logits.square().mean().backward()
    # dense features depend neither on the pooling head's query nor on the retrieval scale
    unused = ("logit_scale", "logit_bias", "head.probe")
    for name, parameter in two_towers.named_parameters():
        reached = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert reached != name.endswith(unused), name


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pixel_values": torch.zeros(3, 64, 64)}, r"\(batch, channels, height, width\).*pixel_values\[None\]"),
        ({"text_embeds": torch.zeros(3, 48)}, r"`text_embeds` must be \(names, 32\)"),
        ({"text_embeds": torch.zeros(32)}, r"`text_embeds` must be \(names, 32\)"),
        ({"text_embeds": None, "input_ids": torch.zeros(3, 4, dtype=torch.long)}, 'got 4.*padding="max_length"'),
    ],
)
def test_bad_input_is_refused_with_what_to_do(two_towers, arguments, message):
    with pytest.raises(ValueError, match=message):
        two_towers(**{"pixel_values": random_images((64, 64)), "text_embeds": torch.randn(3, 32), **arguments})


def test_backbone_without_pooling_head_is_refused():
    config = SparConfig(backbone_config=SiglipVisionConfig(vision_use_head=False))
    with pytest.raises(ValueError, match="vision_use_head=True"):
        SparVisionModel(config)


# --- outputs that are recorded on request ---


@torch.no_grad()
def test_attention_implementations_agree_and_switch_in_both_towers(two_towers, transformers_log):
    assert attention_of(two_towers) == ["sdpa"] * 4
    sdpa = two_towers(random_images((48, 80)), input_ids=prompts())
    two_towers.set_attn_implementation("eager")
    assert attention_of(two_towers) == ["eager"] * 4
    eager = two_towers(random_images((48, 80)), input_ids=prompts())
    close(sdpa.feature_map, eager.feature_map)
    close(sdpa.text_embeds, eager.text_embeds)
    two_towers.set_attn_implementation({"text_config": "sdpa"})
    assert attention_of(two_towers) == ["eager", "eager", "eager", "sdpa"]
    two_towers.vision_model.set_attn_implementation("sdpa")
    assert attention_of(two_towers)[1:] == ["sdpa", "sdpa", "sdpa"]
    assert transformers_log == []


@pytest.mark.parametrize("with_words", [False, True])
@torch.no_grad()
def test_hidden_states_and_attentions_on_request(two_towers, state, with_words):
    def run(**kwargs):
        if with_words:
            return two_towers(random_images((48, 80)), input_ids=prompts(), **kwargs)
        return two_towers.vision_model(random_images((48, 80)), **kwargs)

    assert run().hidden_states is None
    assert run().attentions is None
    two_towers.set_attn_implementation("eager")
    outputs = run(output_hidden_states=True, output_attentions=True)
    embeddings, last_hidden_state = reference_tokens(state, random_images((48, 80)))
    assert len(outputs.hidden_states) == 3  # the embeddings and two layers
    close(outputs.hidden_states[0], embeddings)
    close(layer_norm(state, "vision_model.backbone.post_layernorm", outputs.hidden_states[-1]), last_hidden_state)
    assert [a.shape for a in outputs.attentions] == [(2, HEADS, 15, 15)] * 2
    for attention in outputs.attentions:
        close(attention.sum(-1), torch.ones(2, HEADS, 15), atol=1e-5)

    for selection, kept in ((1, {1}), (-1, {2}), ([0, -1], {0, 2})):
        selected = run(output_hidden_states=selection).hidden_states
        assert len(selected) == 3
        for i, hidden_state in enumerate(selected):
            if i in kept:
                close(hidden_state, outputs.hidden_states[i], atol=1e-6)
            else:
                assert hidden_state is None


@pytest.mark.parametrize("in_config", [False, True])
@torch.no_grad()
def test_return_dict_false_gives_tuples(two_towers, in_config):
    kwargs = {} if in_config else {"return_dict": False}
    expected = two_towers(random_images((48, 80)), input_ids=prompts())
    tokens = two_towers.vision_model(random_images((48, 80))).last_hidden_state
    if in_config:
        two_towers.config.return_dict = two_towers.vision_model.config.return_dict = False
    outputs = two_towers(random_images((48, 80)), input_ids=prompts(), **kwargs)
    assert isinstance(outputs, tuple)
    for actual, name in zip(outputs, ["logits", "text_embeds", "feature_map", "geometry"], strict=True):
        assert torch.equal(actual, expected[name])
    last_hidden_state, feature_map = two_towers.vision_model(random_images((48, 80)), **kwargs)
    assert torch.equal(last_hidden_state, tokens)
    assert torch.equal(feature_map, expected.feature_map)
    _, text_features = two_towers.get_text_features(prompts(), **kwargs)
    close(F.normalize(text_features, dim=-1), expected.text_embeds)


# --- training and precision ---


def gradients(model):
    model.zero_grad()
    model(random_images((67, 71)), input_ids=prompts()).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(two_towers):
    two_towers.train()
    expected = gradients(two_towers)
    two_towers.activation_checkpointing_enable()
    recomputed = [layer for layer in two_towers.modules() if getattr(layer, "gradient_checkpointing", False)]
    assert {*two_towers.vision_model.backbone.encoder.layers, *two_towers.text_model.encoder.layers} <= {*recomputed}
    actual = gradients(two_towers)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        close(gradient, expected[name], atol=1e-6)


@torch.no_grad()
def test_training_mode_gives_the_features_of_evaluation(vision_model):
    expected = vision_model(random_images((67, 71))).feature_map
    vision_model.train()
    assert torch.equal(vision_model(random_images((67, 71))).feature_map, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_close_and_takes_float32_images(two_towers, dtype):
    expected = two_towers(random_images((67, 71)), input_ids=prompts())
    outputs = two_towers.to(dtype)(random_images((67, 71)), input_ids=prompts())
    # logits are always float32, to distinguish names of nearly the same cosine
    assert outputs.feature_map.dtype == dtype and outputs.logits.dtype == outputs.text_embeds.dtype == torch.float32
    assert cosine(outputs.feature_map, expected.feature_map) > 0.999
    assert cosine(outputs.text_embeds, expected.text_embeds) > 0.999
    # float32 embeddings work with a half-precision model
    given = two_towers(random_images((67, 71)), text_embeds=expected.text_embeds)
    close(given.logits.float(), expected.logits, atol=40 * 0.03)
