"""Conversion of one checkpoint: configuration, weights, check against the source's own formulae, one atomic rename."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DINOv3ViTModel

from spar_hf.model.backbone_sources import load_source_config
from spar_hf.model.configuration_spar import SparConfig
from spar_hf.model.image_processing_spar import SparImageProcessorPil
from spar_hf.model.modeling_spar import SparForOpenVocabSegmentation, SparVisionModel
from spar_hf.model.processing_spar import SparProcessor, published_tokenizer
from spar_hf.utils.atomic import writing_folder

from . import dinov3txt, openclip, siglip2
from .source import Source, read_tensors

FAMILIES: dict[str, Any] = {"siglip2": siglip2, "openclip": openclip, "dinov3txt": dinov3txt}
TOLERANCE = 1e-4  # largest difference, in float32, that the reloaded folder may show


@dataclass
class ConversionReport:
    """
    What a conversion did.

    Attributes:
        output: the folder written.
        used: number of tensors of the checkpoint that went into the model.
        skipped: tensors without a place, each with the reason.
        notes: what did not come from the checkpoint, and where it came from.
        differences: per check, the largest absolute difference between the reloaded folder and the source's formulae.
    """

    output: Path
    used: int
    skipped: dict[str, str]
    notes: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.used} tensors used, {len(self.skipped)} left out"]
        lines += [f"  left out: {name} ({reason})" for name, reason in self.skipped.items()]
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
    force: bool = False,
) -> ConversionReport:
    """
    Convert an official checkpoint (SPAR's, or that of a base in timm, open_clip or dinov3 naming) into a folder.

    Tensors are read without unpickling code. Each is used exactly once or named in the report with the reason; a missing,
    extra or misshapen one stops the conversion. The folder is written under a temporary name, loaded again and compared
    with the source's formulae in plain torch, and only then renamed.

    Args:
        checkpoint: `.ckpt`, `.pt`, `.pth` or `.safetensors`.
        family: `"siglip2"` (fixed resolution), `"openclip"` (CLIP, MaskCLIP read-out) or `"dinov3txt"`.
        base: hub id or folder of the same architecture in transformers' format. Heads, activation, image size, image
            statistics and tokenizer are its to tell. For `"dinov3txt"` a DINOv3 folder; where the checkpoint holds only
            dino.txt's head and text tower, the backbone's weights are taken from it too.
        output: the folder to write.
        tokenizer: hub id or folder, where the base has none (CLIP's, for `"dinov3txt"`).
        text_heads: attention heads of the text tower, for `"dinov3txt"` (20 in the published ViT-L), which no tensor tells.
        vision_act: activation of SigLIP's vision tower, `"gelu"` or `"gelu_pytorch_tanh"`. The hub's configuration says the
            latter for all sizes, timm computes the former for the ViT-B (checked, so it is the default there) and the
            latter for SO400M; for other sizes than the ViT-B it must be given.
        image_mean, image_std: per channel, where the checkpoint was trained with other statistics than its base.
        force: replace `output` if it exists.

    Raises:
        FileExistsError: `output` exists and `force` is not given.
        FileNotFoundError: no such checkpoint.
        ValueError: an unknown family, a base of another one, a file with code in it, or tensors that do not fit.
        RuntimeError: the written folder differs from the source's formulae by more than 1e-4.
    """
    if family not in FAMILIES:
        raise ValueError(f"Family {family!r} is unknown; use one of {', '.join(FAMILIES)}.")
    output = Path(output)
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists. Name another folder, or pass --force to replace it.")
    if output.exists() and not is_spar_folder(output):
        raise FileExistsError(f"{output} is no SPAR folder, so --force does not delete it. Name another folder.")
    names, tensors = FAMILIES[family], read_tensors(checkpoint)
    source, notes = Source(tensors), []
    names.rename(source)
    complete = family != "dinov3txt" or any(name.startswith("visual_model.backbone.") for name in tensors)
    if not complete:
        backbone = SparVisionModel.from_backbone(base)
        source.target |= {f"vision_model.{name}": tensor.float() for name, tensor in backbone.state_dict().items()}
        source.absent = [name for name in source.absent if not name.startswith("visual_model.backbone.")]
        notes.append(
            f"the backbone's weights are those of {base}: the checkpoint holds the head and the text tower alone"
        )
    config = build_config(names, family, base, source, tokenizer, text_heads, vision_act)
    notes.append(
        f"from {base}: {config.backbone_config.num_attention_heads} heads, image size {config.image_size}, image statistics"
        + ("" if tokenizer else ", tokenizer")
    )
    notes.append(f"activation of the vision tower: {config.backbone_config.hidden_act}")
    model = SparForOpenVocabSegmentation(config).eval()
    fit(model, source, checkpoint)

    processor = build_processor(family, base, tokenizer, config, image_mean, image_std)
    report = ConversionReport(output, len(tensors) - len(source.skipped), source.skipped, notes)
    with writing_folder(output) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        report.differences = compare(temporary, names, tensors if complete else tensors | {"base": base})
        worst = max(report.differences.values())
        if not worst < TOLERANCE:
            raise RuntimeError(
                f"The converted model differs from the source's formulae by {worst:.1e} (allowed: {TOLERANCE:.0e}): "
                f"{report.differences}. Check that {base} is the base of this checkpoint; nothing was written."
            )
    return report


def is_spar_folder(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "spar"


def build_config(
    names,
    family: str,
    base: str,
    source: Source,
    tokenizer: str | None,
    text_heads: int | None,
    vision_act: str | None,
) -> SparConfig:
    """The configuration: the base's, with what the family's published code computes differently."""
    base_config = load_source_config(base)
    if base_config.model_type not in names.MODEL_TYPES:
        raise ValueError(
            f"{base} is a model of type {base_config.model_type!r}, but the base of a {family} checkpoint must be one of "
            f"{', '.join(names.MODEL_TYPES)}."
        )
    vision = getattr(base_config, "vision_config", base_config).to_dict() | names.VISION_SETTINGS
    if family != "dinov3txt":
        text = base_config.text_config.to_dict() | names.TEXT_SETTINGS
        if family == "siglip2":
            vision["hidden_act"] = siglip_activation(base, vision, vision_act)
        else:  # both of CLIP's projections have the width at the top of its configuration
            vision["projection_dim"] = text["projection_dim"] = base_config.projection_dim
        return SparConfig(backbone_config=vision, text_config=text, dtype="float32")
    if tokenizer is None or text_heads is None:
        raise ValueError(
            "A DINOv3 base has no text tower, and no tensor tells the tokenizer and the number of attention heads of "
            "dino.txt's. Pass `--tokenizer` (CLIP's, e.g. openai/clip-vit-base-patch16) and `--text-heads` (20 for the "
            "published ViT-L)."
        )
    periods = source.target.pop("rope_periods", None)
    vision["rope_periods"] = None if periods is None else periods.flatten().tolist()
    text = names.TEXT_SETTINGS | {"model_type": "clip_text_model", "num_attention_heads": text_heads}
    text["num_hidden_layers"] = 1 + max(
        [int(name.split(".")[4]) for name in source.target if name.startswith("text_model.text_model.encoder.layers.")],
        default=-1,
    )
    sizes = {
        ("vocab_size", "hidden_size"): "text_model.text_model.embeddings.token_embedding.weight",
        ("max_position_embeddings",): "text_model.text_model.embeddings.position_embedding.weight",
        ("intermediate_size",): "text_model.text_model.encoder.layers.0.mlp.fc1.weight",
        ("projection_dim",): "text_model.text_projection.weight",
    }
    for keys, name in sizes.items():
        if name in source.target:
            text |= dict(zip(keys, source.target[name].shape, strict=False))
    words = AutoTokenizer.from_pretrained(tokenizer)
    special = {"bos": words.bos_token_id, "eos": words.eos_token_id, "pad": words.pad_token_id}
    text |= {f"{key}_token_id": value for key, value in special.items()}
    return SparConfig(backbone_config=vision, text_config=text, readout="dinov3txt", dtype="float32")


def siglip_activation(base: str, vision: dict[str, Any], vision_act: str | None) -> str:
    if vision_act is None and (vision["hidden_size"], vision["num_hidden_layers"]) != (768, 12):
        raise ValueError(
            f"No tensor tells the activation of {base}'s vision tower, and only that of the ViT-B was checked. Pass "
            "`--vision-act gelu` or `--vision-act gelu_pytorch_tanh` (SO400M), as timm's definition of the model says."
        )
    if vision_act not in (None, "gelu", "gelu_pytorch_tanh"):
        raise ValueError(f"--vision-act {vision_act}: use gelu or gelu_pytorch_tanh.")
    return vision_act or "gelu"


def fit(model: SparForOpenVocabSegmentation, source: Source, checkpoint: str | Path) -> None:
    """Load what was renamed; every weight must be there, have its shape, and nothing may be left over."""
    wanted = model.state_dict()
    if "logit_bias" not in source.target:
        wanted.pop("logit_bias")  # only the sigmoid loss has one; zero else
    problems = [f"missing in the checkpoint: {name}" for name in source.absent]
    problems += [f"without a place in the model: {name}" for name in sorted(source.left)]
    for name, tensor in sorted(source.target.items()):
        if name not in wanted:
            problems.append(f"one more than the base has: {name}")
        elif wanted[name].shape != tensor.shape:
            shape = tuple(wanted[name].shape)
            problems.append(f"misshapen: {name} is {tuple(tensor.shape)}, of the base's size it would be {shape}")
    problems += [f"missing for the model: {name}" for name in sorted(set(wanted) - set(source.target))]
    if problems:
        shown = "\n  ".join(problems[:40]) + (f"\n  and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise ValueError(f"{checkpoint} does not fit its family and base:\n  {shown}\nNothing was written.")
    model.load_state_dict(source.target, strict=False)


def build_processor(
    family: str,
    base: str,
    tokenizer: str | None,
    config: SparConfig,
    image_mean: list[float] | None,
    image_std: list[float] | None,
) -> SparProcessor:
    if family == "dinov3txt":
        words = published_tokenizer(AutoTokenizer.from_pretrained(tokenizer), config.text_config)
        processor = SparProcessor(SparImageProcessorPil.from_backbone(base), words)
    else:
        processor = SparProcessor.from_backbone(base, tokenizer)
    if image_mean is not None:
        processor.image_processor.image_mean = list(image_mean)
    if image_std is not None:
        processor.image_processor.image_std = list(image_std)
    return processor


@torch.no_grad()
def compare(folder: Path, names, tensors: dict[str, Any]) -> dict[str, float]:
    """Largest differences between the folder, loaded anew, and the source's formulae, at the native size and two others."""
    model = SparForOpenVocabSegmentation.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    base = tensors.get("base")
    tensors = {name: value.float() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    generator = torch.Generator().manual_seed(0)
    patch, side = config.patch_size, config.image_size // config.patch_size
    differences = {}
    for rows, columns in ((side, side), (side + 2, side // 2 + 1), (side // 2 + 1, 2 * side)):
        pixels = torch.randn(1, 3, rows * patch, columns * patch, generator=generator)
        if base is None:
            expected = names.dense_features(tensors, pixels, config)
        else:  # the backbone is transformers' own
            tokens = DINOv3ViTModel.from_pretrained(base, dtype=torch.float32).eval()(pixels).last_hidden_state
            expected = tokens[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        found = model.vision_model(pixels).feature_map
        differences[f"features {rows * patch}×{columns * patch}"] = float((found - expected).abs().max())
    if hasattr(names, "pooled_features") and base is None:
        pixels = torch.randn(1, 3, side * patch, (side + 1) * patch, generator=generator)
        found = model.vision_model(pixels, output_pooled=True).pooler_output
        differences["pooled image"] = float((found - names.pooled_features(tensors, pixels, config)).abs().max())
    text = config.text_config
    end = text.vocab_size - 1
    ids = torch.randint(3, end, (3, text.max_position_embeddings), generator=generator)
    if text.model_type == "clip_text_model":  # pooled at the end token, in all of CLIP's vocabularies the last
        ids[:, -3:] = end
    expected = names.text_features(tensors, ids, config)
    differences["texts"] = float((model.get_text_features(ids).pooler_output - expected).abs().max())
    return differences
