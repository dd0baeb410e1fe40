"""
Compute the teacher's feature maps once: distillation with `--teacher_mode cached` then reads them and runs no window.

Every image gets `--views` augmented views, drawn as distillation draws them. Maps are stored as bfloat16 in shards with
checksums; `manifest.json` states model, window, stride, images and views. A killed run goes on with the same command:
finished shards are kept, and damaged ones made anew.

    accelerate launch training/cache_teacher.py --model BASE --images IMAGES --output CACHE --views 4
    accelerate launch training/cache_teacher.py --model BASE --images IMAGES --output CACHE --preset spar

The second draws one view of each image as published; `distill --preset spar --teacher_mode cached --teacher_cache CACHE`
then is the published training, which runs the teacher once.
"""

import datetime
import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors.torch import save
from tqdm.auto import tqdm

from spar_hf import SlidingWindowTeacher, SparImageProcessorPil, SparVisionModel
from spar_hf.data.augmentation import Views, draw_crop, view_generator
from spar_hf.data.order import split_images
from spar_hf.data.sources import Files, ImageSelection, list_files
from spar_hf.data.training_images import check_side
from spar_hf.distillation.models import make_teacher, sped_up
from spar_hf.distillation.options import WindowOptions
from spar_hf.distillation.presets import HELP_PRESET, PRESETS, REPLACES, with_preset
from spar_hf.distillation.recipes import given_options, to_arguments
from spar_hf.distillation.teacher_cache import (
    MANIFEST,
    MEND_SHARD,
    TeacherCache,
    check_setting,
    check_shard,
    pixel_settings,
    read_manifest,
    read_source,
    sha256,
    source_name,
)
from spar_hf.model.fingerprints import vision_fingerprint
from spar_hf.model.image_input import read_rgb, set_pixel_limit
from spar_hf.utils.atomic import finite_json
from spar_hf.utils.checkpoints import StopAtStep
from spar_hf.utils.devices import clock
from spar_hf.utils.errors import NotFinite, UsageError, as_usage_errors
from spar_hf.utils.fields import option, required
from spar_hf.utils.folders import Folder
from spar_hf.utils.options import (
    HELP,
    PRECISIONS,
    ComposedOptions,
    parse_dataclasses,
    require_one_of,
    require_positive,
)
from spar_hf.utils.processes import Processes, waiting
from spar_hf.utils.remote_files import is_remote
from spar_hf.utils.runs import RunFolder, end_run, start_accelerator
from spar_hf.utils.shards import ShardChoice
from spar_hf.utils.texts import json_text

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StorageOptions:
    """What is stored where."""

    output: str = required("Folder to write the cache to, also in a store: s3://bucket/cache.")
    preset: str | None = option(None, HELP_PRESET)
    views: int = option(1, "Augmented views per image.")
    shard_maps: int = option(16, "Maps per shard: at most these are computed again after a kill.")
    mixed_precision: str | None = option(None, HELP["mixed_precision"])
    seed: int = option(0, "Seed of the views: that of the distillation, to see what it would.")
    shard: str | None = option(None, HELP["shard"], metavar="I/N")
    shard_range: str | None = option(None, HELP["shard_range"], metavar="A:B")

    def __post_init__(self):
        require_positive(self, "views", "shard_maps")
        require_one_of(self, "mixed_precision", PRECISIONS)
        require_one_of(self, "preset", PRESETS)
        self.job = ShardChoice(self.shard, self.shard_range)


