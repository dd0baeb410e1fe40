"""Processor of two-tower models: image processor and tokenizer in one."""

import os

from tokenizers import Regex, Tokenizer, normalizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from .image_processing_spar import SparImageProcessorPil

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SIGLIP_TEXTS = ("siglip_text_model", "siglip2_text_model")


def published_tokenizer(tokenizer, text_config) -> PreTrainedTokenizerFast:
    """
    A tokenizer that prepares texts as in the checkpoint's training, and saves these rules with its files.

    SigLIP's text towers were trained on lower case without punctuation, padded on the right to the full length, without a
    mask (open_clip's `canonicalize_text`). The SigLIP2 tokenizer of transformers keeps punctuation, and most templates end
    in a full stop. Those of CLIP, MetaCLIP 2 (trained on texts as they are written) and TIPSv2 (lower case with punctuation)
    only need their length.
    """
    length = text_config.max_position_embeddings
    if not getattr(tokenizer, "is_fast", False):  # SigLIP 1: its sentencepiece tokenizer removes punctuation by itself
        tokenizer.model_max_length, tokenizer.padding_side = length, "right"
        return tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    names = ["input_ids", "attention_mask"]
    if text_config.model_type in SIGLIP_TEXTS:
        steps = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),  # ASCII punctuation
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
        backend.normalizer = normalizers.Sequence(steps + ([backend.normalizer] if backend.normalizer else []))
        names = ["input_ids"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        model_max_length=length,
        model_input_names=names,
        **{key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )


class SparProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of [`SparForOpenVocabSegmentation`]. A vision-only folder has no tokenizer: load
    its [`SparImageProcessorPil`] with `AutoImageProcessor`.

    It takes images, text or both, and any option of the two parts as a keyword. Texts are padded to the tokenizer's
    `model_max_length`, as in the training of SigLIP's text towers. An `attention_mask` is returned only if the
    tokenizer's `model_input_names` lists it.

    Args:
        image_processor ([`SparImageProcessorPil`]):
            Returns `pixel_values` and `original_sizes`.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Returns `input_ids` `(names, model_max_length)`. Its `model_max_length` must be the text tower's
            `max_position_embeddings`.

    Raises:
        ValueError: a text with too many tokens (pass `truncation=True` to cut it); a tokenizer without
            `model_max_length`; an empty list of texts; neither images nor text; or as the image processor.

    Source: `SiglipProcessor` of transformers.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import AutoProcessor
    >>> from spar_hf import SPAR_TINY

    >>> processor = AutoProcessor.from_pretrained(SPAR_TINY)
    >>> inputs = processor(images=Image.new("RGB", (330, 200)), text=["road", "sky"], return_tensors="pt")
    >>> sorted(inputs)
    ['input_ids', 'original_sizes', 'pixel_values']
    >>> inputs.original_sizes
    [(200, 330)]
    ```"""

    _auto_class = "AutoProcessor"  # saved folders name this class and carry its code
    text_kwargs = {"padding": "max_length"}
    skip_tensor_conversion = ["original_sizes"]

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if text is None:
            return
        texts = [text] if isinstance(text, str) else text
        if not texts:
            raise ValueError("`text` is an empty list. Pass at least one text.")
        limit = self.tokenizer.model_max_length
        if limit > 1_000_000:  # the placeholder of transformers for a length that was not set
            raise ValueError(
                "The tokenizer has no `model_max_length`, so texts cannot be padded to it. Set it to the text "
                "tower's `max_position_embeddings`."
            )
        if {**kwargs, **kwargs.get("text_kwargs", {})}.get("truncation"):
            return
        for sample, ids in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            if len(ids) > limit:
                raise ValueError(
                    f"The text {sample[:80]!r} has {len(ids)} tokens, the text tower reads {limit} "
                    "(`model_max_length`). Shorten it, or pass `truncation=True` to cut it."
                )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, which would also leave `auto_map` of the folder in this object."""
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            vars(self).pop("auto_map", None)

    @classmethod
    def from_backbone(
        cls, pretrained_model_name_or_path: str, tokenizer: str | None = None, **kwargs
    ) -> "SparProcessor":
        """
        The processor for [`SparForOpenVocabSegmentation.from_backbone`]: image statistics, tokenizer and text preparation
        of a two-tower model of transformers. A SPAR folder loads as by `from_pretrained`.

        Args:
            pretrained_model_name_or_path (`str`): hub id or local folder.
            tokenizer (`str`, *optional*): hub id or folder of the tokenizer, if it is another.

        Raises:
            ValueError: a model without a text tower.
            OSError: the folder or repository lacks an image processor or a tokenizer.
        """
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if config.model_type == "spar":
            return cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
        text_config = getattr(config, "text_config", None)
        if text_config is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no text tower, so it needs no tokenizer. Use "
                "`SparImageProcessorPil.from_backbone`."
            )
        words = AutoTokenizer.from_pretrained(tokenizer or pretrained_model_name_or_path, **kwargs)
        image_processor = SparImageProcessorPil.from_backbone(pretrained_model_name_or_path, **kwargs)
        return cls(image_processor, published_tokenizer(words, text_config))

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, subfolder="", **kwargs):
        try:
            return super()._load_tokenizer_from_pretrained(
                sub_processor_type, pretrained_model_name_or_path, subfolder=subfolder, **kwargs
            )
        except Exception as error:
            name = str(pretrained_model_name_or_path)
            if there := [file for file in TOKENIZER_FILES if os.path.isfile(os.path.join(name, subfolder, file))]:
                raise ValueError(
                    f"The tokenizer of {name!r} cannot be read ({error}). Copy {' and '.join(there)} again."
                ) from error
            raise ValueError(
                f"Cannot load a tokenizer from {name!r}. If the folder is "
                "vision-only, load its image processor with `AutoImageProcessor`; else it lacks `tokenizer.json` "
                "and `tokenizer_config.json`, which `SparProcessor.save_pretrained` writes."
            ) from error


__all__ = ["SparProcessor"]
