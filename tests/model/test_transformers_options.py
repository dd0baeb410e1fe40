"""What every model and processor of transformers can do: output flags, precision, adapters, scores, a fresh start."""

import pytest
import torch
from model_classes import (
    CASES,
    KINDS,
    LABELS,
    READOUTS,
    SIZE,
    make_inputs,
    make_model,
    semantic_config,
    spar_config,
)
from PIL import Image
from tiny_models import make_tokenizer
from torch import nn
from torch.nn.functional import linear
from transformers import (
    AutoModel,
    AutoModelForSemanticSegmentation,
    CLIPVisionModel,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    MetaClip2VisionModel,
    RadioModel,
    Siglip2VisionModel,
    SiglipVisionModel,
    Tipsv2VisionModel,
    pipeline,
)

from spar_hf import (
    SparForSemanticSegmentation,
    SparImageProcessorPil,
    SparProcessor,
    SparSemanticSegmenterOutput,
    SparUniversalImageProcessorPil,
    SparVisionModel,
)
from spar_hf.model.segmentation import class_probabilities

BLOCKS = 2
each_case = pytest.mark.parametrize("kind, readout", CASES, ids=lambda part: part)
HALVES = [torch.float16, torch.bfloat16]


# --- outputs asked for ---


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@each_case
@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_backbone(kind, readout):
    """Asked for in the call, by the configuration after loading, and by both: the call wins."""
    model, inputs = make_model(kind, readout), make_inputs(kind)
    model.set_attn_implementation("eager")
    vision = model if kind in ("vision", "backbone") else model.vision_model
    flags = {"output_hidden_states": True, "output_attentions": True}
    expected = SparVisionModel.forward(vision, inputs["pixel_values"], **flags)
    assert len(expected.hidden_states) == BLOCKS + 1
    found = model(**inputs, **flags)
    same(found.hidden_states, expected.hidden_states)
    same(found.attentions, expected.attentions)
    assert model(**inputs).hidden_states is None and model(**inputs).attentions is None
    model.config.output_hidden_states = model.config.output_attentions = True
    same(model(**inputs).hidden_states, expected.hidden_states)
    same(model(**inputs).attentions, expected.attentions)
    assert model(**inputs, output_hidden_states=False).hidden_states is None
    if kind != "backbone":  # it reads its stages there
        model.config.output_hidden_states = [-1]
        found = model(**inputs).hidden_states
        assert [state is None for state in found] == [True] * BLOCKS + [False]


@pytest.mark.parametrize("kind", ["two towers", "semantic", "universal"])
@torch.no_grad()
def test_flags_given_at_loading_reach_the_backbone(kind, tmp_path):
    make_model(kind).save_pretrained(tmp_path)
    flags = {"output_hidden_states": True, "output_attentions": True, "attn_implementation": "eager"}
    models = [(KINDS[kind][0], make_inputs(kind))]
    if kind != "universal":  # the vision model of the same folder
        models.append((AutoModel, make_inputs("vision")))
    for model_class, inputs in models:
        outputs = model_class.from_pretrained(tmp_path, **flags)(**inputs)
        assert len(outputs.hidden_states) == BLOCKS + 1 and len(outputs.attentions) == BLOCKS


@torch.no_grad()
def test_flags_of_two_towers_reach_the_text_tower():
    model = make_model("two towers")
    model.config.output_hidden_states = True
    assert len(model.get_text_features(make_inputs("two towers")["input_ids"]).hidden_states) == BLOCKS + 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "backbone"])
@torch.no_grad()
def test_tuples_are_the_values_of_the_output(kind):
    model, inputs = make_model(kind), make_inputs(kind)
    expected = model(**inputs).to_tuple()
    found = model(**inputs, return_dict=False)
    model.config.return_dict = False
    for values in (found, model(**inputs)):
        assert isinstance(values, tuple) and len(values) == len(expected)


@each_case
def test_input_embeddings_can_be_replaced(kind, readout):
    model = make_model(kind, readout)
    new = nn.Embedding(64, 32) if kind == "two towers" else nn.Identity()
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new


@torch.no_grad()
def test_pooled_features_of_the_pipeline(tmp_path):
    make_model("two towers").save_pretrained(tmp_path)
    SparImageProcessorPil().save_pretrained(tmp_path)
    image, model = Image.new("RGB", (64, 48), "red"), AutoModel.from_pretrained(tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path), model_kwargs={"output_pooled": True})
    expected = model(**extract.image_processor(image, return_tensors="pt"), output_pooled=True)
    torch.testing.assert_close(torch.tensor(extract(image, pool=True)), expected.pooler_output)
    torch.testing.assert_close(torch.tensor(extract(image)), expected.last_hidden_state)
    assert model(torch.zeros(1, 3, 32, 32)).pooler_output is None


# --- precision and adapters ---


