"""Files that `spar-hf segment` writes: overlay, label map, COCO run-length masks, list of segments, heat maps."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.cli.overlays import heat_picture, overlay, palette
from spar_hf.model.results import check_class_count
from spar_hf.utils.atomic import write_atomically, write_text
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage
from spar_hf.utils.texts import json_text, read_text


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


def segments(result: Mapping[str, Any], keep_background: bool = False) -> Iterator[Segment]:
    """
    Iterate over the classes that have pixels in a pipeline's `output="map"`, so that one mask is in memory at a time.

    Example:

    ```python
    >>> label_map = np.array([[0, 2], [0, 2], [1, 1]])
    >>> result = {"map": label_map, "labels": ["sky", "rest", "road"], "scores": [0.9, 0.7, 0.8], "background": 1}
    >>> [(segment.label, segment.bbox) for segment in segments(result)]
    [('sky', (0, 0, 1, 2)), ('road', (1, 0, 1, 2))]
    ```"""
    label_map = result["map"]
    for index in found_classes(result, keep_background):
        mask = label_map == index
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        top, left = int(rows[0]), int(columns[0])
        bbox = (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
        yield Segment(index, result["labels"][index], float(result["scores"][index]), mask, bbox)


def found_classes(result: Mapping[str, Any], keep_background: bool = False) -> list[int]:
    """Numbers of the classes that have pixels; the background only on request, and then last."""
    pixels = np.bincount(result["map"].ravel(), minlength=len(result["labels"]))
    found, background = pixels.nonzero()[0].tolist(), result["background"]
    others = [index for index in found if index != background]
    return [*others, background] if keep_background and background in found else others


def label_image(label_map: np.ndarray, classes: int, background: int = -1) -> Image.Image:
    """
    Class numbers as an image: up to 256 classes as indices of 8 bits into a palette of the legend's colours, more as grey
    levels of 16 bits; the same for all images of a vocabulary. `np.array(image)` are the class numbers.

    Raises:
        UsageError: more classes than 16 bits can number.

    Example:

    ```python
    >>> [label_image(np.zeros((40, 60), int), classes).mode for classes in (256, 257)]
    ['P', 'I;16']
    ```"""
    try:
        check_class_count(classes)
    except ValueError as error:
        raise UsageError(f"{error} Omit --format map.") from error
    if classes > 256:
        return Image.fromarray(label_map.astype(np.uint16))
    image = Image.fromarray(label_map.astype(np.uint8))
    image.putpalette(palette(classes, background).tobytes())
    return image


def write_image(image: Image.Image, path: Path) -> None:
    """Write a picture atomically, in the format of its suffix."""
    bits: dict[str, Any] = {"bits": 8} if image.mode == "P" else {}  # Pillow packs small palettes into fewer
    write_atomically(path, lambda temporary: image.save(temporary, **bits))


def frame_entry(image: InputImage) -> dict[str, int]:
    """The entry `frame` of a chosen frame's results."""
    return {} if image.frame is None else {"frame": image.frame}


def segment_list(result: Mapping[str, Any], image: InputImage, keep_background: bool = False) -> dict[str, Any]:
    """
    Content of the `json` format: the size of the image in pixels, all labels in order, the presence of each if asked for,
    and for each class with pixels its label, score (mean probability over the mask), share of the image (0 to 1) and
    bounding box (x, y, width, height in pixels).
    """
    height, width = result["map"].shape
    return {
        "image": image.source,
        **frame_entry(image),
        "width": width,
        "height": height,
        "labels": list(result["labels"]),
        **({"presence": presence_by_label(result)} if "presence" in result else {}),
        "segments": [
            {
                "label": segment.label,
                "score": round(segment.score, 6),
                "share": float(segment.mask.mean()),
                "bbox": list(segment.bbox),
            }
            for segment in segments(result, keep_background)
        ],
    }


