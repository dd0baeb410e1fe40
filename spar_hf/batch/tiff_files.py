"""TIFF files that are read window by window and written row of tiles by row of tiles, with their georeference."""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spar_hf.model.image_input import TooManyPixels, too_many_pixels
from spar_hf.utils.errors import UsageError

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# pixel scale, tie points, transformation, the three tables of GeoKeys, rational polynomials (RPC)
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 50844)
TILE = 512  # side of the tiles that are written
COLOURS = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}
ALPHA, PREMULTIPLIED_ALPHA = 2, 1
GeoTag = tuple[int, int, int, Any, bool]  # number, type, count, value, once: an extra tag of tifffile


def import_tifffile() -> Any:
    """
    Import `tifffile`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ImportError("TIFF files in tiles need tifffile: pip install 'spar-hf[huge]'.") from error
    return tifffile


def is_tiff(path: Path) -> bool:
    """Whether a file begins as TIFF or BigTIFF files do."""
    with path.open("rb") as file:
        return file.read(4) in MAGIC


class TiffPixels:
    """
    The first image of a TIFF file as an array that is read when it is sliced: `pixels[top:bottom, left:right]`.

    Compressed files are decoded tile by tile, or strip by strip, and what the last window touched is kept for the next one.
    So a file in strips needs memory for as many whole rows as a window has. Other files are mapped into memory.

    Args:
        path: of the file.

    Attributes:
        shape: height, width and channels: 1, 3, or 4 with alpha. Further bands of an RGB image, such as near infrared, are
            left out.
        dtype: of the pixels.
        geo_tags: the georeference.

    Raises:
        ImportError: tifffile is not installed.
        UsageError: no TIFF, or one whose bands or colours are unclear.
        ValueError: one tile or strip has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.

    Example:

    ```python
    >>> import tifffile
    >>> tifffile.imwrite("aerial.tif", np.zeros((600, 900, 3), np.uint8), tile=(256, 256), compression="zlib")
    >>> pixels = TiffPixels(Path("aerial.tif"))
    >>> pixels.shape, pixels[100:300, 500:900].shape
    ((600, 900, 3), (200, 400, 3))
    ```"""

    def __init__(self, path: Path):
        tifffile = import_tifffile()
        self.path = path
        try:
            self.page = tifffile.TiffFile(path).pages.first
            self._read_header(tifffile)
        except (OSError, UsageError, TooManyPixels):
            raise
        except Exception as error:  # tags with wrong values lead to errors of all kinds
            raise UsageError(f"{path} is a damaged TIFF file: {error}. Copy or download it again.") from error
        self.kept: dict[int, np.ndarray | None] = {}

    def _read_header(self, tifffile: Any) -> None:
        """What the tags of the page say."""
        page = self.page
        bands, self.alpha = self._bands()
        self.shape = (page.imagelength, page.imagewidth, 3 if page.photometric == 3 else bands)
        self.dtype = np.dtype(np.uint8) if page.photometric == 3 else page.dtype.newbyteorder("=")
        self.bands = bands
        if self.dtype.kind in "iu":  # pixels of 4 or 12 bits come in 8 or 16
            bits = np.atleast_1d(page.bitspersample)[:bands]  # one number, or one for each band
            self.largest = np.array([min(np.iinfo(self.dtype).max, 2 ** int(n) - 1) for n in bits], self.dtype)
        self.geo_tags = [geo_tag(page.tags[number]) for number in GEO_TAGS if number in page.tags]
        if page.is_tiled:
            self.piece = (page.tilelength, page.tilewidth)
        else:
            self.piece = (min(page.rowsperstrip, page.imagelength), page.imagewidth)
        self.mapped = self._map(tifffile)
        limit = Image.MAX_IMAGE_PIXELS
        if self.mapped is None and limit is not None and self.piece[0] * self.piece[1] > limit:
            kind = "tile" if page.is_tiled else "strip"
            reason = f"it is compressed in pieces of which one {kind} has {self.piece[0]} × {self.piece[1]} pixels."
            raise too_many_pixels(repr(str(self.path)), reason)

    def _map(self, tifffile: Any) -> Any:
        """The pixels mapped into memory, `None` if they are compressed. A wrong size of the image is found here."""
        damaged = f"{self.path} is a damaged TIFF file: it has less data than its size says. Copy or download it again."
        if self.page.is_memmappable:
            try:
                return tifffile.memmap(self.path, page=0, mode="r")
            except ValueError as error:
                raise UsageError(damaged) from error
        planes = self.page.samplesperpixel if self.page.planarconfig == 2 else 1
        if min(self.piece) < 1:
            raise UsageError(damaged)
        down, across = (-(-side // part) for side, part in zip(self.shape, self.piece, strict=False))
        if len(self.page.databytecounts) < planes * down * across:
            raise UsageError(damaged)
        return None

    def _bands(self) -> tuple[int, int]:
        """Number of channels that are read, and the kind of the alpha channel among them (0: none)."""
        page = self.page
        extra = tuple(int(kind) for kind in page.extrasamples)
        colours = page.samplesperpixel - len(extra)
        kind = COLOURS.get(int(page.photometric), f"the kind {int(page.photometric)}")
        if page.dtype is None:
            raise UsageError(f"{self.path} has pixels of an unknown type. Convert them to 8 or 16 bits or floats.")
        if page.imagedepth != 1:
            raise UsageError(f"{self.path} is a volume of {page.imagedepth} slices. Write one of them as a TIFF file.")
        # YCbCr is decoded to RGB by JPEG's decoder only
        if kind in ("CMYK", "CIELab") or (kind == "YCbCr" and page.compression not in (6, 7)):
            raise UsageError(
                f"{self.path} has {kind} colours, and windows are read from grey, RGB or palette images. Convert it to RGB."
            )
        if (
            kind not in COLOURS.values()
            or colours != (3 if kind in ("RGB", "YCbCr") else 1)
            or (extra and colours == 1)
        ):
            raise UsageError(
                f"{self.path} has {page.samplesperpixel} bands marked as {kind}, and windows are read from grey, RGB or "
                "palette images. Choose one band, or those of red, green and blue: "
                "`gdal_translate -b 1 -b 2 -b 3 -colorinterp red,green,blue IN.tif OUT.tif`."
            )
        if int(page.photometric) == 0 and np.dtype(page.dtype).kind == "f":
            raise UsageError(
                f"{self.path} holds floats of which the smallest is white, and nobody says which is black. Store them with "
                "the largest as white: `gdal_translate -co PHOTOMETRIC=MINISBLACK IN.tif OUT.tif`."
            )
        orientation = page.tags.valueof(274, default=1)
        if orientation != 1:
            raise UsageError(f"{self.path} is stored rotated (orientation {orientation}). Write it upright first.")
        alpha = extra[0] if len(extra) == 1 and extra[0] in (ALPHA, PREMULTIPLIED_ALPHA) else 0
        return colours + bool(alpha), alpha

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (slice(*part.indices(side)) for part, side in zip(window, self.shape, strict=False))
        values = self._mapped(rows, columns) if self.mapped is not None else self._decoded(rows, columns)
        values = values[:, :, : self.bands]
        if self.page.photometric == 3:
            table = np.asarray(self.page.colormap)  # (3, colours), 16 bits
            return (table[:, values[:, :, 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
        values = values.astype(self.dtype, copy=False)
        if self.page.photometric == 0:
            values = ~values if values.dtype == bool else self.largest - values
        if values.dtype == np.uint8 and (self.largest < 255).any():
            values = (values.astype(np.uint16) * 255 // self.largest).astype(np.uint8)
        if self.alpha == PREMULTIPLIED_ALPHA and values.dtype == np.uint8:
            stored = np.ascontiguousarray(values).tobytes()
            return np.asarray(Image.frombytes("RGBa", values.shape[1::-1], stored).convert("RGBA"))
        return self._without_alpha_in_colours(values) if self.alpha == PREMULTIPLIED_ALPHA else values

    def _without_alpha_in_colours(self, values: np.ndarray) -> np.ndarray:
        """Pixels of 16 bits or floats whose colours are no longer multiplied by their alpha: `(height, width, bands)`."""
        largest = self.largest[-1] if values.dtype.kind in "iu" else 1
        alpha = values[:, :, -1:].astype(np.float64) / largest
        colours = values[:, :, :-1] / np.where(alpha > 0, alpha, 1)
        if values.dtype.kind in "iu":
            colours = colours.round().clip(0, largest)
        return np.concatenate([colours.astype(values.dtype), values[:, :, -1:]], axis=2)

    def _mapped(self, rows: slice, columns: slice) -> np.ndarray:
        """A window `(height, width, bands)` of a file that is not compressed."""
        array: Any = self.mapped
        if array.ndim == 2:
            return array[rows, columns, None]
        if self.page.planarconfig == 2:  # (bands, height, width)
            return np.moveaxis(array[:, rows, columns], 0, 2)
        return array[rows, columns]

    def _decoded(self, rows: slice, columns: slice) -> np.ndarray:
        """A window `(height, width, bands)` from the tiles or strips that it touches."""
        height, width = self.piece
        across, down = -(-self.shape[1] // width), -(-self.shape[0] // height)
        planes = self.page.samplesperpixel if self.page.planarconfig == 2 else 1
        shape = (rows.stop - rows.start, columns.stop - columns.start, self.page.samplesperpixel)
        out = np.full(shape, self.page.nodata, self.page.dtype)
        touched = [
            (plane, row, column, (plane * down + row) * across + column)
            for plane in range(planes)
            for row in range(rows.start // height, -(-rows.stop // height))
            for column in range(columns.start // width, -(-columns.stop // width))
        ]
        self.kept = {index: self.kept[index] for *_, index in touched if index in self.kept}
        for plane, row, column, index in touched:
            if index not in self.kept:
                self.kept[index] = self._piece(index)
            piece = self.kept[index]
            if piece is not None:
                place, part = overlap((rows, columns), (row * height, column * width), piece.shape)
                band = slice(plane, plane + 1) if planes > 1 else slice(None)
                out[place][:, :, band] = piece[part]
        return out

    def _piece(self, index: int) -> np.ndarray | None:
        """Decode a tile or strip: `(height, width, bands)`, `None` where the file has none."""
        page, file = self.page, self.page.parent.filehandle
        tables = {}
        if page.compression in (6, 7):
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        try:
            if index >= len(page.databytecounts) or page.databytecounts[index] == 0:
                return None
            file.seek(page.dataoffsets[index])
            data = file.read(page.databytecounts[index])
            piece = page.decode(data, index, **tables)[0]
        except Exception as error:  # the decoders raise various types
            if "imagecodecs" in str(error):
                raise UsageError(
                    f"{self.path} is compressed by {page.compression.name}, which needs a decoder: pip install "
                    "'spar-hf[huge]'."
                ) from error
            raise ValueError(
                f"Cannot decode {self.path}: {error}. Copy or download it again: the file is damaged."
            ) from error
        return None if piece is None else piece[0]


def overlap(
    window: tuple[slice, slice], start: tuple[int, int], shape: Sequence[int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a piece at `start` lies in a window, and which part of it: rows and columns of each."""
    places, parts = [], []
    for wanted, first, length in zip(window, start, shape, strict=False):
        low, high = max(wanted.start, first), min(wanted.stop, first + length)
        places.append(slice(low - wanted.start, high - wanted.start))
        parts.append(slice(low - first, high - first))
    return (places[0], places[1]), (parts[0], parts[1])


