"""`spar-hf doctor`: all checks of one model, and a report to attach to an issue."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spar_hf.cli.arguments import Device
from spar_hf.cli.convert import Family, TextHeads, Tokenizer, VisionAct
from spar_hf.cli.reporting import exit_on_error, quiet_transformers, say
from spar_hf.utils.errors import PATH_ERRORS
from spar_hf.utils.options import HELP

if TYPE_CHECKING:
    from spar_hf.doctor.findings import Finding

COLOURS = {"ok": "green", "failed": "red", "note": None, "skipped": "yellow"}


def doctor(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a model or backbone, or an official checkpoint (a file).")
    ],
    family: Annotated[Family | None, typer.Option(help="Family of the checkpoint.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model of a checkpoint, as for convert.")] = None,
    tokenizer: Tokenizer = None,
    text_heads: TextHeads = None,
    vision_act: VisionAct = None,
    adaptor: Annotated[
        str | None,
        typer.Option(help="radio: name or number of the head whose teacher has the text tower. Default: siglip2-g."),
    ] = None,
    voc: Annotated[
        Path | None,
        typer.Option(help="Folder of PASCAL VOC 2012: mIoU on its first 100 images, beside the published one."),
    ] = None,
    stride: Annotated[int | None, typer.Option(help=HELP["teacher_stride"], min=1)] = None,
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="File for the report: .md or .json.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=HELP["overwrite"])] = False,
) -> None:
    """
    Check a model: conversion, features, teacher, words, speed. Exit status 1 if a check fails.

    With --voc it needs the packages of the extra train. A ViT-B takes minutes on a CPU without --voc.
    """
    from spar_hf.doctor.examination import DoctorOptions, examine
    from spar_hf.utils.atomic import write_json, write_text
    from spar_hf.utils.checkpoints import check_replaceable
    from spar_hf.utils.errors import UsageError

    quiet_transformers()
    with exit_on_error(usage=(ValueError, *PATH_ERRORS)):
        if output is not None:
            if output.suffix not in (".md", ".json"):
                raise UsageError(f"--output {output}: name a file that ends in .md or .json.")
            check_replaceable([output], overwrite)
        conversion = {"tokenizer": tokenizer, "text_heads": text_heads, "vision_act": vision_act, "adaptor": adaptor}
        options = DoctorOptions(
            model=model,
            family=None if family is None else family.value,
            base=base,
            conversion={name: value for name, value in conversion.items() if value is not None},
            voc=voc,
            stride=stride,
            device=device,
        )
        report = examine(options, tell=lambda name, findings: show(findings))
    for name, value in report.setting.items():
        say(f"{name}: {value}")
    if output is not None:
        with exit_on_error(usage=(), failure=OSError):
            if output.suffix == ".json":
                write_json(output, report.as_json())
            else:
                write_text(output, report.markdown())
        say(f"written: {output}")
    if report.failed:
        raise typer.Exit(1)


def show(findings: "list[Finding]") -> None:
    """A line for each finding."""
    for finding in findings:
        expected = f" ({finding.limit})" if finding.limit else ""
        say(f"{finding.status:8}{finding.check}: {finding.found}{expected}", colour=COLOURS[finding.status])
        if finding.remedy:
            say(f"        {finding.remedy}", colour="red")
