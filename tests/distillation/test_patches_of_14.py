"""TIPSv2, whose patches have 14 pixels, from a teacher to a student that is measured."""

import json

import numpy as np
import pytest
import torch
from distilling import distil
from PIL import Image
from tiny_models import BLOCKS, SHAPE, make_tokenizer, randomise
from transformers import AutoConfig, Tipsv2Config, Tipsv2Model, pipeline

from spar_hf import SparForOpenVocabSegmentation
from spar_hf.distillation.cache_teacher import CacheOptions, make_cache
from spar_hf.evaluation import EvaluationOptions, evaluate_runs


@pytest.fixture
def tipsv2_folder(tmp_path):
    """A model of transformers as it lies on the hub: weights, tokenizer, image processor."""
    folder = tmp_path / "tipsv2"
    text = SHAPE | {"vocab_size": 64, "max_position_embeddings": 16}
    torch.manual_seed(0)
    config = Tipsv2Config(vision_config=BLOCKS | {"image_size": 56, "patch_size": 14}, text_config=text)
    randomise(Tipsv2Model(config)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "do_rescale": True}))
    return folder


def test_teacher_cache_student_and_masks(tipsv2_folder, image_folder, tmp_path):
    options = ("--steps", 3, "--train_layers", "all", "--report_to", "none")
    student = distil(tipsv2_folder, image_folder, tmp_path / "run", *options)
    record = AutoConfig.from_pretrained(student).distillation
    assert (record["stride"], record["window_size"]) == (21, 56)  # one and a half patches, the pre-training size
    assert np.isfinite(record["held_out"]["after"]["mse"])
    assert "stride: 21" in (tmp_path / "run" / "recipe.yaml").read_text()

    named = {"model": str(tipsv2_folder), "images": [str(image_folder)], "output": str(tmp_path / "cache")}
    cache = make_cache(CacheOptions.from_flat(**named, mixed_precision="no", holdout_every=3))
    assert (cache.setting["stride"], cache.setting["window_size"]) == (21, 56)
    cached = ("--teacher_mode", "cached", "--teacher_cache", tmp_path / "cache")
    again = distil(tipsv2_folder, image_folder, tmp_path / "again", *options, *cached)
    assert AutoConfig.from_pretrained(again).distillation["stride"] == 21

    segment = pipeline("open-vocab-segmentation", model=str(student))
    with Image.open(image_folder / "0.jpg") as image:
        labels = segment(image, candidate_labels=["road", "sky"], output="map")["map"]
    assert np.asarray(labels).shape == (110, 150)
    model = SparForOpenVocabSegmentation.from_pretrained(student)
    assert model(torch.zeros(1, 3, 110, 150), text_embeds=torch.ones(2, 32)).logits.shape == (1, 2, 8, 11)


def test_both_are_measured(tipsv2_folder, tmp_path):
    folder, rng = tmp_path / "set", np.random.default_rng(0)
    for part, levels in (("images", 256), ("masks", 2)):
        (folder / part).mkdir(parents=True)
        for i, (height, width) in enumerate([(70, 101), (47, 90)]):
            noise = rng.integers(0, levels, (5, 6, 3) if part == "images" else (5, 6), dtype=np.uint8)
            Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST).save(folder / part / f"{i}.png")
    (folder / "classes.txt").write_text("road\nsky\n")
    runs = {"model": [str(tipsv2_folder)], "runs": ["tipsv2:single", "tipsv2:sliding:21"]}
    report = evaluate_runs(EvaluationOptions.from_flat(dataset=str(folder), shortest_edge=98, **runs))
    assert [row["inference"] for row in report["runs"]] == ["single pass", "sliding, stride 21"]
    assert all(0 <= row["mean_iou"] <= 1 for row in report["runs"])
