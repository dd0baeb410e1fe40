"""
Train a panoptic head on the features of a SPAR model, of its base, or of any backbone that SPAR reads.

Images and masks lie in a folder (`images/`, `masks/`, `classes.txt`). Its masks tell classes, not objects, so each connected
region of a countable class (`--things`) counts as one segment, and each other class of an image as one. With few images,
tell fewer classes apart (`--classes`). The backbone stays frozen unless `--train_backbone` says otherwise.

    accelerate launch training/panoptic.py --model DIR --data DATA --things 80 --output DIR
"""

import json
import logging
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from huggingface_hub import ModelCardData
from torch.utils.data import DataLoader
from torchmetrics.detection import PanopticQuality
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_scheduler

from spar_hf import SparForUniversalSegmentation, SparImageProcessorPil, SparUniversalImageProcessorPil
from spar_hf.data.segmentation_sets import SegmentationFolder, check_pairs, open_segmentation_folder, read_image
from spar_hf.distillation.options import check_positive
from spar_hf.distillation.student import choose_parameters, short_name
from spar_hf.heads.segments import PanopticImages, find_segments, only, thing_classes
from spar_hf.utils.atomic import write_json, write_text, writing_folder
from spar_hf.utils.checkpoints import StopAtStep, cut_log, earlier_state, load_checkpoint, save_checkpoint, settings_of
from spar_hf.utils.usage import check_precision, work_begins

logger = logging.getLogger("panoptic")

# what a resumed run may have otherwise: none of it changes what is learned
FREE = {"output", "resume", "workers", "save_steps", "report_to"}
CALIBRATION_IMAGES = 64  # images over which mean and variance of the features are taken before training


