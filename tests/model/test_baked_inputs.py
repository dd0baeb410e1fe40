"""The documented exceptions of baked folders: images that transformers' pipeline converts before our image processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation, bake_vocabulary


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baked")
    model = SparForOpenVocabSegmentation.from_pretrained(SPAR_TINY)
    tokenizer = AutoTokenizer.from_pretrained(SPAR_TINY)
    bake_vocabulary(model, tokenizer, ["road", "sky"], templates="plain").save_pretrained(folder)
    AutoImageProcessor.from_pretrained(SPAR_TINY).save_pretrained(folder)
    return pipeline("image-segmentation", model=str(folder))


def image_of(mode):
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 48, 3)).astype(np.uint8))
    deep = np.linspace(0, 65535, 40 * 48).reshape(40, 48)
    if mode == "F":
        return Image.fromarray((deep / 65535).astype(np.float32))
    if mode == "I;16B":
        return Image.frombytes("I;16B", (48, 40), deep.astype(">u2").tobytes())
    if mode.startswith("I"):
        return Image.fromarray(deep.astype(np.uint16 if mode == "I;16" else np.int32))
    alpha = Image.fromarray(rng.integers(0, 256, (40, 48)).astype(np.uint8))
    if mode == "PA":  # from RGBA, Pillow 11 gives it no alpha
        image = rgb.convert("P").convert("PA")
        image.putalpha(alpha)
        return image
    if mode in ("RGBA", "LA", "RGBa"):
        rgba = rgb.convert("RGBA")
        rgba.putalpha(alpha)
        return rgba.convert(mode)
    name, _, transparent = mode.partition("+")
    image = rgb.convert(name)
    if transparent == "alphas":
        image.info["transparency"] = bytes(range(256))
    elif transparent:
        image.info["transparency"] = image.getpixel((0, 0))
    return image


def pixels(baked, image):
    there = baked.preprocess(image)["pixel_values"]
    return there, baked.image_processor(image, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB", "P+t", "L+t", "RGB+t"])
def test_the_same_pixels(baked, mode):
    image = image_of(mode)
    image.getexif()[0x0112] = 6  # orientation
    assert torch.equal(*pixels(baked, image))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "P+alphas", "I;16", "I;16B", "I", "F"])
def test_the_documented_exceptions(baked, mode):
    there, here = pixels(baked, image_of(mode))
    assert not torch.equal(there, here)


@pytest.mark.parametrize("image", [np.zeros((40, 48, 3), np.uint8), b"bytes"])
def test_inputs_that_transformers_refuses(baked, image):
    with pytest.raises((TypeError, ValueError)):
        baked.preprocess(image)
