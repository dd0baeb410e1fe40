"""Converts one checkpoint: configuration, weights, comparison with reference implementations, one atomic rename."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from spar_hf.model.backbone_sources import load_source_config
from spar_hf.model.configuration_spar import SparConfig
from spar_hf.model.image_processing_spar import SparImageProcessorPil
from spar_hf.model.modeling_spar import SparForOpenVocabSegmentation, SparVisionModel
from spar_hf.model.processing_spar import SparProcessor, published_tokenizer
from spar_hf.model.text_towers import TEXT_MODELS
from spar_hf.utils.atomic import check_inputs_stay, writing_folder
from spar_hf.utils.errors import UsageError
from spar_hf.utils.locks import locked

from . import dinov3txt, openclip, radio, siglip2
from .checkpoint_tensors import CheckpointTensors, read_tensors

DINOV3_BACKBONE = "visual_model.backbone."  # prefix of its tensors in a checkpoint of dino.txt
# modules, each with MODEL_TYPES, VISION_SETTINGS, TEXT_SETTINGS, rename, dense_features and text_features; where weights
# are those of the base, load_base and features_on instead of dense_features
FAMILIES: dict[str, Any] = {"siglip2": siglip2, "openclip": openclip, "dinov3txt": dinov3txt, "radio": radio}
TOLERANCE = 1e-4  # largest allowed difference of features in float32


@dataclass
class ConversionReport:
    """
    Result of a conversion.

    Attributes:
        output: the folder written.
        used: number of tensors of the checkpoint that the model uses.
        skipped: tensors that the model does not have, with the reason.
        notes: properties that do not come from the checkpoint, and their origin.
        differences: largest absolute difference between the reloaded folder and the reference implementation, by check.
    """

    output: Path
    used: int
    skipped: dict[str, str]
    notes: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.used} tensors used, {len(self.skipped)} skipped"]
        lines += [f"  skipped: {name} ({reason})" for name, reason in self.skipped.items()]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  largest difference, {name}: {value:.1e}" for name, value in self.differences.items()]
        return "\n".join([*lines, f"written: {self.output}"])


def convert(
    checkpoint: str | Path,
    family: str,
    base: str,
    output: str | Path,
    *,
    tokenizer: str | None = None,
    text_heads: int | None = None,
    vision_act: str | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    adaptor: str = "siglip2-g",
    force: bool = False,
) -> ConversionReport:
    """
    Convert an official checkpoint, of SPAR or of a base model in timm, open_clip or dinov3 naming, to a folder.

    Tensors are read without unpickling code. Each is used exactly once, or reported as skipped with the reason; a missing,
    unknown or misshapen one stops the conversion. The folder is written under a temporary name, loaded again, compared with
    a reference implementation in plain torch, and only then renamed.

    Args:
        checkpoint: `.ckpt`, `.pt`, `.pth` or `.safetensors`.
        family: `"siglip2"` (fixed resolution), `"openclip"` (CLIP with MaskCLIP read-out), `"dinov3txt"` or `"radio"`
            (C-RADIO with the head of its SigLIP2 teacher).
        base: hub id or folder of the same architecture in the format of transformers. It determines the number of heads,
            activation, image size, image statistics and tokenizer. For `"dinov3txt"` a DINOv3 model; its weights are used
            for the backbone if the checkpoint contains only the vision head and text tower of dino.txt. For `"radio"` a
            C-RADIO model, whose weights are the backbone's.
        output: the folder to write.
        tokenizer: hub id or folder, for a base without tokenizer (that of CLIP, for `"dinov3txt"`). For `"radio"` the
            SigLIP2 model that was the teacher (`google/siglip2-giant-opt-patch16-384`): its text tower is used too.
        text_heads: number of attention heads of the text tower, for `"dinov3txt"` (20 in the published ViT-L).
        vision_act: activation of SigLIP's vision tower, `"gelu"` or `"gelu_pytorch_tanh"`. The configurations on the hub say
            `"gelu_pytorch_tanh"` for all sizes, but timm uses `"gelu"` for the ViT-B (verified; the default for this size)
            and `"gelu_pytorch_tanh"` for SO400M. For all other sizes this option is required.
        image_mean, image_std: per channel, if the checkpoint was trained with other statistics than its base.
        adaptor: name or number of the head, for `"radio"`.
        force: replace `output` if it exists.

    Raises:
        FileExistsError: `output` exists and `force` is not given, or it is not a SPAR folder.
        MissingFiles: no such checkpoint.
        UsageError: an unknown family, a base of another family, a file that contains code, tensors that do not fit or hold
            NaN; a checkpoint or base in the folder to replace; another process converts to the same folder.
        RuntimeError: the written folder differs from the reference implementation by more than 1e-4.
    """
    output, checkpoint = Path(output), Path(checkpoint)
    check_output(output, force)
    check_inputs_stay([output], [checkpoint, base, tokenizer])
    if family not in FAMILIES:
        raise UsageError(f"Family {family!r} is unknown; use one of {', '.join(FAMILIES)}.")
    with locked(output.with_name(f".{output.name}.lock"), str(output)):
        check_output(output, force)  # another process may have written it since
        tensors, source = read_source(checkpoint, family, adaptor)
        whole = family != "radio" and any(name.startswith(DINOV3_BACKBONE) for name in tensors)
        backbone_from_base = family in ("dinov3txt", "radio") and not whole
        config = build_config(family, base, source, tokenizer, text_heads, vision_act, adaptor)
        if backbone_from_base:
            add_backbone(source, base)
        if family == "radio":
            add_text_tower(source, tokenizer)
        model = SparForOpenVocabSegmentation(config).eval()
        load_renamed(model, source, checkpoint)
        processor = build_processor(family, base, tokenizer, config, image_mean, image_std)
        notes = describe_origin(config, family, base, tokenizer, backbone_from_base)
        report = ConversionReport(output, len(tensors) - len(source.skipped), source.skipped, notes)
        with writing_folder(output) as temporary:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
            references = (base if backbone_from_base else None, tokenizer if family == "radio" else None, adaptor)
            report.differences = compare(temporary, family, tensors, *references)
            wrong = {name: value for name, value in report.differences.items() if not value < TOLERANCE}  # also NaN
            if wrong:
                raise RuntimeError(
                    f"The converted model differs from the reference implementation by more than {TOLERANCE:.0e}: {wrong}. "
                    f"Check that {base} is the base of this checkpoint; nothing was written."
                )
    return report


def read_source(
    checkpoint: Path, family: str, adaptor: str = "siglip2-g"
) -> tuple[dict[str, torch.Tensor], CheckpointTensors]:
    """
    The tensors of a checkpoint by their old names, and renamed.

    Raises:
        UsageError: the file is no checkpoint, or a tensor that is used holds NaN or infinity.
    """
    tensors = read_tensors(checkpoint)
    source = CheckpointTensors(tensors)
    FAMILIES[family].rename(source, *([adaptor] if family == "radio" else []))
    used = {name: tensor for name, tensor in tensors.items() if name not in source.skipped}
    if spoiled := [name for name, tensor in used.items() if not tensor.isfinite().all()]:
        raise UsageError(
            f"{checkpoint}: {len(spoiled)} of {len(tensors)} tensors hold NaN or infinity: {', '.join(spoiled[:8])}. Use an "
            "earlier checkpoint of that training, or copy the file again."
        )
    return tensors, source


def describe_origin(
    config: SparConfig, family: str, base: str, tokenizer: str | None, backbone_from_base: bool
) -> list[str]:
    """What does not come from the checkpoint, for the report."""
    vision, text = config.backbone_config, "" if tokenizer else ", tokenizer"
    weights = f"backbone weights from {base}, since the checkpoint contains only the vision head and the text tower"
    if family == "radio":
        weights = f"backbone weights from {base}, text tower from {tokenizer}: of the checkpoint only the head is taken"
    return [
        *([weights] if backbone_from_base else []),
        f"from {base}: {vision.num_attention_heads} heads, image size {config.image_size}, image statistics{text}",
        f"activation of the vision tower: {vision.hidden_act}",
    ]


def check_output(output: Path, force: bool) -> None:
    """Refuse to replace a folder without `force`, and any folder that was not written by a conversion."""
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists. Name another folder, or replace it with --overwrite.")
    if output.exists() and not is_spar_folder(output):
        raise FileExistsError(f"{output} is not a SPAR folder, so --overwrite does not delete it. Name another folder.")


def add_backbone(source: CheckpointTensors, base: str) -> None:
    """Take the weights of a DINOv3 backbone from the base."""
    backbone = SparVisionModel.from_backbone(base)
    source.renamed |= {f"vision_model.{name}": tensor.float() for name, tensor in backbone.state_dict().items()}
    source.missing = [name for name in source.missing if not name.startswith(DINOV3_BACKBONE)]


def add_text_tower(source: CheckpointTensors, name: str | None) -> None:
    """Take the weights of a text tower from the model it belongs to; not the scale, which is of that model's own loss."""
    config = load_source_config(str(name)).text_config
    text_model = TEXT_MODELS[config.model_type].from_pretrained(name, dtype=torch.float32)
    source.renamed |= {f"text_model.{key}": tensor for key, tensor in text_model.state_dict().items()}
    source.renamed["logit_scale"] = torch.zeros(1)


