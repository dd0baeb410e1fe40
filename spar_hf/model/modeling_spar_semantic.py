"""Semantic segmentation with a fixed set of classes: a linear classifier on SPAR's dense features."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_spar_semantic import SparSemanticConfig
from .execution import as_tensor, check_batch, full_precision, refuse_labels, with_output_flags
from .modeling_spar import SparPreTrainedModel, SparVisionModel
from .prompts import CandidateLabels, Vocabulary, distinct_names, embed_names
from .segmentation import WORKING_BYTES, bilinear_cells, patch_coordinates
from .templates import read_templates

# `pipeline("image-segmentation")` looks up here which models it supports, and logs others as errors
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["spar_semantic"] = "SparForSemanticSegmentation"


@dataclass
class SparSemanticSegmenterOutput(ModelOutput):
    """
    Output of [`SparForSemanticSegmentation`]. `SparImageProcessorPil.post_process_semantic_segmentation` turns it into label
    maps.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            With `labels`: mean cross entropy over the labelled pixels, 0 if there are none.
        logits (`torch.FloatTensor` of shape `(batch, classes, ceil(height / patch), ceil(width / patch))`):
            Logits of the classes of `config.id2label`: for a class with several names, the largest of theirs.
        name_logits (`torch.FloatTensor` of shape `(batch, names, ceil(height / patch), ceil(width / patch))`, *optional*):
            If classes have several names, the logits of all names: they are upsampled before the maximum is taken.
        name_to_class (`torch.LongTensor` of shape `(batch, names)`, *optional*):
            The class of each name, the same for the whole batch.
        geometry (`torch.LongTensor` of shape `(batch, 3)`):
            Height and width of `pixel_values` and side of a patch, in pixels.
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
    """
    The vision model of a [`SparForSemanticSegmentation`], as `AutoModel` loads it. It is saved as a `"spar"` folder, that
    of a [`SparVisionModel`].

    Example:

    ```python
    >>> from transformers import AutoModel, AutoTokenizer
    >>> from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation, bake_vocabulary

    >>> two_towers = SparForOpenVocabSegmentation.from_pretrained(SPAR_TINY)
    >>> tokenizer = AutoTokenizer.from_pretrained(SPAR_TINY)
    >>> bake_vocabulary(two_towers, tokenizer, ["road", "sky"], templates="plain").save_pretrained("street")
    >>> model = AutoModel.from_pretrained("street")  # without the classifier
    >>> type(model).__name__, model.config.model_type
    ('SparSemanticModel', 'spar')
    ```"""

    config: SparSemanticConfig  # type: ignore[assignment]

    def __init__(self, config: SparSemanticConfig):
        backbone_config = copy.copy(config.backbone_config)
        for name, value in with_output_flags(config, {}).items():
            setattr(backbone_config, name, value)
        super().__init__(backbone_config)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Does nothing: registered, this class would be named in the `"spar"` folder it saves, which it cannot load."""


class SparForSemanticSegmentation(SparPreTrainedModel):
    """
    A [`SparVisionModel`] (`.vision_model`) and one linear layer (`.classifier`) on its dense features: a vocabulary turned
    into weights by [`bake_vocabulary`], or a linear probe trained by `training/linear_probe.py`.

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
    # at many pixels the best classes have nearly the same logit
    _keep_in_fp32_modules_strict = {"classifier"}

    def __init__(self, config: SparSemanticConfig):
        super().__init__(config)
        self.vision_model = SparVisionModel._from_config(config.backbone_config)
        width, rows = config.backbone_config.projection_dim, len(config.name_to_class)
        # float32 in `from_config(dtype=...)` too, which does not read `_keep_in_fp32_modules_strict`
        self.classifier = nn.Linear(width, rows, dtype=torch.float32)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self.classifier:
            init.trunc_normal_(self.classifier.weight, std=0.02)
            init.zeros_(self.classifier.bias)

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
        Combine a vision model, whose weights are copied, and a classifier.

        Args:
            vision_model ([`SparVisionModel`]): computes the dense features.
            labels (`Sequence[str]`): one per class.
            weight (`torch.Tensor` of shape `(rows, dim)`): a row per class, or with `names` per name.
            bias (`torch.Tensor` of shape `(rows,)`, *optional*): zero by default.
            names (`Sequence[Sequence[str]]`, *optional*): per class, the names of its rows.
            normalize_features (`bool`, *optional*, defaults to `False`): see [`SparSemanticConfig`].

        Raises:
            ValueError: `weight` or `bias` has another shape.
        """
        rows = len(labels) if names is None else sum(map(len, names))
        shape = (rows, vision_model.config.projection_dim)
        for name, given, wanted in (("weight", weight, shape), ("bias", bias, shape[:1])):
            if given is not None and given.shape != wanted:  # `copy_` would repeat a single row
                raise ValueError(f"{name} has shape {tuple(given.shape)}; these classes need {wanted}.")
        backbone_config = vision_model.config.to_dict()
        for key in ("_name_or_path", "architectures"):  # they belong to the folder it was loaded from
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
        for own, given in zip(model.vision_model.parameters(), vision_model.parameters(), strict=True):
            own.data = own.data.to(given.dtype)  # parameters only: buffers such as RoPE's frequencies stay in float32
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
        Mean cross entropy over the labelled pixels of `labels` `(batch, height, width)`, 0 if there are none. The logits
        `grid` `(batch, h, w, names)` are upsampled bilinearly before the maximum over names, as for masks.

        Pixels are read in chunks, again in the backward pass, so that no tensor has classes × height × width values.
        """
        patch, (_, h, w, names) = self.config.patch_size, grid.shape
        ignored = self.config.semantic_loss_ignore_index
        height, width = labels.shape[-2:]
        vertical = patch_coordinates(height, height, patch, h, grid.device)
        horizontal = patch_coordinates(width, width, patch, w, grid.device)
        table = grid.float().flatten(0, 2)  # (batch * h * w, names)

        def loss_of(table: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
            image, row, column = pixels.T
            cells, weights = bilinear_cells(row, column, vertical, horizontal, w)
            cells += (image * h * w)[:, None]
            # the weighted sum of four rows of the table in one step
            read = nn.functional.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")  # (pixels, names)
            targets = labels[image, row, column].long()
            # ignored pixels are not in the chunks; by default, this function would ignore -100 too
            return nn.functional.cross_entropy(self.best_of_names(read), targets, reduction="sum", ignore_index=ignored)

        labels = labels.to(grid.device)
        labelled = (labels != ignored).nonzero()  # (pixels, 3): image, row, column
        self.check_classes(labels[tuple(labelled.T)].long())  # uint16 cannot be compared
        # cells and weights of a pixel take about as much as 64 logits; one empty chunk if nothing is labelled
        chunks = labelled.split(max(1, WORKING_BYTES // (4 * max(names, 64))))
        losses = [checkpoint(loss_of, table, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.stack(losses).sum() / max(1, len(labelled))

    def check_classes(self, classes: torch.Tensor) -> None:
        """Raise `ValueError` if one of the labels of pixels is no class: on a GPU the loss would end the process."""
        count = len(self.config.id2label or ())
        wrong = classes[(classes < 0) | (classes >= count)]
        if len(wrong):
            ignored = self.config.semantic_loss_ignore_index
            raise ValueError(
                f"`labels` hold {int(wrong[0])}, which is none of the {count} classes (0 to {count - 1}). Set pixels "
                f"without a class to `config.semantic_loss_ignore_index`, {ignored}."
            )

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The classifier on features `(…, dim)`, in float32: also under autocast, and after `model.half()`."""
        half = (torch.float16, torch.bfloat16)
        weights = {name: p.float() for name, p in self.classifier.named_parameters() if p.dtype in half}
        with full_precision(features.device):
            # called as a module: it may be quantised, adapted (LoRA) or offloaded
            return functional_call(self.classifier, weights, features) if weights else self.classifier(features)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.LongTensor | None = None,
        original_sizes: list[tuple[int, int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparSemanticSegmenterOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`):
                Normalised images, any height and width.
            labels (`torch.Tensor` of integers and shape `(batch, height, width)`, *optional*):
                Class of every pixel for the loss, `config.semantic_loss_ignore_index` for ignored pixels.
            original_sizes (`list[tuple[int, int]]`, *optional*):
                Ignored; accepted because the image processor returns it beside `pixel_values`.

        Returns:
            [`SparSemanticSegmenterOutput`] with `logits` `(batch, classes, ceil(height / patch), ceil(width / patch))`.

        Raises:
            ValueError: `pixel_values` without a batch dimension; `labels` of another batch or size than they, that are no
                integers, or no classes.
        """
        refuse_labels(self, kwargs)
        check_batch(pixel_values)
        batch, _, height, width = pixel_values.shape
        if labels is not None and labels.shape != (batch, height, width):
            raise ValueError(
                f"`labels` are {tuple(labels.shape)}, but `pixel_values` are {(batch, height, width)} (batch, height, "
                "width). Resize the labels by nearest neighbour."
            )
        if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
            raise ValueError(f"`labels` must be integers, the class of every pixel; they are {labels.dtype}.")
        vision_outputs = self.vision_model(pixel_values, return_dict=True, **with_output_flags(self.config, kwargs))
        features = vision_outputs.feature_map.float().permute(0, 2, 3, 1)  # (batch, dim, h, w) -> (batch, h, w, dim)
        if self.config.normalize_features:
            features = nn.functional.normalize(features, dim=-1)
        grid = self.classify(features)  # (batch, h, w, names)
        loss = None if labels is None else self.segmentation_loss(grid, labels)
        logits = grid.permute(0, 3, 1, 2)  # -> (batch, names, h, w)
        name_logits = name_to_class = None
        if self.config.names is not None and logits.shape[1] != self.config.num_labels:
            name_logits = logits
            logits = self.best_of_names(grid).permute(0, 3, 1, 2)  # (batch, classes, h, w)
            name_to_class = torch.tensor(self.config.name_to_class, device=logits.device).expand(batch, -1)
        patch = self.config.patch_size
        return SparSemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            name_logits=name_logits,
            name_to_class=name_to_class,
            geometry=as_tensor([height, width, patch], logits.device).expand(batch, -1),
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
    Make a vision-only model from a two-tower model and a vocabulary. It gives the masks of the pipeline
    `open-vocab-segmentation` for these names, without text tower and tokenizer.

    In `pipeline("image-segmentation")`, transformers opens and converts images before our image processor sees them. The
    masks are the same but for these images, for which call the image processor and the model yourself:
        - transparent ones (modes RGBA, RGBa, LA, PA, and P with an alpha per colour): transparency is dropped instead of
          blended with white;
        - 16-bit ones (modes I;16, I;16B, I): values above 255 become white instead of being scaled;
        - floats (mode F): values are taken for 0–255 instead of 0–1, so that most images are black;
        - files that are refused here (16 bits that may be fewer, more pixels than the limit, rare formats) are read;
          arrays, bytes and open files are refused there.

    Args:
        model ([`SparForOpenVocabSegmentation`]): the two-tower model.
        tokenizer (`PreTrainedTokenizerBase`): that of the checkpoint.
        candidate_labels (`list[str]`, `dict[str, list[str]]`, `str` or [`Vocabulary`]):
            The classes, as in the pipeline.
        templates (`str` or `list[str]`, *optional*): prompt templates, the checkpoint's by default.

    Returns:
        [`SparForSemanticSegmentation`]. Save it and the image processor to one folder.

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
            f"{type(model).__name__} has no text tower to embed words. Load a two-tower folder with "
            "`SparForOpenVocabSegmentation.from_pretrained`."
        )
    vocabulary = Vocabulary.parse(candidate_labels)
    templates = read_templates(templates)
    vocabulary = distinct_names(tokenizer, vocabulary, model.config.templates if templates is None else templates)
    embeds = embed_names(model, tokenizer, vocabulary.all_names, templates)
    return SparForSemanticSegmentation.from_weights(
        model.vision_model,
        vocabulary.labels,
        embeds * model.config.dense_logit_scale,
        names=vocabulary.names,
        normalize_features=True,
    )


__all__ = ["SparForSemanticSegmentation", "SparSemanticModel", "SparSemanticSegmenterOutput", "bake_vocabulary"]
