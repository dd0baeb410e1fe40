"""SPAR models: dense features in one pass at any resolution, and with a text tower, segmentation by class names."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbone_sources import check_complete, check_finite, load_source_config, read_backbone, whole_files
from .configuration_spar import SparConfig
from .execution import HALVES, as_tensor, check_batch, full_precision, refuse_labels, with_output_flags
from .file_modes import follow_umask
from .readouts import READOUTS
from .saved_code import copy_code, saved_code
from .text_towers import TEXT_MODELS, embed_tokens


@dataclass
class SparVisionModelOutput(ModelOutput):
    """
    Output of [`SparVisionModel`] and [`SlidingWindowTeacher`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`):
            All tokens after the backbone's final norm. `None` from the teacher.
        pooler_output (`torch.FloatTensor` of shape `(batch, hidden_size)`, *optional*):
            The backbone's image embedding; only with `output_pooled=True`. `(batch, projection_dim)` for CLIP,
            `(batch, 2 * hidden_size)` for dino.txt.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            With `output_hidden_states=True`: the embeddings and the output of each layer, each
            `(batch, tokens, hidden_size)`. With an index or a list of indices only those, and `None` for the others.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            With `output_attentions=True` and eager attention: `(batch, heads, tokens, tokens)` per layer.
        feature_map (`torch.FloatTensor` of shape `(batch, dim, ceil(height / patch), ceil(width / patch))`):
            Dense features, not normalised.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    feature_map: torch.Tensor | None = None


@dataclass
class SparOpenVocabSegmentationOutput(ModelOutput):
    """
    Output of [`SparForOpenVocabSegmentation`].

    Args:
        logits (`torch.FloatTensor` of shape `(batch, names, ceil(height / patch), ceil(width / patch))`):
            Cosine of patch feature and text embedding times `dense_logit_scale`.
        text_embeds (`torch.FloatTensor` of shape `(names, dim)`):
            The text embeddings used, L2-normalised.
        feature_map (`torch.FloatTensor` of shape `(batch, dim, ceil(height / patch), ceil(width / patch))`):
            Dense features, not normalised.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            Of the vision tower, see [`SparVisionModelOutput`].
        geometry (`torch.LongTensor` of shape `(batch, 3)`):
            Height and width of `pixel_values` and side of a patch, in pixels: `post_process_semantic_segmentation` of the
            image processor makes masks of it, a class for each name.
    """

    logits: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    feature_map: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    geometry: torch.Tensor | None = None


def pad_to_patches(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """
    Pad with zeros right and bottom to a multiple of the patch: `(..., height, width)` ->
    `(..., ceil(height / patch) * patch, ceil(width / patch) * patch)`.

    The top left corner stays in place, so patch `(i, j)` begins at pixel `(i * patch, j * patch)`.
    """
    height, width = pixel_values.shape[-2:]
    # not with `%`: torch.export and inductor can reason about ceil(side / patch) * patch with symbolic sizes
    padded_height, padded_width = ((side + patch_size - 1) // patch_size * patch_size for side in (height, width))
    return nn.functional.pad(pixel_values, (0, padded_width - width, 0, padded_height - height))


class SparPreTrainedModel(PreTrainedModel):
    """Base class of all SPAR models: configuration class, attention back ends, loading and saving."""

    config: SparConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    accepts_loss_kwargs = False  # no loss of ours divides by the steps of gradient accumulation, so `Trainer` has to
    # `auto_map` and `custom_pipelines` of config.json: what `trust_remote_code=True` loads from a saved folder
    _auto_map = {
        "AutoConfig": "configuration_spar.SparConfig",
        "AutoModel": "modeling_spar.SparVisionModel",
        "AutoBackbone": "backbone_spar.SparBackbone",
        "AutoImageProcessor": "image_processing_spar.SparImageProcessorPil",
    }
    _custom_pipelines: dict[str, dict[str, Any]] = {}
    unused_parameters: tuple[str, ...] = ()  # parts of names of parameters that no gradient reaches

    def freeze_unused(self) -> None:
        """Make parameters that no gradient reaches not trainable: DistributedDataParallel would wait for their gradients."""
        for model in (module for module in self.modules() if isinstance(module, SparPreTrainedModel)):
            for name, parameter in model.named_parameters():
                if any(part in name for part in model.unused_parameters):
                    parameter.requires_grad_(False)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, with the code of the model beside the weights, for `trust_remote_code=True`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.auto_map, self.config.custom_pipelines, files = saved_code(self)
        copy_code(files, folder)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            del self.config.auto_map, self.config.custom_pipelines
        for path in folder.glob("*.safetensors"):
            follow_umask(path)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers skips modules without weights of their own, such as an MLP, in custom code
        super()._initialize_weights(module)

    def _get_files_timestamps(self, working_dir):
        # `push_to_hub` sends what changed after this call. The code was copied before it, so it is left out here.
        timestamps, code = super()._get_files_timestamps(working_dir), saved_code(self)[2]
        return {name: time for name, time in timestamps.items() if name not in code}

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """
        As in transformers, but missing weights are an error instead of a warning, because a newly initialised tower gives
        masks that look plausible. A class lists weights that may be missing (a head to be trained) in
        `_keys_to_ignore_on_load_missing`.

        Raises:
            RuntimeError: weights are missing or have another shape.
            OSError: a file is missing, cut or damaged.
            ValueError: weights hold NaN or infinity.
        """
        with whole_files(args[0] if args else kwargs.get("pretrained_model_name_or_path", "the checkpoint")):
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, loading_info = loaded
        name = model.name_or_path or "The checkpoint"
        check_complete(loading_info["missing_keys"], name, cls.__name__)
        check_finite(model, name)
        model.freeze_unused()  # loading makes new parameters
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def from_backbone(cls, pretrained_model_name_or_path: str, *, spar_config: dict[str, Any] | None = None, **kwargs):
        """
        Build a SPAR model from a pretrained backbone of transformers: the teacher of a distillation, or the baseline of an
        evaluation. SigLIP, SigLIP2 (fixed resolution and NaFlex), CLIP, OpenCLIP in transformers' format, MetaCLIP 2,
        TIPSv2, DINOv3, DINOv2 with registers, C-RADIO.

        Args:
            pretrained_model_name_or_path (`str`):
                Hub id (`google/siglip2-base-patch16-512`) or local folder. A SPAR folder loads as by `from_pretrained`.
            spar_config (`dict`, *optional*):
                Further fields of [`SparConfig`], e.g. `{"templates": "short"}`.
            kwargs: options of `from_pretrained` of the backbone's class (`dtype`, `revision`, `token`, …).

        Raises:
            ValueError: an unsupported model type, such as that of a trained head; a backbone without text tower for a
                two-tower class; `spar_config` for a SPAR folder; weights that hold NaN or infinity.
            OSError: neither a local folder nor a model on the hub.
            RuntimeError: the folder lacks weights.

        Example:

        ```python
        >>> from transformers import DINOv3ViTConfig, DINOv3ViTModel
        >>> from spar_hf import SparVisionModel

        >>> DINOv3ViTModel(DINOv3ViTConfig(num_hidden_layers=1)).save_pretrained("dinov3")
        >>> SparVisionModel.from_backbone("dinov3").config.readout
        'dinov3'
        ```"""
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        source_config = load_source_config(pretrained_model_name_or_path, **hub)
        if source_config.model_type == SparConfig.model_type:
            if spar_config:
                raise ValueError(
                    f"`spar_config` is for backbones of transformers, but {pretrained_model_name_or_path} is a SPAR folder "
                    "with a configuration of its own. Leave it out."
                )
            return cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
        config, weights, dtype = read_backbone(pretrained_model_name_or_path, source_config, spar_config, **kwargs)
        model: Any = cls(config)  # refuses a two-tower class without text tower
        # parameters only: RoPE's frequencies stay float32, as when loaded from a file
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.name_or_path = str(pretrained_model_name_or_path)
        if isinstance(model, SparVisionModel):
            inside = "vision_model."
            weights = {name[len(inside) :]: tensor for name, tensor in weights.items() if name.startswith(inside)}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        # CLIP's softmax has no bias, unlike the sigmoid loss
        missing = [name for name in missing if name != "logit_bias"]
        if missing or unexpected:
            raise RuntimeError(f"The weights do not fit the model: missing {missing}, unexpected {unexpected}.")
        check_finite(model, model.name_or_path)
        return model.eval()


class SparVisionModel(SparPreTrainedModel):
    """
    Dense features of an image of any height and width in one forward pass.

    The image is padded with zeros right and bottom to a multiple of the patch, the position table is resampled to
    the resulting grid, and every patch gets one feature vector in the space of the text embeddings.

    Parameters that dense features do not depend on (`unused_parameters`, such as the probe of the pooling head) are not
    trainable. With `config.output_pooled`, those of the pooling head are.

    Source: SPAR (arXiv 2604.02252), section 3. The backbone is a model of transformers, see `spar_hf.model.readouts`.

    Example:

    ```python
    >>> import torch
    >>> from transformers import AutoModel
    >>> import spar_hf

    >>> model = AutoModel.from_pretrained(spar_hf.SPAR_TINY)
    >>> with torch.no_grad():
    ...     model(torch.zeros(1, 3, 200, 330)).feature_map.shape
    torch.Size([1, 192, 13, 21])
    ```"""

    # the text tower or head of a folder is skipped on purpose, so no warning is needed
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^logit_scale$", r"^logit_bias$", r"^classifier\."]
    # only the keys matter here: the backbone's own table names the classes whose outputs are recorded
    _can_record_outputs = {"hidden_states": GradientCheckpointingLayer, "attentions": GradientCheckpointingLayer}

    def __init__(self, config: SparConfig):
        if config.text_config is not None:
            # so that a vision tower saved alone names no text tower
            config = copy.copy(config)
            config.text_config = None
        super().__init__(config)
        config.check_position_extent()
        self.backbone = READOUTS[config.readout]._from_config(config.backbone_config)
        names = "unused_with_pooling" if config.output_pooled else "unused_parameters"
        self.unused_parameters = getattr(self.backbone, names)
        self.post_init()
        self.freeze_unused()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.FloatTensor, output_pooled: bool | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> SparVisionModelOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`):
                Normalised images, any height and width.
            output_pooled (`bool`, *optional*, defaults to `config.output_pooled`):
                Whether to run the backbone's pooling head as well and return `pooler_output`.

        Returns:
            [`SparVisionModelOutput`] with `feature_map` `(batch, dim, ceil(height / patch), ceil(width / patch))`.

        Raises:
            ValueError: `pixel_values` are not a batch of images, or labels are given.
        """
        check_batch(pixel_values)
        refuse_labels(self, kwargs)
        output_pooled = self.config.output_pooled if output_pooled is None else output_pooled
        padded = pad_to_patches(pixel_values.to(self.dtype), self.config.patch_size)
        height, width = (side // self.config.patch_size for side in padded.shape[-2:])
        extent = self.config.position_extent and self.config.position_extent // self.config.patch_size
        hidden_states = self.backbone.embed(padded, self.config.position_resampling, extent)
        if hidden_states.dtype in HALVES:  # the sum over blocks is not rounded after each, see docs/precision.md
            hidden_states = hidden_states.float()
        last_hidden_state, features, pool_input = self.backbone.encode(hidden_states, (height, width), **kwargs)
        return SparVisionModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=self.backbone.pool(pool_input) if output_pooled else None,
            # (batch, h * w, dim) -> (batch, dim, h, w)
            feature_map=features.transpose(1, 2).unflatten(2, (height, width)),
        )


class SparForOpenVocabSegmentation(SparPreTrainedModel):
    """
    Two towers: a [`SparVisionModel`] (`.vision_model`) and a text model of transformers (`.text_model`). The cosine of
    patch features and text embeddings gives one logit map per name.

    Source: SPAR (arXiv 2604.02252), section 3.

    Raises:
        ValueError: the configuration has no `text_config`, e.g. a vision-only folder.

    Example:

    ```python
    >>> import torch
    >>> from transformers import AutoTokenizer
    >>> from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation

    >>> model = SparForOpenVocabSegmentation.from_pretrained(SPAR_TINY)
    >>> tokenizer = AutoTokenizer.from_pretrained(SPAR_TINY)
    >>> names = tokenizer(["road", "sky"], padding="max_length", return_tensors="pt")
    >>> with torch.no_grad():
    ...     model(torch.zeros(1, 3, 200, 330), **names).logits.shape
    torch.Size([1, 2, 13, 21])
    ```"""

    input_modalities = ["image", "text"]
    _auto_map = {
        **SparPreTrainedModel._auto_map,
        "AutoModelForSemanticSegmentation": "modeling_spar.SparForOpenVocabSegmentation",
        "AutoProcessor": "processing_spar.SparProcessor",
    }
    unused_parameters = ("logit_scale", "logit_bias")  # they belong to the image-text loss
    _custom_pipelines = {
        "open-vocab-segmentation": {
            "impl": "pipeline.OpenVocabSegmentationPipeline",
            "pt": ["AutoModelForSemanticSegmentation"],
            "type": "multimodal",
        }
    }

    def __init__(self, config: SparConfig):
        if config.text_config is None:
            raise ValueError(
                "This configuration has no text tower (`text_config`) to embed words. Load the folder with "
                "`AutoModel`/`SparVisionModel`, or use a two-tower checkpoint."
            )
        config.check_dense_logit_scale()
        super().__init__(config)
        self.vision_model = SparVisionModel._from_config(config)
        self.text_model = TEXT_MODELS[config.text_config.model_type]._from_config(config.text_config)
        # log of the scale, and bias, as trained on image-text pairs; dense logits use config.dense_logit_scale
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))
        self.post_init()
        self.freeze_unused()
        # post_init copies the vision tower's list; here an unexpected text weight deserves a warning
        self._keys_to_ignore_on_load_unexpected = set()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.logit_scale)
            init.zeros_(self.logit_bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Embed texts in the space of the dense features.

        Args:
            input_ids (`torch.LongTensor` of shape `(names, length)`):
                Token ids, padded to `max_position_embeddings` for a SigLIP text tower.
            attention_mask (`torch.Tensor` of shape `(names, length)`, *optional*):
                Ignored by SigLIP text towers, which were trained without one. TIPSv2's reads all ids but padding by default.

        Returns:
            An output whose `pooler_output` is `(names, dim)`, not normalised.

        Raises:
            ValueError: prompts that are too long, or for a SigLIP text tower of another length.
        """
        options = with_output_flags(self.config, kwargs)
        return embed_tokens(self.text_model, input_ids, attention_mask, self.config.projection_dim, **options)

    def dense_logits(self, feature_map: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """
        Cosine of features `(batch, dim, h, w)` and text embeddings `(names, dim)`, normalised or not, times
        `dense_logit_scale`: `(batch, names, h, w)`, float32.

        Raises:
            ValueError: `text_embeds` of another shape.
        """
        dim = feature_map.shape[1]
        if text_embeds.ndim != 2 or text_embeds.shape[1] != dim:
            raise ValueError(f"`text_embeds` must be (names, {dim}), got shape {tuple(text_embeds.shape)}.")
        # always in float32: at many pixels the best names have nearly the same cosine
        text_embeds = nn.functional.normalize(text_embeds.float(), dim=-1)
        features = feature_map.float().flatten(2).transpose(1, 2)  # (batch, dim, h, w) -> (batch, h * w, dim)
        features = nn.functional.normalize(features, dim=-1)
        with full_precision(features.device):  # (names, dim) @ (batch, dim, h * w) -> (batch, names, h * w)
            cosines = text_embeds.to(features.device) @ features.transpose(1, 2)
        return cosines.unflatten(2, feature_map.shape[2:]) * self.config.dense_logit_scale

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparOpenVocabSegmentationOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`):
                Normalised images, any height and width.
            input_ids (`torch.LongTensor` of shape `(names, length)`, *optional*):
                One tokenised prompt per name. Either this or `text_embeds`.
            attention_mask (`torch.Tensor` of shape `(names, length)`, *optional*):
                See `get_text_features`.
            text_embeds (`torch.FloatTensor` of shape `(names, dim)`, *optional*):
                Precomputed text embeddings (averaged over templates, for instance), normalised or not.

        Returns:
            [`SparOpenVocabSegmentationOutput`] with `logits`
            `(batch, names, ceil(height / patch), ceil(width / patch))`.

        Raises:
            ValueError: neither or both of `input_ids` and `text_embeds` are given, one has another shape, or labels are
                given.
        """
        refuse_labels(self, kwargs)
        if (input_ids is None) == (text_embeds is None):
            raise ValueError(
                "Give either `input_ids` or `text_embeds`. In a pipeline, use this model with "
                '`pipeline("open-vocab-segmentation")`; `bake_vocabulary` makes one for `pipeline("image-segmentation")`.'
            )
        if text_embeds is None:
            text_embeds = self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
        vision_outputs = self.vision_model(pixel_values, return_dict=True, **with_output_flags(self.config, kwargs))
        logits = self.dense_logits(vision_outputs.feature_map, text_embeds)
        sides = [*pixel_values.shape[-2:], self.config.patch_size]
        return SparOpenVocabSegmentationOutput(
            logits=logits,
            text_embeds=nn.functional.normalize(text_embeds.float(), dim=-1),
            feature_map=vision_outputs.feature_map,
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
            geometry=as_tensor(sides, logits.device).expand(pixel_values.shape[0], -1),
        )


__all__ = [
    "SparForOpenVocabSegmentation",
    "SparOpenVocabSegmentationOutput",
    "SparPreTrainedModel",
    "SparVisionModel",
    "SparVisionModelOutput",
]