def is_spar_folder(folder: Path) -> bool:
    """Whether a folder contains a SPAR model."""
    config = folder / "config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("model_type") == "spar"


def build_config(
    family: str,
    base: str,
    source: CheckpointTensors,
    tokenizer: str | None,
    heads: int | None,
    vision_act: str | None,
    adaptor: str,
) -> SparConfig:
    """The configuration of the base, with the settings of the family's published code."""
    layout, base_config = FAMILIES[family], load_source_config(base)
    if base_config.model_type not in layout.MODEL_TYPES:
        raise UsageError(
            f"{base} is a model of type {base_config.model_type!r}, but the base of a {family} checkpoint must be one of "
            f"{', '.join(layout.MODEL_TYPES)}."
        )
    vision = getattr(base_config, "vision_config", base_config).to_dict() | layout.VISION_SETTINGS
    if family == "radio":
        text_config = None if tokenizer is None else getattr(load_source_config(tokenizer), "text_config", None)
        if text_config is None:
            raise UsageError(
                "The text tower of --family radio is that of its teacher, SigLIP2. Pass the model with --tokenizer "
                "google/siglip2-giant-opt-patch16-384."
            )
        vision |= radio.head_settings(source.renamed, adaptor)
        return SparConfig(backbone_config=vision, text_config=text_config.to_dict(), dtype="float32")
    if family == "dinov3txt":
        if tokenizer is None or heads is None:
            raise UsageError(
                "A DINOv3 base has no text tower, and the checkpoint does not tell its tokenizer and number of heads. Pass "
                "--tokenizer (that of CLIP, e.g. openai/clip-vit-base-patch16) and --text-heads (20 for the published "
                "ViT-L)."
            )
        periods = source.renamed.pop("rope_periods", None)
        vision["rope_periods"] = None if periods is None else periods.flatten().tolist()
        text = layout.TEXT_SETTINGS | dinov3txt_text_config(source.renamed, tokenizer, heads)
        return SparConfig(backbone_config=vision, text_config=text, readout="dinov3txt", dtype="float32")
    text = base_config.text_config.to_dict() | layout.TEXT_SETTINGS
    if family == "siglip2":
        vision["hidden_act"] = siglip_activation(base, vision, vision_act)
    else:  # CLIP's projections are as wide as its top-level configuration says
        vision["projection_dim"] = text["projection_dim"] = base_config.projection_dim
    return SparConfig(backbone_config=vision, text_config=text, dtype="float32")


