"""Semantic segmentation with a fixed set of classes: a linear classifier on SPAR's dense features."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_spar_semantic import SparSemanticConfig
from .modeling_spar import SparPreTrainedModel, SparVisionModel
from .prompts import CandidateLabels, Vocabulary, embed_names
from .segmentation import WORKING_BYTES, patch_coordinates

# `pipeline("image-segmentation")` looks up here which models it supports, and logs others as errors
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["spar_semantic"] = "SparForSemanticSegmentation"


@dataclass
class SparSemanticSegmenterOutput(ModelOutput):
    """
    Output of [`SparForSemanticSegmentation`]. `SparImageProcessorPil.post_process_semantic_segmentation` makes label maps
    of it.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Mean cross entropy over the pixels with a label, 0 where no pixel has one; with `labels`.
        logits (`torch.FloatTensor` of shape `(batch, classes, ceil(height / patch), ceil(width / patch))`):
            Of every class of `config.id2label`; where it has several names, the largest of theirs.
        name_logits (`torch.FloatTensor` of shape `(batch, names, ceil(height / patch), ceil(width / patch))`, *optional*):
            Where classes have several names, the logits of all: upsampling comes before the maximum over them.
        name_to_class (`torch.LongTensor` of shape `(batch, names)`, *optional*):
            The class of each of them, the same for the whole batch.
        geometry (`torch.LongTensor` of shape `(batch, 3)`):
            Height and width of `pixel_values`, and the patch, in pixels: where the grid lies on the image.
        feature_map (`torch.FloatTensor` of shape `(batch, dim, ceil(height / patch), ceil(width / patch))`):
            Dense features, not normalised.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            See [`SparVisionModelOutput`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    name_logits: torch.Tensor | None = None
    name_to_class: torch.Tensor | None = None
    geometry: torch.Tensor | None = None
    feature_map: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SparSemanticModel(SparVisionModel):
    """The vision model of a [`SparForSemanticSegmentation`], as `AutoModel` loads it. It is saved as a `"spar"` folder."""

    config: SparSemanticConfig  # type: ignore[assignment]

    def __init__(self, config: SparSemanticConfig):
        super().__init__(config.backbone_config)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Does nothing: registered, this class would be named in the `"spar"` folder it saves, which it cannot load."""


class SparForSemanticSegmentation(SparPreTrainedModel):
    """
    A [`SparVisionModel`] (`.vision_model`) and one linear layer (`.classifier`) on its dense features, normalised or not:
    a vocabulary made into weights by [`bake_vocabulary`], or a linear probe of `training/linear_probe.py`.

    Runs in `pipeline("image-segmentation")`, at any resolution.

    Example:

    ```python
    >>> import torch
    >>> from transformers import AutoTokenizer
    >>> from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation, bake_vocabulary

    >>> model = SparForOpenVocabSegmentation.from_pretrained(SPAR_TINY)
    >>> tokenizer = AutoTokenizer.from_pretrained(SPAR_TINY)
    >>> baked = bake_vocabulary(model, tokenizer, ["road", "car, automobile", "sky"], templates="short")
    >>> baked.config.id2label
    {0: 'road', 1: 'car', 2: 'sky'}
    >>> with torch.no_grad():
    ...     baked(torch.zeros(1, 3, 200, 330)).logits.shape
    torch.Size([1, 3, 13, 21])
    ```"""

    config: SparSemanticConfig  # type: ignore[assignment]
    _auto_map = {
        "AutoConfig": "configuration_spar_semantic.SparSemanticConfig",
        "AutoModel": "modeling_spar_semantic.SparSemanticModel",
        "AutoModelForSemanticSegmentation": "modeling_spar_semantic.SparForSemanticSegmentation",
        "AutoImageProcessor": "image_processing_spar.SparImageProcessorPil",
    }
    # classes of nearly the same logit decide many pixels
    _keep_in_fp32_modules_strict = {"classifier"}

    def __init__(self, config: SparSemanticConfig):
        super().__init__(config)
        self.vision_model = SparVisionModel._from_config(config.backbone_config)
        self.classifier = nn.Linear(config.backbone_config.projection_dim, len(config.name_to_class))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self.classifier:
            nn.init.trunc_normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    @classmethod
    @torch.no_grad()
    def from_weights(
        cls,
        vision_model: SparVisionModel,
        labels: Sequence[str],
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        names: Sequence[Sequence[str]] | None = None,
        normalize_features: bool = False,
    ) -> "SparForSemanticSegmentation":
        """
        Put a vision model (its weights are copied) and a classifier together.

        Args:
            vision_model ([`SparVisionModel`]): gives the dense features.
            labels (`Sequence[str]`): one per class.
            weight (`torch.Tensor` of shape `(rows, dim)`): a row per class, or per name where there are `names`.
            bias (`torch.Tensor` of shape `(rows,)`, *optional*): zero by default.
            names (`Sequence[Sequence[str]]`, *optional*): per class, the words of its rows.
            normalize_features (`bool`, *optional*, defaults to `False`): see [`SparSemanticConfig`].
        """
        backbone_config = vision_model.config.to_dict()
        for key in ("_name_or_path", "architectures"):  # of the folder that it was loaded from
            backbone_config.pop(key, None)
        config = SparSemanticConfig(
            backbone_config=backbone_config,
            normalize_features=normalize_features,
            names=None if names is None else [list(words) for words in names],
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            dtype="float32",
        )
        model = cls(config)
        model.vision_model.load_state_dict(vision_model.state_dict())
        model.vision_model.to(vision_model.dtype)
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
        model.to(vision_model.device)  # type: ignore[arg-type]
        return model.eval()

    def best_of_names(self, logits: torch.Tensor) -> torch.Tensor:
        """The largest logit of every class's names: `(..., names)` -> `(..., classes)`."""
        if self.config.names is None or len(self.config.names) == logits.shape[-1]:
            return logits
        parts = logits.split([len(words) for words in self.config.names], dim=-1)
        return torch.stack([part.amax(-1) for part in parts], dim=-1)

    def segmentation_loss(self, grid: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Mean cross entropy over the labelled pixels of `labels` `(batch, height, width)`, 0 where there is none. The logits
        `grid` `(batch, h, w, names)` are upsampled bilinearly before the maximum over names, as the masks are.

        Some pixels at a time, of which the backward pass reads the logits again: classes × height × width are never held.
        """
        patch, (_, h, w, names) = self.config.patch_size, grid.shape
        height, width = labels.shape[-2:]
        down = patch_coordinates(height, height, patch, h, grid.device)
        across = patch_coordinates(width, width, patch, w, grid.device)
        table = grid.float().flatten(0, 2)  # (batch * h * w, names)

        def loss_of(table: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
            image, row, column = pixels.T
            top, bottom, low = (values[row] for values in down)
            left, right, far = (values[column] for values in across)
            upper, lower = (image * h + top) * w, (image * h + bottom) * w
            corners = torch.stack([upper + left, upper + right, lower + left, lower + right], dim=1)
            shares = torch.stack([(1 - low) * (1 - far), (1 - low) * far, low * (1 - far), low * far], dim=1)
            # the weighted sum of four rows of the table in one step
            read = nn.functional.embedding_bag(corners, table, per_sample_weights=shares, mode="sum")  # (pixels, names)
            return nn.functional.cross_entropy(self.best_of_names(read), labels[image, row, column], reduction="sum")

        labelled = (labels != self.config.semantic_loss_ignore_index).nonzero()  # (pixels, 3): image, row, column
        # corners and shares of a pixel take about as much as 64 logits; one empty chunk where nothing is labelled
        chunks = labelled.split(max(1, WORKING_BYTES // (4 * max(names, 64))))
        losses = [checkpoint(loss_of, table, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.stack(losses).sum() / max(1, len(labelled))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.LongTensor | None = None,
        original_sizes: list[tuple[int, int]] | None = None,
        **kwargs,
    ) -> SparSemanticSegmenterOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`):
                Normalised images, any height and width.
            labels (`torch.LongTensor` of shape `(batch, height, width)`, *optional*):
                Class of every pixel for the loss, `config.semantic_loss_ignore_index` where there is none.
            original_sizes (`list[tuple[int, int]]`, *optional*):
                What the image processor gives beside `pixel_values`; not used here.

        Returns:
            [`SparSemanticSegmenterOutput`] with `logits` `(batch, classes, ceil(height / patch), ceil(width / patch))`.

        Raises:
            ValueError: `labels` of another batch or size than `pixel_values`.
        """
        batch, _, height, width = pixel_values.shape
        if labels is not None and labels.shape != (batch, height, width):
            raise ValueError(
                f"`labels` are {tuple(labels.shape)} and `pixel_values` {(batch, height, width)} (batch, height, width); a "
                "label lies on its pixel. Resize the labels by nearest neighbour."
            )
        vision_outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        features = vision_outputs.feature_map.float().permute(0, 2, 3, 1)  # (batch, dim, h, w) -> (batch, h, w, dim)
        if self.config.normalize_features:
            features = nn.functional.normalize(features, dim=-1)
        weight, bias = self.classifier.weight.float(), self.classifier.bias.float()
        # in float32 whatever the model's precision, see `_keep_in_fp32_modules_strict`
        grid = nn.functional.linear(features, weight, bias)  # (batch, h, w, names)
        loss = None if labels is None else self.segmentation_loss(grid, labels)
        logits = grid.permute(0, 3, 1, 2)  # -> (batch, names, h, w)
        name_logits = name_to_class = None
        if self.config.names is not None and len(weight) != self.config.num_labels:
            name_logits = logits
            logits = self.best_of_names(grid).permute(0, 3, 1, 2)  # (batch, classes, h, w)
            name_to_class = torch.tensor(self.config.name_to_class, device=logits.device).expand(len(logits), -1)
        patch = self.config.patch_size
        return SparSemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            name_logits=name_logits,
            name_to_class=name_to_class,
            geometry=torch.tensor([height, width, patch], device=logits.device).expand(len(logits), -1),
            feature_map=vision_outputs.feature_map,
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
        )


def bake_vocabulary(
    model,
    tokenizer,
    candidate_labels: CandidateLabels | Vocabulary,
    templates: str | Sequence[str] | None = None,
) -> SparForSemanticSegmentation:
    """
    Make one vision-only model of a two-tower model and a vocabulary: its masks are those of the pipeline
    `open-vocab-segmentation` for these words, and it needs neither text tower nor tokenizer.

    Args:
        model ([`SparForOpenVocabSegmentation`]): both towers.
        tokenizer (`PreTrainedTokenizerBase`): the checkpoint's own.
        candidate_labels (`list[str]`, `dict[str, list[str]]`, `str` or [`Vocabulary`]):
            The classes, as the pipeline takes them.
        templates (`str` or `list[str]`, *optional*): prompt templates, the checkpoint's by default.

    Returns:
        [`SparForSemanticSegmentation`]; save it and the image processor into one folder.

    Raises:
        ValueError: no or malformed labels, or a model without a text tower.

    Example:

    ```python
    >>> from transformers import AutoImageProcessor, AutoTokenizer, pipeline
    >>> from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation, bake_vocabulary

    >>> model = SparForOpenVocabSegmentation.from_pretrained(SPAR_TINY)
    >>> tokenizer = AutoTokenizer.from_pretrained(SPAR_TINY)
    >>> bake_vocabulary(model, tokenizer, ["road", "sky"], templates="plain").save_pretrained("street")
    >>> AutoImageProcessor.from_pretrained(SPAR_TINY).save_pretrained("street")
    ['street/preprocessor_config.json']
    >>> segment = pipeline("image-segmentation", model="street")
    ```"""
    if not hasattr(model, "get_text_features"):
        raise ValueError(
            f"Words are embedded by a text tower, and {type(model).__name__} has none. Load a two-tower folder with "
            "`SparForOpenVocabSegmentation.from_pretrained`."
        )
    vocabulary = Vocabulary.parse(candidate_labels)
    embeds = embed_names(model, tokenizer, vocabulary.all_names, templates)
    return SparForSemanticSegmentation.from_weights(
        model.vision_model,
        vocabulary.labels,
        embeds * model.config.dense_logit_scale,
        names=vocabulary.names,
        normalize_features=True,
    )


__all__ = ["SparForSemanticSegmentation", "SparSemanticModel", "SparSemanticSegmenterOutput", "bake_vocabulary"]
