"""Label maps drawn over their images, with a legend."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def palette(classes: int) -> np.ndarray:
    """
    Distinct RGB colours for classes: `(classes, 3)` uint8. Hues are spaced by the golden ratio, brightness alternates.

    Example:

    ```python
    >>> palette(2).tolist()
    [[255, 38, 38], [82, 117, 204]]
    ```"""
    colours = [
        colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.85, 0.6)[i % 2], (1.0, 0.8, 0.95)[i % 3]) for i in range(classes)
    ]
    return (np.array(colours).reshape(-1, 3) * 255).round().astype(np.uint8)


def overlay(
    image: Image.Image, label_map: np.ndarray, labels: Sequence[str], opacity: float = 0.55, legend: bool = True
) -> Image.Image:
    """
    Draw a label map over its image, with thin white borders between classes and a legend below.

    Args:
        image: of any mode.
        label_map: class numbers `(height, width)`, in the size of the image.
        labels: name of every class; the legend lists those that have pixels, largest first.
        opacity: of the colours, 0 to 1.
        legend: whether to add the legend.

    Raises:
        ValueError: label map and image differ in size.

    Example:

    ```python
    >>> overlay(Image.new("RGB", (60, 40)), np.zeros((40, 60), int), ["sky"], legend=False).size
    (60, 40)
    ```"""
    if label_map.shape != (image.height, image.width):
        raise ValueError(
            f"The label map is {label_map.shape[1]}×{label_map.shape[0]} but the image {image.width}×{image.height}."
        )
    colours = palette(len(labels))
    # blended by Pillow in 8 bits: in floats an image of 50 megapixels takes gigabytes
    mixed = np.array(Image.blend(image.convert("RGB"), Image.fromarray(colours[label_map]), opacity))
    border = np.zeros(label_map.shape, bool)
    border[:, 1:] |= label_map[:, 1:] != label_map[:, :-1]
    border[1:] |= label_map[1:] != label_map[:-1]
    mixed[border] = 255
    picture = Image.fromarray(mixed)
    if not legend:
        return picture
    areas = np.bincount(label_map.ravel(), minlength=len(labels)) / label_map.size
    entries = [(labels[i], colours[i], areas[i]) for i in np.argsort(-areas, kind="stable") if areas[i] > 0]
    return _with_legend(picture, entries)


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, np.ndarray, float]]) -> Image.Image:
    """Add a legend below the picture: colour, name and share of the image, in as many rows as needed."""
    size = max(11, picture.width // 45)
    font = ImageFont.load_default(size)
    pad = size // 2
    boxes, x, y = [], pad, pad
    for name, colour, area in entries:
        text = f"{name} {area:.0%}"
        width = int(font.getlength(text)) + 2 * size + pad
        if x > pad and x + width > picture.width:
            x, y = pad, y + size + pad
        boxes.append((x, y, text, tuple(int(c) for c in colour)))
        x += width
    sheet = Image.new("RGB", (picture.width, picture.height + y + size + 2 * pad), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for x, y, text, fill in boxes:
        top = picture.height + y
        draw.rectangle((x, top, x + size, top + size), fill=fill)
        draw.text((x + size + pad // 2, top - size // 8), text, fill="black", font=font)
    return sheet
