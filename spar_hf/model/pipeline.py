# mypy: disable-error-code="override"
# transformers declares the hooks of Pipeline without their keywords
"""`pipeline("open-vocab-segmentation")`: from images and class names to one mask per class."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Pipeline

from .devices import check_device
from .image_input import as_list
from .image_streams import (
    EncodedImage,
    ImageSequence,
    ImageStream,
    Results,
    as_images,
    guarded,
    image_of_item,
    is_error,
)
from .processing_spar import SparProcessor
from .prompts import CandidateLabels, Vocabulary, normalise_name
from .refine import Refinement, Upsampler, refined_logits
from .segmentation import (
    DenseLogits,
    check_output_size,
    check_shares,
    class_probabilities,
    decide,
    give_to_background,
)
from .text_embeddings import TextEmbeddingCache

MAX_TOKENS = 16_384  # 2048 × 2048 pixels at a patch of 16
OUTPUTS = ("segments", "map", "probabilities", "logits")


class OpenVocabSegmentationPipeline(Pipeline):
    """
    Open-vocabulary segmentation with a two-tower SPAR checkpoint.

    Every pixel gets the class with the most probable name (softmax over all names, then the maximum over the names of a
    class; SPAR, section 3). Each name is embedded once, until the text tower's weights change.

    Beside features and results, a decision needs a few buffers of at most 64 MiB and 8 bytes per pixel of the image,
    for any number of classes: 0.25 GiB for 150 classes at 1024×2048, 0.37 GiB for 1,000 at 2048×2048 (on a CPU). To
    compile the model: `segment.model = torch.compile(segment.model)`.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline
    >>> import spar_hf

    >>> segment = pipeline("open-vocab-segmentation")
    >>> image = Image.new("RGB", (330, 200))
    >>> segments = segment(image, candidate_labels=["road", "car, automobile", "sky"])
    >>> sorted(segments[0])
    ['label', 'mask', 'score']
    >>> encoded = segment.encode(image)  # the vision tower runs once, for any number of vocabularies
    >>> segment(encoded, candidate_labels=["tree", "house"], output="map")["map"].shape
    (200, 330)
    ```"""

    _load_processor: Any = False
    _load_image_processor: Any = True
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = None  # optional here and checked below, for a better message about vision-only folders
    image_processor: Any
    tokenizer: Any
    model: Any

    def __init__(self, *args, **kwargs):
        check_device(kwargs.get("device"))
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "dense_logits"):  # not isinstance: code of a checkpoint defines a class of its own
            raise ValueError(
                f"open-vocab-segmentation needs a two-tower SPAR model, got {type(self.model).__name__}. Load the "
                "folder with `SparForOpenVocabSegmentation.from_pretrained`, or pass its path as `model`; models with "
                'classes of their own run in `pipeline("image-segmentation")`.'
            )
        if self.tokenizer is None:
            raise ValueError(
                f"open-vocab-segmentation needs the tokenizer of {self.model.name_or_path or 'the model'}, which could not "
                "be loaded. Pass `tokenizer`; `AutoTokenizer.from_pretrained` shows the reason."
            )
        self._texts = TextEmbeddingCache(self.model, self.tokenizer)

    def __call__(self, inputs: Any, candidate_labels: CandidateLabels | Vocabulary | None = None, **kwargs) -> Any:
        """
        Args:
            inputs (`str`, `bytes`, file, `PIL.Image.Image`, array, tensor, [`EncodedImage`], or several):
                Paths, URLs, image files or images; see [`SparImageProcessorPil`] for the accepted arrays. Several are a
                list, pandas Series, column `dataset["image"]`, dataset or generator. For rows (dicts) of `datasets`, the
                column `image` is used; items that are tuples are refused.
            candidate_labels (`list[str]`, `list[list[str]]`, `dict[str, list[str]]` or [`Vocabulary`]):
                The classes. In a list of strings, commas separate names of one class: `"car, automobile"`. A string is the
                name of a built-in vocabulary: `"ade20k"`, `"voc21"`, `"cityscapes"`, … (`spar_hf.model.vocabularies`).
            templates (`str` or `list[str]`, *optional*):
                Prompt templates: `"imagenet80"`, `"short"`, `"plain"` or strings with `{}`. Default: the checkpoint's.
            size (`dict[str, int]`, `int` or `str`, *optional*):
                Working size: `{"shortest_edge": 672}`, `{"longest_edge": 1024}`, both (the smaller image of the two), or
                `"native"`. Default: the image processor's. Masks always have the size of the image. An [`EncodedImage`]
                keeps the size it was encoded at.
            max_tokens (`int`, *optional*):
                Limit on the patches per image. Default: the image processor's, else 16,384 (2048×2048 pixels at a patch of
                16). A larger working image is made smaller by [`limited_size`], with one warning.
            image_range (`(float, float)`, *optional*):
                Black and white of images of floats or more than 8 bits: `(0, 4095)` for 12 bits. Without it, what cannot be
                scaled without guessing is refused, see [`SparImageProcessorPil`].
            background (`str` or `list[str]`, *optional*):
                Class, or words, treated as background. A string is the label of the class that gets unsure pixels and tiny
                classes: a class of the vocabulary or a new one without words. A list of words, which may be labels, makes
                the class `"background"`, whose words compete for every pixel. `"auto"` does so with the 26 stuff words of
                the published VOC21 evaluation, except those that are names of a class.
            threshold (`float`, *optional*, defaults to 0):
                Pixels whose best probability is lower become background.
            min_area (`float`, *optional*, defaults to 0):
                Classes that cover less than this share of the pixels outside the background become background.
            refine (`str` or `Callable`, *optional*): `"lposs"`, `"lposs+"` or `"pamr"` for sharper masks, see `refine.py`.
            upsampler (`Callable`, *optional*): a learned upsampler `(image, features) -> features`, see `refine.py`.
            output (`str`, *optional*, defaults to `"segments"`):
                - `"segments"`: a list of `{"label", "score", "mask"}` per class that has pixels, in the order of
                  the classes; `mask` is a `PIL.Image` of mode `L`, 0 or 255, in the size of the image.
                - `"map"`: a dict with `map`, an int32 array `(height, width)` of class numbers, `labels`, and `scores` per
                  class (0 where it has no pixels).
                - `"probabilities"`: a dict with `probabilities`, a float32 array `(classes, height, width)`, and `labels`.
                - `"logits"`: a dict with `logits`, a float32 array `(names, h, w)` on the patch grid (cosine times
                  `dense_logit_scale`), `names`, `labels`, and `name_to_class`, `patch_size`, `working_size`,
                  `original_size`, the further arguments of [`decide`].

                The probability of a class at a pixel is that of its most probable name in the softmax over all names. A
                `score` is the mean probability of the class over its pixels (for pixels moved to the background: one
                minus the probability of their former class). It measures how clearly the class won among these words,
                not the chance that the mask is right.
            top_k (`int`, *optional*):
                With `"segments"`: only the `top_k` segments of highest score, best first. With `"map"`: also `top_map`
                (int32) and `top_probabilities` (float32), both `(top_k, height, width)`: the best classes of every
                pixel, before pixels are moved to the background.
            batch_size (`int`, *optional*, defaults to 1):
                Images that are read together. Those of equal working size share a forward pass; none is padded.
            on_error (`str`, *optional*, defaults to `"raise"`):
                With `"skip"`, the result of a failed image is `{"error": message}`, and the others are still processed.
            num_workers (`int`, *optional*, defaults to 0): processes that read images.

        Returns:
            The output for an image, a list of them for a list of images, or an iterator for a generator or dataset.

        Raises:
            ValueError: no or malformed labels, a text that is too long for the text tower, an image that cannot be read,
                an unknown or contradictory option, an output above 1 GiB.

        ### Effect of `threshold`, `min_area` and `background`

        Measured with `spar-tiny` on images outside its training: ten frames spread over CamVid's `val` (11 classes) and
        the 20 held-out COCO images (133 classes), shorter side 384 px. *Kept*: labelled pixels outside the background.
        *Right*: those of them with the right class. *Found*: classes of an image that keep any pixel.

        | rule            | CamVid: kept, right, mIoU, found | COCO: kept, right, mIoU, found |
        |-----------------|----------------------------------|--------------------------------|
        | none            | 100 %, 86 %, 49.7, 86 %          | 100 %, 31 %, 4.5, 57 %         |
        | `threshold` 0.1 | 100 %, 86 %, 49.7, 86 %          | 97 %, 32 %, 4.6, 55 %          |
        | `threshold` 0.2 | 100 %, 86 %, 49.7, 86 %          | 73 %, 39 %, 5.0, 48 %          |
        | `threshold` 0.3 | 99 %, 87 %, 49.9, 85 %           | 49 %, 49 %, 5.0, 41 %          |
        | `threshold` 0.5 | 88 %, 92 %, 48.2, 78 %           | 24 %, 63 %, 3.9, 24 %          |
        | `threshold` 0.7 | 70 %, 97 %, 40.7, 62 %           | 11 %, 72 %, 2.3, 17 %          |
        | `threshold` 0.9 | 43 %, 100 %, 24.1, 48 %          | 4 %, 99 %, 1.1, 5 %            |
        | `min_area` 0.01 | 99 %, 86 %, 49.0, 72 %           | 97 %, 32 %, 5.1, 40 %          |
        | `min_area` 0.05 | 93 %, 89 %, 43.9, 51 %           | 82 %, 36 %, 5.9, 24 %          |
        | `min_area` 0.1  | 79 %, 91 %, 30.3, 35 %           | 69 %, 42 %, 6.7, 19 %          |

        The best threshold depends on the number of words: with more words, probabilities are lower. The same COCO images
        with words for things only, everything else being background (mean IoU of the things in an image / IoU of all
        things together / IoU of the background):

        | rule                        | words: the image's things | words: COCO's 80 things |
        |-----------------------------|---------------------------|-------------------------|
        | none                        | 19.1 / 37.8 / 0           | 10.7 / 37.8 / 0         |
        | `threshold` 0.3             | 19.1 / 37.8 / 0           | 9.0 / 28.4 / 36.5       |
        | `threshold` 0.7             | 20.3 / 38.0 / 21.4        | 3.5 / 5.1 / 61.0        |
        | `background="auto"`         | 15.8 / 33.4 / 66.9        | 10.5 / 50.1 / 60.6      |
        | the same, `threshold` 0.1   | 15.8 / 33.4 / 66.9        | 10.5 / 49.7 / 60.9      |

        `"auto"` finds the background best; with few words it also takes some pixels of things.
        """
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        images = as_images(inputs)
        if images is None:
            return super().__call__(inputs, **kwargs)
        results = super().__call__(images, **kwargs)
        # as in every pipeline of transformers: a list for a list, an iterator for a dataset or a generator
        return list(results) if as_list(inputs) is not None else results

    def _sanitize_parameters(
        self,
        candidate_labels=None,
        templates=None,
        size=None,
        max_tokens=None,
        image_range=None,
        output=None,
        top_k=None,
        background=None,
        threshold=None,
        min_area=None,
        on_error=None,
        refine=None,
        upsampler=None,
    ):
        if output not in (None, *OUTPUTS):
            raise ValueError(f"Unknown output {output!r}; use {', '.join(map(repr, OUTPUTS[:-1]))} or {OUTPUTS[-1]!r}.")
        if on_error not in (None, "raise", "skip"):
            raise ValueError(f"Unknown on_error {on_error!r}; use 'raise' or 'skip'.")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` must be a number of classes, at least 1, got {top_k!r}.")
        shares = {"threshold": threshold, "min_area": min_area}
        check_shares(**{name: value for name, value in shares.items() if value is not None})
        vocabulary = None if candidate_labels is None else Vocabulary.parse(candidate_labels)
        preprocess = {"size": size, "max_tokens": max_tokens, "image_range": image_range, "on_error": on_error}
        postprocess = {"output": output, "top_k": top_k}
        forward = {"vocabulary": vocabulary, "templates": templates, "background": background, **shares, **postprocess}
        forward |= {"refine": refine, "upsampler": upsampler}
        given = ({k: v for k, v in options.items() if v is not None} for options in (preprocess, forward, postprocess))
        return tuple(given)

    def encode(
        self,
        images: Any,
        size: Any = None,
        max_tokens: int | None = None,
        image_range: Sequence[float] | None = None,
    ) -> Any:
        """
        Run the vision tower once, for any number of vocabularies.

        Args:
            images: one image or several, as in the call.
            size, max_tokens, image_range: as in the call.

        Returns:
            An [`EncodedImage`] or a list of them, on the model's device. The pipeline takes them in place of images.
        """
        many = as_images(images)
        given = {"size": size, "max_tokens": max_tokens, "image_range": image_range}
        options = {**self._preprocess_params, **{name: value for name, value in given.items() if value is not None}}
        options.pop("on_error", None)
        encoded = [
            self._encode([self.preprocess(image, **options)])[0] for image in ([images] if many is None else many)
        ]
        return encoded[0] if many is None else encoded

    def text_embeds(self, vocabulary: Vocabulary, templates=None, check_weights: bool = True) -> torch.Tensor:
        """Embeddings of a vocabulary `(names, dim)`; only new names are embedded. See [`TextEmbeddingCache.get`]."""
        return self._cache().get(vocabulary.all_names, self._templates(templates), check_weights)

    def save_text_embeddings(
        self,
        path: str | os.PathLike,
        candidate_labels: CandidateLabels | Vocabulary | None = None,
        templates: str | Sequence[str] | None = None,
    ) -> None:
        """
        Write text embeddings to a safetensors file, so that thousands of names are embedded only once: those of
        `candidate_labels`, or all that were used with these templates. The file holds names, templates and a fingerprint
        of the text tower.

        Raises:
            ValueError: nothing to save, malformed labels, or a text longer than the context.
        """
        names = None if candidate_labels is None else Vocabulary.parse(candidate_labels).all_names
        self._cache().save(path, names, self._templates(templates))

    def load_text_embeddings(self, path: str | os.PathLike) -> int:
        """
        Load the embeddings of a file written by `save_text_embeddings`. Returns the number of its names.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, or one of another text tower, dtype or tokenizer.
        """
        return self._cache().load(path)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Write the model with its code, the image processor and the tokenizer to a folder that `pipeline` loads, with
        `trust_remote_code=True` where the library is not installed. Options are those of the model's `save_pretrained`;
        `push_to_hub=True` uploads all of it.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        hub = {name: kwargs[name] for name in ("push_to_hub", "repo_id", "token", "commit_message") if name in kwargs}
        SparProcessor(self.image_processor, self.tokenizer).save_pretrained(str(save_directory), **hub)

    def preprocess(self, image, size=None, max_tokens=None, image_range=None):
        if isinstance(image, EncodedImage):
            return image
        image = image_of_item(image)
        limit = next(n for n in (max_tokens, self.image_processor.max_tokens, MAX_TOKENS) if n is not None)
        options = {"max_tokens": limit, "patch_size": self.model.config.patch_size}
        options |= {} if size is None else {"size": size}
        options |= {} if image_range is None else {"image_range": image_range}
        inputs = self.image_processor(image, return_tensors="pt", **options)
        if len(inputs["original_sizes"]) != 1:
            raise ValueError("An item of the list is a batch of images. Pass a flat list of images.")
        return {"pixel_values": inputs["pixel_values"], "original_size": tuple(inputs["original_sizes"][0])}

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        images = ImageSequence([inputs])
        return next(iter(self.get_iterator(images, 0, 1, preprocess_params, forward_params, postprocess_params)))

    def get_iterator(
        self,
        inputs: ImageSequence | ImageStream,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Results:
        # errors in words or options concern every image, so they are raised here, whatever `on_error` is
        output, decided = forward_params.get("output"), ("threshold", "min_area", "top_k")
        if output in ("probabilities", "logits") and any(forward_params.get(name) for name in decided):
            raise ValueError(f"output={output!r} is computed before a decision: leave out {', '.join(decided)}.")
        templates = forward_params.get("templates")
        words = (forward_params.get("vocabulary"), forward_params.get("background"))
        vocabulary, _, _ = self.classes(*words, templates=templates)
        self.text_embeds(vocabulary, templates)
        skip = preprocess_params.get("on_error") == "skip"
        options = {name: value for name, value in preprocess_params.items() if name != "on_error"}
        prepare = partial(guarded, skip, self._read, options)
        if isinstance(inputs, ImageStream):
            num_workers = min(num_workers, 1)  # every further worker would read the whole stream again
            if num_workers and isinstance(inputs.source, Iterator) and multiprocessing.get_start_method() != "fork":
                num_workers = 0  # a generator cannot be sent to a worker that is a new process
        images = type(inputs)(inputs.source, prepare)
        loader: DataLoader = DataLoader(images, batch_size=batch_size, num_workers=num_workers, collate_fn=list)
        return Results(loader, lambda items: self._results(items, skip, forward_params, postprocess_params))

    def _read(self, options: dict, get: Callable[[], Any]) -> dict | EncodedImage:
        """Read and preprocess one image; a method, so that worker processes can pickle it."""
        return self.preprocess(get(), **options)

    def _results(self, items: list, skip: bool, forward_params: dict, postprocess_params: dict) -> Iterator[Any]:
        """Results of preprocessed images, in their order. Images of one size share a forward pass of the vision tower."""
        groups: dict[Any, list[int]] = {}
        for i, item in enumerate(items):
            if isinstance(item, dict) and not is_error(item):
                groups.setdefault(item["pixel_values"].shape, []).append(i)
        for group in groups.values():
            encoded = guarded(skip, self._encode, [items[i] for i in group])
            if is_error(encoded):  # perhaps out of memory: try one by one
                encoded = [guarded(skip, lambda item=items[i]: self._encode([item])[0]) for i in group]
            for i, item in zip(group, encoded, strict=True):
                items[i] = item
        for item in items:
            yield item if is_error(item) else guarded(skip, self._decide, item, forward_params, postprocess_params)

    def _decide(self, encoded: EncodedImage, forward_params: dict, postprocess_params: dict) -> Any:
        """The result of one encoded image."""
        return self.postprocess(self.forward(encoded, **forward_params), **postprocess_params)

    @torch.no_grad()
    def _encode(self, items: list[dict]) -> list[EncodedImage]:
        """Run the vision tower on images of one working size."""
        device = self.model.device
        pixel_values = torch.cat([item["pixel_values"] for item in items]).to(device)
        # through the model's forward, so that a compiled or wrapped model is used; one name costs next to nothing
        one_name = torch.zeros(1, self.model.config.projection_dim, device=device)
        feature_map = self.model(pixel_values, text_embeds=one_name).feature_map
        sizes = [item["original_size"] for item in items]
        return [EncodedImage(*parts) for parts in zip(feature_map, pixel_values, sizes, strict=True)]

    def _forward(
        self,
        encoded: EncodedImage,
        vocabulary: Vocabulary | None = None,
        templates=None,
        background: str | Sequence[str] | None = None,
        threshold: float = 0.0,
        min_area: float = 0.0,
        output: str = "segments",
        top_k: int | None = None,
        refine: str | Refinement | None = None,
        upsampler: Upsampler | None = None,
    ):
        rules = bool(threshold or min_area)
        vocabulary, labels, background_class = self.classes(vocabulary, background, rules, templates)
        encoded = encoded.to(self.model.device)
        # the weights were checked at the start of the call, which reads them all
        text_embeds = self.text_embeds(vocabulary, templates, check_weights=False)
        name_to_class = vocabulary.name_to_class.to(text_embeds.device)
        logits, cell = self._logits(encoded, text_embeds, refine, upsampler)
        geometry = (cell, encoded.working_size, encoded.original_size)
        if output == "logits":
            grid_h, grid_w = encoded.feature_map.shape[-2:]
            check_output_size(len(name_to_class) * grid_h * grid_w * 4, output)
            return {
                "logits": logits if isinstance(logits, torch.Tensor) else logits(0, grid_h),
                "names": vocabulary.all_names,
                "labels": labels,
                "name_to_class": name_to_class,
                **dict(zip(("patch_size", "working_size", "original_size"), geometry, strict=True)),
            }
        if output == "probabilities":
            return {"probabilities": class_probabilities(logits, name_to_class, *geometry)[1], "labels": labels}
        decision = decide(logits, name_to_class, *geometry)
        outputs: dict[str, Any] = {"labels": labels}
        if top_k and output == "map":
            top = class_probabilities(logits, name_to_class, *geometry, top_k=top_k)
            outputs["top_map"], outputs["top_probabilities"] = top
        if rules:
            decision = give_to_background(decision, background_class, threshold, min_area)
        pixels, scores = decision.class_scores(len(labels))
        return {"map": decision.labels, "pixels": pixels, "scores": scores, **outputs}

    def _logits(self, encoded: EncodedImage, text_embeds: torch.Tensor, refine, upsampler) -> tuple[DenseLogits, int]:
        """Logits of an image and the side of their cells in pixels; unrefined, as a function that gives rows of patches."""
        if refine is not None or upsampler is not None:
            parts = (encoded.feature_map, text_embeds, encoded.pixel_values)
            return refined_logits(self.model, *parts, refine, upsampler)

        def logits_of_rows(first: int, last: int) -> torch.Tensor:
            """`(names, last - first, w)`; [`decide`] takes no more rows at once than fit."""
            return self.model.dense_logits(encoded.feature_map[None, :, first:last], text_embeds)[0]

        return logits_of_rows, self.model.config.patch_size

    def postprocess(self, outputs, output: str = "segments", top_k: int | None = None):
        outputs = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}
        if output in ("probabilities", "logits"):
            return outputs
        labels, label_map = outputs["labels"], outputs["map"]
        pixels, scores = outputs.pop("pixels"), outputs["scores"].tolist()
        if output == "map":
            return {**outputs, "scores": scores}
        found = pixels.nonzero()[0].tolist()
        if top_k is not None:
            found = sorted(found, key=lambda label: -scores[label])[:top_k]
        check_output_size(len(found) * label_map.size, output)
        return [
            {
                "label": labels[label],
                "score": scores[label],
                "mask": Image.fromarray((label_map == label).astype(np.uint8) * 255),
            }
            for label in found
        ]

    def classes(
        self, vocabulary: Vocabulary | None, background: str | Sequence[str] | None, rules: bool = False, templates=None
    ) -> tuple[Vocabulary, list[str], int]:
        """
        The vocabulary with its background, the labels of the result, and the index of the background among them (-1: none).

        Raises:
            ValueError: no vocabulary, a background that leaves no class, or names that the tokenizer cannot tell apart.
        """
        if vocabulary is None:
            raise ValueError('`candidate_labels` is missing. Name the classes to look for: ["road", "sky"].')
        label, gives_way = "background", None
        if isinstance(background, str) and (background != "auto" or "auto" in vocabulary.labels):
            label = background
        elif background is not None:
            vocabulary = vocabulary.with_background(background)
            gives_way = next(given for given in vocabulary.labels if normalise_name(given) == label)
        vocabulary = self._cache().distinct(vocabulary, self._templates(templates), gives_way)
        labels = list(vocabulary.labels)
        if background is None and not rules:
            return vocabulary, labels, -1
        found = [i for i, given in enumerate(labels) if normalise_name(given) == normalise_name(label)]
        return (vocabulary, labels, found[0]) if found else (vocabulary, [*labels, label], len(labels))

    def _templates(self, templates: str | Sequence[str] | None) -> str | Sequence[str] | None:
        return self._forward_params.get("templates") if templates is None else templates

    def _cache(self) -> TextEmbeddingCache:
        self._texts.model, self._texts.tokenizer = self.model, self.tokenizer  # the user may have replaced them
        return self._texts


__all__ = ["EncodedImage", "OpenVocabSegmentationPipeline"]
