"""Fingerprints of models: results that are kept on disk name the weights and settings they were computed with."""

import hashlib
import json
from typing import Any

import numpy as np
import torch

# parts of a configuration that say how a model was loaded or saved; the weights tell their own dtype
LOADING_KEYS = {"_name_or_path", "architectures", "dtype", "transformers_version"}
# settings of backbones that are hashed whatever their value; others, which a later transformers may add, only where they
# differ from their default, so that fingerprints that were stored before stay valid
BACKBONE_KEYS = {
    "apply_layernorm", "attention_dropout", "drop_path_rate", "hidden_act", "hidden_size", "image_size",
    "initializer_factor", "initializer_range", "intermediate_size", "key_bias", "layer_norm_eps", "layerscale_value",
    "mlp_bias", "model_type", "num_attention_heads", "num_channels", "num_hidden_layers", "num_patches",
    "num_register_tokens", "out_features", "out_indices", "patch_size", "pos_embed_jitter", "pos_embed_rescale",
    "pos_embed_shift", "proj_bias", "projection_dim", "query_bias", "reshape_hidden_states", "rope_theta",
    "stage_names", "use_gated_mlp", "value_bias", "vision_use_head",
}  # fmt: skip


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
    (number of heads and activation leave no trace in the weights) and its read-out. It is the same however the model was
    loaded.

    Example:

    ```python
    >>> from spar_hf import SPAR_TINY, SparVisionModel
    >>> len(vision_fingerprint(SparVisionModel.from_pretrained(SPAR_TINY)))
    64
    ```"""
    config = model.config
    settings = {
        "backbone": backbone_settings(config.backbone_config),
        "readout": config.readout,
        "position_resampling": config.position_resampling,
        "position_extent": config.position_extent,
    }
    return weights_hash(model, json.dumps(settings, sort_keys=True)).hexdigest()


def backbone_settings(config) -> dict[str, Any]:
    """The settings of a backbone that its features may depend on."""
    found, default = (json.loads(one.to_json_string(use_diff=False)) for one in (config, type(config)()))
    return {
        key: value
        for key, value in found.items()
        if key not in LOADING_KEYS and (key in BACKBONE_KEYS or key not in default or value != default[key])
    }


def text_fingerprint(model, tokenizer) -> str:
    """SHA-256 of everything that text embeddings depend on: the weights of the text tower, and the tokenizer."""
    digest = weights_hash(model.text_model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    words = {key: value for key, value in words.items() if key not in ("padding", "truncation")}  # set by each call
    digest.update(json.dumps(words, sort_keys=True).encode())
    return digest.hexdigest()


def quick_fingerprint(module: torch.nn.Module) -> tuple:
    """
    Values that change with the weights, computed in a millisecond: address, version and a sampled sum of every tensor.

    The version counts in-place changes that PyTorch tracks, the address shows replaced tensors, and the sampled sum shows
    most changes that neither does: fused optimisers, `weight.data += delta`. [`checksum`] sees all.
    """
    tensors = _present_weights(module)
    if not tensors:
        return ()
    samples = [tensor.flatten()[:: max(1, tensor.numel() // 16)].float().sum() for tensor in tensors]
    sums = torch.stack([sample.to(samples[0].device) for sample in samples]).tolist()
    return tuple(
        (tensor.data_ptr(), None if tensor.is_inference() else tensor._version, repr(total))  # NaN equals itself
        for tensor, total in zip(tensors, sums, strict=True)
    )


def checksum(module: torch.nn.Module) -> int:
    """
    A number that changes when any element of the weights does: the bits of every row are summed as integers, and the sums
    weighted by odd numbers that depend on their position. It reads all weights once, at the speed of the memory: about 0.1 s
    per GB on a CPU, a millisecond on a GPU.
    """
    weights = _present_weights(module)
    parts = [_sum_on_cpu(weight) for weight in weights if weight.device.type == "cpu"]
    remote = [_sum_on_device(weight) for weight in weights if weight.device.type != "cpu"]
    parts += torch.stack([part.to(remote[0].device) for part in remote]).tolist() if remote else []  # fetched together
    total = 0
    for part in parts:
        total = (total * 1_000_003 + part) % 2**64
    return total


def _sum_on_cpu(weight: torch.Tensor) -> int:
    sums = np.add.reduce(_rows_of_bits(weight).numpy(), axis=1, dtype=np.int64)  # faster than torch with integers
    return int(np.dot(sums, np.arange(1, 2 * len(sums), 2)))


def _sum_on_device(weight: torch.Tensor) -> torch.Tensor:
    sums = _rows_of_bits(weight).sum(1, dtype=torch.int64)
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()


def _rows_of_bits(weight: torch.Tensor) -> torch.Tensor:
    """The bits of a weight as integers: `(rows, numbers)`, int64 where a row holds a multiple of 8 bytes, else uint8."""
    rows = weight.contiguous().view(-1, weight.shape[-1]) if weight.ndim else weight.view(1, 1)
    bits = rows.view(torch.uint8)
    return bits.view(torch.int64) if bits.shape[1] % 8 == 0 else bits


def tokenizer_state(tokenizer) -> str:
    """
    What may be changed in a tokenizer, as text: its normaliser and the like, special tokens, and the size of its vocabulary.
    The vocabulary itself is left out: reading it takes half a second.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [len(tokenizer), tokenizer.special_tokens_map, getattr(tokenizer, "padding_side", None)]
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        part = getattr(backend, name, None)
        parts.append(None if part is None else part.__getstate__())
    return repr(parts)


def _present_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """The weights that are in memory: accelerate leaves offloaded ones on the meta device."""
    return [weight.detach() for weight in module.parameters() if weight.device.type != "meta" and weight.numel()]
