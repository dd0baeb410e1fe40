"""Image processor of SPAR's mask-classification head: images and segmentation maps in, segments of the image out."""

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

from .image_processing_spar import SparImageProcessorPil, with_scores
from .results import check_dense_size
from .segmentation import WORKING_BYTES, upsampled_tiles

IGNORED = -1


class SparUniversalImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of [`SparUniversalImageProcessorPil`] beyond those of every image processor; described there."""

    ignore_index: int | None
    do_reduce_labels: bool
    label_ids_to_fuse: list[int] | None


def nearest(label_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a label map `(height, width)`: each new pixel gets the label under its centre."""
    rows, columns = (
        (np.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(size, label_map.shape, strict=True)
    )
    return label_map[rows[:, None], columns]


def mask_tiles(
    logits: torch.Tensor, extent: tuple[float, float], size: tuple[int, int], values: int, working_bytes: int
) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """
    Masks resized bilinearly from the padded cells `(queries, h, w)` to the image, tile by tile.

    Args:
        logits: of the masks.
        extent: height and width of the image in cells, without the padding.
        size: height and width of the image in pixels.
        values: float32 values that the caller holds per pixel of a tile.
        working_bytes: bound on them.

    Yields:
        Rows and columns of a tile in the image, and its logits `(queries, rows, columns)`.
    """
    grid_size = (logits.shape[1], logits.shape[2])
    tiles = upsampled_tiles(logits, max(1, values), 1, extent, size, logits.device, working_bytes, grid_size)
    for place, pixels in tiles:
        yield place, pixels.movedim(-1, 0)


class SparUniversalImageProcessorPil(SparImageProcessorPil):
    r"""
    Image processor of [`SparForUniversalSegmentation`]. It reads and resizes images as [`SparImageProcessorPil`], makes
    training labels from segmentation maps, and segments from the model's outputs.

    Args:
        ignore_index (`int`, *optional*, defaults to 255):
            Value of ignored pixels in a segmentation map: they belong to no segment.
        do_reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether classes count from 1 in a segmentation map and 0 is ignored: class 1 of the map is class 0 of the model.
        label_ids_to_fuse (`list[int]`, *optional*):
            Classes of which an image has at most one segment (sky, grass). Used by `post_process_panoptic_segmentation`
            where its caller names none, as `pipeline("image-segmentation")`.
        kwargs: options of [`SparImageProcessorPil`].

    A call takes images and `segmentation_maps`, one integer map `(height, width)` per image in its upright size (PIL
    images of mode L, P or I, arrays, tensors). Beside `pixel_values` and `original_sizes` it returns:
        - **mask_labels** (`list[torch.FloatTensor]`): masks of the segments, `(segments, height, width)`, in the size of
          `pixel_values`. Segments that vanish at this size are left out.
        - **class_labels** (`list[torch.LongTensor]`): their classes, `(segments,)`. The values of a map are classes, or
          segments if `instance_id_to_semantic_id` gives the class of every segment (one dict for all images, or a list
          of one dict per image).

    Raises:
        ValueError: as [`SparImageProcessorPil`]; maps of another number or size than the images, or not of integers; a
            segment without a class.

    Source: names and rules are those of `Mask2FormerImageProcessorPil` in transformers.

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
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
    do_reduce_labels = False
    label_ids_to_fuse = None

    def preprocess(
        self,
        images,
        segmentation_maps=None,
        instance_id_to_semantic_id: dict[int, int] | list[dict[int, int]] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Read, resize and normalise images, and make labels from segmentation maps; see the class."""
        inputs = super().preprocess(images, **kwargs)
        if segmentation_maps is None:
            return inputs
        if not isinstance(segmentation_maps, (list, tuple)):
            single = isinstance(segmentation_maps, Image.Image) or segmentation_maps.ndim == 2
            segmentation_maps = [segmentation_maps] if single else list(segmentation_maps)
        if len(segmentation_maps) != len(inputs["original_sizes"]):
            raise ValueError(
                f"{len(inputs['original_sizes'])} images but {len(segmentation_maps)} segmentation maps; give one per image."
            )
        ids: Any = instance_id_to_semantic_id
        ids = ids if isinstance(ids, list) else [ids] * len(segmentation_maps)
        ignore_index = kwargs.get("ignore_index", self.ignore_index)
        reduced = bool(kwargs.get("do_reduce_labels", self.do_reduce_labels))
        ignored = [value for value in (ignore_index, 0 if reduced else None) if value is not None]
        inputs["mask_labels"], inputs["class_labels"] = [], []
        for pixels, size, segmentation_map, classes in zip(
            inputs["pixel_values"], inputs["original_sizes"], segmentation_maps, ids, strict=True
        ):
            label_map = np.asarray(segmentation_map)
            if label_map.shape != tuple(size) or not np.issubdtype(label_map.dtype, np.integer):
                raise ValueError(
                    f"A segmentation map must hold integers in the size of its upright image, {size[0]}×{size[1]}, got "
                    f"{label_map.dtype} of shape {label_map.shape}."
                )
            label_map = nearest(label_map, pixels.shape[-2:])
            # all that is ignored becomes one value that no class has
            label_map = np.where(np.isin(label_map, ignored), IGNORED, label_map.astype(np.int64))
            nameless = set(np.unique(label_map).tolist()) - set(classes) - {IGNORED} if classes is not None else ()
            if nameless:
                raise ValueError(
                    f"`instance_id_to_semantic_id` lacks the class of the segments {sorted(nameless)[:8]}."
                )
            masks, labels = convert_segmentation_map_to_binary_masks(label_map, classes, IGNORED)
            inputs["mask_labels"].append(torch.from_numpy(masks))
            inputs["class_labels"].append(torch.from_numpy(labels - reduced))
        return inputs

    @staticmethod
    def _images(
        outputs, target_sizes
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[float, float], tuple[int, int]]]:
        """Per image: class probabilities `(queries, classes + 1)`, mask logits, extent in cells, target size."""
        sizes = getattr(outputs, "mask_sizes", None)
        if sizes is None:
            raise ValueError("`outputs` have no `mask_sizes`: pass the outputs of SparForUniversalSegmentation.")
        if target_sizes is not None and len(target_sizes) != len(sizes):
            raise ValueError(
                f"{len(sizes)} images in `outputs` but {len(target_sizes)} `target_sizes`; give one per image."
            )
        for i, extent in enumerate(sizes.tolist()):
            size = [max(1, round(side)) for side in extent] if target_sizes is None else target_sizes[i]
            probabilities = outputs.class_queries_logits[i].float().softmax(-1)
            yield probabilities, outputs.masks_queries_logits[i].float(), tuple(extent), (int(size[0]), int(size[1]))

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
        Segments that do not overlap.

        A query is dropped if its class is "no segment" or has a probability of at most `threshold`. Every pixel goes to
        the query with the largest product of class and mask probability, and stays without a segment where that query's
        own mask (probabilities of at least `mask_threshold`) does not cover it. A query that wins at most
        `overlap_mask_area_threshold` of the area of its own mask is dropped with its pixels.

        Args:
            outputs ([`SparUniversalSegmentationOutput`]): outputs of the model.
            threshold, mask_threshold, overlap_mask_area_threshold (`float`, *optional*): see above.
            label_ids_to_fuse (`Collection[int]`, *optional*):
                Classes whose segments are fused into one; those of the image processor by default.
            target_sizes (`Sequence[tuple[int, int]]`, *optional*):
                Height and width of each image, `original_sizes` of the inputs; by default that of the masks.
            working_bytes (`int`, *optional*, defaults to 64 MiB):
                Bound on the largest buffer of a tile.

        Returns:
            Per image a dict: **segmentation**, `(height, width)` int32, the segment of each pixel, 0 where there is none;
            **segments_info**, a list of dicts `id` (from 1), `label_id`, `was_fused`, `score` (the best of those fused).

        Raises:
            ValueError: outputs of another model; another number of sizes than of images.

        Source: `Mask2FormerImageProcessorPil` in transformers. Three things follow the code of the paper (arXiv
        2112.01527) instead: a mask's own area is that of the mask, not of its product with the score; pixels outside
        every mask stay without a segment; fused segments are listed once.
        """
        fuse = set((self.label_ids_to_fuse if label_ids_to_fuse is None else label_ids_to_fuse) or ())
        results = []
        for probabilities, logits, extent, size in self._images(outputs, target_sizes):
            scores, labels = probabilities.max(-1)
            kept = ((labels < probabilities.shape[-1] - 1) & (scores > threshold)).nonzero().flatten()
            scores, labels = scores[kept], labels[kept]
            owner, own_area, won_area, left_area = self._assign_pixels(
                logits[kept], scores, extent, size, mask_threshold, working_bytes
            )
            valid = (left_area > 0) & (won_area > overlap_mask_area_threshold * own_area)
            ids, segments = self._list_segments(valid, labels, scores, fuse)
            results.append({"segmentation": ids.to(owner.device)[owner.long()], "segments_info": segments})
        return results

    @staticmethod
    def _assign_pixels(
        logits, scores, extent, size, mask_threshold: float, working_bytes: int
    ) -> tuple[torch.Tensor, ...]:
        """
        The query of every pixel `(height, width)`, int32, their number where no mask covers it. Per query, the areas of its
        mask, of the pixels it wins, and of those its mask covers.
        """
        queries = len(logits)
        owner = torch.full(size, queries, dtype=torch.int32, device=logits.device)
        own_area = torch.zeros(queries, dtype=torch.long, device=logits.device)
        won_area, left_area = torch.zeros_like(own_area), torch.zeros_like(own_area)
        for place, tile in mask_tiles(logits, extent, size, queries, working_bytes) if queries else ():
            covered = tile.sigmoid_() >= mask_threshold
            own_area += covered.flatten(1).sum(1)
            winner = tile.mul_(scores[:, None, None]).argmax(0)
            won_area += torch.bincount(winner.flatten(), minlength=queries)
            inside = covered.gather(0, winner[None])[0]
            left_area += torch.bincount(winner[inside], minlength=queries)
            owner[place] = torch.where(inside, winner, queries).int()
        return owner, own_area, won_area, left_area

    @staticmethod
    def _list_segments(valid, labels, scores, fuse: set[int]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """The segment of each query `(queries + 1,)`, 0 for dropped ones and pixels outside every mask, and their list."""
        segments: list[dict[str, Any]] = []
        fused: dict[int, dict[str, Any]] = {}
        ids = torch.zeros(len(valid) + 1, dtype=torch.int32)
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
        return ids, segments

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
        Masks that may overlap. The pairs of query and class with the largest class probability are taken, as many as there
        are queries, and kept if class probability times mean probability within the mask is at least `threshold`. Where
        masks overlap, the map shows the best.

        Args:
            outputs, threshold, mask_threshold, target_sizes, working_bytes:
                As in `post_process_panoptic_segmentation`.
            overlap_mask_area_threshold (`float`, *optional*):
                Without effect, as in transformers; pipelines pass it.
            return_coco_annotation (`bool`, *optional*, defaults to `False`):
                Whether **segmentation** is a list of run-length encodings, one per segment of `segments_info`: start (from
                1) and length of its runs in the map, row by row. Empty for segments hidden by better ones.
            return_binary_maps (`bool`, *optional*, defaults to `False`):
                Whether **segmentation** is the masks, `(segments, height, width)` bool.

        Returns:
            Per image a dict: **segmentation**, `(height, width)` int32, -1 where there is no segment; **segments_info**, a
            list of dicts `id` (from 0, best first), `label_id`, `was_fused` (`False`), `score`.

        Raises:
            ValueError: both forms at once; outputs of another model; another number of sizes than of images; masks of more
                than 1 GiB.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("Set only one of `return_coco_annotation` and `return_binary_maps`.")
        results = []
        for probabilities, logits, extent, size in self._images(outputs, target_sizes):
            scores, labels, queries = self._rank_instances(probabilities, logits, extent, mask_threshold)
            kept = scores >= threshold
            scores, labels, masks = scores[kept], labels[kept], logits[queries[kept]]
            segmentation = torch.full(size, -1, dtype=torch.int32, device=logits.device)
            area = torch.zeros(len(masks), dtype=torch.long, device=logits.device)
            shape = (len(masks) if return_binary_maps else 0, *size)
            instead = "return_coco_annotation=True, or smaller `target_sizes`"
            check_dense_size(f"Masks of {shape[0]} segments", math.prod(shape), size, instead)
            binary = torch.zeros(shape, dtype=torch.bool, device=logits.device)
            for place, tile in mask_tiles(masks, extent, size, len(masks), working_bytes) if len(masks) else ():
                covered = tile.sigmoid_() >= mask_threshold
                area += covered.flatten(1).sum(1)
                best = covered.int().argmax(0).int()  # the first of the largest: the best that covers the pixel
                segmentation[place] = torch.where(covered.any(0), best, -1)
                if return_binary_maps:
                    binary[:, place[0], place[1]] = covered
            # masks without a pixel of the image are left out, and the others numbered anew
            present = area > 0
            ids = torch.cumsum(present, 0).int() - 1
            if len(masks):
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

    @staticmethod
    def _rank_instances(probabilities, logits, extent, mask_threshold: float) -> tuple[torch.Tensor, ...]:
        """Scores, classes and queries of the most probable pairs of query and class, best first: three `(queries,)`."""
        classes = probabilities.shape[-1] - 1
        scores, pairs = probabilities[:, :-1].flatten().topk(min(len(logits), len(logits) * classes))
        # cells beyond the image are padding
        masks = logits[:, : math.ceil(extent[0]), : math.ceil(extent[1])].sigmoid().flatten(1)
        inside = masks >= mask_threshold
        quality = (masks * inside).sum(1) / inside.sum(1).clamp(min=1)
        scores, order = (scores * quality[pairs // classes]).sort(descending=True, stable=True)
        return scores, pairs[order] % classes, pairs[order] // classes

    @torch.no_grad()
    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        return_segmentation_scores: bool = False,
        working_bytes: int = WORKING_BYTES,
    ) -> list[Any]:
        """
        The class of every pixel: that with the largest sum over queries of class probability times mask probability.

        Args:
            outputs, target_sizes, working_bytes: as in `post_process_panoptic_segmentation`.
            return_segmentation_scores (`bool`, *optional*, defaults to `False`): whether to return the sums too.

        Returns:
            Per image `(height, width)`, int64. With scores, an output with this `segmentation` and `segmentation_scores`
            `(classes, height, width)`.

        Raises:
            ValueError: outputs of another model; another number of sizes than of images; scores of more than 1 GiB.
        """
        results = []
        for probabilities, logits, extent, size in self._images(outputs, target_sizes):
            classes = probabilities[:, :-1]
            if return_segmentation_scores:
                number, instead = classes.shape[1], "the segmentation alone, or smaller `target_sizes`"
                check_dense_size(f"Scores of {number} classes", 4 * number * math.prod(size), size, instead)
            labels = torch.empty(size, dtype=torch.long, device=logits.device)
            scores = logits.new_empty(classes.shape[1], *size) if return_segmentation_scores else None
            for place, tile in mask_tiles(logits, extent, size, max(classes.shape), working_bytes):
                # (queries, classes), (queries, rows, columns) -> (classes, rows, columns)
                sums = torch.einsum("qc,qrw->crw", classes, tile.sigmoid_())
                labels[place] = sums.argmax(0)
                if scores is not None:
                    scores[(slice(None), *place)] = sums
            results.append(with_scores(labels, scores))
        return results


__all__ = ["SparUniversalImageProcessorPil"]
