"""Maps pretrained Transformers backbones to a `SparConfig` and SPAR weight names."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    MetaClip2Model,
    MetaClip2VisionModelWithProjection,
    RadioModel,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipModel,
    SiglipVisionModel,
    Tipsv2Model,
    Tipsv2VisionModel,
)

from .configuration_spar import SparConfig

# class that `from_backbone` loads, by model type
BACKBONE_SOURCES: dict[str, Any] = {
    "siglip": SiglipModel,
    "siglip_vision_model": SiglipVisionModel,
    "siglip2": Siglip2Model,
    "siglip2_vision_model": Siglip2VisionModel,
    "clip": CLIPModel,
    "clip_vision_model": CLIPVisionModelWithProjection,
    "metaclip_2": MetaClip2Model,
    "metaclip_2_vision_model": MetaClip2VisionModelWithProjection,
    "dinov3_vit": DINOv3ViTModel,
    "tipsv2": Tipsv2Model,
    "tipsv2_vision_model": Tipsv2VisionModel,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "radio": RadioModel,
}
# fields of `SparConfig` that a family's published zero-shot segmentation sets, by model type
PUBLISHED_SETTINGS: dict[str, dict[str, Any]] = {"tipsv2": {"templates": "tcl"}}


def load_source_config(name: str, **hub: Any) -> Any:
    """
    The configuration of a local folder or of a model on the hub.

    Raises:
        OSError: neither has this name.
    """
    if Path(name).is_file():  # transformers would read it as a config.json
        raise OSError(f"{name} is a file. Pass the folder of the model, perhaps {Path(name).parent}.")
    try:
        return AutoConfig.from_pretrained(name, **hub)
    except OSError as error:
        if Path(name).is_dir():
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"{name} is neither a local folder nor a model that the hub gave: {reason}") from error


def spar_name(name: str, clip: bool) -> str:
    """The name in [`SparForOpenVocabSegmentation`] of a weight of a backbone of transformers."""
    if name.startswith("logit_"):
        return name
    if name.startswith(("text_model.", "text_projection.")):  # CLIP's text class with projection wraps the text model
        return f"text_model.{name}" if clip else name
    return "vision_model.backbone." + name.removeprefix("vision_model.")


def read_backbone(
    name: str, source_config: Any, spar_config: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[SparConfig, dict[str, torch.Tensor], torch.dtype]:
    """
    Load a backbone of transformers as a SPAR model: its configuration, its weights under the names of
    [`SparForOpenVocabSegmentation`], and their dtype.

    Args:
        name: hub id or folder.
        source_config: its configuration, from [`load_source_config`].
        spar_config: further fields of [`SparConfig`].
        kwargs: options of `from_pretrained` of the backbone's class.

    Raises:
        ValueError: an unsupported model type, such as that of a trained head.
        RuntimeError: the folder lacks weights.
    """
    if source_config.model_type.startswith("spar_"):  # a trained head or a baked vocabulary
        raise ValueError(
            f"{name} has its classes in it (model type {source_config.model_type!r}), and "
            f'pipeline("image-segmentation", model={str(name)!r}) runs it without words. For '
            "words or features, pass the model it was made from."
        )
    if source_config.model_type not in BACKBONE_SOURCES:
        raise ValueError(
            f"{name} is a model of type {source_config.model_type!r}; SPAR reads {', '.join(BACKBONE_SOURCES)}."
        )
    with whole_files(name):
        loaded: Any = BACKBONE_SOURCES[source_config.model_type].from_pretrained(
            name, output_loading_info=True, **kwargs
        )
    source, info = loaded
    check_complete(info["missing_keys"], name, type(source).__name__)
    if source_config.model_type in (
        "clip",
        "metaclip_2",
    ):  # both projections have the width of the top-level configuration
        source.config.vision_config.projection_dim = source.config.projection_dim
        source.config.text_config.projection_dim = source.config.projection_dim
    if isinstance(source, RadioModel):
        source.config.summary_idxs = source.summary_idxs.tolist()
        del source.summary_idxs
    config = SparConfig(
        backbone_config=getattr(source.config, "vision_config", source.config),
        text_config=getattr(source.config, "text_config", None),
        dtype="float32",
        **(PUBLISHED_SETTINGS.get(source_config.model_type, {}) | (spar_config or {})),
    )
    clip = isinstance(source, CLIPModel | MetaClip2Model)
    weights = {spar_name(name, clip): tensor for name, tensor in source.state_dict().items()}
    if (temperature := weights.pop("vision_model.backbone.temperature", None)) is not None:
        weights["logit_scale"] = -temperature.log()  # TIPSv2 divides cosines by it
    for scalar in weights.keys() & {"logit_scale", "logit_bias"}:
        weights[scalar] = weights[scalar].reshape(1)  # CLIP's and TIPSv2's are scalars
    return config, weights, source.dtype


class IncompleteWeights(OSError, RuntimeError):
    """Weights of a model are not in its files: as for other files that are not there, an `OSError`."""


@contextmanager
def whole_files(name: Any) -> Iterator[None]:
    """
    Raises:
        IncompleteWeights: the block found a safetensors file of the folder `name` that is cut or damaged.
    """
    try:
        yield
    except SafetensorError as error:
        raise IncompleteWeights(
            f"A file of weights of {name} is damaged or was not copied whole ({error}). Copy or download it again."
        ) from error


def check_complete(missing: Collection[str], name: str, class_name: str) -> None:
    """
    Raises:
        IncompleteWeights: weights of the class are `missing` in the folder `name`; the message names up to eight of them.
    """
    if missing:
        raise IncompleteWeights(
            f"{name} lacks {len(missing)} weights of {class_name}: {first_few(missing)}. The files are incomplete or "
            "config.json describes another model: copy the folder again."
        )


def first_few(names: Collection[str]) -> str:
    """Up to eight names in alphabetical order, and how many more there are."""
    return ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_finite(model: torch.nn.Module, name: str) -> None:
    """
    Read every weight once and look for NaN and infinity, which give class 0 everywhere instead of an error.

    Weights on the meta device have no values yet and are skipped, as are quantised ones.

    Args:
        model: with its weights loaded.
        name: where they come from, for the message.

    Raises:
        ValueError: a weight is not finite; the message names up to eight of them.

    Example:

    ```python
    >>> layer = torch.nn.Linear(2, 2)
    >>> _ = layer.bias.data.fill_(float("nan"))
    >>> check_finite(layer, "layer.pt")
    Traceback (most recent call last):
    ValueError: layer.pt: 1 of 2 weights hold NaN or infinity: bias. A training diverged, ...
    ```"""
    weights = model.state_dict()
    spoiled = [
        key
        for key, tensor in weights.items()
        if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.is_meta and not is_finite(tensor)
    ]
    if spoiled:
        raise ValueError(
            f"{name}: {len(spoiled)} of {len(weights)} weights hold NaN or infinity: {first_few(spoiled)}. A training "
            "diverged, or the file is damaged: use an earlier or another copy."
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(tensor.isfinite().all())