def presence_by_label(result: Mapping[str, Any]) -> dict[str, float]:
    """Presence of every class but the background, for people and JSON: `{label: 0 to 1}`."""
    pairs = enumerate(zip(result["labels"], result["presence"], strict=True))
    return {label: round(float(value), 6) for i, (label, value) in pairs if i != result["background"]}


def coco_dataset(result: Mapping[str, Any], image: InputImage, keep_background: bool = False) -> dict[str, Any]:
    """
    One image as a COCO data set that `pycocotools.coco.COCO` reads: `images`, `categories` (ids are class numbers + 1) and
    `annotations`, with a run-length mask and a `score` for each class that has pixels.

    Raises:
        ImportError: pycocotools is not installed.
    """
    encode = coco_encoder()
    height, width = result["map"].shape
    annotations: list[dict[str, Any]] = []
    for segment in segments(result, keep_background):
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
        "images": [{"id": 1, "file_name": image.source, **frame_entry(image), "height": height, "width": width}],
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
    """
    Merge the data sets of single images into one, with consecutive ids.

    Raises:
        UsageError: a file has other categories than the first one.
    """
    merged: dict[str, Any] = {"images": [], "categories": [], "annotations": []}
    first = None
    for file in files:
        part = json.loads(read_text(file))
        if first is not None and part["categories"] != merged["categories"]:
            raise UsageError(f"{file} has other classes than {first}. Remove the older one, or make it anew.")
        first, merged["categories"] = first or file, part["categories"]
        image_id = len(merged["images"]) + 1
        merged["images"].append({**part["images"][0], "id": image_id})
        for annotation in part["annotations"]:
            number = len(merged["annotations"]) + 1
            merged["annotations"].append({**annotation, "id": number, "image_id": image_id})
    return merged


def write_results(
    image: Image.Image,
    result: Mapping[str, Any],
    targets: Mapping[str, Path],
    item: InputImage,
    keep_background: bool = False,
    heat_classes: Sequence[int] | None = None,
) -> None:
    """
    Write the results of an image, each file atomically.

    Args:
        image: in RGB, upright.
        result: the pipeline's `output="map"`: `map`, `labels`, `scores` and `background`; for heat maps also `heat`.
        targets: path by format: `overlay`, `map`, `coco`, `json` or `heatmap`.
        item: the image's file or URL, which COCO and JSON files record.
        keep_background: whether COCO and JSON files list the background.
        heat_classes: classes to draw heat maps of; those with pixels by default.

    Raises:
        ImportError: `coco` without pycocotools.
        OSError: a file cannot be written.
    """
    labels, background = result["labels"], result["background"]
    for format_name, path in targets.items():
        if format_name == "overlay":
            write_image(overlay(image, result["map"], labels, background=background), path)
        elif format_name == "map":
            write_image(label_image(result["map"], len(labels), background), path)
        elif format_name == "heatmap":
            write_heat_maps(image, result, found_classes(result) if heat_classes is None else heat_classes, path)
        else:
            content, indent = (coco_dataset, None) if format_name == "coco" else (segment_list, 1)
            write_text(path, json_text(content(result, item, keep_background), indent))


def write_heat_maps(image: Image.Image, result: Mapping[str, Any], classes: Sequence[int], folder: Path) -> None:
    """Write a picture per class, `000_road.png`, to a folder, and remove those of an earlier run."""
    written = set()
    for index in classes:
        label = result["labels"][index]
        heat = Image.fromarray(result["heat"][index]).resize(image.size, Image.Resampling.BILINEAR)
        name = re.sub(r"[^\w.-]+", "_", label)[:60]
        path = folder / f"{index:03}_{name}.png"
        write_image(heat_picture(image, np.asarray(heat), label), path)
        written.add(path)
    folder.mkdir(parents=True, exist_ok=True)
    for old in set(folder.glob("[0-9][0-9][0-9]*_*.png")) - written:
        old.unlink()
