# mypy: disable-error-code="override"
# transformers declares the hooks of Pipeline without their keywords, which each pipeline names
"""`pipeline("open-vocab-segmentation")`: a photo and words in, one mask per class out."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline

from .prompts import CandidateLabels, Vocabulary, embed_names
from .refine import refined_logits
from .segmentation import LabelMap, decide, give_to_background


class OpenVocabSegmentationPipeline(Pipeline):
    """
    Open-vocabulary segmentation with a two-tower SPAR checkpoint.

    Every pixel goes to the class with the most probable name (softmax over all names, then the maximum over the names
    of a class; SPAR, section 3). Text embeddings are made once per vocabulary and templates and kept.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline
    >>> import spar_hf

    >>> segment = pipeline("open-vocab-segmentation")
    >>> segments = segment(Image.new("RGB", (330, 200)), candidate_labels=["road", "car, automobile", "sky"])
    >>> sorted(segments[0])
    ['label', 'mask', 'score']
    ```"""

    _load_processor: Any = False
    _load_image_processor: Any = True
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = True
    image_processor: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "dense_logits"):  # not by class: a checkpoint's own code makes another of that name
            raise ValueError(
                f"open-vocab-segmentation needs a two-tower SPAR model, got {type(self.model).__name__}. Load the "
                "folder with `SparForOpenVocabSegmentation.from_pretrained`, or pass its path as `model`."
            )
        self._text_embeds: dict[tuple, torch.Tensor] = {}

    def __call__(self, inputs: Any, candidate_labels: CandidateLabels | Vocabulary | None = None, **kwargs) -> Any:
        """
        Args:
            inputs (`str`, `PIL.Image.Image`, array, tensor, or a list of them):
                Photos: paths, URLs, images. See [`SparImageProcessorPil`] for the arrays it takes.
            candidate_labels (`list[str]`, `list[list[str]]`, `dict[str, list[str]]` or [`Vocabulary`]):
                The classes. In a list of strings commas separate names of one class: `"car, automobile"`. A string is the
                name of a built-in vocabulary: `"ade20k"`, `"voc21"`, `"cityscapes"`, ... (`spar_hf/vocabularies.py`).
            templates (`str` or `list[str]`, *optional*):
                Prompt templates, the checkpoint's by default: `"imagenet80"`, `"short"`, `"plain"` or strings with `{}`.
            size (`dict[str, int]`, *optional*):
                Working resolution, defaults to the image processor's: `{"shortest_edge": 672}`, say.
            background (`str`, *optional*):
                The class that unsure pixels and tiny classes are given to; one of the labels, or a further one without
                words (`"background"` by default where a rule is set).
            threshold (`float`, *optional*, defaults to 0):
                Pixels whose best probability is below it become background. With few classes probabilities are high,
                with many they are low: look at the scores before choosing one.
            min_area (`float`, *optional*, defaults to 0):
                Classes that cover less than this share of the pixels outside the background become background.
            refine (`str` or `Callable`, *optional*): `"lposs"`, `"lposs+"` or `"pamr"` for sharper masks, see `refine.py`.
            upsampler (`Callable`, *optional*): `(image, features) -> features`, a learned upsampler, see `refine.py`.
            output (`str`, *optional*, defaults to `"segments"`):
                `"segments"`: a list of `{"label", "score", "mask"}` per class that has pixels, in the order of
                the classes; `mask` is a `PIL.Image` of mode `L`, 0 or 255, in the size of the photo, and `score` the
                mean probability over it. `"map"`: a dict with `map`, an int32 array `(height, width)` of class numbers,
                `labels`, and `scores` per class (0 where it has no pixels).

        Returns:
            The output for a photo, or a list of them for a list of photos.

        Raises:
            ValueError: no or malformed labels, a photo that cannot be read, an unknown `output`, `batch_size` above 1.
        """
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        if (kwargs.get("batch_size") or 1) > 1:
            raise ValueError("Photos run one at a time, since each has a size of its own; leave `batch_size` at 1.")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels=None,
        templates=None,
        size=None,
        output=None,
        background=None,
        threshold=None,
        min_area=None,
        refine=None,
        upsampler=None,
    ):
        options = {"templates": templates, "background": background, "threshold": threshold, "min_area": min_area}
        options |= {"refine": refine, "upsampler": upsampler}
        forward = {name: value for name, value in options.items() if value is not None}
        if candidate_labels is not None:
            forward["vocabulary"] = Vocabulary.parse(candidate_labels)
        if output is not None and output not in ("segments", "map"):
            raise ValueError(f"Unknown output {output!r}; use 'segments' or 'map'.")
        return {} if size is None else {"size": size}, forward, {} if output is None else {"output": output}

    def preprocess(self, image, size=None):
        options = {} if size is None else {"size": size}
        return dict(self.image_processor(image, return_tensors="pt", **options))

    def _forward(
        self,
        inputs,
        vocabulary: Vocabulary | None = None,
        templates=None,
        background: str | None = None,
        threshold: float = 0.0,
        min_area: float = 0.0,
        refine=None,
        upsampler=None,
    ):
        if vocabulary is None:
            raise ValueError('`candidate_labels` is missing. Name the classes to look for: ["road", "sky"].')
        pixel_values = inputs["pixel_values"]
        text_embeds = self.text_embeds(vocabulary, templates)
        outputs = self.model(pixel_values, text_embeds=text_embeds)
        logits, cell = outputs.logits[0], self.model.config.patch_size
        if refine is not None or upsampler is not None:
            features, pixels = outputs.feature_map[0], pixel_values[0]
            logits, cell = refined_logits(self.model, features, text_embeds, pixels, refine, upsampler)
        decision = decide(
            logits,
            vocabulary.name_to_class,
            cell,
            working_size=tuple(pixel_values.shape[-2:]),
            output_size=inputs["original_sizes"][0],
        )
        names = list(vocabulary.labels)
        if background is not None or threshold or min_area:
            background = background or "background"
            if background not in names:
                names.append(background)
            decision = give_to_background(decision, names.index(background), threshold, min_area)
        return {"labels": decision.labels, "probabilities": decision.probabilities, "names": names}

    def text_embeds(self, vocabulary: Vocabulary, templates=None) -> torch.Tensor:
        """Embeddings of a vocabulary `(names, dim)`, made at its first use and kept."""
        names = vocabulary.all_names
        key = (tuple(names), templates if templates is None or isinstance(templates, str) else tuple(templates))
        if key not in self._text_embeds:
            self._text_embeds[key] = embed_names(self.model, self.tokenizer, names, templates)
        return self._text_embeds[key]

    def postprocess(self, outputs, output: str = "segments"):
        labels, names = outputs["labels"], outputs["names"]
        pixels, scores = LabelMap(labels, outputs["probabilities"]).class_scores(len(names))
        if output == "map":
            return {"map": labels.numpy(), "labels": names, "scores": scores.tolist()}
        return [
            {
                "label": names[label],
                "score": float(scores[label]),
                "mask": Image.fromarray((labels == label).numpy().astype(np.uint8) * 255),
            }
            for label in pixels.nonzero().flatten().tolist()
        ]
