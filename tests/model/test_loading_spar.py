"""Saving and loading: no tower is lost or newly initialised, weight names are stable, a fresh process gives the same."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_models import attention_of, prompts, random_images, tiny_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    pipeline,
)

import spar_hf
from spar_hf import (
    SparConfig,
    SparForOpenVocabSegmentation,
    SparImageProcessorPil,
    SparPreTrainedModel,
    SparVisionModel,
)


def same_weights(model, other, prefix=""):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == {name.removeprefix(prefix) for name in theirs if name.startswith(prefix)}
    return all(torch.equal(tensor, theirs[prefix + name]) for name, tensor in ours.items())


def buffers_are_positions(model):
    buffers = dict(model.named_non_persistent_buffers())
    assert buffers
    return all(torch.equal(b, torch.arange(b.shape[1])[None]) for b in buffers.values())


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


NOTHING_AMISS = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def test_weight_names_are_a_contract(two_towers, vision_model):
    assert {name.split(".")[0] for name in two_towers.state_dict()} == {
        "vision_model",
        "text_model",
        "logit_scale",
        "logit_bias",
    }
    assert {name.split(".")[0] for name in vision_model.state_dict()} == {"backbone"}
    # below, the names are those of transformers' SigLIP towers
    config = two_towers.config
    assert SiglipVisionModel(config.backbone_config).state_dict().keys() == vision_model.backbone.state_dict().keys()
    assert SiglipTextModel(config.text_config).state_dict().keys() == two_towers.text_model.state_dict().keys()


def test_two_tower_folder_loads_exactly(two_towers, tmp_path, transformers_log):
    two_towers.save_pretrained(tmp_path)
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is SparForOpenVocabSegmentation
    assert info == NOTHING_AMISS
    assert same_weights(loaded, two_towers)
    assert buffers_are_positions(loaded)
    assert not loaded.training
    assert transformers_log == []


def test_pushing_while_saving_uploads_the_code_too(two_towers, tokenizer, tmp_path, monkeypatch):
    """The upload has all files of the folder. There is no network, so the calls are recorded."""
    sent, commits = {}, []

    class Hub:
        create_repo = staticmethod(lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
        create_branch = staticmethod(lambda **kwargs: None)

        @staticmethod
        def create_commit(repo_id, operations, **kwargs):
            commits.append((kwargs.get("create_pr"), kwargs.get("revision")))
            sent.setdefault(repo_id, set()).update(operation.path_in_repo for operation in operations)

    for module in ("utils.hub", "modeling_utils", "processing_utils"):
        monkeypatch.setattr(f"transformers.{module}.hf_api", Hub)
    for module in ("utils.hub", "modeling_utils"):
        monkeypatch.setattr(
            f"transformers.{module}.create_and_tag_model_card", lambda *args, **kwargs: ModelCard("card")
        )
    image_processor = SparImageProcessorPil()
    segment = pipeline(
        "open-vocab-segmentation", model=two_towers, tokenizer=tokenizer, image_processor=image_processor
    )
    segment.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="me/street")
    assert sent == {"me/street": {path.name for path in (tmp_path / "folder").iterdir()}}
    assert {"modeling_spar.py", "tokenizer.json", "processor_config.json"} < sent["me/street"]
    commits.clear()
    for where in ({"create_pr": True}, {"revision": "next"}):
        with pytest.raises(ValueError, match=r"push_to_hub\(repo_id, create_pr=True\)"):
            segment.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="me/street", **where)
        segment.push_to_hub("me/other", **where)
    assert commits == [(True, None), (False, "next")] and sent["me/other"] == sent["me/street"]


def test_vision_tower_of_a_two_tower_folder_can_be_saved_alone(two_towers, tmp_path, transformers_log):
    two_towers.save_pretrained(tmp_path / "both")
    vision, info = AutoModel.from_pretrained(tmp_path / "both", output_loading_info=True)
    assert type(vision) is SparVisionModel
    assert info == NOTHING_AMISS
    assert same_weights(vision, two_towers, "vision_model.")
    assert buffers_are_positions(vision)

    vision.save_pretrained(tmp_path / "vision")
    config = json.loads((tmp_path / "vision" / "config.json").read_text())
    assert config.get("text_config") is None
    assert config["architectures"] == ["SparVisionModel"]
    again, info = AutoModel.from_pretrained(tmp_path / "vision", output_loading_info=True)
    assert info == NOTHING_AMISS
    assert same_weights(again, vision)
    assert transformers_log == []


def test_making_a_vision_model_leaves_the_given_configuration_alone():
    config = tiny_config()
    assert SparVisionModel(config).config.text_config is None
    assert config.text_config is not None


@pytest.mark.parametrize("auto_class", [SparForOpenVocabSegmentation, AutoModelForSemanticSegmentation])
def test_two_towers_are_not_made_of_a_vision_folder(vision_model, tmp_path, auto_class):
    vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no text tower.*AutoModel"):
        auto_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "model_class, weight",
    [
        (SparVisionModel, "vision_model.backbone.encoder.layers.1.mlp.fc1.weight"),
        (SparForOpenVocabSegmentation, "vision_model.backbone.head.attention.in_proj_weight"),
        (SparForOpenVocabSegmentation, "text_model.head.weight"),
        (SparForOpenVocabSegmentation, "logit_scale"),
    ],
)
def test_missing_weights_are_an_error(two_towers, tmp_path, model_class, weight):
    two_towers.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop(weight))
    with pytest.raises(RuntimeError, match=rf"lacks 1 weights of {model_class.__name__}: .*{weight.split('.')[-1]}"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 300, 20_000])
def test_weights_that_were_not_copied_whole_are_an_error_of_the_file(two_towers, tmp_path, size):
    two_towers.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    for load in (
        SparForOpenVocabSegmentation.from_pretrained,
        AutoModel.from_pretrained,
        SparVisionModel.from_backbone,
    ):
        with pytest.raises(OSError, match=r"not copied whole .*again") as refused:
            load(tmp_path)
        assert str(tmp_path) in str(refused.value)


def test_vision_weights_beside_a_two_tower_configuration_are_an_error(two_towers, tmp_path):
    two_towers.vision_model.save_pretrained(tmp_path)
    two_towers.config.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"lacks .*text_model"):
        SparForOpenVocabSegmentation.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_an_error(two_towers, tmp_path):
    two_towers.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["backbone_config"].update(image_size=96))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModel.from_pretrained(tmp_path)


def test_text_weights_without_a_place_are_reported(two_towers, tmp_path, transformers_log):
    two_towers.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["text_config"].update(num_hidden_layers=1))
    _, info = SparForOpenVocabSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"]
    assert all(name.startswith("text_model.encoder.layers.1.") for name in info["unexpected_keys"])
    assert any("UNEXPECTED" in message for message in transformers_log)


class WithHead(SparPreTrainedModel):
    """A class that declares a new head loads a folder without one."""

    _keys_to_ignore_on_load_missing = [r"^head\."]

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = SparVisionModel._from_config(config)
        self.head = torch.nn.Linear(32, 5)
        self.post_init()


def test_a_new_head_may_be_missing_but_no_more(vision_model, tmp_path):
    vision_model.save_pretrained(tmp_path)
    assert same_weights(WithHead.from_pretrained(tmp_path).vision_model, vision_model)
    edit_weights(tmp_path, lambda weights: weights.pop("backbone.post_layernorm.weight"))
    with pytest.raises(RuntimeError, match="lacks 1 weights"):
        WithHead.from_pretrained(tmp_path)


def test_weights_stored_in_half_precision_load_as_the_configuration_says(two_towers, tmp_path):
    half = {name: tensor.half() for name, tensor in two_towers.state_dict().items()}
    two_towers.save_pretrained(tmp_path, state_dict=dict(half))  # a copy: it is emptied while it is written
    assert load_file(tmp_path / "model.safetensors")["logit_scale"].dtype == torch.float16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    for model in (AutoModel.from_pretrained(tmp_path), SparForOpenVocabSegmentation.from_pretrained(tmp_path)):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in model.state_dict().items())
    in_half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in in_half.parameters()} == {torch.bfloat16}
    assert buffers_are_positions(in_half)


def test_attention_implementation_reaches_both_towers_when_loading(two_towers, tmp_path):
    two_towers.save_pretrained(tmp_path)
    assert (
        attention_of(SparForOpenVocabSegmentation.from_pretrained(tmp_path, attn_implementation="eager"))
        == ["eager"] * 4
    )
    vision = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert vision.backbone.config._attn_implementation == "eager"


# --- registration, and fresh processes ---


def test_registration_is_quiet_and_can_be_repeated(two_towers, transformers_log, recwarn):
    for _ in range(2):
        importlib.reload(spar_hf)
    assert AutoConfig.for_model("spar").__class__ is spar_hf.SparConfig is SparConfig
    assert type(AutoModel.from_config(tiny_config())) is SparVisionModel
    assert type(AutoModelForSemanticSegmentation.from_config(tiny_config())) is SparForOpenVocabSegmentation
    assert transformers_log == []
    assert [str(w.message) for w in recwarn] == []


def test_the_default_model_is_loaded_quietly(transformers_log):
    assert pipeline("open-vocab-segmentation").model.config.model_type == "spar"
    assert transformers_log == []


def test_every_public_name_exists():
    for name in spar_hf.__all__:
        assert getattr(spar_hf, name) is not None
    assert spar_hf.__version__ == importlib.metadata.version("spar-hf")


FRESH_PROCESS = """
import sys, warnings
from transformers import AutoModel, pipeline
before = {name.split(".")[0] for name in sys.modules}
warnings.simplefilter("error")
import spar_hf
from spar_hf import *  # all names are loaded when first used
after = {name.split(".")[0] for name in sys.modules}

