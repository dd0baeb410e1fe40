"""A folder of images with masks, and folders of tiny models to measure on it."""

import numpy as np
import pytest
import torch
from evaluating import CLASSES, SIZES
from PIL import Image

from spar_hf import SparImageProcessorPil
from spar_hf.data.segmentation_sets import IGNORE_INDEX


@pytest.fixture
def dataset(tmp_path):
    """Five images of odd sizes: coarse coloured noise, labels in blocks, some of them ignored."""
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / "images" / f"image{i}.png")
        blocks = rng.choice(np.array([0, 1, 2, 3, 4, IGNORE_INDEX], np.uint8), (4, 3))
        mask = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
        mask.save(folder / "masks" / f"image{i}.png")
    return folder


@pytest.fixture
def checkpoint(tmp_path, two_towers, tokenizer):
    """Makes folders of tiny models; random features differ little from patch to patch until their offset is gone."""

    def make(name, shift=0.0, image_processor=True):
        folder = tmp_path / name
        with torch.no_grad():
            for parameter in two_towers.vision_model.backbone.encoder.parameters():
                parameter.mul_(1 + shift)
            noise = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
            head = two_towers.vision_model.backbone.head
            head.mlp.fc2.bias -= two_towers.vision_model(noise).feature_map.mean((0, 2, 3))
        two_towers.config.templates = "short"
        two_towers.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if image_processor:
            SparImageProcessorPil(size={"shortest_edge": 96}).save_pretrained(folder)
        return folder

    return make
