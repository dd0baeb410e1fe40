"""Label maps drawn over their images with a legend, and heat maps of one class."""

import colorsys
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from spar_hf.cli.fonts import font_for

GREY = (140, 140, 140)  # of the background in legends and label maps
SMALLEST_SHARE = 0.005  # of a class in a legend; less would be written as 0 %
# black, violet, red, orange, pale yellow: brightness grows evenly, so that the picture is also right in grey
HEAT = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)])


# Any two of these, and grey, differ by at least 20 CIE76 for people with normal sight, deuteranopia and protanopia
# (simulated with the matrices of Machado et al. 2009): tests/cli/test_overlays.py. `labels.js` of the web export has them
# too.
FIRST_COLOURS = (
    (242, 140, 0),
    (0, 64, 140),
    (242, 242, 0),
    (115, 191, 242),
    (115, 0, 0),
    (140, 115, 255),
    (38, 255, 242),
    (166, 217, 166),
    (191, 115, 89),
    (89, 0, 255),
    (140, 89, 0),
    (115, 0, 64),
)


def palette(classes: int, background: int = -1) -> np.ndarray:
    """
    Distinct RGB colours for classes: `(classes, 3)` uint8. The first 12 can be told apart with the common kinds of colour
    blindness; of the others, hues are spaced by the golden ratio and brightness alternates. The class `background` is grey.

    Example:

    ```python
    >>> palette(3, background=2).tolist()
    [[242, 140, 0], [0, 64, 140], [140, 140, 140]]
    ```"""
    more = [
        colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.85, 0.6)[i % 2], (1.0, 0.8, 0.95)[i % 3])
        for i in range(len(FIRST_COLOURS), classes)
    ]
    table = np.concatenate([np.reshape(FIRST_COLOURS, (-1, 3)), np.reshape(more, (-1, 3)) * 255])[:classes]
    table = table.round().astype(np.uint8)
    if background >= 0:
        table[background] = GREY
    return table


