"""
Train a panoptic head on the features of a SPAR model, or of any transformers backbone that SPAR reads.

Images and masks lie in a folder (`images/`, `masks/`, `classes.txt`). Its masks tell classes, not objects, so each connected
region of a countable class (`--things`) counts as one segment, and each other class of an image as one. With few images,
merge classes (`--merge_classes`). The backbone stays frozen unless `--train_backbone` says otherwise.

    accelerate launch training/panoptic.py --model DIR --dataset DATA --things 80 --output DIR
"""

import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from huggingface_hub import ModelCardData
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from spar_hf import SparForUniversalSegmentation, SparImageProcessorPil, SparUniversalImageProcessorPil
from spar_hf.data.order import split_held_out
from spar_hf.data.segmentation_sets import SegmentationSet, check_readable, open_folder
from spar_hf.distillation.optimisation import make_schedule
from spar_hf.distillation.trainable import choose_parameters, count_parameters
from spar_hf.heads.panoptic_options import FREE, PanopticData, PanopticModel, PanopticOptions, upgrade
from spar_hf.heads.panoptic_quality import measure_quality
from spar_hf.heads.segments import PanopticImages, first_item, has_segment, thing_classes
from spar_hf.model.fingerprints import vision_fingerprint
from spar_hf.utils.atomic import write_json, write_text, writing_folder
from spar_hf.utils.checkpoints import settings_of
from spar_hf.utils.devices import clock
from spar_hf.utils.errors import UsageError, as_usage_errors
from spar_hf.utils.launching import outlive_signals
from spar_hf.utils.model_cards import model_card, rows, short_name
from spar_hf.utils.runs import TrainingRun, start_accelerator
from spar_hf.utils.sample_record import split_as_before

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 64  # images from which mean and variance of the features are taken before training


def main(args: list[str] | None = None) -> Path | None:
    """The command; returns the folder of the model, or `None` where the run was stopped."""
    return PanopticTrainer(PanopticOptions.parse(args, __doc__)).run()


@dataclass
class PanopticState:
    """
    How far a training is.

    Attributes:
        step: optimizer steps done.
        running: sum of the losses since the last line of the log.
        before: the same at the end of the last step.
        curve: the measurements so far.
    """

    step: int = 0
    running: float = 0.0
    before: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)

    def end_step(self, skipped: bool) -> None:
        """Count a step; the loss of one that was skipped does not count."""
        self.step += 1
        self.running = self.before = self.before if skipped else self.running


