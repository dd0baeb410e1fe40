"""Training with transformers' Trainer and DistributedDataParallel: predictions, labels, classes, gradients."""

import copy

import numpy as np
import pytest
import torch
from model_classes import (
    CASES,
    KINDS,
    LABELS,
    SIZE,
    loss_of,
    make_inputs,
    make_labels,
    make_model,
    semantic_config,
    spar_config,
)
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn.functional import cross_entropy, interpolate
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments

from spar_hf import (
    SPAR_TINY,
    SparForSemanticSegmentation,
    SparForUniversalSegmentation,
    SparVisionModel,
)

SEVERAL_NAMES = [["road", "street"], ["car"], ["sky"], ["tree"]]
# its new name is not in the oldest transformers
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
each_case = pytest.mark.parametrize("kind, readout", CASES, ids=lambda part: part)


@pytest.fixture
def semantic():
    return make_model("semantic")


class Rows(torch.utils.data.Dataset):
    """The images of a batch one by one."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["pixel_values"])

    def __getitem__(self, row):
        return {name: values[row] for name, values in self.columns.items()}


def as_lists(rows):
    """A batch in which only the images are stacked, as the universal model takes it."""
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    return {**batch, "pixel_values": torch.stack(batch["pixel_values"])}


def trainer(model, folder, rows=None, **options):
    others = {name: options.pop(name) for name in ("compute_metrics", "data_collator") if name in options}
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True, save_strategy="no", **options)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, **others)


# --- what Trainer keeps of an evaluation set ---


@pytest.mark.parametrize("names", [None, SEVERAL_NAMES], ids=["a name each", "several names"])
def test_metrics_of_a_semantic_model_get_its_logits_alone(names, tmp_path):
    torch.manual_seed(0)
    model = SparForSemanticSegmentation(semantic_config("siglip", names=names)).eval()
    inputs, labels, seen = make_inputs("semantic"), make_labels("semantic"), []
    found = trainer(
        model, tmp_path, Rows(**inputs, **labels), compute_metrics=lambda found: seen.append(found.predictions) or {}
    )
    metrics = found.evaluate()
    with torch.no_grad():
        expected = model(**inputs, **labels)
    assert isinstance(seen[0], np.ndarray)
    np.testing.assert_allclose(seen[0], expected.logits.numpy(), atol=1e-6)
    assert metrics["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-5)


def test_predictions_of_two_towers_are_logits_alone(tmp_path):
    model, inputs = make_model("two towers"), make_inputs("two towers")
    rows = Rows(pixel_values=inputs["pixel_values"])
    predicted = trainer(
        model, tmp_path, rows, data_collator=lambda part: {**as_lists(part), "input_ids": inputs["input_ids"]}
    ).predict(rows)
    with torch.no_grad():
        np.testing.assert_allclose(predicted.predictions, model(**inputs).logits.numpy(), atol=1e-6)


def test_predictions_of_a_universal_model_are_those_that_masks_are_made_of(tmp_path):
    model, inputs = make_model("universal"), make_inputs("universal")
    rows = Rows(**inputs, **make_labels("universal"))
    names = ["mask_labels", "class_labels"]
    predicted = trainer(
        model, tmp_path, rows, data_collator=as_lists, label_names=names, remove_unused_columns=False
    ).predict(rows)
    with torch.no_grad():
        expected = model(**inputs)
    assert len(predicted.predictions) == 3
    for values, name in zip(
        predicted.predictions, ("class_queries_logits", "masks_queries_logits", "mask_sizes"), strict=True
    ):
        np.testing.assert_allclose(values, expected[name].numpy(), atol=1e-5)


def test_steps_of_gradient_accumulation_are_averaged(semantic, tmp_path):
    """Four batches of one image make the update of one batch of four."""
    rows = Rows(**make_inputs("semantic", batch=4), labels=make_labels("semantic")["labels"].repeat(2, 1, 1))
    updates = []
    for batch, steps in ((4, 1), (1, 4)):
        model = copy.deepcopy(semantic)
        options = {"learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant"}
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer(model, tmp_path, rows, **options, **sizes).train()
        updates.append(model.classifier.weight - semantic.classifier.weight)
    assert updates[0].abs().max() > 1e-4
    torch.testing.assert_close(updates[1], updates[0], atol=1e-5, rtol=1e-4)


# --- labels ---


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=str
)
def test_labels_may_be_integers_of_any_width(semantic, dtype):
    labels = make_labels("semantic")["labels"]
    labels[:, :5] = 3
    ignored = semantic.config.semantic_loss_ignore_index = 100  # one that int8 holds too
    labels[:, -7:] = ignored
    inputs = make_inputs("semantic")
    found = semantic(**inputs, labels=labels.to(dtype))
    logits = interpolate(found.logits, scale_factor=8, mode="bilinear")[..., : SIZE[0], : SIZE[1]]
    torch.testing.assert_close(found.loss, cross_entropy(logits, labels, ignore_index=ignored), atol=1e-5, rtol=1e-5)
    found.loss.backward()
    assert semantic.classifier.weight.grad.abs().max() > 0


@pytest.mark.parametrize("value", [-100, -1, 4])
def test_labels_that_are_no_class_are_refused(semantic, value):
    """Also -100, which torch ignores by default: it would count as a labelled pixel without a loss."""
    labels = make_labels("semantic")["labels"]
    labels[0, 0, 0] = value
    with pytest.raises(ValueError, match=f"hold {value}, which is none of the 4 classes"):
        semantic(**make_inputs("semantic"), labels=labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_labels_that_are_no_integers_are_refused(semantic, dtype):
    with pytest.raises(ValueError, match="must be integers"):
        semantic(**make_inputs("semantic"), labels=make_labels("semantic")["labels"].to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_labels_of_segments_may_be_integers_of_any_width(dtype):
    model, labels = make_model("universal"), make_labels("universal")
    narrow = {
        "mask_labels": [masks.to(dtype) for masks in labels["mask_labels"]],
        "class_labels": [classes.to(dtype) for classes in labels["class_labels"]],
    }
    losses = []
    for given in (labels, narrow):
        torch.manual_seed(0)  # the loss is taken at random points
        losses.append(model(**make_inputs("universal"), **given).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    "wrong", [{"class_labels": torch.tensor([0.5, 2.0])}, {"mask_labels": torch.full((2, *SIZE), 255)}]
)
def test_labels_of_segments_with_other_values_are_refused(wrong):
    labels = make_labels("universal")
    for name, value in wrong.items():
        labels[name] = [value, value]
    with pytest.raises(ValueError, match=r"integers.*0 or 1"):
        make_model("universal")(**make_inputs("universal"), **labels)


@pytest.mark.parametrize("kind", ["vision", "backbone", "two towers", "universal", "semantic"])
def test_labels_without_a_loss_are_refused(kind):
    labels = make_labels("universal" if kind == "semantic" else "semantic")
    model = make_model(kind)
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no loss for `{next(iter(labels))}`"):
        model(**make_inputs(kind), **labels)


def test_labels_for_two_towers_loaded_with_a_number_of_classes_are_refused():
    model = AutoModelForSemanticSegmentation.from_pretrained(SPAR_TINY, num_labels=5)
    embeds = torch.randn(5, model.config.projection_dim)
    with pytest.raises(ValueError, match="SparForSemanticSegmentation"):
        model(torch.zeros(1, 3, 32, 32), text_embeds=embeds, labels=torch.zeros(1, 32, 32, dtype=torch.long))


# --- other classes ---


@pytest.mark.parametrize("names", [None, SEVERAL_NAMES], ids=["a name each", "several names"])
@pytest.mark.parametrize("classes", [{"id2label": {0: "dog", 1: "cat"}}, {"num_labels": 2}], ids=["id2label", "number"])
def test_a_folder_is_trained_on_other_classes(names, classes, tmp_path):
    SparForSemanticSegmentation(semantic_config("siglip", names=names)).save_pretrained(tmp_path)
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, **classes, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (2, 32)
    assert model.config.names is None and model.config.num_labels == 2
    assert 0.01 < float(model.classifier.weight.detach().std()) < 0.03 and not model.classifier.bias.any()
    outputs = model(**make_inputs("semantic"), labels=make_labels("semantic")["labels"].clamp(max=1))
    outputs.loss.backward()
    assert outputs.logits.shape[1] == 2 and model.classifier.weight.grad.abs().max() > 0


def test_as_many_other_classes_keep_the_weights(tmp_path):
    model = SparForSemanticSegmentation(semantic_config("siglip", names=SEVERAL_NAMES))
    model.save_pretrained(tmp_path)
    labels = {i: f"class {i}" for i in LABELS}
    again = SparForSemanticSegmentation.from_pretrained(tmp_path, id2label=labels)
    assert again.config.id2label == labels and torch.equal(again.classifier.weight, model.classifier.weight)


def test_a_folder_of_a_universal_model_is_trained_on_other_classes(tmp_path):
    make_model("universal").save_pretrained(tmp_path)
    model = SparForUniversalSegmentation.from_pretrained(
        tmp_path, id2label={0: "dog", 1: "cat"}, ignore_mismatched_sizes=True
    )
    assert model.class_predictor.weight.shape[0] == 3
    masks = make_labels("universal")["mask_labels"]
    model(**make_inputs("universal"), mask_labels=masks, class_labels=[torch.tensor([0, 1])] * 2).loss.backward()


# --- gradients ---


def without_gradient(model, loss):
    loss.backward()
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@each_case
def test_every_trainable_parameter_gets_a_gradient(kind, readout):
    model = make_model(kind, readout).train()
    assert without_gradient(model, loss_of(model, kind)) == []
    frozen = {name.split(".")[-1] for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) < 8, "most parameters are trained"


@pytest.mark.parametrize("readout", ["siglip", "maskclip", "dinov3", "dinov3txt"])
def test_the_pooling_head_is_trained_where_it_is_asked_for(readout):
    model = SparVisionModel(spar_config(readout, output_pooled=True)).train()
    outputs = model(**make_inputs("vision"))
    assert without_gradient(model, outputs.pooler_output.square().sum() + outputs.feature_map.square().sum()) == []
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == (["backbone.embeddings.mask_token"] if readout.startswith("dino") else [])


def test_loading_keeps_what_is_not_trainable(tmp_path):
    make_model("two towers").save_pretrained(tmp_path)
    models = [model_class.from_pretrained(tmp_path) for model_class in (KINDS["two towers"][0], SparVisionModel)]
    models.append(SparForUniversalSegmentation.from_spar(tmp_path, num_labels=3))
    models.append(SparVisionModel.from_backbone(tmp_path))
    for model in models:
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        expected = ["head.probe"] if model is not models[0] else ["head.probe", "logit_bias", "logit_scale"]
        assert sorted(name.removeprefix("vision_model.").removeprefix("backbone.") for name in frozen) == expected


@pytest.fixture
def process_group():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


@each_case
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_distributed_training_with_gradient_checkpointing(kind, readout, process_group):
    """It fails at the second step if a trainable parameter got no gradient in the first."""
    model = make_model(kind, readout).train()
    model.gradient_checkpointing_enable()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        loss_of(wrapped, kind).backward()
        wrapped.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_a_universal_model_are_the_same_with_checkpointing(reentrant):
    def gradients(model):
        torch.manual_seed(0)
        loss_of(model, "universal").backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, model = make_model("universal").train(), make_model("universal").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, found = gradients(plain), gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4, msg=name)
