"""
Requests of clients that are not trusted, for servers: an uploaded image and words in, masks as JSON out.

`handler.py` of an endpoint and the deployment in `docs/serving/` share it. A request is checked completely before the model
sees it: strings are never paths or URLs, and bytes, pixels and words are limited.
"""

import base64
import binascii
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.cli.pipelines import load_pipeline
from spar_hf.cli.result_files import Segment, coco_encoder, found_classes, label_image, segments
from spar_hf.cli.web_inputs import MAX_LETTERS, MAX_NAMES, MAX_PIXELS, MAX_UPLOAD, decode_upload
from spar_hf.model.image_input import ImageRange, to_rgb, turn_upright
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.results import check_output_size
from spar_hf.utils.errors import UsageError
from spar_hf.utils.labels import parse_background, parse_labels
from spar_hf.utils.terminal import is_harmful

logger = logging.getLogger(__name__)

PARAMETERS = ("candidate_labels", "threshold", "background", "output")
OUTPUTS = ("segments", "coco", "map")
FAILED = "The server could not segment the image; its log says why."


@dataclass(frozen=True)
class Limits:
    """
    What one request may ask for.

    Attributes:
        max_bytes: of an image file.
        max_pixels: of an image.
        max_names: of classes and background together; embedding them is the work of words.
    """

    max_bytes: int = MAX_UPLOAD
    max_pixels: int = MAX_PIXELS
    max_names: int = MAX_NAMES


@dataclass(frozen=True)
class SegmentationRequest:
    """
    A request that was checked.

    Attributes:
        image: in RGB, upright.
        vocabulary: the classes.
        options: further options of the pipeline, which can be hashed.
        output: `"segments"`, `"coco"` or `"map"`.
    """

    image: Image.Image
    vocabulary: Vocabulary
    options: tuple[tuple[str, Any], ...]
    output: str


def read_request(
    inputs: Any,
    parameters: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    image_range: ImageRange | None = None,
) -> SegmentationRequest:
    """
    Check a request and decode its image.

    Args:
        inputs: the image: the bytes of a file, their base64 text, or a decoded `PIL.Image.Image`.
        parameters: `candidate_labels` (a list or dict as for the pipeline, or text as on the command line), `threshold`,
            `background`, and `output`. Numbers may be text, as in a query string.
        limits: the defaults are those of the web page.
        image_range: values of black and white of images with more than 8 bits, those of the model's image processor.

    Raises:
        UsageError: anything else, or more than `limits` allow.

    Example:

    ```python
    >>> file = BytesIO()
    >>> Image.new("RGB", (64, 48)).save(file, "PNG")
    >>> request = read_request(file.getvalue(), {"candidate_labels": "road; sky", "threshold": "0.5"})
    >>> request.image.size, request.vocabulary.labels, request.options
    ((64, 48), ('road', 'sky'), (('threshold', 0.5),))
    >>> read_request("/etc/passwd", {"candidate_labels": "road; sky"})
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: `inputs` must be an image file as base64 text. Paths and URLs are not read.
    ```"""
    limits = limits or Limits()
    try:
        vocabulary, options, output = read_parameters(parameters, limits)
        return SegmentationRequest(read_image_of_client(inputs, limits, image_range), vocabulary, options, output)
    except (ValueError, RecursionError) as error:
        raise UsageError(" ".join(str(error).split())) from None


