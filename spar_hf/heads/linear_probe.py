"""
Linear probing: train batch norm and one linear layer on the frozen dense features of a SPAR vision model, or of any
transformers backbone that SPAR reads, and measure the mean intersection over union (mIoU) on held-out images.

    accelerate launch training/linear_probe.py --model BASE --stride 24 --shortest_edge 384 \
        --train_dataset DATA/camvid/train --train_exclude "0001TP_*" \
        --test_dataset DATA/camvid/train --test_include "0001TP_*" --cache runs/features --output runs/probe

Heads of several learning rates are trained on the same features in one run. The best on the test images is chosen, as is
usual in linear probing; the results list them all. `OUTPUT/model` holds the best head with its vision model, for
`pipeline("image-segmentation")`; the batch norm is absorbed into its linear layer. `OUTPUT/results.json` holds the figures,
`OUTPUT/log.jsonl` the losses of the heads.

Images are split over the processes. Batch norm sees the batch of its own process.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from tqdm.auto import tqdm

from spar_hf import SparForSemanticSegmentation
from spar_hf.data.order import ShuffledStream
from spar_hf.data.segmentation_sets import SegmentationSet, labelled_images, open_folder
from spar_hf.distillation.optimisation import make_schedule
from spar_hf.evaluation.iou import area_scores, count_pixels
from spar_hf.heads.frozen_features import FrozenFeatures
from spar_hf.heads.linear_head import LinearHeads, batch_loss, draw_pixels
from spar_hf.heads.linear_probe_options import FREE, ProbeData, ProbeOptions, ProbeTraining, upgrade
from spar_hf.heads.linear_probe_report import make_report, show, write_results
from spar_hf.model.fingerprints import vision_fingerprint
from spar_hf.model.segmentation import decide
from spar_hf.utils.checkpoints import discard_checkpoints, settings_of
from spar_hf.utils.errors import NotFinite, UsageError
from spar_hf.utils.runs import TrainingRun, start_accelerator
from spar_hf.utils.sample_record import same_files, split_as_before

logger = logging.getLogger(__name__)


def main(args: list[str] | None = None) -> dict[str, Any] | None:
    """The command; see [`probe`]."""
    return probe(ProbeOptions.parse(args, __doc__))


def probe(options: ProbeOptions) -> dict[str, Any] | None:
    """
    Train the heads, measure them and write the best.

    Returns:
        What `results.json` holds, on every process; `None` where Ctrl-C or SIGTERM stopped the run.

    Raises:
        UsageError: options, images, masks or an earlier run in the output folder do not fit.
        NotFinite: all heads diverged.
    """
    output, training = Path(options.run.output), options.training
    accelerator = start_accelerator(options.run.mixed_precision, options.run.seed, images=training.batch_size)
    results = [output / "results.json", output / "model"]
    with TrainingRun(accelerator, options.run, settings_of(options, FREE), upgrade, results) as run:
        train, test = as_before(*open_datasets(options.data), run)
        samples = {"train": train.files, "test": test.files}  # with those left out below, as `as_before` sees them
        features = FrozenFeatures(options.features, accelerator)
        run.check_start_weights(model=vision_fingerprint(features.model))
        train, test = (labelled_images(data, accelerator) for data in (train, test))
        for data in (train, test):
            features.fill(data)
        heads = LinearHeads(features.model.config.projection_dim, len(train.labels), len(training.learning_rates))
        prepared = accelerator.prepare(heads, *make_optimizer(heads, training, accelerator))
        run.begin(training.steps, samples)
        bad = (run.state or {}).get("bad_steps", [0] * len(heads.linear))  # steps that each head skipped
        train_heads(prepared, features, train, options, run, bad)
        del prepared
        return None if run.stopped else write_best(heads, bad, features, train, test, options)


def write_best(
    heads: LinearHeads,
    bad: list[int],
    features: FrozenFeatures,
    train: SegmentationSet,
    test: SegmentationSet,
    options: ProbeOptions,
) -> dict[str, Any]:
    """Measure the heads, of which each skipped `bad` steps; write the best and return the report. For all processes."""
    # the norm's statistics differ between the processes after the last step: all measure those that are written
    device = features.accelerator.device
    weight, bias = (broadcast(tensor.float().to(device)) for tensor in heads.without_norm())
    scores = measure_heads(weight, bias, features, test)
    for rate, skipped, score in zip(options.training.learning_rates, bad, scores, strict=True):
        if skipped > options.run.max_bad_steps:
            logger.warning("The head of learning rate %g diverged and does not count.", rate)
            score["mean_iou"] = None
    report = make_report(options, features, scores, len(train), len(test))
    if features.accelerator.is_main_process:
        best, output = report["heads"].index(report["best"]), Path(options.run.output)
        model = SparForSemanticSegmentation.from_weights(features.model, train.labels, weight[best], bias[best])
        write_results(model, features.image_processor, report, output)
        discard_checkpoints(output)  # a probe is short and often repeated in its folder
        show(report, Console(markup=False, highlight=False))
    return report


def open_datasets(options: ProbeData) -> tuple[SegmentationSet, SegmentationSet]:
    """
    Images to train on and to test on.

    Raises:
        UsageError: their classes differ, or an image is in both.
    """
    train = open_folder(options.train_dataset).filter(options.train_include, options.train_exclude).read_as(options)
    test = open_folder(options.test_dataset).filter(options.test_include, options.test_exclude).read_as(options)
    if train.labels != test.labels:
        raise UsageError(
            f"{options.train_dataset} and {options.test_dataset} have different lines in classes.txt. A probe is "
            "measured on the classes that it was trained on."
        )
    train = train.select(range(0, len(train), options.train_every))
    if both := set(same_files(train.files)) & set(same_files(test.files)):
        raise UsageError(
            f"{len(both)} images would be trained and tested on, {Path(min(both)).name} among them. Separate them with "
            "--train_exclude and --test_include."
        )
    return train, test


def as_before(
    train: SegmentationSet, test: SegmentationSet, run: TrainingRun
) -> tuple[SegmentationSet, SegmentationSet]:
    """
    The images of a resumed run: those that were tested on before are not trained on.

    Raises:
        UsageError: images were added or removed.
    """
    earlier = run.earlier_samples([*train.files, *test.files])
    if earlier is None:
        return train, test
    kept, _ = split_as_before(train.files, earlier["test"])
    _, tested = split_as_before(test.files, earlier["test"])
    return train.select(kept), test.select(tested)


def make_optimizer(heads: LinearHeads, options: ProbeTraining, accelerator: Accelerator) -> tuple[Any, Any]:
    """AdamW with a learning rate for each head, and their cosine schedule."""
    layers = zip(heads.linear, options.learning_rates, strict=True)
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in layers]
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    return optimizer, make_schedule("cosine", optimizer, options.warmup_ratio, options.steps, accelerator)


def train_heads(
    prepared: tuple[Any, ...],
    features: FrozenFeatures,
    train: SegmentationSet,
    options: ProbeOptions,
    run: TrainingRun,
    bad: list[int],
) -> None:
    """
    Train the heads until the last step or a signal. `bad` counts the steps that each head skipped because its gradient was
    not finite.

    Raises:
        NotFinite: all heads diverged.
    """
    heads, optimizer, schedule = prepared
    accelerator, training = features.accelerator, options.training
    order = ShuffledStream(len(train), options.run.seed)
    heads.train()
    bar = tqdm(
        range(run.step, training.steps),
        "training",
        initial=run.step,
        total=training.steps,
        disable=not accelerator.is_main_process,
        mininterval=2,
    )
    for step in bar:
        first = (step * accelerator.num_processes + accelerator.process_index) * training.batch_size
        batch = []
        for index in range(first, first + training.batch_size):
            image = features(train, order[index])
            mask = train.read_mask(order[index], image.image_size)
            batch.append(draw_pixels(image, mask, training.pixels, [options.run.seed, index], accelerator.device))
        losses = batch_loss(heads, batch, features.model.config.patch_size)
        accelerator.backward(losses.sum())  # each head has its own loss: the gradients do not mix
        if skip_diverged(accelerator.unwrap_model(heads), bad):
            optimizer.step()
        if min(bad) > options.run.max_bad_steps:
            raise NotFinite(
                f"All heads diverged: gradients were not finite in more than {options.run.max_bad_steps} steps "
                "(--max_bad_steps). Lower --learning_rates. What was written before is kept."
            )
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{losses.min().item():.3f}")
            run.log.write({"step": step + 1, "losses": losses.tolist()})
        if run.after_step(step + 1, bad_steps=bad):
            break


def skip_diverged(heads: LinearHeads, bad: list[int]) -> bool:
    """
    Drop gradients that are not finite, so that the optimizer leaves their heads alone, and count that; `False` if no head
    is left. After DDP's mean gradients are the same in all processes.
    """
    left = False
    for number, layer in enumerate(heads.linear):
        parameters = list(layer.parameters())
        if all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None):
            left = True
            continue
        bad[number] += 1
        for parameter in parameters:
            parameter.grad = None
    return left


def measure_heads(
    weight: torch.Tensor, bias: torch.Tensor, features: FrozenFeatures, test: SegmentationSet
) -> list[dict[str, Any]]:
    """
    Mean IoU, pixel accuracy and IoU of each class for heads of weight `(heads, classes, dim)` and bias `(heads, classes)`,
    over the images of all processes.
    """
    accelerator, classes = features.accelerator, len(test.labels)
    counts = np.zeros((len(weight), classes, classes), np.int64)
    share = range(accelerator.process_index, len(test), accelerator.num_processes)
    for number in tqdm(share, desc="test", disable=not accelerator.is_main_process):
        image = features(test, number)
        mask = test.read_mask(number, image.image_size)
        grid = image.features.to(accelerator.device).float()
        for head, (head_weight, head_bias) in enumerate(zip(weight, bias, strict=True)):
            decision = decide(
                torch.einsum("dhw,nd->nhw", grid, head_weight) + head_bias[:, None, None],
                torch.arange(classes),
                features.model.config.patch_size,
                working_size=image.working_size,
                output_size=image.image_size,
            )
            counts[head] += count_pixels(decision.labels, mask, classes)
    total = accelerator.reduce(torch.from_numpy(counts).to(accelerator.device), "sum").cpu().numpy()
    return [scores_of(confusion_matrix, test.labels) for confusion_matrix in total]


def scores_of(confusion_matrix: np.ndarray, labels: tuple[str, ...]) -> dict[str, Any]:
    """The scores of a confusion matrix. Classes that occur nowhere have `None`, because JSON has no NaN."""
    results = area_scores(confusion_matrix)
    iou = [None if np.isnan(value) else value for value in results["per_category_iou"].tolist()]
    return {
        "mean_iou": results["mean_iou"],
        "overall_accuracy": results["overall_accuracy"],
        "classes": dict(zip(labels, iou, strict=True)),
    }
