"""
Published mIoU of open-vocabulary segmentation, and a table of ours beside it.

`ROWS` is the only place for these figures; a test compares the table of `docs/benchmarks.md` with it. It holds what the
facts about SPAR and the repositories of the other methods state. What they do not state is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# the eight benchmarks that most work reports, and how tables call them
SETS = {
    "voc21": "VOC21",
    "context60": "Ctx60",
    "coco-object": "Object",
    "voc20": "VOC20",
    "context59": "Ctx59",
    "coco-stuff": "Stuff",
    "cityscapes": "City",
    "ade20k": "ADE",
}

PART = ("limit", "holdout_every", "holdout_rest", "include", "exclude")  # options that leave out images
# options that change a score, beside the mixed precision, the model and how it is run, which the table names
CHANGES = (
    *("vocabulary", "class_names", "templates", "ignore_classes", "only_classes", "image_range"),
    *("native", "size", "shortest_edge", "longest_edge", "resample", "window_size"),
    *("dense_logit_scale", "threshold", "exclude_area"),
)


@dataclass(frozen=True)
class Published:
    """
    A published row.

    Attributes:
        method: its name.
        backbone: the encoder or encoders.
        inference: `"single pass"`, `"sliding window"` or a pipeline of several models; empty if unknown.
        masks: the extra mask generator; empty if there is none.
        source: where the figures stand.
        scores: mIoU in percent by benchmark.
        sides: shorter side of the images in pixels by benchmark; `""` for all others; unknown if it is missing.
    """

    method: str
    backbone: str
    inference: str
    masks: str
    source: str
    scores: Mapping[str, float]
    sides: Mapping[str, int] = field(default_factory=dict)

    def side(self, benchmark: str) -> int | None:
        """Shorter side of the images in pixels, if it is known."""
        return self.sides.get(benchmark, self.sides.get(""))


SPAR = "SPAR, arXiv 2604.02252, main results"
SPAR_SIDES = {"": 672, "cityscapes": 1024}
CORRCLIP = "CorrCLIP, arXiv 2411.10086, README of its code"
QUOTED = "CorrCLIP, arXiv 2411.10086, main results, as public notes on it quote them"
LISTED = "as public benchmark listings of the paper have it"
PROXY = f"ProxyCLIP, arXiv 2408.04883, {LISTED}"
TRIDENT = f"Trident, arXiv 2411.09219, {LISTED}"
STITCHER = "OV-Stitcher, arXiv 2604.08110, README of its code"


def spar(method: str, backbone: str, inference: str, *scores: float) -> Published:
    """A row of SPAR's paper: VOC21, VOC20, Cityscapes, ADE20K, Context60, Context59."""
    sets = ("voc21", "voc20", "cityscapes", "ade20k", "context60", "context59")
    return Published(method, backbone, inference, "", SPAR, dict(zip(sets, scores, strict=True)), SPAR_SIDES)


def eight(
    method: str,
    backbone: str,
    inference: str,
    masks: str,
    source: str,
    *scores: float,
    sides: Mapping[str, int] | None = None,
) -> Published:
    """A row of all of `SETS`, in their order."""
    return Published(method, backbone, inference, masks, source, dict(zip(SETS, scores, strict=True)), sides or {})


def some(
    method: str, inference: str, masks: str, scores: Mapping[str, float], sides: Mapping[str, int] | None = None
) -> Published:
    """A row of CLIP ViT-B/16 that CorrCLIP's paper quotes, of which only a part is known."""
    return Published(method, "CLIP ViT-B/16", inference, masks, QUOTED, scores, sides or {})


