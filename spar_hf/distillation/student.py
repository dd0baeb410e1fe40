"""What is trained, from a few weights to all; adapters; and how a student is written to disk."""

import copy
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCardData
from torch import nn

from spar_hf import SparForOpenVocabSegmentation, SparVisionModel
from spar_hf.model.backbone_sources import load_source_config
from spar_hf.utils.atomic import write_atomically, write_json, write_text, writing_folder

# parts by name, as patterns of parameters' names: inside a block, and in the backbone around the blocks
BLOCK_PARTS = {
    "qkv": r"[qkv]_proj\.",
    "attention": r"(self_attn|attention)\.",
    "mlp": r"mlp\.",
    "norm": r"(layer_)?norm\d\.|layer_scale",
}
OTHER_PARTS = {
    "position_table": r"embeddings\.position_embedding",
    "patch_embedding": r"embeddings\.patch_embeddings?\.",
    "tokens": r"embeddings\.(class_embedding|cls_token|register_tokens)|pre_layrnorm",
    "readout": r"(post_layernorm|norm|head|visual_projection)\.",
}


def load_model(name: str) -> tuple[SparForOpenVocabSegmentation | SparVisionModel, SparVisionModel]:
    """The whole model, with both towers where there are two, and its vision tower; of a SPAR folder or a backbone."""
    if getattr(load_source_config(name), "text_config", None) is None:
        model = SparVisionModel.from_backbone(name)
        return model, model
    model = SparForOpenVocabSegmentation.from_backbone(name)
    return model, model.vision_model


def mean_of_students(names: list[str], like: SparVisionModel) -> tuple[dict[str, torch.Tensor], int | None]:
    """
    The mean of the vision towers' weights, and their common `position_extent`. Students that share their start stay in one
    valley, and half-way between two is nearer to the teacher than their mean error (model soups, arXiv 2203.05482).
    `like` has the teacher's shape, which is theirs.

    Raises:
        ValueError: towers of another shape, or positions that are read differently.
    """
    students = [load_model(name)[1] for name in names]
    first, states = students[0], [student.state_dict() for student in students]
    shapes = {key: value.shape for key, value in like.state_dict().items()}
    for name, student, state in zip(names, students, states, strict=True):
        if student.config.position_extent != first.config.position_extent:
            raise ValueError(
                f"--student: the positions of {names[0]} span {first.config.position_extent} px, those of {name} "
                f"{student.config.position_extent}. Give students with the same."
            )
        if {key: value.shape for key, value in state.items()} != shapes:
            raise ValueError(
                f"--student {name} is of another shape than --model, its teacher: give a student of that one."
            )
    mean = {key: torch.stack([state[key].float() for state in states]).mean(0) for key in states[0]}
    return mean, first.config.position_extent


def trainable_names(model: SparVisionModel, train_layers: str, parts: list[str]) -> list[str]:
    """
    Names of the parameters that `--train_layers` and `--train_parts` choose: never what dense features do not read (a
    pooling probe, dino.txt's vision head), which would get no gradient and stop distributed training.

    Raises:
        ValueError: more blocks than there are, or a part that this family has not.
    """
    backbone = model.backbone
    blocks = list(backbone.blocks)
    count = len(blocks) if train_layers == "all" else int(train_layers)
    if count > len(blocks):
        raise ValueError(f"{count} blocks are to be trained, and the backbone has {len(blocks)}. Name fewer, or 'all'.")
    chosen, in_block = {id(p) for block in blocks[len(blocks) - count :] for p in block.parameters()}, {}
    for block in blocks:
        in_block |= {id(parameter): name for name, parameter in block.named_parameters()}
    used, names = set(), []
    for name, parameter in backbone.named_parameters():
        if any(part in name for part in backbone.unread):
            continue
        inside = in_block.get(id(parameter))
        table, local = (OTHER_PARTS, name) if inside is None else (BLOCK_PARTS, inside)
        fits = {part for part in parts if part in table and re.match(rf"(.*\.)?({table[part]})", local)}
        if id(parameter) in chosen or (inside is None and (train_layers == "all" or parts)):
            used |= fits
            if fits or not parts:
                names.append(f"backbone.{name}")
    if set(parts) - used:
        lacking = ", ".join(sorted(set(parts) - used))
        raise ValueError(f"--train_parts {lacking}: a {model.config.readout} backbone has no such part there.")
    return names


def choose_parameters(model: SparVisionModel, train_layers: str, parts: list[str] | None = None) -> list[nn.Parameter]:
    """
    Freeze all but what is chosen, see [`trainable_names`], and return that. What is frozen before the first trained part
    runs without gradient by itself: autograd keeps nothing where no input needs one.
    """
    names = set(trainable_names(model, train_layers, parts or []))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def add_adapters(model: SparVisionModel, options: Any) -> Any:
    """The model under peft with LoRA on the chosen linear layers of its blocks; all else is frozen."""
    from peft import LoraConfig, get_peft_model

    names = set(trainable_names(model, options.train_layers, options.train_parts or ["attention", "mlp"]))
    blocks = {module for block in model.backbone.blocks for module in block.modules()}
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in blocks and f"{name}.weight" in names
    ]
    config = LoraConfig(
        r=options.lora_rank, lora_alpha=options.lora_alpha or 2 * options.lora_rank, target_modules=targets
    )
    return get_peft_model(model, config)


