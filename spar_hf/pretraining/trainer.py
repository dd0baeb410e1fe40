"""
Pre-train a small SigLIP-shaped pair of towers from scratch, at one fixed resolution: the base of spar-tiny.

Patch features (the attention-pooling head without its attention) are compared with embeddings of class names and synonyms
in prompt templates, by a softmax over names. Images that only have a name train the pooled embedding in the same way. The
grid of patches and the position table are always those of the window, so a single pass over a large image suffers as it
does with any ViT pre-trained at one resolution.

A distilled student can go on with the same labels: `--start STUDENT --crop_sides 256 384 512 --anchor_weight 0.5`.

    accelerate launch training/pretrain_tiny.py --data DATA --output DIR --text_teacher all-MiniLM-L6-v2
"""

import copy
import itertools
import logging
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor
from spar_hf.model.fingerprints import weights_hash
from spar_hf.pretraining.crops import CropBatches, CropSet, load_sets
from spar_hf.pretraining.losses import step_loss
from spar_hf.pretraining.model import Towers, load_model, new_model
from spar_hf.pretraining.optimizers import make_optimizer
from spar_hf.pretraining.options import (
    FREE,
    WITH_CONTENT,
    PretrainingOptions,
    TrainingOptions,
    check_sets,
    read_recipe,
    recipe_name,
)
from spar_hf.utils.atomic import write_text, writing_folder
from spar_hf.utils.checkpoints import settings_of
from spar_hf.utils.devices import clock
from spar_hf.utils.errors import UsageError
from spar_hf.utils.launching import outlive_signals
from spar_hf.utils.runs import TrainingRun, start_accelerator
from spar_hf.utils.sample_record import read_samples

logger = logging.getLogger(__name__)

PARTS = {"train": "files", "held_out": "held_out"}  # part of a run's record: attribute of its sets


def main(args: list[str] | None = None) -> Path | None:
    """The command; returns the folder of the model, or `None` where the run was stopped."""
    return train(PretrainingOptions.parse(args, __doc__))


def train(options: PretrainingOptions) -> Path | None:
    """
    Run the pre-training.

    Returns:
        The folder of the finished model; `None` where Ctrl-C or SIGTERM stopped the run.

    Raises:
        UsageError: options, images, masks or an earlier run in the output folder do not fit.
        NotFinite: the training diverged.
    """
    torch.set_flush_denormal(True)  # weights of rare tokens that are almost zero make CPUs several times slower
    recipe = read_recipe(options.recipe.recipe)
    check_sets(options.recipe.recipe, recipe)
    unread = [spec["path"] for spec in recipe["sets"] if not spec.get("labels", True)]
    if unread and not options.training.anchor_weight:
        raise UsageError(f"Nothing would be learned from {unread[0]}, which has `labels: false`: give --anchor_weight.")
    # without named images the pooling head gets no gradient, for which DDP would wait
    unused = DistributedDataParallelKwargs(find_unused_parameters=not recipe["tagged"])
    given, images = (options.run.mixed_precision, options.run.seed), options.training.batch_size
    accelerator = start_accelerator(*given, images=images, kwargs_handlers=[unused])
    upgrade = partial(comparable, recipe=recipe_name(options.recipe.recipe, recipe))
    result, settings = Path(options.run.output) / "model", upgrade(settings_of(options, FREE))
    with TrainingRun(accelerator, options.run, settings, upgrade, [result]) as run:
        sets, samples = open_sets(options, recipe, run)
        if options.training.start is None:
            teach = run.state is None
            kept = run.output / "tokenizer.json"
            model, tokenizer = new_model(options.new_model, sets, recipe["words"], options.run.seed, kept, teach)
            processor = new_processor(tokenizer, model.config.image_size)
            if teach and accelerator.is_main_process:
                write_text(kept, tokenizer.backend_tokenizer.to_str())
        else:
            model, processor = load_model(options.training.start)
            run.check_start_weights(start=weights_hash(model).hexdigest())
        model.vision_model.requires_grad_(True)  # with the probe of the pooling head, for the pooled embedding
        for frozen in (model.text_model, model.logit_scale, model.logit_bias):
            frozen.requires_grad_(False)
        towers = Towers(model)
        anchor = anchor_of(model, options.training.anchor_weight, accelerator.device)
        optimizer, schedule = optimizer_of(towers, options.training)
        prepared = (*accelerator.prepare(towers, optimizer), schedule)
        accelerator.register_for_checkpointing(schedule)
        run.begin(options.training.steps, samples, first_row=0)
        train_towers(prepared, processor.tokenizer, sets, options, run, anchor)
        if not run.stopped and accelerator.is_main_process:
            if (record := model.config.distillation) is not None:  # else it would be that of other weights
                labels = label_record(options, recipe, accelerator.num_processes)
                model.config.distillation = with_labels(record, labels)
            save_model(model, processor, result)
        del prepared
    return None if run.stopped else result


def open_sets(
    options: PretrainingOptions, recipe: dict[str, Any], run: TrainingRun
) -> tuple[list[CropSet], dict[str, list[str]]]:
    """The sets of the recipe, and the names of their images by what they are for; held-out images stay held out."""
    earlier = None if run.state is None else read_samples(run.output)
    held_out = None if earlier is None else earlier["held_out"]
    sets = load_sets(Path(options.recipe.data), recipe, held_out, options.recipe)
    samples = {part: [name for crops in sets for name in getattr(crops, source)] for part, source in PARTS.items()}
    run.earlier_samples(itertools.chain(*samples.values()))  # refuses images that changed
    return sets, samples