import torch
from transformers import AutoModelForSemanticSegmentation
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
torch.set_num_threads(1)
folder, vision_folder, inputs, results = sys.argv[1:]
inputs = torch.load(inputs, weights_only=True)
with torch.no_grad():
    vision = AutoModel.from_pretrained(folder)
    again = AutoModel.from_pretrained(vision_folder)
    two_towers = AutoModelForSemanticSegmentation.from_pretrained(folder)
    torch.save(
        {
            "classes": [type(model).__name__ for model in (vision, again, two_towers)],
            "feature_map": vision(inputs["pixel_values"]).feature_map,
            "again": again(inputs["pixel_values"]).feature_map,
            "logits": two_towers(**inputs).logits,
            "imported": sorted(after - before),
        },
        results,
    )
"""


@torch.no_grad()
def test_fresh_process_loads_the_same_models_and_says_nothing(two_towers, tmp_path):
    two_towers.save_pretrained(tmp_path / "both")
    two_towers.vision_model.save_pretrained(tmp_path / "vision")
    inputs = {"pixel_values": random_images((67, 71)), "input_ids": prompts()}
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [tmp_path / name for name in ("both", "vision", "inputs.pt", "results.pt")]
    process = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")

    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert results["classes"] == ["SparVisionModel", "SparVisionModel", "SparForOpenVocabSegmentation"]
    expected = two_towers(**inputs)
    assert torch.equal(results["feature_map"], expected.feature_map)
    assert torch.equal(results["again"], expected.feature_map)
    assert torch.equal(results["logits"], expected.logits)
    # the package itself costs next to nothing beyond transformers: no training or demo package comes along
    heavy = {
        "accelerate",
        "datasets",
        "evaluate",
        "matplotlib",
        "pandas",
        "rich",
        "scipy",
        "skimage",
        "sklearn",
        "typer",
    }
    assert heavy.isdisjoint(results["imported"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_weights_that_are_not_finite_are_refused_by_name(two_towers, tmp_path, tower, value):
    two_towers.save_pretrained(tmp_path)
    spoiled = next(
        name for name in two_towers.state_dict() if name.startswith(tower) and name.endswith("q_proj.weight")
    )

    def spoil(weights):
        weights[spoiled].view(-1)[-1] = value

    edit_weights(tmp_path, spoil)
    with pytest.raises(ValueError, match=re.escape(spoiled)):
        SparForOpenVocabSegmentation.from_pretrained(tmp_path)
    if tower == "vision_model":
        with pytest.raises(ValueError, match="1 of"):
            AutoModel.from_pretrained(tmp_path)
    else:  # this tower is not loaded
        AutoModel.from_pretrained(tmp_path)


def test_a_backbone_of_transformers_with_nan_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=16))
    name = next(name for name in backbone.state_dict() if name.endswith("patch_embedding.bias"))
    backbone.state_dict()[name][3] = float("nan")
    backbone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"patch_embedding\.bias"):
        SparVisionModel.from_backbone(str(tmp_path))
