"""SparVisionModel and SparForOpenVocabSegmentation: exact at any size, nothing lost on the way to disk and back."""

import importlib.metadata
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import spar_hf
from spar_hf import SparConfig, SparForOpenVocabSegmentation, SparPreTrainedModel, SparVisionModel
from spar_hf.modeling_spar import pad_to_patches
from spar_hf.readouts import resample_positions

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


def photos(size, batch=2, seed=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def prompts(names=3, length=None, seed=2):
    length = tiny_config().text_config.max_position_embeddings if length is None else length
    return torch.randint(2, 64, (names, length), generator=torch.Generator().manual_seed(seed))


def close(actual, expected, atol=5e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def cosine(a, b):
    return F.cosine_similarity(a.float(), b.float(), dim=1).min()


# --- features ---


@at_sizes
@torch.no_grad()
def test_features_equal_an_independent_formula(vision_model, state, size):
    close(vision_model(photos(size)).feature_map, reference_features(state, photos(size)))


@at_sizes
@torch.no_grad()
def test_tokens_and_pooled_output_equal_the_model_of_transformers(vision_model, size):
    siglip = SiglipVisionModel(vision_model.config.backbone_config).eval()
    siglip.load_state_dict(vision_model.backbone.state_dict())
    height, width = (math.ceil(side / PATCH) * PATCH for side in size)
    padded = F.pad(photos(size), (0, width - size[1], 0, height - size[0]))
    expected = siglip(padded, interpolate_pos_encoding=True)
    outputs = vision_model(photos(size), output_pooled=True)
    close(outputs.last_hidden_state, expected.last_hidden_state)
    close(outputs.pooler_output, expected.pooler_output)


def test_pooling_head_runs_only_on_request(vision_model, monkeypatch):
    def refuse(*args):
        raise AssertionError("the pooling head ran")

    monkeypatch.setattr(vision_model.backbone.head, "forward", refuse)
    assert vision_model(photos((64, 64))).pooler_output is None


@at_sizes
@torch.no_grad()
def test_padding_is_zeros_right_and_bottom_after_normalisation(vision_model, size):
    feature_map = vision_model(photos(size)).feature_map
    height, width = (math.ceil(side / PATCH) for side in size)
    assert feature_map.shape == (2, 32, height, width)
    padded = torch.zeros(2, 3, height * PATCH, width * PATCH)
    padded[..., : size[0], : size[1]] = photos(size)
    assert torch.equal(pad_to_patches(photos(size), PATCH), padded)
    assert torch.equal(vision_model(padded).feature_map, feature_map)


@at_sizes
@torch.no_grad()
def test_a_batch_equals_single_images(vision_model, size):
    images = photos(size, batch=3)
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
    assert torch.equal(resample_positions(table, 12, 12, "bicubic"), table)


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
    # tokenizers hand out masks, but SigLIP's text towers were trained without
    masked = two_towers.get_text_features(prompts(), attention_mask=(prompts() > 30).long())
    assert torch.equal(masked.pooler_output, features)


@at_sizes
@torch.no_grad()
def test_logits_are_the_cosine_times_the_scale(two_towers, state, size):
    two_towers.config.dense_logit_scale = 65.0
    features, texts = reference_features(state, photos(size)), reference_texts(state, prompts())
    cosines = torch.stack([F.cosine_similarity(features, text[None, :, None, None]) for text in texts], dim=1)
    outputs = two_towers(photos(size), input_ids=prompts())
    close(outputs.logits, 65.0 * cosines, atol=65 * 5e-5)
    close(outputs.text_embeds, texts / texts.norm(dim=1, keepdim=True))
    close(outputs.feature_map, features)
    given = two_towers(photos(size), text_embeds=7 * texts)  # of any length
    close(given.logits, outputs.logits, atol=65 * 5e-5)


def test_words_must_be_given_once(two_towers):
    for words in ({}, {"input_ids": prompts(), "text_embeds": torch.randn(3, 32)}):
        with pytest.raises(ValueError, match="either `input_ids` or `text_embeds`"):
            two_towers(photos((64, 64)), **words)


def test_gradients_reach_both_towers(two_towers):
    logits = two_towers(photos((48, 80)), input_ids=prompts()).logits
    logits.square().mean().backward()
    # dense features pass by the pooling head's query side and by the retrieval scale
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
        two_towers(**{"pixel_values": photos((64, 64)), "text_embeds": torch.randn(3, 32), **arguments})


def test_backbone_without_pooling_head_is_refused():
    config = SparConfig(backbone_config=SiglipVisionConfig(vision_use_head=False))
    with pytest.raises(ValueError, match="vision_use_head=True"):
        SparVisionModel(config)


# --- outputs that are recorded on request ---


def attention_of(two_towers):
    return [
        two_towers.config._attn_implementation,
        two_towers.vision_model.config._attn_implementation,
        two_towers.vision_model.backbone.config._attn_implementation,
        two_towers.text_model.config._attn_implementation,
    ]


@torch.no_grad()
def test_attention_implementations_agree_and_switch_in_both_towers(two_towers, transformers_log):
    assert attention_of(two_towers) == ["sdpa"] * 4
    sdpa = two_towers(photos((48, 80)), input_ids=prompts())
    two_towers.set_attn_implementation("eager")
    assert attention_of(two_towers) == ["eager"] * 4
    eager = two_towers(photos((48, 80)), input_ids=prompts())
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
            return two_towers(photos((48, 80)), input_ids=prompts(), **kwargs)
        return two_towers.vision_model(photos((48, 80)), **kwargs)

    assert run().hidden_states is None
    assert run().attentions is None
    two_towers.set_attn_implementation("eager")
    outputs = run(output_hidden_states=True, output_attentions=True)
    embeddings, last_hidden_state = reference_tokens(state, photos((48, 80)))
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
    expected = two_towers(photos((48, 80)), input_ids=prompts())
    tokens = two_towers.vision_model(photos((48, 80))).last_hidden_state
    if in_config:
        two_towers.config.return_dict = two_towers.vision_model.config.return_dict = False
    outputs = two_towers(photos((48, 80)), input_ids=prompts(), **kwargs)
    assert isinstance(outputs, tuple)
    for actual, name in zip(outputs, ["logits", "text_embeds", "feature_map"], strict=True):
        assert torch.equal(actual, expected[name])
    last_hidden_state, feature_map = two_towers.vision_model(photos((48, 80)), **kwargs)
    assert torch.equal(last_hidden_state, tokens)
    assert torch.equal(feature_map, expected.feature_map)
    _, text_features = two_towers.get_text_features(prompts(), **kwargs)
    close(F.normalize(text_features, dim=-1), expected.text_embeds)


# --- training and precision ---


def gradients(model):
    model.zero_grad()
    model(photos((67, 71)), input_ids=prompts()).logits.square().mean().backward()
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
    expected = vision_model(photos((67, 71))).feature_map
    vision_model.train()
    assert torch.equal(vision_model(photos((67, 71))).feature_map, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_close_and_takes_float32_photos(two_towers, dtype):
    expected = two_towers(photos((67, 71)), input_ids=prompts())
    outputs = two_towers.to(dtype)(photos((67, 71)), input_ids=prompts())
    assert outputs.feature_map.dtype == outputs.logits.dtype == dtype
    assert cosine(outputs.feature_map, expected.feature_map) > 0.999
    assert cosine(outputs.text_embeds, expected.text_embeds) > 0.999
    # embeddings made once in float32 serve a half-precision model
    given = two_towers(photos((67, 71)), text_embeds=expected.text_embeds)
    close(given.logits.float(), expected.logits, atol=40 * 0.03)


# --- folders ---


def same_weights(model, other, prefix=""):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == {name.removeprefix(prefix) for name in theirs if name.startswith(prefix)}
    return all(torch.equal(tensor, theirs[prefix + name]) for name, tensor in ours.items())


def buffers_are_positions(model):
    buffers = dict(model.named_non_persistent_buffers())
    assert buffers
    return all(torch.equal(b, torch.arange(b.shape[1])[None]) for b in buffers.values())


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


NOTHING_AMISS = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def test_weight_names_are_a_contract(two_towers, vision_model):
    assert {name.split(".")[0] for name in two_towers.state_dict()} == {
        "vision_model",
        "text_model",
        "logit_scale",
        "logit_bias",
    }
    assert {name.split(".")[0] for name in vision_model.state_dict()} == {"backbone"}
    # below, the names are those of transformers' SigLIP towers
    config = two_towers.config
    assert SiglipVisionModel(config.backbone_config).state_dict().keys() == vision_model.backbone.state_dict().keys()
    assert SiglipTextModel(config.text_config).state_dict().keys() == two_towers.text_model.state_dict().keys()


def test_two_tower_folder_loads_exactly(two_towers, tmp_path, transformers_log):
    two_towers.save_pretrained(tmp_path)
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is SparForOpenVocabSegmentation
    assert info == NOTHING_AMISS
    assert same_weights(loaded, two_towers)
    assert buffers_are_positions(loaded)
    assert not loaded.training
    assert transformers_log == []


def test_vision_tower_of_a_two_tower_folder_can_be_saved_alone(two_towers, tmp_path, transformers_log):
    two_towers.save_pretrained(tmp_path / "both")
    vision, info = AutoModel.from_pretrained(tmp_path / "both", output_loading_info=True)
    assert type(vision) is SparVisionModel
    assert info == NOTHING_AMISS
    assert same_weights(vision, two_towers, "vision_model.")
    assert buffers_are_positions(vision)

    vision.save_pretrained(tmp_path / "vision")
    config = json.loads((tmp_path / "vision" / "config.json").read_text())
    assert config.get("text_config") is None
    assert config["architectures"] == ["SparVisionModel"]
    again, info = AutoModel.from_pretrained(tmp_path / "vision", output_loading_info=True)
    assert info == NOTHING_AMISS
    assert same_weights(again, vision)
    assert transformers_log == []


def test_making_a_vision_model_leaves_the_given_configuration_alone():
    config = tiny_config()
    assert SparVisionModel(config).config.text_config is None
    assert config.text_config is not None


@pytest.mark.parametrize("auto_class", [SparForOpenVocabSegmentation, AutoModelForSemanticSegmentation])
def test_two_towers_are_not_made_of_a_vision_folder(vision_model, tmp_path, auto_class):
    vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no text tower.*AutoModel"):
        auto_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "model_class, weight",
    [
        (SparVisionModel, "vision_model.backbone.encoder.layers.1.mlp.fc1.weight"),
        (SparForOpenVocabSegmentation, "vision_model.backbone.head.attention.in_proj_weight"),
        (SparForOpenVocabSegmentation, "text_model.head.weight"),
        (SparForOpenVocabSegmentation, "logit_scale"),
    ],
)
def test_missing_weights_are_an_error(two_towers, tmp_path, model_class, weight):
    two_towers.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop(weight))
    with pytest.raises(RuntimeError, match=rf"lacks 1 weights of {model_class.__name__}: .*{weight.split('.')[-1]}"):
        model_class.from_pretrained(tmp_path)


def test_vision_weights_beside_a_two_tower_configuration_are_an_error(two_towers, tmp_path):
    two_towers.vision_model.save_pretrained(tmp_path)
    two_towers.config.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"lacks .*text_model"):
        SparForOpenVocabSegmentation.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_an_error(two_towers, tmp_path):
    two_towers.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["backbone_config"].update(image_size=96))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModel.from_pretrained(tmp_path)


