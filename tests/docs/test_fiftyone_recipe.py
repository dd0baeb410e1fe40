"""
The recipe of a FiftyOne zoo source, with a stand-in: FiftyOne brings a database of its own. The stand-in does with a source
what its documentation of remotely-sourced models says, and calls a model as `apply_model` does.
"""

import importlib.util
import json
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from doc_pages import blocks, page_text
from PIL import Image
from transformers import pipeline

SOURCE = "https://github.com/me/spar"


class Model:
    """As in FiftyOne, what a model must have is there and raises."""

    def __getattr__(self, name):
        raise NotImplementedError(f"subclasses must implement {name}")


class Segmentation:
    def __init__(self, *, mask):
        assert mask.dtype == np.uint8 and mask.ndim == 2
        self.mask = mask


class Dataset:
    """Images of a folder, and what a model says of each."""

    def __init__(self, folder):
        self.samples = {path.name: {"filepath": path} for path in sorted(folder.iterdir())}

    def apply_model(self, model, label_field):
        assert model.media_type == "image" and model.ragged_batches and model.transforms is None
        model.preprocess = False
        for sample in self.samples.values():
            with Image.open(sample["filepath"]) as image:
                sample[label_field] = model.predict(np.array(image.convert("RGB")))

    def save(self):
        self.saved = True


class Zoo(ModuleType):
    """Sources by their address, and the folders that they would be downloaded to."""

    def __init__(self, folders):
        super().__init__("fiftyone.zoo")
        self.folders, self.registered = folders, {}

    def register_zoo_model_source(self, address):
        manifest = json.loads((self.folders[address] / "manifest.json").read_text())
        assert manifest["name"]
        for model in manifest["models"]:
            assert (
                "manager" not in model and "default_deployment_config_dict" not in model
            )  # else other functions are called
            self.registered[model["base_name"]] = self.folders[address] / "__init__.py", model.get("base_filename")

    def load_zoo_model(self, name, **options):
        file, model_path = self.registered[name]
        spec = importlib.util.spec_from_file_location("zoo_source", file)
        source = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(source)
        source.download_model(name, model_path)
        return source.load_model(name, model_path, **options)


@pytest.fixture
def fiftyone(tmp_path, image_folder, monkeypatch):
    """The package `fiftyone` with the source of the page, and its data sets."""
    source, datasets = tmp_path / "source", []
    source.mkdir()
    loading, _ = recipe()
    (source / "__init__.py").write_text(loading, encoding="utf-8")
    manifest = re.search(r"```text\n(\{.*?\})\n```", page_text("docs/recipes"), re.DOTALL)[1]
    (source / "manifest.json").write_text(manifest, encoding="utf-8")
    package, core, models = ModuleType("fiftyone"), ModuleType("fiftyone.core"), ModuleType("fiftyone.core.models")
    package.zoo = Zoo({SOURCE: source})
    package.Segmentation, models.Model = Segmentation, Model

    def from_images_dir(name):
        assert name == "photos"
        datasets.append(Dataset(image_folder))
        return datasets[-1]

    package.Dataset = SimpleNamespace(from_images_dir=from_images_dir)
    modules = {"fiftyone": package, "fiftyone.zoo": package.zoo, "fiftyone.core": core, "fiftyone.core.models": models}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return datasets


def recipe():
    """Its two programmes: the source, and its use."""
    loading, using = (block.text for block in blocks("docs/recipes") if block.recipe == "fiftyone")
    return loading, using


def test_a_source_of_the_zoo(fiftyone, base_folder):
    _, using = recipe()
    using = using.replace("classes=words", f"classes=words, model={str(base_folder)!r}")
    exec(compile(using, "recipes.md", "exec"), {})
    (dataset,) = fiftyone
    assert dataset.saved and dataset.default_mask_targets == {1: "road", 2: "car, automobile", 3: "sky"}
    segment = pipeline("open-vocab-segmentation", model=str(base_folder))
    words, seen = list(dataset.default_mask_targets.values()), set()
    for sample in dataset.samples.values():
        mask = sample["spar"].mask
        found = segment(str(sample["filepath"]), candidate_labels=words, background="auto")
        expected = np.zeros_like(mask)
        for one in found:
            expected[np.array(one["mask"]) > 0] = 1 + ["road", "car", "sky"].index(one["label"])
        np.testing.assert_array_equal(mask, expected)
        seen |= set(np.unique(mask))
    assert len(seen) > 1