def read_image_of_client(inputs: Any, limits: Limits, image_range: ImageRange | None = None) -> Image.Image:
    """The uploaded image in RGB. Raises ValueError if it is none or above the limits."""
    too_large = f"The image file is larger than {limits.max_bytes / 2**20:g} MB. Reduce the image."
    if isinstance(inputs, Image.Image):
        if inputs.width * inputs.height > limits.max_pixels:
            raise UsageError(f"The image has more than {limits.max_pixels / 1e6:g} million pixels. Reduce it.")
        return to_rgb(turn_upright(inputs), image_range)
    if isinstance(inputs, str):
        if len(inputs) > 4 * (limits.max_bytes + 2) // 3:
            raise UsageError(too_large)
        try:
            inputs = base64.b64decode(inputs, validate=True)
        except (binascii.Error, ValueError):
            raise UsageError("`inputs` must be an image file as base64 text. Paths and URLs are not read.") from None
    if not isinstance(inputs, (bytes, bytearray)):
        raise UsageError("`inputs` must be one image file: its bytes, or their base64 text.")
    if len(inputs) > limits.max_bytes:
        raise UsageError(too_large)
    try:
        return decode_upload(bytes(inputs), limits.max_pixels, image_range)
    except ValueError:
        raise
    except Exception as error:  # Pillow's plugins raise various types for files made to break them
        logger.info("An image was refused: %r", error)
        raise UsageError("The image cannot be decoded. Its file is damaged.") from None


def read_parameters(
    parameters: Mapping[str, Any] | None, limits: Limits
) -> tuple[Vocabulary, tuple[tuple[str, Any], ...], str]:
    """The vocabulary, the options and the output of a request. Raises ValueError as [`read_request`]."""
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise UsageError(f"`parameters` must be an object with some of {', '.join(PARAMETERS)}.")
    if unknown := [str(name)[:40] for name in parameters if name not in PARAMETERS]:
        raise UsageError(f"Unknown parameter {unknown[0]!r}; there are {', '.join(PARAMETERS)}.")
    labels, background = parameters.get("candidate_labels"), parameters.get("background")
    if labels is None:
        raise UsageError('`candidate_labels` is missing. Name the classes to look for: ["road", "sky"].')
    check_words([labels, background], limits)
    vocabulary = parse_labels(labels) if isinstance(labels, str) else Vocabulary.parse(labels)
    names = len(vocabulary.all_names) + (len(background) if isinstance(background, list) else 0)
    if names > limits.max_names:
        raise UsageError(f"There are {names:,} names, more than {limits.max_names:,}. Name fewer classes.")
    options: dict[str, Any] = {}
    threshold = parameters.get("threshold")
    # first, since only its number tells whether it moves pixels to the background: the text "0" does not
    threshold = None if threshold is None else read_share("threshold", threshold)
    if isinstance(background, (list, str)):
        if isinstance(background, list):
            background = tuple(background)
        else:
            background = parse_background(background, vocabulary, bool(threshold))
        options |= {} if background is None else {"background": background}
    elif background is not None:
        raise UsageError("`background` must be a text or a list of texts.")
    if threshold is not None:
        options["threshold"] = threshold
    output = parameters.get("output") or "segments"
    if output not in OUTPUTS:
        raise UsageError(f"Unknown output {str(output)[:40]!r}; use {', '.join(OUTPUTS[:-1])} or {OUTPUTS[-1]}.")
    return vocabulary, tuple(options.items()), output


