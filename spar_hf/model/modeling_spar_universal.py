"""Panoptic, instance and semantic segmentation: a mask-classification head on SPAR features."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.models.eomt.modeling_eomt import EomtScaleLayer
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .backbone_spar import SparBackbone
from .configuration_spar_universal import SparUniversalConfig
from .execution import as_tensor, check_batch, own_weights, refuse_labels, with_output_flags
from .modeling_spar import SparPreTrainedModel, SparVisionModel, pad_to_patches

# `pipeline("image-segmentation")` looks up here which models it supports, and logs others as errors
MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES["spar_universal"] = "SparForUniversalSegmentation"
MASK_CELLS = 4  # mask cells per patch and axis: two upscaling layers by 2


@dataclass
class SparUniversalSegmentationOutput(ModelOutput):
    """
    Output of [`SparForUniversalSegmentation`], for the `post_process_...` methods of [`SparUniversalImageProcessorPil`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            With `mask_labels` and `class_labels`: Mask2Former's loss, over all layers of the decoder.
        class_queries_logits (`torch.FloatTensor` of shape `(batch, queries, classes + 1)`):
            Class logits of every query; the last class is "no segment".
        masks_queries_logits (`torch.FloatTensor` of shape `(batch, queries, 4 * h, 4 * w)`):
            Mask logits of every query, over the padded image of `h = ceil(height / patch)` by
            `w = ceil(width / patch)` patches, with four cells per patch and axis.
        mask_sizes (`torch.FloatTensor` of shape `(batch, 2)`):
            Height and width of the image in mask cells, not always whole numbers. Cells beyond are padding.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            Of the backbone, see [`SparVisionModelOutput`].
    """

    loss: torch.Tensor | None = None
    class_queries_logits: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None
    mask_sizes: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SparUniversalPreTrainedModel(SparPreTrainedModel, Mask2FormerPreTrainedModel):
    """Base class: the code named by saved folders, and the initialisation of Mask2Former's and EoMT's modules."""

    config_class = SparUniversalConfig
    config: Any  # the modules of the head read its fields under the names of their own configurations
    input_modalities = ["image"]  # type: ignore[assignment]
    _auto_map = {
        "AutoConfig": "configuration_spar_universal.SparUniversalConfig",
        "AutoModelForUniversalSegmentation": "modeling_spar_universal.SparForUniversalSegmentation",
        # the class that transformers' pipeline("image-segmentation") asks for
        "AutoModelForImageSegmentation": "modeling_spar_universal.SparForUniversalSegmentation",
        "AutoImageProcessor": "image_processing_spar_universal.SparUniversalImageProcessorPil",
    }

    _no_split_modules = ["EomtScaleLayer", "Mask2FormerTransformerModule"]

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        # Mask2Former hands its layers lists of tensors, which lose their gradients in re-entrant checkpointing
        for module in self.modules():
            if isinstance(module, Mask2FormerMaskedAttentionDecoderLayer) and module.gradient_checkpointing:
                layer: Any = module
                layer._gradient_checkpointing_func = partial(layer._gradient_checkpointing_func, use_reentrant=False)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.BatchNorm2d):  # ours has no weight, which Mask2Former's initialisation needs
            PreTrainedModel._init_weights(self, module)
            return
        super()._init_weights(module)
        if isinstance(module, EomtScaleLayer):  # as in EoMT; Mask2Former's small weights would vanish in the GELU
            for convolution in (module.conv1, module.conv2):
                init.kaiming_uniform_(convolution.weight, a=5**0.5)
        if isinstance(
            module, SparForUniversalSegmentation
        ):  # as in Mask2Former: positions would dominate smaller features
            init.xavier_uniform_(module.projection.weight)


class SparForUniversalSegmentation(SparUniversalPreTrainedModel):
    """
    A [`SparBackbone`] and a mask-classification head: every query predicts a class and a mask, at any resolution.

    Features of the chosen stages are standardised (batch norm) and projected. Two upscaling layers of EoMT make a simple
    feature pyramid (half, whole, double and fourfold the patch grid). Mask2Former's masked-attention decoder reads the three
    coarser levels, and the product of query and finest level is the mask.

    A decoder on top of the backbone, instead of EoMT's queries inside the last blocks, has two reasons. Those blocks would
    have to be trained, with other tokens than the distilled ones, so that base and student could not be compared by their
    features. And every family of backbones would need its own code. Here the backbone is unchanged and may stay frozen.

    Source: `Mask2FormerTransformerModule`, `Mask2FormerLoss` (arXiv 2112.01527) and `EomtScaleLayer` (arXiv 2503.19108)
    in transformers; the simple feature pyramid of ViTDet (arXiv 2203.16527).

    Example:

    ```python
    >>> import torch
    >>> from spar_hf import SPAR_TINY, SparForUniversalSegmentation

    >>> model = SparForUniversalSegmentation.from_spar(SPAR_TINY, id2label={0: "sky", 1: "dog"}, hidden_dim=64).eval()
    >>> with torch.no_grad():
    ...     outputs = model(torch.zeros(1, 3, 203, 327))
    >>> outputs.class_queries_logits.shape, outputs.masks_queries_logits.shape
    (torch.Size([1, 100, 3]), torch.Size([1, 100, 52, 84]))
    >>> outputs.mask_sizes  # the image ends within the masks' last cells
    tensor([[50.7500, 81.7500]])
    ```"""

    def __init__(self, config: SparUniversalConfig):
        super().__init__(config)
        head = self.config
        self.vision_model = SparBackbone._from_config(head.backbone_config)
        channels = sum(self.vision_model.channels)
        # all features share an offset far larger than the differences between classes
        self.feature_norm = nn.BatchNorm2d(channels, affine=False)
        self.projection = nn.Conv2d(channels, head.hidden_dim, kernel_size=1)
        self.upscale = nn.ModuleList([EomtScaleLayer(head) for _ in range(2)])
        self.decoder = Mask2FormerTransformerModule(head.hidden_dim, head)
        self.class_predictor = nn.Linear(head.hidden_dim, head.num_labels + 1)
        self.post_init()

    @classmethod
    def from_spar(
        cls,
        pretrained_model_name_or_path: "str | SparVisionModel",
        *,
        out_features: list[str] | None = None,
        **kwargs,
    ) -> "SparForUniversalSegmentation":
        """
        A new, untrained head on the vision tower of a SPAR model or a backbone of transformers.

        Args:
            pretrained_model_name_or_path (`str` or [`SparVisionModel`]):
                Folder or hub id that [`SparVisionModel.from_backbone`] reads, or the model itself.
            out_features (`list[str]`, *optional*):
                Stages of [`SparBackbone`] that the head reads; the dense features by default.
            kwargs: `num_labels` or `id2label`, and settings of the head, see [`SparUniversalConfig`].

        Raises:
            ValueError: an unsupported model, such as one with a trained head.
        """
        source = pretrained_model_name_or_path
        vision_model = source if isinstance(source, SparVisionModel) else SparVisionModel.from_backbone(source)
        backbone_config = {**vision_model.config.to_dict(), "out_features": out_features or ["features"]}
        backbone_config.pop("out_indices", None)
        model = cls(SparUniversalConfig(backbone_config=backbone_config, dtype="float32", **kwargs))
        model.vision_model.load_state_dict(vision_model.state_dict())
        return model

    @torch.no_grad()
    def calibrate(self, images) -> None:
        """
        Set the batch norm's mean and variance to those of the features over all patches of `images`, an iterable of
        `pixel_values` `(batch, 3, height, width)` of any sizes. Otherwise they would be estimated from training batches.

        Raises:
            ValueError: `images` is empty.
        """
        training = self.training
        self.eval()
        # in float64, because large squares are subtracted, and so on the CPU, because not every accelerator has float64
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for pixel_values in images:
            features = self.features(pixel_values).cpu().double().transpose(0, 1).flatten(1)  # (channels, patches)
            count += features.shape[1]
            total = total + features.sum(1)
            squares = squares + features.square().sum(1)
        self.train(training)
        if not count:
            raise ValueError("There are no images to calibrate on; pass at least one batch.")
        mean, variance = total / count, (squares - total.square() / count) / max(1, count - 1)
        self.feature_norm.load_state_dict({"running_mean": mean, "running_var": variance}, strict=False)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The chosen feature maps side by side: `(batch, channels, ceil(height / patch), ceil(width / patch))`."""
        return torch.cat(self.vision_model(pixel_values).feature_maps, dim=1)

    def segment_loss(
        self,
        class_logits: list[torch.Tensor],
        mask_logits: tuple[torch.Tensor, ...],
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
    ) -> torch.Tensor:
        """Mask2Former's loss, summed over the predictions before the first layer of the decoder and after each."""
        config = self.config
        patch_size = config.backbone_config.patch_size
        weights = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        # built here, so that inference does not need SciPy, which the matching uses
        criterion = Mask2FormerLoss(config=config, weight_dict=weights).to(class_logits[0].device)
        # the predicted masks cover the padded image, and the loss compares positions relative to it
        mask_labels = [pad_to_patches(masks.float(), patch_size) for masks in mask_labels]
        predictions = [
            {"class_queries_logits": classes.float(), "masks_queries_logits": masks.float()}
            for classes, masks in zip(class_logits, mask_logits, strict=True)
        ]
        losses = criterion(
            **predictions[-1],
            mask_labels=mask_labels,
            class_labels=[labels.long() for labels in class_labels],
            auxiliary_predictions=predictions[:-1],
        )
        return torch.stack(
            [weight * value for name, weight in weights.items() for key, value in losses.items() if name in key]
        ).sum()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        mask_labels: list[torch.Tensor] | None = None,
        class_labels: list[torch.Tensor] | None = None,
        original_sizes: list[tuple[int, int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparUniversalSegmentationOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`):
                Normalised images, any height and width.
            mask_labels (`list[torch.Tensor]`, *optional*):
                Per image the masks of its segments, `(segments, height, width)`, 0 or 1, in the size of `pixel_values`.
            class_labels (`list[torch.LongTensor]`, *optional*):
                Per image the classes of its segments, integers `(segments,)`.
            original_sizes (`list[tuple[int, int]]`, *optional*):
                Ignored; accepted because the image processor returns it beside `pixel_values`.

        Returns:
            [`SparUniversalSegmentationOutput`].

        Raises:
            ValueError: only one of the two labels; labels of another number or size than the images, or of other values;
                an image without segments, or with more segments than queries; `labels`, for which there is no loss.
        """
        refuse_labels(self, kwargs)
        check_batch(pixel_values)
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("Give both `mask_labels` and `class_labels`, or neither.")
        if mask_labels is not None and class_labels is not None:
            self.check_labels(pixel_values, mask_labels, class_labels)
        vision_outputs = self.vision_model(pixel_values, return_dict=True, **with_output_flags(self.config, kwargs))
        features = torch.cat(vision_outputs.feature_maps, dim=1)  # (batch, channels, h, w)
        features = self.projection(self.feature_norm(features))  # -> (batch, hidden, h, w)
        double = self.upscale[0](features)  # -> (batch, hidden, 2h, 2w)
        fourfold = self.upscale[1](double)  # -> (batch, hidden, 4h, 4w)
        half = nn.functional.max_pool2d(features, kernel_size=2, ceil_mode=True)
        with own_weights(self.decoder):  # transformers' decoder reads embeddings past their `forward`
            outputs = self.decoder([half, features, double], fourfold)
        # (queries, batch, hidden) -> (batch, queries, classes + 1)
        class_logits = [self.class_predictor(state.transpose(0, 1)) for state in outputs.intermediate_hidden_states]
        loss = None
        if mask_labels is not None and class_labels is not None:
            loss = self.segment_loss(class_logits, outputs.masks_queries_logits, mask_labels, class_labels)
        batch, _, height, width = pixel_values.shape
        cells_per_pixel = MASK_CELLS / self.config.backbone_config.patch_size
        return SparUniversalSegmentationOutput(
            loss=loss,
            class_queries_logits=class_logits[-1],
            masks_queries_logits=outputs.masks_queries_logits[-1],
            mask_sizes=as_tensor([height, width], fourfold.device).repeat(batch, 1) * cells_per_pixel,
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
        )

    def check_labels(self, pixel_values, mask_labels, class_labels) -> None:
        """Raise `ValueError` for labels that do not fit the images or the model, see `forward`."""
        batch, _, *size = pixel_values.shape
        if not len(mask_labels) == len(class_labels) == batch:
            raise ValueError(
                f"{batch} images, but {len(mask_labels)} `mask_labels` and {len(class_labels)} `class_labels`."
            )
        for masks, classes in zip(mask_labels, class_labels, strict=True):
            if masks.ndim != 3 or list(masks.shape[1:]) != size or classes.shape != masks.shape[:1]:
                raise ValueError(
                    f"`mask_labels` of shape {tuple(masks.shape)} and `class_labels` of shape {tuple(classes.shape)} do "
                    f"not belong to an image of {size[0]}×{size[1]} pixels: they must be (segments, height, width) and "
                    "(segments,)."
                )
            if not 0 < len(classes) <= self.config.num_queries:
                raise ValueError(
                    f"An image has {len(classes)} segments; it must have at least 1 and at most `num_queries`, "
                    f"{self.config.num_queries}. Leave it out, merge the smallest, or raise `num_queries`."
                )
            if int(classes.min()) < 0 or int(classes.max()) >= self.config.num_labels:
                raise ValueError(
                    f"`class_labels` lie in {int(classes.min())} to {int(classes.max())}, but the model has "
                    f"{self.config.num_labels} classes, from 0. Leave ignored segments out."
                )
            if classes.is_floating_point() or masks.max() > 1:
                raise ValueError(
                    f"`class_labels` must be integers and `mask_labels` 0 or 1; they are {classes.dtype} and up to "
                    f"{float(masks.max()):g}."
                )


__all__ = ["SparForUniversalSegmentation", "SparUniversalSegmentationOutput"]