SINGLE, SLIDING = "single pass", "sliding window"
ROWS = (
    spar("SigLIP2 NaFlex", "SigLIP2 ViT-B/16", SINGLE, 35.8, 66.6, 22.8, 16.2, 23.7, 25.2),
    spar("SigLIP2", "SigLIP2 ViT-B/16", SLIDING, 45.0, 77.5, 38.4, 21.8, 30.7, 34.0),
    spar("SigLIP2", "SigLIP2 ViT-B/16", SINGLE, 36.1, 71.3, 23.5, 16.8, 24.5, 26.1),
    spar("SPAR", "SigLIP2 ViT-B/16", SINGLE, 47.3, 81.5, 38.4, 23.4, 33.8, 37.2),
    spar("SigLIP2 + LPOSS", "SigLIP2 ViT-B/16", SINGLE, 46.1, 89.6, 34.5, 19.9, 30.9, 35.2),
    spar("SPAR + LPOSS", "SigLIP2 ViT-B/16", SINGLE, 51.2, 89.7, 39.2, 25.8, 34.5, 39.8),
    spar("SigLIP2 + AnyUp", "SigLIP2 ViT-B/16", SINGLE, 42.4, 82.3, 33.2, 23.1, 30.1, 34.5),
    spar("SPAR + AnyUp", "SigLIP2 ViT-B/16", SINGLE, 51.0, 86.2, 38.6, 26.1, 37.1, 41.5),
    spar("OpenCLIP (MaskCLIP)", "OpenCLIP ViT-B/16", SLIDING, 48.5, 55.1, 30.8, 15.4, 25.2, 26.6),
    spar("OpenCLIP (MaskCLIP)", "OpenCLIP ViT-B/16", SINGLE, 43.1, 52.3, 17.7, 11.5, 20.3, 21.4),
    spar("SPAR", "OpenCLIP ViT-B/16", SINGLE, 48.5, 57.6, 25.7, 16.2, 28.2, 30.3),
    spar("SPAR + AnyUp", "OpenCLIP ViT-B/16", SINGLE, 50.3, 59.2, 26.1, 17.0, 29.2, 32.0),
    spar("DINOv3.txt", "DINOv3 ViT-L/16", SLIDING, 42.6, 90.8, 39.7, 24.9, 31.8, 34.4),
    spar("DINOv3.txt", "DINOv3 ViT-L/16", SINGLE, 46.0, 89.5, 35.9, 24.4, 32.1, 34.8),
    spar("SPAR", "DINOv3 ViT-L/16", SINGLE, 43.1, 91.3, 40.1, 25.4, 31.6, 35.0),
    spar("SPAR + AnyUp", "DINOv3 ViT-L/16", SINGLE, 42.8, 91.5, 36.1, 25.6, 31.7, 35.0),
    eight(
        *("MaskCLIP", "CLIP ViT-B/16", "", "", "quoted in FreeCP (ICCV 2025), README of its code"),
        *(43.4, 23.2, 20.6, 74.9, 26.4, 16.7, 24.9, 11.9),
    ),
    eight(
        *("ResCLIP", "CLIP ViT-B/16", "sliding window, VOC21 in one pass", "", "quoted in CCAR, README of its code"),
        *(61.1, 33.5, 35.0, 86.0, 36.8, 24.7, 35.9, 18.0),
        sides={"voc21": 336, "cityscapes": 560},
    ),
    some(
        *("ProxyCLIP", "pipeline: CLIP, DINO", ""),
        {"voc21": 61.3, "context60": 35.3, "coco-object": 37.5, "cityscapes": 38.1, "ade20k": 20.2},
        {"voc21": 336, "cityscapes": 448},
    ),
    some(
        *("Trident", "pipeline: CLIP, DINO, SAM", "SAM, refines"),
        {"voc21": 67.1, "context60": 38.6, "coco-object": 41.1, "cityscapes": 42.9, "ade20k": 21.9},
    ),
    Published(
        *("ProxyCLIP", "OpenCLIP ViT-H/14", "pipeline: CLIP, DINO", "", PROXY),
        {"voc20": 83.3, "context59": 39.6, "coco-stuff": 26.8, "cityscapes": 42.0, "ade20k": 24.2},
    ),
    eight(
        *("Trident", "OpenCLIP ViT-H/14", "pipeline: CLIP, DINO, SAM", "SAM, refines", TRIDENT),
        *(70.8, 40.1, 42.2, 88.7, 44.3, 28.6, 47.6, 26.7),
    ),
    eight(
        *("OV-Stitcher", "CLIP ViT-B/16", "pipeline: CLIP, DINO", "stored region masks", STITCHER),
        *(75.7, 43.9, 42.6, 89.8, 48.8, 31.8, 48.1, 24.7),
        sides={"voc21": 448, "cityscapes": 560},
    ),
    eight(
        *("OV-Stitcher", "CLIP ViT-L/14", "pipeline: CLIP, DINO", "stored region masks", STITCHER),
        *(74.0, 43.4, 46.5, 90.2, 48.6, 31.6, 50.6, 27.7),
    ),
    eight(
        *("CorrCLIP", "MetaCLIP ViT-B/16", "pipeline: CLIP, DINO, SAM2", "SAM2", CORRCLIP),
        *(74.8, 44.2, 43.7, 88.8, 48.8, 31.6, 49.4, 26.9),
        sides={"voc21": 336, "cityscapes": 448},
    ),
    eight(
        *("CorrCLIP", "MetaCLIP ViT-B/16", "pipeline: CLIP, DINO, EntitySeg", "EntitySeg", CORRCLIP),
        *(76.2, 45.7, 44.5, 89.6, 50.7, 32.4, 51.6, 28.6),
        sides={"voc21": 336, "cityscapes": 448},
    ),
    eight(
        *("CorrCLIP", "MetaCLIP ViT-L/14", "pipeline: CLIP, DINO, SAM2", "SAM2", CORRCLIP),
        *(76.7, 44.9, 49.4, 91.5, 50.8, 34.0, 51.1, 30.7),
    ),
)


