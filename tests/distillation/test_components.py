"""The parts of a run by themselves, without the run."""

import random
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers.trainer_utils import SchedulerType

from spar_hf import SlidingWindowTeacher
from spar_hf.data.augmentation import Views, draw_crop, view_generator
from spar_hf.data.sources import ImageOptions, open_sources
from spar_hf.data.training_images import Skipped, SkippedList
from spar_hf.distillation.held_out import ErrorCurve, HeldOut, TeacherPair, largest_views, teach
from spar_hf.distillation.locality import initialise_locality, position_subspace
from spar_hf.distillation.losses import DistillationLoss, decision_loss, distillation_loss, error_weights
from spar_hf.distillation.models import Models
from spar_hf.distillation.optimisation import Optimisation, count_steps, make_schedule
from spar_hf.distillation.options import OptimisationOptions, StudentOptions, TeacherOptions
from spar_hf.distillation.progress import SpeedMeter
from spar_hf.distillation.stream import open_stream, readable_samples
from spar_hf.distillation.student import Student, prepare_positions
from spar_hf.distillation.targets import Target
from spar_hf.heads.panoptic_options import PanopticTraining
from spar_hf.utils.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture
def models(base_folder):
    return Models.load(TeacherOptions(model=str(base_folder), stride=32), CPU)


def test_models__the_teacher_is_a_frozen_copy_of_the_student(models):
    pairs = zip(models.student.parameters(), models.teacher.model.parameters(), strict=True)
    assert all(torch.equal(own, other) and own is not other for own, other in pairs)
    assert not any(p.requires_grad for p in models.teacher.parameters())
    assert models.model.vision_model is models.student and models.image_processor is models.processor.image_processor
    (texts,) = models.embed_words(["cityscapes"], CPU)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(len(texts)))
    models.set_position_extent(128)
    assert models.model.config.position_extent == models.student.config.position_extent == 128


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"model": "/nowhere"}, "/nowhere"), ({"stride": 65}, "stride"), ({"window_size": 50}, "window")],
)
def test_models__what_does_not_fit_is_a_usage_error(base_folder, wrong, named):
    with pytest.raises(UsageError, match=named):
        Models.load(TeacherOptions(**({"model": str(base_folder)} | wrong)), CPU)


def test_stream__what_is_held_out_never_comes(models, image_folder):
    options = ImageOptions(images=[str(image_folder)], holdout_every=3)
    sources = open_sources(options)
    stream = open_stream(sources, options, Views(), models, seed=0, holdout_images=5)
    names = [sample.name for sample in islice(stream.order, 8)]
    assert stream.count == 4 and len(set(names)) == 4
    assert {sample.name for sample in stream.held_out} == {str(image_folder / f"{i}.jpg") for i in (2, 5)}
    assert [sample.name for sample in stream.choose(9, seed=1)] != [sample.name for sample in stream.choose(9, seed=2)]
    two = [
        open_stream(sources, options, Views(), models, seed=0, holdout_images=1, process=i, processes=2) for i in (0, 1)
    ]
    taken = zip(*(islice(stream.order, 4) for stream in two), strict=True)
    assert [sample.name for pair in taken for sample in pair] == names
    assert {stream.images.others.name(i) for i in range(len(stream.images.others))} == set(
        names
    )  # what may cover a part
    loaded = next(iter(stream.loader(workers=0, seed=0)))
    assert loaded.pixel_values.shape[:2] == (1, 3) and not {side % 16 for side in loaded.pixel_values.shape[2:]} - {0}


def test_a_run_of_unreadable_images_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("spar_hf.distillation.stream.MOST_UNREADABLE", 3)
    skipped = SkippedList(tmp_path / "skipped.jsonl")
    damaged = [Skipped(f"{i}.jpg", "damaged") for i in range(3)]
    assert list(readable_samples([*damaged[:2], "good", *damaged[:2]], skipped)) == ["good"]
    with pytest.raises(UsageError, match="--images"):
        list(readable_samples(["good", *damaged], skipped))
    assert skipped.count() == 3