def check_classifier(model, outputs):
    """Logits are float32, and those of the feature map by the weights as they are."""
    weight, bias = (p.float() for p in (model.classifier.weight, model.classifier.bias))
    expected = linear(outputs.feature_map.float().permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    assert outputs.logits.dtype == torch.float32
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_the_classifier_computes_in_float32(dtype):
    images = make_inputs("semantic")["pixel_values"]
    made = AutoModelForSemanticSegmentation.from_config(semantic_config("siglip"), dtype=dtype)
    assert made.classifier.weight.dtype == torch.float32 and made.vision_model.dtype == dtype
    check_classifier(made, made(images))
    model = make_model("semantic")
    with torch.autocast("cpu", dtype):
        mixed = model(images)
    check_classifier(model, mixed)
    check_classifier(model, model.to(dtype)(images))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_dense_logits_compute_in_float32(dtype):
    model, inputs = make_model("two towers"), make_inputs("two towers")
    with torch.autocast("cpu", dtype):
        outputs = model(**inputs)
    assert outputs.logits.dtype == torch.float32
    expected = model.dense_logits(outputs.feature_map, outputs.text_embeds)
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_adapters_of_the_classifier_count():
    from peft import LoraConfig, get_peft_model

    images = make_inputs("semantic")["pixel_values"]
    model = get_peft_model(make_model("semantic"), LoraConfig(target_modules=["classifier"], init_lora_weights=False))
    with model.disable_adapter():
        plain = model(images).logits
    adapted = model(images).logits
    assert (adapted - plain).abs().max() > 0.01
    torch.testing.assert_close(model.merge_and_unload()(images).logits, adapted, atol=1e-5, rtol=0)


# --- results of processors ---


@pytest.mark.parametrize("several_names", [False, True])
def test_scores_of_semantic_segmentation_are_the_probabilities(several_names):
    logits = torch.randn(2, 4, 4, 6)
    geometry = torch.tensor([[*SIZE, 8]]).expand(2, -1)
    name_to_class = torch.tensor([0, 0, 1, 2]) if several_names else torch.arange(4)
    names = {"name_logits": logits, "name_to_class": name_to_class.expand(2, -1)} if several_names else {}
    outputs = SparSemanticSegmenterOutput(logits=logits[:, :3] if several_names else logits, geometry=geometry, **names)
    processor, sizes = SparImageProcessorPil(), [(60, 90), (11, 7)]
    plain = processor.post_process_semantic_segmentation(outputs, sizes)
    scored = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    for i, (size, labels, found) in enumerate(zip(sizes, plain, scored, strict=True)):
        assert torch.equal(found.segmentation, labels)
        expected = class_probabilities(logits[i], name_to_class, 8, SIZE, size)[1]
        torch.testing.assert_close(found.segmentation_scores, expected)
        assert torch.equal(found.segmentation_scores.argmax(0).int(), labels)


@torch.no_grad()
def test_scores_of_a_universal_model_are_the_sums_over_queries():
    outputs = make_model("universal")(**make_inputs("universal"))
    processor, sizes = SparUniversalImageProcessorPil(), [SIZE, (7, 50)]
    plain = processor.post_process_semantic_segmentation(outputs, sizes)
    for working_bytes in (2**26, 1):  # at once, and in tiles
        scored = processor.post_process_semantic_segmentation(
            outputs, sizes, return_segmentation_scores=True, working_bytes=working_bytes
        )
        for labels, found, size in zip(plain, scored, sizes, strict=True):
            assert torch.equal(found.segmentation, labels)
            assert found.segmentation_scores.shape == (len(LABELS), *size)
            assert torch.equal(found.segmentation_scores.argmax(0), labels)


def test_a_processor_names_all_inputs_it_makes(tmp_path):
    processor = SparProcessor(SparImageProcessorPil(), make_tokenizer())
    made = processor(images=Image.new("RGB", (40, 30)), text=["road"], return_tensors="pt", padding="max_length")
    assert set(made) <= set(processor.model_input_names)
    before = set(vars(processor))
    processor.save_pretrained(tmp_path)
    assert set(vars(processor)) == before, "saving leaves nothing of the folder in the object"


# --- a fresh start ---

FAMILIES = {
    "siglip": SiglipVisionModel,
    "naflex": Siglip2VisionModel,
    "maskclip": CLIPVisionModel,
    "metaclip2": MetaClip2VisionModel,
    "dinov3": DINOv3ViTModel,
    "dinov3txt": DINOv3ViTModel,
    "tipsv2": Tipsv2VisionModel,
    "dinov2": Dinov2WithRegistersModel,
    "radio": RadioModel,
    "radiotext": RadioModel,
}


@pytest.mark.parametrize("kind, readout", [case for case in CASES if case[0] != "backbone"], ids=lambda part: part)
def test_new_weights_are_distributed_as_those_of_transformers(kind, readout):
    torch.manual_seed(0)
    model_class, config = KINDS[kind]
    model = model_class(config(readout))
    backbone = (model if kind == "vision" else model.vision_model).backbone
    theirs = dict(FAMILIES[readout](backbone.config).named_parameters())
    ours = dict(backbone.named_parameters())
    for name in theirs.keys() & ours.keys():
        std, expected = (float(part[name].detach().std(correction=0)) for part in (ours, theirs))
        if ours[name].numel() > 500 or not expected:
            assert std == pytest.approx(expected, rel=0.2), name


def test_a_new_classifier_is_small_and_loading_one_keeps_it(tmp_path):
    model = SparForSemanticSegmentation(semantic_config("siglip"))
    assert 0.01 < float(model.classifier.weight.detach().std()) < 0.03 and not model.classifier.bias.any()
    nn.init.ones_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    assert SparForSemanticSegmentation.from_pretrained(tmp_path).classifier.weight.eq(1).all()


@pytest.mark.parametrize("readout", READOUTS)
def test_a_vision_model_of_the_same_seed_is_the_same(readout):
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(SparVisionModel(spar_config(readout)).state_dict())
    assert all(torch.equal(values, made[1][name]) for name, values in made[0].items())
