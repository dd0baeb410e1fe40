"""The three configurations under transformers' `ConfigTester`, one test per check."""

import json
import unittest

from testers import ModelTester, OpenVocabTester, SemanticTester, UniversalTester
from transformers_tests.test_configuration_common import ConfigTester

from spar_hf import SparConfig, SparSemanticConfig, SparUniversalConfig


class Case:
    """The checks of `ConfigTester.run_common_tests`."""

    config_class: type
    common_properties: list[str] = []
    arguments: dict = {}

    def setUp(self):
        self.config_tester = ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality=False,
            common_properties=list(self.common_properties),
            **self.arguments,
        )


def as_json(config) -> dict:
    """A part of a configuration as it stands in config.json."""
    fields = json.loads(json.dumps(config.to_dict()))
    del fields["transformers_version"]
    return fields


def add_check(name: str):
    def test(self):
        getattr(self.config_tester, name)()

    setattr(Case, f"test_{name.removeprefix('create_and_test_').removeprefix('check_')}", test)


for check in dir(ConfigTester):
    if check.startswith(("create_and_test_", "check_")):
        add_check(check)


class SparConfig_vision(Case, unittest.TestCase):
    config_class = SparConfig
    common_properties = ["hidden_size", "num_hidden_layers", "patch_size", "image_size"]
    arguments = {"dense_logit_scale": 20.0, "templates": "short"}
    model_tester = ModelTester("siglip")


class SparConfig_two_towers(Case, unittest.TestCase):
    config_class = SparConfig
    model_tester = OpenVocabTester("siglip")
    common_properties = ["hidden_size", "num_hidden_layers", "patch_size", "image_size"]
    arguments = {
        "backbone_config": as_json(model_tester.get_config().backbone_config),
        "text_config": as_json(model_tester.get_config().text_config),
    }


class SparSemanticConfig_(Case, unittest.TestCase):
    config_class = SparSemanticConfig
    model_tester = SemanticTester("siglip")
    common_properties = ["patch_size"]
    arguments = {"normalize_features": True}


class SparUniversalConfig_(Case, unittest.TestCase):
    config_class = SparUniversalConfig
    model_tester = UniversalTester("siglip")
    common_properties = ["hidden_size", "num_attention_heads"]
    arguments = {"num_queries": 7, "hidden_dim": 32}
