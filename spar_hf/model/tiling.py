"""
Large images in tiles: each tile is one forward pass, the features of overlapping tiles are blended, and blended features are
decided block by block. Features have `dim` values per patch, however many names there are. `docs/huge_images.md` compares
them with blended logits.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .image_pixels import as_whole
from .image_windows import ImageWindows
from .prompts import Vocabulary
from .segmentation import LabelMap, decide, give_to_background

Block = tuple[slice, slice, torch.Tensor]
Encode = Callable[[int, int, int, int], torch.Tensor]


@dataclass(frozen=True)
class TileAxis:
    """
    Tiles along one axis of an image, in patches: equally long, as equally spaced as whole patches allow, each at least
    `overlap` patches into the next.

    Attributes:
        length: patches of the image.
        tile: patches of a tile.
        starts: first patch of each tile.

    Example:

    ```python
    >>> TileAxis.make(length=20, tile=8, overlap=2)
    TileAxis(length=20, tile=8, starts=(0, 6, 12))
    ```"""

    length: int
    tile: int
    starts: tuple[int, ...]

    @classmethod
    def make(cls, length: int, tile: int, overlap: int) -> "TileAxis":
        """The fewest tiles; a single one, as long as the image, if that is not longer than a tile."""
        tile = min(tile, length)
        gaps = -(-(length - tile) // (tile - overlap)) if length > tile else 0
        return cls(length, tile, tuple(k * (length - tile) // max(gaps, 1) for k in range(gaps + 1)))

    def __len__(self) -> int:
        return len(self.starts)

    def final(self, k: int) -> tuple[int, int]:
        """The patches that no tile after `k` reaches, and no tile before it has completed: first and end."""
        return self.starts[k], self.starts[k + 1] if k + 1 < len(self) else self.length

    @cached_property
    def weights(self) -> list[torch.Tensor]:
        """
        The weight of each tile at its patches, `(tile,)` float32. Over an overlap it goes with the root of the distance to
        the border of the tile, where features have least context. The weights of all tiles at a patch sum to 1.
        """
        total = torch.zeros(self.length, dtype=torch.float64)
        shares = []
        for k, start in enumerate(self.starts):
            centres = torch.arange(self.tile, dtype=torch.float64) + 0.5
            share = torch.ones_like(centres)
            if k > 0:
                share *= (centres / max(self.starts[k - 1] + self.tile - start, 1e-9)).clamp(max=1).sqrt()
            if k + 1 < len(self):
                shared = start + self.tile - self.starts[k + 1]
                share *= ((self.tile - centres) / max(shared, 1e-9)).clamp(max=1).sqrt()
            shares.append(share)
            total[start : start + self.tile] += share
        return [
            (share / total[start : start + self.tile]).float() for start, share in zip(self.starts, shares, strict=True)
        ]


@dataclass(frozen=True)
class TilePlan:
    """
    The tiles of an image. They start at patches of the image's own grid, so that blending resamples nothing.

    Attributes:
        size: height and width of the image in pixels.
        patch_size: side of a patch in pixels.
        rows, columns: the tiles along each axis.

    Example:

    ```python
    >>> plan = TilePlan.make((1000, 2000), patch_size=16, tile=768, overlap=128)
    >>> len(plan), plan.window(1, 2)
    (6, (240, 1232, 1000, 2000))
    ```"""

    size: tuple[int, int]
    patch_size: int
    rows: TileAxis
    columns: TileAxis

    @classmethod
    def make(cls, size: tuple[int, int], patch_size: int, tile: int, overlap: int) -> "TilePlan":
        """
        Args:
            size: height and width of the image in pixels.
            patch_size: side of a patch in pixels.
            tile: side of a tile in pixels, rounded down to whole patches.
            overlap: of neighbouring tiles in pixels, at least; rounded up to whole patches, but less than a tile.
        """
        patches = tile // patch_size
        shared = min(-(-overlap // patch_size), patches - 1)
        rows, columns = (TileAxis.make(-(-side // patch_size), patches, shared) for side in size)
        return cls((size[0], size[1]), patch_size, rows, columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def window(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Top, left, bottom and right of a tile in pixels; the last tiles end with the image."""
        top, left = self.rows.starts[row] * self.patch_size, self.columns.starts[column] * self.patch_size
        bottom = min(top + self.rows.tile * self.patch_size, self.size[0])
        return top, left, bottom, min(left + self.columns.tile * self.patch_size, self.size[1])

    def pixels(self, axis: int, first: int, end: int) -> tuple[int, int]:
        """
        The pixels along an axis (0: rows) that can be decided when the patches `first` to `end` are final, and not before. A
        pixel is read from two patches, so the borders lie in the middle of the patch before.
        """
        length = (self.rows, self.columns)[axis].length

        def border(patch: int) -> int:
            if patch == 0:
                return 0
            return self.size[axis] if patch == length else (patch - 1) * self.patch_size + self.patch_size // 2

        return border(first), border(end)