@dataclass
class Options:
    """Options of the training."""

    model: str = field(metadata={"help": "Hub id or folder of a SPAR model or a backbone of transformers."})
    data: str = field(metadata={"help": "Folder with images/, masks/ (8-bit PNG of class numbers) and classes.txt."})
    output: str = field(metadata={"help": "Folder to write to."})
    classes: str | None = field(
        default=None,
        metadata={
            "help": "JSON file {class: [line of classes.txt, ...]}: the classes told apart; what none names is void. "
            "E.g. training/configs/coco_supercategories.json. Default: each line of classes.txt is one."
        },
    )
    things: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Countable classes: names, or one number N for the first N (COCO: 80, its supercategories: 12)."
        },
    )
    min_area: float = field(
        default=0.001,
        metadata={
            "help": "Regions of countable classes below this share of the image are void, in training and measure."
        },
    )
    include: str = field(default="*", metadata={"help": "Shell pattern of the file stems read."})
    exclude: list[str] = field(default_factory=list, metadata={"help": "Shell patterns of file stems never read."})
    holdout_every: int = field(
        default=5,
        metadata={"help": "Each n-th image (sorted by name) is held out to measure on; 0 measures on training images."},
    )
    images: int | None = field(default=None, metadata={"help": "Train on the first so many images; on all by default."})
    shortest_edge: int = field(default=512, metadata={"help": "Shorter side of the images that the model sees."})
    min_scale: float = field(default=0.75, metadata={"help": "In training, times a factor drawn between this ..."})
    max_scale: float = field(default=1.25, metadata={"help": "... and this."})
    flip_probability: float = field(default=0.5, metadata={"help": "Chance of a horizontal flip."})
    steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Images per process and optimizer step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the head."})
    train_backbone: str = field(
        default="none", metadata={"help": "What is trained of the backbone: 'none', 'all' or a number of last blocks."}
    )
    backbone_learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of the backbone."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Name of a transformers schedule."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps with rising learning rate."})
    out_features: list[str] = field(
        default_factory=lambda: ["features"],
        metadata={"help": "Stages of the backbone that the head reads: features, stage1, ..."},
    )
    hidden_dim: int = field(default=256, metadata={"help": "Width of the head."})
    decoder_layers: int = field(default=4, metadata={"help": "Predictions of the decoder: its layers and one before."})
    num_queries: int = field(default=100, metadata={"help": "Segments per image at most."})
    train_num_points: int = field(default=12544, metadata={"help": "Points at which the loss of a mask is taken."})
    threshold: float = field(
        default=0.5, metadata={"help": "Class probability from which a segment counts when measuring."}
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16."})
    workers: int = field(default=1, metadata={"help": "Processes that decode images."})
    seed: int = field(default=0, metadata={"help": "Seed of head, order, augmentation and the points of the loss."})
    log_steps: int = field(default=20, metadata={"help": "Steps between lines of the log."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; the last two are kept."})
    eval_steps: int = field(
        default=500, metadata={"help": "Steps between measurements; OUTPUT/model is the one with the best quality."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in --output, as if never stopped."}
    )
    report_to: str | None = field(default=None, metadata={"help": "Tracker of accelerate, e.g. tensorboard or wandb."})

    def __post_init__(self):
        if self.train_backbone not in ("none", "all") and not (
            self.train_backbone.isdigit() and int(self.train_backbone) > 0
        ):
            raise ValueError(f"--train_backbone {self.train_backbone}: write 'none', 'all' or a number of last blocks.")
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError("--min_scale is above 0 and --max_scale not below it.")
        if self.holdout_every < 0 or self.holdout_every == 1:
            raise ValueError("--holdout_every is 0 or at least 2.")
        names = "shortest_edge steps gradient_accumulation_steps learning_rate backbone_learning_rate hidden_dim num_queries"
        check_positive(self, f"{names} decoder_layers train_num_points images log_steps save_steps eval_steps")
        for name in ("min_area", "flip_probability", "threshold", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie in 0 to 1.")


def split_pairs(folder: SegmentationFolder, options: Options) -> tuple[list, list]:
    """
    Pairs to train on, and pairs to measure on: the held-out ones, or those trained on with `--holdout_every 0`.

    Raises:
        ValueError: none of one kind is there.
    """
    every = options.holdout_every
    held_out = [pair for i, pair in enumerate(folder.pairs) if every and i % every == every - 1]
    train = [pair for i, pair in enumerate(folder.pairs) if not every or i % every != every - 1][: options.images]
    if not train:
        raise ValueError("No image is left to train on; check --images.")
    if every and not held_out:
        raise ValueError(
            f"Of {len(folder.pairs)} images --holdout_every {every} holds out none. Give a smaller one, or 0 to measure on "
            "the images trained on."
        )
    return train, held_out or train


@torch.no_grad()
def measure(
    model: SparForUniversalSegmentation,
    image_processor: SparUniversalImageProcessorPil,
    folder: SegmentationFolder,
    pairs: list,
    things: set[int],
    options: Options,
    accelerator: Accelerator,
) -> dict[str, float]:
    """
    Panoptic, segmentation and recognition quality in per cent, over all classes that occur, things and stuff, at the size of
    the images, by torchmetrics. Images are shared out among the processes.
    """
    # torchmetrics does not count a missed segment of which most is void in the prediction. COCO's definition counts it, so
    # what no segment covers is given to one more class, whose own quality is left out.
    nothing = len(folder.classes)
    metric = PanopticQuality(
        things,
        set(range(nothing)) - things | {nothing},
        return_sq_and_rq=True,
        return_per_class=True,
        sync_on_compute=False,
    ).to(accelerator.device)
    model.eval()
    for image, mask in pairs[accelerator.process_index :: accelerator.num_processes]:
        decoded = read_image(image)
        inputs = image_processor(decoded, return_tensors="pt").to(accelerator.device)
        with accelerator.autocast():
            outputs = model(inputs["pixel_values"])
        found = image_processor.post_process_panoptic_segmentation(
            outputs, threshold=options.threshold, target_sizes=inputs["original_sizes"]
        )[0]
        found_classes = torch.tensor([nothing] + [segment["label_id"] for segment in found["segments_info"]])
        prediction = found["segmentation"].cpu().long()
        segments, class_of = find_segments(folder.read_mask(mask, decoded.size[::-1]), things, options.min_area)
        target = torch.from_numpy(segments).long()
        target_classes = torch.tensor([*class_of.values(), nothing + 1])  # the last, an unknown class, is void's -1
        metric.update(
            # (height, width) -> (1, height, width, 2): class and number
            torch.stack([found_classes[prediction], prediction], -1)[None].to(accelerator.device),
            torch.stack([target_classes[target], target], -1)[None].to(accelerator.device),
        )
    for state in ("iou_sum", "true_positives", "false_positives", "false_negatives"):
        setattr(metric, state, accelerator.reduce(getattr(metric, state)))
    quality = metric.compute().cpu()[:nothing] * 100  # (classes, 3), things first
    seen = (metric.true_positives + metric.false_positives + metric.false_negatives).cpu()[:nothing] > 0
    is_thing = torch.arange(nothing) < len(things)
    row = {}
    for suffix, group in (("", seen), ("_things", seen & is_thing), ("_stuff", seen & ~is_thing)):
        for name, values in zip(("pq", "sq", "rq"), quality[group].T, strict=True):
            if len(values):
                row[name + suffix] = round(float(values.mean()), 2)
    return {**row, "classes": int(seen.sum()), "images": len(pairs)}


def save_model(model, image_processor, options: Options, record: dict, folder: Path) -> None:
    """Write a `from_pretrained` folder."""
    with writing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        image_processor.save_pretrained(temporary)
        write_text(temporary / "README.md", model_card(options, record))


def model_card(options: Options, record: dict) -> str:
    data = ModelCardData(
        library_name="transformers", pipeline_tag="image-segmentation", tags=["spar", "panoptic-segmentation"]
    )
    rows = "\n".join(f"| {key} | {value} |" for key, value in record.items())
    return f"""---
{data.to_yaml()}
---
# {Path(options.output).name}

A panoptic head (`SparForUniversalSegmentation`: queries, Mask2Former's masked-attention decoder and loss) on the features of
`{record["model"]}`. The licence of that model and of the images applies to these weights.

```python
import spar_hf  # or trust_remote_code=True
from transformers import pipeline

segment = pipeline("image-segmentation", model="THIS FOLDER")
segment("photo.jpg", threshold={options.threshold}, overlap_mask_area_threshold=0.8)
```

| training | |
|---|---|
{rows}

`quality` is panoptic (pq), segmentation (sq) and recognition quality (rq) in per cent at the size of the images, the mean
over the classes that occur, by torchmetrics.
"""


def load_image_processor(options: Options, fuse: list[int]) -> SparUniversalImageProcessorPil:
    """Mean and standard deviation of the model's own image processor, at the size of this training."""
    source = SparImageProcessorPil.from_backbone(options.model)
    return SparUniversalImageProcessorPil(
        image_mean=source.image_mean,
        image_std=source.image_std,
        size={"shortest_edge": options.shortest_edge},
        label_ids_to_fuse=fuse,
    )


def parameter_groups(model: SparForUniversalSegmentation, options: Options) -> list[dict]:
    """The head at its learning rate, and what is trained of the backbone at its own; the rest is frozen."""
    model.vision_model.requires_grad_(False)
    head = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": head, "lr": options.learning_rate}]
    if options.train_backbone != "none":
        backbone = choose_parameters(model.vision_model, options.train_backbone)
        groups.append({"params": backbone, "lr": options.backbone_learning_rate})
    return groups


def train(options: Options) -> Path:
    """Run the training; returns the folder of the model."""
    # blocks after the last stage that the head reads are given no gradient, for which DDP would wait
    unused = DistributedDataParallelKwargs(
        find_unused_parameters=options.train_backbone != "none" and "features" not in options.out_features
    )
    accelerator = Accelerator(
        kwargs_handlers=[unused],
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=options.report_to,
        project_dir=options.output if options.report_to else None,
    )
    check_precision(accelerator)
    set_seed(options.seed)
    output, settings = Path(options.output), settings_of(options, FREE)
    state = earlier_state(output, options.resume, settings, accelerator.num_processes)
    folder = open_segmentation_folder(options.data, options.include, options.exclude, options.classes)
    things = thing_classes(options.things, folder.classes)
    train_pairs, measured = split_pairs(folder, options)
    check_pairs(folder, [*train_pairs, *(measured if options.holdout_every else ())], accelerator)
    masks = (folder.read_mask(mask, read_image(image).size[::-1]) for image, mask in measured)
    if not any(find_segments(mask, things, options.min_area)[1] for mask in masks):
        raise ValueError("No mask that is measured on has a segment; check --things and --min_area.")
    image_processor = load_image_processor(options, sorted(set(range(len(folder.classes))) - things))
    model = SparForUniversalSegmentation.from_spar(
        options.model,
        out_features=options.out_features,
        id2label=dict(enumerate(folder.classes)),
        hidden_dim=options.hidden_dim,
        decoder_layers=options.decoder_layers,
        num_queries=options.num_queries,
        train_num_points=options.train_num_points,
    ).to(accelerator.device)
    groups = parameter_groups(model, options)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    # accelerate steps the schedule once per process and optimizer step
    schedule = get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=int(options.warmup_ratio * options.steps) * accelerator.num_processes,
        num_training_steps=options.steps * accelerator.num_processes,
    )
    wrapped, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    images_per_step = accelerator.num_processes * options.gradient_accumulation_steps
    logger.info(
        "%d images to train on, measured on %d%s; %.2f M of %.2f M parameters trained",
        len(train_pairs),
        len(measured),
        "" if options.holdout_every else " of them",
        sum(p.numel() for p in parameters) / 1e6,
        sum(p.numel() for p in model.parameters()) / 1e6,
    )
    record = {
        "model": short_name(options.model),
        "data": short_name(options.data),
        "images": len(train_pairs),
        "held_out": len(measured) if options.holdout_every else 0,
        "classes": short_name(options.classes) if options.classes else "classes.txt",
        "things": f"{len(things)} of {len(folder.classes)} classes",
        "min_area": options.min_area,
        "train_backbone": options.train_backbone,
        "steps": options.steps,
        "images_per_step": images_per_step,
        "shortest_edge": options.shortest_edge,
        "scale": [options.min_scale, options.max_scale],
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "seed": options.seed,
    }
    if options.report_to:
        accelerator.init_trackers("spar-panoptic", config=record)
    output.mkdir(parents=True, exist_ok=True)
    if state is not None:
        load_checkpoint(accelerator, output)
    else:
        state = {"step": 0, "running": 0.0, "curve": []}
        some = random.Random(options.seed).sample(train_pairs, min(CALIBRATION_IMAGES, len(train_pairs)))
        images = tqdm(some, desc="mean and variance of features", disable=not accelerator.is_main_process)
        model.calibrate(
            image_processor(read_image(image), return_tensors="pt")["pixel_values"].to(accelerator.device)
            for image, _ in images
        )
    step, running, curve = state["step"], state["running"], state["curve"]
    if accelerator.is_main_process:
        if options.resume:
            cut_log(output / "log.jsonl", step)
        log = (output / "log.jsonl").open("a" if options.resume else "w", encoding="utf-8")
    # image i of the endless stream is a function of the seed and i, so going on is starting at another i
    images = range(step * images_per_step, options.steps * images_per_step)
    dataset = PanopticImages(folder, train_pairs, things, image_processor, options)
    loader = accelerator.prepare(
        DataLoader(dataset, batch_size=1, sampler=images, collate_fn=only, num_workers=options.workers)
    )
    bar = tqdm(initial=step, total=options.steps, disable=not accelerator.is_main_process, mininterval=5)
    stop = StopAtStep(accelerator)
    work_begins()
    start, first = time.time(), step
    for number, inputs in enumerate(loader, start=step * options.gradient_accumulation_steps):
        wrapped.train()
        model.vision_model.eval()  # no jitter of positions in features that are read as they are
        model.feature_norm.eval()  # calibrated before: an image at a time has no statistics worth following
        # the points of the loss are a function of seed, process and image, whenever the run was resumed
        torch.manual_seed(random.Random(f"points-{options.seed}-{accelerator.process_index}-{number}").getrandbits(62))
        with accelerator.accumulate(wrapped):
            with accelerator.autocast():
                loss = wrapped(**inputs).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        running += float(loss.detach()) / options.gradient_accumulation_steps
        if not accelerator.sync_gradients:
            continue
        step += 1
        bar.update()
        if step % options.log_steps == 0:
            row = {
                "step": step,
                "loss": running / options.log_steps,
                "learning_rate": schedule.get_last_lr()[0],
                "images_per_second": round((step - first) * images_per_step / (time.time() - start), 3),
            }
            running = 0.0
            if accelerator.is_main_process:
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{row['loss']:.3f}")
            if options.report_to:
                accelerator.log(row, step=step)
        if step % options.eval_steps == 0 or step == options.steps:
            quality = measure(model, image_processor, folder, measured, things, options, accelerator)
            curve.append({"step": step, **quality})
            logger.info("step %d: %s", step, quality)
            if accelerator.is_main_process and curve[-1]["pq"] == max(point["pq"] for point in curve):
                save_model(
                    model, image_processor, options, record | {"quality": curve[-1], "curve": curve}, output / "model"
                )
            if options.report_to:
                accelerator.log(quality, step=step)
        stopped = stop.asked()
        if (step % options.save_steps == 0 and step < options.steps) or stopped:
            checkpoint = save_checkpoint(accelerator, output, step, running=running, curve=curve, settings=settings)
            if stopped:
                logger.info(
                    "stopped after step %d; %s is complete. Go on with the same command and --resume.", step, checkpoint
                )
                break
    stop.restore()
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(output / "curve.json", curve)
        log.close()
    # before the process group, see distill.py
    wrapped, optimizer, schedule = accelerator.free_memory(wrapped, optimizer, schedule)
    accelerator.end_training()
    return output / "model"


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    folder = train(options)
    if PartialState().is_main_process:
        logger.info("written: %s", folder)
