"""Official checkpoints of each family with tiny random weights, in their original naming, and the base models they need."""

import json

import torch
from plain_torch import (
    PlainDinov3Txt,
    PlainMaskClip,
    PlainSiglip2,
    dinov3txt_shapes,
    openclip_shapes,
    random_state,
    siglip2_shapes,
)
from tiny_models import BLOCKS, SHAPE, make_tokenizer, randomise
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedTokenizerFast,
    RadioConfig,
    RadioModel,
    SiglipConfig,
    SiglipModel,
)

VOCAB, LENGTH = 40, 12
RADIO_HIDDEN, RADIO_WIDTH = 40, 24  # of C-RADIO's head


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, the end token the last id, as in CLIP's vocabulary."""
    words = ["<pad>", "<unk>", *(f"word{i}" for i in range(VOCAB - 7)), "road", "sky", "a", "image", "</s>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", VOCAB - 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<pad>", unk_token="<unk>"
    )


def save_base(folder, model, mean):
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    statistics = {"image_processor_type": "CLIPImageProcessor", "image_mean": [mean] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))


def shape(hidden=48, dim=32):
    return {"hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_siglip2(folder):
    text = shape() | {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, "pad_token_id": 0, "eos_token_id": 1}
    config = SiglipConfig(vision_config=shape() | {"image_size": 32, "patch_size": 8}, text_config=text)
    save_base(folder, SiglipModel(config), 0.5)
    state = random_state(siglip2_shapes(vocab=VOCAB, length=LENGTH))
    return state, PlainSiglip2(state, 2, 2), {"vision_act": "gelu"}


def make_openclip(folder, act="gelu"):
    text = shape(dim=16) | {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, "projection_dim": 24}
    text |= {"eos_token_id": VOCAB - 1, "bos_token_id": 0, "pad_token_id": 0, "hidden_act": act}
    vision = shape() | {"image_size": 32, "patch_size": 8, "projection_dim": 24, "hidden_act": act}
    save_base(folder, CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)), 0.4)
    state = random_state(openclip_shapes(vocab=VOCAB, length=LENGTH))
    return state, PlainMaskClip(state, 2, 2, quick=act == "quick_gelu"), {}


def make_quick_gelu(folder):
    return make_openclip(folder, "quick_gelu")


def make_dinov3txt(folder):
    config = DINOv3ViTConfig(image_size=32, patch_size=8, num_register_tokens=4, **shape(hidden=128))
    save_base(folder, DINOv3ViTModel(config), 0.45)
    state = random_state(dinov3txt_shapes(vocab=VOCAB, length=LENGTH))
    # the released periods, rounded to bfloat16
    state["visual_model.backbone.rope_embed.periods"] = (100 ** (torch.arange(4) / 4)).bfloat16().float()
    state["visual_model.backbone.blocks.0.attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32)
    state["visual_model.backbone.blocks.1.attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32)
    return state, PlainDinov3Txt(state, 2, 2), {"tokenizer": str(folder), "text_heads": 2}


MAKERS = {
    "siglip2": ("siglip2", make_siglip2),
    "openclip": ("openclip", make_openclip),
    "openai": ("openclip", make_quick_gelu),
    "dinov3txt": ("dinov3txt", make_dinov3txt),
}


def write_official(folder, name):
    """
    Write `official.ckpt` as Lightning does, names with a prefix, beside the state of the training; and the folder `base`.

    Returns:
        Family, tensors, reference model, further options of the conversion.
    """
    family, make = MAKERS[name]
    state, plain, options = make(folder / "base")
    content = {"state_dict": {f"segmentor.net.model.{key}": value for key, value in state.items()}, "epoch": 10}
    torch.save(content, folder / "official.ckpt")
    return family, state, plain, options


def radio_head(prefix, generator):
    """The tensors of a C-RADIO head with two residual layers."""
    hidden, width = RADIO_HIDDEN, RADIO_WIDTH
    layers = (
        {"fc1": (hidden, 32)} | {f"blocks.{i}.2": (hidden, hidden) for i in range(2)} | {"final.2": (width, hidden)}
    )
    layers |= {f"blocks.{i}.0": (hidden,) for i in range(2)} | {"final.0": (hidden,)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in layers.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0], generator=generator) * 0.1 for name, shape in layers.items()}
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def write_radio(folder):
    """Write `base` and `text`, models of transformers with their processors that a C-RADIO head stands between."""
    torch.manual_seed(0)
    source = randomise(RadioModel(RadioConfig(**BLOCKS, image_size=56, patch_size=14, max_img_size=112)))
    source.save_pretrained(folder / "base")
    (folder / "base" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    text = SHAPE | {"vocab_size": 64, "max_position_embeddings": 16, "projection_size": RADIO_WIDTH}
    text |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    vision = SHAPE | {"image_size": 32, "patch_size": 16}
    randomise(SiglipModel(SiglipConfig(vision_config=vision, text_config=text))).save_pretrained(folder / "text")
    make_tokenizer().save_pretrained(folder / "text")
