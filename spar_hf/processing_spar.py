"""Photos and words in, model inputs out: the image processor and the tokenizer of a two-tower model."""

from transformers.processing_utils import ProcessorMixin


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
