"""Options of `spar-hf segment`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from spar_hf.cli.arguments import (
    BatchSize,
    Device,
    ImageRange,
    Images,
    Labels,
    MaxPixels,
    MaxTokens,
    Model,
    Shard,
    ShardRange,
    ShortestEdge,
    SkipExisting,
    Templates,
    Workers,
)
from spar_hf.cli.huge import check_strip_options, parse_tile, writes_strips
from spar_hf.cli.parts import TAR, part_suffix
from spar_hf.cli.video import SMOOTHING
from spar_hf.utils.errors import UsageError
from spar_hf.utils.options import HELP
from spar_hf.utils.remote_files import is_remote
from spar_hf.utils.shards import ShardChoice


@dataclass(kw_only=True)
class SegmentOptions:
    """
    What the command line of `spar-hf segment` says, in the order of `--help`.

    Attributes:
        tiles: size and overlap of tiles, as the pipeline takes them.
        path: the output as a local path.
        to_shards: whether the output is a folder of WebDataset shards.

    Raises:
        UsageError: an overlap without tiles, or what does not go with a label map that is written strip by strip.
    """

    images: Images
    labels: Labels
    output: Annotated[
        str,
        typer.Option(
            help="File for one image, or a folder for several, with the sub-folders of the input; or DIR.tar, a folder of "
            "WebDataset shards with many images each, also in a store: s3://bucket/DIR.tar."
        ),
    ]
    formats: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="overlay (masks over the image), map (class numbers as PNG: 8-bit palette indices, 16 bits above 256 "
            "classes; read it with Pillow), coco (run-length masks, needs the extra coco), json (label, score, share and "
            "box per class), heatmap (probability, a picture per class found); several separated by commas. "
            "Default: overlay; in DIR.tar map,json.",
        ),
    ] = None
    model: Model = None
    templates: Templates = None
    support: Annotated[
        Path | None, typer.Option(help="File of annotated examples of classes, from `spar-hf support`.")
    ] = None
    shortest_edge: ShortestEdge = None
    background: Annotated[
        str,
        typer.Option(
            help="What surrounds the classes, not painted: auto (common stuff words), none (every pixel gets a class), or "
            "one of the labels or a new one for unsure pixels and tiny classes."
        ),
    ] = "auto"
    keep_background: Annotated[
        bool, typer.Option("--keep-background", help="List the background in COCO and JSON files like a class.")
    ] = False
    threshold: Annotated[float | None, typer.Option(help=HELP["threshold"], min=0, max=1)] = None
    min_area: Annotated[
        float | None, typer.Option(help="Classes below this share of the foreground become background.", min=0, max=1)
    ] = None
    presence: Annotated[
        bool, typer.Option("--presence", help="Also report for each class how likely the image shows it at all.")
    ] = False
    min_presence: Annotated[
        float | None, typer.Option(help="Leave out classes with a lower presence (see --presence).", min=0, max=1)
    ] = None
    refine: Annotated[
        str | None, typer.Option(help="Sharper masks: lposs, lposs+ or pamr (see spar_hf/model/refine.py).")
    ] = None
    heatmap: Annotated[
        list[str] | None, typer.Option("--heatmap", help="Draw the probability of this class; may be repeated.")
    ] = None
    map_output: Annotated[
        Path | None, typer.Option("--map", help="For one image: also write the class numbers to this PNG.")
    ] = None
    frames: Annotated[
        str | None,
        typer.Option(
            help="Frames of GIF, APNG and WebP, pages of TIFF: 3, 0:10:2 (as in Python) or all. Default: the first one of "
            "each file."
        ),
    ] = None
    smoothing: Annotated[
        float,
        typer.Option(help="For videos: weight of earlier frames, so that masks do not flicker; 0 for none.", min=0),
    ] = SMOOTHING
    every: Annotated[
        int, typer.Option(help="For videos: segment every Nth frame; those between get its masks.", min=1)
    ] = 1
    tile: Annotated[
        int | None,
        typer.Option(
            help="For large images: side in pixels of tiles that are one pass each, at the size of the image, with blended "
            "features. With --output FILE.tif or .npy, TIFF images (extra huge) of any size are read and label maps written "
            "tile by tile."
        ),
    ] = None
    tile_overlap: Annotated[
        int | None, typer.Option(help="Overlap of neighbouring tiles in pixels. Default: a quarter of a tile.", min=0)
    ] = None
    shard_images: Annotated[int, typer.Option(help="Images in a shard of DIR.tar.", min=1)] = 100
    shard: Shard = None
    shard_range: ShardRange = None
    skip_existing: SkipExisting = False
    device: Device = None
    workers: Workers = None
    batch_size: BatchSize = 4
    max_tokens: MaxTokens = None
    image_range: ImageRange = None
    max_pixels: MaxPixels = None
    tiles: dict[str, int] | None = field(init=False)
    path: Path = field(init=False)
    to_shards: bool = field(init=False)
    job: ShardChoice = field(init=False)

    def __post_init__(self):
        self.tiles = parse_tile(self.tile, self.tile_overlap)
        self.job = ShardChoice(self.shard, self.shard_range)
        self.skip_existing = self.skip_existing or self.job.is_part
        self.path, self.to_shards = Path(self.output), part_suffix(self.output) == TAR
        if not self.to_shards and (is_remote(self.output) or part_suffix(self.output) is not None):
            raise UsageError(f"--output {self.output}: masks are written to files, or to a folder of shards, DIR{TAR}.")
        if self.to_shards and (self.heatmap or self.map_output or "heatmap" in self.chosen_formats):
            raise UsageError(
                f"--output {self.output}: leave out heat maps and --map, which are files beside one image."
            )
        if self.tiles is not None and self.workers:
            raise UsageError("--tile reads an image part by part, not ahead of the model: leave out --workers.")
        if self.tiles is not None and self.is_changed("batch_size"):
            raise UsageError("--tile makes each tile of an image one pass: leave out --batch-size.")
        if self.frames is not None and self.workers:
            raise UsageError("--frames reads frames one after the other, in this process: leave out --workers.")
        if not self.to_shards and self.is_changed("shard_images"):
            raise UsageError(f"--shard-images is for --output DIR{TAR}, shards with many images each.")
        if writes_strips(self.path):
            self._check_strips()

    @property
    def chosen_formats(self) -> str:
        """The formats, or those that suit the output."""
        return self.formats or ("map,json" if self.to_shards else "overlay")

    def is_changed(self, name: str) -> bool:
        """Whether an option has another value than its default, so that somebody has asked for it."""
        return getattr(self, name) != getattr(type(self), name)

    def _check_strips(self) -> None:
        """Refuse options that need an image in memory, and several jobs."""
        if self.job.is_part:  # told before --skip-existing, which it implies and nobody has given
            raise UsageError(
                f"--output {self.path} is the label map of one image, which one job writes: leave out {self.job.option}."
            )
        others = ("shortest_edge", "keep_background", "presence", "min_presence", "refine", "heatmap", "frames")
        given = {f"--{name.replace('_', '-')}": getattr(self, name) for name in (*others, "skip_existing")}
        given |= {"--map": self.map_output, "--format": self.chosen_formats not in ("overlay", "map")}
        check_strip_options(self.tiles, self.path, given)

    @property
    def has_rules(self) -> bool:
        """Whether pixels are moved to the background."""
        return bool(self.threshold or self.min_area or self.min_presence)

    def rules(self, background: str | None) -> dict[str, Any]:
        """How the pipeline finds the classes, under the names that records of settings have always had."""
        return {
            "size": None if self.shortest_edge is None else {"shortest_edge": self.shortest_edge},
            "templates": self.templates,
            "background": background,
            "threshold": self.threshold,
            "min_area": self.min_area,
            "refine": self.refine,
            "max_tokens": self.max_tokens,
        }

    @property
    def presences(self) -> dict[str, Any]:
        """Whether the pipeline reports presences, and from which one on a class is kept."""
        return {"presence": self.presence or bool(self.min_presence), "min_presence": self.min_presence}
