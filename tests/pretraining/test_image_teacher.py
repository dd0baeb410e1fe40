"""Features of a pre-trained image model as a second target: read at the right pixels, learned, resumed, and left out."""

import itertools
import json
import random
import runpy

import numpy as np
import pytest
import torch
import yaml
from interrupting import at_call
from launching import TRAINING
from pretraining_world import SMALL, arguments
from safetensors.torch import load_file
from tiny_models import randomise
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    EfficientNetConfig,
    EfficientNetModel,
)
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from spar_hf.pretraining import crops as crops_module
from spar_hf.pretraining import trainer
from spar_hf.pretraining.crops import CropBatches, Crops, load_sets, paste_box, read_map
from spar_hf.pretraining.image_teacher import FILE, ImageTeacher, compute_maps
from spar_hf.pretraining.trainer import main
from spar_hf.utils.errors import UsageError

STUDY = str(TRAINING / "studies/efficientnet_lite.py")
CPU = torch.device("cpu")


def save_teacher(folder, model):
    """An image teacher of random weights with a processor."""
    model.save_pretrained(folder)
    EfficientNetImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    four = {"in_channels": [8] * 4, "out_channels": [8] * 4, "strides": [2] * 4, "kernel_sizes": [3] * 4}
    four |= {"expand_ratios": [1] * 4, "num_block_repeats": [1] * 4, "depthwise_padding": []}
    model = EfficientNetModel(EfficientNetConfig(width_coefficient=0.05, hidden_dim=64, **four))
    randomise(model)
    return save_teacher(tmp_path / "teacher", model)


def test_features_are_read_at_the_centres_of_patches():
    """A map that holds its own coordinates, in pixels of an image of 160 × 96, tells where it was read."""
    x, y = (torch.arange(n) * 32 + 16.0 for n in (5, 3))
    place = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]))  # (2, 3, 5)
    found = read_map(place, (20.0, 30.0, 100.0, 70.0), (96, 160), 4)
    torch.testing.assert_close(found[0, 0], torch.tensor([30.0, 50.0, 70.0, 90.0]))
    torch.testing.assert_close(found[1, :, 0], torch.tensor([35.0, 45.0, 55.0, 65.0]))


def test_a_mirrored_crop_has_mirrored_features(world, monkeypatch):
    """The image itself is the map: so a crop must show what its target says."""
    monkeypatch.setattr(crops_module, "jitter", lambda pixels, rng: pixels)
    sets = load_sets(world, yaml.safe_load((world / "recipe.yaml").read_text()))
    scenes = sets[0]
    scenes.teacher_maps = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() for image in scenes.images]
    agree = []
    for step in range(8):
        crops = CropBatches(sets, 8, 64, 8, 0, patch=8)[step][0]
        shown = F.avg_pool2d(crops.pixels, 8).flatten()
        agree.append(float(torch.corrcoef(torch.stack([shown, crops.targets.flatten()]))[0, 1]))
    assert min(agree) > 0.9


def test_a_pasted_box_brings_the_features_of_its_patches():
    numbers = torch.arange(3.0)
    crops = Crops(*(numbers.view(3, 1, 1, 1).expand(3, 1, 64, 64), numbers.view(3, 1, 1).expand(3, 16, 16)))
    crops = crops._replace(targets=numbers.view(3, 1, 1, 1).expand(3, 5, 4, 4))
    for seed in range(5):
        pasted = paste_box(crops, random.Random(seed))
        assert torch.equal(pasted.targets[:, 0], pasted.labels[:, 2::4, 2::4])
        assert torch.equal(pasted.labels, pasted.pixels[:, 0, ::4, ::4])