def geo_tag(tag: Any) -> GeoTag:
    """A tag of a file as tifffile writes it into another."""
    return tag.code, int(tag.dtype), tag.count, tag.value, True


def georeference(path: Path) -> list[GeoTag]:
    """
    Tags that say where on Earth the pixels of an image lie, empty if nothing does: those of a GeoTIFF, else what `rasterio`
    finds, if it is installed, in files beside the image (`.tfw`, `.aux.xml`) or inside other formats.
    """
    if is_tiff(path):
        tags = TiffPixels(path).geo_tags
        if tags:
            return tags
    if importlib.util.find_spec("rasterio") is None:
        return []
    import rasterio
    from rasterio.errors import RasterioError, RasterioIOError

    tifffile = import_tifffile()
    with warnings.catch_warnings(), contextlib.suppress(RasterioError, RasterioIOError):
        warnings.simplefilter("ignore")  # most images have no georeference, and rasterio warns of each
        with rasterio.open(path) as source:
            if source.crs is None and source.transform.is_identity:
                return []
            profile = {"driver": "GTiff", "width": 1, "height": 1, "count": 1, "dtype": "uint8"}
            with rasterio.MemoryFile() as memory:
                with memory.open(crs=source.crs, transform=source.transform, **profile):
                    pass
                page = tifffile.TiffFile(memory).pages.first
                return [geo_tag(page.tags[number]) for number in GEO_TAGS if number in page.tags]
    return []