def query_parameters(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """
    The parameters of a query, of which each is given once. Repeated `candidate_labels`, as clients send lists, are the
    classes of all of them, each in the form of the text.

    Raises:
        UsageError: another parameter is repeated; to take one of them would drop the others without a word.

    Example:

    ```python
    >>> query_parameters([("candidate_labels", "road, street"), ("candidate_labels", "sky"), ("output", "map")])
    {'candidate_labels': 'road, street; sky', 'output': 'map'}
    ```"""
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found and name != "candidate_labels":
            raise UsageError(f"The parameter {name[:40]!a} is given more than once. Give it once.")
        found[name] = f"{found[name]}; {value}" if name in found else value
    return found


def check_words(value: Any, limits: Limits) -> None:
    """Raises UsageError unless a value of JSON holds few texts only, without control characters."""
    letters, names = 0, 0
    for text in texts_of(value):
        letters, names = letters + len(text), names + 1
        if letters > MAX_LETTERS or names > 2 * limits.max_names:  # a dict has labels beside the names
            raise UsageError("There are too many words. Name fewer classes.")
        if any(map(is_harmful, text)):
            raise UsageError(f"The name {text[:40]!a} has control characters or no valid Unicode. Remove them.")


def texts_of(value: Any, depth: int = 3) -> Iterator[str]:
    """All texts of a value of JSON: of a text, lists and dicts of them, in so many levels."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, Mapping)) and depth:
        for part in value.items() if isinstance(value, Mapping) else value:
            yield from texts_of(part, depth if isinstance(value, Mapping) else depth - 1)
    elif value is not None:
        raise UsageError('Classes are texts or lists of texts: ["road", ["car", "automobile"]].')


def read_share(name: str, value: Any) -> float:
    """
    A share from JSON or from a query string.

    Raises:
        UsageError: no number from 0 to 1; the message shows what was sent.
    """
    try:
        share = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        share = float("nan")
    if not 0 <= share <= 1:
        raise UsageError(f"`{name}` must be a share from 0 to 1, got {as_sent(value)}.")
    return share


def as_sent(value: Any) -> str:
    """
    The beginning of a value as a request has it, in ASCII, for messages.

    Example:

    ```python
    >>> as_sent(True), as_sent("0,5"), as_sent([0.5])
    ('true', '"0,5"', 'an array')
    ```"""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a huge number"  # Python refuses to write the largest ones
    if isinstance(value, (str, int, float)):
        return json.dumps(value[:40] if isinstance(value, str) else value)
    return "an object" if isinstance(value, Mapping) else "an array"


class SegmentationServer:
    """
    A model that answers requests, one batch at a time, however many threads ask.

    Args:
        model: folder or hub id of a two-tower SPAR model; the embedded spar-tiny by default.
        device: as for [`load_pipeline`].
        limits: of each request.

    Raises:
        ValueError, OSError: as [`load_pipeline`].

    Example:

    ```python
    >>> server = SegmentationServer()
    >>> file = BytesIO()
    >>> Image.new("RGB", (64, 48)).save(file, "PNG")
    >>> text = base64.b64encode(file.getvalue()).decode()
    >>> found = server.answer({"inputs": text, "parameters": {"candidate_labels": ["road", "sky"]}})
    >>> sorted(found[0])
    ['label', 'mask', 'score']
    ```"""

    def __init__(self, model: str | None = None, device: str | None = None, limits: Limits | None = None):
        self.limits, self.lock = limits or Limits(), threading.Lock()
        self.pipe = load_pipeline(model, device)
        self.image_range = self.pipe.image_processor.image_range
        self.pipe(Image.new("RGB", (64, 64)), candidate_labels=["image"])  # the first pass is slow

    def read(self, inputs: Any, parameters: Mapping[str, Any] | None) -> SegmentationRequest:
        """[`read_request`] with the limits of this server."""
        return read_request(inputs, parameters, self.limits, self.image_range)

    def segment(self, requests: Sequence[SegmentationRequest]) -> list[dict[str, Any] | Exception]:
        """
        The pipeline's `output="map"` for each request, or the error of it: a `UsageError` if the client must change it.
        Requests with the same words and options go through the pipeline together, where images of one size share a pass.
        """
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.vocabulary, request.options), []).append(i)
        results: list[Any] = [None] * len(requests)
        with self.lock:
            for (vocabulary, options), numbers in groups.items():
                images = [requests[i].image for i in numbers]
                for i, result in zip(numbers, self._segment(images, vocabulary, dict(options)), strict=True):
                    results[i] = result
        return results

    def _segment(self, images: list[Image.Image], vocabulary: Vocabulary, options: dict[str, Any]) -> list[Any]:
        """The result of each image or its error: one that cannot be segmented takes no other with it."""
        try:
            return list(self.pipe(images, vocabulary, output="map", batch_size=len(images), **options))
        except Exception as error:
            if len(images) > 1:
                return [result for image in images for result in self._segment([image], vocabulary, options)]
            if isinstance(error, ValueError):
                return [UsageError(" ".join(str(error).split()))]
            logger.exception("An image of %d × %d pixels failed.", *images[0].size)
            return [error]

    def answer(self, data: Any) -> list[dict[str, Any]] | dict[str, Any]:
        """
        Answer a request of the form `{"inputs": image, "parameters": {…}}`, see [`read_request`] and [`as_json`].

        Raises:
            UsageError: the client must change the request.
            RuntimeError: the server failed. The log says why, the message does not.
        """
        if not isinstance(data, Mapping) or "inputs" not in data:
            raise UsageError('The request must be an object {"inputs": image, "parameters": {…}}.')
        request = self.read(data["inputs"], data.get("parameters"))
        (result,) = self.segment([request])
        if isinstance(result, UsageError):
            raise result
        if isinstance(result, Exception):
            raise RuntimeError(FAILED)
        return as_json(result, request)


def as_json(result: Mapping[str, Any], request: SegmentationRequest) -> list[dict[str, Any]] | dict[str, Any]:
    """
    A result of the pipeline (`output="map"`) as values of JSON, in the output that the request names:

    - `"segments"`: a list of `label`, `score` and `mask` for each class with pixels, the mask as base64 text of a grey PNG
      of 0 and 255, as Hugging Face's image segmentation API answers. The background is listed if it is a class asked for.
    - `"coco"`: the same with `segmentation` (COCO's compressed run lengths), `bbox` and `area` instead of the mask.
    - `"map"`: `labels` and `scores` of all classes, the number of the `background` (-1: there is none), and `map`, the
      base64 text of a PNG whose pixels are class numbers.

    Raises:
        UsageError: masks of more than 1 GiB, or `"coco"` where pycocotools is not installed.

    Example:

    ```python
    >>> request = SegmentationRequest(Image.new("RGB", (3, 2)), Vocabulary.parse(["sky"]), (), "coco")
    >>> found = {"map": np.zeros((2, 3), np.int32), "labels": ["sky"], "scores": [0.9], "background": -1}
    >>> as_json(found, request)[0]["segmentation"]
    {'size': [2, 3], 'counts': '06'}
    ```"""
    labels, background = list(result["labels"]), int(result["background"])
    if request.output == "map":
        picture = png_text(label_image(result["map"], len(labels), background))
        scores = [round(float(score), 6) for score in result["scores"]]
        return {"labels": labels, "scores": scores, "background": background, "map": picture}
    keep_background = background >= 0 and labels[background] in request.vocabulary.labels
    try:
        check_output_size(len(found_classes(result, keep_background)) * result["map"].size, request.output)
        encode = coco_encoder() if request.output == "coco" else None
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    return [segment_as_json(segment, encode) for segment in segments(result, keep_background)]


def segment_as_json(segment: Segment, encode: Callable[..., Any] | None) -> dict[str, Any]:
    """A segment with its mask as PNG or, with pycocotools' `encode`, as run lengths."""
    found: dict[str, Any] = {"label": segment.label, "score": round(segment.score, 6)}
    if encode is None:
        return found | {"mask": png_text(Image.fromarray(segment.mask.astype(np.uint8) * 255))}
    runs = encode(np.asfortranarray(segment.mask, dtype=np.uint8))
    found["segmentation"] = {"size": list(segment.mask.shape), "counts": runs["counts"].decode("ascii")}
    return found | {"bbox": list(segment.bbox), "area": int(segment.mask.sum())}


def png_text(image: Image.Image) -> str:
    """An image as base64 text of a PNG."""
    file = BytesIO()
    image.save(file, "PNG", **({"bits": 8} if image.mode == "P" else {}))  # Pillow packs small palettes into fewer
    return base64.b64encode(file.getvalue()).decode("ascii")
