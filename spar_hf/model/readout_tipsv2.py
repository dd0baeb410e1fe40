"""TIPSv2: read-out and text tower."""

from typing import Any

import torch
from transformers import Tipsv2TextModel, Tipsv2VisionConfig, Tipsv2VisionModel
from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2VisionLayer

from .readout_dinov2 import RegisterTokens


class Tipsv2ValuePathLayer(Tipsv2VisionLayer):
    """TIPSv2's last block where every token attends to itself only. Weight names are TIPSv2's."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, attend: bool = False, **kwargs):
        if attend:  # as in TIPSv2
            return super().forward(hidden_states, attention_mask, **kwargs)
        attention = self.attention
        values = attention.o_proj(attention.v_proj(self.norm1(hidden_states)))
        hidden_states = hidden_states + self.layer_scale1(values)
        return hidden_states + self.layer_scale2(self.mlp(self.norm2(hidden_states)))


class Tipsv2Readout(RegisterTokens, Tipsv2VisionModel):
    """
    TIPSv2: the value path of the last block and the last norm, applied to every patch, as in its zero-shot segmentation.

    The pooled embedding is the first class token, which was trained on alt texts; it runs the last block with its attention.
    The second class token, trained on synthetic captions, is where DINOv2 has registers. `attentions` has one entry fewer
    than there are blocks.

    Source: TIPSv2 (arXiv 2604.12012) and its published notebook of zero-shot segmentation, whose values path is MaskCLIP's
    (Zhou et al., 2022); `Tipsv2VisionModel` in transformers.
    """

    _no_split_modules = [*Tipsv2VisionModel._no_split_modules, "Tipsv2ValuePathLayer"]

    def __init__(self, config: Tipsv2VisionConfig):
        super().__init__(config)
        self.encoder.layer[-1] = Tipsv2ValuePathLayer(config)
        last = f"encoder.layer.{config.num_hidden_layers - 1}.attention"
        self.unused_parameters = ("mask_token", f"{last}.q_proj", f"{last}.k_proj")
        self.post_init()

    def encode(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs):
        for layer in self.encoder.layer[:-1]:
            hidden_states = layer(hidden_states, **kwargs)
        last_hidden_state = self.layernorm(self.encoder.layer[-1](hidden_states, **kwargs))
        return last_hidden_state, last_hidden_state[:, 1 + self.config.num_register_tokens :], hidden_states

    def pool(self, pool_input: torch.Tensor) -> torch.Tensor:
        # not called as a module, so that it is not recorded a second time among the hidden states
        return self.layernorm(self.encoder.layer[-1].forward(pool_input, attend=True)[:, 0])


class Tipsv2TextTower(Tipsv2TextModel):
    """
    TIPSv2's text tower: the mean over the tokens of a text. Without a mask, every id but that of padding is a token, as in
    the published code.
    """

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        if attention_mask is None:
            padding: Any = self.config.pad_token_id
            attention_mask = input_ids.ne(padding).long()
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
