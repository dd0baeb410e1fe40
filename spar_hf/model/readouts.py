"""
The read-outs of SigLIP and DINOv3, and the table of all. What a read-out is, is in `readout_base.py`.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers import initialization as init
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer, DINOv3ViTRopePositionEmbedding

from .execution import own_weights
from .positions import resample_positions
from .readout_base import Readout
from .readout_clip import MaskClipReadout, MetaClip2Readout
from .readout_dinov2 import Dinov2Readout
from .readout_radio import RadioReadout, RadioTextReadout
from .readout_tipsv2 import Tipsv2Readout


def pool_each(head: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply SigLIP's attention-pooling head without its attention to every token: `(batch, tokens, hidden)`, shape kept."""
    with own_weights(head.attention):
        value_weight = head.attention.in_proj_weight.chunk(3)[2]  # rows are query, key, value
        value_bias = head.attention.in_proj_bias.chunk(3)[2]
        values = nn.functional.linear(hidden_states.to(value_weight.device), value_weight, value_bias)
    values = head.attention.out_proj(values)
    return values + head.mlp(head.layernorm(values))


def check_head(config: SiglipVisionConfig | Siglip2VisionConfig) -> None:
    """Raise `ValueError` for a backbone without its pooling head."""
    if not config.vision_use_head:
        raise ValueError(
            "The SigLIP read-out uses the attention-pooling head, which this backbone lacks. "
            "Use a checkpoint with `vision_use_head=True`."
        )


class PoolingHead(Readout):
    """Encoder and attention-pooling head shared by SigLIP's fixed-resolution and NaFlex models."""

    unused_parameters = ("head.probe",)
    last_norm = "post_layernorm"
    encoder: Any
    post_layernorm: Any
    head: Any

    def encode(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs):
        hidden_states = self.encoder(inputs_embeds=hidden_states, **kwargs).last_hidden_state
        last_hidden_state = self.post_layernorm(hidden_states)
        return last_hidden_state, pool_each(self.head, last_hidden_state), last_hidden_state

    def pool(self, pool_input: torch.Tensor) -> torch.Tensor:
        with own_weights(self.head.attention):  # torch's attention reads its output projection past its `forward`
            return self.head(pool_input)


class SiglipReadout(PoolingHead, SiglipVisionModel):
    """
    SigLIP and fixed-resolution SigLIP2: the attention-pooling head without its attention, applied to every patch.

    Source: SPAR section 3; `SiglipVisionModel` and `SiglipMultiheadAttentionPoolingHead` in transformers.

    Raises:
        ValueError: a backbone configured without its pooling head.
    """

    def __init__(self, config: SiglipVisionConfig):
        check_head(config)
        super().__init__(config)

    def embed(self, pixel_values: torch.Tensor, method: str, extent: int | None = None) -> torch.Tensor:
        patches = self.embeddings.patch_embedding(pixel_values)  # (batch, 3, H, W) -> (batch, hidden, h, w)
        height, width = patches.shape[-2:]
        with own_weights(self.embeddings.position_embedding):
            table = self.embeddings.position_embedding.weight
            positions = resample_positions(table, height, width, method, extent)
        return patches.flatten(2).transpose(1, 2) + positions  # (batch, h * w, hidden)