def test_text_weights_without_a_place_are_reported(two_towers, tmp_path, transformers_log):
    two_towers.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["text_config"].update(num_hidden_layers=1))
    _, info = SparForOpenVocabSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"]
    assert all(name.startswith("text_model.encoder.layers.1.") for name in info["unexpected_keys"])
    assert any("UNEXPECTED" in message for message in transformers_log)


class WithHead(SparPreTrainedModel):
    """A class that adds a head says so, and loads a folder that has none."""

    _keys_to_ignore_on_load_missing = [r"^head\."]

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = SparVisionModel._from_config(config)
        self.head = torch.nn.Linear(32, 5)
        self.post_init()


def test_a_new_head_may_be_missing_but_no_more(vision_model, tmp_path):
    vision_model.save_pretrained(tmp_path)
    assert same_weights(WithHead.from_pretrained(tmp_path).vision_model, vision_model)
    edit_weights(tmp_path, lambda weights: weights.pop("backbone.post_layernorm.weight"))
    with pytest.raises(RuntimeError, match="lacks 1 weights"):
        WithHead.from_pretrained(tmp_path)


def test_weights_stored_in_half_precision_load_as_the_configuration_says(two_towers, tmp_path):
    half = {name: tensor.half() for name, tensor in two_towers.state_dict().items()}
    two_towers.save_pretrained(tmp_path, state_dict=dict(half))  # a copy: it is emptied while it is written
    assert load_file(tmp_path / "model.safetensors")["logit_scale"].dtype == torch.float16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    for model in (AutoModel.from_pretrained(tmp_path), SparForOpenVocabSegmentation.from_pretrained(tmp_path)):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in model.state_dict().items())
    in_half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in in_half.parameters()} == {torch.bfloat16}
    assert buffers_are_positions(in_half)


