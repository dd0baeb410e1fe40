# mypy: disable-error-code="override"
# transformers declares the hooks of Pipeline without their keywords
"""`pipeline("open-vocab-segmentation")`: from images and class names to one mask per class."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.utils import logging

from .background import ONE_CLASS, empty_background, resolve_classes
from .devices import check_device
from .image_input import as_list, image_of_item
from .image_pixels import check_size, token_limit
from .image_streams import EncodedImage, ImageSequence, ImageStream, Results, as_images
from .label_maps import map_result
from .pipeline_options import sanitize_parameters
from .presence import class_presence, store_embeddings
from .processing_spar import SparProcessor
from .prompts import CandidateLabels, Vocabulary
from .refine import Refinement, refined_logits, resolve_refinement
from .results import as_segments, check_finite_features, check_output_size, guarded, is_error
from .segmentation import DenseLogits, class_probabilities
from .support import SupportImages, SupportSet
from .text_embeddings import STORED_EMBEDDINGS, TextEmbeddingCache, stored_embeddings
from .tiling import TiledImage, check_tiled, tile_sides, tiled_map
from .upsamplers import Upsampler, resolve_upsampler
from .video import FrameStreams


class OpenVocabSegmentationPipeline(SupportImages, FrameStreams, Pipeline):
    """
    Open-vocabulary segmentation with a two-tower SPAR checkpoint.

    Every pixel gets the class with the name of largest logit (SPAR, section 3). Each name is embedded once, until the text
    tower's weights change; embeddings stored beside the checkpoint (`save_pretrained`) are used.

    Beside features and results, a decision needs a few buffers of at most 64 MiB and 8 bytes per pixel of the image,
    for any number of classes: 0.25 GiB for 150 classes at 1024×2048, 0.37 GiB for 1,000 at 2048×2048 (on a CPU). To
    compile the model: `segment.model = spar_hf.compile_model(segment.model)`.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import pipeline
    >>> import spar_hf

    >>> segment = pipeline("open-vocab-segmentation")
    >>> image = Image.new("RGB", (330, 200), "skyblue")
    >>> words = ["road", "car, automobile", "sky"]
    >>> found = segment(image, candidate_labels=words, background="auto", output="map")
    >>> found["labels"], found["background"]
    (['road', 'car', 'sky', 'background'], 3)
    >>> segments = segment(image, candidate_labels=words)  # without a background every pixel gets one of the classes
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
        self._texts = TextEmbeddingCache(self.model, self.tokenizer, stored=stored_embeddings(self.model))
        self.support = SupportSet()

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
            templates (`str`, `list[str]` or [`TemplateChoice`], *optional*):
                Prompt templates: `"imagenet80"`, `"tcl"`, `"short"`, `"plain"`, strings with `{}`, or the file of
                [`choose_templates`]. Default: the checkpoint's.
            size (`dict[str, int]`, `int` or `str`, *optional*):
                Working size: `{"shortest_edge": 672}`, `{"longest_edge": 1024}`, both (the smaller image of the two), or
                `"native"`. Default: the image processor's. Masks always have the size of the image. An [`EncodedImage`]
                keeps the size it was encoded at.
            max_tokens (`int`, *optional*):
                Limit on the patches per image. Default: the image processor's, else 16,384 (2048×2048 pixels at a patch of
                16). A larger working image is made smaller by [`limited_size`], with one warning.
            tile (`dict[str, int]` or `int`, *optional*):
                For large images: tiles of `{"size": 1536, "overlap": 256}` pixels are one pass each, at the size of the
                image, and their features are blended. A number is the size; the overlap is then a quarter of it. Rounded to
                patches. Of arrays on a disk ([`ImageWindows`]) only tiles are read. For label maps larger than memory see
                `spar_hf.batch.huge_images`.
            image_range (`(float, float)`, *optional*):
                Black and white of images of floats or more than 8 bits: `(0, 4095)` for 12 bits. Without it, what cannot be
                scaled without guessing is refused, see [`SparImageProcessorPil`].
            background (`str` or `list[str]`, *optional*):
                What surrounds the classes. `None`: nothing, every pixel gets one of the classes. `"auto"`: the class
                `"background"` of 26 common stuff words, which compete for every pixel, less those that mean the same as a
                name of a class (`same_meaning` in `background.py`); if none is left, as `None`. A list of words, which may
                be labels, makes that class of these words. Any other string is the label of the class that gets unsure
                pixels and tiny classes: a class of the vocabulary or a new one without words.
            threshold (`float`, *optional*, defaults to 0):
                Pixels whose best probability is lower become background.
            min_area (`float`, *optional*, defaults to 0):
                Classes that cover less than this share of the pixels outside the background become background.
            presence (`bool`, *optional*, defaults to `False`):
                Add to every class how likely the image shows it at all, from 0 to 1. It is comparable between lists of
                words, see `docs/masks.md` for what it is not.
            min_presence (`float`, *optional*):
                Drop classes whose presence is below it, as if they had not been listed: their pixels go to the next best of
                the others, the background's words among them. If every class is dropped, all pixels are background.
            refine (`str` or `Callable`, *optional*): `"lposs"`, `"lposs+"` or `"pamr"` for sharper masks, see `refine.py`.
            upsampler (`str` or `Callable`, *optional*): `"anyup"`, `"naf"`, `"uplift"` or a callable, see `upsamplers.py`.
            output (`str`, *optional*, defaults to `"segments"`):
                - `"segments"`: a list of `{"label", "score", "mask"}` per class that has pixels, in the order of
                  the classes; `mask` is a `PIL.Image` of mode `L`, 0 or 255, in the size of the image. The background is
                  not among them, unless it is one of `candidate_labels`.
                - `"map"`: a dict with `map`, an int32 array `(height, width)` of class numbers, `labels`, `scores` per
                  class (0 where it has no pixels), and `background`, the number of that class (-1: there is none).
                - `"probabilities"`: a dict with `probabilities`, a float32 array `(classes, height, width)`, and `labels`.
                - `"logits"`: a dict with `logits`, a float32 array `(names, h, w)` on the patch grid (cosine times
                  `dense_logit_scale`), `names`, `labels`, and `name_to_class`, `patch_size`, `working_size`,
                  `original_size`, the further arguments of [`decide`].

                The probability of a class at a pixel is the softmax over classes, each with the largest logit of its names,
                so that further names of a class lower no probability. A `score` is the mean probability of the class over
                its pixels (for pixels moved to the background: one minus the probability of their former class). It
                measures how clearly the class won among these words, not the chance that the mask is right. With
                `presence`, segments have it too, and dicts a list with one number per class.
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

        `docs/masks.md` has measurements of `background`, `threshold`, `min_area` and `presence`.
        """
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        images = as_images(inputs)
        if images is None:
            return super().__call__(inputs, **kwargs)
        results = super().__call__(images, **kwargs)
        # as in every pipeline of transformers: a list for a list, an iterator for a dataset or a generator
        return list(results) if as_list(inputs) is not None else results

    def _sanitize_parameters(self, **options):
        return sanitize_parameters(**options)

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
        if self._preprocess_params.get("tile") is not None:
            raise ValueError("The features of an image in tiles are not kept: call the pipeline with `tile` instead.")
        return self._encode_whole(images, size, max_tokens, image_range)

    def _encode_whole(self, images, size=None, max_tokens=None, image_range=None):
        """[`encode`], each image in one pass although the pipeline was made with `tile`."""
        many = as_images(images)
        given = {"size": size, "max_tokens": max_tokens, "image_range": image_range}
        options = {**self._preprocess_params, **{name: value for name, value in given.items() if value is not None}}
        options = {name: value for name, value in options.items() if name not in ("on_error", "tile")}
        prepared = [self.preprocess(image, **options) for image in ([images] if many is None else many)]
        encoded = [item if isinstance(item, EncodedImage) else self._encode([item])[0] for item in prepared]
        return encoded[0] if many is None else encoded

    def text_embeds(self, vocabulary: Vocabulary, templates=None, check_weights: bool = True) -> torch.Tensor:
        """Embeddings of a vocabulary `(names, dim)`; only new names are embedded. See [`TextEmbeddingCache.get`]."""
        return self.texts.get(vocabulary.all_names, self._templates(templates), check_weights)

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
        self.texts.save(path, names, self._templates(templates))

    def load_text_embeddings(self, path: str | os.PathLike) -> int:
        """
        Load the embeddings of a file written by `save_text_embeddings`. Returns the number of its names.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, or one of another text tower, dtype or tokenizer.
        """
        return self.texts.load(path)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        text_embeddings: Sequence[CandidateLabels | Vocabulary] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Write the model with its code, the image processor and the tokenizer to a folder that `pipeline` loads, with
        `trust_remote_code=True` where the library is not installed. Options are those of the model's `save_pretrained`;
        `push_to_hub=True` uploads all but text embeddings, in two commits.

        Args:
            save_directory: folder to write.
            text_embeddings (*optional*):
                Vocabularies, as `candidate_labels` each: `["ade20k", ["road", "sky"]]`. Their embeddings, and those that
                `background="auto"` and `presence` need, are stored as `text_embeddings.safetensors`. A pipeline of the
                folder reads them at its first call, as long as text tower and tokenizer are the same. They are made with
                the `templates` of this pipeline, which the file names, and serve calls with the same ones only; a warning
                tells if these are not the checkpoint's.

        Raises:
            ValueError: vocabularies that are no list, or an upload to a pull request or a branch: `push_to_hub` does that.
        """
        if isinstance(text_embeddings, str):
            raise ValueError(f"`text_embeddings` is a list of vocabularies: [{text_embeddings!r}].")
        if kwargs.get("push_to_hub") and (kwargs.get("create_pr") or kwargs.get("revision")):
            # processors of transformers cannot: theirs would go to the main branch
            raise ValueError(
                "A pull request or a branch gets model and processor in one commit: `push_to_hub(repo_id, create_pr=True)` "
                "or `push_to_hub(repo_id, revision=...)` instead of `save_pretrained(..., push_to_hub=True)`."
            )
        # wrong ones are refused before anything is written
        vocabularies = [Vocabulary.parse(labels) for labels in text_embeddings or ()]
        self.model.save_pretrained(save_directory, **kwargs)
        if self.image_processor.max_tokens is not None and self.image_processor.patch_size is None:
            self.image_processor.patch_size = self.model.config.patch_size  # it is loaded without the model
        hub = {name: kwargs[name] for name in ("push_to_hub", "repo_id", "token", "commit_message") if name in kwargs}
        SparProcessor(self.image_processor, self.tokenizer).save_pretrained(str(save_directory), **hub)
        if text_embeddings is not None:
            names = [name for vocabulary in vocabularies for name in vocabulary.all_names]
            templates = self._templates(None)
            store_embeddings(self.texts, os.path.join(save_directory, STORED_EMBEDDINGS), names, templates)
            if templates is not None and not self.texts.are_own(templates):
                logging.get_logger(__name__).warning(
                    "The stored text embeddings are of the `templates` of this pipeline, which are not the checkpoint's. "
                    f"Make a pipeline of {str(save_directory)!r} with the same `templates`: without, it embeds words anew."
                )

    def preprocess(self, image, size=None, max_tokens=None, image_range=None, tile=None):
        if isinstance(image, EncodedImage):
            if tile is not None:
                raise ValueError("An encoded image is one pass: pass the image itself with `tile`.")
            return image
        image = image_of_item(image)
        limit = token_limit(max_tokens, self.image_processor.max_tokens)
        if tile is not None:
            if image_range is None:
                image_range = self.image_processor.image_range
            return TiledImage.make(image, tile, self.model.config.patch_size, limit, image_range)
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
        output, rules = forward_params.get("output"), ("threshold", "min_area", "min_presence")
        decided = (*rules, "top_k")
        if output in ("probabilities", "logits") and any(forward_params.get(name) for name in decided):
            raise ValueError(f"output={output!r} is computed before a decision: leave out {', '.join(decided)}.")
        if (tile := preprocess_params.get("tile")) is not None:
            check_tiled({**preprocess_params, **forward_params})
            limit = token_limit(preprocess_params.get("max_tokens"), self.image_processor.max_tokens)
            tile_sides(tile, self.model.config.patch_size, limit)
        check_size(preprocess_params.get("size"))
        if forward_params.get("refine") is not None:
            resolve_refinement(forward_params["refine"])
        resolve_upsampler(forward_params.get("upsampler"), self.image_processor, self.model.config)
        templates = forward_params.get("templates")
        words = (forward_params.get("vocabulary"), forward_params.get("background"))
        self.texts.refresh()  # reads all weights of the text tower, once for all images
        vocabulary, labels, _ = self.classes(*words, templates=templates)
        hint = ONE_CLASS if len(labels) == 1 else empty_background(vocabulary.labels, words[1])
        if hint and output != "logits" and not any(forward_params.get(name) for name in rules):
            logging.get_logger(__name__).warning_once(hint)
        self.supported(vocabulary, templates)
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

    def _read(self, options: dict, get: Callable[[], Any]) -> dict | EncodedImage | TiledImage:
        """Read and preprocess one image; a method, so that worker processes can pickle it. The error of a frame stays."""
        image = get()
        return image if is_error(image) and len(image) == 1 else self.preprocess(image, **options)

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

    def _decide(self, encoded: EncodedImage | TiledImage, forward_params: dict, postprocess_params: dict) -> Any:
        """The result of one encoded image."""
        return self.postprocess(self.forward(encoded, **forward_params), **postprocess_params)

    @torch.no_grad()
    def _encode(self, items: list[dict]) -> list[EncodedImage]:
        """Run the vision tower on images of one working size."""
        pixel_values = torch.cat([item["pixel_values"] for item in items]).to(self.model.device)
        # through the model's forward, so that a compiled or wrapped model is used; one name costs next to nothing
        one_name = torch.zeros(1, self.model.config.projection_dim, device=self.model.device)
        feature_map = self.model(pixel_values, text_embeds=one_name).feature_map
        check_finite_features(feature_map)
        sizes = [item["original_size"] for item in items]
        return [EncodedImage(*parts) for parts in zip(feature_map, pixel_values, sizes, strict=True)]

    def _forward(
        self,
        encoded: EncodedImage | TiledImage,
        vocabulary: Vocabulary | None = None,
        templates=None,
        background: str | Sequence[str] | None = None,
        threshold: float = 0.0,
        min_area: float = 0.0,
        presence: bool = False,
        min_presence: float | None = None,
        output: str = "segments",
        top_k: int | None = None,
        refine: str | Refinement | None = None,
        upsampler: str | Upsampler | None = None,
    ):
        asked, rules = vocabulary.labels if vocabulary else (), bool(threshold or min_area or min_presence)
        vocabulary, labels, background_class = self.classes(vocabulary, background, rules, templates)
        decided = {
            "background": background_class,
            "hidden": background_class >= 0 and labels[background_class] not in asked,
        }
        if isinstance(encoded, TiledImage):
            rule = (len(labels), background_class, threshold, min_area, templates)
            return {**tiled_map(self, encoded, vocabulary, *rule), "labels": labels, **decided}
        encoded = encoded.to(self.model.device)
        # the weights were checked at the start of the call, which reads them all
        model, text_embeds = self.supported(vocabulary, templates)
        name_to_class = vocabulary.name_to_class.to(text_embeds.device)
        outputs: dict[str, Any] = {"labels": labels}
        if presence or min_presence is not None:
            found = class_presence(self.texts, encoded.feature_map, vocabulary)
            # a background without words is nothing that could be there
            outputs["presence"] = found + [0.0] * (len(labels) - len(found))
            kept = [i == background_class or value >= (min_presence or 0) for i, value in enumerate(found)]
            names = torch.tensor(kept, device=text_embeds.device)[name_to_class]
            text_embeds, name_to_class = text_embeds[names], name_to_class[names]
        logits, cell = self._logits(model, encoded, text_embeds, refine, upsampler)
        geometry = (cell, encoded.working_size, encoded.original_size)
        if output == "logits":
            grid_h, grid_w = encoded.feature_map.shape[-2:]
            check_output_size(len(name_to_class) * grid_h * grid_w * 4, output)
            return {
                "logits": logits(0, grid_h) if callable(logits) else logits,
                "names": vocabulary.all_names,
                "name_to_class": name_to_class,
                **dict(zip(("patch_size", "working_size", "original_size"), geometry, strict=True)),
                **outputs,
            }
        if output == "probabilities":
            _, probabilities = class_probabilities(logits, name_to_class, *geometry, classes=len(labels))
            return {"probabilities": probabilities, **outputs}
        top_k = top_k if output == "map" else None
        result = map_result(logits, name_to_class, geometry, len(labels), background_class, threshold, min_area, top_k)
        return {**result, **outputs, **decided}

    def _logits(
        self, model: Any, encoded: EncodedImage, text_embeds: torch.Tensor, refine, upsampler
    ) -> tuple[DenseLogits, int]:
        """Logits of an image and the side of their cells in pixels; unrefined, as a function that gives rows of patches."""
        refined = refine is not None or upsampler is not None
        if refined and len(text_embeds):  # without names there is nothing to refine
            resolved = resolve_upsampler(upsampler, self.image_processor, self.model.config)
            return refined_logits(model, encoded.feature_map, text_embeds, encoded.pixel_values, refine, resolved)

        def logits_of_rows(first: int, last: int) -> torch.Tensor:
            """`(names, last - first, w)`; [`decide`] takes no more rows at once than fit."""
            return model.dense_logits(encoded.feature_map[None, :, first:last], text_embeds)[0]

        return logits_of_rows, self.model.config.patch_size

    def postprocess(self, outputs, output: str = "segments", top_k: int | None = None):
        outputs = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}
        if output in ("probabilities", "logits"):
            return outputs
        pixels, hidden = outputs.pop("pixels"), outputs.pop("hidden")
        outputs["scores"] = outputs["scores"].tolist()
        return outputs if output == "map" else as_segments(outputs, pixels, hidden, top_k)

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
        return resolve_classes(self.texts, vocabulary, background, rules, self._templates(templates))

    def _templates(self, templates: Any) -> Any:
        return self._forward_params.get("templates") if templates is None else templates

    @property
    def texts(self) -> TextEmbeddingCache:
        """The embeddings of names that have been used."""
        self._texts.model, self._texts.tokenizer = self.model, self.tokenizer  # the user may have replaced them
        return self._texts


__all__ = ["EncodedImage", "OpenVocabSegmentationPipeline"]
