"""Columns of batches: images out of them, and results that Arrow can hold into them."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.model.image_input import image_of_row
from spar_hf.model.results import check_class_count
from spar_hf.utils.remote_files import is_remote, read_remote

Columns = dict[str, Any]


def image_of_cell(cell: Any) -> Any:
    """The image of a cell: a dict with `bytes` or `path`, as `datasets` stores images, is read; a URL of a store too."""
    if isinstance(cell, Mapping):
        cell = image_of_row(cell)
    return read_remote(cell) if is_remote(cell) else cell


def is_missing(cell: Any) -> bool:
    """Whether a cell holds nothing: `None`, or the NaN of pandas."""
    return cell is None or (isinstance(cell, float) and cell != cell)


def as_column(values: Sequence[Any]) -> np.ndarray:
    """
    An array of numbers, else one of objects: strings, bytes and lists keep their types, and lists are no second axis.

    Example:

    ```python
    >>> as_column([3, 4]), as_column([[480, 640], [200, 330]]).shape
    (array([3, 4]), (2,))
    ```"""
    if values and all(isinstance(value, (int, float)) for value in values):
        return np.array(values)
    column = np.empty(len(values), dtype=object)
    for position, value in enumerate(values):
        column[position] = value
    return column


def png(result: Mapping[str, Any]) -> bytes:
    """
    The label map of a pipeline's `output="map"` as a grey PNG of 8 or 16 bits.

    Raises:
        ValueError: more than 65,536 classes.
    """
    check_class_count(len(result["labels"]))
    numbers = result["map"].astype(np.uint8 if len(result["labels"]) <= 256 else np.uint16)
    buffer = BytesIO()
    Image.fromarray(numbers).save(buffer, "PNG")
    return buffer.getvalue()


def coco(result: Mapping[str, Any]) -> str:
    """The masks of a pipeline's `output="map"` as JSON: `label`, `score`, `size`, `counts` of every class with pixels."""
    label_map = result["map"]
    masks = [
        {"label": result["labels"][i], "score": float(result["scores"][i]), **run_lengths(label_map == i)}
        for i in np.unique(label_map).tolist()
    ]
    return json.dumps(masks)


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """
    COCO's run lengths of a mask `(height, width)`.

    Raises:
        ImportError: pycocotools is not installed.
    """
    try:
        from pycocotools.mask import encode
    except ImportError as error:
        raise ImportError("COCO masks need pycocotools: pip install 'spar-hf[coco]'.") from error
    runs = encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": runs["counts"].decode("ascii")}
