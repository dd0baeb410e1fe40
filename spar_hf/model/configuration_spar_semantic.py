"""Configuration of a SPAR vision model with a linear classifier on its dense features."""

import copy
from typing import Any

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .configuration_spar import SparConfig


class SparSemanticConfig(PreTrainedConfig):
    r"""
    Configuration of [`SparForSemanticSegmentation`].

    Args:
        backbone_config (`dict` or [`SparConfig`]):
            The vision model. A text tower is removed: the classifier replaces it.
        normalize_features (`bool`, *optional*, defaults to `False`):
            Whether dense features are L2-normalised before the classifier, as for a cosine with text embeddings.
        names (`list[list[str]]`, *optional*):
            Per class of `id2label`, its names; the classifier has a row for each. `None`: one row per class.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of ignored pixels, which do not count in the loss.
        id2label (`dict[int, str]`, *optional*):
            The classes, see `PreTrainedConfig`.

    Raises:
        ValueError: `backbone_config` is not that of a SPAR model; `names` without one list per class, or with an empty one.

    Example:

    ```python
    >>> from spar_hf import SparConfig, SparSemanticConfig

    >>> config = SparSemanticConfig(backbone_config=SparConfig(), id2label={0: "road", 1: "sky", 2: "tree"})
    >>> config.patch_size, config.num_labels
    (16, 3)
    ```"""

    model_type = "spar_semantic"
    # `compute_metrics` of `Trainer` gets the logits alone, and nothing else is held for the whole evaluation set
    keys_to_ignore_at_inference = [
        "name_logits",
        "name_to_class",
        "geometry",
        "feature_map",
        "hidden_states",
        "attentions",
    ]
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=SparConfig, model_type="spar")}

    backbone_config: Any = None
    normalize_features: bool = False
    names: list[list[str]] | None = None
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs):
        part = self.backbone_config
        kind = part.get("model_type", "spar") if isinstance(part, dict) else getattr(part, "model_type", "spar")
        if kind != "spar":
            raise ValueError(
                f"`backbone_config` is of type {kind!r}, but this head needs a SPAR vision model ('spar'): the folder "
                "holds no trained classifier. Load it with `AutoModel`, or add a classifier with `bake_vocabulary` or "
                "`training/linear_probe.py`."
            )
        # built here: transformers would look it up in its registry, where remote code has not registered it
        part = {} if part is None else part
        # a copy: the caller's configuration keeps its text tower
        self.backbone_config = SparConfig(**part) if isinstance(part, dict) else copy.deepcopy(part)
        self.backbone_config.text_config = None
        super().__post_init__(**kwargs)
        classes = len(self.id2label or ())
        if self.names is not None and len(self.names) != classes:
            raise ValueError(
                f"`names` has {len(self.names)} lists, but there are {classes} classes in `id2label`; give one "
                "list of names per class."
            )
        empty = [label for label, words in enumerate(self.names or ()) if not words]
        if empty:
            raise ValueError(f"`names` of the classes {empty} are empty; give each class at least one name.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers; for another number of classes (`id2label`, `num_labels`), `names` are left out."""
        classes = kwargs.get("id2label") or range(kwargs.get("num_labels") or 0)
        names = config_dict.get("names")
        if names is not None and "names" not in kwargs and len(classes) not in (0, len(names)):
            config_dict = {**config_dict, "names": None}
        return super().from_dict(config_dict, **kwargs)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.backbone_config.patch_size

    @property
    def name_to_class(self) -> list[int]:
        """The class of each row of the classifier."""
        if self.names is None:
            return list(range(len(self.id2label or ())))
        return [label for label, words in enumerate(self.names) for _ in words]


__all__ = ["SparSemanticConfig"]
