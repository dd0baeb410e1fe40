"""Read-outs against the modules of transformers that they are made of, and the text preparation of each family."""

import json
import math

import pytest
import torch
from tiny_models import BLOCKS, SHAPE, randomise
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    MetaClip2Config,
    MetaClip2Model,
    RadioConfig,
    RadioModel,
    Tipsv2Config,
    Tipsv2Model,
    XLMRobertaTokenizer,
)
from transformers.models.tipsv2.tokenization_tipsv2 import Tipsv2Tokenizer

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor, SparVisionModel
from spar_hf.model.prompts import embed_names

PATCH = 14
# native grid, as many patches in another shape, portrait
SIZES = [(56, 56), (28, 112), (70, 42)]


def random_images(size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# --- TIPSv2 ---

TIPSV2_TEXT = SHAPE | {"vocab_size": 40, "max_position_embeddings": 12}


def tipsv2_source(**vision) -> Tipsv2Model:
    vision = BLOCKS | {"image_size": 56, "patch_size": PATCH, "layerscale_value": 0.7} | vision
    torch.manual_seed(0)
    return randomise(Tipsv2Model(Tipsv2Config(vision_config=vision, text_config=TIPSV2_TEXT)))


@pytest.fixture
def tipsv2(tmp_path):
    source = tipsv2_source()
    source.save_pretrained(tmp_path)
    return source, SparForOpenVocabSegmentation.from_backbone(str(tmp_path))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_tipsv2_equals_transformers_and_its_values_path(tipsv2, size):
    source, model = tipsv2
    pixels = random_images(size)
    found = model.vision_model(pixels, output_pooled=True, output_hidden_states=True)
    theirs = source.vision_model(pixels, output_hidden_states=True)
    close(found.pooler_output, theirs.pooler_output)
    for ours, expected in zip(found.hidden_states[:-1], theirs.hidden_states[:-1], strict=True):
        close(ours, expected)
    block, hidden = source.vision_model.encoder.layer[-1], theirs.hidden_states[-2]
    values = block.attention.v_proj(block.norm1(hidden))
    hidden = hidden + block.layer_scale1.lambda1 * block.attention.o_proj(values)
    hidden = hidden + block.layer_scale2.lambda1 * block.mlp(block.norm2(hidden))
    patches = source.vision_model.layernorm(hidden)[:, 2:]  # after both class tokens
    close(found.feature_map, patches.transpose(1, 2).unflatten(2, [side // PATCH for side in size]))


@torch.no_grad()
def test_tipsv2_with_gated_mlps(tmp_path):
    """The largest variant has them."""
    source = tipsv2_source(use_swiglu_ffn=True)
    source.save_pretrained(tmp_path)
    model = SparForOpenVocabSegmentation.from_backbone(str(tmp_path)).vision_model
    pixels = random_images((56, 56))
    close(model(pixels, output_pooled=True).pooler_output, source.vision_model(pixels).pooler_output)


@torch.no_grad()
def test_tipsv2_does_not_read_padding(tipsv2):
    """Every id but 0 is a token, as in the published code; a mask that is given counts."""
    source, model = tipsv2
    ids = torch.randint(1, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 5:], ids[1, 9:] = 0, 0
    expected = source.get_text_features(ids, attention_mask=(ids != 0).long()).pooler_output
    close(model.get_text_features(ids).pooler_output, expected)
    close(model.get_text_features(ids[:1, :7]).pooler_output, expected[:1])
    everything = torch.ones_like(ids)
    close(model.get_text_features(ids, everything).pooler_output, source.get_text_features(ids).pooler_output)


@torch.no_grad()
def test_tipsv2_texts_are_exported_with_their_padding(tipsv2):
    """What is padding is decided in the graph, for any number of texts."""
    _, model = tipsv2
    graph = torch.nn.Module()
    graph.model, graph.forward = model, lambda input_ids: model.get_text_features(input_ids).pooler_output
    ids = torch.randint(1, 40, (5, 12), generator=torch.Generator().manual_seed(0))
    names = {"input_ids": {0: torch.export.Dim("names", min=1, max=100)}}
    program = torch.export.export(graph, (), kwargs={"input_ids": ids}, dynamic_shapes=names).module()
    ids[0, 5:], ids[1, 9:], ids[4, 1:] = 0, 0, 0
    for some in (ids, ids[:1], ids[:3]):
        close(program(input_ids=some), model.get_text_features(some).pooler_output)


@torch.no_grad()
def test_tipsv2_is_prepared_as_published(tipsv2, tmp_path):
    """Lower case with punctuation, padding on the right, pixels from 0 to 1, its templates, the inverse temperature."""
    source, model = tipsv2
    letters = sorted(set("itap of a road. bad photo origami large in video game rt the small many sky") - {" "})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "▁", *letters])}
    Tipsv2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "do_rescale": True}))
    processor = SparProcessor.from_backbone(str(tmp_path))
    ids = processor(text=["A Road."], return_tensors="pt")["input_ids"][0].tolist()
    assert ids == [vocabulary[letter] for letter in "▁a▁road."] + [0] * 4
    image = torch.rand(3, 56, 56)
    pixels = processor.image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
    close(pixels, image[None])
    assert model.config.templates == "tcl" and float(model.logit_scale) == pytest.approx(-math.log(source.temperature))
    # a text of its own, without the padding that the processor adds
    texts = [processor.tokenizer(text)["input_ids"] for text in ("a sky", "the sky")]
    expected = torch.cat([source.get_text_features(torch.tensor([ids])).pooler_output for ids in texts])
    expected = torch.nn.functional.normalize(torch.nn.functional.normalize(expected, dim=1).mean(0), dim=0)
    close(embed_names(model, processor.tokenizer, ["sky"], ["a {}", "the {}"])[0], expected)
    assert SparImageProcessorPil.from_backbone(str(tmp_path)).image_mean == (0.0, 0.0, 0.0)


