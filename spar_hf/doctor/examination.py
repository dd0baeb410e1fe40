"""`spar-hf doctor`: loads or converts a model, runs every check, and writes a report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from spar_hf.conversion import convert
from spar_hf.conversion.convert import TOLERANCE
from spar_hf.doctor.checks import CHECKS, Subject, native_size
from spar_hf.doctor.findings import FAILED, NOTE, OK, Finding, Report, device_name, versions, within
from spar_hf.model.modeling_spar import SparForOpenVocabSegmentation, SparVisionModel
from spar_hf.model.processing_spar import SparProcessor
from spar_hf.utils.errors import MissingFiles, UsageError, as_usage_errors, import_of_train
from spar_hf.windows import default_stride

VOC_IMAGES = 100
# read-out, image size of the base, layers: backbone of the published rows
PUBLISHED_BACKBONES = {
    ("siglip", 512, 12): "SigLIP2 ViT-B/16",
    ("maskclip", 224, 12): "OpenCLIP ViT-B/16",
    ("dinov3txt", 384, 24): "DINOv3 ViT-L/16",
    ("dinov3txt", 224, 24): "DINOv3 ViT-L/16",
}


@dataclass(kw_only=True)
class DoctorOptions:
    """
    What is checked.

    Attributes:
        model: folder or hub id of a SPAR model or of a backbone of transformers; or an official checkpoint, a file.
        family, base: of a checkpoint, as for [`convert`].
        conversion: further keywords of [`convert`], such as `tokenizer` and `text_heads`.
        voc: folder of PASCAL VOC 2012 as published (`VOCdevkit` or `VOC2012`), for mIoU on its first images.
        stride: step of the teacher in pixels. Default: one and a half patches.
        device: where the model runs; by default a GPU if there is one.

    Raises:
        UsageError: a checkpoint without family and base, or these or `conversion` for a folder; a wrong stride; `voc`
            without the packages that measure, or with another device than theirs.
    """

    model: str
    family: str | None = None
    base: str | None = None
    conversion: dict[str, Any] | None = None
    voc: Path | None = None
    stride: int | None = None
    device: str | None = None

    def __post_init__(self):
        is_file = Path(self.model).is_file()
        if is_file and (self.family is None or self.base is None):
            raise UsageError(f"{self.model} is a checkpoint: say --family and --base, as for `spar-hf convert`.")
        if not is_file and (self.family is not None or self.base is not None):
            if not Path(self.model).exists():
                raise MissingFiles(f"{self.model} does not exist.")
            raise UsageError(f"{self.model} is no checkpoint file: --family and --base belong to one.")
        given = [f"--{name.replace('_', '-')}" for name, value in (self.conversion or {}).items() if value is not None]
        if not is_file and given:
            raise UsageError(
                f"{self.model} is no checkpoint file, and only one is converted: leave out {', '.join(given)}."
            )
        if self.voc is not None and not self.voc.is_dir():
            raise MissingFiles(f"--voc {self.voc} is no folder.")
        if self.stride is not None and self.stride < 1:
            raise UsageError(f"--stride {self.stride} must be at least 1.")
        if self.voc is not None:
            check_measuring(self.device)


def check_measuring(device: str | None) -> None:
    """
    Check before minutes of other checks that mIoU can be measured, on the device where it will be.

    Raises:
        UsageError: a package is missing, or the device is another.
    """
    import_of_train("--voc", "spar_hf.evaluation.evaluator")
    used = import_of_train("--voc", "accelerate").PartialState().device
    asked = used if device is None else torch.device(device)
    if (asked.type, asked.index or 0) != (used.type, used.index or 0):
        raise UsageError(
            f"--voc is measured on {used}, as accelerate chooses it, not on {device}. Leave --device out, or choose it by "
            "ACCELERATE_USE_CPU=true or CUDA_VISIBLE_DEVICES."
        )


def examine(options: DoctorOptions, tell: Callable[[str, list[Finding]], None] | None = None) -> Report:
    """
    Run all checks on a model.

    A check that fails does not stop the others. Nothing is downloaded but the model itself, if it is a hub id.

    Args:
        options: the model and how it is checked.
        tell: called with the name of each check and its findings as soon as it is done.

    Returns:
        The [`Report`].

    Raises:
        UsageError: the model cannot be loaded, or a checkpoint cannot be converted.

    Example:

    ```python
    >>> from spar_hf import SPAR_TINY

    >>> report = examine(DoctorOptions(model=SPAR_TINY, stride=96, device="cpu"))
    >>> report.failed
    []
    ```"""
    report = Report(options.model, versions())
    with folder_of(options, report, tell) as folder:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        report.setting["device"] = device_name(device)
        with timed(report, "loading"):
            subject = load_subject(folder, device, options.stride)
        report.setting["model"] = describe(subject)
        checks = dict(CHECKS)
        if options.voc is not None:
            voc = options.voc
            checks["voc20"] = lambda subject: check_voc(subject, folder, voc)
        for name, check in checks.items():
            with timed(report, name):
                found = findings_of(name, check, subject)
            report.findings += found
            if tell is not None:
                tell(name, found)
    return report


def describe(subject: Subject) -> str:
    """Read-out and sizes of a model in words."""
    config = subject.vision.config
    return (
        f"{config.readout}, {config.num_hidden_layers} × {config.hidden_size}, patch {config.patch_size} px, "
        f"pre-trained at {config.image_size} px, " + ("two towers" if subject.towers else "vision only")
    )


def findings_of(name: str, check: Callable[[Subject], Iterator[Finding]], subject: Subject) -> list[Finding]:
    """The findings of a check; an error of the model is one, too."""
    found = []
    try:
        for finding in check(subject):
            found.append(finding)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
        named = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        remedy = "" if isinstance(error, UsageError) else "The check could not run to its end: report this line."
        found.append(Finding(name, FAILED, " ".join(named.split()), remedy=remedy))
    return found


@contextmanager
def timed(report: Report, name: str) -> Iterator[None]:
    """Note the seconds of the block under a name."""
    start = time.perf_counter()
    yield
    report.seconds[name] = time.perf_counter() - start


@contextmanager
def folder_of(
    options: DoctorOptions, report: Report, tell: Callable[[str, list[Finding]], None] | None
) -> Iterator[str]:
    """The folder or hub id to load; a checkpoint is converted to a temporary one, which is a check by itself."""
    if options.family is None or options.base is None:
        yield options.model
        return
    with TemporaryDirectory() as temporary:
        output = Path(temporary) / "converted"
        with timed(report, "conversion"):
            try:
                done = convert(options.model, options.family, options.base, output, **(options.conversion or {}))
            except RuntimeError as error:  # it differs from the formulae
                raise UsageError(str(error)) from error
        remedy = "Check that --base is the base of this checkpoint."
        found = [
            within(f"conversion equals the published formulae, {name}", value, TOLERANCE, remedy)
            for name, value in done.differences.items()
        ]
        used = f"{done.used} used, {len(done.skipped)} skipped: {', '.join(list(done.skipped)[:3])}"
        found.append(Finding("tensors of the checkpoint", OK, used.removesuffix(": ")))
        report.findings += found
        if tell is not None:
            tell("conversion", found)
        yield str(output)


def load_subject(folder: str, device: torch.device, stride: int | None = None) -> Subject:
    """
    A model in float32 on a device.

    Raises:
        UsageError: no such model, or one of another kind.
    """
    with as_usage_errors():
        try:
            towers: Any = SparForOpenVocabSegmentation.from_backbone(folder, dtype=torch.float32).to(device).eval()
        except ValueError as error:
            if "text tower" not in str(error):
                raise
            vision = SparVisionModel.from_backbone(folder, dtype=torch.float32).to(device).eval()
            return Subject(vision, None, None, stride_of(vision, stride))
        processor = SparProcessor.from_backbone(folder)
    return Subject(towers.vision_model, towers, processor, stride_of(towers.vision_model, stride))


def stride_of(vision: SparVisionModel, stride: int | None) -> int:
    """The step of the teacher that is asked for, or else its default; at most a window."""
    return min(default_stride(vision.config.patch_size) if stride is None else stride, native_size(vision))


def check_voc(subject: Subject, folder: str, voc: Path) -> Iterator[Finding]:
    """mIoU of one pass on the first images of VOC20 by the published protocol, and the published figures of all images."""
    from spar_hf.evaluation.evaluator import evaluate_runs
    from spar_hf.evaluation.options import EvaluationOptions
    from spar_hf.evaluation.published import ROWS, SINGLE, SPAR

    options = EvaluationOptions.from_flat(
        dataset=str(voc),
        benchmark="voc20",
        protocol="spar",
        limit=VOC_IMAGES,
        model=[f"model={folder}"],
        boundary=False,
    )
    report = evaluate_runs(options)
    config = subject.vision.config
    backbone = PUBLISHED_BACKBONES.get((config.readout, config.image_size, config.num_hidden_layers))
    rows = [row for row in ROWS if row.source == SPAR and row.backbone == backbone and row.inference == SINGLE]
    expected = ", ".join(f"{row.method} {row.scores['voc20']}" for row in rows)
    name = f"VOC20, single pass, mIoU of {report['images']} images"
    found = f"{100 * report['runs'][0]['mean_iou']:.1f} %"
    yield Finding(name, NOTE, found, f"published, all images: {expected}" if expected else "no published figure")
