"""What the page shows of a result and lets visitors take away: pictures, legend, files; and the colours of their words."""

import html
import io
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.cli.overlays import heat_picture, overlay, palette
from spar_hf.cli.result_files import (
    coco_dataset,
    found_classes,
    label_image,
    presence_by_label,
    segment_list,
    write_image,
)
from spar_hf.cli.web_inputs import read_upload, upload_folder
from spar_hf.utils.errors import UsageError
from spar_hf.utils.image_files import InputImage
from spar_hf.utils.texts import json_text

DISPLAY_EDGE = 1280  # longer side in pixels of the pictures on the page; masks are computed at the size of the image
MAX_COLOURED = 2000  # words of a visitor that keep their colours
FILES = ("labels", "overlay", "json", "coco", "mask")
STYLE = """
.spar-legend { width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.spar-legend tr { border: 0 !important; }
.spar-legend td, .spar-legend th {
  padding: .3rem .6rem; border: 0; border-bottom: 1px solid var(--border-color-primary); text-align: right; }
.spar-legend td:first-child, .spar-legend th:first-child { text-align: left; white-space: nowrap; }
.spar-legend .swatch {
  display: inline-block; width: .9em; height: .9em; margin-right: .5em; border-radius: 3px; vertical-align: -.08em; }
.spar-legend .bar { display: inline-block; width: 5em; height: .5em; margin-left: .5em; border-radius: 3px;
  overflow: hidden; background: var(--border-color-primary); text-align: left; }
.spar-legend .bar span { display: block; height: 100%; background: var(--color-accent); }
.spar-note { opacity: .7; font-size: .9em; }
details.spar-note summary { cursor: pointer; }
.spar-error { padding: .7rem 1rem; border-left: 4px solid #c2410c; border-radius: 4px; background: #c2410c1a; }
#spar-file { display: none; }
/* high enough that the results can be scrolled to before they are there */
@media (max-width: 767px) { #spar-results { min-height: 100vh; } .spar-legend .bar { display: none; } }
"""


@dataclass
class Shown:
    """
    A result as a visitor's session keeps it, small enough for many visitors.

    Attributes:
        method: `"one pass"` or `"sliding window"`.
        upload: path of the uploaded image, which is read again for files.
        image: in the size that the page shows.
        label_map: class numbers in that size.
        png: label map in the size of the image, as a PNG file.
        result: the pipeline's result without its label map.
        colours: of the classes.
    """

    method: str
    upload: str
    image: Image.Image
    label_map: np.ndarray
    png: bytes
    result: dict[str, Any]
    colours: np.ndarray

    @classmethod
    def make(cls, method: str, upload: str, image: Image.Image, result: dict[str, Any], colours: np.ndarray) -> "Shown":
        """Keep what the page needs of the pipeline's `output="map"`."""
        labels = label_image(result["map"], len(result["labels"]), result["background"])
        if labels.mode == "P":
            labels.putpalette(colours.tobytes())
        buffer = io.BytesIO()
        labels.save(buffer, "PNG", **({"bits": 8} if labels.mode == "P" else {}))
        small, label_map = for_display(image, result["map"])
        rest = {name: value for name, value in result.items() if name != "map"}
        return cls(method, upload, small, label_map, buffer.getvalue(), rest, colours)

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return self.result["labels"]

    def found(self) -> list[str]:
        """Names of the classes that have pixels, those with most first, without the background."""
        result = {**self.result, "map": self.label_map}
        counts = np.bincount(self.label_map.ravel(), minlength=len(self.labels))
        return [self.labels[i] for i in sorted(found_classes(result), key=lambda i: -counts[i])]

    def number(self, label: str | None) -> int:
        """
        Number of a class.

        Raises:
            UsageError: no such class.
        """
        if label not in self.labels:
            raise UsageError("Choose one of the classes first.")
        return self.labels.index(label)

    def has_probability(self, label: str) -> bool:
        """Whether a class has a probability at every pixel: a background without words has none."""
        return label in self.labels[: len(self.result["heat"])]

    def heat_of(self, label: str | None) -> np.ndarray:
        """Probability of a class, 0 to 255, in the size of the picture."""
        levels = Image.fromarray(self.result["heat"][self.number(label)])
        return np.asarray(levels.resize(self.image.size, Image.Resampling.BILINEAR))


