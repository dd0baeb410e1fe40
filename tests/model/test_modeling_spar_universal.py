"""Mask-classification head and its image processor: shapes at any size, exact geometry, transformers' rules, loading."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import randomise, tiny_config
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    pipeline,
)
from transformers.models.mask2former.image_processing_pil_mask2former import compute_segments
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from spar_hf import (
    SPAR_TINY,
    SparForUniversalSegmentation,
    SparUniversalConfig,
    SparUniversalImageProcessorPil,
    SparUniversalSegmentationOutput,
    SparVisionModel,
)

HEAD = {"hidden_dim": 32, "num_attention_heads": 4, "dim_feedforward": 64, "decoder_layers": 4, "num_queries": 7}
CLASSES = {"id2label": {0: "sky", 1: "grass", 2: "dog"}}


@pytest.fixture(scope="module")
def vision_model():
    return randomise(SparVisionModel(tiny_config()))


@pytest.fixture(scope="module")
def model(vision_model):
    torch.manual_seed(0)
    model = randomise(SparForUniversalSegmentation.from_spar(vision_model, **CLASSES, **HEAD))
    with torch.no_grad():
        model.class_predictor.bias[-1] -= 5  # every query is a segment, so that there is something to compare
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("universal")
    model.save_pretrained(folder)
    SparUniversalImageProcessorPil(size={"shortest_edge": 60}, label_ids_to_fuse=[0, 1]).save_pretrained(folder)
    Image.effect_mandelbrot((121, 90), (-2, -1, 1, 1), 20).convert("RGB").save(folder / "image.png")
    return folder


def outputs_of(masks: torch.Tensor, classes: torch.Tensor, extent=None) -> SparUniversalSegmentationOutput:
    extent = torch.tensor([extent or masks.shape[-2:]], dtype=torch.float)
    return SparUniversalSegmentationOutput(
        class_queries_logits=classes[None], masks_queries_logits=masks[None], mask_sizes=extent
    )


def sure_of(*labels: int, classes: int = 3) -> torch.Tensor:
    """Class logits of queries with certain classes."""
    return F.one_hot(torch.tensor(labels), classes + 1).float() * 30


@pytest.mark.parametrize("size", [(64, 64), (67, 71), (35, 103), (9, 16)])
def test_forward__any_size(model, size):
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, *size))
    grid = [-(-side // 16) * 4 for side in size]
    assert outputs.class_queries_logits.shape == (2, 7, 4)
    assert outputs.masks_queries_logits.shape == (2, 7, *grid)
    torch.testing.assert_close(outputs.mask_sizes, torch.tensor([size, size]) / 4)
    assert outputs.loss is None


def test_forward__a_single_image_needs_a_batch_axis(model):
    with pytest.raises(ValueError, match=r"got shape \(3, 32, 48\).*`pixel_values\[None\]`"):
        model(torch.zeros(3, 32, 48))


def test_features_are_those_of_the_backbone(model, vision_model):
    pixel_values = torch.randn(1, 3, 50, 70)
    fresh = SparForUniversalSegmentation.from_spar(vision_model, out_features=["stage1", "features"], **CLASSES, **HEAD)
    with torch.no_grad():
        features = fresh.features(pixel_values)
        torch.testing.assert_close(features[:, 32:], vision_model(pixel_values).feature_map)
    assert features.shape == (1, 64, 4, 5)


def test_a_new_head_starts_as_transformers_starts_its_own(vision_model):
    """transformers may skip layers whose weights are in sub-modules; their weights would then be far too small."""
    torch.manual_seed(0)
    head = SparForUniversalSegmentation.from_spar(vision_model, **CLASSES, hidden_dim=64, num_queries=5)
    own = Mask2FormerConfig(hidden_dim=64, dim_feedforward=1024, num_queries=5, num_attention_heads=8)
    theirs = Mask2FormerForUniversalSegmentation(own).model.transformer_module.state_dict()
    for name, tensor in head.decoder.state_dict().items():
        if tensor.ndim > 1 and tensor.numel() > 1000:
            assert float(tensor.std()) == pytest.approx(float(theirs[name].std()), rel=0.1), name
    upscale = torch.nn.ConvTranspose2d(64, 64, kernel_size=2, stride=2).weight  # EoMT starts as torch does
    assert float(head.upscale[0].conv1.weight.std()) == pytest.approx(float(upscale.std()), rel=0.1)


def test_calibrate__mean_and_variance_of_the_features(vision_model):
    fresh = SparForUniversalSegmentation.from_spar(vision_model, **CLASSES, **HEAD).train()
    images = [torch.randn(1, 3, 64, 64), 3 * torch.rand(2, 3, 50, 90)]  # what differs between images counts too
    fresh.calibrate(images)
    with torch.no_grad():
        maps = [vision_model(image).feature_map.transpose(0, 1).flatten(1) for image in images]
    patches = torch.cat(maps, dim=1)  # (dim, 16 + 2 * 24)
    torch.testing.assert_close(fresh.feature_norm.running_mean, patches.mean(1))
    torch.testing.assert_close(fresh.feature_norm.running_var, patches.var(1))
    assert fresh.training
    with pytest.raises(ValueError, match="no images"):
        fresh.calibrate([])


def test_loss__that_of_mask2former(model, monkeypatch):
    """transformers' loss, summed over the decoder's predictions, with masks over the padded image."""
    seen = []
    segment_loss = model.segment_loss
    monkeypatch.setattr(
        model, "segment_loss", lambda *predictions: seen.append(predictions) or segment_loss(*predictions)
    )
    masks = torch.zeros(2, 40, 50)
    masks[0, :25], masks[1, 25:] = 1, 1
    pixel_values = torch.randn(1, 3, 40, 50)
    torch.manual_seed(0)
    with torch.no_grad():
        loss = model(pixel_values, [masks], [torch.tensor([2, 0])]).loss
        found = model(pixel_values)
    config = Mask2FormerConfig(id2label=CLASSES["id2label"])
    criterion = Mask2FormerLoss(config, {})
    padded = torch.zeros(2, 48, 64)
    padded[:, :40, :50] = masks
    of_classes, of_masks, *_ = seen[0]
    assert len(of_classes) == len(of_masks) == 4  # before the first layer of the decoder and after each
    torch.testing.assert_close(of_classes[-1], found.class_queries_logits)
    torch.testing.assert_close(of_masks[-1], found.masks_queries_logits)
    each = []
    for class_logits, mask_logits in zip(of_classes, of_masks, strict=True):
        parts = criterion(mask_logits, class_logits, [padded], [torch.tensor([2, 0])])
        each.append(2 * parts["loss_cross_entropy"] + 5 * parts["loss_mask"] + 5 * parts["loss_dice"])
    # the points of the masks' loss are drawn anew each time
    torch.testing.assert_close(loss, torch.stack(each).sum(), rtol=0.02, atol=0)


def test_loss__falls_and_the_segments_come_out(vision_model):
    torch.manual_seed(0)
    model = SparForUniversalSegmentation.from_spar(vision_model, **CLASSES, **{**HEAD, "train_num_points": 256})
    processor = SparUniversalImageProcessorPil(label_ids_to_fuse=[0])
    images, maps = [], []
    for column in (30, 66):
        image = np.zeros((70, 99, 3), np.uint8)
        image[:, :column], image[20:50, column:] = (40, 90, 220), (240, 120, 30)
        label_map = np.full((70, 99), 255)
        label_map[:, :column], label_map[20:50, column:] = 0, 2
        images.append(image)
        maps.append(label_map)
    inputs = processor(images, maps, return_tensors="pt")
    model.vision_model.requires_grad_(False)
    model.calibrate([inputs["pixel_values"]])
    model.feature_norm.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        outputs = model.eval()(**{key: inputs[key] for key in ("pixel_values", "original_sizes")})
    for label_map, result in zip(
        maps, processor.post_process_panoptic_segmentation(outputs, target_sizes=[(70, 99)] * 2), strict=True
    ):
        for label in (0, 2):
            ids = [segment["id"] for segment in result["segments_info"] if segment["label_id"] == label]
            found = torch.isin(result["segmentation"], torch.tensor(ids, dtype=torch.int32)).numpy()
            reference = label_map == label
            labelled = label_map != 255
            assert (found & reference).sum() / ((found | reference) & labelled).sum() > 0.8


@pytest.mark.parametrize("working_bytes", [2**26, 1])
@pytest.mark.parametrize(("working", "image"), [((67, 93), (67, 93)), ((67, 93), (201, 279)), ((40, 30), (53, 41))])
def test_geometry__a_border_lies_where_it_lies_in_the_image(working, image, working_bytes):
    """Logits that rise by one per pixel change sign at the same line in the image and the working image."""
    cells = [-(-side // 16) * 4 for side in working]
    column, row = 0.43 * working[1], 0.61 * working[0]
    centres = [(torch.arange(n) + 0.5) * 4 for n in cells]  # pixels of the working image, cells of 4
    right = (centres[1] - column).expand(*cells)
    below = (centres[0] - row)[:, None].expand(*cells)
    outputs = outputs_of(torch.stack([right, -right, below]), sure_of(0, 1, 3), extent=[side / 4 for side in working])
    processor = SparUniversalImageProcessorPil()
    x = (np.arange(image[1]) + 0.5) * working[1] / image[1]
    expected = np.broadcast_to(np.where(x > column, 0, 1), image)
    arguments = {"target_sizes": [image], "working_bytes": working_bytes}
    semantic = processor.post_process_semantic_segmentation(outputs, **arguments)[0]
    np.testing.assert_array_equal(semantic.numpy(), expected)
    panoptic = processor.post_process_panoptic_segmentation(outputs, **arguments)[0]
    assert [segment["label_id"] for segment in panoptic["segments_info"]] == [0, 1]
    np.testing.assert_array_equal(panoptic["segmentation"].numpy(), expected + 1)
    outputs.class_queries_logits = sure_of(3, 3, 2)[None]
    instance = processor.post_process_instance_segmentation(outputs, **arguments)[0]
    y = (np.arange(image[0]) + 0.5) * working[0] / image[0]
    np.testing.assert_array_equal(
        instance["segmentation"].numpy(), np.broadcast_to(np.where(y >= row, 0, -1)[:, None], image)
    )


def test_panoptic__the_rules_of_transformers():
    generator = torch.Generator().manual_seed(3)
    masks = F.interpolate(torch.randn(1, 12, 4, 5, generator=generator), size=(24, 32), mode="bilinear")[0] * 8
    labels = torch.randint(0, 3, (12,), generator=generator)
    classes = sure_of(*labels.tolist())
    processor = SparUniversalImageProcessorPil()
    for area in (0.0, 0.6, 0.8):
        expected, segments = compute_segments(
            masks.sigmoid(), torch.ones(12), labels, 0.5, area, label_ids_to_fuse=set(), target_size=None
        )
        # as in the code of the paper, pixels outside of every mask stay without a segment
        expected[masks.amax(0) < 0] = 0
        arguments = {"outputs": outputs_of(masks, classes), "overlap_mask_area_threshold": area}
        found = processor.post_process_panoptic_segmentation(**arguments)[0]
        torch.testing.assert_close(found["segmentation"], expected)
        assert found["segments_info"] == segments
        assert area or len({segment["label_id"] for segment in segments}) < len(segments) > 3

        # transformers numbers a segment anew after a fused one, so that two share a number: here fused ones are one
        fused = processor.post_process_panoptic_segmentation(**arguments, label_ids_to_fuse={0, 1, 2})[0]
        assert len({segment["label_id"] for segment in fused["segments_info"]}) == len(fused["segments_info"])
        for segment in fused["segments_info"]:
            parts = [other["id"] for other in segments if other["label_id"] == segment["label_id"]]
            union = torch.isin(expected, torch.tensor(parts, dtype=torch.int32))
            assert torch.equal(fused["segmentation"] == segment["id"], union)


def test_panoptic__classes_of_the_processor_are_fused_by_default():
    masks = torch.full((2, 8, 8), -9.0)
    masks[0, :, :4], masks[1, :, 4:] = 9, 9
    outputs = outputs_of(masks, sure_of(1, 1))
    assert len(SparUniversalImageProcessorPil().post_process_panoptic_segmentation(outputs)[0]["segments_info"]) == 2
    fused = SparUniversalImageProcessorPil(label_ids_to_fuse=[1]).post_process_panoptic_segmentation(outputs)[0]
    assert [(s["id"], s["label_id"], s["was_fused"]) for s in fused["segments_info"]] == [(1, 1, True)]
    assert (fused["segmentation"] == 1).all()


def test_panoptic__an_unsure_query_is_no_segment():
    outputs = outputs_of(torch.full((1, 8, 8), 9.0), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # 0.475 sure
    result = SparUniversalImageProcessorPil().post_process_panoptic_segmentation(outputs, target_sizes=[(10, 12)])[0]
    assert result["segments_info"] == [] and result["segmentation"].eq(0).all()
    assert result["segmentation"].shape == (10, 12)
    result = SparUniversalImageProcessorPil().post_process_panoptic_segmentation(outputs, threshold=0.4)[0]
    assert [segment["score"] for segment in result["segments_info"]] == [pytest.approx(0.475, abs=1e-3)]


def test_semantic__sum_over_queries():
    generator = torch.Generator().manual_seed(0)
    masks, classes = torch.randn(9, 8, 12, generator=generator), torch.randn(9, 4, generator=generator)
    found = SparUniversalImageProcessorPil().post_process_semantic_segmentation(outputs_of(masks, classes))[0]
    expected = sum(classes.softmax(-1)[q, :3, None, None] * masks[q].sigmoid() for q in range(9)).argmax(0)
    torch.testing.assert_close(found, expected)


def test_instance__overlapping_masks_stay_whole():
    masks = torch.full((3, 8, 8), -20.0)
    masks[0, :, :6], masks[1, :, 4:] = 20, 20  # columns 4 and 5 belong to both; the third is empty
    classes = sure_of(2, 2, 2)
    classes[0] *= 0.1
    processor = SparUniversalImageProcessorPil()
    arguments = {"outputs": outputs_of(masks, classes), "threshold": 0.5}
    result = processor.post_process_instance_segmentation(**arguments)[0]
    assert result["segmentation"][0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]  # the surer one on top
    assert [(s["id"], s["label_id"]) for s in result["segments_info"]] == [(0, 2), (1, 2)]
    binary = processor.post_process_instance_segmentation(**arguments, return_binary_maps=True)[0]["segmentation"]
    assert binary.sum((1, 2)).tolist() == [32, 48]
    runs = processor.post_process_instance_segmentation(**arguments, return_coco_annotation=True)[0]["segmentation"]
    assert [sum(run[1::2]) for run in runs] == [32, 32] and runs[1][:4] == [1, 4, 9, 4]
    masks[0] = -20
    masks[0, :4, 5:7] = 20  # behind the second, and no pixel of column 0 to 3 belongs to any
    arguments["outputs"] = outputs_of(masks, classes)
    result = processor.post_process_instance_segmentation(**arguments, return_coco_annotation=True)[0]
    assert [s["id"] for s in result["segments_info"]] == [0, 1]
    assert [sum(run[1::2]) for run in result["segmentation"]] == [32, 0]
    with pytest.raises(ValueError, match="return_coco_annotation"):
        processor.post_process_instance_segmentation(**arguments, return_binary_maps=True, return_coco_annotation=True)


def test_post_process__bad_input_is_refused():
    outputs = outputs_of(torch.zeros(1, 8, 8), sure_of(1))
    processor = SparUniversalImageProcessorPil()
    with pytest.raises(ValueError, match="1 images in `outputs` but 2"):
        processor.post_process_panoptic_segmentation(outputs, target_sizes=[(8, 8), (8, 8)])
    outputs.mask_sizes = None
    with pytest.raises(ValueError, match="mask_sizes"):
        processor.post_process_semantic_segmentation(outputs)


@pytest.mark.parametrize("size", [None, {"shortest_edge": 37}, {"height": 90, "width": 141}])
def test_encode__masks_lie_where_the_pixels_lie(size):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 4, (5, 7), dtype=np.uint8))
    label_map = coarse.resize((83, 61), Image.Resampling.NEAREST)
    processor = SparUniversalImageProcessorPil(size=size)
    inputs = processor(label_map.convert("RGB"), label_map, ignore_index=3, return_tensors="pt")
    height, width = inputs["pixel_values"].shape[-2:]
    expected = np.asarray(label_map.resize((width, height), Image.Resampling.NEAREST))
    assert inputs["class_labels"][0].tolist() == [0, 1, 2]
    for label, mask in zip(inputs["class_labels"][0].tolist(), inputs["mask_labels"][0], strict=True):
        assert (mask.numpy() != (expected == label)).mean() < 0.001  # Pillow rounds some centres elsewhere


def test_encode__segments_with_classes_of_their_own():
    image = Image.new("RGB", (8, 6))
    segments = np.repeat(np.array([[70000, 3, 9, 255]]), 2, axis=1).repeat(6, axis=0)
    inputs = SparUniversalImageProcessorPil()(
        [image], [segments], instance_id_to_semantic_id={3: 1, 9: 1, 70000: 0}, return_tensors="pt"
    )
    assert inputs["class_labels"][0].tolist() == [1, 1, 0]
    assert inputs["mask_labels"][0].sum((1, 2)).tolist() == [12, 12, 12]
    assert inputs["mask_labels"][0][2, :, :2].all()
    for wrong, message in [
        ({"segmentation_maps": segments[:, :5]}, "6×8"),
        ({"segmentation_maps": segments / 2}, "float64"),
        ({"segmentation_maps": [segments, segments]}, "1 images but 2"),
        ({"segmentation_maps": segments, "instance_id_to_semantic_id": {3: 1}}, r"\[9, 70000\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            SparUniversalImageProcessorPil()(image, **wrong)


@pytest.mark.parametrize("call", [True, False])
def test_labels__that_count_from_one(call):
    """As in transformers, but that ignored pixels stay ignored: there 255 becomes the class 254."""
    segments = np.array([[0, 0, 1, 1], [2, 2, 255, 255]], np.uint8).repeat(32, 0).repeat(32, 1)
    image, options = Image.new("RGB", (128, 64)), {"do_reduce_labels": True}
    processor = SparUniversalImageProcessorPil(do_resize=False, **({} if call else options))
    found = processor(image, segments, return_tensors="pt", **(options if call else {}))
    assert found.class_labels[0].tolist() == [0, 1]
    assert [mask.sum().item() for mask in found.mask_labels[0]] == [64 * 32, 64 * 32]
    assert found.mask_labels[0][0, :32, 64:].all() and found.mask_labels[0][1, 32:, :64].all()
    of_segments = processor(image, segments, {1: 7, 2: 7}, **options)
    assert of_segments.class_labels[0].tolist() == [6, 6]
    assert processor(image, segments, do_reduce_labels=False).class_labels[0].tolist() == [0, 1, 2]
    assert processor(image, segments, ignore_index=None, **options).class_labels[0].tolist() == [0, 1, 254]


def test_post_process__large_results_are_refused(monkeypatch):
    monkeypatch.setattr("spar_hf.model.results.OUTPUT_BYTES", 50_000)
    processor, size = SparUniversalImageProcessorPil(), [(100, 100)]
    outputs = outputs_of(torch.zeros(6, 4, 4), torch.zeros(6, 4))
    with pytest.raises(ValueError, match=r"Scores of 3 classes at 100×100 pixels .* segmentation alone"):
        processor.post_process_semantic_segmentation(outputs, size, return_segmentation_scores=True)
    assert processor.post_process_semantic_segmentation(outputs, size)[0].shape == (100, 100)
    with pytest.raises(ValueError, match=r"Masks of 6 segments .*return_coco_annotation"):
        processor.post_process_instance_segmentation(outputs, 0.0, target_sizes=size, return_binary_maps=True)


def test_labels__bad_ones_are_refused(model):
    pixel_values, masks, classes = torch.zeros(1, 3, 32, 48), torch.ones(2, 32, 48), torch.tensor([0, 2])
    for wrong, message in [
        (([masks], None), "both"),
        (([masks, masks], [classes]), "1 images, but 2"),
        (([masks[:, :30]], [classes]), "32×48"),
        (([masks], [classes[:1]]), "segments"),
        (([masks[:0]], [classes[:0]]), "0 segments"),
        (([torch.ones(8, 32, 48)], [torch.zeros(8).long()]), "8 segments"),
        (([masks], [torch.tensor([0, 3])]), "3 classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(pixel_values, *wrong)


def test_config__bad_settings_are_refused():
    with pytest.raises(ValueError, match="SparConfig"):
        SparUniversalConfig(backbone_config={"model_type": "swin"})
    with pytest.raises(ValueError, match="multiple"):
        SparUniversalConfig(hidden_dim=30)
    with pytest.raises(ValueError, match="at least"):
        SparUniversalConfig(num_queries=0)


def test_save_and_load__the_same_and_no_other_head(model, folder, tmp_path):
    loaded = AutoModelForUniversalSegmentation.from_pretrained(folder)
    assert type(loaded) is SparForUniversalSegmentation
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert loaded.config.id2label == CLASSES["id2label"]
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is SparUniversalImageProcessorPil
    assert processor.label_ids_to_fuse == [0, 1] and processor.size.shortest_edge == 60
    for auto_class in (AutoModel, AutoModelForSemanticSegmentation):
        with pytest.raises(ValueError, match="SparUniversalConfig"):
            auto_class.from_pretrained(folder)
    tower = SparVisionModel.from_pretrained(
        folder
    ).state_dict()  # as transformers takes the base of a model with a head
    assert tower.keys() == {name.removeprefix("vision_model.") for name in model.state_dict() if "vision" in name}
    assert all(torch.equal(tensor, model.state_dict()["vision_model." + name]) for name, tensor in tower.items())
    with pytest.raises(ValueError, match="spar_universal"):
        SparForUniversalSegmentation.from_spar(str(folder), **CLASSES)
    with pytest.raises(ValueError, match="from_spar"):
        SparForUniversalSegmentation.from_pretrained(SPAR_TINY)

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(folder / "model.safetensors")
    del weights["class_predictor.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"class_predictor\.weight"):
        SparForUniversalSegmentation.from_pretrained(broken)


def test_pipeline__quiet_and_in_the_size_of_the_image(folder, transformers_log, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal whether to trust the folder"))
    segment = pipeline("image-segmentation", model=str(folder))
    image = Image.open(folder / "image.png")
    for subtask in ("panoptic", "instance"):
        segments = segment(image, subtask=subtask, threshold=0.0, overlap_mask_area_threshold=0.0)
        assert segments and all(s["mask"].size == (121, 90) for s in segments)
        assert {s["label"] for s in segments} <= {"sky", "grass", "dog"}
    semantic = segment([image, image], subtask="semantic", batch_size=2)
    covered = sum(np.asarray(s["mask"]) / 255 for s in semantic[1])
    assert (covered == 1).all()
    assert transformers_log == []


HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "spar_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
sys.modules["scipy"] = None  # as where it is not installed: only training needs it
import json
from transformers import AutoModelForUniversalSegmentation, pipeline
folder = sys.argv[1]
segment = pipeline("image-segmentation", model=folder, trust_remote_code=True)
found = segment(folder + "/image.png", threshold=0.0, overlap_mask_area_threshold=0.0)
name = type(AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True)).__name__
assert "spar_hf" not in sys.modules
print(json.dumps([name, [[s["label"], s["score"], s["mask"].histogram()[255]] for s in found]]))
"""


def test_a_fresh_process_without_the_library_gives_the_same(folder, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", HIDDEN, str(folder)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    name, segments = json.loads(run.stdout.splitlines()[-1])
    assert name == "SparForUniversalSegmentation"
    expected = pipeline("image-segmentation", model=str(folder))(
        str(folder / "image.png"), threshold=0.0, overlap_mask_area_threshold=0.0
    )
    assert [label for label, _, _ in segments] == [s["label"] for s in expected]
    assert [pixels for _, _, pixels in segments] == [s["mask"].histogram()[255] for s in expected]
    assert [score for _, score, _ in segments] == pytest.approx([s["score"] for s in expected], abs=1e-5)
