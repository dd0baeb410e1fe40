"""
Registration of SPAR's classes with the Auto classes and the pipelines of transformers, made at the first look-up.

`import spar_hf` should not wait for torch and the models. So `register_lazily` only watches the modules of transformers that
hold the registries. Once one is imported, its registries get dictionaries that register our classes when first read.
"""

import logging
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from pathlib import Path
from threading import RLock
from typing import Any

SPAR_TINY = str(Path(__file__).parent / "assets" / "spar-tiny")
"""Folder of the embedded model spar-tiny: the student, with both towers."""
SPAR_TINY_BASE = str(Path(SPAR_TINY) / "base")
"""Folder of the base that the student was distilled from, with both towers."""


# exist_ok: code of a checkpoint may have registered classes of its own, and a reload registers ours again
def register_configs() -> None:
    """Make `AutoConfig` know the three model types."""
    from transformers import AutoConfig

    from .model.configuration_spar import SparConfig
    from .model.configuration_spar_semantic import SparSemanticConfig
    from .model.configuration_spar_universal import SparUniversalConfig

    for config_class in (SparConfig, SparSemanticConfig, SparUniversalConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_models() -> None:
    """Make `AutoModel`, `AutoBackbone` and the Auto classes of segmentation know the models."""
    from transformers import (
        AutoBackbone,
        AutoModel,
        AutoModelForImageSegmentation,
        AutoModelForSemanticSegmentation,
        AutoModelForUniversalSegmentation,
    )

    from .model.backbone_spar import SparBackbone
    from .model.configuration_spar import SparConfig
    from .model.configuration_spar_semantic import SparSemanticConfig
    from .model.configuration_spar_universal import SparUniversalConfig
    from .model.modeling_spar import SparForOpenVocabSegmentation, SparVisionModel
    from .model.modeling_spar_semantic import SparForSemanticSegmentation, SparSemanticModel
    from .model.modeling_spar_universal import SparForUniversalSegmentation

    AutoModel.register(SparConfig, SparVisionModel, exist_ok=True)
    AutoBackbone.register(SparConfig, SparBackbone, exist_ok=True)
    AutoModelForSemanticSegmentation.register(SparConfig, SparForOpenVocabSegmentation, exist_ok=True)
    AutoModel.register(SparSemanticConfig, SparSemanticModel, exist_ok=True)
    AutoModelForSemanticSegmentation.register(SparSemanticConfig, SparForSemanticSegmentation, exist_ok=True)
    AutoModelForUniversalSegmentation.register(SparUniversalConfig, SparForUniversalSegmentation, exist_ok=True)
    # pipeline("image-segmentation") asks for this class
    AutoModelForImageSegmentation.register(SparUniversalConfig, SparForUniversalSegmentation, exist_ok=True)


def register_image_processors() -> None:
    """Make `AutoImageProcessor` know the image processors."""
    from transformers import AutoImageProcessor

    from .model.configuration_spar import SparConfig
    from .model.configuration_spar_semantic import SparSemanticConfig
    from .model.configuration_spar_universal import SparUniversalConfig
    from .model.image_processing_spar import SparImageProcessorPil
    from .model.image_processing_spar_universal import SparUniversalImageProcessorPil

    processors: dict[Any, Any] = {
        SparConfig: SparImageProcessorPil,
        SparSemanticConfig: SparImageProcessorPil,
        SparUniversalConfig: SparUniversalImageProcessorPil,
    }
    for config_class, processor in processors.items():
        # Pillow serves both: without the second entry, Auto classes warn wherever torchvision happens to be installed
        classes = {"pil": processor, "torchvision": processor}
        AutoImageProcessor.register(config_class, image_processor_classes=classes, exist_ok=True)


def register_processors() -> None:
    """Make `AutoProcessor` know the processor of two-tower models."""
    from transformers import AutoProcessor

    from .model.configuration_spar import SparConfig
    from .model.processing_spar import SparProcessor

    AutoProcessor.register(SparConfig, SparProcessor, exist_ok=True)


def register_pipelines() -> None:
    """Make `pipeline` know the task "open-vocab-segmentation"."""
    from transformers import AutoModelForSemanticSegmentation
    from transformers.pipelines import PIPELINE_REGISTRY

    from .model.pipeline import OpenVocabSegmentationPipeline

    if "open-vocab-segmentation" not in PIPELINE_REGISTRY.supported_tasks:  # a second time would warn
        PIPELINE_REGISTRY.register_pipeline(
            "open-vocab-segmentation",
            pipeline_class=OpenVocabSegmentationPipeline,
            pt_model=AutoModelForSemanticSegmentation,
            default={"model": (SPAR_TINY, None)},
            type="multimodal",
        )
        # transformers warns that a default model may change; this one is a folder of the library
        logging.getLogger("transformers.pipelines").addFilter(lambda record: SPAR_TINY not in record.getMessage())


# module of transformers -> (its registries, their dictionary of what is registered, what registers ours)
REGISTRIES: dict[str, tuple[tuple[str, ...], str, Callable[[], None]]] = {
    "transformers.models.auto.configuration_auto": (("CONFIG_MAPPING",), "_extra_content", register_configs),
    "transformers.models.auto.modeling_auto": (
        (
            "MODEL_MAPPING",
            "MODEL_FOR_BACKBONE_MAPPING",
            "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",
            "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING",
            "MODEL_FOR_IMAGE_SEGMENTATION_MAPPING",
        ),
        "_extra_content",
        register_models,
    ),
    "transformers.models.auto.image_processing_auto": (
        ("IMAGE_PROCESSOR_MAPPING",),
        "_extra_content",
        register_image_processors,
    ),
    "transformers.models.auto.processing_auto": (("PROCESSOR_MAPPING",), "_extra_content", register_processors),
    "transformers.pipelines": (("PIPELINE_REGISTRY",), "supported_tasks", register_pipelines),
}

_lock = RLock()
_started: set[Callable[[], None]] = set()
_finished: set[Callable[[], None]] = set()


def _run_once(register: Callable[[], None]) -> None:
    """Call a function above unless it has run. Other threads wait for it; what it reads itself does not start it again."""
    if register in _finished:
        return
    with _lock:
        if register in _started:
            return
        _started.add(register)
        try:
            register()
        except BaseException:
            _started.remove(register)
            raise
        _finished.add(register)


class LazyEntries(dict):
    """The dictionary of a registry, which registers our classes before it is first read."""

    def __init__(self, entries: dict, register: Callable[[], None]):
        super().__init__(entries)
        self.register = register


def _registering(name: str) -> Callable:
    """A method of `dict` that registers our classes before it reads."""
    read = getattr(dict, name)

    def method(self: LazyEntries, *args: Any) -> Any:
        _run_once(self.register)
        return read(self, *args)

    return method


for _name in ("__contains__", "__getitem__", "__iter__", "__len__", "get", "keys", "values", "items"):
    setattr(LazyEntries, _name, _registering(_name))


def _make_lazy(module: Any) -> None:
    """Put [`LazyEntries`] into the registries of an imported module of `REGISTRIES`."""
    names, attribute, register = REGISTRIES[module.__name__]
    for name in names:
        registry = getattr(module, name)
        entries = getattr(registry, attribute)
        if not isinstance(entries, LazyEntries):
            setattr(registry, attribute, LazyEntries(entries, register))


class RegistryFinder(MetaPathFinder):
    """Finds the modules of `REGISTRIES` as the other finders do, and makes their registries lazy once they are executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in REGISTRIES:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, RegistryFinder))
        specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _make_lazy(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_lazily() -> None:
    """Register everything with transformers at the first look-up, whether or not it is imported yet. Safe to repeat."""
    if not any(isinstance(finder, RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegistryFinder())
    for name in REGISTRIES:
        if name in sys.modules:
            _make_lazy(import_module(name))  # waits for a thread that is importing it
