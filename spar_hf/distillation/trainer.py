"""
Distil the sliding-window teacher of a backbone into a student of the same architecture that needs one pass.

The student starts as the teacher's encoder, sees whole images with its position table resampled, and regresses onto the
teacher's features with the mean squared error, without labels (SPAR, arXiv 2604.02252, section 3).

    accelerate launch training/distill.py --model BASE --images IMAGES --output DIR --preset spar
    accelerate launch --config_file training/configs/multi_gpu.yaml training/distill.py recipe.yaml --steps 20000
"""

import logging
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from PIL import Image
from rich.console import Console

from spar_hf import SparForOpenVocabSegmentation
from spar_hf.data.order import MapOrder, StreamOrder
from spar_hf.data.sources import open_sources
from spar_hf.data.training_images import LoadedSample, SkippedList
from spar_hf.distillation.dry_run import show_options
from spar_hf.distillation.held_out import PICTURED, ErrorCurve, HeldOut, largest_views, teach
from spar_hf.distillation.locality import fit_prior
from spar_hf.distillation.losses import DistillationLoss, error_weights
from spar_hf.distillation.models import Models, resolve_stride
from spar_hf.distillation.optimisation import Optimisation, count_steps, is_sharded
from spar_hf.distillation.options import DistillationOptions
from spar_hf.distillation.pictures import draw_curve
from spar_hf.distillation.progress import SpeedMeter
from spar_hf.distillation.recipes import parse_options
from spar_hf.distillation.records import held_out_record, make_record
from spar_hf.distillation.stream import image_names, open_stream, readable_samples
from spar_hf.distillation.student import Student, prepare_positions
from spar_hf.distillation.student_folders import (
    finish_folder,
    held_out_errors,
    merge_adapters,
    save_adapter,
    save_student,
    store_as,
)
from spar_hf.distillation.targets import Target
from spar_hf.distillation.trainable import count_parameters, share_frozen
from spar_hf.model.fingerprints import vision_fingerprint, weights_hash
from spar_hf.utils.atomic import write_atomically, write_text
from spar_hf.utils.checkpoints import is_finished
from spar_hf.utils.errors import NotFinite, UsageError
from spar_hf.utils.runs import TrainingRun, start_accelerator

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 16  # training images that show which directions of the token space are used


