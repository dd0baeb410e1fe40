"""
Each piece of transformers (and of accelerate, datasets, evaluate, peft) that the library leans on without a promise of
theirs, with the place of ours that uses it.

When a new release changes one, this fails with a sentence that names the file to look at, before some far-away test fails
with a riddle. Whoever leans on a further piece adds a row: `test_every_private_name_has_a_row` finds the private ones.

One table, so one file of more than 500 lines: a release is gone through from top to bottom.
"""

import ast
import inspect
import re
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import CONFIGS, make_tokenizer, tiny_config
from torch import nn

ROOT = Path(__file__).parents[1]
MODELING = "spar_hf/model/modeling_spar.py"
SEMANTIC = "spar_hf/model/modeling_spar_semantic.py"
UNIVERSAL = "spar_hf/model/modeling_spar_universal.py"
READOUTS = "spar_hf/model/readouts.py"
READOUT_BASE = "spar_hf/model/readout_base.py"
CLIP = "spar_hf/model/readout_clip.py"
DINOV2 = "spar_hf/model/readout_dinov2.py"
RADIO = "spar_hf/model/readout_radio.py"
TIPSV2 = "spar_hf/model/readout_tipsv2.py"
TEXTS = "spar_hf/model/text_towers.py"
BACKBONE = "spar_hf/model/backbone_spar.py"
CONFIGURATION = "spar_hf/model/configuration_spar.py"
IMAGES = "spar_hf/model/image_processing_spar.py"
PANOPTIC_IMAGES = "spar_hf/model/image_processing_spar_universal.py"
PROCESSOR = "spar_hf/model/processing_spar.py"
EXECUTION = "spar_hf/model/execution.py"
SAVED_CODE = "spar_hf/model/saved_code.py"
PIPELINE = "spar_hf/model/pipeline.py"
REGISTRATION = "spar_hf/registration.py"

MODEL = "transformers.modeling_utils.PreTrainedModel"
AUTO = "transformers.models.auto.modeling_auto"
MASK2FORMER = "transformers.models.mask2former"
PIL = "transformers.image_processing_backends.PilBackend"