def comparable(settings: dict[str, Any], recipe: str) -> dict[str, Any]:
    """
    Settings as a resumed run compares them: under the names of today, and `recipe` as [`recipe_name`] writes it. Earlier
    versions kept no more of it than the name of the file.
    """
    before = {"optimizer": "adamw", "crop_sides": None, "anchor_weight": 0.0}  # where there was no such option
    settings = {**before, **PretrainingOptions.with_current_names(settings)}
    file = Path(settings["recipe"]).name
    return {**settings, "recipe": recipe if file == recipe.rpartition(WITH_CONTENT)[0] else file}


def anchor_of(model: SparForOpenVocabSegmentation, weight: float, device: torch.device) -> nn.Module | None:
    """A copy of the vision tower as it is before training, which stays so; `None` without a weight."""
    return copy.deepcopy(model.vision_model).eval().requires_grad_(False).to(device) if weight else None


def optimizer_of(towers: Towers, options: TrainingOptions) -> tuple[Any, Any]:
    """An optimizer of what is trained, without weight decay of biases and norms; and its cosine schedule."""
    trained = [p for p in towers.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    blocks, rates = towers.model.vision_model.backbone.blocks, (options.learning_rate, options.weight_decay)
    optimizer = make_optimizer(options.optimizer, blocks, groups, *rates, betas=(0.9, 0.98))
    return optimizer, get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, options.steps)


def train_towers(
    prepared: tuple[Any, ...],
    tokenizer: PreTrainedTokenizerFast,
    sets: list[CropSet],
    options: PretrainingOptions,
    run: TrainingRun,
    anchor: nn.Module | None = None,
) -> None:
    """
    Train `prepared` (towers, optimizer, schedule) until the last step or a signal, near the features of `anchor` if there is
    one.

    Each process draws batches of its own: process r of n takes batch `step * n + r`. So a step sees `batch_size` crops per
    process, and one process sees the batches it always saw.
    """
    towers, optimizer, schedule = prepared
    accelerator, training, seed = run.accelerator, options.training, options.run.seed
    trained = [p for p in towers.parameters() if p.requires_grad]
    sides = training.crop_sides or [accelerator.unwrap_model(towers).model.config.image_size]
    count, rank = accelerator.num_processes, accelerator.process_index
    batches = CropBatches(sets, training.batch_size, sides, training.steps * count, seed, count)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(run.step * count + rank, training.steps * count, count),
        num_workers=options.run.workers,
        worker_init_fn=outlive_signals,
    )
    bar = tqdm(loader, initial=run.step, total=training.steps, disable=not accelerator.is_main_process, mininterval=5)
    start = clock(accelerator.device)
    towers.train()
    for step, groups in enumerate(bar, start=run.step):
        rng = random.Random(f"words-{seed}-{step}")
        with accelerator.autocast():
            loss, parts = step_loss(towers, tokenizer, sets, groups, training, rng, accelerator.device, anchor)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(trained, 1.0)
        mean = float(accelerator.reduce(loss.detach(), "mean"))  # all processes decide alike
        if not run.bad_steps.is_bad(step + 1, mean, norm) or accelerator.scaler is not None:
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            parts = accelerator.reduce(parts, "mean")
            row = {"step": step, "loss": mean, **{name: float(part) for name, part in parts.items()}}
            run.log.write({**row, "seconds": round(clock(accelerator.device) - start, 1)})
            bar.set_postfix(loss=f"{row['loss']:.3f}")
        if run.after_step(step + 1, bad_steps=run.bad_steps.state):
            break


def with_labels(record: dict[str, Any], labels: dict[str, Any]) -> dict[str, Any]:
    """
    The record of a student after a training with labels, with `labels` as the last of its list of such trainings. The
    held-out error and the note on averaged weights are left out: they are about the weights before this training.
    """
    kept = {name: value for name, value in record.items() if name not in ("held_out", "weights")}
    return {**kept, "labels": [*record.get("labels", []), labels]}


def label_record(options: PretrainingOptions, recipe: dict[str, Any], processes: int) -> dict[str, Any]:
    """What the configuration of a student says about a training with labels after its distillation."""
    training = options.training
    return {
        "recipe": recipe_name(options.recipe.recipe, recipe),
        "sets": [spec["path"] for spec in (*recipe["sets"], *recipe["tagged"]) if spec.get("labels", True)],
        "steps": training.steps,
        "crops_per_step": training.batch_size * processes,
        "crop_sides": training.crop_sides,
        "anchor_weight": training.anchor_weight,
        "optimizer": training.optimizer,
        "learning_rate": training.learning_rate,
        "seed": options.run.seed,
    }


def new_processor(tokenizer: PreTrainedTokenizerFast, window: int) -> SparProcessor:
    """The processor of a new model: images are read at twice its window along their shorter side."""
    return SparProcessor(
        SparImageProcessorPil(size={"shortest_edge": 2 * window, "longest_edge": 8 * window}), tokenizer
    )


def save_model(model: SparForOpenVocabSegmentation, processor: SparProcessor, folder: Path) -> None:
    """Write the model in half precision, which the configuration's `dtype` turns back into float32 when it is loaded."""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    with writing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=half)
        processor.save_pretrained(temporary)
