"""SPAR as a backbone of transformers: feature maps of chosen layers, for its segmentation and detection heads."""

import torch
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_spar import SparConfig
from .modeling_spar import SparVisionModel


class SparBackbone(BackboneMixin, SparVisionModel):
    """
    A [`SparVisionModel`] with the backbone interface of transformers, at any resolution.

    Stages are `"stem"` (the embeddings), `"stage1"` to `"stageN"` (the output of each layer after the backbone's final
    norm, without class and register tokens) and `"features"` (the `feature_map` of the model, the default). Choose with
    `out_features=[...]` or `out_indices=[...]`.

    `AutoBackbone.from_config` builds it. Load a local folder with `SparBackbone.from_pretrained`, because
    `AutoBackbone.from_pretrained` of transformers 5.23 always asks the hub.

    Raises:
        ValueError: a stage that the model does not have.

    Source: `DINOv3ViTBackbone` in transformers.

    Example:

    ```python
    >>> import torch
    >>> from spar_hf import SPAR_TINY, SparBackbone

    >>> backbone = SparBackbone.from_pretrained(SPAR_TINY, out_features=["stage4", "features"])
    >>> with torch.no_grad():
    ...     [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 200, 330)).feature_maps]
    [(1, 192, 13, 21), (1, 192, 13, 21)]
    >>> backbone.channels
    [192, 192]
    ```"""

    def __init__(self, config: SparConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1) + [config.projection_dim]

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`): normalised images, any size.

        Returns:
            [`~transformers.modeling_outputs.BackboneOutput`] whose `feature_maps` are, per chosen stage,
            `(batch, channels, ceil(height / patch), ceil(width / patch))`.
        """
        outputs = SparVisionModel.forward(self, pixel_values, **kwargs)  # BackboneMixin has an empty forward
        grid = outputs.feature_map.shape[-2:]
        maps = []
        for index, stage in enumerate(self.stage_names):
            if stage not in self.out_features:
                continue
            if stage == "features":
                maps.append(outputs.feature_map)
                continue
            # class and register tokens come first
            patches = self.backbone.final_norm(outputs.hidden_states[index])[:, -grid[0] * grid[1] :]
            maps.append(patches.transpose(1, 2).unflatten(2, grid))  # (batch, h * w, hidden) -> (batch, hidden, h, w)
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["SparBackbone"]