def share_frozen(student: nn.Module, teacher: nn.Module) -> int:
    """
    Let teacher and student hold the student's frozen weights once, where they are the same; returns how many numbers are
    shared. Both must be on their device already.
    """
    theirs = dict(teacher.named_parameters())
    shared = 0
    for name, parameter in student.named_parameters():
        # adapters rename what they wrap
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if parameter.requires_grad or name not in theirs or not torch.equal(parameter, theirs[name]):
            continue
        theirs[name].data = parameter.data
        shared += parameter.numel()
    return shared


def merge_adapters(state: dict[str, torch.Tensor], wrapped: Any, start: str) -> dict[str, torch.Tensor]:
    """The plain weights of a student with adapters, from its state and the folder that it started as."""
    from peft import get_peft_model

    config = copy.copy(wrapped.peft_config["default"])
    config.inference_mode, config.base_model_name_or_path = False, None
    fresh = get_peft_model(load_model(start)[1], config)
    fresh.load_state_dict(state)
    return fresh.merge_and_unload().state_dict()


def save_student(
    model: Any, processor: Any, state: dict[str, torch.Tensor], options: Any, record: dict, folder: Path
) -> None:
    """Write a `from_pretrained` folder; `state` is the vision tower's, and `model` gives the other."""
    if isinstance(model, SparForOpenVocabSegmentation):
        text = {name: x for name, x in model.state_dict().items() if not name.startswith("vision_model.")}
        state = text | {f"vision_model.{name}": tensor for name, tensor in state.items()}
    model.config.distillation = record
    # the configuration's dtype stays float32: half precision is for the disk
    dtype = getattr(torch, options.save_dtype)
    with writing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
        processor.save_pretrained(temporary)
        write_text(temporary / "README.md", model_card(temporary, options, record))


def save_adapter(wrapped: Any, state: dict[str, torch.Tensor], options: Any, record: dict, folder: Path) -> None:
    """Write the adapters alone, in peft's format, as [`save_student`] writes a student."""
    start = (options.student or [options.model])[0]
    wrapped.peft_config["default"].base_model_name_or_path = short_name(start)
    with writing_folder(folder) as temporary:
        wrapped.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
        write_json(temporary / "distillation.json", record)
        write_text(temporary / "README.md", model_card(temporary, options, record))


def finish_folder(folder: Path, options: Any, record: dict, pictures: list[Path]) -> None:
    """What is known only at the end: the whole curve in record and card, and the pictures beside them."""
    for picture in pictures:
        write_atomically(folder / picture.name, partial(shutil.copyfile, picture))
    for name, part in (("config.json", "distillation"), ("distillation.json", None)):
        if (folder / name).is_file():
            held = json.loads((folder / name).read_text(encoding="utf-8"))
            write_json(folder / name, held | {part: record} if part else record)
    write_text(folder / "README.md", model_card(folder, options, record, [picture.name for picture in pictures]))


def short_name(path: str) -> str:
    """A hub id as it is, of a path the last two parts: what a record may say without naming one machine's folders."""
    return "/".join(Path(path).parts[-2:])


def has_text_tower(folder: Path) -> bool:
    """Whether a written folder takes words: adapters and students of vision-only backbones give features alone."""
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("text_config") is not None


def model_card(folder: Path, options: Any, record: dict, pictures: list[str] | None = None) -> str:
    """
    The card of a student, in whose `folder` all else is written: what it learned from and how, how far it is from its
    teacher, and the options to repeat it.
    """
    adapter, words = options.lora_rank is not None and not options.merge, has_text_tower(folder)
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-segmentation" if words else "image-feature-extraction",
        tags=["spar", "open-vocabulary-segmentation"] if words else ["spar"],
    )
    rows = "\n".join(f"| {key} | {value} |" for key, value in record.items() if key != "held_out")
    paths = {"model", "student", "output", "images", "teacher_cache"}
    repeat = {
        name: [short_name(v) for v in value] if isinstance(value, list) and name in paths
        else short_name(value) if isinstance(value, str) and name in paths
        else value
        for name, value in vars(options).items()
        if value not in (None, []) and name != "resume"
    }  # fmt: skip
    held_out = record.get("held_out")
    curve = ""
    if held_out:
        points = [{"step": 0, **held_out["before"]}, *held_out["curve"]]
        lines = "\n".join(f"| {point['step']} | {point['mse']} | {point['cosine']} |" for point in points)
        curve = f"""
## Held-out error

Against the full teacher on {held_out["images"]} images that were not trained on. The weights are those of step
{held_out["after"]["step"]}, where the error was least.

| step | mean squared error | cosine |
|---|---|---|
{lines}
"""
    shown = "".join(f"\n![{Path(name).stem}]({name})\n" for name in pictures or [])
    return f"""---
{data.to_yaml()}
---
# {Path(options.output).name}

A SPAR student: dense features in one pass at any resolution, distilled from the sliding-window teacher of
`{record["teacher"]}` (arXiv 2604.02252). The licence of the base and of the images applies to these weights.

| distillation | |
|---|---|
{rows}
{curve}{shown}
## Options

`python training/distill.py recipe.yaml`, with the paths of your machine:

```yaml
{yaml.safe_dump(repeat, sort_keys=False).strip()}
```
"""
