"""Panoptic, instance and semantic segmentation on SPAR features: a mask-classification head of transformers' own modules."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.models.eomt.modeling_eomt import EomtScaleLayer
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)
from transformers.utils import ModelOutput, can_return_tuple

from .backbone_spar import SparBackbone
from .configuration_spar_universal import SparUniversalConfig
from .modeling_spar import SparPreTrainedModel, SparVisionModel, pad_to_patches

# `pipeline("image-segmentation")` looks up here which models it supports, and logs others as errors
MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES["spar_universal"] = "SparForUniversalSegmentation"
MASK_CELLS = 4  # cells of the masks per patch and axis: two upscaling layers, each by 2


@dataclass
class SparUniversalSegmentationOutput(ModelOutput):
    """
    Output of [`SparForUniversalSegmentation`], for the `post_process_...` methods of [`SparUniversalImageProcessorPil`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            With `mask_labels` and `class_labels`: Mask2Former's, over all layers of the decoder.
        class_queries_logits (`torch.FloatTensor` of shape `(batch, queries, classes + 1)`):
            Class of every query; the last is "no segment".
        masks_queries_logits (`torch.FloatTensor` of shape `(batch, queries, 4 * h, 4 * w)`):
            Mask of every query, before the sigmoid, over the padded image of `h = ceil(height / patch)` by
            `w = ceil(width / patch)` patches: four cells per patch and axis.
        mask_sizes (`torch.FloatTensor` of shape `(batch, 2)`):
            Height and width of the image in cells of the masks, often a fraction of one; what lies beyond is padding.
    """

    loss: torch.Tensor | None = None
    class_queries_logits: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None
    mask_sizes: torch.Tensor | None = None


class SparUniversalPreTrainedModel(SparPreTrainedModel, Mask2FormerPreTrainedModel):
    """What a saved folder says of its code, and the initialisation of Mask2Former's and EoMT's modules."""

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

    def _initialize_weights(self, module, is_custom_code: bool = False):
        # For code outside of transformers, layers that hold all their weights in sub-modules are passed by, and these start
        # as any linear layer does. All initialisation here goes through transformers' own, which needs no such care.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.BatchNorm2d):  # ours has no weight, which Mask2Former's initialisation would look for
            PreTrainedModel._init_weights(self, module)
            return
        super()._init_weights(module)
        if isinstance(module, EomtScaleLayer):  # as EoMT does; Mask2Former's small weights would vanish in its GELU
            for convolution in (module.conv1, module.conv2):
                init.kaiming_uniform_(convolution.weight, a=5**0.5)
        if isinstance(module, SparForUniversalSegmentation):  # as Mask2Former's own: else positions drown the features
            init.xavier_uniform_(module.projection.weight)


class SparForUniversalSegmentation(SparUniversalPreTrainedModel):
    """
    A [`SparBackbone`] and a mask-classification head: queries that each become a class and a mask, at any resolution.

    Features of the chosen stages are standardised (batch norm) and projected; two upscaling layers of EoMT make a simple
    feature pyramid of them (half, whole, double and fourfold the patch grid), Mask2Former's masked-attention decoder
    reads its three coarser levels, and the product of query and finest level is the mask.

    Why a decoder over the backbone API and not EoMT's queries inside the last blocks: those blocks would have to be
    trained and would see other tokens than the ones that SPAR distilled, so that base and student could no longer be
    compared by their features; and every family of backbones, whose last block differs, would need code of its own. Here
    the backbone stays as it is, and may stay frozen.

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
        # All features share an offset that is far larger than what tells two classes apart.
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
        A new head, to be trained, on the vision tower of a SPAR model or of an untouched backbone of transformers.

        Args:
            pretrained_model_name_or_path (`str` or [`SparVisionModel`]):
                Folder or hub id of what [`SparVisionModel.from_backbone`] reads, or the model itself.
            out_features (`list[str]`, *optional*):
                Stages of [`SparBackbone`] that the head reads; the dense features by default.
            kwargs: `num_labels` or `id2label`, and settings of the head, see [`SparUniversalConfig`].

        Raises:
            ValueError: the source is no model that SPAR reads, e.g. one with a trained head.
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
        Measure mean and variance of the features over all patches of `images`, an iterable of `pixel_values`
        `(batch, 3, height, width)` of any sizes: what batch norm otherwise learns from large batches while it trains.

        Raises:
            ValueError: `images` is empty.
        """
        training = self.training
        self.eval()
        # in float64 and so on the CPU: not every accelerator has it, and squares of a large offset are taken from each other
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for pixel_values in images:
            features = self.features(pixel_values).cpu().double().transpose(0, 1).flatten(1)  # (channels, patches)
            count += features.shape[1]
            total = total + features.sum(1)
            squares = squares + features.square().sum(1)
        self.train(training)
        if not count:
            raise ValueError("There are no images to measure the features on.")
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
        # Built here, so that inference does without the SciPy that its matching needs.
        criterion = Mask2FormerLoss(config=config, weight_dict=weights).to(class_logits[0].device)
        # The loss compares masks by relative position, and those of the model cover the padded image.
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
    ) -> SparUniversalSegmentationOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`):
                Normalised images, any height and width.
            mask_labels (`list[torch.Tensor]`, *optional*):
                Per image the masks of its segments, `(segments, height, width)`, 0 or 1, in the size of `pixel_values`.
            class_labels (`list[torch.LongTensor]`, *optional*):
                Per image the classes of its segments, `(segments,)`.
            original_sizes (`list[tuple[int, int]]`, *optional*):
                Not used: what the image processor gives beside, so that all it gives can be handed on.

        Returns:
            [`SparUniversalSegmentationOutput`].

        Raises:
            ValueError: one of the labels without the other, or of another number or size than the images; an image
                without a segment, or with more than there are queries.
        """
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("Give both `mask_labels` and `class_labels`, or neither.")
        if mask_labels is not None and class_labels is not None:
            self.check_labels(pixel_values, mask_labels, class_labels)
        features = self.projection(self.feature_norm(self.features(pixel_values)))  # (batch, hidden, h, w)
        double = self.upscale[0](features)  # -> (batch, hidden, 2h, 2w)
        fourfold = self.upscale[1](double)  # -> (batch, hidden, 4h, 4w)
        half = nn.functional.max_pool2d(features, kernel_size=2, ceil_mode=True)
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
            mask_sizes=torch.tensor([[height, width]], device=fourfold.device).repeat(batch, 1) * cells_per_pixel,
        )

    def check_labels(self, pixel_values, mask_labels, class_labels) -> None:
        batch, _, *size = pixel_values.shape
        if not len(mask_labels) == len(class_labels) == batch:
            raise ValueError(
                f"There are {batch} images, but {len(mask_labels)} `mask_labels` and {len(class_labels)} `class_labels`."
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
                    f"An image has {len(classes)} segments; it must have at least one and at most as many as there are "
                    f"queries ({self.config.num_queries}). Leave it out, merge the smallest, or raise `num_queries`."
                )
            if int(classes.min()) < 0 or int(classes.max()) >= self.config.num_labels:
                raise ValueError(
                    f"`class_labels` lie in {int(classes.min())} to {int(classes.max())}, but the model has "
                    f"{self.config.num_labels} classes, from 0. Leave void segments out."
                )


__all__ = ["SparForUniversalSegmentation", "SparUniversalSegmentationOutput"]
