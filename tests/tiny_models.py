"""Small models of random weights, their configs, a tokenizer and inputs."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    MetaClip2VisionConfig,
    PreTrainedTokenizerFast,
    RadioConfig,
    Siglip2VisionConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    Tipsv2VisionConfig,
)

from spar_hf import SparConfig

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
HEAD = {"text_head_size": 24, "text_head_hidden": 40, "text_head_layers": 1, "text_head_token": 0}
BLOCKS = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
GRID = {"image_size": 32, "patch_size": 8}
# a backbone config for each read-out
CONFIGS = {
    "siglip": lambda: SiglipVisionConfig(**SHAPE, **GRID),
    "naflex": lambda: Siglip2VisionConfig(**SHAPE, patch_size=8, num_patches=16),
    "maskclip": lambda: CLIPVisionConfig(**SHAPE, **GRID, projection_dim=24),
    "metaclip2": lambda: MetaClip2VisionConfig(**SHAPE, **GRID, projection_dim=24),
    "dinov3": lambda: DINOv3ViTConfig(**SHAPE, **GRID, num_register_tokens=4, pos_embed_rescale=2.0),
    "dinov3txt": lambda: DINOv3ViTConfig(**SHAPE, **GRID, num_register_tokens=4, pos_embed_rescale=2.0),
    "tipsv2": lambda: Tipsv2VisionConfig(**BLOCKS, **GRID, mlp_ratio=1.5),
    "radio": lambda: RadioConfig(**BLOCKS, **GRID, mlp_ratio=1.5, max_img_size=64, num_registers=2),
    "radiotext": lambda: RadioConfig(**BLOCKS, **GRID, mlp_ratio=1.5, max_img_size=64, num_registers=2, **HEAD),
    "dinov2": lambda: Dinov2WithRegistersConfig(**BLOCKS, **GRID, mlp_ratio=2, use_swiglu_ffn=True),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every weight, bias, norm and scale away from zero and one, so that no mistake hides behind either."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def tiny_config(**kwargs) -> SparConfig:
    """Two blocks of width 32 on a 4×4 grid of 16 px patches, with a text tower of the same width."""
    vision = SiglipVisionConfig(image_size=64, hidden_act="gelu", layer_norm_eps=1e-6, **SHAPE)
    text = SiglipTextConfig(
        vocab_size=64,
        max_position_embeddings=16,
        projection_size=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **SHAPE,
    )
    return SparConfig(**{"backbone_config": vision, "text_config": text, **kwargs})


def make_tokenizer(letters: bool = False) -> PreTrainedTokenizerFast:
    """
    One id per word of the short templates and of some classes, padded to the tiny text tower's 16 tokens; with `letters` one
    id per letter, so that any names of up to 15 letters differ.
    """
    words = "a photo of the bright dark black and white hard to see road street car automobile sky tree dog cat grass"
    tokens = list("abcdefghijklmnopqrstuvwxyz ") if letters else words.split()
    ids = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *tokens])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(".", " ")])
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated") if letters else pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=16,
        model_input_names=["input_ids"],
    )


def random_images(size, batch=2, seed=1):
    """Pixel values `(batch, 3, height, width)`."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def prompts(names=3, length=None, seed=2):
    """Token ids `(names, length)` of the tiny text tower."""
    length = tiny_config().text_config.max_position_embeddings if length is None else length
    return torch.randint(2, 64, (names, length), generator=torch.Generator().manual_seed(seed))


def attention_of(two_towers):
    """The attention implementations of a two-tower model: its own, the vision model's, the backbone's, the text's."""
    parts = (two_towers, two_towers.vision_model, two_towers.vision_model.backbone, two_towers.text_model)
    return [part.config._attn_implementation for part in parts]
