"""
What all read-outs share.

A read-out runs one family of backbones at any resolution and computes one feature vector per patch. It is a subclass of the
family's model in transformers, so it loads that family's checkpoints unchanged and copies none of its layers. It adds three
short methods:

- `embed(pixel_values, method, extent)`: `(batch, 3, height, width)` -> `(batch, tokens, hidden)`, with positions resampled
  to the grid by the configuration's `position_resampling` and `position_extent` (in patches);
- `encode(hidden_states, grid)`: returns the post-norm tokens, the dense features of the patches `(batch, patches, dim)` and
  the input of the pooling head;
- `pool(pool_input)`: returns the family's pooled image embedding `(batch, dim)`; called only on request.
"""

import torch
from torch import nn

from .execution import StreamNorm


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
    # the part of the backbone from which on exports in half precision or int8 stay in float32
    last_norm = "layernorm"
    # parts of names of parameters that dense features do not depend on, and of those that the pooled embedding does not
    # depend on either
    unused_parameters: tuple[str, ...] = ()
    unused_with_pooling: tuple[str, ...] = ()

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks that dense features go through, first to last."""
        return self.encoder.layers  # type: ignore[attr-defined]

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Tokens after the last norm, in the dtype of the weights: shape kept."""
        return getattr(self, self.last_norm)(hidden_states)

    def post_init(self) -> None:
        for module in self.modules():  # type: ignore[attr-defined]
            if type(module) is nn.LayerNorm:
                module.__class__ = StreamNorm  # only `forward` differs
        super().post_init()  # type: ignore[misc]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module)  # type: ignore[misc]  # see `SparPreTrainedModel`
