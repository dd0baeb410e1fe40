"""What an installed package must contain and keep quiet about."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

import spar_hf

ROOT = Path(__file__).parents[1]


def test_import_is_quiet_and_repeatable():
    code = "import spar_hf, importlib; importlib.reload(spar_hf); importlib.reload(spar_hf.model.pipeline)"
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_import_pulls_in_no_training_dependency():
    code = "import sys; from spar_hf import *; print(*{'evaluate', 'matplotlib', 'datasets'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_everything_public_is_there():
    for name in spar_hf.__all__:
        assert getattr(spar_hf, name) is not None
    assert importlib.metadata.version("spar-hf") == spar_hf.__version__
    assert set(spar_hf.__all__) <= set(dir(spar_hf))
    with pytest.raises(AttributeError, match="SparNothing"):
        spar_hf.SparNothing  # noqa: B018


def test_import_loads_neither_torch_nor_transformers():
    code = """
import sys, spar_hf
assert not {"torch", "transformers"} & set(sys.modules)
assert "SparVisionModel" in dir(spar_hf)
from spar_hf import *
assert SparVisionModel is spar_hf.SparVisionModel and spar_hf.model.pipeline.OpenVocabSegmentationPipeline
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


IMPORTS = {
    "spar_hf first": "import spar_hf\nfrom transformers import {name}",
    "transformers first": "from transformers import {name}\nimport spar_hf",
    "its pipeline first": "from spar_hf import OpenVocabSegmentationPipeline\nfrom transformers import {name}",
    "a model first": "import transformers.models.mask2former.modeling_mask2former, spar_hf\nfrom transformers import {name}",
}
USES = {
    "AutoConfig": "AutoConfig.from_pretrained(TINY).model_type == 'spar'",
    "AutoModel": "type(AutoModel.from_pretrained(TINY)).__name__ == 'SparVisionModel'",
    "AutoBackbone": "AutoBackbone.from_config(spar_hf.SparConfig.from_pretrained(TINY)).channels == [192]",
    "AutoImageProcessor": "type(AutoImageProcessor.from_pretrained(TINY)).__name__ == 'SparImageProcessorPil'",
    "AutoProcessor": "type(AutoProcessor.from_pretrained(TINY)).__name__ == 'SparProcessor'",
    "pipeline": "pipeline('open-vocab-segmentation')(image, candidate_labels=['sky'])[0]['label'] == 'sky'",
    "pipeline of a baked model": "pipeline('image-segmentation', model=sys.argv[1])(image)[0]['label'] == 'sky'",
}
# each use in a process of its own, forked where torch and transformers are imported already, to be quick
FORK = """
import json, os, sys, torch, transformers
from PIL import Image
image, failed = Image.new("RGB", (40, 30)), []
for name, code in json.loads(sys.argv[2]).items():
    if child := os.fork():
        failed += [name] if os.waitpid(child, 0)[1] else []
    else:
        try:
            exec(code)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
print(json.dumps(failed))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_auto_classes_and_pipelines_know_the_models_in_any_order_of_imports(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(spar_hf.SPAR_TINY)
    model = spar_hf.SparForOpenVocabSegmentation.from_pretrained(spar_hf.SPAR_TINY)
    spar_hf.bake_vocabulary(model, tokenizer, ["sky"], templates="plain").save_pretrained(tmp_path)
    spar_hf.SparImageProcessorPil().save_pretrained(tmp_path)
    codes = {}
    for order, imports in IMPORTS.items():
        for use, check in USES.items():
            if order in ("its pipeline first", "a model first") and use not in ("AutoModel", "pipeline"):
                continue  # to be quick
            start = imports.format(name=use.split()[0])
            codes[f"{use}, {order}"] = f"{start}\nimport spar_hf\nTINY = spar_hf.SPAR_TINY\nassert {check}"
    command = [sys.executable, "-c", FORK, str(tmp_path), json.dumps(codes)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and json.loads(run.stdout) == [], run.stdout + run.stderr
    assert "not supported" not in run.stderr


def test_wheel_contains_the_embedded_model_with_its_licence(tmp_path):
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    if "No module named 'setuptools'" in run.stderr + run.stdout:
        pytest.skip("setuptools is not installed, so no wheel can be built offline")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        size = sum(wheel.getinfo(name).file_size for name in names if "assets/" in name)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "LICENSE", "base/model.safetensors"):
        assert f"spar_hf/assets/spar-tiny/{name}" in names
    assert "spar_hf/py.typed" in names
    assert size <= 25 * 2**20


def test_the_citation_names_the_paper():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["license"] == "Apache-2.0" and "version" not in found  # the version has one place
    paper = found["preferred-citation"]
    assert "arXiv:2604.02252" in [one["value"] for one in paper["identifiers"]] and len(paper["authors"]) == 4