def dinov3txt_text_config(renamed: dict[str, torch.Tensor], tokenizer: str, heads: int) -> dict[str, Any]:
    """Text configuration of dino.txt: sizes from the shapes of the tensors, special tokens from the tokenizer."""
    tower = "text_model.text_model."
    layers = [int(name.split(".")[4]) for name in renamed if name.startswith(f"{tower}encoder.layers.")]
    text: dict[str, Any] = {"model_type": "clip_text_model", "num_attention_heads": heads}
    text["num_hidden_layers"] = 1 + max(layers, default=-1)
    sizes = {
        ("vocab_size", "hidden_size"): f"{tower}embeddings.token_embedding.weight",
        ("max_position_embeddings",): f"{tower}embeddings.position_embedding.weight",
        ("intermediate_size",): f"{tower}encoder.layers.0.mlp.fc1.weight",
        ("projection_dim",): "text_model.text_projection.weight",
    }
    for keys, name in sizes.items():
        if name in renamed:
            text |= dict(zip(keys, renamed[name].shape, strict=False))
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    special = {"bos": loaded.bos_token_id, "eos": loaded.eos_token_id, "pad": loaded.pad_token_id}
    return text | {f"{key}_token_id": value for key, value in special.items()}


def siglip_activation(base: str, vision: dict[str, Any], vision_act: str | None) -> str:
    """Activation of SigLIP's vision tower, which is known without `vision_act` for the ViT-B only."""
    if vision_act is None and (vision["hidden_size"], vision["num_hidden_layers"]) != (768, 12):
        raise UsageError(
            f"The activation of {base}'s vision tower is not stored in the checkpoint, and the default is verified for the "
            "ViT-B only. Pass --vision-act gelu or --vision-act gelu_pytorch_tanh (SO400M), as timm defines the model."
        )
    if vision_act not in (None, "gelu", "gelu_pytorch_tanh"):
        raise UsageError(f"--vision-act {vision_act}: use gelu or gelu_pytorch_tanh.")
    return vision_act or "gelu"


