"""What `spar-hf segment` writes of an image: overlay, label map, COCO's run-length masks, a list of segments."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.cli.visualization import overlay
from spar_hf.utils.atomic import write_atomically, write_text

# ends of the files' names in an output folder
FORMATS = {"overlay": ".png", "map": ".map.png", "coco": ".coco.json", "json": ".json"}
MAX_CLASSES = 2**16  # a label map's pixel holds no more


@dataclass
class Segment:
    """
    The pixels of one class.

    Attributes:
        index: number of the class.
        label: its name.
        score: mean probability over the mask.
        mask: `(height, width)` bool.
        bbox: x and y of the top left pixel, width and height, in pixels of the image (COCO's order).
    """

    index: int
    label: str
    score: float
    mask: np.ndarray
    bbox: tuple[int, int, int, int]


def segments(result: Mapping[str, Any]) -> Iterator[Segment]:
    """
    The classes of a pipeline's `output="map"` that have pixels, one mask at a time.

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
    Class numbers as a grey image: 8 bit up to 256 classes, else 16 bit, whichever of them the image shows.

    Raises:
        ValueError: more classes than 16 bits count.
    """
    if classes > MAX_CLASSES:
        raise ValueError(f"A label map holds {MAX_CLASSES} classes, not {classes}. Leave out --format map.")
    return Image.fromarray(label_map.astype(np.uint8 if classes <= 256 else np.uint16))


def write_image(image: Image.Image, path: Path) -> None:
    """Write a picture as a whole or not at all."""
    write_atomically(path, image.save)


def segment_list(result: Mapping[str, Any], source: str) -> dict[str, Any]:
    """
    What the `json` format holds: the image's size in pixels, all labels in order, and per class with pixels its label, score
    (mean probability over the mask), share of the image (0 to 1) and bounding box (x, y, width, height in pixels).
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
    One image as a COCO data set: `images`, `categories` (class number + 1, in the order of the labels) and
    `annotations`, a run-length mask per class with pixels and its `score`. `pycocotools.coco.COCO` reads it.

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
    `pycocotools.mask.encode`.

    Raises:
        ImportError: names the extra to install.
    """
    try:
        from pycocotools.mask import encode
    except ImportError as error:
        raise ImportError("COCO's masks need pycocotools: pip install 'spar-hf[coco]'.") from error
    return encode


def merge_coco(files: Iterable[Path]) -> dict[str, Any]:
    """The data sets of single images as one, numbered on."""
    merged: dict[str, Any] = {"images": [], "categories": [], "annotations": []}
    for file in files:
        part = json.loads(file.read_text(encoding="utf-8"))
        merged["categories"] = part["categories"]
        image_id = len(merged["images"]) + 1
        merged["images"].append({**part["images"][0], "id": image_id})
        for annotation in part["annotations"]:
            number = len(merged["annotations"]) + 1
            merged["annotations"].append({**annotation, "id": number, "image_id": image_id})
    return merged


def write_results(image: Image.Image, result: Mapping[str, Any], targets: Mapping[str, Path], source: str) -> None:
    """
    Write what was found in an image, each file as a whole or not at all.

    Args:
        image (`PIL.Image.Image`): in RGB, upright.
        result (`Mapping`): the pipeline's `output="map"`: `map`, `labels` and `scores`.
        targets (`Mapping[str, Path]`): path by format, see `FORMATS`.
        source (`str`): what the files call the image.

    Raises:
        ImportError: `coco` without pycocotools.
        OSError: a file cannot be written.
    """
    for kind, path in targets.items():
        if kind == "overlay":
            write_image(overlay(image, result["map"], result["labels"]), path)
        elif kind == "map":
            write_image(label_image(result["map"], len(result["labels"])), path)
        else:
            content = (coco_dataset if kind == "coco" else segment_list)(result, source)
            write_text(path, json.dumps(content, ensure_ascii=False, indent=None if kind == "coco" else 1) + "\n")