def published_table() -> str:
    """`ROWS` as the Markdown table of `docs/benchmarks.md`."""
    headings = ["method", "backbone", "inference", "extra mask generator", *SETS.values(), "source"]
    lines = [headings, ["---"] * len(headings)]
    for row in ROWS:
        scores = [f"{row.scores[name]:.1f}" if name in row.scores else "" for name in SETS]
        lines.append([row.method, row.backbone, row.inference, row.masks, *scores, row.source])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shorter_side(resize: Mapping[str, Any] | None) -> int | None:
    """Shorter side of the working size of a row of a report, if it is the same for all images."""
    size = {} if resize is None else resize.get("size") or {}
    return size.get("shortest_edge") or (min(size["height"], size["width"]) if "height" in size else None)


def side_in_words(resize: Mapping[str, Any] | None) -> str:
    """The shorter side of the working size of a row of a report, in words."""
    side = shorter_side(resize)
    if side is not None:
        return f"{side} px"
    return "the checkpoint's size" if resize is None else "not the same for all images"


def differences(report: Mapping[str, Any], rows: Sequence[Published]) -> list[str]:
    """Why the rows of a report and published rows on the same benchmark cannot be compared as they are."""
    options, benchmark, found = report["options"], report["dataset"], []
    if options.get("protocol") is None:
        found.append("Ours was not measured with --protocol spar: words, templates, scale and thresholds may differ.")
    if any(options.get(name) for name in PART if name != "include") or options.get("include") not in (None, ["*"]):
        found.append(f"Ours is the mean over {report['images']} images, a part of the benchmark.")
    given = [f"--{name}" for name in CHANGES if options.get(name) is not None and options[name] is not False]
    if (precision := report.get("mixed_precision", "no")) != "no":  # `accelerate launch` may have set it
        given.append(f"--mixed_precision {precision}")
    if given:
        found.append(f"Ours was measured with {', '.join(given)}.")
    ours = {shorter_side(row["resize"]) for row in report["runs"]}
    others = sorted({side for row in rows if (side := row.side(benchmark)) is not None and ours != {side}})
    if others:
        own = ", ".join(sorted({side_in_words(row["resize"]) for row in report["runs"]}))
        listed = ", ".join(map(str, others))
        found.append(f"The shorter side of ours is {own}, that of some published rows {listed} px (last column).")
    return found


def show_comparison(report: Mapping[str, Any], console: Console) -> None:
    """Print the rows of a report on a benchmark among the published ones, best first, and what differs."""
    benchmark = report["dataset"]
    rows = [row for row in ROWS if benchmark in row.scores]
    if not rows:
        console.print(f"No published figures are known here for {report['title']} ({benchmark}).")
        return
    lines = [
        (row.scores[benchmark], row.method, row.backbone, row.inference, row.masks or "none", row.side(benchmark))
        for row in rows
    ]
    lines += [
        (100 * row["mean_iou"], f"OURS: {row['model']}", "", row["inference"], "none", shorter_side(row["resize"]))
        for row in report["runs"]
    ]
    table = Table(title=f"{report['title']} ({benchmark}), mIoU beside published rows", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("method", "backbone", "inference", "extra masks"):
        table.add_column(heading)
    for heading in ("mIoU\n%", "side\npx"):
        table.add_column(heading, justify="right", no_wrap=True)
    for score, method, backbone, inference, masks, side in sorted(lines, key=lambda line: -line[0]):
        shown = "" if score != score else f"{score:.1f}"
        table.add_row(method, backbone, inference, masks, shown, "" if side is None else str(side))
    console.print(table)
    for line in differences(report, rows):
        console.print(line)
    console.print("Sources of the published rows: docs/benchmarks.md.")
