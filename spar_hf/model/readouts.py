"""
Read-outs: run each family of backbones at any resolution and compute one feature vector per patch.

A read-out is a subclass of the family's model in transformers, so it loads that family's checkpoints unchanged and copies
none of its layers. It adds three short methods:

- `embed(pixel_values, method, extent)`: `(batch, 3, height, width)` -> `(batch, tokens, hidden)`, with positions resampled
  to the grid by the configuration's `position_resampling` and `position_extent` (in patches);
- `encode(hidden_states, grid)`: returns the post-norm tokens, the dense features of the patches `(batch, patches, dim)` and
  the input of the pooling head;
- `pool(pool_input)`: returns the family's pooled image embedding `(batch, dim)`; called only on request.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer, DINOv3ViTRopePositionEmbedding

from .execution import StreamNorm, full_precision, own_weights

CUBIC = -0.75  # the coefficient of torch's (and OpenCV's) bicubic kernel


def bicubic_matrix(
    source: int,
    target: int,
    device: torch.device | None = None,
    offset: float | torch.Tensor = 0.0,
    span: int | None = None,
) -> torch.Tensor:
    """
    Matrix `(target, source)`, float32, that resamples a line of `source` values to `target` values.

    It equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` with `size=target`, or with
    `scale_factor=(target + offset) / source`. With `span`, the source is resampled to `span` values, of which the middle
    `target` are taken.

    There is no branch on the sizes, so a graph exported with dynamic sizes accepts all sizes above one patch. On the native
    grid the matrix is exactly the identity.

    Example:

    ```python
    >>> bicubic_matrix(2, 3).shape
    torch.Size([3, 2])
    ```"""
    step = source / (target + offset if span is None else span)
    before = 0 if span is None else (span - target) / 2
    centre = (torch.arange(target, device=device, dtype=torch.float32) + before + 0.5) * step - 0.5  # (target,)
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


def bilinear_antialias_matrix(source: int, target: int, device: torch.device | None = None) -> torch.Tensor:
    """
    As [`bicubic_matrix`], for `interpolate(size=target, mode="bilinear", antialias=True)`: a triangle kernel as wide as the
    larger of the two spacings, normalised at the borders. `(target, source)`, float32.
    """
    step = torch.ones((), device=device) * (source / target)
    centre = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * step  # (target,)
    columns = torch.arange(source, device=device, dtype=torch.float32) + 0.5
    weights = (1 - (columns[None, :] - centre[:, None]).abs() / step.clamp(min=1)).clamp(min=0)  # (target, source)
    return weights / weights.sum(1, keepdim=True)


def resample_positions(
    table: torch.Tensor, height: int, width: int, method: str, extent: int | None = None
) -> torch.Tensor:
    """
    Resample a square position table to another grid: `(side * side, hidden)` -> `(height * width, hidden)`.

    `method` is the configuration's `position_resampling`, `extent` its `position_extent` in patches (for `"bicubic"`).
    Computed with one small matrix per axis in float32, and returned so, under autocast and for tables in half precision too.

    Raises:
        ValueError: unknown `method`.
    """
    side, device = math.isqrt(table.shape[0]), table.device
    if method == "bicubic":
        span = None if extent is None else larger(height, width, extent)
        rows, columns = (bicubic_matrix(side, length, device, span=span) for length in (height, width))
    elif method == "bilinear_antialias":
        rows, columns = (bilinear_antialias_matrix(side, length, device) for length in (height, width))
    elif method == "bicubic_offset":
        # MaskCLIP resizes by a scale factor, except on the native grid. Tensors are compared, because an exported graph must
        # not branch on the sizes.
        lengths = torch.stack([torch.ones(length, device=device).sum() for length in (height, width)])
        offset = 0.1 * (lengths != side).any()
        rows, columns = (bicubic_matrix(side, length, device, offset) for length in (height, width))
    else:
        raise ValueError(
            f"Unknown position_resampling {method!r}; use 'bicubic', 'bilinear_antialias' or 'bicubic_offset'."
        )
    grid = table.float().view(side, side, -1)
    with full_precision(device):
        grid = torch.tensordot(rows, grid, dims=1)  # (side, side, hidden) -> (height, side, hidden)
        grid = torch.matmul(columns, grid)  # (height, side, hidden) -> (height, width, hidden)
    return grid.flatten(0, 1)


def larger(height: Any, width: Any, extent: int) -> Any:
    """The largest of the three, without a branch: sizes are symbols in `torch.export` and tensors in `torch.jit.trace`."""
    if torch.jit.is_tracing():
        return torch.maximum(height, width).clamp(min=extent)
    return torch.sym_max(torch.sym_max(height, width), extent)


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


class Readout:
    """
    Capabilities of a read-out, beside transformers' own flags (`_supports_sdpa`, `supports_gradient_checkpointing`). The
    tests check them.

    Tokens are summed in float32 from block to block where weights are in half precision, see [`StreamNorm`].
    """

    any_resolution = True  # any height and width, multiples of the patch or not
    exportable = True  # strict torch.export with dynamic height and width
    compilable = True  # torch.compile(fullgraph=True, dynamic=True)
    half_precision = True  # float16 and bfloat16 near float32
    # parts of names of parameters that dense features do not depend on, and of those that the pooled embedding does not
    # depend on either
    unused_parameters: tuple[str, ...] = ()
    unused_with_pooling: tuple[str, ...] = ()

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks that dense features go through, first to last."""
        return self.encoder.layers  # type: ignore[attr-defined]

    def post_init(self) -> None:
        for module in self.modules():  # type: ignore[attr-defined]
            if type(module) is nn.LayerNorm:
                module.__class__ = StreamNorm  # only `forward` differs
        super().post_init()  # type: ignore[misc]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module)  # type: ignore[misc]  # see `SparPreTrainedModel`


class PoolingHead(Readout):
    """Encoder and attention-pooling head shared by SigLIP's fixed-resolution and NaFlex models."""

    unused_parameters = ("head.probe",)
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


class ValuePathLayer(CLIPEncoderLayer):
    """CLIP's last block where every token attends to itself only, without queries and keys. Weight names are CLIP's."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, attend: bool = False, **kwargs):
        if attend:  # as in CLIP
            return super().forward(hidden_states, attention_mask, **kwargs)
        attention = self.self_attn
        hidden_states = hidden_states + attention.out_proj(attention.v_proj(self.layer_norm1(hidden_states)))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class MaskClipReadout(Readout, CLIPVisionModel):
    """
    CLIP and OpenCLIP: the value path of the last block, post-norm and visual projection, applied to every patch.

    The pooled embedding runs the last block with its attention, as in CLIP. `attentions` has one entry fewer than there are
    blocks.

    Source: MaskCLIP (Zhou et al., 2022), SPAR section 3; `CLIPVisionModelWithProjection` in transformers.
    """

    _no_split_modules = [*CLIPVisionModel._no_split_modules, "ValuePathLayer"]

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        self.encoder.layers[-1] = ValuePathLayer(config)
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
    "dinov3": Dinov3Readout,
    "dinov3txt": Dinov3TxtReadout,
}