def load_renamed(model: SparForOpenVocabSegmentation, source: CheckpointTensors, checkpoint: str | Path) -> None:
    """Load the renamed tensors; every weight must exist with its shape, and no tensor may remain."""
    expected = model.state_dict()
    if "logit_bias" not in source.renamed:
        expected.pop("logit_bias")  # checkpoints of the softmax loss have none; it stays zero
    problems = [f"missing in the checkpoint: {name}" for name in source.missing]
    problems += [f"not in the model: {name}" for name in sorted(source.remaining)]
    for name, tensor in sorted(source.renamed.items()):
        if name not in expected:
            problems.append(f"not in the base: {name}")
        elif expected[name].shape != tensor.shape:
            shape = tuple(expected[name].shape)
            problems.append(f"wrong shape: {name} is {tuple(tensor.shape)}, but {shape} in the base")
    problems += [f"missing for the model: {name}" for name in sorted(set(expected) - set(source.renamed))]
    if problems:
        shown = "\n  ".join(problems[:40]) + (f"\n  and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise UsageError(f"{checkpoint} does not fit its family and base:\n  {shown}\nNothing was written.")
    model.load_state_dict(source.renamed, strict=False)


def build_processor(
    family: str, base: str, tokenizer: str | None, config: SparConfig, mean: list[float] | None, std: list[float] | None
) -> SparProcessor:
    """The processor of the base, with the published text preprocessing and the given image statistics."""
    if family in ("dinov3txt", "radio"):
        text = published_tokenizer(AutoTokenizer.from_pretrained(tokenizer), config.text_config)
        processor = SparProcessor(SparImageProcessorPil.from_backbone(base), text)
    else:
        processor = SparProcessor.from_backbone(base, tokenizer)
    if mean is not None:
        processor.image_processor.image_mean = list(mean)
    if std is not None:
        processor.image_processor.image_std = list(std)
    return processor


@torch.no_grad()
def compare(
    folder: Path,
    family: str,
    tensors: dict[str, torch.Tensor],
    base: str | None,
    text_model: str | None = None,
    adaptor: str = "siglip2-g",
) -> dict[str, float]:
    """
    Compare the folder, loaded again, with the reference implementation on random pixels and token ids.

    Args:
        folder: the converted model.
        family: has the reference implementation.
        tensors: of the checkpoint, by their old names.
        base: model that the backbone's weights come from; transformers' own implementation is the reference then.
        text_model: model that the text tower comes from; likewise.
        adaptor: of a C-RADIO head.

    Returns:
        Largest absolute difference of feature maps, at the native size and two others, of image and of text embeddings.
    """
    layout, model = FAMILIES[family], SparForOpenVocabSegmentation.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    tensors = {name: value.float() for name, value in tensors.items()}
    generator = torch.Generator().manual_seed(0)
    patch, side = config.patch_size, config.image_size // config.patch_size
    backbone = None if base is None else layout.load_base(base)
    differences = {}
    for rows, columns in ((side, side), (side + 2, side // 2 + 1), (side // 2 + 1, 2 * side)):
        pixels = torch.randn(1, 3, rows * patch, columns * patch, generator=generator)
        if backbone is None:
            expected = layout.dense_features(tensors, pixels, config)
        else:
            expected = layout.features_on(backbone, tensors, pixels, adaptor)
        found = model.vision_model(pixels).feature_map
        differences[f"features {rows * patch}×{columns * patch}"] = float((found - expected).abs().max())
    if hasattr(layout, "pooled_features") and base is None:
        pixels = torch.randn(1, 3, side * patch, (side + 1) * patch, generator=generator)
        found = model.vision_model(pixels, output_pooled=True).pooler_output
        differences["pooled image"] = float((found - layout.pooled_features(tensors, pixels, config)).abs().max())
    text = config.text_config
    end = text.vocab_size - 1
    ids = torch.randint(3, end, (3, text.max_position_embeddings), generator=generator)
    if text.model_type == "clip_text_model":  # pooled at the end token, the last one of CLIP's vocabularies
        ids[:, -3:] = end
    if text_model is None:
        expected = layout.text_features(tensors, ids, config)
    else:
        expected = (
            TEXT_MODELS[text.model_type].from_pretrained(text_model, dtype=torch.float32).eval()(ids).pooler_output
        )
    differences["texts"] = float((model.get_text_features(ids).pooler_output - expected).abs().max())
    return differences
