"""Peak memory on a CPU, of one piece of work and of the images of a measurement."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import randomise, tiny_config

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil
from spar_hf.evaluation import EvaluationOptions, evaluate_runs
from spar_hf.utils.devices import PeakMemory

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc"
)


def test_peak_memory_of_work_on_a_cpu():
    for megabytes in (200, 60):  # the smaller one after the larger: memory that was freed is not used unseen
        with PeakMemory(torch.device("cpu")) as peak:
            torch.ones(megabytes * 2**18).exp_()
        assert peak.bytes == pytest.approx(megabytes * 2**20, rel=0.1)


@pytest.mark.parametrize(
    ("sizes", "resize"),
    [(((64, 128), (704, 704)), {"native": True}), (((300, 300), (16, 200)), {"shortest_edge": 192})],
    ids=["pixels", "shape"],
)
def test_peak_memory_of_images_is_that_of_the_largest(sizes, resize, tokenizer, tmp_path):
    """The second image makes the larger working image, by its pixels or by its shape; it alone is measured too."""
    model = tmp_path / "model"
    randomise(SparForOpenVocabSegmentation(tiny_config(templates="plain"))).save_pretrained(model)
    tokenizer.save_pretrained(model)
    SparImageProcessorPil().save_pretrained(model)
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    (tmp_path / "set" / "classes.txt").write_text("road\nsky\n")
    for i, (height, width) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "set" / "images" / f"a{i}.png")
        Image.new("L", (width, height)).save(tmp_path / "set" / "masks" / f"a{i}.png")

    def peak(**chosen):
        given = {"dataset": str(tmp_path / "set"), "model": [str(model)], "boundary": False}
        options = EvaluationOptions.from_flat(**given, **resize, **chosen)
        return evaluate_runs(options)["runs"][0]["peak_memory_bytes"]

    small, large, both = peak(include=["a0"]), peak(include=["a1"]), peak()
    assert small < 0.5 * large
    assert 0.6 * large < both < 1.6 * large  # what the allocator keeps differs from run to run
    assert peak(warmup=False) is None