def test_attention_implementation_reaches_both_towers_when_loading(two_towers, tmp_path):
    two_towers.save_pretrained(tmp_path)
    assert (
        attention_of(SparForOpenVocabSegmentation.from_pretrained(tmp_path, attn_implementation="eager"))
        == ["eager"] * 4
    )
    vision = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert vision.backbone.config._attn_implementation == "eager"


# --- registration, and what a fresh process sees ---


def test_registration_is_quiet_and_can_be_repeated(two_towers, transformers_log, recwarn):
    for _ in range(2):
        importlib.reload(spar_hf)
    assert AutoConfig.for_model("spar").__class__ is spar_hf.SparConfig is SparConfig
    assert type(AutoModel.from_config(tiny_config())) is SparVisionModel
    assert type(AutoModelForSemanticSegmentation.from_config(tiny_config())) is SparForOpenVocabSegmentation
    assert transformers_log == []
    assert [str(w.message) for w in recwarn] == []


def test_every_public_name_exists():
    for name in spar_hf.__all__:
        assert getattr(spar_hf, name) is not None
    assert spar_hf.__version__ == importlib.metadata.version("spar-hf")


FRESH_PROCESS = """
import sys, warnings
from transformers import AutoModel, pipeline
before = {name.split(".")[0] for name in sys.modules}
warnings.simplefilter("error")
import spar_hf
after = {name.split(".")[0] for name in sys.modules}

import torch
from transformers import AutoModelForSemanticSegmentation
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
torch.set_num_threads(1)
folder, vision_folder, inputs, results = sys.argv[1:]
inputs = torch.load(inputs, weights_only=True)
with torch.no_grad():
    vision = AutoModel.from_pretrained(folder)
    again = AutoModel.from_pretrained(vision_folder)
    two_towers = AutoModelForSemanticSegmentation.from_pretrained(folder)
    torch.save(
        {
            "classes": [type(model).__name__ for model in (vision, again, two_towers)],
            "feature_map": vision(inputs["pixel_values"]).feature_map,
            "again": again(inputs["pixel_values"]).feature_map,
            "logits": two_towers(**inputs).logits,
            "imported": sorted(after - before),
        },
        results,
    )
"""


@torch.no_grad()
def test_fresh_process_loads_the_same_models_and_says_nothing(two_towers, tmp_path):
    two_towers.save_pretrained(tmp_path / "both")
    two_towers.vision_model.save_pretrained(tmp_path / "vision")
    inputs = {"pixel_values": photos((67, 71)), "input_ids": prompts()}
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [tmp_path / name for name in ("both", "vision", "inputs.pt", "results.pt")]
    process = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")

    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert results["classes"] == ["SparVisionModel", "SparVisionModel", "SparForOpenVocabSegmentation"]
    expected = two_towers(**inputs)
    assert torch.equal(results["feature_map"], expected.feature_map)
    assert torch.equal(results["again"], expected.feature_map)
    assert torch.equal(results["logits"], expected.logits)
    # the package itself costs next to nothing beyond transformers: no training or demo package comes along
    heavy = {
        "accelerate",
        "datasets",
        "evaluate",
        "matplotlib",
        "pandas",
        "rich",
        "scipy",
        "skimage",
        "sklearn",
        "typer",
    }
    assert heavy.isdisjoint(results["imported"])
