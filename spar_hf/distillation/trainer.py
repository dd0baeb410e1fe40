"""
Distil the sliding-window teacher of a backbone into a student of the same architecture that needs one pass.

The student starts as the teacher's encoder, sees whole images with its position table resampled, and regresses with the
mean squared error onto the teacher's features, un-normalised and without labels (SPAR, arXiv 2604.02252, section 3).

    accelerate launch training/distill.py --model BASE --images IMAGES --output DIR --preset spar
    accelerate launch --config_file training/configs/multi_gpu.yaml training/distill.py recipe.yaml --steps 20000
"""

import copy
import itertools
import json
import logging
import math
import random
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, broadcast_object_list, gather_object, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from spar_hf import SlidingWindowTeacher, SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor
from spar_hf.data.sources import (
    MapOrder,
    Sample,
    Skipped,
    SkippedList,
    StreamOrder,
    TrainingImages,
    as_it_is,
    open_sources,
    split_images,
)
from spar_hf.distillation.held_out import PICTURED, HeldOut, draw_curve, whole_images
from spar_hf.distillation.local_initialization import (
    find_place,
    fit_prior,
    keep_place,
    spread_positions,
    start_local,
    writers,
)
from spar_hf.distillation.losses import decision_loss, distillation_loss, error_weights
from spar_hf.distillation.options import RECORDED, VIEW, Options, parse_options
from spar_hf.distillation.student import (
    add_adapters,
    choose_parameters,
    finish_folder,
    load_model,
    mean_of_students,
    merge_adapters,
    save_adapter,
    save_student,
    share_frozen,
    short_name,
)
from spar_hf.distillation.targets import CachedImages, FullTarget, SampledTarget, Target
from spar_hf.distillation.teacher_cache import TeacherCache
from spar_hf.model.prompts import Vocabulary, embed_names
from spar_hf.utils.atomic import write_atomically, write_text
from spar_hf.utils.checkpoints import StopAtStep, cut_log, earlier_state, is_finished, load_checkpoint, save_checkpoint
from spar_hf.utils.usage import check_precision, work_begins

logger = logging.getLogger("distill")

UNREADABLE = 1000  # images in a row that cannot be read, after which something else must be wrong


