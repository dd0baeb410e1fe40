"""CLIP and MetaCLIP 2, whose modules have the same names: the value path of MaskCLIP."""

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, MetaClip2VisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2EncoderLayer

from .execution import own_weights
from .positions import resample_positions
from .readout_base import Readout


class ValuePath(nn.Module):
    """The last block where every token attends to itself only, without queries and keys. Weight names are CLIP's."""

    self_attn: Any
    layer_norm1: Any
    layer_norm2: Any
    mlp: Any

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, attend: bool = False, **kwargs):
        if attend:  # as in CLIP
            return super().forward(hidden_states, attention_mask, **kwargs)
        attention = self.self_attn
        hidden_states = hidden_states + attention.out_proj(attention.v_proj(self.layer_norm1(hidden_states)))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class ValuePathLayer(ValuePath, CLIPEncoderLayer):
    """[`ValuePath`] of CLIP."""


class MetaClip2ValuePathLayer(ValuePath, MetaClip2EncoderLayer):
    """[`ValuePath`] of MetaCLIP 2."""


class ClipValues(Readout):
    """
    The value path of the last block, post-norm and visual projection, applied to every patch.

    The pooled embedding runs the last block with its attention, as in CLIP. `attentions` has one entry fewer than there are
    blocks.

    Source: MaskCLIP (Zhou et al., 2022), SPAR section 3.
    """

    last_norm = "post_layernorm"
    value_path_layer: Any = ValuePathLayer
    embeddings: Any
    pre_layrnorm: Any
    encoder: Any
    post_layernorm: Any

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        self.encoder.layers[-1] = self.value_path_layer(config)
        last = f"encoder.layers.{config.num_hidden_layers - 1}.self_attn"
        self.unused_parameters = (f"{last}.q_proj", f"{last}.k_proj")
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def embed(self, pixel_values: torch.Tensor, method: str, extent: int | None = None) -> torch.Tensor:
        patches = self.embeddings.patch_embedding(pixel_values)  # (batch, 3, H, W) -> (batch, hidden, h, w)
        height, width = patches.shape[-2:]
        with own_weights(self.embeddings):
            table = self.embeddings.position_embedding.weight  # the class token's position comes first
            positions = resample_positions(table[1:], height, width, method)
            patches = patches.flatten(2).transpose(1, 2) + positions  # (batch, h * w, hidden)
            class_token = (self.embeddings.class_embedding + table[0]).expand(patches.shape[0], 1, -1)
        return self.pre_layrnorm(torch.cat([class_token, patches], dim=1))  # (batch, 1 + h * w, hidden)

    def encode(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs):
        for layer in self.encoder.layers[:-1]:
            hidden_states = layer(hidden_states, None, **kwargs)
        last_hidden_state = self.post_layernorm(self.encoder.layers[-1](hidden_states, None, **kwargs))
        return last_hidden_state, self.visual_projection(last_hidden_state[:, 1:]), hidden_states

    def pool(self, pool_input: torch.Tensor) -> torch.Tensor:
        # not called as a module, so that it is not recorded a second time among the hidden states
        hidden_states = self.encoder.layers[-1].forward(pool_input, attend=True)
        return self.visual_projection(self.post_layernorm(hidden_states[:, 0]))


class MaskClipReadout(ClipValues, CLIPVisionModel):
    """CLIP and OpenCLIP: [`ClipValues`]. Source: `CLIPVisionModelWithProjection` in transformers."""

    _no_split_modules = [*CLIPVisionModel._no_split_modules, "ValuePathLayer"]


class MetaClip2Readout(ClipValues, MetaClip2VisionModel):
    """
    MetaCLIP 2, trained on texts in 300 languages: [`ClipValues`], with positions resampled as those of CLIP.

    Source: MetaCLIP 2 (arXiv 2507.22062); `MetaClip2VisionModelWithProjection` in transformers.
    """

    _no_split_modules = [*MetaClip2VisionModel._no_split_modules, "MetaClip2ValuePathLayer"]
    value_path_layer = MetaClip2ValuePathLayer