class Distillation:
    """
    One run. The constructor loads everything, checks it and measures the student before training; [`Distillation.run`]
    trains.

    Args:
        options ([`DistillationOptions`]): what to distil, on which images, and how.

    Raises:
        UsageError: a model, images, a cache or a checkpoint that does not fit the options; another run in its folder.
        NotFinite: the student's held-out error is no number before training.
    """

    def __init__(self, options: DistillationOptions):
        self.options, self.output = options, Path(options.run.output)
        optimisation = options.optimisation
        resolve_stride(options.teacher)
        self.accelerator = start_accelerator(
            optimisation.mixed_precision,
            optimisation.seed,
            options.run.report_to,
            self.output,
            gradient_accumulation_steps=optimisation.gradient_accumulation_steps,
        )
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.training_run = TrainingRun(
            self.accelerator,
            options.run,
            options.settings,
            options.with_current_names,
            options.folders,
            per_process="gradient_accumulation_steps",
        )
        self.state = self.training_run.state
        try:
            self._check_loss()
            self._prepare()
        except BaseException:
            self.training_run.close()
            raise

    def _check_loss(self) -> None:
        """
        Raises:
            UsageError: the run was begun by an earlier version with another `--words` term.
        """
        words = self.options.optimisation.words
        if self.state is not None and words and "words_balance" not in self.state["settings"]:
            raise UsageError(
                f"The run in {self.output} was begun by an earlier version, in which all names of --words competed with one "
                "another. Finish it with that version, or begin another run from its student with --student."
            )

    def _prepare(self) -> None:
        """Load and check everything."""
        options, optimisation = self.options, self.options.optimisation
        sources = open_sources(options.images)  # before the models, which take long to load
        self.models = Models.load(options.teacher, self.device)
        vocabularies = self.models.embed_words(optimisation.words, self.device) if optimisation.words else []
        if options.student.student:
            self.models.start_from(options.student.student)
        self.training_run.check_start_weights(**self._start_weights())
        start = None if self.state is None else self._own_start(self.state["after"])
        names = image_names(sources, options.images, options.teacher.teacher_cache)
        earlier = self.training_run.earlier_samples(names)
        self.stream = open_stream(
            sources,
            options.images,
            options.views,
            self.models,
            seed=optimisation.seed,
            holdout_images=options.run.holdout_images,
            same_size=optimisation.same_size,
            teacher_cache=options.teacher.teacher_cache,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            start=start,
            earlier=earlier,
        )
        # without some of its images an error cannot be compared with earlier ones
        self.measures_others = earlier is not None and earlier.get("measured") != self.stream.names.get("measured")
        self.student = self._make_student()
        self.target = Target(self.models.teacher, options.teacher, optimisation.seed)
        self.images_per_step = self.accelerator.num_processes * optimisation.gradient_accumulation_steps
        self.steps = count_steps(optimisation, self.stream.count, self.images_per_step)
        self.optimisation = Optimisation(self.accelerator, self.student, optimisation, self.steps)
        self.output.mkdir(parents=True, exist_ok=True)
        self.skipped = SkippedList(self.output / "skipped.jsonl")
        if self.is_main:
            self.skipped.start(options.run.resume)
        self.accelerator.wait_for_everyone()
        self.bad_steps = self.training_run.bad_steps
        self.held_out = self._teach_held_out()
        whitening = self._measure_whitening() if optimisation.whiten else None
        scale = self.models.student.config.dense_logit_scale
        balance = optimisation.words_balance
        self.loss = DistillationLoss(whitening, vocabularies, scale, optimisation.words_weight, balance)
        if options.student.fit_prior and self.state is None:
            self._fit_prior()
        self.curve = self._start_curve()

    def run(self) -> Path | None:
        """
        Train, and return the folder that was written; `None` where Ctrl-C or SIGTERM ended the run after a checkpoint.

        Raises:
            NotFinite: the training diverged. The last good student is kept.
        """
        with self.training_run as run:
            try:
                self._start()
                self._train()
                if self.is_main and not run.stopped:
                    self._finish()
            finally:
                self.optimisation.release()
        return None if run.stopped else self.options.folders[-1]

    # The steps of the constructor

    def _start_weights(self) -> dict[str, str]:
        """Fingerprints of what the run reads from folders and its checkpoints do not hold."""
        models = self.models
        found = {"model": vision_fingerprint(models.teacher.model)}
        if self.options.student.student:
            found["student"] = vision_fingerprint(models.student)
        if isinstance(models.model, SparForOpenVocabSegmentation):
            found["model's text tower"] = weights_hash(models.model.text_model).hexdigest()
        return found

    def _own_start(self, after: list[list[int]]) -> list[int]:
        """Where this process goes on in the stream, from where the processes of the checkpoint stopped."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        if len(after) == processes:
            return after[process]
        streaming = self.options.images.streaming
        return StreamOrder.share(after, process, processes) if streaming else MapOrder.share(after, processes)

    def _make_student(self) -> Student:
        """The student with its positions prepared, on its device, sharing frozen weights with the teacher."""
        options, models = self.options.student, self.models
        encoder: Any = models.student  # transformers decorates `to` in a way that hides its arguments
        encoder.to("cpu")  # the text embeddings of --words moved it
        side = 2 * models.teacher.window_size
        kept = None if self.state is None else self.state.get("position_subspace")
        unseen = options.local_start is None or kept is not None
        shown = [] if unseen else self.stream.choose(SHOWN_IMAGES, self.options.optimisation.seed)
        directions = prepare_positions(models, options, self.stream.images.squares(shown, side), kept)
        if is_sharded(self.accelerator) and directions is not None:
            raise UsageError(
                "--local_start changes whole weights after every step, and FSDP splits them. Launch with DDP instead."
            )
        student = Student(models.student, options, directions).to(self.device)
        # frozen weights stay as they are, so the teacher can use the same memory; but --fit_prior changes them
        separate = is_sharded(self.accelerator) or options.fit_prior
        shared = 0 if separate else share_frozen(student.trained, models.teacher.model)
        trained, total = count_parameters(student.trained)
        text = "%.2f M of %.2f M parameters are trained; teacher and student share %.2f M frozen ones."
        logger.info(text, trained / 1e6, total / 1e6, shared / 1e6)
        return student

    def _teach_held_out(self) -> HeldOut:
        """Held-out images under the full teacher. Only the main process measures, unless all must take part."""
        views, stream = largest_views(self.stream.views), self.stream
        # a sharded student needs all processes, and whitening needs the maps in all of them
        here = self.is_main or is_sharded(self.accelerator) or self.options.optimisation.whiten
        samples = stream.held_out if here else []
        teacher, scales_for = self.models.teacher, self.options.teacher.scales_for
        return HeldOut(teach(samples, stream.images, views, teacher, scales_for, self.skipped, progress=self.is_main))

    def _measure_whitening(self) -> torch.Tensor:
        """The matrix that `whiten` applies to the features, from the held-out maps."""
        if not self.held_out.pairs:
            raise UsageError("--whiten is measured on held-out images, and none of them can be read.")
        return error_weights([pair.target for pair in self.held_out.pairs], self.options.optimisation.whiten)

    def _fit_prior(self) -> None:
        """Fit the width of each block's prior to the full teacher on uncropped training images."""
        if self.student.directions is None:
            raise UsageError("--fit_prior needs a prior, and this student had no local start. Give --local_start.")
        if self.is_main:
            stream, seed = self.stream, self.options.optimisation.seed
            samples = stream.choose(self.options.student.fit_prior, seed)
            views = replace(stream.views, crop_probability=0.0)
            if views.jitter_student_only:
                views = replace(views, jitter_probability=0.0, jitter_student_only=False)
            teacher, scales_for = self.models.teacher, self.options.teacher.scales_for
            pairs = teach(samples, stream.images, views, teacher, scales_for, self.skipped, seed)
            factors = fit_prior(
                self.student.model, self.student.directions, [(pair.pixel_values, pair.target) for pair in pairs]
            )
            logger.info("The exponents of the blocks' priors were multiplied by %s.", factors)
        # to the last bit: processes that fitted by themselves could round differently and drift apart
        for parameter in self.student.model.parameters():
            broadcast(parameter.data)

    def _start_curve(self) -> ErrorCurve:
        """The held-out errors so far: of the student before training, and those of a run that is resumed."""
        points: list[dict[str, Any]] = []
        if self.state is None or self.measures_others:
            before = self._held_out_error()
        else:
            before, points = self.state["before"], [*self.state["curve"], *self._points_after(self.state)]
        if self.measures_others:
            logger.warning("Held-out images were removed: errors are measured anew, and those before are forgotten.")
        text = "%s training images, %d held out; held-out error before training: %s"
        logger.info(text, self.stream.count or "Streamed", len(self.held_out), before)
        if before is None and self.options.run.holdout_images and self.is_main:
            logger.warning("No image is held out, so the last student is kept and not the best: lower --holdout_every.")
        return ErrorCurve(before, points, self.options.optimisation.words_weight)

    def _points_after(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """
        Points of the student that the run wrote after its checkpoint: that student stays the best until one is better, also
        where the run goes on with another `--eval_steps`. Empty if the folder is that of another run.
        """
        written = held_out_errors(self.options.folders[-1])
        curve, known = written.get("curve", []), state["curve"]
        is_own = written.get("before") == state["before"] and curve[: len(known)] == known
        return curve[len(known) :] if is_own else []

    # The steps of a run

    def _start(self) -> None:
        """Trackers, the state of the checkpoint that is resumed, and the files that a run starts with."""
        self.training_run.track("spar-distillation", self._record())
        self.training_run.begin(self.steps, self.stream.names)
        if self.state is not None:
            self.optimisation.continue_schedule(self.state["processes"])
        if self.is_main:
            recipe = self.options.flat | {"resume": False, "overwrite": False, "allow_changed_data": False}
            recipe["mixed_precision"] = self.accelerator.mixed_precision  # that of `accelerate launch` if none is given
            write_text(self.output / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))

    def _train(self) -> None:
        """The training loop, until the last step or a signal."""
        run, accelerator, step = self.options.run, self.accelerator, self.training_run.step
        if step >= self.steps:
            return
        # sum of the losses since the last row of the log, in this process
        running = (
            0.0
            if self.state is None
            else own_loss(self.state["running"], accelerator.process_index, accelerator.num_processes)
        )
        progress = SpeedMeter(step, self.steps, self.images_per_step, self.device, show=self.is_main)
        loader = self.stream.loader(self.options.images.workers, self.options.optimisation.seed)
        before = running
        for sample in progress.waiting(readable_samples(loader, self.skipped)):
            with accelerator.accumulate(self.optimisation.wrapped):
                loss = self._loss(sample, progress)
                running += float(loss.detach()) / self.options.optimisation.gradient_accumulation_steps
                is_bad = partial(self.bad_steps.is_bad, step + 1, running - before)
                is_step = self.optimisation.step(loss, is_bad)
            if not is_step:
                continue
            step += 1
            running = before = before if self.bad_steps.last_bad else running
            progress.bar.update()
            if step % run.log_steps == 0:
                self._log(progress, step, running)
                running = before = 0.0
            pictured = bool(run.picture_steps) and step % run.picture_steps == 0
            if step % run.eval_steps == 0 or step == self.steps or pictured:
                self._evaluate(step, pictured)
            stopped = self.training_run.after_step(
                step,
                running=lambda own=running: gather_object([own]),
                after=lambda own=sample.after: gather_object([own]),
                curve=self.curve.points,
                before=self.curve.before,
                bad_steps=self.bad_steps.state,
                position_subspace=None if self.student.directions is None else self.student.directions.tolist,
            )
            if stopped or step == self.steps:
                break
        progress.bar.close()

    def _loss(self, sample: LoadedSample, progress: SpeedMeter) -> torch.Tensor:
        """The loss of one image."""
        pixel_values = sample.pixel_values.to(self.device, non_blocking=True)
        with progress.timed("teacher"), self.accelerator.autocast():
            if sample.target is not None:
                target, weight = sample.target.to(self.device).float(), None
            else:
                plain = sample.teacher_pixel_values
                plain = pixel_values if plain is None else plain.to(self.device, non_blocking=True)
                assert sample.whole_size is not None  # only samples with a target have none
                target, weight = self.target(plain, sample.index, sample.whole_size)
        with self.accelerator.autocast():
            features = self.optimisation.wrapped(pixel_values).feature_map
        return self.loss(features.float(), target, weight)

    def _log(self, progress: SpeedMeter, step: int, running: float) -> None:
        """A row of the log: the mean loss since the last row over all processes, and the speed."""
        losses = gather_object([running])
        loss = self.bad_steps.mean(sum(losses) / len(losses), self.options.run.log_steps)
        if self.is_main:
            row = progress.row(step, loss, self.optimisation.learning_rate, self.skipped.count())
            self.training_run.log.write(row | ({"bad_steps": self.bad_steps.count} if self.bad_steps.count else {}))

    def _held_out_error(self, keep_maps: int = 0) -> dict[str, float] | None:
        error = self.held_out.error(self.optimisation.features, keep_maps, self.loss.decision)
        if error is not None and not all(map(math.isfinite, error.values())):
            raise NotFinite(
                f"The held-out error is {error}: the student's features are no numbers any more. Lower --learning_rate, or "
                "use another --mixed_precision. The last good student is kept."
            )
        return error

    def _evaluate(self, step: int, pictured: bool) -> None:
        """Measure the held-out error, draw it if asked for, and write the student if it is the best so far."""
        error = self._held_out_error(PICTURED if pictured else 0)
        # one process decides, or two that rounded differently would wait for each other
        (point,) = broadcast_object_list([error and {"step": step, **error}])
        is_best = True  # without held-out images the last student is kept
        if point is not None:
            is_best = self.curve.add(point)
            errors = {f"held_out_{name}": value for name, value in point.items() if name != "step"}
            self.accelerator.log(errors, step=step)
        if self.is_main and pictured and point is not None:
            self._show(self.held_out.picture(), step)
        if is_best:
            self._save()
            kept = f"held-out error {point}, the smallest so far" if point else "written; nothing is held out"
            logger.info("Step %d: %s.", step, kept)

    def _show(self, picture: Image.Image, step: int) -> None:
        """Write a picture of the feature maps, and hand it to the trackers."""
        write_atomically(self.output / "pictures" / f"step-{step:06d}.png", picture.save)
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                tracker.log_images({"image, teacher, student": np.asarray(picture)[None]}, step=step, **layout)

    # What is written

    def _record(self) -> dict[str, Any]:
        """What the written folder says about how it was made."""
        record = make_record(
            self.options,
            window_size=self.models.teacher.window_size,
            images=self.stream.different,
            stored_views=self.stream.count if self.options.teacher.mode == "cached" else None,
            views=self.stream.views,
            steps=self.steps,
            images_per_step=self.images_per_step,
            mixed_precision=self.accelerator.mixed_precision,
        )
        return record | held_out_record(self.curve, len(self.held_out))

    def _save(self) -> None:
        """Write the student as it is now. All processes must call it: a sharded one is gathered."""
        state = self.accelerator.get_state_dict(self.optimisation.wrapped)
        if not self.is_main:
            return
        if spoiled := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise NotFinite(
                f"{len(spoiled)} weights of the student are not finite, {spoiled[0]} among them: not written."
            )
        options, record, recipe = self.options.student, self._record(), self.options.flat
        base = (options.student or [self.options.teacher.model])[0]
        if options.lora_rank is not None:
            adapter = self.output / "adapter"
            save_adapter(self.student.trained, state, adapter, record, recipe, base, options.save_dtype)
        if options.merge:
            state = merge_adapters(state, self.student.trained, base)
        if options.lora_rank is None or options.merge:
            model, processor = self.models.model, self.models.processor
            save_student(model, processor, state, self.output / "model", record, recipe, options.save_dtype)

    def _finish(self) -> None:
        """Draw the curves, and complete the written folders."""
        best, curve = self.curve.best, self.output / "curve.png"
        draw_curve(self.output / "log.jsonl", self.curve.points, best, curve)
        drawn = self.output / "pictures" / f"step-{best['step'] if best else self.steps:06d}.png"
        pictures = [curve, drawn] if drawn.is_file() else [curve]
        for folder in self.options.folders:
            store_as(folder, self.options.student.save_dtype)  # a resumed run may have changed it
            finish_folder(folder, self._record(), self.options.flat, pictures)
        logger.info("%d images could not be read (skipped.jsonl).", self.skipped.count())


def own_loss(losses: list[float], process: int, processes: int) -> float:
    """The sum of losses that a process goes on with; their mean where there were more or fewer processes."""
    return losses[process] if len(losses) == processes else sum(losses) / len(losses)


def main(args: list[str] | None = None) -> Path | None:
    """
    Distil as a command line says, by default that of this process; return the folder that was written, `None` where a signal
    ended the run.

    Raises:
        UsageError: invalid options, models, images or checkpoints.
    """
    options = parse_options(sys.argv[1:] if args is None else args)
    if options.run.dry_run:
        show_options(options, Console(markup=False, highlight=False))
        return None
    written = options.folders[-1]
    if options.run.resume and is_finished(
        Path(options.run.output),
        written,
        options.settings | {"save_dtype": options.student.save_dtype},
        options.with_current_names,
    ):
        logger.info("The run is complete, nothing is left to do: %s", written)
        return written
    return Distillation(options).run()