class PanopticTrainer:
    """The training of a panoptic head: [`PanopticTrainer.run`] reads and checks images and models, and trains."""

    def __init__(self, options: PanopticOptions):
        self.options, self.output = options, Path(options.run.output)
        training = options.training
        # blocks after the last stage that the head reads get no gradient, for which DDP would wait
        unused = training.train_backbone != "none" and "features" not in options.model.out_features
        self.accelerator = start_accelerator(
            options.run.mixed_precision,
            options.run.seed,
            report_to=options.run.report_to,
            output=self.output,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )

    def run(self) -> Path | None:
        """
        Train; returns the folder of the best model, or `None` where Ctrl-C or SIGTERM stopped the run.

        Raises:
            UsageError: options, images, masks or an earlier run in the output folder do not fit.
            NotFinite: the training diverged. The best model so far is kept.
        """
        settings, result = settings_of(self.options, FREE), self.output / "model"
        with TrainingRun(self.accelerator, self.options.run, settings, upgrade, [result]) as self.training_run:
            self._prepare()
            self._begin()
            self._train()
            if self.accelerator.is_main_process:
                write_json(self.output / "curve.json", self.progress.curve)
            del self.wrapped, self.optimizer, self.schedule
        return None if self.training_run.stopped else result

    def _prepare(self) -> None:
        """Load and check everything."""
        options, accelerator = self.options, self.accelerator
        self.train_data, self.measured, self.things = open_data(options.data, self.training_run)
        stuff = sorted(set(range(len(self.train_data.labels))) - self.things)
        self.image_processor = load_image_processor(options.model.model, options.views.shortest_edge, stuff)
        self.model = build_model(options.model, self.train_data.labels).to(accelerator.device)
        self.training_run.check_start_weights(model=vision_fingerprint(self.model.vision_model))
        groups = parameter_groups(self.model, options)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        training = options.training
        self.optimizer: Any = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
        self.schedule: Any = make_schedule(
            training.lr_scheduler_type, self.optimizer, training.warmup_ratio, training.steps, accelerator
        )
        self.wrapped: Any
        self.wrapped, self.optimizer, self.schedule = accelerator.prepare(self.model, self.optimizer, self.schedule)
        self.images_per_step = accelerator.num_processes * training.gradient_accumulation_steps
        trained, total = count_parameters(self.model)
        logger.info(
            "%d images to train on, measured on %d%s; %.2f M of %.2f M parameters trained",
            len(self.train_data),
            len(self.measured),
            "" if options.data.holdout_every else " of them",
            trained / 1e6,
            total / 1e6,
        )

    def _begin(self) -> None:
        """Load the checkpoint of a resumed run, or take the statistics of the features for a new one."""
        run, state = self.training_run, self.training_run.state
        if state is None:
            self._calibrate()
        self.progress = PanopticState() if state is None else PanopticState(run.step, state["running"], state["curve"])
        held_out = self.measured.files if self.options.data.holdout_every else []
        run.track("spar-panoptic", self.record())
        run.begin(self.options.training.steps, {"train": self.train_data.files, "held_out": held_out})

    def _calibrate(self) -> None:
        """Take mean and variance of the features from some of the training images."""
        count = min(CALIBRATION_IMAGES, len(self.train_data))
        drawn = random.Random(self.options.run.seed).sample(range(len(self.train_data)), count)
        images = tqdm(drawn, desc="statistics of the features", disable=not self.accelerator.is_main_process)
        inputs = (self.image_processor(self.train_data.read_image(i), return_tensors="pt") for i in images)
        self.model.calibrate(tensors["pixel_values"].to(self.accelerator.device) for tensors in inputs)

    def _train(self) -> None:
        """The training loop, until the last step or a signal."""
        options, accelerator, progress, run = self.options, self.accelerator, self.progress, self.training_run
        steps, accumulated = options.training.steps, options.training.gradient_accumulation_steps
        loader = self._loader(run.step)
        bar = tqdm(initial=run.step, total=steps, disable=not accelerator.is_main_process, mininterval=5)
        start = clock(accelerator.device)
        progress.before = progress.running
        for number, inputs in enumerate(loader, start=run.step * accumulated):
            self._train_on(inputs, number)
            if not accelerator.sync_gradients:
                continue
            progress.end_step(run.bad_steps.last_bad)
            bar.update()
            if progress.step % options.run.log_steps == 0:
                seconds = clock(accelerator.device) - start
                self._log((progress.step - run.step) * self.images_per_step / seconds)
                bar.set_postfix(loss=f"{progress.running / options.run.log_steps:.3f}")
                progress.running = progress.before = 0.0
            if progress.step % options.run.eval_steps == 0 or progress.step == steps:
                self._measure()
            if run.after_step(
                progress.step, running=progress.running, curve=progress.curve, bad_steps=run.bad_steps.state
            ):
                break
        bar.close()

    def _loader(self, step: int) -> Any:
        """Training images from a step on. Image i of the stream depends on the seed and i alone, so any start will do."""
        options = self.options
        images = PanopticImages(
            self.train_data,
            self.things,
            options.data.min_region_area,
            options.model.num_queries,
            self.image_processor,
            options.views,
            options.run.seed,
        )
        numbers = range(step * self.images_per_step, options.training.steps * self.images_per_step)
        return self.accelerator.prepare(
            DataLoader(
                images,
                1,
                sampler=numbers,
                collate_fn=first_item,
                num_workers=options.run.workers,
                worker_init_fn=outlive_signals,
            )
        )

    def _train_on(self, inputs: dict[str, Any], number: int) -> None:
        """Forward and backward pass of the `number`-th image of this process; its loss is added to the progress."""
        accelerator, progress = self.accelerator, self.progress
        self.wrapped.train()
        self.model.vision_model.eval()  # DINOv3 jitters its positions in training mode
        self.model.feature_norm.eval()  # single images have no statistics worth following: it was calibrated before
        # the points of the loss depend on seed, process and image, so that a resumed run draws the same
        seed = f"points-{self.options.run.seed}-{accelerator.process_index}-{number}"
        torch.manual_seed(random.Random(seed).getrandbits(62))
        with accelerator.accumulate(self.wrapped):
            with accelerator.autocast():
                loss = self.wrapped(**inputs).loss
            progress.running += float(loss.detach()) / self.options.training.gradient_accumulation_steps
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self.parameters, 1.0)
                bad = self.training_run.bad_steps.is_bad(progress.step + 1, progress.running - progress.before, norm)
                if not bad or accelerator.scaler is not None:
                    self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def _log(self, images_per_second: float) -> None:
        """A line of the log: the mean loss since the last one, and the speed."""
        progress, run = self.progress, self.training_run
        loss = run.bad_steps.mean(progress.running, self.options.run.log_steps)
        row = {"step": progress.step, "loss": loss, "learning_rate": self.schedule.get_last_lr()[0]}
        run.log.write({**row, "images_per_second": round(images_per_second, 3)})

    def _measure(self) -> None:
        """Measure the model, and write it if it is the best so far."""
        options, curve, step = self.options, self.progress.curve, self.progress.step
        quality = measure_quality(
            self.model,
            self.image_processor,
            self.measured,
            self.things,
            options.data.min_region_area,
            options.run.segment_threshold,
            self.accelerator,
        )
        curve.append({"step": step, **quality})
        logger.info("step %d: %s", step, quality)
        self.accelerator.log(quality, step=step)
        if self.accelerator.is_main_process and quality["pq"] == max(point["pq"] for point in curve):
            self._save(curve)

    def _save(self, curve: list[dict[str, Any]]) -> None:
        """Write a `from_pretrained` folder with its card."""
        record = self.record() | {"quality": curve[-1], "curve": curve}
        with writing_folder(self.output / "model") as temporary:
            self.model.save_pretrained(temporary)
            self.image_processor.save_pretrained(temporary)
            write_text(temporary / "README.md", make_card(self.output.name, self.options.run.segment_threshold, record))

    def record(self) -> dict[str, Any]:
        """How the head is trained, for its card and the trackers."""
        data, views, training = self.options.data, self.options.views, self.options.training
        return {
            "model": short_name(self.options.model.model),
            "dataset": short_name(data.dataset),
            "images": len(self.train_data),
            "held_out": len(self.measured) if data.holdout_every else 0,
            "classes": short_name(data.merge_classes) if data.merge_classes else "classes.txt",
            "things": f"{len(self.things)} of {len(self.train_data.labels)} classes",
            "min_area": data.min_region_area,
            "train_backbone": training.train_backbone,
            "steps": training.steps,
            "images_per_step": self.images_per_step,
            "shortest_edge": views.shortest_edge,
            "scale": [views.min_scale, views.max_scale],
            "learning_rate": training.learning_rate,
            "weight_decay": training.weight_decay,
            "seed": self.options.run.seed,
        }


