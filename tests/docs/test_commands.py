"""
What the pages about exports and deployment say is run, in the order of their pages, on a small model. `NOT_RUN` counts the
blocks that are not, and why.
"""

import shutil

import numpy as np
import pytest
from doc_pages import blocks, reasons, run_page
from PIL import Image
from tiny_models import SHAPE, make_tokenizer, randomise, tiny_config
from transformers import SiglipVisionConfig

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor
from spar_hf.export import exporting, verification

# pages whose commands run in one folder, one page after another: what the first writes, the next one reads
GROUPS = (("export", "runtime"), ("deployment",), ("precision",))
PAGES = ("export", "runtime", "deployment", "precision", "serving")
NOT_RUN = {
    "runtime": {"needs npm's registry": 1, "tests/runtime opens the page": 1},
    "deployment": {"needs a GPU": 1, "needs Docker": 1},
    "precision": {"tests/distillation trains": 1},
    "serving": {"tests/serving runs it": 4, "needs Docker": 1},
}
# What runs in place of what is written: small models, few repeats, compiling as far as a graph, and words in place of a text
# tower where another command exports one.
SUBSTITUTES = (
    (r"(--suite deploy)", r"\1 --tiny --repeats 1 --threads 1 --models spar-tiny --sizes 48x64 --paths 'eager fp32'"),
    (r"compile_model\((\S+)\)", r'compile_model(\1, backend="eager")'),
    (r"--head logits --dtype \S+", "--head logits --words @classes.txt"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved two-tower model with one block, which is traced faster than two."""
    folder = tmp_path_factory.mktemp("model")
    vision = SiglipVisionConfig(image_size=64, **{**SHAPE, "num_hidden_layers": 1})
    randomise(SparForOpenVocabSegmentation(tiny_config(backbone_config=vision))).save_pretrained(folder)
    SparProcessor(SparImageProcessorPil(size={"shortest_edge": 80}), make_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, model, monkeypatch):
    """What the pages expect: a model, images, words."""
    shutil.copytree(model, tmp_path / "my-model")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC)
    for name in ("street.jpg", "street.png", "a.jpg", "b.jpg"):
        image.save(tmp_path / name)
    (tmp_path / "classes.txt").write_text("road\ncar, automobile\nsky\n")
    monkeypatch.chdir(tmp_path)
    # how exports agree with PyTorch is tested with them; one size is enough here
    monkeypatch.setattr(exporting, "cases", lambda source: verification.cases(source)[:1])


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_commands(group, folder, monkeypatch):
    for page in group:
        written = [block for block in blocks(f"docs/{page}") if block.why is None]
        assert run_page(f"docs/{page}", monkeypatch, SUBSTITUTES) == len(written) > 0


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_is_known(page):
    assert reasons(f"docs/{page}") == NOT_RUN.get(page, {})
