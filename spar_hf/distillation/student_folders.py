"""How a student is written: a folder for `from_pretrained` or of adapters, its record, its card and its pictures."""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCardData
from safetensors.torch import load_file, save_file

from spar_hf import SparForOpenVocabSegmentation
from spar_hf.distillation.models import load_model
from spar_hf.utils.atomic import write_atomically, write_json, write_text, writing_folder
from spar_hf.utils.errors import NotFinite
from spar_hf.utils.model_cards import model_card, rows, short_name

PATHS = ("model", "student", "output", "images", "teacher_cache")  # options that name folders of one machine


def save_student(
    model: Any,
    processor: Any,
    state: dict[str, torch.Tensor],
    folder: Path,
    record: dict[str, Any],
    recipe: dict[str, Any],
    dtype: str = "float32",
) -> None:
    """
    Write a folder for `from_pretrained`.

    Args:
        model: its text tower, if there is one, is written as it is.
        state: weights of the vision tower.
        record: how the student was made; `distillation` in the configuration.
        recipe: options of the run by name, for the card.
        dtype: precision of the stored weights. The configuration says float32 in any case: half precision is for the disk.

    Raises:
        NotFinite: a weight is beyond the range of `dtype`.
    """
    if isinstance(model, SparForOpenVocabSegmentation):
        text = {name: x for name, x in model.state_dict().items() if not name.startswith("vision_model.")}
        state = text | {f"vision_model.{name}": tensor for name, tensor in state.items()}
    model.config.distillation = record
    stored = in_dtype(state, dtype)
    with writing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=stored)
        processor.save_pretrained(temporary)
        write_text(temporary / "README.md", student_card(temporary, record, recipe))


def in_dtype(state: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """
    Weights in the precision that they are stored in.

    Raises:
        NotFinite: a weight is beyond the range of `dtype`.
    """
    stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    if beyond := [name for name, tensor in stored.items() if not tensor.isfinite().all()]:
        raise NotFinite(
            f"{len(beyond)} weights of the student are beyond the range of {dtype}, {beyond[0]} among them. Take "
            "--save_dtype bfloat16 or float32: with --resume, or anew if there is no checkpoint yet."
        )
    return stored


def store_as(folder: Path, dtype: str) -> None:
    """
    Store the weights of a written folder in another precision, if they are not in it.

    Raises:
        NotFinite: a weight is beyond the range of `dtype`.
    """
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        if any(tensor.dtype != getattr(torch, dtype) for tensor in state.values()):
            stored = in_dtype(state, dtype)
            write_atomically(file, partial(save_file, stored, metadata={"format": "pt"}))


def save_adapter(
    wrapped: Any,
    state: dict[str, torch.Tensor],
    folder: Path,
    record: dict[str, Any],
    recipe: dict[str, Any],
    base: str,
    dtype: str = "float32",
) -> None:
    """Write adapters alone in peft's format; `base` is the model that they belong to, the rest as in [`save_student`]."""
    wrapped.peft_config["default"].base_model_name_or_path = short_name(base)
    state = in_dtype(state, dtype)
    with writing_folder(folder) as temporary:
        wrapped.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
        write_json(temporary / "distillation.json", record)
        write_text(temporary / "README.md", student_card(temporary, record, recipe))


def merge_adapters(state: dict[str, torch.Tensor], wrapped: Any, base: str) -> dict[str, torch.Tensor]:
    """
    The plain weights of a student with adapters: of the `PeftModel` `wrapped` with weights `state`, which stays as it is.
    `base` is the model that the student started as.
    """
    from peft import get_peft_model

    config = copy.copy(wrapped.peft_config["default"])
    config.inference_mode, config.base_model_name_or_path = False, None
    fresh = get_peft_model(load_model(base)[1], config)
    fresh.load_state_dict(state)
    return fresh.merge_and_unload().state_dict()


def finish_folder(folder: Path, record: dict[str, Any], recipe: dict[str, Any], pictures: Sequence[Path]) -> None:
    """Add what is known only at the end of a run: the complete record, and pictures with their place in the card."""
    for picture in pictures:
        write_atomically(folder / picture.name, partial(shutil.copyfile, picture))
    for name, key in (("config.json", "distillation"), ("distillation.json", None)):
        if (folder / name).is_file():
            held = json.loads((folder / name).read_text(encoding="utf-8"))
            write_json(folder / name, held | {key: record} if key else record)
    write_text(folder / "README.md", student_card(folder, record, recipe, [picture.name for picture in pictures]))


def held_out_errors(folder: Path) -> dict[str, Any]:
    """The part `held_out` in the record of a written folder; empty without a folder or errors."""
    for name, key in (("config.json", "distillation"), ("distillation.json", None)):
        if (folder / name).is_file():
            held = json.loads((folder / name).read_text(encoding="utf-8"))
            record = (held.get(key) or {}) if key else held
            return record.get("held_out") or {}
    return {}


def has_text_tower(folder: Path) -> bool:
    """Whether a written folder has a text tower; adapters and students of vision-only backbones have none."""
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("text_config") is not None


def student_card(folder: Path, record: dict[str, Any], recipe: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """
    The model card of a student: what it learned from, how far it is from its teacher, and the options to repeat it. In the
    folder everything else is written already; `pictures` are files beside the card.
    """
    adapter, text = (folder / "adapter_config.json").is_file(), has_text_tower(folder)
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-segmentation" if text else "image-feature-extraction",
        tags=["spar", "open-vocabulary-segmentation"] if text else ["spar"],
    )
    body = f"""
A SPAR student: dense features in one pass at any resolution, distilled from the sliding-window teacher of
`{record["teacher"]}` (arXiv 2604.02252). The licence of the base and of the images applies to these weights.

| distillation | |
|---|---|
{rows({key: value for key, value in record.items() if key != "held_out"})}
{held_out_section(record)}{"".join(f"{chr(10)}![{Path(name).stem}]({name}){chr(10)}" for name in pictures)}
## Options

`python training/distill.py recipe.yaml`, with the paths of your machine:

```yaml
{yaml.safe_dump(shareable(recipe), sort_keys=False).strip()}
```
"""
    return model_card(Path(recipe["output"]).name, body, data)


def held_out_section(record: dict[str, Any]) -> str:
    """The held-out errors of a record as a section of a card; empty if nothing was held out."""
    held_out = record.get("held_out")
    if not held_out:
        return ""
    points = [{"step": 0, **held_out["before"]}, *held_out["curve"]]
    columns = {"step": "step", "mse": "mean squared error", "cosine": "cosine"}
    smallest = "the mean squared error"
    if record.get("words_weight") and all("words" in point for point in points):
        columns["words"] = "divergence over words"
        smallest += f" plus {record['words_weight']:g} times the divergence over words"
    header = " | ".join(columns.values())
    lines = "\n".join("| " + " | ".join(str(point[name]) for name in columns) + " |" for point in points)
    return f"""
## Held-out error

Against the full teacher on {held_out["images"]} images that were not trained on. The weights are those of step
{held_out["after"]["step"]}, where {smallest} was smallest.

| {header} |
{"|---" * len(columns)}|
{lines}
"""


def shareable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were set, without the folders of one machine."""

    def shorten(value: Any) -> Any:
        return [short_name(v) for v in value] if isinstance(value, list) else short_name(value)

    return {
        name: shorten(value) if name in PATHS else value
        for name, value in recipe.items()
        if value not in (None, []) and name not in ("resume", "overwrite", "allow_changed_data")
    }
