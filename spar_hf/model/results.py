"""
The form of results: segments of a label map, errors of failed images, and limits on what one result may take. The runtime
without torch returns the same, so this file imports none.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

OUTPUT_BYTES = 2**30  # larger dense outputs are refused
MAX_CLASSES = 2**16  # of a label map of 16 bits


def guarded(skip: bool, work: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call `work`; with `skip`, return `{"error": message}` instead of raising."""
    try:
        return work(*args, **kwargs)
    except Exception as error:
        if not skip:
            raise
        return {"error": f"{type(error).__name__}: {error}"}


def is_error(item: Any) -> bool:
    """Whether an item is an error returned by `guarded`."""
    return isinstance(item, dict) and "error" in item


def check_finite_features(features: Any) -> None:
    """
    Raises:
        ValueError: features, or logits of them, have NaN or infinite values; masks of them would look like masks. They are
            a tensor, or an array where there is no torch.
    """
    finite = np.isfinite(features) if isinstance(features, np.ndarray) else features.isfinite()
    if not bool(finite.all()):
        raise ValueError(
            "The features of the image are not finite: half precision overflowed, or the weights are damaged. Load the "
            'model with dtype="float32" or "bfloat16".'
        )


def check_class_count(classes: int) -> None:
    """
    Raises:
        ValueError: more classes than a label map of 16 bits has numbers.

    Example:

    ```python
    >>> check_class_count(65537)
    Traceback (most recent call last):
    ValueError: A label map is limited to 65536 classes, not 65537.
    ```"""
    if classes > MAX_CLASSES:
        raise ValueError(f"A label map is limited to {MAX_CLASSES} classes, not {classes}.")


def check_output_size(size: int, output: str) -> None:
    """
    Raises:
        ValueError: `size`, in bytes, is too large for one result.
    """
    if size > OUTPUT_BYTES:
        raise ValueError(
            f"output={output!r} of this image takes {size / 2**30:.1f} GiB, more than {OUTPUT_BYTES / 2**30:.0f} GiB. Take "
            'output="map" (8 bytes per pixel), fewer classes, or a smaller image.'
        )


def check_dense_size(what: str, size: int, image_size: tuple[int, int], instead: str) -> None:
    """
    Raises:
        ValueError: `what` has `size` bytes at the height and width of an image, too many for one result. The message names
            what to take `instead`.
    """
    if size > OUTPUT_BYTES:
        raise ValueError(
            f"{what} at {image_size[0]}×{image_size[1]} pixels take {size / 2**30:.1f} GiB, more than "
            f"{OUTPUT_BYTES / 2**30:.0f} GiB. Take {instead}."
        )


def check_shares(**shares: float) -> None:
    """
    Raises:
        ValueError: one of them is not in 0 to 1.
    """
    for name, value in shares.items():
        if isinstance(value, str) or not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be a share from 0 to 1, got {value}.")


def as_segments(
    outputs: dict[str, Any], pixels: np.ndarray, hidden: bool, top_k: int | None = None
) -> list[dict[str, Any]]:
    """
    A mask for every class that has pixels.

    Args:
        outputs: the pipeline's `output="map"`.
        pixels: per class `(classes,)`.
        hidden: whether to leave out the background.
        top_k: only so many segments of highest score, best first.

    Raises:
        ValueError: the masks would take more than 1 GiB.
    """
    label_map, scores = outputs["map"], outputs["scores"]
    found = [label for label in pixels.nonzero()[0].tolist() if not hidden or label != outputs["background"]]
    if top_k is not None:
        found = sorted(found, key=lambda label: -scores[label])[:top_k]
    check_output_size(len(found) * label_map.size, "segments")
    return [
        {
            "label": outputs["labels"][label],
            "score": scores[label],
            **({"presence": outputs["presence"][label]} if "presence" in outputs else {}),
            "mask": Image.fromarray((label_map == label).astype(np.uint8) * 255),
        }
        for label in found
    ]