def blended_blocks(plan: TilePlan, encode: Encode) -> Iterator[Block]:
    """
    Run all tiles, row by row, and yield blended features as soon as no further tile changes them.

    A tile, its weighted features and, for the full width of the image, the rows of patches that the next row of tiles shares
    are in memory: `8 * dim * (overlap + 1) * width` bytes with `overlap` and `width` in patches.

    Args:
        plan: the tiles.
        encode: features of the window `(top, left, bottom, right)` in pixels: `(dim, h, w)`, on the patch grid.

    Yields:
        Rows and columns of a block on the patch grid of the image, and its features, float32, to be used before the next
        block. They have one more row above and one more column at the left, of the blocks before, where there are such.
    """
    rows, columns = plan.rows, plan.columns
    above: torch.Tensor | None = None  # sums of the earlier rows of tiles, from the patch before this row of tiles on
    for i, top in enumerate(rows.starts):
        end = rows.final(i)[1]
        below: torch.Tensor | None = None
        beside: torch.Tensor | None = None  # sums of this row of tiles, right of what is final
        edge: torch.Tensor | None = None  # last final column of the block before
        for j, left in enumerate(columns.starts):
            features = encode(*plan.window(i, j)).float()
            weights = rows.weights[i][:, None] * columns.weights[j]
            sums = features * weights.to(features.device)
            if beside is not None:
                sums[:, :, : beside.shape[2]] += beside
            right = columns.final(j)[1]
            beside = sums[:, :, right - left :].clone()
            sums = sums[:, :, : right - left]
            if above is not None:
                shared = above[:, 1:, left:right]
                sums[:, : shared.shape[1]] += shared
            if end < rows.length:
                if below is None:
                    below = sums.new_empty(len(sums), rows.starts[i] + rows.tile - end + 1, columns.length)
                below[:, :, left:right] = sums[:, end - top - 1 :]
            block = sums[:, : end - top]
            if above is not None:
                block = torch.cat([above[:, :1, left:right], block], dim=1)
            if edge is not None:
                block = torch.cat([edge, block], dim=2)
            edge = block[:, :, -1:].clone()
            yield slice(top, end), slice(left, right), block
            del features, sums, block
        above = below


@torch.no_grad()
def decided_blocks(
    plan: TilePlan,
    encode: Encode,
    logits: Callable[[torch.Tensor], torch.Tensor],
    name_to_class: torch.Tensor,
) -> Iterator[tuple[slice, slice, LabelMap]]:
    """
    Segment an image block by block; the blocks of a row of tiles are of one height and lie side by side.

    Args:
        plan: the tiles.
        encode: as in [`blended_blocks`].
        logits: of features `(dim, h, w)`: `(names, h, w)`.
        name_to_class (`torch.Tensor` of shape `(names,)`): class of every name.

    Yields:
        Rows and columns of the image in pixels, and their decision. Every pixel comes once.
    """
    patch = plan.patch_size
    for rows, columns, features in blended_blocks(plan, encode):
        # the block with its margins is decided as an image of its own, whose outer pixels are cut off where more follow
        ends = [min(part.stop * patch, side) for part, side in zip((rows, columns), plan.size, strict=True)]
        start = [(part.stop - cells) * patch for part, cells in zip((rows, columns), features.shape[1:], strict=True)]
        size = (ends[0] - start[0], ends[1] - start[1])

        def logits_of_rows(first: int, last: int, features: torch.Tensor = features) -> torch.Tensor:
            return logits(features[:, first:last])

        decision = decide(logits_of_rows, name_to_class, patch, size, size)
        high, wide = (slice(*plan.pixels(axis, part.start, part.stop)) for axis, part in enumerate((rows, columns)))
        inside = tuple(slice(place.start - a, place.stop - a) for place, a in zip((high, wide), start, strict=True))
        yield high, wide, LabelMap(decision.labels[inside], decision.probabilities[inside])


@dataclass(frozen=True)
class TiledImage:
    """
    An image and its tiles.

    Attributes:
        windows: reads the image.
        plan: the tiles.
    """

    windows: ImageWindows
    plan: TilePlan

    @classmethod
    def make(cls, source: Any, tile: Any, patch_size: int, max_tokens: int, image_range: Any = None) -> "TiledImage":
        """
        Args:
            source: an image, or [`ImageWindows`].
            tile: see [`tile_sides`].
            patch_size: side of a patch in pixels.
            max_tokens: limit on the patches of a tile.
            image_range: see [`ImageWindows`].

        Raises:
            ValueError: an impossible tile, or an image that cannot be read.
        """
        side, overlap = tile_sides(tile, patch_size, max_tokens)
        windows = source if isinstance(source, ImageWindows) else ImageWindows(source, image_range)
        height, width = windows.size
        if min(height, width) < 2:
            raise ValueError(
                f"The image has {height} × {width} pixels (height × width); each side must have at least 2."
            )
        return cls(windows, TilePlan.make(windows.size, patch_size, side, overlap))


