"""What lies beside the graphs of an exported folder: configuration, image processor, tokenizer, words and the record."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from spar_hf.export.options import DECIDING, FORMATS
from spar_hf.export.sources import Source, Words
from spar_hf.model.file_modes import follow_umask
from spar_hf.model.fingerprints import text_fingerprint, vision_fingerprint
from spar_hf.model.image_pixels import token_limit
from spar_hf.model.prompts import resolve_templates
from spar_hf.utils.atomic import write_json

RECORD = "spar_export.json"
FORMAT_VERSION = 1


def write_beside(folder: Path, source: Source, words: Words | None) -> None:
    """Write all files of a folder but the graphs and the record."""
    config = source.model.config.to_dict()
    for key in ("auto_map", "custom_pipelines", "_name_or_path"):  # the folder holds no code
        config.pop(key, None)
    write_json(folder / "config.json", json.loads(json.dumps(config, default=str)))
    images = source.image_processor.to_dict()
    images.pop("auto_map", None)
    write_json(folder / "preprocessor_config.json", json.loads(json.dumps(images, default=str)))
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    if words is not None and words.embeddings is not None:
        path = folder / "text_embeds.safetensors"
        names = [name for some in words.names for name in some]
        metadata = {"names": json.dumps(names), "classes": json.dumps(words.labels)}
        tensors = {"text_embeds": words.embeddings.contiguous(), "class_of_name": words.class_of_name}
        save_file(tensors, path, metadata=metadata)
        follow_umask(path)


def interface(source: Source, head: str, words: Words | None, labels: str) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs of the vision graph: names, types and axes."""
    dim = source.vision_model.config.projection_dim
    inputs: list[dict[str, Any]] = [tensor("pixel_values", "float32", "batch", 3, "height", "width")]
    names: Any = "names" if words is None else len(words.class_of_name)
    if head != "features" and words is None:
        inputs.append(tensor("text_embeds", "float32", "names", dim))
    if head in DECIDING:
        inputs += [tensor("class_of_name", "int64", "names")] if words is None else []
        inputs.append(tensor("image_size", "int64", 2))
    classes: Any = "classes" if words is None else len(words.labels)
    image = ("image_height", "image_width")
    outputs = {
        "features": [tensor("feature_map", "float32", "batch", dim, "rows", "columns")],
        "logits": [tensor("logits", "float32", "batch", names, "rows", "columns")],
        "classmap": [tensor("labels", labels, "batch", *image), tensor("confidence", "float16", "batch", *image)],
        "probabilities": [tensor("probabilities", "float32", "batch", classes, *image)],
    }
    return {"inputs": inputs, "outputs": outputs[head]}


def tensor(name: str, dtype: str, *shape: str | int) -> dict[str, Any]:
    """An input or output; axes of any size have a name."""
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def make_record(
    source: Source, format: str, head: str, words: Words | None, templates: Any, graphs: dict[str, str], labels: str
) -> dict[str, Any]:
    """The contents of `spar_export.json`, without the verification."""
    config, images = source.vision_model.config, source.image_processor
    return {
        "format_version": FORMAT_VERSION,
        "format": format,
        "head": head,
        "model_type": source.model.config.model_type,
        "graphs": graphs,
        **interface(source, head, words, labels),
        "patch_size": config.patch_size,
        "projection_dim": config.projection_dim,
        "dense_logit_scale": None if source.has_classes else config.dense_logit_scale,
        "working_size": {
            "size": dict(images.size) if images.do_resize and images.size is not None else None,  # the image's own
            "max_tokens": token_limit(images.max_tokens),
            "rounding": "each side by itself to the nearest pixel, halves up; the graph pads to the patch",
        },
        "text": text_record(source, templates) if source.has_text else None,
        "classes": None
        if words is None
        else [{"label": label, "names": list(names)} for label, names in zip(words.labels, words.names, strict=True)],
        "class_of_name": None if words is None else words.class_of_name.tolist(),
        "background": None if words is None or words.background < 0 else words.background,
        "background_hidden": None if words is None or words.background < 0 else words.hidden,
        "fingerprints": fingerprints(source),
        "versions": {name: installed(name) for name in ("spar-hf", "torch", "transformers", *FORMATS[format].packages)},
    }


def text_record(source: Source, templates: Any) -> dict[str, Any]:
    """How texts are prepared for the text tower."""
    config, tokenizer = source.model.config, source.tokenizer
    return {
        "templates": list(resolve_templates(config.templates if templates is None else templates)),
        "max_tokens": config.text_config.max_position_embeddings,
        "padding": "max_length",
        "padding_side": tokenizer.padding_side,
        "pad_token_id": tokenizer.pad_token_id,
        "cleaning": "in tokenizer.json: its normaliser does what the model needs, such as lower case without punctuation",
        "averaging": "the mean of the normalised embeddings of all templates, normalised again",
        "presence_calibration": getattr(config, "presence_calibration", None),
    }


def fingerprints(source: Source) -> dict[str, str]:
    """What the weights are, whatever the folder is called."""
    found = {"vision": vision_fingerprint(source.vision_model)}
    return found | ({"text": text_fingerprint(source.model, source.tokenizer)} if source.has_text else {})


def installed(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
