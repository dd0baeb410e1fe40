"""Arrays in tables: the bytes, shape and dtype that the callables write, as NumPy arrays again. Needs no torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def read_array(row: Mapping[str, Any], name: str = "features") -> np.ndarray:
    """
    An array of a row that [`~spar_hf.batch.callables.SparFeatures`] made.

    Args:
        row: with the column of bytes, its shape and `dtype`.
        name: `"features"`, or a block such as `"layer_3"`.

    Returns:
        The array in its shape. bfloat16, which NumPy has not, becomes float32 without loss.

    Raises:
        KeyError: there is no such column.
        ValueError: the image of the row failed, or the bytes do not fit the shape.

    Example:

    ```python
    >>> values = np.array([[1.0, 2.0, 0.5]], np.float16)
    >>> read_array({"features": values.tobytes(), "shape": [1, 3], "dtype": "float16", "error": ""})
    array([[1. , 2. , 0.5]], dtype=float16)
    ```"""
    if row.get("error"):
        raise ValueError(f"This image has no features: {row['error']}")
    shape = [int(side) for side in row["shape" if name == "features" else f"{name}_shape"]]
    if row["dtype"] == "bfloat16":  # the upper half of a float32
        upper = np.frombuffer(row[name], np.uint16).astype(np.uint32)
        return (upper << 16).view(np.float32).reshape(shape)
    return np.frombuffer(row[name], row["dtype"]).reshape(shape)


def as_arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    """
    A transform for `datasets`: columns of bytes become lists of arrays, the others stay. Images that failed have `None`. A
    column of bytes stays too if the batch has not the columns of its shape and `dtype`.

    Example:

    ```python
    >>> values = np.zeros((2, 3), np.float32)
    >>> row = {"features": [values.tobytes()], "shape": [[2, 3]], "dtype": ["float32"], "error": [""]}
    >>> as_arrays(row)["features"][0].shape
    (2, 3)
    ```"""
    shapes = {name: "shape" if name == "features" else f"{name}_shape" for name in batch}
    columns = (name for name in batch if name == "features" or name.startswith("layer_"))
    names = [name for name in columns if {shapes[name], "dtype"} <= batch.keys()]
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    # without the column `error`, an image that failed has no bytes
    arrays = {
        name: [None if row.get("error") or not row[name] else read_array(row, name) for row in rows] for name in names
    }
    return {**batch, **arrays}
