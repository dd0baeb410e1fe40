"""
Draws the figures of the site as SVG files: `python docs/figures.py FOLDER`. They follow from the numbers below and need no
package; a test compares the files in `docs/assets/` with what this writes.
"""

import sys
from pathlib import Path

STYLE = (
    "<style>text{font:15px sans-serif;fill:#555}.b{fill:#e8eaf6;stroke:#3f51b5}.t{fill:#fff3e0;stroke:#ef6c00}"
    ".o{fill:#e8f5e9;stroke:#2e7d32}.l{stroke:#888;stroke-width:1.5;fill:none}.k text,.k{fill:#222}"
    ".p{fill:none;stroke:#9fa8da}.z{fill:#eee;stroke:#bbb}.h{fill:#ffe0b2;stroke:#ef6c00;fill-opacity:.55}</style>"
    '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L10 5L0 10z" fill="#888"/></marker></defs>'
)


def svg(width: int, height: int, parts: list[str], title: str) -> str:
    """A drawing of some parts, in order."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"><title>{title}</title>'
    return "\n".join(
        [head, STYLE, f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>', *parts, "</svg>", ""]
    )


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A box of a class of the style."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>'


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, *lines: str) -> list[str]:
    """A box with centred lines of text."""
    first = y + height / 2 + 5 - 10 * (len(lines) - 1)
    return [
        rect(x, y, width, height, kind),
        *(text(x + width / 2, first + 20 * i, line) for i, line in enumerate(lines)),
    ]


def arrow(*points: tuple[float, float]) -> str:
    """A line through points, with a head at its end."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" class="l" marker-end="url(#a)"/>'


def architecture() -> str:
    """Use and training of a model: image, tower, features, words, masks; teacher and loss."""
    parts = [
        *box(20, 30, 130, 60, "z", "image", "any H × W"),
        *box(190, 30, 170, 60, "b", "vision tower", "one pass"),
        *box(400, 30, 190, 60, "o", "feature_map", "B × D × H/p × W/p"),
        *box(630, 30, 150, 60, "b", "cosine × scale", "max over names"),
        *box(820, 30, 150, 60, "o", "masks", "H × W"),
        *box(190, 240, 170, 60, "b", "text tower", "templates, mean"),
        *box(20, 240, 130, 60, "z", "words", "road; car, auto"),
        *box(400, 240, 190, 60, "o", "text embeddings", "N × D"),
        *box(190, 135, 170, 60, "t", "teacher: windows", "frozen, averaged"),
        *box(400, 135, 190, 60, "t", "mean squared error", "training only"),
        arrow((150, 60), (188, 60)),
        arrow((360, 60), (398, 60)),
        arrow((590, 60), (628, 60)),
        arrow((780, 60), (818, 60)),
        arrow((150, 270), (188, 270)),
        arrow((360, 270), (398, 270)),
        arrow((590, 270), (705, 270), (705, 92)),
        arrow((85, 90), (85, 165), (188, 165)),
        arrow((360, 165), (398, 165)),
        arrow((495, 90), (495, 133)),
    ]
    return svg(990, 330, parts, "From an image and words to masks, and what trains the vision tower")


def geometry(height: int = 50, width: int = 90, patch: int = 16, window: int = 48, stride: int = 24) -> str:
    """Patches, padding, windows and cells of a small image, six times enlarged, with the numbers of `spar_hf.windows`."""
    zoom, left, top = 6, 30, 60
    padded = [-(-side // patch) * patch for side in (height, width)]
    parts = [
        text(
            left,
            30,
            f"image {height} × {width} px, patch {patch} px: {padded[0] // patch} × {padded[1] // patch} patches",
            "start",
        )
    ]
    parts.append(rect(left, top, padded[1] * zoom, padded[0] * zoom, "z"))
    parts.append(rect(left, top, width * zoom, height * zoom, "o"))
    for y in range(0, padded[0], patch):
        parts += [
            rect(left + x * zoom, top + y * zoom, patch * zoom, patch * zoom, "p") for x in range(0, padded[1], patch)
        ]
    below = top + padded[0] * zoom
    parts.append(
        text(
            left,
            below + 25,
            "grey: zeros added at the right and at the bottom, cut off again after upsampling",
            "start",
        )
    )
    starts = [*range(0, padded[1] - window, stride), padded[1] - window]
    for i, start in enumerate(starts):
        y = below + 50 + 34 * i
        parts.append(rect(left + start * zoom, y, window * zoom, 26, "h"))
        parts.append(text(left + (start + window / 2) * zoom, y + 18, f"window at {start} px"))
    y = below + 75 + 34 * len(starts)
    parts.append(
        text(
            left,
            y,
            f"windows of {window} px, stride {stride} px, the last one flush; cells of {patch // 2} px",
            "start",
        )
    )
    for x in range(0, padded[1], patch // 2):
        covered = sum(start <= x < start + window for start in starts)
        parts.append(rect(left + x * zoom, y + 15, patch // 2 * zoom, 34, "b"))
        parts.append(text(left + (x + patch // 4) * zoom, y + 37, str(covered)))
    parts.append(text(left, y + 75, "number of windows over each cell: the divisor of the average", "start"))
    return svg(2 * left + padded[1] * zoom, int(y + 95), parts, "Patches, padding, windows and cells")


FIGURES = {"architecture.svg": architecture, "geometry.svg": geometry}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        Path(sys.argv[1], name).write_text(draw(), encoding="utf-8")
