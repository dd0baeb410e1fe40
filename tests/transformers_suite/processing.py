"""Image processors under transformers' `ImageProcessingTestMixin`, the processor under its `ProcessorTesterMixin`."""

import unittest

import numpy as np
import torch
from testers import LABELS
from tiny_models import make_tokenizer
from transformers_tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)
from transformers_tests.test_processing_common import ProcessorTesterMixin

from spar_hf import (
    SparImageProcessorPil,
    SparProcessor,
    SparSemanticSegmenterOutput,
    SparUniversalImageProcessorPil,
    SparUniversalSegmentationOutput,
)

PATCH = 8


class Tester(ImageProcessingTester):
    """Images of different sizes become squares, so that they can be stacked."""

    image_processor_class: type

    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 32, "width": 40})
        kwargs.setdefault("image_mean", [0.5, 0.4, 0.3])
        kwargs.setdefault("image_std", [0.3, 0.4, 0.5])
        super().__init__(parent, **kwargs)
        self.num_labels = len(LABELS)

    def _get_image_processing_classes(self):
        return {"pil": self.image_processor_class}


class SemanticOutputs(Tester):
    image_processor_class = SparImageProcessorPil

    def prepare_post_process_semantic_segmentation_inputs(self):
        height, width = self.size["height"], self.size["width"]
        outputs = SparSemanticSegmenterOutput(
            logits=torch.randn(self.batch_size, self.num_labels, height // PATCH, width // PATCH),
            geometry=torch.tensor([[height, width, PATCH]]).expand(self.batch_size, -1),
        )
        return {"outputs": outputs}, {"num_labels": self.num_labels, "height": height, "width": width}


class UniversalOutputs(Tester):
    image_processor_class = SparUniversalImageProcessorPil

    def prepare_post_process_semantic_segmentation_inputs(self):
        height, width = 4 * self.size["height"] // PATCH, 4 * self.size["width"] // PATCH  # cells of the masks
        outputs = SparUniversalSegmentationOutput(
            class_queries_logits=torch.randn(self.batch_size, 7, self.num_labels + 1),
            masks_queries_logits=torch.randn(self.batch_size, 7, height, width),
            mask_sizes=torch.tensor([[height, width]]).expand(self.batch_size, -1),
        )
        return {"outputs": outputs}, {"num_labels": self.num_labels, "height": height, "width": width}


class Images(ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin):
    test_cast_dtype = True

    def setUp(self):
        np.random.seed(0)
        torch.manual_seed(0)
        super().setUp()


class ImageProcessor(Images, unittest.TestCase):
    image_processor_tester_class = SemanticOutputs


class UniversalImageProcessor(Images, unittest.TestCase):
    image_processor_tester_class = UniversalOutputs


class Processor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = SparProcessor

    @classmethod
    def _setup_image_processor(cls):
        return SparImageProcessorPil(size={"height": 32, "width": 40})

    @classmethod
    def _setup_tokenizer(cls):
        return make_tokenizer()