def overlay(
    image: Image.Image,
    label_map: np.ndarray,
    labels: Sequence[str],
    opacity: float = 0.55,
    legend: bool = True,
    background: int = -1,
    colours: np.ndarray | None = None,
    shown: Sequence[int] | None = None,
    outlines: bool = False,
    names: bool = False,
) -> Image.Image:
    """
    Draw a label map over its image, with thin white borders between classes and a legend below.

    Args:
        image: of any mode.
        label_map: class numbers `(height, width)`, in the size of the image.
        labels: name of every class; the legend lists those with at least 0.5 % of the pixels, largest first.
        opacity: of the colours, 0 to 1.
        legend: whether to add the legend.
        background: number of a class that is not painted, and stands last in the legend; -1 for none.
        colours: of the classes, `(classes, 3)` uint8; by default those of [`palette`].
        shown: numbers of the classes to paint; by default all.
        outlines: whether to draw outlines in the colours of the classes, in place of filling them.
        names: whether to write the names of the classes into their regions, where there is room.

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
    if colours is None:
        colours = palette(len(labels), background)
    painted = np.full(len(labels), shown is None)
    painted[[] if shown is None else list(shown)] = True
    if background >= 0:
        painted[background] = False
    # what is not painted is one region; the background is one already
    regions = label_map if shown is None else np.where(painted[label_map], label_map, -1)
    rgb = image.convert("RGB")
    edge = np.zeros(label_map.shape, bool)
    edge[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    edge[1:] |= regions[1:] != regions[:-1]
    if outlines:
        mixed = np.array(rgb)
        width = 2 * max(1, max(rgb.size) // 400) + 1
        edge = np.asarray(Image.fromarray(edge).convert("L").filter(ImageFilter.MaxFilter(width))) > 0
        edge &= painted[label_map]
        mixed[edge] = colours[label_map[edge]]
    else:
        # blended by Pillow in 8 bits: in floats an image of 50 megapixels takes gigabytes
        mixed = np.array(Image.blend(rgb, Image.fromarray(colours[label_map]), opacity))
        if not painted.all():
            np.copyto(mixed, np.asarray(rgb), where=~painted[label_map][:, :, None])
        mixed[edge] = 255
    picture = Image.fromarray(mixed)
    if names:
        _write_names(picture, label_map, labels, np.flatnonzero(painted).tolist())
    if not legend:
        return picture
    areas = np.bincount(label_map.ravel(), minlength=len(labels)) / label_map.size
    order = sorted(np.flatnonzero(areas >= SMALLEST_SHARE).tolist(), key=lambda i: (i == background, -areas[i]))
    return _with_legend(picture, [(f"{labels[i]} {areas[i]:.0%}", colours[i]) for i in order])


def _write_names(picture: Image.Image, label_map: np.ndarray, labels: Sequence[str], classes: Sequence[int]) -> None:
    """Write the name of each class where it has most room, in white with a black rim; no name covers another one."""
    size = max(12, picture.width // 32)  # legible on a phone
    draw, taken = ImageDraw.Draw(picture), list[tuple[float, ...]]()
    for index, x, y in name_places(label_map, classes):
        font = font_for(labels[index], size)
        half = min(font.getlength(labels[index]), picture.width) / 2 + size / 4
        x = min(max(x, half), picture.width - half)
        box = (x - half, y - size * 0.75, x + half, y + size * 0.75)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        rim = max(1, size // 8)
        draw.text((x, y), labels[index], fill="white", font=font, anchor="mm", stroke_width=rim, stroke_fill="black")


def name_places(label_map: np.ndarray, classes: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """
    Where names of classes can stand: number of the class, x and y in pixels, those with most pixels first. It is the point
    inside that is farthest from what is not the class, found on a grid of at most 160 points a side. Classes without room
    are left out.

    Example:

    ```python
    >>> label_map = np.zeros((40, 60), int)
    >>> label_map[:, 40:] = 1
    >>> list(name_places(label_map, [0, 1]))
    [(0, 19.0, 19.0), (1, 49.0, 19.0)]
    ```"""
    step = -(-max(label_map.shape) // 160)
    small = label_map[step // 2 :: step, step // 2 :: step]
    for index in sorted(classes, key=lambda index: -np.count_nonzero(small == index)):
        inside = np.pad(small == index, 1)
        rounds = 0
        while True:
            core = inside[1:-1, 1:-1] & inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
            if not core.any():
                break
            inside, rounds = np.pad(core, 1), rounds + 1
        if rounds:
            points = np.argwhere(inside[1:-1, 1:-1])
            # several points may be as far from the edge: the one nearest to their middle
            y, x = points[((points - points.mean(0)) ** 2).sum(1).argmin()] * step + step // 2
            yield index, float(x), float(y)


def heat_picture(image: Image.Image, heat: np.ndarray, title: str) -> Image.Image:
    """
    Draw the probability of a class over its image, with a scale below.

    Args:
        image: of any mode; shown in grey.
        heat: probability `(height, width)` as levels from 0 to 255, in the size of the image.
        title: of the scale.
    """
    steps = np.linspace(0, 255, len(HEAT))
    table = np.stack([np.interp(np.arange(256), steps, HEAT[:, channel]) for channel in range(3)], axis=1).astype(
        np.uint8
    )
    picture = Image.blend(image.convert("L").convert("RGB"), Image.fromarray(table[heat]), 0.7)
    entries = [(title, None)] + [(f"{share:.0%}", table[round(share * 255)]) for share in (0, 0.25, 0.5, 0.75, 1)]
    return _with_legend(picture, entries)


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, np.ndarray | None]]) -> Image.Image:
    """Add a legend below the picture."""
    return put_below(picture, legend_strip(picture.width, entries)) if entries else picture


def put_below(picture: Image.Image, strip: Image.Image) -> Image.Image:
    """A picture with a strip of its width below."""
    sheet = Image.new("RGB", (picture.width, picture.height + strip.height))
    sheet.paste(picture)
    sheet.paste(strip, (0, picture.height))
    return sheet


def legend_strip(width: int, entries: Sequence[tuple[str, np.ndarray | None]]) -> Image.Image:
    """A legend of a width in pixels: a colour, if any, and a text for each entry, in as many rows as needed."""
    size = max(11, width // 45)
    pad = size // 2
    boxes, x, y = [], pad, pad
    for text, colour in entries:
        font = font_for(text, size)
        indent = 0 if colour is None else size + pad // 2
        room = int(font.getlength(text)) + indent + size + pad // 2
        if x > pad and x + room > width:
            x, y = pad, y + size + pad
        boxes.append((x, y, indent, text, font, colour))
        x += room
    strip = Image.new("RGB", (width, y + size + 2 * pad), "white")
    draw = ImageDraw.Draw(strip)
    for x, y, indent, text, font, colour in boxes:
        if colour is not None:
            draw.rectangle((x, y, x + size, y + size), fill=tuple(int(c) for c in colour))
        # letters of all fonts stand in the middle of the row
        draw.text((x + indent, y + size // 2), text, fill="black", font=font, anchor="lm")
    return strip
