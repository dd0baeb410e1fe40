"""Images and words in, model inputs out: the image processor and the tokenizer of a two-tower model."""

from tokenizers import Regex, Tokenizer, normalizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from .image_processing_spar import SparImageProcessorPil

SIGLIP_TEXTS = ("siglip_text_model", "siglip2_text_model")


def published_tokenizer(tokenizer, text_config) -> PreTrainedTokenizerFast:
    """
    A tokenizer that treats texts as the checkpoint's training did, kept in the files it saves.

    SigLIP's text towers read lower case without punctuation, padded on the right to their full length, without a mask
    (open_clip's `canonicalize_text`); transformers' SigLIP2 tokenizer keeps punctuation, and most templates end in a full
    stop. CLIP's own tokenizer is right as it is and only gets its length.
    """
    length = text_config.max_position_embeddings
    if not getattr(tokenizer, "is_fast", False):  # SigLIP 1 comes with sentencepiece and canonicalises by itself
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

    Texts are padded to the tokenizer's `model_max_length`, which is how SigLIP's text towers were trained; there
    is no `attention_mask` unless the tokenizer's `model_input_names` lists one. Give images, text or both, with
    any option of the two as a keyword.

    Args:
        image_processor ([`SparImageProcessorPil`]):
            Gives `pixel_values` and `original_sizes`.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Gives `input_ids` `(names, model_max_length)`. Its `model_max_length` must be the text tower's
            `max_position_embeddings`.

    Raises:
        ValueError: a text with more tokens than fit (pass `truncation=True` to cut it), a tokenizer without a
            length, an empty list of texts, neither images nor text; and what the image processor refuses.

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

    _auto_class = "AutoProcessor"  # saved folders name this class and bring its code
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
        if limit > 1_000_000:  # what transformers sets when nobody has
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

    @classmethod
    def from_backbone(
        cls, pretrained_model_name_or_path: str, tokenizer: str | None = None, **kwargs
    ) -> "SparProcessor":
        """
        The processor for [`SparForOpenVocabSegmentation.from_backbone`]: image statistics, tokenizer and text preprocessing
        of an untouched two-tower backbone. A SPAR folder keeps its own.

        Args:
            pretrained_model_name_or_path (`str`): hub id or local folder.
            tokenizer (`str`, *optional*): another hub id or folder to take the tokenizer from.

        Raises:
            ValueError: a backbone without a text tower.
            OSError: the folder or repository lacks an image processor or a tokenizer.
        """
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if config.model_type == "spar":
            return cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
        text_config = getattr(config, "text_config", None)
        if text_config is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no text tower, so there are no texts to process. Use "
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
            raise ValueError(
                f"Cannot load a tokenizer from {str(pretrained_model_name_or_path)!r}. If the folder is "
                "vision-only, load its image processor with `AutoImageProcessor`; else it lacks `tokenizer.json` "
                "and `tokenizer_config.json`, which `SparProcessor.save_pretrained` writes."
            ) from error


__all__ = ["SparProcessor"]