def open_data(options: PanopticData, run: TrainingRun) -> tuple[SegmentationSet, SegmentationSet, set[int]]:
    """
    Images to train on, images to measure on, and the numbers of the countable classes; all files are read once. What a run
    that is resumed held out stays held out.

    Raises:
        UsageError: images or masks do not fit, or none of them has a segment.
    """
    folder = open_folder(options.dataset, options.merge_classes).filter(options.include, options.exclude)
    folder = folder.read_as(options)
    things = thing_classes(options.things, folder.labels)
    train, measured = split_data(folder, options)
    names = [*train.files, *(measured.files if options.holdout_every else [])]
    earlier = run.earlier_samples(names)
    if earlier is not None and options.holdout_every:
        kept, held_out = split_as_before(folder.files, earlier["held_out"])
        train, measured = folder.select(kept[: options.limit]), folder.select(held_out)
    check_readable(train, run.accelerator)
    if options.holdout_every:
        check_readable(measured, run.accelerator)
    for data, purpose in ((train, "trained"), (measured, "measured")):
        if not has_segment(data, things, options.min_region_area):
            raise UsageError(f"No mask that is {purpose} on has a segment; check --things and --min_region_area.")
    return train, measured, things


def split_data(data: SegmentationSet, options: PanopticData) -> tuple[SegmentationSet, SegmentationSet]:
    """
    Images to train on, and images to measure on: the held-out ones, or with `--holdout_every 0` those trained on.

    Raises:
        UsageError: one of the two would be empty.
    """
    train, held_out = split_held_out(len(data), options.holdout_every)
    train = train[: options.limit]
    if not train:
        raise UsageError("No image is left to train on; check --include, --exclude and --holdout_every.")
    if options.holdout_every and not held_out:
        raise UsageError(
            f"Of {len(data)} images --holdout_every {options.holdout_every} holds out none. Give a smaller number, or 0 to "
            "measure on the images trained on."
        )
    return data.select(train), data.select(held_out or train)