def write_label_tiff(
    path: Path,
    strips: Iterable[np.ndarray],
    size: tuple[int, int],
    dtype: Any,
    labels: Sequence[str],
    tags: Sequence[GeoTag] = (),
    colours: np.ndarray | None = None,
) -> None:
    """
    Write a label map as a tiled TIFF (BigTIFF above 4 GiB), compressed without loss (deflate). The image description holds
    the labels as JSON.

    Args:
        path: of the file.
        strips: the rows from top to bottom, `(rows, width)` each; at most one strip and a row of tiles are in memory.
        size: height and width.
        dtype: uint8 or uint16.
        labels: name of every number.
        tags: further tags, such as a georeference.
        colours: of the classes, `(classes, 3)` uint8, for viewers; pixels are class numbers all the same. Only with uint8.
    """
    tifffile = import_tifffile()
    big = size[0] * size[1] * np.dtype(dtype).itemsize >= 2**32 - 2**25
    shown: dict[str, Any] = {"photometric": "minisblack"}
    if colours is not None and np.dtype(dtype) == np.uint8:
        table = np.zeros((256, 3), np.uint16)
        table[: len(colours)] = colours.astype(np.uint16) * 257
        shown = {"photometric": "palette", "colormap": table.T}
    with tifffile.TiffWriter(path, bigtiff=big) as writer:
        writer.write(
            tiles_of_strips(strips, size, dtype),
            shape=size,
            dtype=dtype,
            **shown,
            tile=(TILE, TILE),
            compression="zlib",
            description=json.dumps({"labels": list(labels)}),  # ASCII, as the tag must be
            metadata=None,
            software="spar-hf",
            extratags=list(tags),
            maxworkers=1,  # more would ask for further tiles before these are written
        )


def tiles_of_strips(strips: Iterable[np.ndarray], size: tuple[int, int], dtype: Any) -> Iterator[np.ndarray]:
    """The tiles of a TIFF, row by row, from strips of any heights; the last ones are filled up with zeros."""
    height, width = size
    across = -(-width // TILE)
    band = np.zeros((TILE, across * TILE), dtype)
    filled, done = 0, 0
    for strip in strips:
        while len(strip):
            rows = min(len(strip), TILE - filled)
            band[filled : filled + rows, :width] = strip[:rows]
            strip, filled, done = strip[rows:], filled + rows, done + rows
            if filled == TILE or done == height:
                band[filled:] = 0
                for column in range(across):
                    yield np.ascontiguousarray(band[:, column * TILE : (column + 1) * TILE])
                filled = 0


__all__ = ["TiffPixels", "georeference", "write_label_tiff"]
