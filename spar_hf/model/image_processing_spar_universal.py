"""Images and segmentation maps in, segments of the image out: the image processor of SPAR's mask-classification head."""

# transformers calls its hooks by keyword; ours name the keywords they use and take the rest as **kwargs
# mypy: disable-error-code="override"

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.models.mask2former.image_processing_pil_mask2former import (
    binary_mask_to_rle,
    convert_segmentation_map_to_binary_masks,
)
from transformers.processing_utils import ImagesKwargs

from .image_processing_spar import SparImageProcessorPil
from .segmentation import WORKING_BYTES, patch_coordinates


class SparUniversalImageProcessorKwargs(ImagesKwargs, total=False):
    """What [`SparUniversalImageProcessorPil`] takes beside what every image processor takes; described there."""

    ignore_index: int | None
    label_ids_to_fuse: list[int] | None


def nearest(label_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map `(height, width)` of any integers in another size: the label under the centre of each new pixel."""
    rows, columns = (
        (np.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(size, label_map.shape, strict=True)
    )
    return label_map[rows[:, None], columns]


def mask_tiles(
    logits: torch.Tensor, extent: Sequence[float], size: tuple[int, int], values: int, working_bytes: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """
    Masks over the padded image -> masks over the image, by tiles of whole rows: bilinear, as upsampling the cells,
    cropping the padding and resizing to the image.

    Args:
        logits (`torch.Tensor` of shape `(queries, h, w)`).
        extent: height and width of the image in cells.
        size: height and width of the image.
        values: values per pixel of a tile that the caller holds, in bytes times four.
        working_bytes: bound on them.

    Yields:
        The rows of the image and the logits there, `(queries, rows, width)`.
    """
    height, width = size
    top, bottom, down = patch_coordinates(height, extent[0], 1, logits.shape[1], logits.device)
    left, right, across = patch_coordinates(width, extent[1], 1, logits.shape[2], logits.device)
    tile = max(1, working_bytes // (4 * max(1, values) * width))
    for start in range(0, height, tile):
        rows = slice(start, min(start + tile, height))
        first, last = int(top[rows][0]), int(bottom[rows][-1])
        # columns first, on the few rows of cells under this tile: (queries, cells, w) -> (queries, cells, width)
        strip = logits[:, first : last + 1]
        strip = strip.index_select(2, left).lerp_(strip.index_select(2, right), across)
        below = strip.index_select(1, bottom[rows] - first)
        yield rows, strip.index_select(1, top[rows] - first).lerp_(below, down[rows, None])


class SparUniversalImageProcessorPil(SparImageProcessorPil):
    r"""
    Image processor of [`SparForUniversalSegmentation`]: reads and resizes images as [`SparImageProcessorPil`] does, makes
    labels for training of segmentation maps, and segments of the image from the model's outputs.

    Args:
        ignore_index (`int`, *optional*, defaults to 255):
            Value of the pixels of a segmentation map that belong to no segment.
        label_ids_to_fuse (`list[int]`, *optional*):
            Classes of which an image has one segment at most (sky, grass): what
            `post_process_panoptic_segmentation` uses where it is called without any, as `pipeline("image-segmentation")`
            calls it.
        kwargs: those of [`SparImageProcessorPil`].

    Called with images and `segmentation_maps`, one integer map `(height, width)` per image in its upright size (PIL
    images of mode L, P or I, arrays, tensors), it gives beside `pixel_values` and `original_sizes`:
        - **mask_labels** (`list[torch.FloatTensor]`): masks of the segments, `(segments, height, width)`, in the size of
          `pixel_values`; segments that vanish at this size are left out.
        - **class_labels** (`list[torch.LongTensor]`): their classes, `(segments,)`. A map's values are classes, or
          segments where `instance_id_to_semantic_id`, one dict for all images or a list of one each, names the class
          of every segment.

    Raises:
        ValueError: what [`SparImageProcessorPil`] raises; maps of another number or size than the images, or without
            integers; a segment without a class.

    Source: `Mask2FormerImageProcessorPil` in transformers for the names and the rules.

    Example:

    ```python
    >>> from spar_hf import SPAR_TINY, SparForUniversalSegmentation, SparUniversalImageProcessorPil

    >>> image_processor = SparUniversalImageProcessorPil(size={"shortest_edge": 100})
    >>> image, segments = Image.new("RGB", (300, 200)), np.repeat([[0, 1]], 150, axis=1).repeat(200, axis=0)
    >>> inputs = image_processor(image, segments, return_tensors="pt")
    >>> inputs.mask_labels[0].shape, inputs.class_labels[0]
    (torch.Size([2, 100, 150]), tensor([0, 1]))
    >>> model = SparForUniversalSegmentation.from_spar(SPAR_TINY, id2label={0: "sky", 1: "dog"}, hidden_dim=64).eval()
    >>> outputs = model(**inputs)
    >>> outputs.loss.shape
    torch.Size([])
    >>> image_processor.post_process_semantic_segmentation(outputs, [(200, 300)])[0].shape
    torch.Size([200, 300])
    ```"""

    valid_kwargs: Any = SparUniversalImageProcessorKwargs
    ignore_index = 255
    label_ids_to_fuse = None

    def preprocess(
        self,
        images,
        segmentation_maps=None,
        instance_id_to_semantic_id: dict[int, int] | list[dict[int, int]] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """See the class."""
        inputs = super().preprocess(images, **kwargs)
        if segmentation_maps is None:
            return inputs
        if not isinstance(segmentation_maps, (list, tuple)):
            single = isinstance(segmentation_maps, Image.Image) or segmentation_maps.ndim == 2
            segmentation_maps = [segmentation_maps] if single else list(segmentation_maps)
        if len(segmentation_maps) != len(inputs["original_sizes"]):
            raise ValueError(
                f"There are {len(inputs['original_sizes'])} images but {len(segmentation_maps)} segmentation maps."
            )
        ids: Any = instance_id_to_semantic_id
        ids = ids if isinstance(ids, list) else [ids] * len(segmentation_maps)
        ignore_index = kwargs.get("ignore_index", self.ignore_index)
        inputs["mask_labels"], inputs["class_labels"] = [], []
        for pixels, size, segmentation_map, classes in zip(
            inputs["pixel_values"], inputs["original_sizes"], segmentation_maps, ids, strict=True
        ):
            label_map = np.asarray(segmentation_map)
            if label_map.shape != tuple(size) or not np.issubdtype(label_map.dtype, np.integer):
                raise ValueError(
                    f"A segmentation map holds whole numbers in the size of its upright image, {size[0]}×{size[1]}; this "
                    f"one is {label_map.dtype} of shape {label_map.shape}."
                )
            label_map = nearest(label_map, pixels.shape[-2:])
            nameless = (
                set(np.unique(label_map).tolist()) - set(classes or {}) - {ignore_index} if classes is not None else ()
            )
            if nameless:
                raise ValueError(f"`instance_id_to_semantic_id` names no class of the segments {sorted(nameless)[:8]}.")
            masks, labels = convert_segmentation_map_to_binary_masks(label_map, classes, ignore_index)
            inputs["mask_labels"].append(torch.from_numpy(masks))
            inputs["class_labels"].append(torch.from_numpy(labels))
        return inputs

    @staticmethod
    def _images(outputs, target_sizes) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[float], tuple[int, int]]]:
        """Per image: class probabilities `(queries, classes + 1)`, mask logits, their extent, the size asked for."""
        sizes = getattr(outputs, "mask_sizes", None)
        if sizes is None:
            raise ValueError("`outputs` are not those of SparForUniversalSegmentation: they have no `mask_sizes`.")
        if target_sizes is not None and len(target_sizes) != len(sizes):
            raise ValueError(f"There are {len(sizes)} images in `outputs` but {len(target_sizes)} `target_sizes`.")
        for i, extent in enumerate(sizes.tolist()):
            size = [max(1, round(side)) for side in extent] if target_sizes is None else target_sizes[i]
            probabilities = outputs.class_queries_logits[i].float().softmax(-1)
            yield probabilities, outputs.masks_queries_logits[i].float(), extent, (int(size[0]), int(size[1]))

    @torch.no_grad()
    def post_process_panoptic_segmentation(
        self,
        outputs,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        working_bytes: int = WORKING_BYTES,
    ) -> list[dict[str, Any]]:
        """
        One segment per pixel. Queries of "no segment", or less sure of their class than `threshold`, are dropped; a
        pixel goes to the query with the largest product of class and mask probability; a query that gets no more than
        `overlap_mask_area_threshold` of the area of its own mask (probabilities from `mask_threshold` on) is dropped,
        and its pixels with it; so are pixels that lie outside of the mask of the query they went to.

        Args:
            outputs ([`SparUniversalSegmentationOutput`]).
            threshold, mask_threshold, overlap_mask_area_threshold (`float`, *optional*).
            label_ids_to_fuse (`Collection[int]`, *optional*):
                Classes whose segments become one; those of the image processor by default.
            target_sizes (`Sequence[tuple[int, int]]`, *optional*):
                Height and width of each image, `original_sizes` of the inputs; by default that of the masks.
            working_bytes (`int`, *optional*, defaults to 64 MiB):
                Bound on the largest buffer of a tile.

        Returns:
            Per image a dict: **segmentation**, `(height, width)` int32, the segment of each pixel, 0 where there is none;
            **segments_info**, a list of dicts `id` (from 1), `label_id`, `was_fused`, `score` (the best of those fused).

        Raises:
            ValueError: outputs of another model; another number of sizes than of images.

        Source: `Mask2FormerImageProcessorPil` in transformers. As in the code of the paper (arXiv 2112.01527) and unlike
        there, the mask's own area is that of the mask, not of its product with the score, pixels outside of every mask stay
        without a segment, and fused segments are listed once.
        """
        fuse = set((self.label_ids_to_fuse if label_ids_to_fuse is None else label_ids_to_fuse) or ())
        results = []
        for probabilities, logits, extent, size in self._images(outputs, target_sizes):
            scores, labels = probabilities.max(-1)
            kept = ((labels < probabilities.shape[-1] - 1) & (scores > threshold)).nonzero().flatten()
            scores, labels, queries = scores[kept], labels[kept], len(kept)
            segments: list[dict[str, Any]] = []
            segmentation = torch.zeros(size, dtype=torch.int32, device=logits.device)
            if not queries:
                results.append({"segmentation": segmentation, "segments_info": segments})
                continue
            own = torch.zeros(queries, dtype=torch.long, device=logits.device)
            won, left = torch.zeros_like(own), torch.zeros_like(own)
            for rows, tile in mask_tiles(logits[kept], extent, size, queries, working_bytes):
                covered = tile.sigmoid_() >= mask_threshold
                own += covered.flatten(1).sum(1)
                owner = tile.mul_(scores[:, None, None]).argmax(0)
                won += torch.bincount(owner.flatten(), minlength=queries)
                inside = covered.gather(0, owner[None])[0]
                left += torch.bincount(owner[inside], minlength=queries)
                segmentation[rows] = torch.where(inside, owner, queries).int()
            valid = (left > 0) & (won > overlap_mask_area_threshold * own)
            fused: dict[int, dict[str, Any]] = {}
            ids = torch.zeros(queries + 1, dtype=torch.int32)  # the last is of pixels outside of every mask
            for query in valid.nonzero().flatten().tolist():
                label, score = int(labels[query]), round(float(scores[query]), 6)
                if label in fused:
                    segment = fused[label]
                    segment["score"] = max(segment["score"], score)
                else:
                    segment = {"id": len(segments) + 1, "label_id": label, "was_fused": label in fuse, "score": score}
                    segments.append(segment)
                if label in fuse:
                    fused[label] = segment
                ids[query] = segment["id"]
            results.append({"segmentation": ids.to(logits.device)[segmentation.long()], "segments_info": segments})
        return results

    @torch.no_grad()
    def post_process_instance_segmentation(
        self,
        outputs,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
        working_bytes: int = WORKING_BYTES,
    ) -> list[dict[str, Any]]:
        """
        Masks that may overlap: the best pairs of query and class, as many as there are queries, whose class probability
        times mean mask probability reaches `threshold`. Where masks overlap, the map shows the best.

        Args:
            outputs, threshold, mask_threshold, target_sizes, working_bytes:
                As of `post_process_panoptic_segmentation`.
            overlap_mask_area_threshold (`float`, *optional*):
                Without effect, as in transformers; pipelines pass it.
            return_coco_annotation (`bool`, *optional*, defaults to `False`):
                Whether **segmentation** is a list with the run-length encoding of each segment of `segments_info`: start
                (from 1) and length of its runs on the map, row by row; empty where better ones hide it.
            return_binary_maps (`bool`, *optional*, defaults to `False`):
                Whether **segmentation** is all masks, `(segments, height, width)` bool. That is the caller's memory.

        Returns:
            Per image a dict: **segmentation**, `(height, width)` int32, -1 where there is no segment; **segments_info**, a
            list of dicts `id` (from 0, best first), `label_id`, `was_fused` (`False`), `score`.

        Raises:
            ValueError: both forms asked for; outputs of another model; another number of sizes than of images.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("Ask for `return_coco_annotation` or for `return_binary_maps`, not for both.")
        results = []
        for probabilities, logits, extent, size in self._images(outputs, target_sizes):
            classes = probabilities.shape[-1] - 1
            scores, pairs = probabilities[:, :-1].flatten().topk(min(len(logits), len(logits) * classes))
            queries, labels = pairs // classes, pairs % classes
            # cells beyond the image are padding
            masks = logits[:, : math.ceil(extent[0]), : math.ceil(extent[1])].sigmoid().flatten(1)
            inside = masks >= mask_threshold
            quality = (masks * inside).sum(1) / inside.sum(1).clamp(min=1)
            scores, order = (scores * quality[queries]).sort(descending=True, stable=True)
            order = order[scores >= threshold]
            queries, labels, scores = queries[order], labels[order], scores[: len(order)]
            segmentation = torch.full(size, -1, dtype=torch.int32, device=logits.device)
            area = torch.zeros(len(order), dtype=torch.long, device=logits.device)
            shape = (len(order) if return_binary_maps else 0, *size)
            binary = torch.zeros(shape, dtype=torch.bool, device=logits.device)
            if len(order):
                for rows, tile in mask_tiles(logits[queries], extent, size, len(order), working_bytes):
                    covered = tile.sigmoid_() >= mask_threshold
                    area += covered.flatten(1).sum(1)
                    best = covered.int().argmax(0).int()  # the first of the largest: the best that covers the pixel
                    segmentation[rows] = torch.where(covered.any(0), best, -1)
                    if return_binary_maps:
                        binary[:, rows] = covered
            # masks without a pixel of the image are left out, and the numbers close up
            present = area > 0
            ids = torch.cumsum(present, 0).int() - 1
            if len(order):
                segmentation = torch.where(segmentation < 0, segmentation, ids[segmentation.clamp(min=0).long()])
            segments = [
                {"id": i, "label_id": int(labels[k]), "was_fused": False, "score": round(float(scores[k]), 6)}
                for i, k in enumerate(present.nonzero().flatten().tolist())
            ]
            form: Any = segmentation
            if return_coco_annotation:
                shown = segmentation.cpu().numpy()
                form = [[int(n) for n in binary_mask_to_rle(shown == segment["id"])] for segment in segments]
            elif return_binary_maps:
                form = binary[present]
            results.append({"segmentation": form, "segments_info": segments})
        return results

    @torch.no_grad()
    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        working_bytes: int = WORKING_BYTES,
    ) -> list[torch.Tensor]:
        """
        The class of every pixel: the largest sum over queries of class probability times mask probability.

        Args:
            outputs, target_sizes, working_bytes: as of `post_process_panoptic_segmentation`.

        Returns:
            Per image `(height, width)`, int64.

        Raises:
            ValueError: outputs of another model; another number of sizes than of images.
        """
        results = []
        for probabilities, logits, extent, size in self._images(outputs, target_sizes):
            classes = probabilities[:, :-1]
            labels = torch.empty(size, dtype=torch.long, device=logits.device)
            for rows, tile in mask_tiles(logits, extent, size, max(classes.shape), working_bytes):
                # (queries, classes), (queries, rows, width) -> (classes, rows, width)
                labels[rows] = torch.einsum("qc,qrw->crw", classes, tile.sigmoid_()).argmax(0)
            results.append(labels)
        return results


__all__ = ["SparUniversalImageProcessorPil"]