# --- MetaCLIP 2 ---


@torch.no_grad()
def test_metaclip2_reads_texts_as_they_are_written(tmp_path):
    """Its multilingual tokenizer keeps case, marks and punctuation; a text is pooled at its first end token."""
    vision = SHAPE | {"image_size": 56, "patch_size": PATCH}
    letters = dict.fromkeys("▁EinHud,h犬!")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters]
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    text = SHAPE | {"vocab_size": len(pieces), "max_position_embeddings": 20, **special}
    torch.manual_seed(0)
    source = randomise(MetaClip2Model(MetaClip2Config(vision_config=vision, text_config=text, projection_dim=24)))
    source.save_pretrained(tmp_path)
    XLMRobertaTokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)]).save_pretrained(tmp_path)
    clip_pixels = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip_pixels))
    processor = SparProcessor.from_backbone(str(tmp_path))
    assert processor.image_processor.image_mean == tuple(clip_pixels["image_mean"])
    ids = processor(text=["Ein Hund, 犬!", "ein hund"], return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == [0, *(pieces.index(letter) for letter in "▁Ein▁Hund,▁犬!"), 2, *[1] * 5]
    model = SparForOpenVocabSegmentation.from_backbone(str(tmp_path))
    assert model.config.readout == "metaclip2" and model.config.projection_dim == 24
    plain = processor.tokenizer("ein hund", return_tensors="pt")["input_ids"]  # without padding
    close(model.get_text_features(ids).pooler_output[1:], source.get_text_features(plain).pooler_output)


# --- features only ---


def as_map(tokens, size):
    return tokens.transpose(1, 2).unflatten(2, [side // PATCH for side in size])


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_dinov2_with_registers_equals_transformers(gated, tmp_path):
    torch.manual_seed(0)
    settings = BLOCKS | {"image_size": 70, "patch_size": PATCH, "use_swiglu_ffn": gated}
    source = randomise(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings)))
    source.save_pretrained(tmp_path)
    model = SparVisionModel.from_backbone(str(tmp_path))
    for size in [(70, 70), *SIZES]:
        theirs = source(random_images(size), output_hidden_states=True)
        found = model(random_images(size), output_pooled=True, output_hidden_states=True)
        close(found.feature_map, as_map(theirs.last_hidden_state[:, 5:], size))  # after class and register tokens
        close(found.pooler_output, theirs.pooler_output)
        for ours, expected in zip(found.hidden_states, theirs.hidden_states, strict=True):
            close(ours, expected)


@pytest.mark.parametrize("summary", [[0, 1], [2]])
@torch.no_grad()
def test_radio_equals_transformers(summary, tmp_path):
    torch.manual_seed(0)
    settings = BLOCKS | {"image_size": 56, "patch_size": PATCH, "max_img_size": 140, "summary_idxs": summary}
    source = randomise(RadioModel(RadioConfig(**settings)))
    source.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "do_rescale": True}))
    model = SparVisionModel.from_backbone(str(tmp_path))
    for size in [(140, 140), *SIZES, (14, 210)]:  # the first is the native grid of positions
        pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(sum(size)))
        theirs = source(pixels)
        found = model(pixels, output_pooled=True)
        close(found.feature_map, as_map(theirs.features, size))
        close(found.pooler_output, theirs.summary)
    model.save_pretrained(tmp_path / "spar")
    again = SparVisionModel.from_pretrained(tmp_path / "spar")
    close(again(pixels, output_pooled=True).pooler_output, theirs.summary)
    assert SparImageProcessorPil.from_backbone(str(tmp_path)).image_std == (1.0, 1.0, 1.0)  # the model normalises


@torch.no_grad()
def test_radio_has_a_path_for_video_that_images_do_not_take(tmp_path):
    torch.manual_seed(0)
    settings = BLOCKS | {"patch_size": PATCH, "max_img_size": 56, "video_temporal_patch_size": 2}
    source = randomise(RadioModel(RadioConfig(**settings)))
    source.save_pretrained(tmp_path)
    model = SparVisionModel.from_backbone(str(tmp_path))
    pixels = torch.rand(1, 3, 56, 42)
    close(model(pixels).feature_map, as_map(source(pixels).features, (56, 42)))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["backbone.embeddings.video_patch_projection.weight"]