def resolve(name: str) -> Any:
    """The object of a dotted name: the longest prefix that is a module, then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def exists(*names: str) -> Callable[[], Any]:
    return lambda: [resolve(name) for name in names]


def takes(name: str, *parameters: str) -> Callable[[], Any]:
    """The callable exists and has these parameters."""

    def check():
        found = inspect.signature(resolve(name)).parameters
        missing = [parameter for parameter in parameters if parameter not in found]
        assert not missing, f"{name} takes no {', '.join(missing)}"

    return check


def mentions(name: str, *words: str) -> Callable[[], Any]:
    """The source of the object uses these names."""

    def check():
        source = inspect.getsource(resolve(name))
        missing = [word for word in words if word not in source]
        assert not missing, f"{name} no longer mentions {', '.join(missing)}"

    return check


def all_of(*checks: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: [check() for check in checks]


def has_modules(model: Any, *paths: str) -> None:
    for path in paths:
        found = model
        for part in path.split("."):
            assert hasattr(found, part), f"{type(model).__name__} has no {path}"
            found = getattr(found, part)


# --- the backbones, each built small ---


def siglip() -> None:
    model = resolve("transformers.SiglipVisionModel")(CONFIGS["siglip"]())
    has_modules(model, "embeddings.patch_embedding", "embeddings.position_embedding.weight", "encoder.layers")
    has_modules(model, "post_layernorm", "head.probe", "head.layernorm", "head.mlp", "head.attention.in_proj_weight")
    has_modules(model, "head.attention.in_proj_bias", "head.attention.out_proj")
    has_modules(model.encoder.layers[0], "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
    assert isinstance(model.embeddings.patch_embedding, nn.Conv2d)
    assert hasattr(model.config, "vision_use_head")
    takes("transformers.models.siglip.modeling_siglip.SiglipEncoder.forward", "inputs_embeds")()


def naflex() -> None:
    model = resolve("transformers.Siglip2VisionModel")(CONFIGS["naflex"]())
    has_modules(model, "embeddings.position_embedding.weight", "encoder.layers", "post_layernorm", "head.probe")
    has_modules(model, "head.attention.in_proj_weight", "head.attention.out_proj", "head.layernorm", "head.mlp")
    assert isinstance(model.embeddings.patch_embedding, nn.Linear)
    assert hasattr(model.config, "num_patches")


def clip(readout: str = "maskclip", model: str = "CLIPVisionModel", block: str = "clip.modeling_clip.CLIP") -> None:
    made, layer_class = resolve(f"transformers.{model}")(CONFIGS[readout]()), f"transformers.models.{block}EncoderLayer"
    has_modules(made, "embeddings.class_embedding", "embeddings.patch_embedding", "embeddings.position_embedding")
    has_modules(made, "pre_layrnorm", "post_layernorm", "encoder.layers")
    layer = made.encoder.layers[-1]
    has_modules(layer, "layer_norm1", "layer_norm2", "mlp", "self_attn.v_proj", "self_attn.out_proj")
    assert isinstance(layer, resolve(layer_class))
    takes(f"{layer_class}.forward", "hidden_states", "attention_mask")()


def metaclip2() -> None:
    clip("metaclip2", "MetaClip2VisionModel", "metaclip_2.modeling_metaclip_2.MetaClip2")


def dinov3() -> None:
    model = resolve("transformers.DINOv3ViTModel")(CONFIGS["dinov3"]())
    has_modules(model, "embeddings.patch_embeddings", "rope_embeddings.inv_freq", "norm", "model.layer")
    assert isinstance(model.model.layer, nn.ModuleList) and len(list(model.model.parameters(recurse=False))) == 0
    assert list(dict(model.model.named_children())) == ["layer"], "its encoder holds more than `layer`"
    takes("transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer.forward", "position_embeddings")()
    fields = ("use_gated_mlp", "mlp_bias", "proj_bias", "query_bias", "key_bias", "value_bias", "num_register_tokens")
    assert all(hasattr(model.config, name) for name in fields)


def registers(model: Any) -> None:
    """Modules of DINOv2 with registers, which TIPSv2 has too."""
    has_modules(model, "embeddings.cls_token", "embeddings.register_tokens", "embeddings.mask_token", "layernorm")
    has_modules(model, "embeddings.position_embeddings", "embeddings.patch_embeddings.projection", "encoder.layer")
    assert list(dict(model.encoder.named_children())) == ["layer"], "its encoder holds more than `layer`"
    grid = (model.config.image_size // model.config.patch_size) ** 2
    assert model.embeddings.position_embeddings.shape == (1, 1 + grid, model.config.hidden_size)


def dinov2() -> None:
    registers(resolve("transformers.Dinov2WithRegistersModel")(CONFIGS["dinov2"]()))


def radio() -> None:
    model = resolve("transformers.RadioModel")(CONFIGS["radio"]())
    has_modules(model, "embeddings.patch_projection", "embeddings.position_embedding", "embeddings.cls_register_token")
    has_modules(model, "input_conditioner", "summary_idxs", "encoder.layer")
    assert list(dict(model.encoder.named_children())) == ["layer"], "its encoder holds more than `layer`"
    has_modules(model.encoder.layer[-1], "layer_scale2.lambda1")
    assert all(hasattr(model.config, name) for name in ("num_summary_tokens", "num_cls_tokens", "summary_idxs"))


def tipsv2() -> None:
    model = resolve("transformers.Tipsv2VisionModel")(CONFIGS["tipsv2"]())
    registers(model)
    layer = model.encoder.layer[-1]
    has_modules(layer, "norm1", "norm2", "mlp", "layer_scale1", "layer_scale2", "attention.v_proj", "attention.o_proj")
    assert isinstance(layer, resolve("transformers.models.tipsv2.modeling_tipsv2.Tipsv2VisionLayer"))
    takes("transformers.models.tipsv2.modeling_tipsv2.Tipsv2VisionLayer.forward", "hidden_states", "attention_mask")()


def recorded_outputs() -> None:
    classes = {"siglip": "SiglipVisionModel", "maskclip": "CLIPVisionModel", "dinov3": "DINOv3ViTModel"}
    classes |= {"tipsv2": "Tipsv2VisionModel", "dinov2": "Dinov2WithRegistersModel", "radio": "RadioModel"}
    for name in classes:
        model = resolve(f"transformers.{classes[name]}")(CONFIGS[name]())
        recorded = [part._can_record_outputs for part in model.modules() if getattr(part, "_can_record_outputs", None)]
        assert any({"hidden_states", "attentions"} <= set(outputs) for outputs in recorded), classes[name]


def text_towers() -> None:
    config = tiny_config().text_config
    outputs = resolve("transformers.SiglipTextModel")(config)(torch.ones(1, 16, dtype=torch.long))
    assert outputs.pooler_output.shape == (1, config.projection_size)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    for family in ("CLIP", "MetaClip2"):
        config = resolve(f"transformers.{family}TextConfig")(**shape, vocab_size=64, projection_dim=24)
        model = resolve(f"transformers.{family}TextModelWithProjection")(config)
        assert model(torch.ones(1, 8, dtype=torch.long)).text_embeds.shape == (1, 24)
        assert {"text_model", "text_projection"} <= dict(model.named_children()).keys()
    takes("transformers.Tipsv2TextModel.forward", "input_ids", "attention_mask")()
    model = resolve("transformers.Tipsv2TextModel")(resolve("transformers.Tipsv2TextConfig")(**shape, vocab_size=64))
    assert model(torch.ones(1, 8, dtype=torch.long)).pooler_output.shape == (1, 32)


# --- the head of panoptic segmentation ---


def decoder() -> None:
    config = resolve("spar_hf.SparUniversalConfig")(
        backbone_config=tiny_config(text_config=None).to_dict(), hidden_dim=32, num_attention_heads=2, num_labels=3
    )
    module = resolve(f"{MASK2FORMER}.modeling_mask2former.Mask2FormerTransformerModule")(32, config)
    levels = [torch.zeros(1, 32, side, side) for side in (2, 4, 8)]
    outputs = module(levels, torch.zeros(1, 32, 16, 16))
    layers = len(outputs.masks_queries_logits)
    assert layers == len(outputs.intermediate_hidden_states) == config.decoder_layers
    assert outputs.masks_queries_logits[-1].shape == (1, config.num_queries, 16, 16)
    scale = resolve("transformers.models.eomt.modeling_eomt.EomtScaleLayer")(config)
    has_modules(scale, "conv1", "conv2")
    assert scale(levels[0]).shape == (1, 32, 4, 4)


def mapping(name: str) -> Callable[[], Any]:
    def check():
        assert isinstance(resolve(f"{AUTO}.{name}"), MutableMapping), f"{name} cannot be written to"
        mentions("transformers.pipelines.image_segmentation.ImageSegmentationPipeline.__init__", name)()

    return check


# --- options, data, training ---


def aliases() -> None:
    @dataclass
    class Options:
        new: int = field(default=1, metadata={"aliases": ["--old"], "help": "one"})

    (options,) = resolve("transformers.HfArgumentParser")(Options).parse_args_into_dataclasses(["--old", "2"])
    assert options.new == 2


def several_dataclasses() -> None:
    @dataclass
    class A:
        a: int = 1

    @dataclass
    class B:
        b: int = 2

    found = resolve("transformers.HfArgumentParser")((A, B)).parse_args_into_dataclasses(["--b", "3"])
    assert (found[0].a, found[1].b) == (1, 3)


def registries() -> None:
    for name, (attributes, entries, _) in resolve("spar_hf.registration.REGISTRIES").items():
        for attribute in attributes:
            found = getattr(resolve(f"{name}.{attribute}"), entries)
            assert isinstance(found, dict), f"{attribute}.{entries} is no dict"
    for mapping in ("auto_factory._LazyAutoMapping", "configuration_auto._LazyConfigMapping"):
        mentions(f"transformers.models.auto.{mapping}", "self._extra_content[key]")()
    mentions("transformers.pipelines.base.PipelineRegistry", "self.supported_tasks")()


def dataset_fingerprint() -> None:
    rows = resolve("datasets.Dataset").from_dict({"a": [1, 2]})
    assert isinstance(rows._fingerprint, str)
    assert rows._fingerprint != resolve("datasets.Dataset").from_dict({"a": [1, 3]})._fingerprint


def tokenizer_backend() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.is_fast and tokenizer.backend_tokenizer.to_str()


def batch_feature() -> None:
    found = resolve("transformers.BatchFeature")({"pixel_values": [torch.zeros(2)], "sizes": [(1, 2)]})
    found.skip_tensor_conversion = ["sizes"]
    assert found.convert_to_tensors("pt")["sizes"] == [(1, 2)]


class Row(NamedTuple):
    what: str  # the piece; a private name in it is looked for in `where`
    where: str  # the file of ours to change
    check: Callable[[], Any]


CONTRACT = [
    # models
    Row("_from_config builds a model of a configuration", MODELING, takes(f"{MODEL}._from_config", "config")),
    Row("_init_weights initialises a module", MODELING, takes(f"{MODEL}._init_weights", "module")),
    Row(
        "_initialize_weights is told whether a model is custom code",
        MODELING,
        all_of(
            mentions(f"{MODEL}.initialize_weights", "self.is_custom_code()"),
            takes(f"{MODEL}._initialize_weights", "is_custom_code"),
        ),
    ),
    Row("_initialize_weights of backbones", READOUT_BASE, takes(f"{MODEL}._initialize_weights", "is_custom_code")),
    Row(
        "initialization: functions that spare loaded weights",
        READOUTS,
        exists("transformers.initialization.copy_"),
    ),
    Row("initialization.zeros_", MODELING, exists("transformers.initialization.zeros_")),
    Row("initialization.trunc_normal_", SEMANTIC, exists("transformers.initialization.trunc_normal_")),
    Row(
        "initialization: xavier_uniform_ and kaiming_uniform_",
        UNIVERSAL,
        exists(*(f"transformers.initialization.{name}" for name in ("xavier_uniform_", "kaiming_uniform_"))),
    ),
    Row(
        "_get_files_timestamps tells push_to_hub what was there before",
        MODELING,
        all_of(
            takes(f"{MODEL}._get_files_timestamps", "working_dir"),
            mentions(f"{MODEL}.save_pretrained", "_get_files_timestamps"),
        ),
    ),
    Row(
        "_keys_to_ignore_on_load_unexpected and _keys_to_ignore_on_load_missing",
        MODELING,
        exists(f"{MODEL}._keys_to_ignore_on_load_unexpected", f"{MODEL}._keys_to_ignore_on_load_missing"),
    ),
    Row(
        "_keep_in_fp32_modules_strict holds the classifier in float32",
        SEMANTIC,
        exists(f"{MODEL}._keep_in_fp32_modules_strict"),
    ),
    Row(
        "_supports_sdpa and the flags of the other attention back ends",
        MODELING,
        exists(*(f"{MODEL}._supports_{name}" for name in ("sdpa", "flash_attn", "flex_attn", "attention_backend"))),
    ),
    Row(
        "from_pretrained(output_loading_info=True) gives missing_keys",
        MODELING,
        mentions("transformers.modeling_utils", "output_loading_info", "missing_keys"),
    ),
    Row(
        "get_relative_import_files follows imports",
        SAVED_CODE,
        takes("transformers.dynamic_module_utils.get_relative_import_files", "module_file"),
    ),
    Row("custom_pipelines of config.json", MODELING, mentions("transformers.pipelines", "config.custom_pipelines")),
    Row(
        "auto_map is set in processors that are saved",
        PROCESSOR,
        mentions("transformers.dynamic_module_utils.custom_object_save", "config.auto_map"),
    ),
    Row("register_for_auto_class", SEMANTIC, exists(f"{MODEL}.register_for_auto_class")),
    Row(
        "capture_outputs records hidden states and attentions by _can_record_outputs",
        MODELING,
        all_of(
            takes("transformers.utils.output_capturing.capture_outputs", "tie_last_hidden_states"),
            mentions("transformers.utils.output_capturing", "_can_record_outputs"),
            recorded_outputs,
        ),
    ),
    Row("merge_with_config_defaults", MODELING, exists("transformers.utils.generic.merge_with_config_defaults")),
    Row("can_return_tuple", MODELING, exists("transformers.utils.can_return_tuple")),
    Row(
        "_hf_hook of a module loads its weights: pre_forward and post_forward",
        EXECUTION,
        all_of(
            mentions("accelerate.hooks.add_hook_to_module", "module._hf_hook"),
            takes("accelerate.hooks.AlignDevicesHook.pre_forward", "module"),
            takes("accelerate.hooks.AlignDevicesHook.post_forward", "module", "output"),
        ),
    ),
    Row(
        "_set_gradient_checkpointing gives modules a _gradient_checkpointing_func",
        UNIVERSAL,
        all_of(
            mentions(f"{MODEL}._set_gradient_checkpointing", '"_gradient_checkpointing_func"'),
            exists(f"{MASK2FORMER}.modeling_mask2former.Mask2FormerMaskedAttentionDecoderLayer"),
        ),
    ),
    Row("_no_split_modules", CLIP, exists("transformers.CLIPVisionModel._no_split_modules")),
    Row("accepts_loss_kwargs", MODELING, mentions("transformers.Trainer.__init__", "accepts_loss_kwargs")),
    Row(
        "keys_to_ignore_at_inference",
        CONFIGURATION,
        mentions("transformers.Trainer.prediction_step", "keys_to_ignore_at_inference"),
    ),
    Row(
        "GradientCheckpointingLayer",
        MODELING,
        exists("transformers.modeling_layers.GradientCheckpointingLayer"),
    ),
    Row(
        "torch._dynamo.maybe_mark_dynamic gives every size a symbol of its own",
        EXECUTION,
        takes("torch._dynamo.maybe_mark_dynamic", "t", "index"),
    ),
    Row("text towers: SiglipTextModel, CLIPTextModelWithProjection, Tipsv2TextTower", TEXTS, text_towers),
    # read-outs
    Row("modules of SiglipVisionModel", READOUTS, siglip),
    Row("modules of Siglip2VisionModel", READOUTS, naflex),
    Row("modules of CLIPVisionModel", CLIP, clip),
    Row("modules of MetaClip2VisionModel", CLIP, metaclip2),
    Row("modules of DINOv3ViTModel", READOUTS, dinov3),
    Row("modules of Dinov2WithRegistersModel", DINOV2, dinov2),
    Row("modules of RadioModel", RADIO, radio),
    Row("modules of Tipsv2VisionModel", TIPSV2, tipsv2),
    Row(
        "container of DINOv3ViTModel: weights are renamed by the class that holds `layer`",
        READOUTS,
        mentions("transformers.conversion_mapping", '"dinov3_vit": [WeightRenaming(r"(?<!model\\.)layer."'),
    ),
    Row(
        "DINOv3ViTRopePositionEmbedding",
        READOUTS,
        exists("transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTRopePositionEmbedding"),
    ),
    # the backbone API
    Row(
        "BackboneMixin: stage_names, out_features, channels",
        BACKBONE,
        all_of(
            exists("transformers.backbone_utils.BackboneMixin.out_features"),
            exists("transformers.backbone_utils.BackboneMixin.channels"),
            mentions("transformers.backbone_utils.BackboneMixin", "stage_names", "num_features"),
        ),
    ),
    Row("filter_output_hidden_states", BACKBONE, exists("transformers.backbone_utils.filter_output_hidden_states")),
    Row(
        "BackboneConfigMixin keeps _out_features and _out_indices",
        CONFIGURATION,
        all_of(
            takes(
                "transformers.backbone_utils.BackboneConfigMixin.set_output_features_output_indices",
                "out_features",
                "out_indices",
            ),
            mentions("transformers.backbone_utils.BackboneConfigMixin", "_out_features", "_out_indices"),
        ),
    ),
    # configurations
    Row(
        "SubConfigSpec of sub_configs_defaults",
        CONFIGURATION,
        all_of(
            takes("transformers.configuration_utils.SubConfigSpec", "config_class", "model_type", "optional"),
            exists("transformers.configuration_utils.PreTrainedConfig.sub_configs_defaults"),
        ),
    ),
    Row(
        "default_config_fields decides what config.json leaves out",
        CONFIGURATION,
        exists("transformers.configuration_utils.PreTrainedConfig.default_config_fields"),
    ),
    Row(
        "__post_init__ of strict dataclass configurations",
        CONFIGURATION,
        exists("transformers.configuration_utils.PreTrainedConfig.__post_init__"),
    ),
    Row(
        "attribute_map",
        "spar_hf/model/configuration_spar_universal.py",
        exists("transformers.configuration_utils.PreTrainedConfig.attribute_map"),
    ),
    # heads
    Row(
        "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
        SEMANTIC,
        mapping("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES"),
    ),
    Row(
        "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
        UNIVERSAL,
        mapping("MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES"),
    ),
    Row(
        "post_process_semantic_segmentation is what pipeline(image-segmentation) calls",
        IMAGES,
        mentions(
            "transformers.pipelines.image_segmentation.ImageSegmentationPipeline.postprocess",
            "post_process_semantic_segmentation",
            "post_process_panoptic_segmentation",
            "target_sizes",
        ),
    ),
    Row("Mask2FormerTransformerModule and EomtScaleLayer", UNIVERSAL, decoder),
    Row(
        "Mask2FormerLoss",
        UNIVERSAL,
        all_of(
            takes(f"{MASK2FORMER}.modeling_mask2former.Mask2FormerLoss", "config", "weight_dict"),
            takes(
                f"{MASK2FORMER}.modeling_mask2former.Mask2FormerLoss.forward",
                "masks_queries_logits",
                "class_queries_logits",
                "mask_labels",
                "class_labels",
                "auxiliary_predictions",
            ),
        ),
    ),
    Row(
        "Mask2FormerPreTrainedModel",
        UNIVERSAL,
        takes(f"{MASK2FORMER}.modeling_mask2former.Mask2FormerPreTrainedModel._init_weights", "module"),
    ),
    Row(
        "convert_segmentation_map_to_binary_masks and binary_mask_to_rle",
        PANOPTIC_IMAGES,
        all_of(
            exists(f"{MASK2FORMER}.image_processing_pil_mask2former.binary_mask_to_rle"),
            takes(
                f"{MASK2FORMER}.image_processing_pil_mask2former.convert_segmentation_map_to_binary_masks",
                "segmentation_map",
                "instance_id_to_semantic_id",
                "ignore_index",
            ),
        ),
    ),
    Row(
        "SemanticSegmentationPostProcessorOutput",
        IMAGES,
        exists("transformers.image_processing_outputs.SemanticSegmentationPostProcessorOutput"),
    ),
    # images and words
    Row("PilBackend._preprocess", IMAGES, takes(f"{PIL}._preprocess", "images", "do_resize", "size", "resample")),
    Row("PilBackend._standardize_kwargs", IMAGES, takes(f"{PIL}._standardize_kwargs", "size")),
    Row(
        "PilBackend._validate_preprocess_kwargs",
        IMAGES,
        takes(f"{PIL}._validate_preprocess_kwargs", "do_resize", "size"),
    ),
    Row("PilBackend._prepare_image_like_inputs", IMAGES, takes(f"{PIL}._prepare_image_like_inputs", "images")),
    Row(
        "PilBackend: process_image, fetch_images, resize, rescale, normalize, valid_kwargs",
        IMAGES,
        exists(
            *(f"{PIL}.{name}" for name in ("process_image", "fetch_images", "resize", "rescale", "normalize")),
            f"{PIL}.valid_kwargs",
            f"{PIL}.get_image_processor_dict",
        ),
    ),
    Row("_auto_class of an image processor", IMAGES, exists(f"{PIL}._auto_class")),
    Row("skip_tensor_conversion of BatchFeature", IMAGES, batch_feature),
    Row("_auto_class of a processor", PROCESSOR, exists("transformers.processing_utils.ProcessorMixin._auto_class")),
    Row(
        "_load_tokenizer_from_pretrained",
        PROCESSOR,
        takes(
            "transformers.processing_utils.ProcessorMixin._load_tokenizer_from_pretrained",
            "sub_processor_type",
            "pretrained_model_name_or_path",
            "subfolder",
        ),
    ),
    Row(
        "validate_inputs",
        PROCESSOR,
        takes("transformers.processing_utils.ProcessorMixin.validate_inputs", "images", "text", "videos", "audio"),
    ),
    Row("backend_tokenizer", PROCESSOR, tokenizer_backend),
    # pipeline
    Row(
        "Pipeline: _load_processor, _load_image_processor, _load_feature_extractor, _load_tokenizer",
        PIPELINE,
        exists(
            *(
                f"transformers.Pipeline._load_{name}"
                for name in ("processor", "image_processor", "feature_extractor", "tokenizer")
            )
        ),
    ),
    Row(
        "Pipeline: _preprocess_params, _forward_params and _sanitize_parameters",
        PIPELINE,
        mentions("transformers.Pipeline.__init__", "_preprocess_params", "_forward_params", "_sanitize_parameters"),
    ),
    Row(
        "run_single and get_iterator of Pipeline",
        PIPELINE,
        all_of(
            takes("transformers.Pipeline.run_single", "preprocess_params", "forward_params", "postprocess_params"),
            takes("transformers.Pipeline.get_iterator", "inputs", "num_workers", "batch_size", "forward_params"),
        ),
    ),
    # registration
    Row("_extra_content and supported_tasks hold what is registered", REGISTRATION, registries),
    Row("AutoConfig.register", REGISTRATION, takes("transformers.AutoConfig.register", "exist_ok")),
    Row(
        "AutoImageProcessor.register",
        REGISTRATION,
        takes("transformers.AutoImageProcessor.register", "image_processor_classes", "exist_ok"),
    ),
    Row(
        "PIPELINE_REGISTRY",
        REGISTRATION,
        all_of(
            exists("transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks"),
            takes(
                "transformers.pipelines.PIPELINE_REGISTRY.register_pipeline",
                "task",
                "pipeline_class",
                "pt_model",
                "default",
                "type",
            ),
        ),
    ),
    # options, data, measures
    Row("HfArgumentParser: aliases of an option", "spar_hf/utils/options.py", aliases),
    Row("HfArgumentParser: several dataclasses", "spar_hf/utils/options.py", several_dataclasses),
    Row("_fingerprint of a data set", "spar_hf/data/segmentation_sets.py", dataset_fingerprint),
    Row(
        "split_dataset_by_node",
        "spar_hf/data/order.py",
        takes("datasets.distributed.split_dataset_by_node", "rank", "world_size"),
    ),
    Row(
        "evaluate.Metric: _info, _build_data_dir and _data_dir_root",
        "spar_hf/evaluation/metrics.py",
        all_of(
            exists("evaluate.Metric._info", "evaluate.Metric._build_data_dir"),
            mentions("evaluate.Metric.__init__", "_build_data_dir", "_data_dir_root"),
        ),
    ),
    # exports
    Row(
        "OnnxExporter exports a module with fused operations",
        "spar_hf/export/onnx_format.py",
        all_of(
            takes("transformers.exporters.OnnxExporter.export_program", "model", "sample_inputs", "config"),
            takes("transformers.exporters.OnnxConfig", "dynamic_shapes", "ort_fusions"),
        ),
    ),
    Row(
        "BACKEND_PREPARE chooses what is delegated",
        "spar_hf/export/executorch_format.py",
        exists("transformers.exporters.exporter_executorch._BACKEND_PREPARE"),
    ),
    Row(
        "_inductor: aoti_compile_and_package and aoti_load_package",
        "spar_hf/export/aoti_format.py",
        exists("torch._inductor.aoti_compile_and_package", "torch._inductor.aoti_load_package"),
    ),
    # training
    Row(
        "LOGGER_TYPE_TO_CLASS names the trackers",
        "spar_hf/utils/run_options.py",
        exists("accelerate.tracking.LOGGER_TYPE_TO_CLASS"),
    ),
    Row(
        "get_available_trackers names those that are installed",
        "spar_hf/utils/runs.py",
        exists("accelerate.tracking.get_available_trackers"),
    ),
    Row(
        "set_trigger and check_trigger",
        "spar_hf/utils/checkpoints.py",
        exists("accelerate.Accelerator.set_trigger", "accelerate.Accelerator.check_trigger"),
    ),
    Row(
        "get_peft_model",
        "spar_hf/distillation/trainable.py",
        all_of(
            takes("peft.get_peft_model", "model", "peft_config"),
            exists("peft.tuners.lora.LoraModel.merge_and_unload"),
            takes("peft.PeftModel.save_pretrained", "save_embedding_layers"),
        ),
    ),
    Row(
        "_get_help_string of argparse adds defaults",
        "spar_hf/utils/options.py",
        takes("argparse.ArgumentDefaultsHelpFormatter._get_help_string", "action"),
    ),
    # tests
    Row(
        "_reset_state",
        "tests/launching.py",
        all_of(
            takes("accelerate.state.AcceleratorState._reset_state", "reset_partial_state"),
            exists("accelerate.state.GradientState._reset_state"),
        ),
    ),
    Row(
        "_prepare_backend chooses how processes talk",
        "tests/distillation/test_distill_resume.py",
        exists("accelerate.state.PartialState._prepare_backend"),
    ),
    Row("warning_once is cached", "tests/conftest.py", exists("transformers.utils.logging.warning_once.cache_clear")),
]


@pytest.mark.parametrize("row", CONTRACT, ids=lambda row: row.what)
def test_what_we_lean_on_is_there(row):
    problem = None
    try:
        row.check()
    except Exception as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    if problem is not None:
        pytest.fail(f"{row.what}: changed in this release, so change {row.where}. {problem}", pytrace=False)


def private_names(text: str) -> set[str]:
    return set(re.findall(r"(?<!\w)_[a-z]\w*", text))


def code_names(text: str) -> set[str]:
    """Private names, snake_case and CamelCase: words of code."""
    return private_names(text) | set(
        re.findall(r"\b(?:[a-z]+(?:_[a-z]+)+|[A-Z]\w*[a-z]\w*[A-Z]\w*|[A-Z]+_[A-Z_]+)\b", text)
    )


@pytest.mark.parametrize("row", CONTRACT, ids=lambda row: row.what)
def test_our_place_is_still_there(row):
    """The file still has the names of the row, or else the row is out of date."""
    missing = sorted(name for name in code_names(row.what) if name not in (ROOT / row.where).read_text())
    assert not missing, f"{row.where} no longer uses {missing}: name the new place in this row, or remove the row"


def test_every_private_name_has_a_row():
    """Private attributes that the library reads and does not define itself belong to somebody else."""
    used: dict[str, str] = {}
    defined: set[str] = set()
    for file in sorted((ROOT / "spar_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                inherited = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
                if isinstance(node.ctx, ast.Store):
                    defined.add(node.attr)
                else:
                    used[node.attr + (" (super)" if inherited else "")] = f"{file.relative_to(ROOT)}:{node.lineno}"
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    listed = {name for row in CONTRACT for name in private_names(row.what)}
    listed |= {"_version", "_exit"}  # documented: the version counter of a tensor, and os._exit
    unlisted = {
        name: place
        for name, place in used.items()
        if name.removesuffix(" (super)") not in listed and (name.endswith("(super)") or name not in defined)
    }
    assert not unlisted, f"add a row to CONTRACT for each of {unlisted}"
