"""
SPAR in Hugging Face Transformers: dense, open-vocabulary vision features at any resolution in one pass.

Importing the package makes the Auto classes and pipelines of transformers know its models. It is quick, quiet and safe to
repeat: classes, and with them torch, are loaded when they are first used.

Example:

```python
>>> import spar_hf
>>> from transformers import AutoModel

>>> model = AutoModel.from_pretrained(spar_hf.SPAR_TINY)
```"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import SPAR_TINY, SPAR_TINY_BASE, register_lazily

if TYPE_CHECKING:
    from .model.backbone_spar import SparBackbone
    from .model.configuration_spar import SparConfig
    from .model.configuration_spar_semantic import SparSemanticConfig
    from .model.configuration_spar_universal import SparUniversalConfig
    from .model.execution import compile_model
    from .model.image_processing_spar import SparImageProcessorPil
    from .model.image_processing_spar_universal import SparUniversalImageProcessorPil
    from .model.image_streams import EncodedImage
    from .model.modeling_spar import (
        SparForOpenVocabSegmentation,
        SparOpenVocabSegmentationOutput,
        SparPreTrainedModel,
        SparVisionModel,
        SparVisionModelOutput,
    )
    from .model.modeling_spar_semantic import (
        SparForSemanticSegmentation,
        SparSemanticModel,
        SparSemanticSegmenterOutput,
        bake_vocabulary,
    )
    from .model.modeling_spar_universal import SparForUniversalSegmentation, SparUniversalSegmentationOutput
    from .model.pipeline import OpenVocabSegmentationPipeline
    from .model.processing_spar import SparProcessor
    from .teacher import SlidingWindowTeacher

__version__ = "0.2.0"

__all__ = [
    "SparConfig",
    "SparVisionModel",
    "SparBackbone",
    "SlidingWindowTeacher",
    "EncodedImage",
    "OpenVocabSegmentationPipeline",
    "SparForOpenVocabSegmentation",
    "SparSemanticConfig",
    "SparForSemanticSegmentation",
    "SparSemanticModel",
    "SparSemanticSegmenterOutput",
    "bake_vocabulary",
    "compile_model",
    "SparForUniversalSegmentation",
    "SparUniversalConfig",
    "SparUniversalImageProcessorPil",
    "SparUniversalSegmentationOutput",
    "SparImageProcessorPil",
    "SparProcessor",
    "SparPreTrainedModel",
    "SparVisionModelOutput",
    "SparOpenVocabSegmentationOutput",
    "SPAR_TINY",
    "SPAR_TINY_BASE",
    "__version__",
]

# the module of each name that is loaded when it is first used
_MODULES = {
    "SparBackbone": ".model.backbone_spar",
    "SparConfig": ".model.configuration_spar",
    "SparSemanticConfig": ".model.configuration_spar_semantic",
    "SparUniversalConfig": ".model.configuration_spar_universal",
    "compile_model": ".model.execution",
    "SparImageProcessorPil": ".model.image_processing_spar",
    "SparUniversalImageProcessorPil": ".model.image_processing_spar_universal",
    "EncodedImage": ".model.image_streams",
    "SparForOpenVocabSegmentation": ".model.modeling_spar",
    "SparOpenVocabSegmentationOutput": ".model.modeling_spar",
    "SparPreTrainedModel": ".model.modeling_spar",
    "SparVisionModel": ".model.modeling_spar",
    "SparVisionModelOutput": ".model.modeling_spar",
    "SparForSemanticSegmentation": ".model.modeling_spar_semantic",
    "SparSemanticModel": ".model.modeling_spar_semantic",
    "SparSemanticSegmenterOutput": ".model.modeling_spar_semantic",
    "bake_vocabulary": ".model.modeling_spar_semantic",
    "SparForUniversalSegmentation": ".model.modeling_spar_universal",
    "SparUniversalSegmentationOutput": ".model.modeling_spar_universal",
    "OpenVocabSegmentationPipeline": ".model.pipeline",
    "SparProcessor": ".model.processing_spar",
    "SlidingWindowTeacher": ".teacher",
}


def __getattr__(name: str) -> Any:
    if name in ("model", "teacher"):  # without an import of their own, as in `spar_hf.model.pipeline`
        return import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_lazily()
