"""What a student's folder says about how it was made."""

from typing import Any

from spar_hf.data.augmentation import Views
from spar_hf.distillation.held_out import ErrorCurve
from spar_hf.distillation.options import DistillationOptions
from spar_hf.utils.model_cards import short_name

# Options that a record repeats as they are.
REPEATED = (
    "teacher_mode",
    "teacher_variant",
    "exclude",
    "preset",
    "train_layers",
    "train_parts",
    "lora_rank",
    "whiten",
    "words",
    "words_weight",
    "words_balance",
    "local_start",
    "fit_prior",
    "same_size",
    "learning_rate",
    "weight_decay",
    "seed",
)


def make_record(
    options: DistillationOptions,
    *,
    window_size: int,
    images: int | None,
    stored_views: int | None,
    views: Views,
    steps: int,
    images_per_step: int,
    mixed_precision: str,
) -> dict[str, Any]:
    """
    The `distillation` record of a configuration, without held-out errors.

    Args:
        options: of the run.
        window_size: of the teacher in pixels.
        images: training images; `None` for a stream.
        stored_views: of them in a teacher cache; `None` if views are drawn while training.
        views: how views were drawn.
        steps: optimizer steps.
        images_per_step: of all processes.
        mixed_precision: `no`, `fp16` or `bf16`.
    """
    flat = options.flat
    return {
        "teacher": short_name(options.teacher.model),
        "student": [short_name(student) for student in options.student.student],
        "window_size": window_size,
        "stride": flat["stride"],
        "teacher_windows": options.teacher.teacher_windows or "all",
        "teacher_scales": None if options.teacher.teacher_sides else options.teacher.teacher_scales or [1.0],
        "teacher_sides": options.teacher.teacher_sides,
        "teacher_flip": options.teacher.teacher_flip,
        "images": [short_name(entry) for entry in options.images.images],
        "num_images": images or "streamed",
        **({} if stored_views is None else {"num_stored_views": stored_views}),
        "view_size": [views.long_side_windows, views.short_side_windows, views.min_scale],
        "view_pixels": [views.long_side_pixels, views.short_side_pixels, views.min_side_pixels],
        "view_resample": views.resample,
        "fixed_views": views.fixed_views,
        "steps": steps,
        "images_per_step": images_per_step,
        "mixed_precision": mixed_precision,
        **{name: flat[name] for name in REPEATED},
        "crop_probability": views.crop_probability,
        "flip_probability": views.flip_probability,
        "jitter_probability": views.jitter_probability,
        "jitter_student_only": views.jitter_student_only,
        "cutmix_probability": views.cutmix_probability,
    }


def held_out_record(curve: ErrorCurve, images: int) -> dict[str, Any]:
    """The `held_out` part of a record; empty before the first point of the curve."""
    if curve.best is None:
        return {}
    return {"held_out": {"images": images, "before": curve.before, "after": curve.best, "curve": curve.points}}