class Distillation:
    """One run: what it is made of is made by `__init__` and checked there, [`Distillation.run`] trains."""

    def __init__(self, options: Options):
        self.options, self.output = options, Path(options.output)
        tracker = options.report_to
        if tracker == "auto":
            tracker = "tensorboard" if find_spec("tensorboard") else "none"
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=None if tracker == "none" else tracker,
            project_dir=None if tracker == "none" else options.output,
        )
        check_precision(self.accelerator)
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        logger.setLevel(logging.INFO if self.main else logging.WARNING)
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        state = earlier_state(self.output, options.resume, options.settings, self.accelerator.num_processes)
        self.state: dict[str, Any] = state or {"step": 0, "running": None, "curve": [], "after": None}
        self.curve: list[dict[str, Any]] = self.state["curve"]
        set_seed(options.seed)
        self.load_models()
        self.open_images()
        self.choose_trained()
        self.prepare()
        self.measure_before()

    def load_models(self) -> None:
        options = self.options
        self.model, self.student = load_model(options.model)
        # what the student will be saved with is loaded before any work, so that nothing lacks at the end
        two_towers = isinstance(self.model, SparForOpenVocabSegmentation)
        self.processor = (SparProcessor if two_towers else SparImageProcessorPil).from_backbone(options.model)
        self.image_processor = self.processor.image_processor if two_towers else self.processor
        encoder = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.teacher = SlidingWindowTeacher(encoder, options.window_size, options.stride, options.window_batch_size)
        self.teacher.to(self.device)
        if options.words and not two_towers:
            raise ValueError(f"--words needs a text tower, and {options.model} has none. Leave it out.")
        if options.words:
            words = sorted({name for vocabulary in options.words for name in Vocabulary.parse(vocabulary).all_names})
            self.texts = embed_names(self.model.to(self.device), self.processor.tokenizer, words, "short")
        if options.student:
            weights, extent = mean_of_students(options.student, self.student)
            self.student.load_state_dict(weights)
            self.set_extent(extent)

    def set_extent(self, extent: int | None) -> None:
        """How far the student's position table reaches; the model that is written has a configuration of its own."""
        for config in (self.model.config, self.student.config):
            config.position_extent = extent
            config.check_position_extent()

    def open_images(self) -> None:
        """The images in their order, what reads them, and what makes their targets."""
        options, accelerator = self.options, self.accelerator
        place = accelerator.process_index, accelerator.num_processes
        start = self.state["after"] and self.state["after"][accelerator.process_index]
        sources = open_sources(options)
        window, patch = self.teacher.window_size, self.student.config.patch_size
        self.images = TrainingImages(sources, self.image_processor, window, patch, options)
        self.order: StreamOrder | MapOrder
        if options.streaming:
            self.order, self.image_count = StreamOrder(sources[0], options, *place, start), None
            self.held_out_tickets = list(itertools.islice(self.order.held_out(), options.holdout_images))
        else:
            train, held_out = split_images(sources, options)
            self.train = train
            self.order, self.image_count = MapOrder(train, options.seed, *place, start), len(train)
            count = min(options.holdout_images, len(held_out))
            chosen = random.Random(options.seed).sample(range(len(held_out)), count)
            self.held_out_tickets = [held_out.ticket(i, i, []) for i in chosen]
            shown = random.Random(options.seed).sample(range(len(train)), min(16, len(train)))
            self.shown = [train.ticket(i, i, []) for i in shown]
        # the one place of the teacher's modes: a cache brings images with targets, the others make an image's target
        self.data: TrainingImages | CachedImages = self.images
        self.views = {name: getattr(options, name) for name in VIEW}
        self.target: Target = FullTarget(self.teacher)
        if options.teacher_mode == "cached":
            assert options.teacher_cache is not None
            cache = TeacherCache.open(
                options.teacher_cache,
                model=self.teacher.model,
                window_size=self.teacher.window_size,
                stride=options.stride,
            )
            self.data = CachedImages(cache, self.held_out_tickets)
            self.views = {name: cache.setting[name] for name in VIEW}
            self.order, self.image_count = MapOrder(self.data, options.seed, *place, start), len(self.data)
        if options.teacher_mode == "sampled":
            assert options.teacher_windows is not None
            self.target = SampledTarget(self.teacher, options.teacher_windows, options.seed, options.teacher_variant)

    def choose_trained(self) -> None:
        """What is trained, and what teacher and student can hold together."""
        options, encoder = self.options, self.teacher.model
        self.student.to("cpu")  # where --words has moved it
        place = find_place(self.student)  # of an earlier student that had a local start
        extent, held, window = options.position_extent, self.student.config.position_extent, self.teacher.window_size
        if extent is not None and held is None:
            self.set_extent(extent)  # refuses what no model could be loaded with
            spread_positions(self.student, place, extent, window)
        elif extent not in (None, held):
            start = (options.student or [options.model])[0]
            raise ValueError(f"--position_extent {extent}: the positions of {start} span {held} px. Leave it out.")
        if options.local_start is not None:
            squares = self.images.squares(self.shown, 2 * window)
            place = start_local(self.student, squares, options.local_start, window)
        if self.sharded and place is not None:
            raise ValueError("A local start mends whole weights after every step, and FSDP has parts. Launch with DDP.")
        if options.lora_rank is None:
            choose_parameters(self.student, options.train_layers, options.train_parts)
            self.trained = self.student
        else:
            self.trained = add_adapters(self.student, options)
        self.trained.to(self.device)
        self.place = None if place is None else place.to(self.device)
        self.place_writers = [] if place is None else [p for p in writers(self.student) if p.requires_grad]
        # frozen ones stay as they are, and may be the teacher's too; but --fit_prior scales them
        shared = 0 if self.sharded or options.fit_prior else share_frozen(self.trained, encoder)
        count = {p.requires_grad: 0 for p in self.trained.parameters()} | {True: 0}
        for parameter in self.trained.parameters():
            count[parameter.requires_grad] += parameter.numel()
        logger.info(
            "%.2f M of %.2f M parameters trained; %.2f M frozen ones are held once for teacher and student",
            count[True] / 1e6,
            sum(count.values()) / 1e6,
            shared / 1e6,
        )

    def prepare(self) -> None:
        """Optimizer and schedule, and all of it as accelerate wants it."""
        options, accelerator = self.options, self.accelerator
        self.images_per_step = accelerator.num_processes * options.gradient_accumulation_steps
        if options.steps is None:
            assert options.epochs is not None and self.image_count is not None
            self.steps = max(1, math.ceil(options.epochs * self.image_count / self.images_per_step))
        else:
            self.steps = options.steps
        if self.sharded:
            # the blocks: transformers' list names embeddings too, whose parts are called one by one
            blocks = self.student.backbone.blocks
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list({type(b).__name__: 0 for b in blocks})
        parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
        # accelerate steps the schedule once per process and optimizer step
        schedule = get_scheduler(
            options.lr_scheduler_type,
            optimizer,
            num_warmup_steps=int(options.warmup_ratio * self.steps) * accelerator.num_processes,
            num_training_steps=self.steps * accelerator.num_processes,
        )
        self.wrapped, self.optimizer, self.schedule = accelerator.prepare(self.trained, optimizer, schedule)
        # now: between a forward and its backward a sharded model shows other tensors, whose gradients nobody sees
        self.parameters = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        # deterministic: the student regresses, and dropout or RoPE jitter would only blur the target
        self.wrapped.eval()

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.sharded:  # all processes must pass
            return self.wrapped(pixel_values).feature_map
        # in its own precision, as the teacher: accelerate has put autocast around the model's own `forward`, not the class's
        return type(self.trained).forward(self.trained, pixel_values).feature_map

    def measure_before(self) -> None:
        """Held-out images under the full teacher, and the student's error there before any training."""
        options = self.options
        self.output.mkdir(parents=True, exist_ok=True)
        self.skipped = SkippedList(self.output / "skipped.jsonl")
        if self.main:
            self.skipped.start(options.resume)
        self.accelerator.wait_for_everyone()
        # the main process measures; a sharded model needs all, and whitening needs the maps everywhere
        here = self.main or self.sharded or bool(options.whiten)
        self.held_out = HeldOut(
            self.held_out_tickets if here else [], self.images, self.teacher, self.skipped, self.main
        )
        targets = self.held_out.targets
        if options.whiten and not targets:
            raise ValueError("--whiten measures the axes on held-out images, and there are none that can be read.")
        if options.whiten:
            self.weights = error_weights([target for _, target in targets], options.whiten)
        if options.fit_prior and not options.resume:
            if self.place is None:
                raise ValueError("--fit_prior needs a prior, and this student had no local start. Give --local_start.")
            if self.main:
                count = min(options.fit_prior, len(self.train))
                chosen = random.Random(options.seed).sample(range(len(self.train)), count)
                tickets = [self.train.ticket(i, i, []) for i in chosen]
                pairs = whole_images(tickets, self.images, self.teacher, self.skipped)
                logger.info("priors multiplied by %s", fit_prior(self.student, self.place, pairs))
            # to the last bit: processes that each fitted could round otherwise and drift apart
            for parameter in self.student.parameters():
                broadcast(parameter.data)
        self.before = self.state["before"] if options.resume else self.held_out_error()
        logger.info(
            "%s images to train on, %d held out; held-out error before: %s",
            self.image_count or "streamed",
            len(targets),
            self.before,
        )

    def record(self) -> dict[str, Any]:
        """What the written folder says of its making."""
        options = self.options
        record = {
            "teacher": short_name(options.model),
            "student": [short_name(student) for student in options.student],
            "window_size": self.teacher.window_size,
            "stride": self.teacher.stride,
            "teacher_windows": options.teacher_windows or "all",
            "images": [short_name(entry) for entry in options.images],
            "num_images": self.image_count or "streamed",
            "view_size": [self.views[name] for name in ("long_side", "short_side", "min_scale")],
            "steps": self.steps,
            "images_per_step": self.images_per_step,
            "mixed_precision": self.accelerator.mixed_precision,
            **{name: getattr(options, name) for name in RECORDED},
            **{name: self.views[name] for name in VIEW if name.endswith("_probability")},
        }
        if self.kept is not None:
            record["held_out"] = {
                "images": len(self.held_out.targets),
                "before": self.before,
                "after": self.kept,
                "curve": self.curve,
            }
        return record

    def loss(self, sample: Sample) -> torch.Tensor:
        """The loss of one image; adds the teacher's time to `teacher_seconds`."""
        options, moment = self.options, time.perf_counter()
        pixel_values = sample.pixel_values.to(self.device, non_blocking=True)
        with self.accelerator.autocast():
            if sample.target is not None:
                target, weight = sample.target.to(self.device).float(), None
            else:
                target, weight = self.target(pixel_values, sample.index)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # or the teacher's work would be counted where it is waited for
        self.teacher_seconds += time.perf_counter() - moment
        with self.accelerator.autocast():
            features = self.wrapped(pixel_values).feature_map
        features = features.float()
        if options.whiten:
            features, target = (torch.einsum("ij,bjhw->bihw", self.weights, x) for x in (features, target))
        loss = distillation_loss(features, target, weight)
        if options.words:
            loss = loss + options.words_weight * self.decision(features, target, weight)
        return loss

    def decision(
        self, features: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        return decision_loss(features, target, self.texts, self.student.config.dense_logit_scale, weight)

    def held_out_error(self, keep: int = 0) -> dict[str, float] | None:
        return self.held_out.error(self.features, keep, self.decision if self.options.words else None)

    @property
    def kept(self) -> dict[str, Any] | None:
        """The point of the student that is kept: of the least loss as trained on (whitening aside), on held-out images."""
        weight = self.options.words_weight
        return min(self.curve, key=lambda point: point["mse"] + weight * point.get("words", 0.0), default=None)

    def samples(self, loader: DataLoader):
        """The images that can be read, each after the time that was spent waiting for it."""
        failed, moment = 0, time.perf_counter()
        for item in loader:
            if isinstance(item, Skipped):
                self.skipped.add(item)
                failed += 1
                if failed == UNREADABLE:
                    raise ValueError(f"{UNREADABLE} images in a row cannot be read; {self.skipped.path} says why.")
                continue
            failed = 0
            self.wait_seconds += time.perf_counter() - moment
            yield item
            moment = time.perf_counter()

    def run(self) -> Path:
        """Train; returns the folder that was written."""
        options, accelerator = self.options, self.accelerator
        if accelerator.log_with:
            plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in self.record().items()}
            accelerator.init_trackers("spar-distillation", config=plain)
        if options.resume:
            load_checkpoint(accelerator, self.output)
        step = self.state["step"]
        running = self.state["running"][accelerator.process_index] if self.state["running"] else 0.0
        stop = StopAtStep(accelerator)
        if self.main:
            write_text(
                self.output / "recipe.yaml", yaml.safe_dump(asdict(options) | {"resume": False}, sort_keys=False)
            )
            if options.resume:
                cut_log(self.output / "log.jsonl", step)
            self.log_file = (self.output / "log.jsonl").open("a" if options.resume else "w", encoding="utf-8")
        loader = DataLoader(
            self.data,
            batch_size=None,  # tickets of single images
            sampler=self.order,
            num_workers=options.workers,
            collate_fn=as_it_is,
            generator=torch.Generator().manual_seed(options.seed),  # it would draw from the run's own random numbers
        )
        self.bar = tqdm(initial=step, total=self.steps, disable=not self.main, mininterval=5, unit="step")
        self.start, self.first, self.teacher_seconds, self.wait_seconds = time.perf_counter(), step, 0.0, 0.0
        stopped = False
        for sample in self.samples(loader) if step < self.steps else ():
            with accelerator.accumulate(self.wrapped):
                loss = self.loss(sample)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                if self.place is not None:
                    keep_place(self.place_writers, self.place)
                self.schedule.step()
                self.optimizer.zero_grad()
            running += float(loss.detach()) / options.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue
            step += 1
            self.bar.update()
            if step % options.log_steps == 0:
                self.log(step, running)
                running = 0.0
            pictured = options.picture_steps and step % options.picture_steps == 0
            if step % options.eval_steps == 0 or step == self.steps or pictured:
                self.evaluate(step, bool(pictured))
            stopped = stop.asked()
            if (step % options.save_steps == 0 and step < self.steps) or stopped:
                state = {
                    "running": gather_object([running]),
                    "after": gather_object([sample.after]),
                    "curve": self.curve,
                    "before": self.before,
                    "settings": options.settings,
                }
                folder = save_checkpoint(accelerator, self.output, step, **state)
            if stopped or step == self.steps:
                break
        stop.restore()
        self.bar.close()
        if stopped and step < self.steps:
            logger.info(
                "stopped after step %d; %s is complete. Go on with the same command and --resume.", step, folder
            )
        accelerator.wait_for_everyone()
        if self.main:
            self.log_file.close()
            if not (stopped and step < self.steps):
                self.finish()
        # before the process group: DDP's reducer, were it the last to hold that, would wait for gloo's thread with the
        # interpreter's lock held, and the thread for the lock
        self.wrapped, self.optimizer, self.schedule = accelerator.free_memory(
            self.wrapped, self.optimizer, self.schedule
        )
        accelerator.end_training()
        return self.options.folders[-1]

    def log(self, step: int, running: float) -> None:
        """A line of the log: the mean loss since the last one over all processes, speed, and where the time goes."""
        seconds = time.perf_counter() - self.start
        losses = gather_object([running])
        if not self.main:
            return
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else psutil.Process().memory_info().rss
        row = {
            "step": step,
            "loss": sum(losses) / len(losses) / self.options.log_steps,
            "learning_rate": self.schedule.get_last_lr()[0],
            "images_per_second": round((step - self.first) * self.images_per_step / seconds, 3),
            "teacher_share": round(self.teacher_seconds / seconds, 3),
            "wait_share": round(self.wait_seconds / seconds, 3),
            "memory_gib": round(memory / 2**30, 2),
            "skipped": self.skipped.count(),
        }
        self.log_file.write(json.dumps(row) + "\n")
        self.log_file.flush()
        self.bar.set_postfix_str(
            f"loss {row['loss']:.4f}, {row['images_per_second']:.2f} images/s, teacher {row['teacher_share']:.0%}, "
            f"waiting {row['wait_share']:.0%}"
        )
        self.accelerator.log(row, step=step)

    def evaluate(self, step: int, pictured: bool) -> None:
        """The held-out error, a picture if asked for, and the student written if it is the best so far."""
        point = None
        if error := self.held_out_error(PICTURED if pictured else 0):
            point = {"step": step, **error}
        # one process decides, or two that rounded otherwise would wait for each other
        (point,) = broadcast_object_list([point])
        if point is not None:
            self.curve.append(point)
            self.accelerator.log(
                {f"held_out_{name}": value for name, value in point.items() if name != "step"}, step=step
            )
        if self.main and pictured and point is not None:
            self.draw(step)
        # without held-out images the last student is the one kept
        if point is self.kept:
            self.save()
            kept = f"held-out error {point}, the least so far" if point else "written; nothing is held out"
            logger.info("step %d: %s", step, kept)

    def draw(self, step: int) -> None:
        picture = self.held_out.picture()
        write_atomically(self.output / "pictures" / f"step-{step:06d}.png", picture.save)
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                tracker.log_images({"image, teacher, student": np.asarray(picture)[None]}, step=step, **layout)

    def save(self) -> None:
        """Write the student as it is now. All processes must call it: a sharded one is gathered."""
        options = self.options
        state = self.accelerator.get_state_dict(self.wrapped)
        if not self.main:
            return
        if options.lora_rank is not None:
            save_adapter(self.trained, state, options, self.record(), self.output / "adapter")
        if options.merge:
            state = merge_adapters(state, self.trained, (options.student or [options.model])[0])
        if options.lora_rank is None or options.merge:
            save_student(self.model, self.processor, state, options, self.record(), self.output / "model")

    def finish(self) -> None:
        """The curve, and all that is known at the end, into the written folders."""
        draw_curve(self.output / "log.jsonl", self.curve, self.kept, self.output / "curve.png")
        pictures = [self.output / "curve.png"]
        best = self.steps if self.kept is None else self.kept["step"]
        drawn = self.output / "pictures" / f"step-{best:06d}.png"
        if drawn.is_file():
            pictures.append(drawn)
        for folder in self.options.folders:
            finish_folder(folder, self.options, self.record(), pictures)
        logger.info("%d images could not be read (skipped.jsonl)", self.skipped.count())


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # five lines for every checkpoint
    options = parse_options(sys.argv[1:])
    written = options.folders[-1]
    if options.resume and is_finished(Path(options.output), written, options.settings):
        logger.info("The run is complete, nothing is left to do: %s", written)
        return
    run = Distillation(options)
    work_begins()
    logger.info("written: %s", run.run())
