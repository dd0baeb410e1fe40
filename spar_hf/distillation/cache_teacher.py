"""
Compute the teacher's maps once: distillation then reads them (`training/teacher_cache.py`) and runs no window.

Every image gets `--views` augmented views, drawn as distillation draws them. Maps are stored as bfloat16 in shards with
checksums; `manifest.json` pins model, window, stride, images and crops. A killed run goes on with the same command: finished
shards are kept, and damaged ones made anew.

    accelerate launch training/cache_teacher.py --model BASE --images IMAGES --output CACHE --views 4
"""

import datetime
import json
import logging
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from spar_hf import SlidingWindowTeacher, SparImageProcessorPil, SparVisionModel
from spar_hf.data.segmentation_sets import list_images, read_image
from spar_hf.data.sources import augment, excluded
from spar_hf.distillation.options import VIEW, TeacherViews, check_positive
from spar_hf.distillation.teacher_cache import (
    MANIFEST,
    Crop,
    TeacherCache,
    check_setting,
    check_shard,
    read_manifest,
    seeded,
    sha256,
)
from spar_hf.utils.atomic import write_atomically, write_json
from spar_hf.utils.fingerprint import fingerprint
from spar_hf.utils.usage import check_precision, work_begins

logger = logging.getLogger("cache_teacher")


@dataclass(kw_only=True)
class Options(TeacherViews):
    """Options of the cache, beside those that distillation has as well."""

    model: str = field(metadata={"help": "Teacher: hub id or folder of a backbone of transformers or a SPAR model."})
    images: list[str] = field(metadata={"help": "Folders of images, no labels needed."})
    output: str = field(metadata={"help": "Folder to write the cache to."})
    views: int = field(default=1, metadata={"help": "Augmented views per image."})
    shard_maps: int = field(
        default=16, metadata={"help": "Maps per shard: what a killed process has to compute again at most."}
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16 for the teacher's forward passes."})

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "views shard_maps")


def choose_images(options: Options) -> list[Path]:
    """
    The images that distillation with the same options would train on.

    Raises:
        ValueError: none is left.
    """
    chosen = []
    for folder in options.images:
        paths = [path for path in list_images(folder) if not excluded(str(path), options)]
        chosen += [path for i, path in enumerate(paths) if (i + 1) % options.holdout_every]
    if not chosen:
        raise ValueError("No image is left; check --images, --exclude and --holdout_every.")
    return chosen


def shard_name(number: int) -> str:
    return f"maps-{number:05d}.safetensors"


def finished(output: Path, number: int) -> dict[str, Any] | None:
    """The record of a shard that is on disk and whole."""
    record = output / f"{shard_name(number)}.json"
    if not record.is_file():
        return None
    found = json.loads(record.read_text(encoding="utf-8"))
    try:
        check_shard(output / found["file"], found)
    except (FileNotFoundError, ValueError) as error:
        logger.warning("%s", error)
        return None
    return found


