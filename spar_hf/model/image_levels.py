"""Pixels of more than 8 bits and their ranges, as levels of 8 bits. Imports neither torch nor transformers."""

import numpy as np

AMBIGUOUS_LEVELS = 2**14  # 16-bit pixels that are all lower may be 8, 10, 12 or 14 bits, or reflectances up to 10,000


def scale_range(values: np.ndarray, image_range: tuple[float, float]) -> np.ndarray:
    """
    Scale pixel values to 0–1 as a stated range says; values outside it become 0 or 1.

    Raises:
        ValueError: NaN or infinite values, or most pixels are outside the range, which is then a wrong one.
    """
    check_finite_pixels(values)
    low, high = image_range
    if ((values < low) | (values > high)).mean() > 0.5:
        raise ValueError(
            f"Most pixels lie outside `image_range` ({low:g} to {high:g}): they reach from {values.min():.4g} to "
            f"{values.max():.4g}. State the range of the data."
        )
    return ((values.astype(np.float64) - low) / (high - low)).clip(0, 1).astype(np.float32)


def check_finite_pixels(values: np.ndarray) -> None:
    """Raises ValueError if a pixel is NaN or infinite."""
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise ValueError("The image has NaN or infinite pixels. Replace them first, e.g. with `numpy.nan_to_num`.")


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """
    Map 16-bit levels to the nearest 8-bit levels: 65535 -> 255.

    Raises:
        ValueError: the values are not 16-bit levels, or all below 16384 (but not all 0), so that they may have fewer bits.
    """
    check_sixteen_bits(int(values.min(initial=0)), int(values.max(initial=0)))
    return round_to_eight_bits(values)


def round_to_eight_bits(values: np.ndarray) -> np.ndarray:
    """[`to_eight_bits`] of values that were checked."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def check_sixteen_bits(low: int, high: int) -> None:
    """Raises ValueError if values from `low` to `high` are no levels of 16 bits, or may have fewer bits."""
    if low < 0 or high > 65535 or 0 < high < AMBIGUOUS_LEVELS:
        raise ValueError(
            f"Pixels of more than 8 bits are read as 16-bit levels (0 to 65535), but these reach from {low} to {high}: "
            f"values that are all below {AMBIGUOUS_LEVELS} may be 8, 10, 12 or 14 bits. State their range: "
            "`image_range=(LOW, HIGH)`, `--image-range LOW HIGH` on the command line, for example 0 65535 for a dark image "
            "of 16 bits and 0 4095 for 12 bits; or pass a uint8 or uint16 array that uses its whole range."
        )
