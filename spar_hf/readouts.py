"""
Read-outs: how each family of backbones is run at any resolution and gives one feature vector per patch.

A read-out is a subclass of the family's model in transformers, so it loads that family's checkpoints as they are
and copies none of its layers. It adds three short methods:

- `embed(pixel_values)`: `(batch, 3, height, width)` -> `(batch, tokens, hidden)`, positions resampled to the grid;
- `encode(hidden_states)`: -> the post-norm tokens and, for the patches only, the dense features
  `(batch, patches, dim)`;
- `pool(last_hidden_state)`: -> the family's pooled image embedding `(batch, dim)`, or `None`.
"""

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

CUBIC = -0.75  # the coefficient of torch's (and OpenCV's) bicubic kernel


def bicubic_matrix(source: int, target: int, device: torch.device | None = None) -> torch.Tensor:
    """
    Matrix that resamples a line of `source` values to `target` values as
    `torch.nn.functional.interpolate(size=target, mode="bicubic", align_corners=False)` does: `(target, source)`,
    float32.

    It has no branch on the sizes, so a graph exported with dynamic sizes accepts all that are larger than a patch,
    the native grid included (where it is exactly the identity).

    Example:

    ```python
    >>> bicubic_matrix(2, 3).shape
    torch.Size([3, 2])
    ```"""
    centre = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * (source / target) - 0.5  # (target,)
    base = centre.floor()
    fraction = centre - base
    taps = torch.arange(-1, 3, device=device, dtype=torch.float32)  # the four neighbours
    distance = (taps[None, :] - fraction[:, None]).abs()  # (target, 4)
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance * distance + 1
    far = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
    weights = torch.where(distance <= 1, near, far)
    index = (base[:, None] + taps[None, :]).clamp(0, source - 1)  # border values repeat
    columns = torch.arange(source, device=device, dtype=torch.float32)
    return (weights[:, :, None] * (index[:, :, None] == columns)).sum(1)  # (target, 4, source) -> (target, source)


def resample_positions(table: torch.Tensor, height: int, width: int, method: str) -> torch.Tensor:
    """
    Take a square position table to another grid: `(side * side, hidden)` -> `(height * width, hidden)`.

    `method` is the configuration's `position_resampling`. Computed in float32, one small matrix per axis.

    Raises:
        ValueError: unknown `method`.
    """
    if method != "bicubic":
        raise ValueError(f"Unknown position_resampling {method!r}; use 'bicubic'.")
    side = int(table.shape[0] ** 0.5)
    grid = table.float().view(side, side, -1)
    rows = bicubic_matrix(side, height, table.device)
    columns = bicubic_matrix(side, width, table.device)
    grid = torch.tensordot(rows, grid, dims=1)  # (side, side, hidden) -> (height, side, hidden)
    grid = torch.matmul(columns, grid)  # (height, side, hidden) -> (height, width, hidden)
    return grid.flatten(0, 1).to(table.dtype)


class SiglipReadout(SiglipVisionModel):
    """
    SigLIP and fixed-resolution SigLIP2: the attention-pooling head without its attention, on every patch.

    Source: SPAR section 3; `SiglipVisionModel` and `SiglipMultiheadAttentionPoolingHead` in transformers.

    Raises:
        ValueError: a backbone configured without its pooling head.
    """

    def __init__(self, config: SiglipVisionConfig):
        if not config.vision_use_head:
            raise ValueError(
                "The SigLIP read-out is made of the attention-pooling head; this backbone has none. "
                "Use a checkpoint with the head, `vision_use_head=True`."
            )
        super().__init__(config)

    def embed(self, pixel_values: torch.Tensor, position_resampling: str) -> torch.Tensor:
        patches = self.embeddings.patch_embedding(pixel_values)  # (batch, 3, H, W) -> (batch, hidden, h, w)
        height, width = patches.shape[-2:]
        positions = resample_positions(self.embeddings.position_embedding.weight, height, width, position_resampling)
        return patches.flatten(2).transpose(1, 2) + positions  # (batch, h * w, hidden)

    def encode(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = self.encoder(inputs_embeds=hidden_states, **kwargs).last_hidden_state
        last_hidden_state = self.post_layernorm(hidden_states)
        attention = self.head.attention
        value_weight = attention.in_proj_weight.chunk(3)[2]  # rows are query, key, value
        value_bias = attention.in_proj_bias.chunk(3)[2]
        values = attention.out_proj(nn.functional.linear(last_hidden_state, value_weight, value_bias))
        return last_hidden_state, values + self.head.mlp(self.head.layernorm(values))

    def pool(self, last_hidden_state: torch.Tensor) -> torch.Tensor | None:
        return self.head(last_hidden_state)


READOUTS = {"siglip": SiglipReadout}
