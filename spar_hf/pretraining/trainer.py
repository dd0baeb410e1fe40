"""
Pre-train a small SigLIP-shaped pair of towers from scratch, at one fixed resolution: the base of spar-tiny.

Patch features (the attention-pooling head without its attention) are compared with embeddings of class names and synonyms
in prompt templates, by a softmax over names. Images that only have a name train the pooled embedding in the same way. The
grid of patches and the position table are always those of the window, so a single pass over a large image suffers as it
does with any ViT pre-trained at one resolution.

    accelerate launch training/pretrain_tiny.py --data DATA --output DIR --text_teacher all-MiniLM-L6-v2
"""

import itertools
import logging
import random
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from spar_hf import SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor
from spar_hf.pretraining.crops import CropBatches, CropSet, load_sets
from spar_hf.pretraining.losses import step_loss
from spar_hf.pretraining.model import Towers, load_model, new_model
from spar_hf.pretraining.options import FREE, PretrainingOptions, TrainingOptions, read_recipe
from spar_hf.utils.atomic import writing_folder
from spar_hf.utils.checkpoints import discard_earlier, earlier_state, load_checkpoint, settings_of
from spar_hf.utils.devices import clock
from spar_hf.utils.launching import outlive_signals
from spar_hf.utils.runs import BadSteps, Checkpointing, RunFolder, RunLog, end_run, start_accelerator
from spar_hf.utils.sample_record import earlier_samples, read_samples, write_samples

logger = logging.getLogger(__name__)

PARTS = {"train": "files", "held_out": "held_out"}  # part of a run's record: attribute of its sets


def main(args: list[str] | None = None) -> Path | None:
    """The command; returns the folder of the model, or `None` where the run was stopped."""
    folder = train(PretrainingOptions.parse(args, __doc__))
    if folder is not None:
        logger.info("written: %s", folder)
    return folder


def train(options: PretrainingOptions) -> Path | None:
    """
    Run the pre-training.

    Returns:
        The folder of the finished model; `None` where Ctrl-C or SIGTERM stopped the run.

    Raises:
        UsageError: options, images, masks or an earlier run in the output folder do not fit.
        NotFinite: the training diverged.
    """
    run = options.run
    accelerator = start_accelerator(run.mixed_precision, run.seed, images=options.training.batch_size)
    with RunFolder(accelerator, Path(run.output)):
        return train_locked(options, accelerator)


def train_locked(options: PretrainingOptions, accelerator: Accelerator) -> Path | None:
    """What [`train`] does while the folder of the run is locked."""
    torch.set_flush_denormal(True)  # weights of rare tokens that are almost zero make CPUs several times slower
    output, resume = Path(options.run.output), options.run.resume
    settings = comparable(settings_of(options, FREE) | {"mixed_precision": accelerator.mixed_precision})
    result, overwrite = output / "model", options.run.overwrite
    state = earlier_state(output, resume, settings, accelerator.num_processes, comparable, [result], overwrite)
    recipe = read_recipe(options.recipe.recipe)
    earlier = read_samples(output) if resume else None
    held_out = None if earlier is None else earlier["held_out"]
    sets = load_sets(Path(options.recipe.data), recipe, held_out, options.recipe)
    samples = {part: [name for crops in sets for name in getattr(crops, source)] for part, source in PARTS.items()}
    if resume:
        earlier_samples(output, itertools.chain(*samples.values()), options.run.allow_changed_data)
    if options.training.start is None:
        model, tokenizer = new_model(options.new_model, sets, recipe.get("words", []), options.run.seed, not resume)
    else:
        model, tokenizer = load_model(options.training.start)
    model.vision_model.requires_grad_(True)  # with the probe of the pooling head, for the pooled embedding
    for frozen in (model.text_model, model.logit_scale, model.logit_bias):
        frozen.requires_grad_(False)
    towers = Towers(model)
    optimizer, schedule = make_optimizer(towers, options.training)
    prepared = accelerator.prepare(towers, optimizer)
    accelerator.register_for_checkpointing(schedule)
    output.mkdir(parents=True, exist_ok=True)
    step = load_checkpoint(accelerator, output)["step"] if resume else 0
    discard_earlier(accelerator, output, resume)
    if accelerator.is_main_process:
        write_samples(output, samples)
    bad_steps = BadSteps(accelerator, options.run.max_bad_steps, *(state or {}).get("bad_steps", ()))
    with Checkpointing(accelerator, output, settings, options.run.save_steps, options.training.steps) as checkpoints:
        trained = (*prepared, schedule)
        finished = train_towers(trained, tokenizer, sets, options, accelerator, checkpoints, bad_steps, step)
    if finished and accelerator.is_main_process:
        save_model(model, tokenizer, result)
    accelerator.wait_for_everyone()
    del prepared
    end_run(accelerator)
    return result if finished else None


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """
    Settings as a resumed run compares them: under the names of today, and the recipe by its file name, since version 0.1
    kept it elsewhere.
    """
    settings = PretrainingOptions.with_current_names(settings)
    return {**settings, "recipe": Path(settings["recipe"]).name}


def make_optimizer(towers: Towers, options: TrainingOptions) -> tuple[Any, Any]:
    """AdamW on what is trained, without weight decay of biases and norms; and its cosine schedule."""
    trained = [p for p in towers.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))
    return optimizer, get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, options.steps)


def train_towers(
    prepared: tuple[Any, ...],
    tokenizer: PreTrainedTokenizerFast,
    sets: list[CropSet],
    options: PretrainingOptions,
    accelerator: Accelerator,
    checkpoints: Checkpointing,
    bad_steps: BadSteps,
    first: int,
) -> bool:
    """Train `prepared` (towers, optimizer, schedule) from step `first` on; `False` if a signal stopped the run."""
    towers, optimizer, schedule = prepared
    training, seed = options.training, options.run.seed
    trained = [p for p in towers.parameters() if p.requires_grad]
    window = accelerator.unwrap_model(towers).model.config.image_size
    batches = CropBatches(sets, training.batch_size, window, training.steps, seed)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, training.steps),
        num_workers=options.run.workers,
        worker_init_fn=outlive_signals,
    )
    # a line of the log carries the number of the step that it describes, counted from 0
    log = RunLog(Path(options.run.output) / "log.jsonl", accelerator, first - 1 if options.run.resume else None)
    bar = tqdm(loader, initial=first, total=training.steps, disable=not accelerator.is_main_process, mininterval=5)
    start, stopped = clock(accelerator.device), False
    towers.train()
    for step, groups in enumerate(bar, start=first):
        rng = random.Random(f"words-{seed}-{step}")
        with accelerator.autocast():
            loss, parts = step_loss(towers, tokenizer, sets, groups, training, rng, accelerator.device)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(trained, 1.0)
        if not bad_steps.is_bad(step + 1, float(loss.detach()), norm) or accelerator.scaler is not None:
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            row = {"step": step, "loss": float(loss.detach()), **{name: float(part) for name, part in parts.items()}}
            log.write({**row, "seconds": round(clock(accelerator.device) - start, 1)})
            bar.set_postfix(loss=f"{row['loss']:.3f}")
        if stopped := checkpoints.after_step(step + 1, bad_steps=bad_steps.state):
            break
    log.close()
    return not stopped


def save_model(model: SparForOpenVocabSegmentation, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in half precision, which the configuration's `dtype` turns back into float32 when it is loaded."""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    window = model.config.image_size
    working_size = {"shortest_edge": 2 * window, "longest_edge": 8 * window}
    with writing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=half)
        SparProcessor(SparImageProcessorPil(size=working_size), tokenizer).save_pretrained(temporary)
