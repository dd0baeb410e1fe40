"""
Write an EfficientNet-Lite checkpoint as a folder of transformers: an image teacher for `pretrain_tiny.py --image_teacher`.

The file is one of the PyTorch checkpoints of efficientnet_lite_pytorch (Apache-2.0), which are TensorFlow's. The Lite models
have no squeeze-and-excitation; transformers' EfficientNet always has, so its gates are set to be open.

    python training/studies/efficientnet_lite.py \
        --checkpoint efficientnet-lite2-9656183e.pth --output runs/efficientnet-lite2
"""

import itertools
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetModel
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from spar_hf.utils.atomic import writing_folder
from spar_hf.utils.checkpoints import check_replaceable
from spar_hf.utils.errors import UsageError, run_command
from spar_hf.utils.options import HELP, parse_dataclasses

STRIDES, EXPANSIONS = [1, 2, 2, 2, 1, 2, 1], [1, 6, 6, 6, 6, 6, 6]  # of the seven stages
NAMES = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
NAMES_IN_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
OPEN = 20.0  # a gate's sigmoid is 1 there in float32


@dataclass(kw_only=True)
class ConversionOptions:
    """Options of the conversion."""

    checkpoint: str = field(metadata={"help": "File of weights, read without running code in it."})
    output: str = field(metadata={"help": "Folder to write."})
    overwrite: bool = field(default=False, metadata={"help": HELP["overwrite"]})


def convert(weights: dict[str, torch.Tensor]) -> EfficientNetModel:
    """The model of a checkpoint; its shape is read from the shapes of the weights."""
    count = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("_blocks."))
    widths = [len(weights[f"_blocks.{i}._project_conv.weight"]) for i in range(count)]
    stages = [(width, len(list(blocks))) for width, blocks in itertools.groupby(widths)]
    firsts = [sum(repeats for _, repeats in stages[:i]) for i in range(len(stages))]
    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        depth_divisor=1,
        in_channels=[len(weights["_conv_stem.weight"]), *(width for width, _ in stages[:-1])],
        out_channels=[width for width, _ in stages],
        kernel_sizes=[weights[f"_blocks.{first}._depthwise_conv.weight"].shape[-1] for first in firsts],
        strides=STRIDES,
        expand_ratios=EXPANSIONS,
        num_block_repeats=[repeats for _, repeats in stages],
        depthwise_padding=[],
        hidden_act="relu6",
        hidden_dim=len(weights["_conv_head.weight"]),
        batch_norm_eps=1e-3,
    )
    renamed = {}
    for name, tensor in weights.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            number, part, kind = rest
            renamed[f"encoder.blocks.{number}.{NAMES_IN_BLOCK[part]}.{kind}"] = tensor
        elif first != "_fc":  # the classifier
            renamed[f"{NAMES[first]}.{rest[0]}"] = tensor
    model = EfficientNetModel(config).eval()
    for name, tensor in model.state_dict().items():
        if "squeeze_excite" in name:
            renamed[name] = torch.full_like(tensor, OPEN if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(renamed)
    return model


def read_checkpoint(file: str) -> dict[str, torch.Tensor]:
    """
    The weights of a checkpoint; no code in it is run.

    Raises:
        UsageError: the file is not there, or no EfficientNet-Lite.
    """
    try:
        weights = torch.load(file, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UsageError(f"{file} can't be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(weights, dict) or not {"_conv_stem.weight", "_conv_head.weight"} <= weights.keys():
        raise UsageError(f"{file} is no EfficientNet-Lite of efficientnet_lite_pytorch.")
    return weights


def main(args: list[str] | None = None) -> None:
    """The command."""
    (options,) = parse_dataclasses((ConversionOptions,), args)
    check_replaceable([Path(options.output)], options.overwrite)
    model = convert(read_checkpoint(options.checkpoint))
    # TensorFlow's normalisation: (value - 127) / 128 of 0 to 255
    processor = EfficientNetImageProcessorPil(image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3)
    with writing_folder(Path(options.output)) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


if __name__ == "__main__":
    run_command(main)