def test_positions__a_prior_is_kept_by_the_step(models):
    squares = [torch.randn(1, 3, 128, 128) for _ in range(3)]
    options = StudentOptions(local_start=0.5, position_extent=128, train_layers="all")
    directions = prepare_positions(models, options, squares)
    assert models.student.config.position_extent == 128
    student = Student(models.student, options, directions).to(CPU)
    with torch.no_grad():
        for parameter in student.writers:
            parameter.add_(torch.randn(parameter.shape))
    assert position_subspace(models.student) is None
    student.restore_positions()
    found = position_subspace(models.student)
    torch.testing.assert_close(found @ found.T, directions @ directions.T, atol=1e-3, rtol=0)
    with pytest.raises(UsageError, match="--position_extent 256"):
        prepare_positions(models, StudentOptions(position_extent=256), squares)
    assert prepare_positions(models, StudentOptions(), squares) is not None  # of the earlier start


def test_positions__nothing_is_asked_for(models):
    before = {name: weight.clone() for name, weight in models.student.state_dict().items()}
    assert prepare_positions(models, StudentOptions(), iter(())) is None
    assert all(torch.equal(weight, before[name]) for name, weight in models.student.state_dict().items())
    with pytest.raises(UsageError, match="--local_start"):
        initialise_locality(models.student, [], 0.5)


