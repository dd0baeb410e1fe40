"""All models under transformers' `ModelTesterMixin`, and the backbone under its `BackboneTesterMixin` too."""

import copy
import unittest
from collections.abc import Callable
from unittest.mock import patch

import torch
from testers import (
    READOUTS,
    TEXTS,
    BackboneTester,
    ModelTester,
    OpenVocabTester,
    SemanticTester,
    UniversalTester,
)
from transformers import PreTrainedModel
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin

from spar_hf import (
    SparBackbone,
    SparConfig,
    SparForOpenVocabSegmentation,
    SparForSemanticSegmentation,
    SparForUniversalSegmentation,
    SparPreTrainedModel,
    SparSemanticModel,
    SparVisionModel,
)


class Case(ModelTesterMixin):
    """What is said of all models."""

    make_tester: Callable[[], ModelTester]
    # is otherwise tested only where a copyright line of 2023 or later heads the configuration's file
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False  # none of the models has a head over its vocabulary

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = self.make_tester()

    # Loading refuses missing weights, see `refusals.py`. With the loading of transformers, both tests must pass.
    @patch.object(SparPreTrainedModel, "from_pretrained", classmethod(PreTrainedModel.from_pretrained.__func__))
    def test_can_init_all_missing_weights_once_accepted(self):
        self.test_can_init_all_missing_weights()

    @patch.object(SparPreTrainedModel, "from_pretrained", classmethod(PreTrainedModel.from_pretrained.__func__))
    def test_model_weights_reload_no_missing_tied_weights_once_accepted(self):
        self.test_model_weights_reload_no_missing_tied_weights()

    def test_model_get_set_embeddings(self):
        """As transformers has it for vision models, whose input embedding is the layer that embeds patches."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            embedding = model.get_input_embeddings()
            self.assertIsInstance(embedding, torch.nn.Module)
            other = copy.deepcopy(embedding)
            model.set_input_embeddings(other)
            self.assertIs(model.get_input_embeddings(), other)
            self.assertIsNone(model.get_output_embeddings())


class BackboneCase(BackboneTesterMixin, Case):
    config_class = SparConfig


class OpenVocabCase(Case):
    _is_composite = True
    additional_model_inputs = ["input_ids"]
    test_model_get_set_embeddings = ModelTesterMixin.test_model_get_set_embeddings  # those of words


class UniversalCase(Case):
    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        # Mask2Former's loss is taken at random points: not where two calls are compared
        training = return_labels and self._testMethodName.startswith("test_training")
        return {**inputs, **self.model_tester.get_labels()} if training else inputs


KINDS = (
    (SparVisionModel, Case, ModelTester, READOUTS),
    (SparBackbone, BackboneCase, BackboneTester, READOUTS),
    (SparForOpenVocabSegmentation, OpenVocabCase, OpenVocabTester, tuple(TEXTS)),
    (SparForSemanticSegmentation, Case, SemanticTester, READOUTS),
    (SparSemanticModel, Case, SemanticTester, ("siglip",)),
    (SparForUniversalSegmentation, UniversalCase, UniversalTester, READOUTS),
)
for model_class, case, tester, readouts in KINDS:
    for readout in readouts:
        name = f"{model_class.__name__}_{readout}"
        attributes = {
            "__module__": __name__,
            "all_model_classes": (model_class,),
            "make_tester": staticmethod(lambda tester=tester, readout=readout: tester(readout)),
        }
        globals()[name] = type(name, (case, unittest.TestCase), attributes)