@dataclass(kw_only=True)
class CacheOptions(ComposedOptions):
    """
    All options of a teacher cache.

    Args:
        images ([`ImageSelection`]): folders and lists of images, and which of them are held out.
        views ([`Views`]): how views are drawn.
        teacher ([`WindowOptions`]): model and windows.
        storage ([`StorageOptions`]): output folder, views per image, shards.

    Example:

    ```python
    >>> options = CacheOptions.from_flat(model="base", images=["photos"], output="cache", views=4, jitter_probability=0.5)
    >>> options.storage.views, options.views.jitter_probability
    (4, 0.5)
    ```"""

    images: ImageSelection
    views: Views
    teacher: WindowOptions
    storage: StorageOptions

    def __post_init__(self):
        if self.views.fixed_views and self.storage.views > 1:
            raise UsageError("--views above 1 are all the same with --fixed_views (preset spar): leave one out.")
        if self.views.cutmix_probability or self.views.jitter_student_only:
            raise UsageError("A cache holds plain views: leave out --cutmix_probability and --jitter_student_only.")

    @classmethod
    def from_flat(cls, **values: Any) -> "CacheOptions":
        """
        Options under their names on the command line. A `preset` fills in what is not given and concerns a cache.

        Raises:
            UsageError: an unknown, missing or invalid option.
        """
        return super().from_flat(**cls.with_preset(cls.with_current_names(values)))

    @classmethod
    def with_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Options with those of their preset that concern a cache: views, windows and precision."""
        known = {name for part in cls.parts().values() for name in part.__dataclass_fields__}
        return {name: value for name, value in with_preset(values).items() if name in known or name in values}


def choose_images(options: ImageSelection) -> list[str]:
    """
    Paths and URLs of the images that distillation with the same options would train on, but for those that are skipped.

    Raises:
        UsageError: none is left, or something else than folders and lists is named.
    """
    sources = []
    for entry in options.images:
        paths = list_files(entry)
        if paths is None:
            raise UsageError(
                f"--images {entry}: a cache is made of folders of images, on disk or in stores, and of lists (.txt) of them."
            )
        sources.append(Files(paths))
    train, _ = split_images(sources, options.exclude, options.holdout_every)
    return [train.name(i) for i in range(len(train))]


def make_cache(options: CacheOptions) -> TeacherCache | None:
    """
    Compute what is missing of a cache, every process the next shard of this job that nobody has taken; all processes return
    the open cache, or `None` while shards of other jobs are missing.

    Raises:
        UsageError: options or files that do not fit, or a cache of another setting in the folder.
    """
    storage = options.storage
    patient = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))  # processes wait for the slowest at the end
    accelerator = start_accelerator(storage.mixed_precision, kwargs_handlers=[patient])
    if is_remote(storage.output):  # stores have no locks
        return compute_shards(options, accelerator)
    # jobs of an array write to one folder: the lock is that of the job
    job, output = storage.job, Path(storage.output)
    with RunFolder(accelerator, output / f"job-{job.name}" if job.is_part else output, file=job.is_part):
        return compute_shards(options, accelerator)


def compute_shards(options: CacheOptions, accelerator: Accelerator) -> TeacherCache | None:
    """What [`make_cache`] does while the folder is locked."""
    output = Folder(options.storage.output)
    paths = choose_images(options.images)
    set_pixel_limit(options.images.max_pixels)
    with as_usage_errors():
        model = SparVisionModel.from_backbone(options.teacher.model)
        image_processor = SparImageProcessorPil.from_backbone(options.teacher.model)
    teacher = make_teacher(model, options.teacher)
    setting = make_setting(options, output, teacher, image_processor, paths, accelerator.mixed_precision)
    start_folder(output, setting, accelerator, alone=not options.storage.job.is_part)

    teacher.to(accelerator.device)
    maker = ShardMaker(sped_up(teacher, options.teacher), image_processor, paths, options, accelerator)
    own = options.storage.job.pick(range(maker.count))
    wait = waiting(accelerator.wait_for_everyone)
    processes = Processes(accelerator.process_index, accelerator.num_processes, wait=wait)
    stop = StopAtStep(accelerator)
    taken = processes.hand_out([[number] for number in own])
    alone = processes.count == 1
    bar = {"desc": "shards", "total": len(own) if alone else None, "disable": not accelerator.is_main_process}
    for number in tqdm(taken, **bar):
        if finished_shard(output, number) is None:
            maker.make(number)
        if stop.first is not None:  # the other processes have other shards: they are not waited for
            logger.info("Stopped after a shard. Go on with the same command.")
            sys.exit(128 + stop.number)
    stop.restore()
    processes.wait()
    there = set(output.names())
    missing = [n for n in range(maker.count) if not {shard_name(n), record_name(n)} <= there]
    if accelerator.is_main_process and not missing:
        write_manifest(output, setting, maker.count)
    accelerator.wait_for_everyone()
    if missing:
        logger.info(
            "%d of %d shards are there. The others are of other jobs; `spar-hf verify %s` says which.",
            maker.count - len(missing),
            maker.count,
            output.url,
        )
        end_run(accelerator)
        return None
    cache = TeacherCache.open(output.url, model=model, window_size=teacher.window_size, stride=teacher.stride)
    if accelerator.is_main_process:
        report(cache)
    end_run(accelerator)
    return cache


def make_setting(
    options: CacheOptions,
    output: Folder,
    teacher: SlidingWindowTeacher,
    image_processor: SparImageProcessorPil,
    paths: list[str],
    mixed_precision: str,
) -> dict[str, Any]:
    """What the manifest states: first what distillation compares, then what the views follow from."""
    usual = pixel_settings(SparImageProcessorPil())  # which caches of earlier versions do not state
    return {
        "model": vision_fingerprint(teacher.model),
        "window_size": teacher.window_size,
        "stride": teacher.stride,
        "mixed_precision": mixed_precision,
        "teacher_dtype": options.teacher.teacher_dtype,
        "image_mean": np.broadcast_to(image_processor.image_mean, 3).tolist(),  # one number stands for three
        "image_std": np.broadcast_to(image_processor.image_std, 3).tolist(),
        **{name: value for name, value in pixel_settings(image_processor).items() if value != usual[name]},
        "photos": [source_name(path, output) for path in paths],  # the key of version 0.1
        "views": options.storage.views,
        **asdict(options.views),
        "seed": options.storage.seed,
        "image_range": options.images.image_range,
        "max_pixels": options.images.max_pixels,
        "min_side": options.images.min_side,
        "shard_maps": options.storage.shard_maps,
    }


def start_folder(output: Folder, setting: dict[str, Any], accelerator: Accelerator, alone: bool) -> None:
    """
    Write the manifest of an unfinished cache, and remove what killed runs left half written, unless other jobs may be
    writing. A finished cache stays finished.

    Raises:
        UsageError: the folder holds a cache of another setting, or its manifest is damaged.
    """
    finished = False
    if output.size(MANIFEST) is not None:
        # an earlier version drew views as the defaults say, and one took images of any size
        usual = asdict(Views()) | pixel_settings(SparImageProcessorPil()) | {"min_side": setting["min_side"]}
        manifest = read_manifest(output.url)
        check_setting(output.url, usual | manifest["setting"], usual | setting)
        finished = manifest["complete"]
    accelerator.wait_for_everyone()  # all have compared the old manifest before it is replaced
    if accelerator.is_main_process:
        for left in [] if output.is_remote or not alone else Path(output.url).glob("*.partial*"):
            left.unlink(missing_ok=True)
        if not finished:
            write_record(output, MANIFEST, {"complete": False, "setting": setting, "shards": []})
    accelerator.wait_for_everyone()


def write_record(output: Folder, name: str, value: Any) -> None:
    """Write a manifest or the record of a shard."""
    output.write(name, json_text(finite_json(value), indent=2).encode())


def write_manifest(output: Folder, setting: dict[str, Any], count: int) -> None:
    """
    Write the manifest of a cache whose shards are all there.

    Raises:
        UsageError: the record of a shard is damaged.
    """
    records = [read_record(output, number) for number in range(count)]
    write_record(output, MANIFEST, {"complete": True, "setting": setting, "shards": records})


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"maps-{number:05d}.safetensors"


def record_name(number: int) -> str:
    """The file that describes a shard; it is written last."""
    return f"{shard_name(number)}.json"


def read_record(output: Folder, number: int) -> dict[str, Any]:
    """
    The record of a shard.

    Raises:
        UsageError: it is damaged.
    """
    name = record_name(number)
    try:
        return json.loads(output.read(name))
    except ValueError as error:
        raise UsageError(f"{output.path(name)} is damaged: {error}. {MEND_SHARD}") from error


def finished_shard(output: Folder, number: int) -> dict[str, Any] | None:
    """The record of a shard that is there and undamaged."""
    if output.size(record_name(number)) is None:
        return None
    try:
        found = read_record(output, number)
        check_shard(output, found)
    except (UsageError, KeyError) as error:
        logger.warning("%s is made anew: %s", shard_name(number), error)
        return None
    return found


def verify_shards(output: Folder) -> tuple[list[dict[str, Any]], list[str], dict[str, str]]:
    """
    Read all shards of a cache, whose manifest may say that it is unfinished.

    Returns:
        The records of those that are whole, the names of those that are missing, and why others are damaged, by name.

    Raises:
        MissingFiles: there is no cache.
    """
    setting = read_manifest(output.url)["setting"]
    count = -(-len(setting["photos"]) * setting["views"] // setting["shard_maps"])
    whole: list[dict[str, Any]] = []
    missing: list[str] = []
    damaged: dict[str, str] = {}
    there = set(output.names())
    for number in range(count):
        name = shard_name(number)
        if not {name, record_name(number)} <= there:
            missing.append(name)
            continue
        try:
            found = read_record(output, number)
            check_shard(output, found)
            whole.append(found)
        except (UsageError, KeyError) as error:
            damaged[name] = str(error)
    return whole, missing, damaged


class ShardMaker:
    """
    Computes shards of a cache. View `i` is of image `i` modulo the number of images, with the random numbers that
    distillation has for the `i`-th image of its stream.

    Args:
        teacher: on its device.
        image_processor: normalises images.
        paths: paths and URLs of the images.
        options: of the cache.
        accelerator: of the run.
    """

    def __init__(
        self,
        teacher: SlidingWindowTeacher,
        image_processor: SparImageProcessorPil,
        paths: list[str],
        options: CacheOptions,
        accelerator: Accelerator,
    ):
        self.teacher, self.image_processor, self.paths = teacher, image_processor, paths
        self.options, self.accelerator, self.output = options, accelerator, Folder(options.storage.output)
        self.maps = len(paths) * options.storage.views
        self.count = -(-self.maps // options.storage.shard_maps)

    def make(self, number: int) -> dict[str, Any]:
        """Compute and write a shard, then its record; images that cannot be read are listed there."""
        maps: dict[str, torch.Tensor] = {}
        entries: list[dict[str, Any]] = []
        skipped: list[dict[str, str]] = []
        size = self.options.storage.shard_maps
        for index in range(number * size, min((number + 1) * size, self.maps)):
            path = self.paths[index % len(self.paths)]
            try:
                entry, feature_map = self.make_map(path, index)
            except UnreadableImage as error:
                skipped.append({"image": path, "reason": str(error)})
                continue
            maps[str(len(entries))] = feature_map
            entries.append(entry)
        data = save(maps)
        # workers outlive a launcher that is killed, and may write the same shard: each has a temporary file of its own
        self.output.write(shard_name(number), data)
        record = {
            "file": shard_name(number),
            "sha256": sha256(data),
            "bytes": len(data),
            "values": sum(feature_map.numel() for feature_map in maps.values()),
            "maps": entries,
            "map_sha256": [sha256(maps[str(row)].view(torch.uint8).numpy().tobytes()) for row in range(len(entries))],
            "skipped": skipped,
        }
        write_record(self.output, record_name(number), record)
        return record

    def make_map(self, path: str, index: int) -> tuple[dict[str, Any], torch.Tensor]:
        """
        The entry of a view in the shard's record, and the teacher's map of it: `(dim, height / patch, width / patch)`
        bfloat16.

        Raises:
            UnreadableImage: the file cannot be read.
            NotFinite: the features are no numbers.
            UsageError: the view is too large for the teacher's stride.
        """
        try:
            data = read_source(path)
            image = read_rgb(data if is_remote(path) else Path(path), self.options.images.image_range, urls=False)
            check_side(image, self.options.images.min_side)
        except Exception as error:  # each decoder raises its own kind, and no file may end the work of hours
            raise UnreadableImage(str(error)) from error
        key = path if self.options.views.fixed_views else index
        teacher, generator = self.teacher, view_generator(self.options.storage.seed, key)
        crop = draw_crop(image.size, teacher.window_size, teacher.config.patch_size, self.options.views, generator)
        pixels = self.image_processor(crop.apply(image), do_resize=False, return_tensors="pt")["pixel_values"]
        with self.accelerator.autocast(), as_usage_errors():
            features = teacher(pixels.to(self.accelerator.device)).feature_map
        if not features.isfinite().all():
            raise NotFinite(f"The features of {path} are not finite. Use another --mixed_precision or --teacher_dtype.")
        file = {"image": source_name(path, self.output), "bytes": len(data), "sha256": sha256(data)}
        return file | {"crop": crop.record}, features[0].to("cpu", torch.bfloat16).contiguous()


class UnreadableImage(Exception):
    """An image that is listed and skipped."""


def report(cache: TeacherCache, most: int = 200) -> None:
    """
    Log what a cache holds, its size beside float32, and how fast it is read.

    Raises:
        UsageError: it is empty.
    """
    skipped = [skip for shard in cache.shards for skip in shard["skipped"]]
    for skip in skipped:
        logger.warning("Skipped %s: %s", skip["image"], skip["reason"])
    if not len(cache):
        raise UsageError("--images: no image could be read, so the cache is empty; the reasons are above.")
    stored, values = (sum(shard[key] for shard in cache.shards) for key in ("bytes", "values"))
    logger.info(
        "%d maps of %d images (%d views skipped): %.0f KiB per map, %.2f times smaller than float32; read: %.0f maps/s, "
        "%.1f/s with their images decoded",
        len(cache),
        cache.different_images,
        len(skipped),
        stored / len(cache) / 1024,
        4 * values / stored,
        reading_rate(cache.target, min(most, len(cache))),
        reading_rate(cache.__getitem__, min(most // 10, len(cache))),
    )


def reading_rate(read: Any, count: int) -> float:
    """Reads per second of the first `count` items."""
    start = clock("cpu")
    for index in range(count):
        read(index)
    return count / (clock("cpu") - start)


def main(args: list[str] | None = None) -> TeacherCache | None:
    """
    Make a cache as a command line says, by default that of this process, and return it; `None` while other jobs make shards.

    Raises:
        UsageError: invalid options, models or images.
    """
    args = sys.argv[1:] if args is None else args
    given = CacheOptions.with_current_names(given_options(args))
    filled = CacheOptions.with_preset({name: given[name] for name in ("preset", *REPLACES) if name in given})
    parts = parse_dataclasses(CacheOptions.parts().values(), to_arguments(filled) + args, __doc__, allow_abbrev=False)
    return make_cache(CacheOptions.from_parts(parts))
