"""
Distil the sliding-window teacher of a backbone into a student of the same architecture that needs one pass.

The student starts as the teacher's encoder, sees whole photos with its position table resampled, and regresses with the
mean squared error onto the teacher's features, un-normalised and without labels (SPAR, arXiv 2604.02252, section 3).

    accelerate launch training/distill.py --model BASE --images PHOTOS --output DIR
"""

import copy
import json
import logging
import math
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from checkpoints import StopAtStep, cut_log, load_checkpoint, save_checkpoint
from data import jitter, list_images, read_image
from huggingface_hub import ModelCardData
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, HfArgumentParser, get_scheduler

from spar_hf import (
    SlidingWindowTeacher,
    SparForOpenVocabSegmentation,
    SparImageProcessorPil,
    SparProcessor,
    SparVisionModel,
)
from spar_hf.prompts import Vocabulary, embed_names

logger = logging.getLogger("distill")


@dataclass
class Options:
    """Options of the distillation. Sizes of photos are in windows, so that the recipe fits every backbone."""

    model: str = field(
        metadata={
            "help": "Teacher, and start of the student: hub id or folder of a backbone of transformers or a SPAR model."
        }
    )
    images: list[str] = field(metadata={"help": "Folders of photos, no labels needed."})
    output: str = field(metadata={"help": "Folder to write the student to."})
    student: str | None = field(
        default=None,
        metadata={"help": "Start of the student, where it is not the teacher's encoder: an earlier student."},
    )
    whiten: float = field(
        default=0.0,
        metadata={
            "help": "Divides the error along each principal axis of the teacher's features by their variance there to this "
            "power: 0 is the paper's mean squared error, 1 counts all axes alike."
        },
    )
    words: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Built-in vocabularies (coco-stuff, cityscapes, ...) over which the student is to decide as the teacher "
            "does, beside the paper's error of the features; for models with a text tower."
        },
    )
    words_weight: float = field(default=5.0, metadata={"help": "Weight of that term beside the mean squared error."})
    exclude: list[str] = field(default_factory=list, metadata={"help": "Shell patterns of file stems never read."})
    holdout_every: int = field(
        default=20,
        metadata={"help": "Each n-th photo of every folder (sorted by name) is kept for the held-out error."},
    )
    holdout_images: int = field(default=8, metadata={"help": "Held-out photos the error is measured on."})
    steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    train_layers: str = field(default="2", metadata={"help": "Trainable: number of last blocks, or 'all'."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Name of a transformers schedule."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps with rising learning rate."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Photos per process and optimizer step."})
    stride: int = field(default=24, metadata={"help": "Stride of the teacher's windows in pixels."})
    window_size: int | None = field(
        default=None, metadata={"help": "Teacher's window; the model's image_size by default."}
    )
    window_batch_size: int = field(default=16, metadata={"help": "Windows per forward pass of the teacher."})
    teacher_windows: int | None = field(
        default=None,
        metadata={"help": "Windows drawn per photo for an unbiased estimate of the target; all by default."},
    )
    long_side: float = field(default=4.0, metadata={"help": "Photos fit this many windows along their longer side ..."})
    short_side: float = field(default=2.0, metadata={"help": "... and this many along their shorter side,"})
    min_scale: float = field(default=0.5, metadata={"help": "times a factor drawn between this and 1."})
    crop_probability: float = field(default=0.5, metadata={"help": "Chance of a random crop of 40-100 % per side."})
    flip_probability: float = field(default=0.5, metadata={"help": "Chance of a horizontal flip."})
    jitter_probability: float = field(
        default=0.0,
        metadata={
            "help": "Chance that light, contrast and colour of a photo are changed at random, for teacher and student alike "
            "(0 in the paper). Where photos are few, the student else learns their light by heart."
        },
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16."})
    save_dtype: str = field(
        default="float32", metadata={"help": "Precision of the stored weights: float32, float16 or bfloat16."}
    )
    workers: int = field(default=1, metadata={"help": "Processes that decode photos."})
    seed: int = field(default=0, metadata={"help": "Seed of order and augmentation."})
    log_steps: int = field(default=20, metadata={"help": "Steps between lines of the log."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; the last two are kept."})
    eval_steps: int = field(
        default=500, metadata={"help": "Steps between held-out errors; OUTPUT/model is the student with the least."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in --output, to the last bit."}
    )
    report_to: str | None = field(default=None, metadata={"help": "Tracker of accelerate, e.g. tensorboard or wandb."})

    def __post_init__(self):
        if self.train_layers != "all" and not (self.train_layers.isdigit() and int(self.train_layers) > 0):
            raise ValueError(f"--train_layers {self.train_layers}: write 'all' or a number of last blocks, 1 or more.")
        if not 0 < self.min_scale <= 1 or self.holdout_every < 2 or self.steps < 1:
            raise ValueError("--min_scale lies in (0, 1], --holdout_every is at least 2 and --steps at least 1.")
        if self.save_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"--save_dtype {self.save_dtype}: use float32, float16 or bfloat16.")
        for name in ("whiten", "crop_probability", "flip_probability", "jitter_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie in 0 to 1.")
        if self.teacher_windows is not None and self.teacher_windows < 1:
            raise ValueError(f"--teacher_windows {self.teacher_windows} must be at least 1.")


class Photos(Dataset):
    """
    Item i is the i-th photo of an endless shuffled stream, resized, cropped and flipped as (seed, i) says, whatever the
    worker: `(3, height, width)` with sides that are multiples of the patch.
    """

    def __init__(self, paths: list[Path], image_processor, window: int, patch_size: int, options: Options):
        self.paths, self.image_processor, self.window = paths, image_processor, window
        self.patch_size, self.options = patch_size, options

    def __getitem__(self, index: int) -> torch.Tensor:
        epoch, position = divmod(index, len(self.paths))
        order = list(range(len(self.paths)))
        random.Random(f"order-{self.options.seed}-{epoch}").shuffle(order)
        rng = random.Random(f"photo-{self.options.seed}-{index}")
        photo = augment(read_image(self.paths[order[position]]), self.window, self.patch_size, self.options, rng)
        if rng.random() < self.options.jitter_probability:
            pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 255  # (3, height, width)
            photo = Image.fromarray((jitter(pixels, rng) * 255).round().byte().permute(1, 2, 0).numpy())
        return self.pixels(photo)

    def pixels(self, photo: Image.Image) -> torch.Tensor:
        return self.image_processor(photo, do_resize=False, return_tensors="pt")["pixel_values"][0]


def augment(photo: Image.Image, window: int, patch_size: int, options: Options, rng: random.Random) -> Image.Image:
    """The recipe's random size, crop and flip; sides become multiples of the patch."""
    scale = rng.uniform(options.min_scale, 1.0)
    long_side, short_side = max(photo.size), min(photo.size)
    factor = scale * min(options.long_side * window / long_side, options.short_side * window / short_side)
    sides = [side * factor for side in photo.size]
    if rng.random() < options.crop_probability:
        cropped = [min(side, max(side * rng.uniform(0.4, 1.0), window)) for side in sides]
    else:
        cropped = sides
    width, height = (max(patch_size, math.floor(side / patch_size + 1e-6) * patch_size) for side in cropped)
    left, top = (rng.uniform(0, max(0.0, side - kept)) for side, kept in zip(sides, (width, height), strict=True))
    box = tuple(value / factor for value in (left, top, left + width, top + height))
    box = (box[0], box[1], min(box[2], photo.width), min(box[3], photo.height))
    photo = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if rng.random() < options.flip_probability:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return photo


def last_parts(path: str) -> str:
    """A hub id as it is, of a path the last two parts: what a record may say without naming one machine's folders."""
    return "/".join(Path(path).parts[-2:])


def split_photos(options: Options) -> tuple[list[Path], list[Path]]:
    """Photos to train on and held-out photos, of all folders."""
    train, held_out = [], []
    for folder in options.images:
        paths = [p for p in list_images(folder) if not any(p.match(f"{pattern}.*") for pattern in options.exclude)]
        for i, path in enumerate(paths):
            (held_out if i % options.holdout_every == options.holdout_every - 1 else train).append(path)
    if not train:
        raise ValueError("No photo is left to train on; check --images, --exclude and --holdout_every.")
    return train, held_out


def load_model(name: str) -> tuple[SparForOpenVocabSegmentation | SparVisionModel, SparVisionModel]:
    """The whole model, with both towers where there are two, and its vision tower; of a SPAR folder or a backbone."""
    if getattr(AutoConfig.from_pretrained(name), "text_config", None) is None:
        model = SparVisionModel.from_backbone(name)
        return model, model
    model = SparForOpenVocabSegmentation.from_backbone(name)
    return model, model.vision_model


def choose_parameters(model: SparVisionModel, train_layers: str) -> list[nn.Parameter]:
    """
    Freeze all but the last blocks (or nothing) and return what is trained: never what dense features do not read (a
    pooling probe, dino.txt's vision head), which would get no gradient and stop distributed training.
    """
    model.requires_grad_(train_layers == "all")
    if train_layers != "all":
        for block in model.backbone.blocks[-int(train_layers) :]:
            block.requires_grad_(True)
    for name, parameter in model.backbone.named_parameters():
        if any(part in name for part in model.backbone.unread):
            parameter.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def distillation_loss(student: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mean squared error of feature maps `(batch, dim, h, w)`; with the cells and weights of
    [`SlidingWindowTeacher.sample`] instead of a full target its gradient is that of the full error on average.
    """
    if weight is None:
        return nn.functional.mse_loss(student, target)
    r = target.shape[-1] // student.shape[-1]
    cells = student.repeat_interleave(r, 2).repeat_interleave(r, 3)  # (batch, dim, h, w) -> (batch, dim, h * r, w * r)
    return ((cells - target).square() * weight).sum() / student.numel()


def decision_loss(
    student: torch.Tensor, target: torch.Tensor, texts: torch.Tensor, scale: float, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the student's softmax over words from the teacher's, mean over patches; arguments as of
    [`distillation_loss`], and texts `(names, dim)` of unit length. Needs words, but no labels.

    The offset that all features share is far larger than what tells two classes apart, so features that are near in the
    mean squared error still decide otherwise.
    """
    logits = [
        torch.einsum("bdhw,nd->bnhw", nn.functional.normalize(x, dim=1), texts) * scale for x in (student, target)
    ]
    r = target.shape[-1] // student.shape[-1]
    found = logits[0].log_softmax(1).repeat_interleave(r, 2).repeat_interleave(r, 3)
    divergence = nn.functional.kl_div(found, logits[1].log_softmax(1), reduction="none", log_target=True)
    divergence = divergence.sum(1) if weight is None else divergence.sum(1) * weight
    return divergence.sum() / student[:, 0].numel()


@torch.no_grad()
def error_weights(targets: list[torch.Tensor], power: float) -> torch.Tensor:
    """
    The symmetric matrix `(dim, dim)` that scales each principal axis of the features by its variance to minus `power / 2`;
    a thousandth of the whole variance is added to each, so that axes of mere noise do not count.

    Where most variance lies along a few axes that tell little of what a pixel is (light, place), a plain mean squared
    error is small long before the student tells classes apart.
    """
    features = torch.cat([target.flatten(2).transpose(1, 2).flatten(0, 1) for target in targets])  # (patches, dim)
    variance, axes = torch.linalg.eigh(torch.cov(features.T))
    variance = variance.clamp(min=0) + 1e-3 * variance.sum()
    weights = (axes * variance ** (-power / 2)) @ axes.T
    return weights / weights.diagonal().square().mean().sqrt()


@torch.no_grad()
def held_out_error(student: SparVisionModel, targets: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Mean squared error and mean cosine of student and full teacher over held-out photos."""
    squared, cosine, patches = 0.0, 0.0, 0
    for pixels, target in targets:
        features = student(pixels).feature_map.float()
        squared += float((features - target).square().mean(1).sum())
        cosine += float(nn.functional.cosine_similarity(features, target, dim=1).sum())
        patches += target.shape[-2] * target.shape[-1]
    return {"mse": round(squared / patches, 6), "cosine": round(cosine / patches, 4)}


def save_student(model, processor, options: Options, record: dict, folder: Path) -> None:
    """Write a `from_pretrained` folder under a temporary name, then rename it."""
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.config.distillation = record
    # the configuration's dtype stays float32: half precision is for the disk
    dtype = getattr(torch, options.save_dtype)
    model.save_pretrained(temporary, state_dict={name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    processor.save_pretrained(temporary)
    (temporary / "README.md").write_text(model_card(options, record), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def model_card(options: Options, record: dict) -> str:
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["spar", "open-vocabulary-segmentation"],
    )
    rows = "\n".join(f"| {key} | {value} |" for key, value in record.items())
    return f"""---
{data.to_yaml()}
---
# {Path(options.output).name}

A SPAR student: dense features in one pass at any resolution, distilled from the sliding-window teacher of
`{record["teacher"]}` (arXiv 2604.02252). The licence of the base and of the photos applies to these weights.

| distillation | |
|---|---|
{rows}

`held_out` compares the student with the full teacher on photos it was not trained on, before and after.
"""


def train(options: Options) -> Path:
    """Run the distillation; returns the folder of the student."""
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=options.report_to,
        project_dir=options.output if options.report_to else None,
    )
    set_seed(options.seed)
    output = Path(options.output)
    train_paths, held_out_paths = split_photos(options)
    model, student = load_model(options.model)
    # what the student will be saved with is loaded before any work, so that nothing lacks at the end
    two_towers = isinstance(model, SparForOpenVocabSegmentation)
    processor = (SparProcessor if two_towers else SparImageProcessorPil).from_backbone(options.model)
    image_processor = processor.image_processor if two_towers else processor
    teacher = SlidingWindowTeacher(
        copy.deepcopy(student).eval().requires_grad_(False),
        options.window_size,
        options.stride,
        options.window_batch_size,
    ).to(accelerator.device)
    if options.words and not two_towers:
        raise ValueError(f"--words needs a text tower, and {options.model} has none. Leave it out.")
    if options.words:
        words = sorted({name for vocabulary in options.words for name in Vocabulary.parse(vocabulary).all_names})
        texts = embed_names(model.to(accelerator.device), processor.tokenizer, words, "short")
    if options.student is not None:
        student.load_state_dict(load_model(options.student)[1].state_dict())
    parameters = choose_parameters(student, options.train_layers)
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    photos_per_step = accelerator.num_processes * options.gradient_accumulation_steps
    # accelerate steps the schedule once per process and optimizer step
    schedule = get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=int(options.warmup_ratio * options.steps) * accelerator.num_processes,
        num_training_steps=options.steps * accelerator.num_processes,
    )
    dataset = Photos(train_paths, image_processor, teacher.window_size, student.config.patch_size, options)
    wrapped, optimizer, schedule = accelerator.prepare(student, optimizer, schedule)
    logger.info(
        "%d photos to train on, %d held out; %.2f M of %.2f M parameters trained",
        len(train_paths),
        len(held_out_paths),
        sum(p.numel() for p in parameters) / 1e6,
        sum(p.numel() for p in student.parameters()) / 1e6,
    )

    # the held-out error is taken at the largest size of the recipe, without crop or flip, by the full teacher
    fixed = copy.copy(options)
    fixed.min_scale, fixed.crop_probability, fixed.flip_probability = 1.0, 0.0, 0.0
    chosen = random.Random(options.seed).sample(held_out_paths, min(options.holdout_images, len(held_out_paths)))
    targets = []
    for path in tqdm(chosen, desc="teacher on held-out photos", disable=not accelerator.is_main_process):
        photo = augment(read_image(path), teacher.window_size, student.config.patch_size, fixed, random.Random(0))
        pixels = dataset.pixels(photo)[None].to(accelerator.device)
        targets.append((pixels, teacher(pixels).feature_map))
    before = held_out_error(student.eval(), targets) if targets else None
    if options.whiten and not targets:
        raise ValueError("--whiten measures the axes on held-out photos, and there are none; set --holdout_images.")
    if options.whiten:
        weights = error_weights([target for _, target in targets], options.whiten)
    logger.info("held-out error before: %s", before)

    record = {
        "teacher": last_parts(options.model),
        "window_size": teacher.window_size,
        "stride": teacher.stride,
        "teacher_windows": options.teacher_windows or "all",
        "images": [last_parts(folder) for folder in options.images],
        "exclude": options.exclude,
        "photos": len(train_paths),
        "steps": options.steps,
        "photos_per_step": photos_per_step,
        "photo_size": [options.long_side, options.short_side, options.min_scale],
        "jitter_probability": options.jitter_probability,
        "train_layers": options.train_layers,
        "whiten": options.whiten,
        "words": options.words,
        "words_weight": options.words_weight,
        "student": options.student and last_parts(options.student),
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "seed": options.seed,
    }
    if options.report_to:
        accelerator.init_trackers("spar-distillation", config=record)
    output.mkdir(parents=True, exist_ok=True)
    state = {"step": 0, "running": 0.0, "curve": []}
    if options.resume:
        state = load_checkpoint(accelerator, output)
    step, running, curve = state["step"], state["running"], state["curve"]
    if accelerator.is_main_process:
        if options.resume:
            cut_log(output / "log.jsonl", step)
        log = (output / "log.jsonl").open("a" if options.resume else "w", encoding="utf-8")
    # photo i of the endless stream is a function of the seed and i, so going on is starting at another i
    photos = range(step * photos_per_step, options.steps * photos_per_step)
    loader = accelerator.prepare(DataLoader(dataset, batch_size=1, sampler=photos, num_workers=options.workers))
    generator = torch.Generator()
    bar = tqdm(initial=step, total=options.steps, disable=not accelerator.is_main_process, mininterval=5)
    stop = StopAtStep()
    # deterministic: the student regresses, and dropout or RoPE jitter would only blur the target
    wrapped.eval()
    start, first, teacher_seconds = time.time(), step, 0.0
    for number, pixel_values in enumerate(loader, start=step * options.gradient_accumulation_steps):
        moment = time.time()
        with accelerator.autocast():
            if options.teacher_windows is None:
                target, weight = teacher(pixel_values).feature_map, None
            else:
                # which windows are drawn is a function of seed, process and photo, whenever the run was resumed
                draw = random.Random(f"windows-{options.seed}-{accelerator.process_index}-{number}").getrandbits(62)
                target, weight = teacher.sample(pixel_values, options.teacher_windows, generator.manual_seed(draw))
        teacher_seconds += time.time() - moment
        with accelerator.accumulate(wrapped):
            with accelerator.autocast():
                features = wrapped(pixel_values).feature_map
            features = features.float()
            if options.whiten:
                features, target = (torch.einsum("ij,bjhw->bihw", weights, x) for x in (features, target))
            loss = distillation_loss(features, target, weight)
            if options.words:
                scale = student.config.dense_logit_scale
                loss = loss + options.words_weight * decision_loss(features, target, texts, scale, weight)
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
            seconds = time.time() - start
            row = {
                "step": step,
                "loss": running / options.log_steps,
                "learning_rate": schedule.get_last_lr()[0],
                "photos_per_second": round((step - first) * photos_per_step / seconds, 3),
                "teacher_share": round(teacher_seconds / seconds, 3),
            }
            running = 0.0
            if accelerator.is_main_process:
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{row['loss']:.4f}", teacher=f"{row['teacher_share']:.0%}")
            if options.report_to:
                accelerator.log(row, step=step)
        if (step % options.eval_steps == 0 or step == options.steps) and accelerator.is_main_process:
            # without held-out photos the last student is the one kept
            curve.append({"step": step, **(held_out_error(student, targets) if targets else {"mse": -step})})
            if curve[-1]["mse"] == min(point["mse"] for point in curve):
                held_out = {"photos": len(targets), "before": before, "after": curve[-1], "curve": curve}
                save_student(
                    model, processor, options, record | ({"held_out": held_out} if targets else {}), output / "model"
                )
                logger.info("step %d: held-out error %s, the least so far", step, curve[-1])
        if (step % options.save_steps == 0 and step < options.steps) or stop.asked:
            folder = save_checkpoint(accelerator, output, step, running=running, curve=curve)
            if stop.asked:
                logger.info(
                    "stopped after step %d; %s is complete. Go on with the same command and --resume.", step, folder
                )
                break
    stop.restore()
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        log.close()
    accelerator.end_training()
    return output / "model"


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    logger.info("written: %s", train(options))


if __name__ == "__main__":
    main()
