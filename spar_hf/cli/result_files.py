"""Files that `spar-hf segment` writes: overlay, label map, COCO run-length masks, list of segments."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.cli.overlays import overlay
from spar_hf.utils.atomic import write_atomically, write_text
from spar_hf.utils.errors import UsageError
from spar_hf.utils.texts import json_text, read_text

MAX_CLASSES = 2**16  # of a 16-bit label map


@dataclass
class Segment:
    """
    The pixels of one class.

    Attributes:
        index: number of the class, from 0.
        label: name of the class.
        score: mean probability over the mask.
        mask: `(height, width)` bool.
        bbox: x and y of the top left pixel, width and height, in pixels (the order of COCO).
    """

    index: int
    label: str
    score: float
    mask: np.ndarray
    bbox: tuple[int, int, int, int]


def segments(result: Mapping[str, Any]) -> Iterator[Segment]:
    """
    Iterate over the classes that have pixels in a pipeline's `output="map"`, so that one mask is in memory at a time.

    Example:

    ```python
    >>> label_map = np.array([[0, 2], [0, 2], [0, 0]])
    >>> found = segments({"map": label_map, "labels": ["sky", "car", "road"], "scores": [0.9, 0, 0.8]})
    >>> [(segment.label, segment.bbox) for segment in found]
    [('sky', (0, 0, 2, 3)), ('road', (1, 0, 1, 2))]
    ```"""
    label_map = result["map"]
    pixels = np.bincount(label_map.ravel(), minlength=len(result["labels"]))
    for index in pixels.nonzero()[0].tolist():
        mask = label_map == index
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        top, left = int(rows[0]), int(columns[0])
        bbox = (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
        yield Segment(index, result["labels"][index], float(result["scores"][index]), mask, bbox)


def label_image(label_map: np.ndarray, classes: int) -> Image.Image:
    """
    Class numbers as a grey image: 8 bits for up to 256 classes, else 16 bits, the same for all images of a vocabulary.

    Raises:
        UsageError: more classes than 16 bits can number.

    Example:

    ```python
    >>> label_image(np.zeros((40, 60), int), 257).mode
    'I;16'
    ```"""
    if classes > MAX_CLASSES:
        raise UsageError(f"A label map is limited to {MAX_CLASSES} classes, not {classes}. Omit --format map.")
    return Image.fromarray(label_map.astype(np.uint8 if classes <= 256 else np.uint16))


def write_image(image: Image.Image, path: Path) -> None:
    """Write a picture atomically, in the format of its suffix."""
    write_atomically(path, image.save)


def segment_list(result: Mapping[str, Any], source: str) -> dict[str, Any]:
    """
    Content of the `json` format: the size of the image in pixels, all labels in order, and for each class with pixels its
    label, score (mean probability over the mask), share of the image (0 to 1) and bounding box (x, y, width, height in
    pixels).
    """
    height, width = result["map"].shape
    return {
        "image": source,
        "width": width,
        "height": height,
        "labels": list(result["labels"]),
        "segments": [
            {
                "label": segment.label,
                "score": round(segment.score, 6),
                "share": float(segment.mask.mean()),
                "bbox": list(segment.bbox),
            }
            for segment in segments(result)
        ],
    }


def coco_dataset(result: Mapping[str, Any], source: str) -> dict[str, Any]:
    """
    One image as a COCO data set that `pycocotools.coco.COCO` reads: `images`, `categories` (ids are class numbers + 1) and
    `annotations`, with a run-length mask and a `score` for each class that has pixels.

    Raises:
        ImportError: pycocotools is not installed.
    """
    encode = coco_encoder()
    height, width = result["map"].shape
    annotations: list[dict[str, Any]] = []
    for segment in segments(result):
        runs = encode(np.asfortranarray(segment.mask, dtype=np.uint8))
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": 1,
                "category_id": segment.index + 1,
                "segmentation": {"size": [height, width], "counts": runs["counts"].decode("ascii")},
                "area": int(segment.mask.sum()),
                "bbox": list(segment.bbox),
                "iscrowd": 0,
                "score": round(segment.score, 6),
            }
        )
    return {
        "images": [{"id": 1, "file_name": source, "height": height, "width": width}],
        "categories": [{"id": i + 1, "name": label} for i, label in enumerate(result["labels"])],
        "annotations": annotations,
    }


def coco_encoder():
    """
    Import `pycocotools.mask.encode`.

    Raises:
        ImportError: pycocotools is not installed.
    """
    try:
        from pycocotools.mask import encode
    except ImportError as error:
        raise ImportError("COCO masks need pycocotools: pip install 'spar-hf[coco]'.") from error
    return encode


def merge_coco(files: Iterable[Path]) -> dict[str, Any]:
    """Merge the data sets of single images into one, with consecutive ids."""
    merged: dict[str, Any] = {"images": [], "categories": [], "annotations": []}
    for file in files:
        part = json.loads(read_text(file))
        merged["categories"] = part["categories"]
        image_id = len(merged["images"]) + 1
        merged["images"].append({**part["images"][0], "id": image_id})
        for annotation in part["annotations"]:
            number = len(merged["annotations"]) + 1
            merged["annotations"].append({**annotation, "id": number, "image_id": image_id})
    return merged


def write_results(image: Image.Image, result: Mapping[str, Any], targets: Mapping[str, Path], source: str) -> None:
    """
    Write the results of an image, each file atomically.

    Args:
        image: in RGB, upright.
        result: the pipeline's `output="map"`: `map`, `labels` and `scores`.
        targets: path by format: `overlay`, `map`, `coco` or `json`.
        source: file or URL of the image, which COCO and JSON files record.

    Raises:
        ImportError: `coco` without pycocotools.
        OSError: a file cannot be written.
    """
    for format_name, path in targets.items():
        if format_name == "overlay":
            write_image(overlay(image, result["map"], result["labels"]), path)
        elif format_name == "map":
            write_image(label_image(result["map"], len(result["labels"])), path)
        else:
            content, indent = (coco_dataset, None) if format_name == "coco" else (segment_list, 1)
            write_text(path, json_text(content(result, source), indent))
