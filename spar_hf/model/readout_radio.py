"""C-RADIO: dense features of one encoder that was distilled from several, also in the space of a text tower."""

from typing import Any

import torch
from torch import nn
from transformers import RadioConfig, RadioModel

from .execution import own_weights
from .positions import resample_positions
from .readout_base import Readout


class RadioReadout(Readout, RadioModel):
    """
    C-RADIO: the patch tokens of the last block, which no norm follows, without class and register tokens.

    Pixels are read from 0 to 1 and normalised by the backbone itself, so the padding on the right and below is black. The
    position table is stretched to a square as large as the longer side of the image, whose top left corner is taken. The
    pooled embedding is the summary: the class tokens of the teachers that have one, side by side. The `image_size` of its
    configuration is no pre-training size, which was many: a sliding-window teacher needs a `window_size`.

    Source: RADIO (arXiv 2312.06709), C-RADIOv4 (arXiv 2601.17237); `RadioModel` in transformers.
    """

    unused_parameters = ("video_patch_projection",)
    unused_with_pooling = ("video_patch_projection",)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layer

    def __init__(self, config: RadioConfig):
        super().__init__(config)
        # a plain container of the same name: transformers renames weights of old checkpoints below models of its own
        container: Any = nn.Module()
        container.layer = self.encoder.layer
        self.encoder = container
        # the configuration has them too, so they are no weights, which a device map would have to place
        self.register_buffer("summary_idxs", self.summary_idxs, persistent=False)
        self.last_norm = f"encoder.layer.{config.num_hidden_layers - 1}.layer_scale2"  # there is no norm: the last step

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        last: Any = self.encoder.layer[-1]
        return hidden_states.to(last.layer_scale2.lambda1.dtype)  # after sums in float32

    def embed(self, pixel_values: torch.Tensor, method: str, extent: int | None = None) -> torch.Tensor:
        size: Any = self.config.patch_size
        pixel_values = self.input_conditioner(pixel_values)
        grid = (pixel_values.shape[-2] // size, pixel_values.shape[-1] // size)
        # (batch, 3, h * p, w * p) -> (batch, h * w, 3 * p * p), channels first
        patches = pixel_values.unflatten(3, (grid[1], size)).unflatten(2, (grid[0], size))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches = self.embeddings.patch_projection(patches)
        with own_weights(self.embeddings):
            patches = patches + resample_positions(self.embeddings.position_embedding[0], *grid, method)
            first = self.embeddings.cls_register_token.expand(patches.shape[0], -1, -1)
        return torch.cat([first, patches], dim=1)  # (batch, class and register tokens + h * w, hidden)

    def encode(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs):
        for layer in self.encoder.layer:
            hidden_states = layer(hidden_states, **kwargs)
        last_hidden_state = self.final_norm(hidden_states)
        return last_hidden_state, last_hidden_state[:, self.config.num_summary_tokens :], last_hidden_state

    def pool(self, pool_input: torch.Tensor) -> torch.Tensor:
        chosen: Any = self.config.summary_idxs
        return torch.cat([pool_input[:, i] for i in chosen], dim=1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_projection

    def set_input_embeddings(self, value: nn.Module) -> None:
        embeddings: Any = self.embeddings
        embeddings.patch_projection = value


class TextHead(nn.Module):
    """
    The head that maps a class token to the image embedding of a teacher with a text tower: a residual MLP with norms.
    Weight names are those of the published adaptors (`head_mlp`).
    """

    def __init__(self, config: Any):
        super().__init__()
        hidden = config.text_head_hidden

        def layer(width: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, width))

        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.blocks = nn.ModuleList([layer(hidden) for _ in range(config.text_head_layers)])
        self.final = layer(config.text_head_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.fc1(tokens)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.final(tokens)


class RadioTextReadout(RadioReadout):
    """
    C-RADIO with the head of its SigLIP2 teacher, applied to every patch as it is to a class token: dense features in the
    space of SigLIP2's texts. The pooled embedding is the head's of its own class token.

    `text_head_size`, `text_head_hidden`, `text_head_layers` and `text_head_token` of the backbone's configuration are the
    widths of its output and of its layers, their number, and the class token. `spar-hf convert --family radio` sets them.

    Source: `siglip2-g` adaptor of C-RADIOv4; RADSeg (arXiv 2511.19704) applies it to patches.
    """

    def __init__(self, config: RadioConfig):
        super().__init__(config)
        self.text_head = TextHead(config)
        self.post_init()

    def encode(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs):
        last_hidden_state, features, pool_input = super().encode(hidden_states, grid, **kwargs)
        return last_hidden_state, self.text_head(features), pool_input

    def pool(self, pool_input: torch.Tensor) -> torch.Tensor:
        config: Any = self.config
        return self.text_head(pool_input[:, config.text_head_token])