def make_shard(
    number: int,
    paths: list[Path],
    teacher: SlidingWindowTeacher,
    image_processor: SparImageProcessorPil,
    options: Options,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Compute the maps of a shard and write it, then its record; an image that cannot be read is listed and skipped."""
    output, maps, entries, skipped = Path(options.output), {}, [], []
    last = min((number + 1) * options.shard_maps, len(paths) * options.views)
    for index in range(number * options.shard_maps, last):
        path = paths[index % len(paths)]
        try:
            decoded, size, digest = read_image(path), path.stat().st_size, sha256(path)
        except Exception as error:  # each decoder raises its own kind, and no file may end the work of hours
            skipped.append({"image": str(path), "reason": str(error)})
            continue
        rng = seeded(options.seed, index)
        crop = Crop.draw(augment, decoded.size, teacher.window_size, teacher.config.patch_size, options, rng)
        if rng.random() < options.jitter_probability:
            crop.jitter = rng.getrandbits(32)
        pixels = image_processor(crop(decoded), do_resize=False, return_tensors="pt")["pixel_values"]
        with accelerator.autocast():
            features = teacher(pixels.to(accelerator.device)).feature_map
        maps[str(len(entries))] = features[0].to("cpu", torch.bfloat16).contiguous()
        image = os.path.relpath(path.resolve(), output.resolve())
        entries.append({"image": image, "bytes": size, "sha256": digest, "crop": asdict(crop)})
    path = output / shard_name(number)
    # workers outlive a launcher that is killed, and may be at the same shard: each has a temporary file of its own
    write_atomically(path, lambda temporary: save_file(maps, temporary))
    record = {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}
    values = sum(map.numel() for map in maps.values())
    record |= {"values": values, "maps": entries, "skipped": skipped}
    write_json(path.with_name(f"{path.name}.json"), record)
    return record


def make_cache(options: Options) -> TeacherCache:
    """Make what is missing of a cache, every process its share of the shards; all processes return the open cache."""
    patient = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))  # processes wait for the slowest at the end
    accelerator = Accelerator(mixed_precision=options.mixed_precision, kwargs_handlers=[patient])
    check_precision(accelerator)
    output, paths = Path(options.output), choose_images(options)
    model = SparVisionModel.from_backbone(options.model).eval().requires_grad_(False)
    image_processor = SparImageProcessorPil.from_backbone(options.model)
    teacher = SlidingWindowTeacher(model, options.window_size, options.stride, options.window_batch_size)
    # what distillation has to match, then what the views follow from
    setting = {
        "model": fingerprint(model),
        "window_size": teacher.window_size,
        "stride": teacher.stride,
        "mixed_precision": accelerator.mixed_precision,
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
        "photos": [os.path.relpath(path.resolve(), output.resolve()) for path in paths],
    }
    setting |= {name: getattr(options, name) for name in ("views", *VIEW, "seed", "shard_maps")}
    if (output / MANIFEST).is_file():
        check_setting(output, read_manifest(output)["setting"], setting)
    accelerator.wait_for_everyone()  # all have compared the old manifest before it is written anew
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        for left in output.glob("*.partial*"):  # by killed runs
            left.unlink(missing_ok=True)
        write_json(output / MANIFEST, {"complete": False, "setting": setting, "shards": []})
    accelerator.wait_for_everyone()
    teacher.to(accelerator.device)
    shards = -(-len(paths) * options.views // options.shard_maps)
    mine = range(accelerator.process_index, shards, accelerator.num_processes)
    work_begins()
    for number in tqdm(mine, desc="shards", disable=not accelerator.is_main_process):
        if finished(output, number) is None:
            make_shard(number, paths, teacher, image_processor, options, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        records = [json.loads((output / f"{shard_name(n)}.json").read_text(encoding="utf-8")) for n in range(shards)]
        write_json(output / MANIFEST, {"complete": True, "setting": setting, "shards": records})
    accelerator.wait_for_everyone()
    cache = TeacherCache.open(output, model=model, window_size=teacher.window_size, stride=teacher.stride)
    if accelerator.is_main_process:
        report(cache)
    accelerator.end_training()
    return cache


def report(cache: TeacherCache, most: int = 200) -> None:
    """Say what is there, how large it is beside float32, and how fast it reads."""
    skipped = [skip for shard in cache.shards for skip in shard["skipped"]]
    for skip in skipped:
        logger.warning("skipped %s: %s", skip["image"], skip["reason"])
    if not len(cache):
        raise ValueError("No image could be read, so the cache is empty; the reasons are above.")
    stored, values = (sum(shard[key] for shard in cache.shards) for key in ("bytes", "values"))
    count = min(most, len(cache))
    start = time.perf_counter()
    for index in range(count):
        cache.target(index)
    maps = count / (time.perf_counter() - start)
    count, start = min(count, 20), time.perf_counter()
    for index in range(count):
        cache[index]
    both = count / (time.perf_counter() - start)
    logger.info(
        "%d maps of %d images (%d views skipped): %.0f KiB an image, %.2f times smaller than float32; read: %.0f maps/s, "
        "%.1f/s with their images decoded",
        len(cache),
        len({cache.image(i) for i in range(len(cache))}),
        len(skipped),
        stored / len(cache) / 1024,
        4 * values / stored,
        maps,
        both,
    )


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()
    make_cache(options)