@dataclass
class View:
    """
    How the masks are drawn.

    Attributes:
        classes: names of the classes to paint; `None` for all.
        opacity: of the colours, 0 to 1.
        outlines: outlines in place of filled masks.
        names: whether names stand in the regions.
        heat: the class whose heat map is drawn in place of masks.
    """

    classes: Sequence[str] | None = None
    opacity: float = 0.55
    outlines: bool = False
    names: bool = True
    heat: str | None = None


def for_display(image: Image.Image, label_map: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Image and label map, reduced to the size that the page shows."""
    scale = DISPLAY_EDGE / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        label_map = np.asarray(Image.fromarray(label_map.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    return image, label_map


def picture(shown: Shown, view: View) -> Image.Image:
    """The masks over the image, or the heat map of a class that has one, in the size that the page shows."""
    if view.heat is not None and (view.heat not in shown.labels or shown.has_probability(view.heat)):
        return heat_picture(shown.image, shown.heat_of(view.heat), f"{view.heat}: probability")
    return _overlay(shown, view, shown.image, shown.label_map)


def _overlay(shown: Shown, view: View, image: Image.Image, label_map: np.ndarray) -> Image.Image:
    chosen = None if view.classes is None else [i for i, label in enumerate(shown.labels) if label in view.classes]
    return overlay(
        image,
        label_map,
        shown.labels,
        opacity=view.opacity,
        legend=False,
        background=shown.result["background"],
        colours=shown.colours,
        shown=chosen,
        outlines=view.outlines,
        names=view.names,
    )


def colours_of(result: dict[str, Any], known: dict[str, int]) -> tuple[np.ndarray, dict[str, int]]:
    """
    Colours of the classes of a result. A word keeps its colour as long as a visitor stays, whatever stands beside it; new
    words that are found take the next colours, those with most pixels first.

    Args:
        result: the pipeline's `output="map"`.
        known: number of the colour of each word so far.

    Returns:
        Colours `(classes, 3)` uint8, black for words without pixels that have none yet, and the numbers of all words so far.

    Example:

    ```python
    >>> result = {"map": np.array([[1, 1, 0]]), "labels": ["road", "sky", "dog"], "background": -1}
    >>> colours, known = colours_of(result, {})
    >>> known
    {'sky': 0, 'road': 1}
    >>> alone, _ = colours_of({"map": np.array([[0]]), "labels": ["road"], "background": -1}, known)
    >>> (alone[0] == colours[0]).all()
    np.True_
    ```"""
    labels, background = result["labels"], result["background"]
    counts = np.bincount(result["map"].ravel(), minlength=len(labels))
    known = dict(known) if len(known) + len(labels) <= MAX_COLOURED else {}
    for i in sorted(found_classes(result), key=lambda i: -counts[i]):
        known.setdefault(labels[i].casefold(), len(known))
    table = palette(len(known))
    colours = np.zeros((len(labels), 3), np.uint8)
    for i, label in enumerate(labels):
        if label.casefold() in known:
            colours[i] = table[known[label.casefold()]]
    if background >= 0:
        colours[background] = palette(1, background=0)[0]
    return colours, known


def legend(results: Sequence[tuple[str, dict[str, Any]]], colours: np.ndarray | None = None) -> str:
    """
    An HTML table with a row per class that was found, the background last: colour and, for every method, share of the image,
    mean probability and presence, if computed. Classes that no method found are folded away below.

    Args:
        results: name of each method and its result from [`segment_timed`].
        colours: of the classes; by default those of [`palette`].
    """
    first = max((result for _, result in results), key=lambda result: len(result["labels"]))
    labels, background = first["labels"], first["background"]
    if colours is None:
        colours = palette(len(labels), background)
    presences = [presence_by_label(result) if "presence" in result else None for _, result in results]
    head = "".join(
        f"<th>{html.escape(method)}: share</th><th>probability</th>" + ("" if presence is None else "<th>presence</th>")
        for (method, _), presence in zip(results, presences, strict=True)
    )
    shares = [np.bincount(result["map"].ravel(), minlength=len(labels)) / result["map"].size for _, result in results]
    rows, absent = [], []
    for i in sorted(range(len(labels)), key=lambda i: (i == background, -shares[0][i])):
        if not any(share[i] for share in shares):
            seen = "" if not presences[0] else f" (presence {presences[0].get(labels[i], 0):.2f})"
            absent += [] if i == background else [html.escape(labels[i]) + seen]
            continue
        cells = ""
        for (_, result), share, presence in zip(results, shares, presences, strict=True):
            score = result["scores"][i] if share[i] else 0
            bar = f'<span class="bar"><span style="width: {score:.0%}"></span></span>'
            cells += f"<td>{share[i]:.1%}</td><td>{score:.2f}{bar}</td>" if share[i] else "<td>–</td><td>–</td>"
            if presence is not None:
                cells += f"<td>{presence[labels[i]]:.2f}</td>" if labels[i] in presence else "<td>–</td>"
        swatch = f'<span class="swatch" style="background: rgb{tuple(int(c) for c in colours[i])}"></span>'
        rows.append(f"<tr><td>{swatch}{html.escape(labels[i])}</td>{cells}</tr>")
    count = f"{len(absent)} class{'es' if len(absent) > 1 else ''} not found"
    folded = f'<details class="spar-note"><summary>{count}</summary>{", ".join(absent)}</details>' if absent else ""
    return (
        f'<table class="spar-legend"><thead><tr><th>class</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'{folded}<p class="spar-note">Share of the image’s pixels; probability averaged over the pixels of the class.</p>'
    )


def there(shown: Shown, x: int, y: int) -> str:
    """The class at a point of the picture, and its probability."""
    y, x = min(max(y, 0), shown.image.height - 1), min(max(x, 0), shown.image.width - 1)
    label = shown.labels[shown.label_map[y, x]]
    if not shown.has_probability(label):
        return label
    return f"{label}, probability {shown.heat_of(label)[y, x] / 255:.2f}"


def write_file(shown: Shown, kind: str, view: View, chosen: str | None = None) -> Path:
    """
    Write a result to a file in the size of the image, for a download.

    Args:
        shown: the result.
        kind: one of `FILES`; `mask` is the mask of one class, 0 or 255.
        view: how the overlay is drawn.
        chosen: the class of the mask.

    Raises:
        UsageError: no class is chosen, or the upload is no longer there.
        ImportError: `coco` without pycocotools.
    """
    stem = _file_name(Path(shown.upload).stem) or "image"
    folder = Path(tempfile.mkdtemp(dir=upload_folder()))
    if kind == "labels":
        path = folder / f"{stem}_labels.png"
        path.write_bytes(shown.png)
        return path
    label_map = np.array(Image.open(io.BytesIO(shown.png))).astype(np.int32)
    if kind == "overlay":
        path = folder / f"{stem}_overlay.png"
        write_image(_overlay(shown, view, read_upload(shown.upload, shown.result.get("image_range")), label_map), path)
    elif kind == "mask":
        index = shown.number(chosen)
        path = folder / f"{stem}_{_file_name(shown.labels[index])}.png"
        write_image(Image.fromarray((label_map == index).astype(np.uint8) * 255), path)
    else:
        content, indent = (coco_dataset, None) if kind == "coco" else (segment_list, 1)
        name = Path(shown.upload).name  # no folder of this computer
        path = folder / f"{stem}{'_coco' if kind == 'coco' else ''}.json"
        path.write_text(json_text(content({**shown.result, "map": label_map}, InputImage(name, stem)), indent), "utf-8")
    return path


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)[:60]
