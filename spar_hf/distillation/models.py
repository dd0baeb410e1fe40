"""The models of a distillation: the teacher, the student, and what the student is saved with."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from spar_hf import (
    SlidingWindowTeacher,
    SparForOpenVocabSegmentation,
    SparImageProcessorPil,
    SparProcessor,
    SparVisionModel,
)
from spar_hf.distillation.options import TEACHER_DTYPES, TeacherOptions, WindowOptions
from spar_hf.model.backbone_sources import load_source_config
from spar_hf.model.prompts import embed_names, resolve_templates
from spar_hf.model.words import name_tokens
from spar_hf.utils.errors import UsageError, as_usage_errors
from spar_hf.utils.labels import parse_labels
from spar_hf.windows import default_stride


@dataclass
class Models:
    """
    What is loaded before any work starts, so that nothing is missing when the student is written.

    Attributes:
        model: the model that is written, both towers if there are two.
        student: its vision tower.
        processor: is written with it.
        teacher: sliding windows over a frozen copy of the vision tower.
    """

    model: SparForOpenVocabSegmentation | SparVisionModel
    student: SparVisionModel
    processor: SparProcessor | SparImageProcessorPil
    teacher: SlidingWindowTeacher

    @classmethod
    def load(cls, options: TeacherOptions, device: torch.device) -> "Models":
        """
        Raises:
            UsageError: no model of this name, or windows that do not fit it.
        """
        with as_usage_errors():
            model, student = load_model(options.model)
            processor_class = (
                SparProcessor if isinstance(model, SparForOpenVocabSegmentation) else SparImageProcessorPil
            )
            processor = processor_class.from_backbone(options.model)
        views = {"scales": options.teacher_scales or (1.0,), "flip": options.teacher_flip}
        return cls(model, student, processor, make_teacher(copy.deepcopy(student), options, **views).to(device))

    @property
    def image_processor(self) -> SparImageProcessorPil:
        """Normalises images as the teacher expects them."""
        return self.processor.image_processor if isinstance(self.processor, SparProcessor) else self.processor

    def start_from(self, students: list[str]) -> None:
        """
        Let the student start as the mean of earlier students.

        Raises:
            UsageError: they do not fit the teacher or one another.
        """
        weights, extent = mean_of_students(students, self.student)
        self.student.load_state_dict(weights)
        self.set_position_extent(extent)

    def set_position_extent(self, extent: int | None) -> None:
        """
        Set how far the student's position table reaches, in its configuration and in that of the model that is written.

        Raises:
            UsageError: an extent that no model could be loaded with.
        """
        for config in (self.model.config, self.student.config):
            config.position_extent = extent
            with as_usage_errors():
                config.check_position_extent()

    def embed_words(self, words: list[str], device: torch.device) -> list[torch.Tensor]:
        """
        Text embeddings of the names of each vocabulary of `--words`: `(names, dim)` of unit length. Of names that the
        tokenizer cannot tell apart, one counts. Moves the model to `device`.

        Raises:
            UsageError: the model has no text tower, cannot read a name, or cannot tell two names of a vocabulary apart.
        """
        if not isinstance(self.processor, SparProcessor):
            raise UsageError("--words needs a --model with a text tower. Leave it out.")
        model: Any = self.model  # transformers decorates `to` in a way that hides its arguments
        model.to(device)
        vocabularies = []
        for entry in words:
            names = sorted(set(parse_labels(entry).all_names))
            with as_usage_errors():
                tokens = name_tokens(self.processor.tokenizer, names, resolve_templates("short"))
                distinct = {tokens[name]: name for name in reversed(names)}
                if len(distinct) < 2:
                    raise UsageError(
                        f"--words {entry}: there is nothing to decide between fewer than two different names. Give the "
                        "classes that are told apart in one entry, as 'road; car; sky'."
                    )
                vocabularies.append(embed_names(model, self.processor.tokenizer, sorted(distinct.values()), "short"))
        return vocabularies


def resolve_stride(options: WindowOptions) -> None:
    """
    Set a stride that is not given to that of the model's patches ([`default_stride`]), by its configuration alone. It is
    written to the recipe and compared when a run is resumed, both before weights are loaded.
    """
    if options.stride is None:
        with as_usage_errors():
            config = load_source_config(options.model)
        # loading the weights says what is wrong with a model without patches
        options.stride = default_stride(getattr(getattr(config, "vision_config", config), "patch_size", 16))


def make_teacher(encoder: SparVisionModel, options: WindowOptions, **views: Any) -> SlidingWindowTeacher:
    """
    Sliding windows over an encoder, which is frozen; `views` are `scales` and `flip` of the teacher. The window is
    `window_size`, or else `rope_window_size` for a model without a position table, or else the model's `image_size`.

    Raises:
        UsageError: a window or stride that does not fit the encoder.
    """
    no_table = encoder.config.position_resampling == "rope"
    with as_usage_errors():
        return SlidingWindowTeacher(
            encoder.eval().requires_grad_(False),
            options.window_size or (options.rope_window_size if no_table else None),
            options.stride,
            options.window_batch_size,
            **views,
        )


def sped_up(teacher: SlidingWindowTeacher, options: WindowOptions) -> SlidingWindowTeacher:
    """The teacher in the precision of `--teacher_dtype`, compiled with `--teacher_compile`; itself without either."""
    if options.teacher_dtype is None and not options.teacher_compile:
        return teacher
    dtype = None if options.teacher_dtype is None else TEACHER_DTYPES[options.teacher_dtype]
    return teacher.sped_up(dtype, options.teacher_compile)


def load_model(name: str) -> tuple[SparForOpenVocabSegmentation | SparVisionModel, SparVisionModel]:
    """A SPAR folder or a backbone: the whole model, with both towers if there are two, and its vision tower."""
    if getattr(load_source_config(name), "text_config", None) is None:
        model = SparVisionModel.from_backbone(name)
        return model, model
    both = SparForOpenVocabSegmentation.from_backbone(name)
    return both, both.vision_model


def mean_of_students(names: list[str], like: SparVisionModel) -> tuple[dict[str, torch.Tensor], int | None]:
    """
    The mean of the vision towers' weights, and their common `position_extent`. Students with a common start lie in one basin
    of the loss, where the mean is nearer to the teacher than the students are on average (model soups, arXiv 2203.05482).

    Raises:
        UsageError: other shapes than `like`, or position tables of different extents.
    """
    with as_usage_errors():
        students = [load_model(name)[1] for name in names]
    first, states = students[0], [student.state_dict() for student in students]
    shapes = {key: value.shape for key, value in like.state_dict().items()}
    for name, student, state in zip(names, students, states, strict=True):
        if student.config.position_extent != first.config.position_extent:
            raise UsageError(
                f"--student: the positions of {names[0]} span {first.config.position_extent} px, those of {name} "
                f"{student.config.position_extent}. Give students of one extent."
            )
        if {key: value.shape for key, value in state.items()} != shapes:
            raise UsageError(
                f"--student {name} has other shapes than --model, its teacher. Give a student of that model."
            )
    mean = {key: torch.stack([state[key].float() for state in states]).mean(0) for key in states[0]}
    return mean, first.config.position_extent
