"""Fingerprints of models: results that are kept on disk name the weights and settings they were computed with."""

import hashlib
import json
from typing import Any

import torch

# parts of a configuration that say how a model was loaded or saved; the weights tell their own dtype
LOADING_KEYS = {"_name_or_path", "architectures", "dtype", "transformers_version"}


def weights_hash(module: torch.nn.Module, prefix: str = "") -> Any:
    """A SHA-256 object that has read `prefix` and the names, types, shapes and bytes of all weights of a module."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest


def vision_fingerprint(model) -> str:
    """
    SHA-256 of everything that the features of a [`SparVisionModel`] depend on: its weights, the settings of its backbone
    (number
    of heads and activation leave no trace in the weights) and its read-out. It is the same however the model was loaded.

    Example:

    ```python
    >>> from spar_hf import SPAR_TINY, SparVisionModel
    >>> len(vision_fingerprint(SparVisionModel.from_pretrained(SPAR_TINY)))
    64
    ```"""
    config = model.config
    backbone = json.loads(config.backbone_config.to_json_string())
    settings = {
        "backbone": {key: value for key, value in backbone.items() if key not in LOADING_KEYS},
        "readout": config.readout,
        "position_resampling": config.position_resampling,
        "position_extent": config.position_extent,
    }
    return weights_hash(model, json.dumps(settings, sort_keys=True)).hexdigest()


def text_fingerprint(model, tokenizer) -> str:
    """SHA-256 of everything that text embeddings depend on: the weights of the text tower, and the tokenizer."""
    digest = weights_hash(model.text_model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    words = {key: value for key, value in words.items() if key not in ("padding", "truncation")}  # set by each call
    digest.update(json.dumps(words, sort_keys=True).encode())
    return digest.hexdigest()