def tile_sides(tile: Any, patch_size: int, max_tokens: int) -> tuple[int, int]:
    """
    Side of a tile and overlap of neighbours in pixels, from `{"size": 1536, "overlap": 256}` or the side alone, which
    overlaps by a quarter: with less, seams can be seen (`docs/huge_images.md`).

    Raises:
        ValueError: anything else, a tile below two patches or of more than `max_tokens` patches, an overlap as large as the
            tile.

    Example:

    ```python
    >>> tile_sides(1536, 16, 16384), tile_sides({"size": 768, "overlap": 64}, 16, 16384)
    ((1536, 384), (768, 64))
    ```"""
    given = dict(tile) if isinstance(tile, Mapping) else {"size": tile}
    side: Any = as_whole(given.get("size"))
    overlap: Any = as_whole(given["overlap"]) if "overlap" in given else (side // 4 if isinstance(side, int) else None)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (side, overlap))
    if set(given) - {"size", "overlap"} or not whole:
        raise ValueError(f'`tile` is {tile!r}; it must be like {{"size": 1536, "overlap": 256}}, in whole pixels.')
    if side < 2 * patch_size:
        raise ValueError(
            f"A tile of {side} pixels is smaller than two patches of {patch_size}. Take one of 512 or more."
        )
    if not 0 <= overlap < side:
        raise ValueError(
            f"Tiles of {side} pixels cannot overlap by {overlap}: take 0 to {side - 1}, such as {side // 4}."
        )
    if (side // patch_size) ** 2 > max_tokens:
        raise ValueError(
            f"A tile of {side} pixels has {(side // patch_size) ** 2} patches, more than `max_tokens`, {max_tokens}. Take "
            "smaller tiles, or raise `max_tokens` (`--max-tokens`) if the memory is there."
        )
    return side, overlap


def check_tiled(options: Mapping[str, Any]) -> None:
    """
    Refuse what a decision tile by tile cannot do.

    Raises:
        ValueError: `tile` with a working size, a result larger than a label map, a refinement or presence.
    """
    if options.get("size") not in (None, "native"):
        raise ValueError("Tiles are read at the size of the image: leave out `size`, or resize the image and `tile`.")
    if options.get("output") in ("probabilities", "logits"):
        raise ValueError(f"`tile` and output={options['output']!r} exclude each other: take 'map' or 'segments'.")
    others = ("top_k", "refine", "upsampler", "presence", "min_presence")
    if given := [name for name in others if options.get(name) and (name != "top_k" or options.get("output") == "map")]:
        raise ValueError(f"These need all of the image at once, so leave them out with `tile`: {', '.join(given)}.")


def tiled_blocks(
    pipeline: Any,
    image: TiledImage,
    vocabulary: Vocabulary,
    templates: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[slice, slice, LabelMap]]:
    """
    Segment an image block by block.

    Args:
        pipeline ([`OpenVocabSegmentationPipeline`]): its model, image processor and text embeddings.
        image: image and tiles.
        vocabulary, templates: the classes, with their background.
        progress: called after each tile with the number of tiles done and of all.

    Yields:
        As [`decided_blocks`].
    """
    model, text_embeds = pipeline.supported(vocabulary, templates)
    name_to_class = vocabulary.name_to_class.to(text_embeds.device)
    done = 0

    def encode(top: int, left: int, bottom: int, right: int) -> torch.Tensor:
        nonlocal done
        window = image.windows.read(top, left, bottom, right)
        # the window is RGB already, and no larger than a tile
        options = {"size": "native", "max_tokens": None, "image_range": None, "input_data_format": "channels_last"}
        inputs = pipeline.image_processor(window, return_tensors="pt", **options)
        encoded = pipeline._encode([{"pixel_values": inputs["pixel_values"], "original_size": window.shape[:2]}])[0]
        done += 1
        if progress is not None:
            progress(done, len(image.plan))
        return encoded.feature_map

    def logits(features: torch.Tensor) -> torch.Tensor:
        return model.dense_logits(features[None], text_embeds)[0]

    return decided_blocks(image.plan, encode, logits, name_to_class)


def tiled_map(
    pipeline: Any,
    image: TiledImage,
    vocabulary: Vocabulary,
    classes: int,
    background: int,
    threshold: float = 0.0,
    min_area: float = 0.0,
    templates: Any = None,
) -> dict[str, torch.Tensor]:
    """The decision for an image in memory, as [`map_result`] returns it: `map`, and per class `pixels` and `scores`."""
    decision = LabelMap(torch.empty(image.plan.size, dtype=torch.int32), torch.empty(image.plan.size))
    for rows, columns, block in tiled_blocks(pipeline, image, vocabulary, templates):
        decision.labels[rows, columns] = block.labels.cpu()
        decision.probabilities[rows, columns] = block.probabilities.cpu()
    if threshold or min_area:
        decision = give_to_background(decision, background, threshold, min_area)
    pixels, scores = decision.class_scores(classes)
    return {"map": decision.labels, "pixels": pixels, "scores": scores}


__all__ = ["TiledImage", "TilePlan", "tiled_blocks"]