def test_maps_keep_the_variance_of_the_features(world):
    """Of a teacher with fewer channels than axes nothing is lost: distances between features stay, but for one factor."""
    sets = load_sets(world, yaml.safe_load((world / "recipe.yaml").read_text()))

    def colours(image, longest_edge):
        assert longest_edge == max(image.shape[:2])
        return F.avg_pool2d(torch.from_numpy(image.copy()).permute(2, 0, 1).float(), 20)

    maps = list(compute_maps(sets, colours))
    assert len(maps) == sum(map(len, sets)) and all(map_.dtype == torch.float16 for map_ in maps)
    images = [image for crops in sets for image in crops.images]
    kept = torch.cat([map_.float().flatten(1).T for map_ in maps])
    original = torch.cat([colours(image, max(image.shape[:2])).flatten(1).T for image in images])
    assert kept.square().mean() == pytest.approx(1, abs=0.01)
    ratio = torch.cdist(kept, kept[:20]) / torch.cdist(original, original[:20]).clamp(min=1e-3)
    far = torch.cdist(original, original[:20]) > 5
    assert ratio[far].std() / ratio[far].mean() < 0.01


def test_patches_of_a_vit_are_a_map_without_class_token_and_registers(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape)).eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    found = ImageTeacher(save_teacher(tmp_path, model), torch.float32, CPU)(image, 64)
    pixels = (torch.from_numpy(image).float() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    with torch.no_grad():
        tokens = model(pixels.permute(2, 0, 1)[None]).last_hidden_state[0, 5:]
    assert found.shape == (32, 5, 8)
    torch.testing.assert_close(found.flatten(1).T, tokens, atol=1e-4, rtol=1e-4)


def test_a_model_without_feature_maps_is_refused(tmp_path):
    image = np.zeros((64, 64, 3), np.uint8)
    config = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(tmp_path / "text")
    with pytest.raises(UsageError):
        ImageTeacher(str(tmp_path / "text"), torch.float32, CPU)(image, 64)
    with pytest.raises(UsageError):
        ImageTeacher(str(tmp_path / "nothing"), torch.float32, CPU)


def test_the_tower_learns_the_features_and_the_run_resumes(world, teacher, monkeypatch):
    options = SMALL | {"steps": 41, "image_teacher": teacher, "learning_rate": 3e-3}
    folder = main(arguments(world, world / "run", **options))
    log = [json.loads(line) for line in (world / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["image_teacher"] < 0.9 * log[0]["image_teacher"]
    row = log[0]
    labels = (3 * row["set0"] + row["set1"]) / 4  # three crops of one set, one of the other
    assert row["loss"] == pytest.approx(labels + 2 * row["image_teacher"], rel=1e-4)
    assert not any("imitation" in name for name in load_file(folder / "model.safetensors"))

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step_loss", at_call(5, trainer.step_loss))
        assert main(arguments(world, world / "again", **options)) is None
    written = (world / "again" / FILE).stat().st_mtime_ns
    resumed = main(arguments(world, world / "again", **options, resume=True))
    assert (world / "again" / FILE).stat().st_mtime_ns == written
    weights = [load_file(part / "model.safetensors") for part in (folder, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class PlainEfficientNetLite(nn.Module):
    """The Lite network as published, from weights in their original naming: no squeeze-and-excitation, ReLU6."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def norm(self, x, name):
        w = self.weights
        parts = (w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-3)

    def depthwise(self, x, name, stride):
        weight = self.weights[f"{name}.weight"]
        for axis in (3, 2):  # "same" as TensorFlow does it: what is odd comes after
            size, kernel = x.shape[axis], weight.shape[-1]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            before = total // 2
            x = F.pad(x, (before, total - before) if axis == 3 else (0, 0, before, total - before))
        groups = x.shape[1] if weight.shape[1] == 1 and x.shape[1] > 1 else 1
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def forward(self, x, strides):
        x = F.relu6(self.norm(self.depthwise(x, "_conv_stem", 2), "_bn0"))
        for i, stride in enumerate(strides):
            block, start = f"_blocks.{i}", x
            if f"{block}._expand_conv.weight" in self.weights:
                x = F.relu6(self.norm(F.conv2d(x, self.weights[f"{block}._expand_conv.weight"]), f"{block}._bn0"))
            x = F.relu6(self.norm(self.depthwise(x, f"{block}._depthwise_conv", stride), f"{block}._bn1"))
            x = self.norm(F.conv2d(x, self.weights[f"{block}._project_conv.weight"]), f"{block}._bn2")
            x = x + start if stride == 1 and x.shape == start.shape else x
        return F.relu6(self.norm(F.conv2d(x, self.weights["_conv_head.weight"]), "_bn1"))


def lite_weights():
    """Random weights of a small network in the naming of efficientnet_lite_pytorch, and the strides of its blocks."""
    generator, weights, strides = torch.Generator().manual_seed(0), {}, []

    def conv(name, *shape):
        weights[f"{name}.weight"] = torch.randn(*shape, generator=generator) / np.prod(shape[1:]) ** 0.5

    def norm(name, width):
        values = {
            "weight": torch.rand(width, generator=generator) + 0.5,
            "bias": torch.randn(width, generator=generator),
        }
        values |= {"running_mean": torch.randn(width, generator=generator) / 4}
        values |= {"running_var": torch.rand(width, generator=generator) + 0.5, "num_batches_tracked": torch.tensor(1)}
        weights.update({f"{name}.{part}": value for part, value in values.items()})

    conv("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    width, number = 32, itertools.count()
    stages = zip([16, 24, 40, 56, 72, 80, 88], [3, 3, 5, 3, 5, 5, 3], [1, 2, 2, 1, 2, 1, 1], strict=True)
    for (out, kernel, repeats), stride, expand in zip(stages, [1, 2, 2, 2, 1, 2, 1], [1, *[6] * 6], strict=True):
        for repeat in range(repeats):
            block, inner = f"_blocks.{next(number)}", width * expand
            if expand > 1:
                conv(f"{block}._expand_conv", inner, width, 1, 1)
                norm(f"{block}._bn0", inner)
            conv(f"{block}._depthwise_conv", inner, 1, kernel, kernel)
            norm(f"{block}._bn1", inner)
            conv(f"{block}._project_conv", out, inner, 1, 1)
            norm(f"{block}._bn2", out)
            strides.append(1 if repeat else stride)
            width = out
    conv("_conv_head", 1280, width, 1, 1)
    norm("_bn1", 1280)
    conv("_fc", 10, 1280)
    return weights, strides


def test_efficientnet_lite_in_transformers_computes_what_was_published(tmp_path):
    weights, strides = lite_weights()
    checkpoint, folder = tmp_path / "lite.pth", tmp_path / "lite"
    torch.save(weights, checkpoint)
    runpy.run_path(STUDY)["main"](["--checkpoint", str(checkpoint), "--output", str(folder)])
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    found = ImageTeacher(str(folder), torch.float32, CPU)(image, 96)
    pixels = (torch.from_numpy(image).float().permute(2, 0, 1)[None] - 127) / 128
    expected = PlainEfficientNetLite(weights)(pixels, strides)[0]
    assert found.shape == (1280, 2, 3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_features_of_another_teacher_or_other_images_are_refused(world, teacher, tmp_path):
    options = SMALL | {"steps": 1, "image_teacher": teacher}
    main(arguments(world, world / "run", **options))
    other = save_teacher(tmp_path / "other", EfficientNetModel.from_pretrained(teacher))
    (world / "fresh").mkdir()
    (world / "run" / FILE).rename(world / "fresh" / FILE)
    with pytest.raises(UsageError, match="Delete it"):
        main(arguments(world, world / "fresh", **options | {"image_teacher": other}))


def test_features_that_are_all_the_same_are_refused(world):
    sets = load_sets(world, yaml.safe_load((world / "recipe.yaml").read_text()))
    with pytest.raises(UsageError, match="same features everywhere"):
        next(compute_maps(sets, lambda image, longest_edge: torch.ones(4, 2, 3)))
