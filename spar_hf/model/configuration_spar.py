"""Configuration of SPAR models: a backbone of transformers, its read-out of dense features, and optionally a text tower."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from transformers import AutoConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .prompts import resolve_templates
from .templates import TemplateChoice, read_templates

# supported choices per backbone and per read-out, the default first
BACKBONE_READOUTS = {
    "siglip_vision_model": ("siglip",),
    "siglip2_vision_model": ("naflex",),
    "clip_vision_model": ("maskclip",),
    "metaclip_2_vision_model": ("metaclip2",),
    "dinov3_vit": ("dinov3", "dinov3txt"),
    "tipsv2_vision_model": ("tipsv2",),
    "dinov2_with_registers": ("dinov2",),
    "radio": ("radio", "radiotext"),
}
READOUT_RESAMPLINGS = {
    "siglip": ("bicubic",),
    "naflex": ("bilinear_antialias",),
    "maskclip": ("bicubic_offset",),
    "metaclip2": ("bicubic_offset",),
    "dinov3": ("rope",),
    "dinov3txt": ("rope",),
    "tipsv2": ("bilinear_antialias",),
    "dinov2": ("bicubic_antialias",),
    "radio": ("bilinear_corner",),
    "radiotext": ("bilinear_corner",),
}
# attribute of the backbone's or the text tower's configuration that holds the width of its output
READOUT_WIDTHS = {
    "siglip": "hidden_size",
    "naflex": "hidden_size",
    "maskclip": "projection_dim",
    "metaclip2": "projection_dim",
    "dinov3": "hidden_size",
    "dinov3txt": "hidden_size",
    "tipsv2": "hidden_size",
    "dinov2": "hidden_size",
    "radio": "hidden_size",
    "radiotext": "text_head_size",
}
TEXT_WIDTHS = {
    "siglip_text_model": "projection_size",
    "siglip2_text_model": "projection_size",
    "clip_text_model": "projection_dim",
    "metaclip_2_text_model": "projection_dim",
    "tipsv2_text_model": "hidden_size",
}
# dino.txt compares the first half of its text embedding with the pooled image, the last half with patches
TEXT_PARTS = {"dinov3txt": 2}


def _check_choice(what: str, value: Any, choices: Collection[str]) -> None:
    """Raise `ValueError` for an unsupported value."""
    if value not in choices:
        raise ValueError(f"{what} {value!r} is unknown to SPAR; use one of {sorted(choices)}.")


class SparConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`SparVisionModel`], [`SparBackbone`] and [`SparForOpenVocabSegmentation`].

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Vision configuration of transformers: `siglip_vision_model` (SigLIP and fixed-resolution SigLIP2),
            `siglip2_vision_model` (NaFlex), `clip_vision_model`, `metaclip_2_vision_model`, `tipsv2_vision_model`,
            `dinov3_vit`, `dinov2_with_registers` or `radio`. Defaults to `SiglipVisionConfig()`.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Text configuration of transformers (`siglip_text_model`, `siglip2_text_model`, `clip_text_model`,
            `metaclip_2_text_model` or `tipsv2_text_model`). `None` makes a vision-only model.
        readout (`str`, *optional*):
            How dense features are read from the backbone (SPAR, section 3). The default follows from its family:
            `"siglip"` and `"naflex"` apply the attention-pooling head without its attention, `"maskclip"` the value path
            of the last block, as do `"metaclip2"` and `"tipsv2"`, and `"dinov3"`, `"dinov2"` and `"radio"` take the patch
            tokens. `"dinov3txt"` (the default of DINOv3 with a text tower) adds the vision head of dino.txt for the pooled
            embedding, `"radiotext"` (of C-RADIO with one) applies the head of its SigLIP2 teacher to every patch.
        position_resampling (`str`, *optional*):
            How positions are resampled to another grid. It belongs to the checkpoint, because it changes the features.
            `"bicubic"`: by target size, without antialiasing (SigLIP). `"bilinear_antialias"`: by target size, with it
            (NaFlex, TIPSv2), as does `"bicubic_antialias"` (DINOv2). `"bicubic_offset"`: by the scale factor
            `(target + 0.1) / source` (MaskCLIP, MetaCLIP 2). `"bilinear_corner"`: to the size of the longer side, of which
            the corner is taken (C-RADIO). `"rope"`: no table (DINOv3).
        position_extent (`int`, *optional*):
            Side in pixels of the image that the position table spans. `None`, as for all pre-trained checkpoints: the image
            itself, so the step in the table from patch to patch shrinks with the size of the image. With a number, this
            step is the same for all images up to that size, which read the middle of the table; the longer side of larger
            images spans the whole table. Only for students distilled this way, with `"bicubic"` resampling.
        projection_dim (`int`, *optional*):
            Width of the dense features. Follows from the backbone.
        dense_logit_scale (`float`, *optional*, defaults to 40.0):
            Factor on the cosine of patch feature and text embedding before the softmax over classes: a plain multiplier,
            not a logarithm as the trained `logit_scale`.
        templates (`str` or `Sequence[str]`, *optional*, defaults to `"imagenet80"`):
            Prompt templates: the name of a set in `spar_hf.model.prompts.TEMPLATES` or a list of strings with one `{}`.
        distillation (`dict`, *optional*):
            How a student was made: `teacher`, `window_size`, `stride`, data, and `labels` if it was trained on labels
            afterwards. `None` for an untouched base.
        output_pooled (`bool`, *optional*, defaults to `False`):
            Whether models run the pooling head unless told otherwise. `pipeline("image-feature-extraction")` needs it for
            `pool=True`: `pipeline(..., model_kwargs={"output_pooled": True})`.
        out_features, out_indices (`list[str]`, `list[int]`, *optional*):
            Stages that [`SparBackbone`] returns; `["features"]`, the dense features, by default.

    Raises:
        ValueError: a backbone, text tower, read-out, resampling or template set that does not exist; a `position_extent`
            that is no multiple of the patch from the pre-training size on, or with another resampling; a template
            without exactly one `{}`; a `dense_logit_scale` that is not positive; a `projection_dim` or a text
            tower of another width than the dense features.

    Example:

    ```python
    >>> from transformers import SiglipVisionConfig
    >>> from spar_hf import SparConfig, SparVisionModel

    >>> backbone = SiglipVisionConfig(
    ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> model = SparVisionModel(SparConfig(backbone_config=backbone))
    >>> model.config.projection_dim
    32
    ```"""

    model_type = "spar"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_text_model", optional=True),
    }

    # what is left out is filled in by __post_init__, and a dict becomes a configuration: these are the types read
    backbone_config: Any = None
    text_config: Any = None
    readout: str = None  # type: ignore[assignment]
    position_resampling: str = None  # type: ignore[assignment]
    position_extent: int | None = None
    projection_dim: int = None  # type: ignore[assignment]
    dense_logit_scale: float | int = 40.0
    templates: str | Sequence[str] = "imagenet80"
    distillation: dict[str, Any] | None = None
    output_pooled: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if __name__.startswith("spar_hf."):
            # With the library installed, the pipeline's code in a checkpoint is not needed. Left in the configuration, it
            # would make `pipeline` ask for trust.
            kwargs.pop("custom_pipelines", None)
        # checked before transformers builds the sub-configurations, which answers unknown types with a KeyError
        for key, known in (("backbone_config", BACKBONE_READOUTS), ("text_config", TEXT_WIDTHS)):
            sub_config = getattr(self, key)
            if isinstance(sub_config, dict):
                sub_config = {"model_type": self.sub_configs_defaults[key].model_type, **sub_config}
                setattr(self, key, sub_config)
                _check_choice(f"`{key}` of type", sub_config["model_type"], known)
            elif isinstance(sub_config, PreTrainedConfig):
                _check_choice(f"`{key}` of type", sub_config.model_type, known)
            elif sub_config is not None:
                raise ValueError(f"`{key}` must be a dict or a configuration of transformers, got {sub_config!r}.")
        super().__post_init__(**kwargs)
        stages = [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.stage_names = ["stem", *stages, "features"]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

        readouts = BACKBONE_READOUTS[self.backbone_config.model_type]
        if self.readout is None:
            self.readout = readouts[0 if self.text_config is None else -1]
        _check_choice("`readout`", self.readout, readouts)

        resamplings = READOUT_RESAMPLINGS[self.readout]
        self.position_resampling = resamplings[0] if self.position_resampling is None else self.position_resampling
        _check_choice("`position_resampling`", self.position_resampling, resamplings)

        self.check_position_extent()

        attribute = READOUT_WIDTHS[self.readout]
        width = getattr(self.backbone_config, attribute, None)
        if width is None:
            raise ValueError(
                f"The read-out {self.readout!r} needs a head, and `backbone_config` has no `{attribute}`. "
                "`spar-hf convert --family radio` makes a model with one."
            )
        self.projection_dim = width if self.projection_dim is None else self.projection_dim
        if self.projection_dim != width:
            raise ValueError(
                f"The backbone's dense features have {width} dimensions, so `projection_dim` cannot be "
                f"{self.projection_dim}. Leave it out."
            )
        if self.text_config is not None:
            text_attribute = TEXT_WIDTHS[self.text_config.model_type]
            text_width = getattr(self.text_config, text_attribute)
            expected = width * TEXT_PARTS.get(self.readout, 1)
            if text_width != expected:
                raise ValueError(
                    f"The text tower ends in {text_width} dimensions, but dense features of {width} need {expected}. Set "
                    f"`text_config.{text_attribute}={expected}`."
                )

        self.check_dense_logit_scale()
        if isinstance(read_templates(self.templates), TemplateChoice):
            raise ValueError(
                "The `templates` of a checkpoint are the name of a set or a list. Give a choice for each name to the "
                "pipeline, as its `templates`."
            )
        resolve_templates(self.templates)
        if not isinstance(self.templates, str):
            self.templates = list(self.templates)  # as JSON gives it back

    def check_dense_logit_scale(self) -> None:
        """
        Raises:
            ValueError: `dense_logit_scale` is not a positive number. Models check again, because attributes can be set
                later.
        """
        scale = self.dense_logit_scale
        if not isinstance(scale, (float, int)) or not 0 < scale < math.inf:
            raise ValueError(f"`dense_logit_scale` must be a positive number, such as 40.0, got {scale!r}.")

    def check_position_extent(self) -> None:
        """
        Raises:
            ValueError: `position_extent` is not a multiple of the patch of at least the pre-training size, or the positions
                are not `"bicubic"`. Models check again, because attributes can be set later.
        """
        extent = self.position_extent
        if extent is not None and self.position_resampling != "bicubic":
            raise ValueError(
                f"`position_extent` needs 'bicubic' positions, and these are {self.position_resampling!r}. Leave it out."
            )
        if extent is not None and (not isinstance(extent, int) or extent < self.image_size or extent % self.patch_size):
            raise ValueError(
                f"`position_extent` {extent!r} must be a number of pixels, a multiple of the patch ({self.patch_size}) and "
                f"at least the pre-training size ({self.image_size})."
            )

    @classmethod
    def default_config_fields(cls) -> dict[str, Any]:
        # The text tower is written to config.json in full. The short form is the difference from a default
        # SiglipTextConfig(), and creating that warns of token ids outside its vocabulary.
        fields = super().default_config_fields()
        fields.pop("text_config", None)
        return fields

    # properties of the backbone, for all families
    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """What `Trainer` neither gives to `compute_metrics` nor holds for the whole evaluation set."""
        beside_logits = ["text_embeds", "feature_map", "geometry"] if self.text_config is not None else []
        return [*beside_logits, "hidden_states", "attentions"]

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.backbone_config.patch_size

    @property
    def image_size(self) -> int:
        """Side in pixels of the backbone's pre-training images: the default window of the teacher."""
        if self.backbone_config.model_type == "siglip2_vision_model":  # NaFlex gives the number of patches
            return math.isqrt(self.backbone_config.num_patches) * self.patch_size
        return self.backbone_config.image_size

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's tokens."""
        return self.backbone_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the backbone."""
        return self.backbone_config.num_hidden_layers


__all__ = ["SparConfig"]
