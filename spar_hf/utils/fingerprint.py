"""One name for all that dense features depend on beside the image: what is kept of them on disk belongs to it."""

import hashlib
import json

import torch

from spar_hf.model.modeling_spar import SparVisionModel

# of a configuration: how and from where it was loaded, and no part of what is computed (weights tell their own types)
CIRCUMSTANCES = {"_name_or_path", "architectures", "dtype", "transformers_version"}


def fingerprint(model: SparVisionModel) -> str:
    """
    Hash of all that a model's features depend on: names, types, shapes and bytes of its weights, the backbone's settings
    (heads and activation leave no trace in the weights), and its read-out. The same however the model was loaded.
    """
    config = model.config
    backbone = json.loads(config.backbone_config.to_json_string())
    settings = {
        "backbone": {key: value for key, value in backbone.items() if key not in CIRCUMSTANCES},
        "readout": config.readout,
        "position_resampling": config.position_resampling,
        "position_extent": config.position_extent,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
