"""Configuration of a SPAR backbone with a mask-classification head."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .configuration_spar import SparConfig


class SparUniversalConfig(PreTrainedConfig):
    r"""
    Configuration of [`SparForUniversalSegmentation`].

    The modules of the head are Mask2Former's, so its settings have the names and, unless noted, the meaning and defaults of
    [`~transformers.Mask2FormerConfig`].

    Args:
        backbone_config (`dict` or [`SparConfig`], *optional*):
            The vision tower. The head reads its `out_features`: by default `["features"]`, the dense features. A text tower
            is removed.
        hidden_dim (`int`, *optional*, defaults to 256):
            Width of queries, pyramid and mask features.
        num_queries (`int`, *optional*, defaults to 100):
            Largest number of segments in an image.
        num_attention_heads (`int`, *optional*, defaults to 8), dim_feedforward (`int`, *optional*, defaults to 1024),
        dropout (`float`, *optional*, defaults to 0.0), activation_function (`str`, *optional*, defaults to `"gelu"`),
        pre_norm (`bool`, *optional*, defaults to `False`):
            Settings of the decoder's layers.
        decoder_layers (`int`, *optional*, defaults to 10):
            Predictions of the decoder, one before its first layer and one after each: layers + 1, as in Mask2Former.
        class_weight, mask_weight, dice_weight (`float`, *optional*, default to 2.0, 5.0, 5.0):
            Weights of the loss terms and of the matching costs.
        no_object_weight (`float`, *optional*, defaults to 0.1):
            Weight in the cross entropy of queries without a segment.
        train_num_points (`int`, *optional*, defaults to 12544), oversample_ratio (`float`, *optional*, defaults to 3.0),
        importance_sample_ratio (`float`, *optional*, defaults to 0.75):
            Number of points at which the loss of a mask is computed, and how they are drawn.

    Raises:
        ValueError: a backbone that is no SPAR model; a `hidden_dim` that is no multiple of 4 and of the heads; less than one
            query or two predictions.

    Example:

    ```python
    >>> from spar_hf import SparConfig, SparUniversalConfig

    >>> config = SparUniversalConfig(backbone_config=SparConfig(), id2label={0: "sky", 1: "dog"})
    >>> config.num_labels, config.backbone_config.out_features
    (2, ['features'])
    ```"""

    model_type = "spar_universal"
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]  # see `SparConfig`
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=SparConfig, model_type="spar")}
    # names of the same settings in the modules of EoMT
    attribute_map = {"hidden_size": "hidden_dim", "hidden_act": "activation_function"}

    backbone_config: Any = None
    hidden_dim: int = 256
    num_queries: int = 100
    num_attention_heads: int = 8
    dim_feedforward: int = 1024
    dropout: float | int = 0.0
    activation_function: str = "gelu"
    pre_norm: bool = False
    decoder_layers: int = 10
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    no_object_weight: float | int = 0.1
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    init_std: float = 0.02
    init_xavier_std: float | int = 1.0
    enforce_input_projection: bool = False

    def __post_init__(self, **kwargs):
        backbone = {} if self.backbone_config is None else self.backbone_config
        if isinstance(backbone, PreTrainedConfig):
            backbone = backbone.to_dict()
        if not isinstance(backbone, dict) or backbone.get("model_type", "spar") != "spar":
            kind = backbone["model_type"] if isinstance(backbone, dict) else type(backbone).__name__
            raise ValueError(
                f"`backbone_config` must be a SparConfig or its dict, got one of type {kind!r}. For a new head on a SPAR "
                "model or a backbone of transformers, call `SparForUniversalSegmentation.from_spar(...)`."
            )
        # these belong to the folder the backbone came from
        dropped = ("auto_map", "custom_pipelines", "architectures", "text_config")
        # built here: transformers would look it up in its registry, where remote code has not registered it
        self.backbone_config = SparConfig(**{key: value for key, value in backbone.items() if key not in dropped})
        super().__post_init__(**kwargs)
        if self.hidden_dim % self.num_attention_heads or self.hidden_dim % 4:
            raise ValueError(
                f"`hidden_dim` {self.hidden_dim} must be a multiple of 4 and of `num_attention_heads` "
                f"{self.num_attention_heads}."
            )
        if self.num_queries < 1 or self.decoder_layers < 2:
            raise ValueError("`num_queries` must be at least 1 and `decoder_layers` at least 2.")

    @property
    def mask_feature_size(self) -> int:
        """Width of the mask features, which are multiplied with the queries."""
        return self.hidden_dim


__all__ = ["SparUniversalConfig"]