def test_optimisation__steps_lower_the_loss_of_an_image(models, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = Accelerator(gradient_accumulation_steps=2)
    student = Student(models.student, StudentOptions(train_layers="1"))
    options = OptimisationOptions(learning_rate=1e-3, lr_scheduler_type="constant", warmup_ratio=0)
    optimisation = Optimisation(accelerator, student, options, steps=10)
    pixel_values = torch.randn(1, 3, 96, 128)
    target, losses, steps = models.teacher(pixel_values).feature_map, [], []
    for _ in range(12):
        with accelerator.accumulate(optimisation.wrapped):
            loss = DistillationLoss()(optimisation.wrapped(pixel_values).feature_map, target)
            steps.append(optimisation.step(loss))
            losses.append(float(loss.detach()))
    assert steps == [False, True] * 6 and losses[0] == losses[1] and losses[-1] < 0.9 * losses[0]
    assert optimisation.learning_rate == 1e-3
    assert torch.equal(optimisation.features(pixel_values), models.student(pixel_values).feature_map)


WITHOUT_ARGUMENTS = {"linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"}
WITHOUT_ARGUMENTS |= {"inverse_sqrt"}


@pytest.mark.parametrize("name", [str(kind.value) for kind in SchedulerType])
def test_schedules__those_that_cannot_run_are_refused_before_work_starts(name, monkeypatch):
    """Of those of transformers some need arguments that no option gives."""
    if name not in WITHOUT_ARGUMENTS:
        for options in (OptimisationOptions, PanopticTraining):
            with pytest.raises(UsageError, match=rf"--lr_scheduler_type {name}: use one of linear, cosine"):
                options(lr_scheduler_type=name)
        return
    assert OptimisationOptions(lr_scheduler_type=name) and PanopticTraining(lr_scheduler_type=name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(name, optimizer, 0.5, 10, Accelerator())
    optimizer.step()
    schedule.step()
    assert 0 < schedule.get_last_lr()[0] <= 1


def test_steps__of_epochs_are_rounded_up():
    assert count_steps(OptimisationOptions(epochs=1.5), images=5, images_per_step=2) == 4
    assert count_steps(OptimisationOptions(epochs=0.01), images=5, images_per_step=2) == 1
    assert count_steps(OptimisationOptions(), images=None, images_per_step=2) == 1000


def test_loss__whitens_and_compares_decisions():
    generator = torch.Generator().manual_seed(0)
    student, target = torch.randn(2, 1, 6, 3, 4, generator=generator)
    texts = torch.nn.functional.normalize(torch.randn(5, 6, generator=generator), dim=-1)
    assert torch.equal(DistillationLoss()(student, target), distillation_loss(student, target))
    assert DistillationLoss().decision(student, target) is None
    both = DistillationLoss(vocabularies=[texts, texts[:2]], scale=40.0, words_weight=0.5)
    words = (decision_loss(student, target, texts, 40.0) + decision_loss(student, target, texts[:2], 40.0)) / 2
    torch.testing.assert_close(both(student, target), distillation_loss(student, target) + 0.5 * words)
    assert both.decision(student, target) == pytest.approx(float(words))
    weights = error_weights([target], 0.5)
    white = torch.einsum("ij,bjhw->bihw", weights, student - target).square().mean()
    torch.testing.assert_close(DistillationLoss(weights)(student, target), white)
    # decisions are those of the features themselves, which text embeddings are compared with
    whitened = DistillationLoss(weights, [texts], 40.0, words_weight=0.5, balance=0.5)
    words = decision_loss(student, target, texts, 40.0, balance=0.5)
    torch.testing.assert_close(whitened(student, target), white + 0.5 * words)


def test_held_out_error__is_a_mean_over_patches_and_the_best_is_kept():
    pairs = [
        TeacherPair(None, torch.full((1,), value), torch.ones(1, 4, size, 2)) for value, size in ((2.0, 1), (3.0, 3))
    ]
    held_out = HeldOut(pairs)

    def features(value):
        return float(value) * torch.ones(1, 4, 1 if value == 2 else 3, 2)

    assert held_out.error(features, keep_maps=1) == {"mse": (1 * 2 + 4 * 6) / 8, "cosine": 1.0}
    assert len(held_out.kept_maps) == 1
    assert held_out.error(features, decision=lambda found, target: float(found.mean()))["words"] == (2 * 2 + 3 * 6) / 8
    assert HeldOut([]).error(features) is None and ErrorCurve().best is None
    points = [{"step": 1, "mse": 1.0, "words": 0.5}, {"step": 2, "mse": 1.1, "words": 0.1}]
    assert ErrorCurve(None, points, 0.0).best is points[0] and ErrorCurve(None, points, 1.0).best is points[1]
    whole = Views(min_scale=1.0, crop_probability=0, flip_probability=0)
    assert largest_views(Views(jitter_probability=1.0, cutmix_probability=1.0)) == whole


def test_progress__says_where_the_time_goes():
    progress = SpeedMeter(first=2, steps=4, images_per_step=3, device=CPU, show=False)
    assert list(progress.waiting(["a", "b"])) == ["a", "b"]
    with progress.timed("teacher"):
        torch.randn(200, 200) @ torch.randn(200, 200)
    row = progress.row(step=4, loss=0.5, learning_rate=1e-3, skipped=1)
    assert row["images_per_second"] > 0 and 0 < row["teacher_share"] + row["wait_share"] < 1
    assert (row["step"], row["loss"], row["skipped"]) == (4, 0.5, 1) and row["memory_gib"] > 0


def test_teacher__options_are_left_as_they_are(base_folder):
    options = TeacherOptions(model=str(base_folder), teacher_windows=3)
    assert options.mode == "sampled" and options.teacher_mode is None
    assert isinstance(Models.load(options, CPU).teacher, SlidingWindowTeacher)


def test_teacher__reads_the_sizes_and_mirror_images_that_are_asked_for(base_folder):
    options = TeacherOptions(model=str(base_folder), teacher_scales=[1, 0.5], teacher_flip=True)
    assert Models.load(options, CPU).teacher.views == [(1.0, False), (1.0, True), (0.5, False), (0.5, True)]
    assert Models.load(TeacherOptions(model=str(base_folder)), CPU).teacher.views == [(1.0, False)]
    cached = {"teacher_mode": "cached", "teacher_cache": "c"}
    for wrong in ({"teacher_scales": [1, 0]}, cached | {"teacher_flip": True}, cached | {"teacher_dtype": "bf16"}):
        with pytest.raises(UsageError, match="teacher_scales"):
            TeacherOptions(model=str(base_folder), **wrong)
    for wrong in ({"teacher_sides": [384, 0]}, {"teacher_sides": []}, {"teacher_sides": [384], "teacher_scales": [1]},
                  cached | {"teacher_sides": [384]}):  # fmt: skip
        with pytest.raises(UsageError, match="teacher_sides"):
            TeacherOptions(model=str(base_folder), **wrong)
    with pytest.raises(UsageError, match="--teacher_dtype half: use one of fp32, fp16, bf16"):
        TeacherOptions(model=str(base_folder), teacher_dtype="half")


@pytest.mark.parametrize("windows", [None, 2])
def test_teacher__an_image_too_large_for_the_stride_is_a_usage_error(
    windows, base_folder, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("spar_hf.teacher.MAP_BYTES", 10**4)
    options = TeacherOptions(model=str(base_folder), stride=7, teacher_windows=windows)
    models = Models.load(options, CPU)
    with pytest.raises(UsageError, match="Use a stride"):
        Target(models.teacher, options, seed=0)(torch.zeros(1, 3, 80, 96), 0, (96, 80))
    images = ImageOptions(images=[str(image_folder)], holdout_every=3)
    stream = open_stream(open_sources(images), images, Views(), models, seed=0, holdout_images=5)
    with pytest.raises(UsageError, match="Use a stride"):
        skipped = SkippedList(tmp_path / "list")
        teach(stream.held_out, stream.images, Views(), models.teacher, options.scales_for, skipped, progress=False)


@torch.no_grad()
@pytest.mark.parametrize("windows", [None, 2])
@pytest.mark.parametrize("size", [(160, 120), (90, 150)])
def test_teacher__reads_views_as_large_as_in_images_of_the_sides_that_are_asked_for(
    base_folder, tmp_path, size, windows
):
    """Whatever part of an image a view shows, and at whatever size: for targets and for held-out images."""
    for i in range(3):
        noise = torch.randint(256, (*size[::-1], 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{i}.png")
    images = ImageOptions(images=[str(tmp_path)], holdout_every=3)
    options = TeacherOptions(model=str(base_folder), teacher_sides=[96, 144], teacher_windows=windows)
    models = Models.load(options, CPU)
    views = Views(min_scale=0.4, crop_probability=0.5)
    stream = open_stream(open_sources(images), images, views, models, seed=0, holdout_images=1)
    target, sides = Target(models.teacher, options, seed=0), set()
    for sample in islice(stream.order, 8):
        loaded = stream.images[sample]
        crop = draw_crop(size, 64, 16, views, view_generator(0, sample.index))
        side = min(size) * crop.size[0] / (crop.box[2] - crop.box[0])  # of the whole image, resized as the view is
        short = min(loaded.whole_size)
        assert short == pytest.approx(side, rel=0.02)
        teacher = SlidingWindowTeacher(models.teacher.model, scales=[96 / short, 144 / short])
        found, weight = target(loaded.pixel_values, sample.index, loaded.whole_size)
        if windows is None:
            expected = teacher(loaded.pixel_values).feature_map
        else:
            drawn = random.Random(f"windows-0-0-{sample.index}").getrandbits(62)
            expected, weights = teacher.sample(loaded.pixel_values, 2, torch.Generator().manual_seed(drawn))
            torch.testing.assert_close(weight, weights)
        torch.testing.assert_close(found, expected)
        sides.add(round(side))
    assert len(sides) > 4
    whole = largest_views(views)
    (pair,) = teach(stream.held_out, stream.images, whole, models.teacher, options.scales_for,
                    SkippedList(tmp_path / "list"), progress=False)  # fmt: skip
    scales = [side / min(pair.pixel_values.shape[-2:]) for side in (96, 144)]
    expected = models.teacher(pair.pixel_values, scales=scales).feature_map
    assert float((pair.target - expected).norm() / expected.norm()) < 0.05  # the view is cut to whole patches


def test_teacher__panoramas_are_read_smaller_than_the_sides_that_are_asked_for():
    """Else one of them would take thousands of windows."""
    options = TeacherOptions(model="base", teacher_sides=[384, 512])
    assert options.scales_for((300, 1200)) == options.scales_for((1200, 300)) == [384 / 300, 512 / 300]
    assert options.scales_for((16, 2048)) == [0.75, 1.0]  # four times as long as the sides
    assert TeacherOptions(model="base").scales_for((16, 2048)) is None


@torch.no_grad()
def test_teacher__in_a_precision_of_its_own_makes_targets_and_leaves_the_held_out_reference(base_folder):
    options = TeacherOptions(model=str(base_folder), teacher_dtype="bf16")
    models = Models.load(options, CPU)
    target = Target(models.teacher, options, seed=0)
    assert target.teacher.model.dtype == torch.bfloat16
    assert models.teacher.model.dtype == models.student.dtype == torch.float32
    pixels = torch.randn(1, 3, 80, 96, generator=torch.Generator().manual_seed(0))
    found, expected = target(pixels, 0, (96, 80))[0], models.teacher(pixels).feature_map
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.03
