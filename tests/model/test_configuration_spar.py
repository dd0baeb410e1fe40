"""SparConfig: defaults, refused values, and an exact round trip through JSON."""

import json

import pytest
from tiny_models import tiny_config
from transformers import AutoConfig, SiglipConfig, SiglipTextConfig, SiglipVisionConfig

from spar_hf import SparConfig, SparForOpenVocabSegmentation
from spar_hf.model.prompts import TEMPLATES

CONFIGS = {
    "two towers": {},
    "vision only": {"text_config": None},
    "everything set": {
        "readout": "siglip",
        "position_resampling": "bicubic",
        "position_extent": 128,
        "projection_dim": 32,
        "dense_logit_scale": 65,
        "templates": ["a photo of a {}.", "{}"],
        "distillation": {"teacher": "base", "window_size": 64, "stride": 24},
        "dtype": "float32",
    },
}


def through_dict(config, folder):
    return SparConfig.from_dict(config.to_dict())


def through_json(config, folder):
    return SparConfig.from_dict(json.loads(config.to_json_string()))


def through_folder(config, folder):
    config.save_pretrained(folder)
    back = AutoConfig.from_pretrained(folder)
    assert back.name_or_path == str(folder)
    back.name_or_path = ""  # where it lies is not part of it
    return back


def test_defaults_follow_from_the_backbone():
    config = SparConfig()
    assert isinstance(config.backbone_config, SiglipVisionConfig)
    assert config.text_config is None
    assert (config.readout, config.position_resampling) == ("siglip", "bicubic")
    assert config.projection_dim == config.hidden_size == config.backbone_config.hidden_size
    assert (config.patch_size, config.image_size, config.num_hidden_layers) == (16, 224, 12)
    assert config.dense_logit_scale == 40.0


@pytest.mark.parametrize("with_type", [True, False])
def test_dict_sub_configs_become_objects(with_type):
    def as_dict(config):
        return {k: v for k, v in config.to_dict().items() if with_type or k != "model_type"}

    tiny = tiny_config()
    config = SparConfig(backbone_config=as_dict(tiny.backbone_config), text_config=as_dict(tiny.text_config))
    assert isinstance(config.backbone_config, SiglipVisionConfig)
    assert isinstance(config.text_config, SiglipTextConfig)
    assert config.to_dict() == tiny.to_dict()


@pytest.mark.parametrize("way", [through_dict, through_json, through_folder])
@pytest.mark.parametrize("kwargs", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_is_exact(kwargs, way, tmp_path):
    config = tiny_config(**kwargs)
    back = way(config, tmp_path)
    assert type(back) is SparConfig
    assert type(back.text_config) is type(config.text_config)  # None stays None
    assert back.to_dict() == config.to_dict()


def test_tuple_of_templates_is_kept_as_json_gives_it_back():
    assert tiny_config(templates=TEMPLATES["short"]).templates == list(TEMPLATES["short"])


def test_making_saving_and_showing_a_config_logs_nothing(transformers_log, tmp_path):
    for kwargs in CONFIGS.values():
        config = tiny_config(**kwargs)
        config.save_pretrained(tmp_path)
        repr(config)
    assert transformers_log == []


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"backbone_config": {"model_type": "no such model"}}, "`backbone_config` of type 'no such model'"),
        ({"backbone_config": {"model_type": "vit"}}, "`backbone_config` of type 'vit'.*siglip_vision_model"),
        ({"backbone_config": SiglipConfig()}, "`backbone_config` of type 'siglip'"),
        ({"backbone_config": "google/siglip"}, "`backbone_config` must be a dict or a configuration"),
        ({"text_config": {"model_type": "bert"}}, "`text_config` of type 'bert'.*siglip_text_model"),
        ({"readout": "clip"}, "`readout` 'clip'.*siglip"),
        ({"position_resampling": "bilinear"}, "`position_resampling` 'bilinear'.*bicubic"),
        ({"position_extent": 100}, "`position_extent` 100.*multiple of the patch"),
        ({"position_extent": 48}, "at least the pre-training size .64"),
        ({"position_extent": 128.0}, "must be a number of pixels"),
        ({"position_extent": 128, "text_config": None, "backbone_config": {"model_type": "dinov3_vit"}}, "'rope'"),
        ({"projection_dim": 48}, "dense features have 32 dimensions"),
        (
            {"text_config": SiglipTextConfig(hidden_size=48, num_attention_heads=2)},
            r"ends in 48.*projection_size=32",
        ),
        ({"dense_logit_scale": 0}, "`dense_logit_scale`.*positive"),
        ({"dense_logit_scale": -40.0}, "`dense_logit_scale`.*positive"),
        ({"dense_logit_scale": float("nan")}, "`dense_logit_scale`.*positive"),
        ({"dense_logit_scale": float("inf")}, "`dense_logit_scale`.*positive"),
        ({"dense_logit_scale": "40"}, "`dense_logit_scale`.*positive"),
        ({"templates": "imagenet81"}, "imagenet80"),
        ({"templates": []}, "template"),
        ({"templates": ["an image"]}, "template"),
        ({"templates": ["a {} and a {}"]}, "template"),
    ],
)
def test_bad_values_are_refused_with_what_to_do(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**kwargs)


@pytest.mark.parametrize("scale", [-40.0, 0, float("nan")])
def test_a_scale_that_would_swap_classes_is_refused_at_loading_too(two_towers, tmp_path, scale):
    """`from_pretrained` sets such attributes after the configuration was checked."""
    two_towers.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`dense_logit_scale` must be a positive number"):
        SparForOpenVocabSegmentation.from_pretrained(tmp_path, dense_logit_scale=scale)
