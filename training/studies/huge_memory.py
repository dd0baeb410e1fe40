"""
Peak memory of segmenting an image of any size in tiles, read from and written to TIFF files.

    python training/studies/huge_memory.py --side 20000 --tile 768 --overlap 192 --tower_tiles 6

The image is smooth noise, written tile by tile. The vision tower runs on the first tiles. Their features stand in for those
of the others, since its memory is the same for all tiles (`--tower_tiles 0`: it runs on all). The rest of the work is done
for the whole image. Prints the resident memory of the process (Linux) before the image and at its peak, and CPU seconds. One
size per process: what an allocator keeps of a larger image would count for a smaller one.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from transformers import pipeline

import spar_hf
from spar_hf.batch.huge_images import segment_huge
from spar_hf.batch.tiff_files import import_tifffile
from spar_hf.model.image_streams import EncodedImage
from spar_hf.utils.atomic import write_json
from spar_hf.utils.checkpoints import check_replaceable
from spar_hf.utils.devices import PeakMemory, resident_bytes
from spar_hf.utils.errors import UsageError, run_command
from spar_hf.utils.fields import option
from spar_hf.utils.options import HELP, parse_dataclasses

WORDS = ["sky", "building", "tree", "road", "person", "car", "grass", "water", "mountain", "wall", "sand", "animal"]
FILE_TILE = 512  # side in pixels of the tiles of the TIFF file


@dataclass(kw_only=True)
class MemoryOptions:
    """Options of the study."""

    side: int = option(20_000, "Sides of the image in pixels.")
    tile: int = option(768, "Side of a tile in pixels.")
    overlap: int = option(192, "Overlap of tiles in pixels.")
    tower_tiles: int = option(6, "Tiles that the vision tower runs on; 0 for all.")
    model: str = option(spar_hf.SPAR_TINY, "Folder of a two-tower model.")
    output: str | None = option(None, "JSON file to write.")
    overwrite: bool = option(False, HELP["overwrite"])

    def __post_init__(self):
        if self.side < 2 or self.tower_tiles < 0:
            raise UsageError("--side must be at least 2, and --tower_tiles not below 0.")


def write_image(path: Path, side: int) -> None:
    """A square TIFF image of smooth noise in compressed tiles."""
    rng = np.random.default_rng(0)

    def tiles() -> Iterator[np.ndarray]:
        for _ in range((-(-side // FILE_TILE)) ** 2):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            yield np.asarray(coarse.resize((FILE_TILE, FILE_TILE), Image.Resampling.BICUBIC))

    options = {"tile": (FILE_TILE, FILE_TILE), "compression": "zlib", "photometric": "rgb"}
    import_tifffile().imwrite(path, tiles(), shape=(side, side, 3), dtype=np.uint8, **options)


def spare_the_tower(segment: Any, tiles: int) -> None:
    """Give a pipeline features of earlier tiles of the same size from the tile `tiles` on."""
    encode, last, count = segment._encode, {}, 0

    def encode_or_repeat(items: list[dict]) -> list[EncodedImage]:
        nonlocal count
        shape = items[0]["pixel_values"].shape
        count += 1
        if count <= tiles or shape not in last:
            (last[shape],) = encode(items)
        return [last[shape]]

    segment._encode = encode_or_repeat


@torch.no_grad()
def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run the study; returns what it prints."""
    (options,) = parse_dataclasses((MemoryOptions,), args, __doc__)
    if not sys.platform.startswith("linux"):
        raise UsageError("Peak memory can be measured on Linux only.")
    if options.output:
        check_replaceable([Path(options.output)], options.overwrite)
    segment = pipeline("open-vocab-segmentation", model=options.model)
    segment(Image.new("RGB", (32, 32)), candidate_labels=WORDS, output="map")  # embeds the words
    if options.tower_tiles:
        spare_the_tower(segment, options.tower_tiles)
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "image.tif", Path(folder) / "map.tif"
        write_image(source, options.side)
        tile, start = {"size": options.tile, "overlap": options.overlap}, time.process_time()
        with PeakMemory("cpu") as peak:
            before = resident_bytes()
            found = segment_huge(segment, source, target, WORDS, tile)
        seconds = time.process_time() - start
    report = {**vars(options), "before_mib": before / 2**20, "peak_mib": (before + (peak.bytes or 0)) / 2**20}
    report |= {"cpu_seconds": seconds, "pixels": sum(found.pixels)}
    if options.output:
        write_json(Path(options.output), report)
    sizes = f"{options.side} × {options.side}, tiles of {options.tile} with {options.overlap}"
    memory = f"{report['before_mib']:.0f} MiB before, {report['peak_mib']:.0f} MiB at the peak"
    Console(width=150).print(f"{sizes}: {memory}, {seconds:.0f} CPU seconds")
    return report


if __name__ == "__main__":
    run_command(main)