def load_image_processor(model: str, shortest_edge: int, stuff: list[int]) -> SparUniversalImageProcessorPil:
    """The model's own image processor, at the size of this training."""
    with as_usage_errors():
        source = SparImageProcessorPil.from_backbone(model)
    own = {"do_resize": True, "size": {"shortest_edge": shortest_edge}, "label_ids_to_fuse": stuff}
    return SparUniversalImageProcessorPil.from_dict(source.to_dict() | own)


def build_model(options: PanopticModel, classes: tuple[str, ...]) -> SparForUniversalSegmentation:
    """
    A new head on the backbone.

    Raises:
        UsageError: the backbone cannot be loaded, or lacks a stage of `out_features`.
    """
    with as_usage_errors():
        return SparForUniversalSegmentation.from_spar(
            options.model,
            out_features=options.out_features,
            id2label=dict(enumerate(classes)),
            hidden_dim=options.hidden_dim,
            decoder_layers=options.decoder_layers,
            num_queries=options.num_queries,
            train_num_points=options.train_num_points,
        )


def parameter_groups(model: SparForUniversalSegmentation, options: PanopticOptions) -> list[dict[str, Any]]:
    """
    The head at its learning rate, and what is trained of the backbone at its own; the rest is frozen.

    Raises:
        UsageError: all blocks to train come after the last stage that the head reads.
    """
    training = options.training
    model.vision_model.requires_grad_(False)
    head = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": head, "lr": training.learning_rate}]
    if training.train_backbone != "none":
        check_blocks_are_read(options, model.vision_model.config.num_hidden_layers)
        backbone = choose_parameters(model.vision_model, training.train_backbone)
        groups.append({"params": backbone, "lr": training.backbone_learning_rate})
    return groups


def check_blocks_are_read(options: PanopticOptions, blocks: int) -> None:
    """
    Raises:
        UsageError: `--train_backbone` is a number of last blocks, and the head reads nothing that one of them makes.
    """
    stages, last = options.model.out_features, options.training.train_backbone
    if "features" in stages or not last.isdecimal():
        return
    read = max(int(stage.removeprefix("stage")) if stage != "stem" else 0 for stage in stages)
    if blocks - int(last) >= read:
        remedy = f"{blocks - read + 1} or more, or none" if read else "none or all"
        raise UsageError(
            f"--train_backbone {last} trains blocks from {blocks - int(last) + 1} on, but the head reads none after block "
            f"{read}: nothing would be learned. Give {remedy}."
        )


def make_card(name: str, threshold: float, record: dict[str, Any]) -> str:
    """The model card of a panoptic head."""
    data = ModelCardData(
        library_name="transformers", pipeline_tag="image-segmentation", tags=["spar", "panoptic-segmentation"]
    )
    text = f"""
A panoptic head (`SparForUniversalSegmentation`: queries, masked-attention decoder and loss of Mask2Former) on the features
of `{record["model"]}`. The licences of that model and of the images apply to these weights.

```python
import spar_hf  # or trust_remote_code=True
from transformers import pipeline

segment = pipeline("image-segmentation", model="THIS FOLDER")
segment("image.jpg", threshold={threshold}, overlap_mask_area_threshold=0.8)
```

| training | |
|---|---|
{rows(record)}

`quality` is the panoptic (pq), segmentation (sq) and recognition quality (rq) in per cent at the size of the images: the
mean over the classes that occur, by torchmetrics.
"""
    return model_card(name, text, data)
