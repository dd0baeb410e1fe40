"""The modules that are traced: dense features or logits of images, and embeddings of texts."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from spar_hf.export.sources import Source, Words

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
READOUT_PARTS = ("head", "text_head", "visual_projection")  # of backbones, after their last norm
MAX_SIDE = 16_384  # pixels; the bound that a traced graph states for height and width


class DenseGraph(nn.Module):
    """
    Dense features or logits of images.

    Args:
        source: the model.
        logits: whether to compute logits; else the features.
        words: names whose embeddings become part of the graph; without, they are an input.
        dtype: `fp16` and `bf16` run the transformer blocks in half precision, and the last norm, the read-out and the
            cosine in float32.

    The output is a dict of `feature_map` `(batch, dim, rows, columns)` or `logits` `(batch, names, rows, columns)`, float32.
    """

    embeddings: torch.Tensor | None

    def __init__(self, source: Source, logits: bool, words: Words | None = None, dtype: str = "fp32"):
        super().__init__()
        # transformers' exporters give the inputs the dtype of the first parameter: pixels and embeddings stay float32
        self.inputs_are_float32 = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.model = source.model
        self.vision_model = source.vision_model if dtype not in TYPES else in_half(source.vision_model, TYPES[dtype])
        self.logits, self.has_classes = logits, source.has_classes
        embeddings = None if words is None or not logits else words.embeddings
        self.register_buffer("embeddings", embeddings, persistent=embeddings is not None)

    def forward(self, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        feature_map = self.vision_model(pixel_values, return_dict=True).feature_map.float()
        if not self.logits:
            return {"feature_map": feature_map}
        if self.has_classes:
            features = feature_map.permute(0, 2, 3, 1)  # (batch, dim, h, w) -> (batch, h, w, dim)
            if self.model.config.normalize_features:
                features = nn.functional.normalize(features, dim=-1)
            return {"logits": self.model.classify(features).permute(0, 3, 1, 2)}
        text_embeds = self.embeddings if text_embeds is None else text_embeds
        return {"logits": self.model.dense_logits(feature_map, text_embeds)}

    def example(self, batch: int = 2) -> dict[str, torch.Tensor]:
        """Inputs to trace with. No side, number of names or batch equals another, or the graph would take them for one."""
        patch, generator = self.vision_model.config.patch_size, torch.Generator().manual_seed(0)
        size = (3 * patch + 1, 5 * patch - 2)
        inputs = {"pixel_values": torch.randn(batch, 3, *size, generator=generator)}
        if self.logits and not self.has_classes and self.embeddings is None:
            embeddings = torch.randn(7, self.vision_model.config.projection_dim, generator=generator)
            inputs["text_embeds"] = nn.functional.normalize(embeddings, dim=-1)
        return inputs

    def dynamic_shapes(
        self, max_side: int = MAX_SIDE, max_batch: int = 1024, max_names: int = 100_000
    ) -> dict[str, Any]:
        """Which axes of the inputs may have any size."""
        # torch takes a size of 1 for a constant, so images have more than one patch per axis where its guards are kept
        side = {"min": self.vision_model.config.patch_size + 1, "max": max_side}
        shapes = {
            "pixel_values": {0: Dim("batch", min=1, max=max_batch), 2: Dim("height", **side), 3: Dim("width", **side)},
            "text_embeds": {0: Dim("names", min=1, max=max_names)},
        }
        return {name: shapes[name] for name in self.example()}


class TextGraph(nn.Module):
    """Embeddings of tokenised texts: `(names, tokens)` int64 -> `text_embeds` `(names, dim)`, normalised."""

    def __init__(self, source: Source):
        super().__init__()
        self.model = source.model

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        embeddings = self.model.get_text_features(input_ids, return_dict=True).pooler_output
        return {"text_embeds": nn.functional.normalize(embeddings.float(), dim=-1)}

    def example(self) -> dict[str, torch.Tensor]:
        """Inputs to trace with: three texts that end in padding, as tokenisers make them."""
        config = self.model.config.text_config
        ids = torch.randint(3, config.vocab_size - 2, (3, config.max_position_embeddings))
        ids[:, -1] = config.eos_token_id if config.eos_token_id is not None else ids[:, -1]
        return {"input_ids": ids}

    def dynamic_shapes(self) -> dict[str, Any]:
        """Which axes of the inputs may have any size."""
        return {"input_ids": {0: Dim("names", min=1, max=100_000)}}


def in_half(vision_model: Any, dtype: torch.dtype) -> Any:
    """
    A copy whose embeddings and blocks are in half precision, and the rest from the last norm on in float32: at many pixels
    the best names have nearly the same cosine.
    """
    half = copy.deepcopy(vision_model)
    backbone = half.backbone
    kept = tuple(f"{part}." for part in (backbone.last_norm, *READOUT_PARTS))
    for name, parameter in backbone.named_parameters():  # not buffers: RoPE's frequencies stay in float32
        if not name.startswith(kept):
            parameter.data = parameter.data.to(dtype)
    last_norm = backbone.get_submodule(backbone.last_norm)
    last_norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    if hasattr(backbone, "rope"):
        rope = backbone.rope
        backbone.rope = lambda *args: tuple(part.to(dtype) for part in rope(*args))  # the dtype of queries and keys
    return half


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress, the warnings of experimental versions and the notes on unused parts of torch."""
    disabled = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
