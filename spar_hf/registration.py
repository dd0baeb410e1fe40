"""Everything public, and its registration with the Auto classes of transformers: what `import spar_hf` runs."""

from pathlib import Path

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from .model.backbone_spar import SparBackbone
from .model.configuration_spar import SparConfig
from .model.configuration_spar_semantic import SparSemanticConfig
from .model.configuration_spar_universal import SparUniversalConfig
from .model.image_processing_spar import SparImageProcessorPil
from .model.image_processing_spar_universal import SparUniversalImageProcessorPil
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
from .model.pipeline import EncodedImage, OpenVocabSegmentationPipeline
from .model.processing_spar import SparProcessor
from .teacher import SlidingWindowTeacher

__version__ = "0.2.0"

# the embedded model: the student, and the base it was distilled from
SPAR_TINY = str(Path(__file__).parent / "assets" / "spar-tiny")
SPAR_TINY_BASE = str(Path(SPAR_TINY) / "base")

# exist_ok: a second import (importlib.reload, a checkpoint's remote code) replaces the entries instead of failing
AutoConfig.register(SparConfig.model_type, SparConfig, exist_ok=True)
AutoModel.register(SparConfig, SparVisionModel, exist_ok=True)
AutoBackbone.register(SparConfig, SparBackbone, exist_ok=True)
AutoModelForSemanticSegmentation.register(SparConfig, SparForOpenVocabSegmentation, exist_ok=True)
AutoImageProcessor.register(
    SparConfig,
    # Pillow serves both: without the second entry, Auto classes warn wherever torchvision happens to be installed
    image_processor_classes={"pil": SparImageProcessorPil, "torchvision": SparImageProcessorPil},
    exist_ok=True,
)
AutoProcessor.register(SparConfig, SparProcessor, exist_ok=True)
AutoConfig.register(SparSemanticConfig.model_type, SparSemanticConfig, exist_ok=True)
AutoModel.register(SparSemanticConfig, SparSemanticModel, exist_ok=True)
AutoModelForSemanticSegmentation.register(SparSemanticConfig, SparForSemanticSegmentation, exist_ok=True)
AutoImageProcessor.register(
    SparSemanticConfig,
    image_processor_classes={"pil": SparImageProcessorPil, "torchvision": SparImageProcessorPil},
    exist_ok=True,
)
AutoConfig.register(SparUniversalConfig.model_type, SparUniversalConfig, exist_ok=True)
AutoModelForUniversalSegmentation.register(SparUniversalConfig, SparForUniversalSegmentation, exist_ok=True)
# pipeline("image-segmentation") asks for this class, and its log calls unsupported what a list of its own does not hold
AutoModelForImageSegmentation.register(SparUniversalConfig, SparForUniversalSegmentation, exist_ok=True)
MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES[SparUniversalConfig.model_type] = SparForUniversalSegmentation.__name__
AutoImageProcessor.register(
    SparUniversalConfig,
    image_processor_classes={"pil": SparUniversalImageProcessorPil, "torchvision": SparUniversalImageProcessorPil},
    exist_ok=True,
)
if "open-vocab-segmentation" not in PIPELINE_REGISTRY.get_supported_tasks():  # a second time would warn
    PIPELINE_REGISTRY.register_pipeline(
        "open-vocab-segmentation",
        pipeline_class=OpenVocabSegmentationPipeline,
        pt_model=AutoModelForSemanticSegmentation,
        default={"model": (SPAR_TINY, None)},
        type="multimodal",
    )

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