class NaflexReadout(PoolingHead, Siglip2VisionModel):
    """
    SigLIP2 NaFlex, pre-trained with native aspect ratios: the read-out of [`SiglipReadout`]. Images are not padded to a
    common number of patches, so there is no attention mask.

    Source: the baseline in SPAR's tables; `Siglip2VisionModel` in transformers.

    Raises:
        ValueError: a backbone configured without its pooling head.
    """

    def __init__(self, config: Siglip2VisionConfig):
        check_head(config)
        super().__init__(config)

    def embed(self, pixel_values: torch.Tensor, method: str, extent: int | None = None) -> torch.Tensor:
        size: Any = self.config.patch_size  # an int in all configurations that SparConfig accepts
        grid = (pixel_values.shape[-2] // size, pixel_values.shape[-1] // size)
        # (batch, 3, h * p, w * p) -> (batch, h * w, p * p * 3), channels last as in NaFlex
        patches = pixel_values.unflatten(3, (grid[1], size)).unflatten(2, (grid[0], size))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        with own_weights(self.embeddings.position_embedding):
            positions = resample_positions(self.embeddings.position_embedding.weight, *grid, method)
        return self.embeddings.patch_embedding(patches) + positions  # (batch, h * w, hidden)


class Dinov3Readout(Readout, DINOv3ViTModel):
    """
    DINOv3: the normalised patch tokens, without class and register tokens.

    The RoPE coordinates span the image from -1 to 1. They are never augmented, in training either: that would only add
    noise to the regression of a student onto its teacher. `config.rope_periods` of a checkpoint (the published ones are
    rounded to bfloat16) replace the computed ones.

    Source: SPAR section 3; `DINOv3ViTModel` in transformers.
    """

    unused_parameters = ("mask_token", "vision_head")
    unused_with_pooling = ("mask_token",)
    last_norm = "norm"

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layer

    def __init__(self, config: DINOv3ViTConfig):
        super().__init__(config)
        # a plain container of the same name: transformers renames the weights of old checkpoints below its own encoder
        # class, and would rename ours too
        container: Any = nn.Module()
        container.layer = self.model.layer
        self.model = container

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        periods = getattr(self.config, "rope_periods", None)
        if isinstance(module, DINOv3ViTRopePositionEmbedding) and periods is not None:
            init.copy_(module.inv_freq, 1 / torch.tensor(periods, dtype=torch.float32))

    def embed(self, pixel_values: torch.Tensor, method: str, extent: int | None = None) -> torch.Tensor:
        return self.embeddings(pixel_values)  # (batch, 1 + registers + h * w, hidden)

    def encode(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs):
        rope = self.rope(grid, hidden_states.device)
        # layer by layer: the encoder's forward would start another recording of hidden states
        for layer in self.model.layer:
            hidden_states = layer(hidden_states, position_embeddings=rope, **kwargs)
        last_hidden_state = self.norm(hidden_states)
        return last_hidden_state, last_hidden_state[:, 1 + self.config.num_register_tokens :], last_hidden_state

    def pool(self, pool_input: torch.Tensor) -> torch.Tensor:
        return pool_input[:, 0]

    def rope(self, grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `(h * w, head_dim)` of the patch centres; `DINOv3ViTRopePositionEmbedding` in eval mode."""
        rows, columns = (
            (torch.arange(length, device=device, dtype=torch.float32) + 0.5) / length * 2 - 1 for length in grid
        )
        centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (h * w, 2)
        frequencies = self.rope_embeddings.inv_freq.to(device, torch.float32)
        angles = 2 * math.pi * centres[:, :, None] * frequencies  # (h * w, 2, head_dim / 4)
        angles = angles.flatten(1).tile(2)
        dtype = self.norm.weight.dtype  # that of queries and keys; tokens may be in float32
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Dinov3TxtReadout(Dinov3Readout):
    """
    DINOv3.txt: dense features of [`Dinov3Readout`]. The vision head of dino.txt (two blocks with a gated MLP over all
    tokens, and a norm) makes the pooled image embedding `(batch, 2 * hidden)`: class token and mean of the patches.

    Source: dino.txt (Jose et al., 2025), SPAR section 3.
    """

    def __init__(self, config: DINOv3ViTConfig):
        super().__init__(config)
        head = copy.deepcopy(config)
        head.use_gated_mlp, head.mlp_bias, head.proj_bias, head.hidden_act = True, True, True, "silu"
        head.query_bias = head.key_bias = head.value_bias = False
        head.intermediate_size = math.ceil(int(8 * config.hidden_size / 3) / 64) * 64
        head.layer_norm_eps = 1e-5
        self.vision_head: Any = nn.ModuleDict(
            {
                "layer": nn.ModuleList([DINOv3ViTLayer(head) for _ in range(2)]),
                "norm": nn.LayerNorm(config.hidden_size, eps=head.layer_norm_eps),
            }
        )
        self.post_init()

    def pool(self, pool_input: torch.Tensor) -> torch.Tensor:
        width = self.config.hidden_size // self.config.num_attention_heads
        no_rope = (pool_input.new_zeros(0, width),) * 2  # the head has no position embedding
        for layer in self.vision_head["layer"]:
            pool_input = layer.forward(pool_input, position_embeddings=no_rope)  # not recorded among the hidden states
        tokens = self.vision_head["norm"](pool_input)
        return torch.cat([tokens[:, 0], tokens[:, 1 + self.config.num_register_tokens :].mean(1)], dim=-1)


READOUTS: dict[str, Any] = {
    "siglip": SiglipReadout,
    "naflex": NaflexReadout,
    "maskclip": MaskClipReadout,
    "metaclip2": MetaClip2Readout,
    "dinov3": Dinov3Readout,
    "dinov3txt": Dinov3TxtReadout,
    "tipsv2": Tipsv2Readout,
    "dinov2": Dinov2Readout,
    "radio": RadioReadout,
    "radiotext": RadioTextReadout,
}
