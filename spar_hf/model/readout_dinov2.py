"""DINOv2 with registers, and what TIPSv2 has in common with it."""

from typing import Any

import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from .execution import own_weights
from .positions import resample_positions
from .readout_base import Readout


class RegisterTokens(Readout):
    """
    Embeddings of DINOv2's modules with registers: a class token, registers, which have no position, and patches. The blocks
    are called one by one, because the encoder's forward would start another recording of hidden states.
    """

    unused_parameters: tuple[str, ...] = ("mask_token",)
    unused_with_pooling: tuple[str, ...] = ("mask_token",)
    config: Any
    embeddings: Any
    encoder: Any
    layernorm: Any

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layer

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        # a plain container of the same name: transformers renames weights of old checkpoints below models of its own
        container: Any = nn.Module()
        container.layer = self.encoder.layer
        self.encoder = container

    def embed(self, pixel_values: torch.Tensor, method: str, extent: int | None = None) -> torch.Tensor:
        patches = self.embeddings.patch_embeddings.projection(pixel_values)  # (batch, 3, H, W) -> (batch, hidden, h, w)
        height, width = patches.shape[-2:]
        with own_weights(self.embeddings):
            table = self.embeddings.position_embeddings[0]  # the class token's position comes first
            positions = resample_positions(table[1:], height, width, method)
            patches = patches.flatten(2).transpose(1, 2) + positions  # (batch, h * w, hidden)
            first = torch.cat([self.embeddings.cls_token + table[0], self.embeddings.register_tokens], dim=1)
        first = first.expand(patches.shape[0], -1, -1)
        return torch.cat([first, patches], dim=1)  # (batch, 1 + registers + h * w, hidden)


class Dinov2Readout(RegisterTokens, Dinov2WithRegistersModel):
    """
    DINOv2 with registers: the normalised patch tokens, without class and register tokens. There is no text tower.

    Positions are resampled by target size with antialiasing, as in the published models with registers.

    Source: Vision Transformers Need Registers (Darcet et al., 2024); `Dinov2WithRegistersModel` in transformers.
    """

    def __init__(self, config: Dinov2WithRegistersConfig):
        super().__init__(config)

    def encode(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs):
        for layer in self.encoder.layer:
            hidden_states = layer(hidden_states, **kwargs)
        last_hidden_state = self.layernorm(hidden_states)
        return last_hidden_state, last_hidden_state[:, 1 + self.config.num_register_tokens :], last_hidden_state

    def pool(self, pool_input: torch.Tensor) -> torch.Tensor:
        return pool_input[:, 0]
