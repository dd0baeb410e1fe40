"""Exports: a folder with the graphs of a model and all that a program without PyTorch needs beside them."""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from spar_hf.export.decision import label_type
from spar_hf.export.folder import RECORD, make_record, write_beside
from spar_hf.export.options import EXTENSIONS, check_options
from spar_hf.export.sources import check_head, embed_words, load_source
from spar_hf.export.verification import affordable, cases, verify, verify_text, within
from spar_hf.model.prompts import CandidateLabels, Vocabulary
from spar_hf.model.templates import TemplateChoice, read_templates, resolve_templates
from spar_hf.utils.atomic import check_inputs_stay, write_json, writing_folder
from spar_hf.utils.errors import UsageError, as_usage_errors


def export(
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    format: str = "onnx",
    head: str = "classmap",
    words: CandidateLabels | Vocabulary | None = None,
    templates: str | Sequence[str] | None = None,
    background: str | Sequence[str] | None = None,
    dtypes: Sequence[str] = ("fp32",),
    overwrite: bool = False,
    vendor: str | os.PathLike | None = None,
    tell: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """
    Export a model as a folder for programs without PyTorch. See `docs/export.md` for its files, inputs and outputs.

    Every graph is compared with PyTorch at sizes and numbers of names that it was not traced with. The folder is only
    written if all agree; the comparisons are in its `spar_export.json`.

    Args:
        model: folder or hub id of a SPAR model, of a linear head on one, or of a backbone that SPAR reads.
        output: folder to write.
        format (`str`, *optional*, defaults to `"onnx"`): `"onnx"`, `"openvino"`, `"aoti"`, `"executorch"`, `"web"`.
        head (`str`, *optional*, defaults to `"classmap"`):
            What the graph gives: `"features"` of the patches, `"logits"` of the patches, the class and its probability at
            every pixel (`"classmap"`), or the `"probabilities"` of all classes at every pixel.
        words (*optional*):
            Classes that become part of the graph, as `candidate_labels` of the pipeline. Without, their embeddings are an
            input, and the text tower is exported too.
        templates (*optional*): prompt templates of `words`. Default: the checkpoint's.
        background (*optional*): what surrounds the classes, as in the pipeline: `"auto"` or words.
        dtypes (`Sequence[str]`, *optional*, defaults to `("fp32",)`):
            Precisions, a graph each: `"fp32"`, `"fp16"`, `"bf16"`, `"int8"`. The last norm, read-out, cosine and decision
            stay in float32.
        overwrite (`bool`, *optional*, defaults to `False`): replace an empty folder or an earlier export.
        vendor (*optional*): for `"web"`, the folder of its packages, see `spar_hf/export/web.py`.
        tell (*optional*): called with the name of each step as it begins; a step of a large model takes minutes.

    Returns:
        The contents of `spar_export.json`.

    Raises:
        UsageError: options that do not go together, a missing package, a folder that must not be replaced, or a model that
            cannot be read.
        NotVerified: a graph does not compute what PyTorch computes.

    Example:

    ```python
    >>> from spar_hf import SPAR_TINY
    >>> words = ["road", "car, automobile", "sky"]
    >>> record = export(SPAR_TINY, "street", words=words)  # doctest: +SKIP
    >>> [tensor["name"] for tensor in record["inputs"] + record["outputs"]]  # doctest: +SKIP
    ['pixel_values', 'image_size', 'labels', 'confidence']
    ```"""
    graph_format = check_options(format, head, dtypes)
    folder = Path(output)
    check_output(folder, overwrite)
    check_inputs_stay([folder], [model, vendor, templates])
    if background is not None and words is None:
        raise UsageError("--background is part of the classes: give them with --words, or name it at run time.")
    if vendor is not None and format != "web":
        raise UsageError(f"--vendor is for --format web, not {format}. Leave it out.")
    extension = import_module(f"spar_hf.export.{EXTENSIONS[format][1]}") if format in EXTENSIONS else None
    if extension is not None:
        extension.check(head, vendor)
    if templates is not None:
        with as_usage_errors():
            chosen = read_templates(templates)
            resolve_templates(chosen)
        if words is None and isinstance(chosen, TemplateChoice) and chosen.names:
            raise UsageError(
                f"--templates {templates} chooses templates for each class, and without --words a graph has no classes. "
                "Give them with --words, or name the file as `templates` at run time."
            )
    tell(f"reading {model}")
    source = load_source(str(model))
    check_head(source, head, words, templates)
    baked = embed_words(source, words, templates, background)
    with as_usage_errors():
        labels = label_type(None if baked is None else len(baked.labels))
    writer = import_module(f"spar_hf.export.{graph_format.module}")
    with writing_folder(folder) as temporary:
        temporary.mkdir()
        write_beside(temporary, source, baked)
        tell(f"writing {format} graphs: {', '.join(dtypes)}")
        graphs = writer.write_graphs(temporary, source, head, baked, list(dtypes), labels)
        limits = writer.limits(source) if hasattr(writer, "limits") else None
        runs = {dtype: graph.runs for dtype, graph in graphs.items()}
        compared = [within(case, limits) for case in cases(source)]
        if head == "probabilities" and baked is not None:  # of words that are an input, the cases have few
            compared = [affordable(case, len(baked.labels)) for case in compared]
        tell(f"comparing {'it' if len(runs) == 1 else 'them'} with PyTorch in {len(compared)} cases")
        rows = verify(source, head, baked, runs, compared)
        paths = {dtype: graph.path for dtype, graph in graphs.items()}
        base = EXTENSIONS[format][0] if format in EXTENSIONS else format
        record = make_record(source, base, head, baked, templates, paths, labels)
        record |= {"limits": limits, "text_graph": None, "verification": {"vision": rows}}
        if source.has_text and baked is None:
            tell("writing the text tower and comparing it")
            text = writer.write_text_tower(temporary, source)
            record["text_graph"] = text.path
            record["verification"]["text"] = verify_text(source, text.runs[0])
        if extension is not None:
            extension.add_files(temporary, record, vendor)
        write_json(temporary / RECORD, record)
    return record


def check_output(folder: Path, overwrite: bool) -> None:
    """
    Raises:
        UsageError: the folder exists and nobody asked to replace it, or it is neither empty nor an export.
    """
    if folder.exists() and not overwrite:
        raise UsageError(f"{folder} exists. Name another folder with --output, or add --overwrite.")
    replaceable = folder.is_dir() and (not any(folder.iterdir()) or (folder / RECORD).is_file())
    if folder.exists() and not replaceable:
        raise UsageError(f"{folder} is not an export, so --overwrite does not delete it. Name another folder.")
