"""Panoptic quality (Kirillov et al., 2019) of a model on images with class masks."""

from typing import Any

import torch
from accelerate import Accelerator
from torchmetrics.detection import PanopticQuality
from tqdm.auto import tqdm

from spar_hf import SparUniversalImageProcessorPil
from spar_hf.data.segmentation_sets import SegmentationSet
from spar_hf.heads.segments import find_segments

COUNTS = ("iou_sum", "true_positives", "false_positives", "false_negatives")


@torch.no_grad()
def measure_quality(
    model: Any,
    image_processor: SparUniversalImageProcessorPil,
    data: SegmentationSet,
    things: set[int],
    min_area: float,
    threshold: float,
    accelerator: Accelerator,
) -> dict[str, float]:
    """
    Panoptic (pq), segmentation (sq) and recognition quality (rq) in per cent at the size of the images, by torchmetrics: the
    mean over all classes that occur, over things, and over stuff. Images are split over the processes.

    Args:
        model, image_processor: a panoptic model and its image processor.
        data, things: images and masks, and their countable classes.
        min_area: see [`find_segments`].
        threshold: class probability from which a predicted segment counts.
    """
    # torchmetrics does not count a missed segment if the prediction there is mostly ignored, but COCO's definition does.
    # So pixels that no predicted segment covers get one more class, whose own quality is left out.
    uncovered = len(data.labels)
    metric = PanopticQuality(
        things,
        set(range(uncovered)) - things | {uncovered},
        return_sq_and_rq=True,
        return_per_class=True,
        sync_on_compute=False,
    )  # on the CPU: it counts in float64, which Apple's GPUs have not
    model.eval()
    share = range(accelerator.process_index, len(data), accelerator.num_processes)
    for number in tqdm(share, desc="measuring", disable=not accelerator.is_main_process, leave=False):
        image, mask = data.read(number)
        inputs = image_processor(image, return_tensors="pt").to(accelerator.device)
        with accelerator.autocast():
            outputs = model(inputs["pixel_values"])
        found = image_processor.post_process_panoptic_segmentation(
            outputs, threshold=threshold, target_sizes=inputs["original_sizes"]
        )[0]
        found_classes = torch.tensor([uncovered] + [segment["label_id"] for segment in found["segments_info"]])
        prediction = found["segmentation"].cpu().long()
        segments, class_of = find_segments(mask, things, min_area)
        target = torch.from_numpy(segments).long()
        target_classes = torch.tensor([*class_of.values(), uncovered + 1])  # the last, read by -1, is no class
        metric.update(
            # (height, width) -> (1, height, width, 2): class and segment number
            torch.stack([found_classes[prediction], prediction], -1)[None],
            torch.stack([target_classes[target], target], -1)[None],
        )
    if accelerator.num_processes > 1:
        for count in COUNTS:
            setattr(metric, count, accelerator.reduce(getattr(metric, count).to(accelerator.device)).cpu())
    quality = metric.compute()[:uncovered] * 100  # (classes, 3), things first
    seen = (metric.true_positives + metric.false_positives + metric.false_negatives)[:uncovered] > 0
    is_thing = torch.arange(uncovered) < len(things)
    row: dict[str, float] = {}
    for suffix, group in (("", seen), ("_things", seen & is_thing), ("_stuff", seen & ~is_thing)):
        for name, values in zip(("pq", "sq", "rq"), quality[group].T, strict=True):
            if len(values):
                row[name + suffix] = round(float(values.mean()), 2)
    return {**row, "classes": int(seen.sum()), "images": len(data)}
