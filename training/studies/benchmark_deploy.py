"""
Suite `deploy` of `benchmark.py`: the ways to run a vision tower on a CPU, side by side.

    python training/studies/benchmark.py --suite deploy --output deploy.json
    python training/studies/benchmark.py --suite deploy --models spar-tiny --camvid DATA/camvid/val --output deploy.json

Every way runs in a process of its own (`deployment_paths.py`). It takes turns with eager float32 on the same image, and the
median of the pairwise ratios is its speed. Also measured: seconds from the start of the process to the first result, peak
memory, the cosine of its features with those of eager float32, the share of pixels that get the same of 21 and of 150 words,
and the loss of mIoU on frames of CamVid. `vit-b` is a ViT-B/16 of random weights in SigLIP2's shape.

Writes a table (Markdown) beside the JSON file, after each way. The same command goes on where it was stopped, and one with
other models, sizes or paths adds to the file.
"""

import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from benchmark import TINY, Options, SuiteOptions, load, ratio_row, setting
from benchmark_masks import make_pipeline, noise
from deployment_paths import EAGER, PATHS, PathFailed, Taken, Worker
from rich.console import Console
from rich.markdown import Markdown
from tqdm.auto import tqdm
from transformers import AutoTokenizer, SiglipTextConfig

from demo import PRESETS, packaged_images
from spar_hf import SPAR_TINY, SparConfig, SparForOpenVocabSegmentation, SparImageProcessorPil, SparVisionModel
from spar_hf.cli.pipelines import load_pipeline
from spar_hf.data.segmentation_sets import open_folder
from spar_hf.evaluation.iou import area_scores, count_pixels
from spar_hf.export.exporting import export
from spar_hf.export.verification import NotVerified
from spar_hf.model.image_input import read_rgb
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.segmentation import decide
from spar_hf.utils.atomic import write_json, write_text
from spar_hf.utils.errors import UsageError, run_command
from spar_hf.utils.fields import option
from spar_hf.utils.labels import parse_labels
from spar_hf.utils.options import parse_dataclasses, require_one_of, require_positive
from spar_hf.utils.texts import read_text

MODELS = ("vit-b", "spar-tiny")
INSTRUCTIONS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")  # as /proc/cpuinfo names them


@dataclass
class DeployOptions(SuiteOptions):
    """Options of the suite."""

    repeats: int = option(5, "Pairs per ratio; the median is reported.")
    models: list[str] = option(list(MODELS), f"Models: {', '.join(MODELS)}.")
    sizes: list[str] = option(["512x512", "672x896", "1024x1024"], "Heights and widths of images in pixels.")
    paths: list[str] = option(list(PATHS), f"Ways to run them: {'; '.join(PATHS)}.")
    threads: int = option(torch.get_num_threads(), "Threads of each way.")
    camvid: str | None = option(
        None, "Folder of CamVid with `images/` and `masks/`, for the loss of mIoU of spar-tiny."
    )
    frames: int = option(20, "Number of its frames, evenly spaced.")
    tiny: bool = option(False, "Rehearse with a model of two small layers and one image.")

    def __post_init__(self):
        require_positive(self, "repeats", "threads", "frames")
        for name in self.models:
            require_one_of(SimpleNamespace(models=name), "models", MODELS)
        for name in self.paths:
            require_one_of(SimpleNamespace(paths=name), "paths", PATHS)
        for size in self.sizes:
            sides = size.split("x")
            if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
                raise UsageError(f"--sizes {size}: give height and width in pixels, as in 512x512.")


@dataclass
class Subject:
    """
    A model to run.

    Attributes:
        name: as in `--models`.
        vision: its vision tower.
        segment: its pipeline; `None` for random weights, whose labels mean nothing.
        images: images `(1, 3, height, width)` on which labels are compared.
    """

    name: str
    vision: SparVisionModel
    segment: Any = None
    images: list[np.ndarray] = field(default_factory=list)

    def labels(self, features: np.ndarray, vocabulary: Vocabulary, working: tuple, output: tuple) -> np.ndarray:
        """Class of every pixel of the image, from its feature map."""
        logits = self.segment.model.dense_logits(torch.from_numpy(features), self.segment.text_embeds(vocabulary))[0]
        patch = self.vision.config.patch_size
        return decide(logits, vocabulary.name_to_class, patch, working, output).labels.numpy()


def open_subject(name: str, options: DeployOptions) -> Subject:
    """A model by its name in `--models`; a small one with `--tiny`."""
    torch.manual_seed(0)
    if options.tiny:
        tokenizer = AutoTokenizer.from_pretrained(SPAR_TINY)
        text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
        small = load(Options(random="tiny")).config.backbone_config
        text = SiglipTextConfig(**TINY, **text, projection_size=TINY["hidden_size"])
        config = SparConfig(backbone_config=small, text_config=text, templates="plain")
        segment = make_pipeline(SimpleNamespace(device="cpu"), SparForOpenVocabSegmentation(config))
        pictures = [noise(64, 96)]
    elif name == "vit-b":
        return Subject(name, load(Options(random="siglip2")).eval())
    else:
        segment = load_pipeline(device="cpu")
        pictures = [read_rgb(image.source) for image in packaged_images()]
    images = [segment.preprocess(picture)["pixel_values"].numpy() for picture in pictures]
    return Subject(name, segment.model.vision_model, segment, images)


def export_graphs(folder: Path, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """
    Export the model in `folder` as the graphs that the ways read, `(format, dtype)`, and write where they are to
    `graphs.json`. Returns why some could not be written, such as those that do not agree with PyTorch.
    """
    graphs: dict[str, str] = {}

    def attempt(name: str, dtypes: list[str]) -> str | None:
        output = folder / "-".join([name, *dtypes])
        try:
            record = export(folder / "model", output, format=name, head="features", dtypes=dtypes)
        except (UsageError, NotVerified) as error:
            return str(error)
        graphs.update({f"{name} {dtype}": str(output / path) for dtype, path in record["graphs"].items()})
        return None

    failed = {}
    for name in sorted({name for name, _ in wanted}):
        dtypes = sorted(dtype for format_of, dtype in wanted if format_of == name)
        error = attempt(name, dtypes)
        if error is not None:  # of one of them, perhaps
            errors = {dtype: attempt(name, [dtype]) if len(dtypes) > 1 else error for dtype in dtypes}
            failed |= {(name, dtype): error for dtype, error in errors.items() if error is not None}
    write_json(folder / "graphs.json", graphs)
    return failed


class Comparison:
    """
    One way to run a model, beside eager float32.

    Attributes:
        subject: the model.
        folder: where images, features and exports lie.
    """

    def __init__(self, subject: Subject, folder: Path, eager: Worker, options: DeployOptions):
        self.subject, self.folder, self.eager, self.options = subject, folder, eager, options
        self._labels: dict[str, list[np.ndarray]] = {}  # of eager float32

    def features(self, worker: Worker, name: str, pixels: np.ndarray) -> np.ndarray:
        """The feature map of an image; that of eager float32 is computed once."""
        image, output = self.folder / f"{name}.npy", self.folder / f"{name}-features-{worker is self.eager}.npy"
        if not image.exists():
            np.save(image, pixels)
        if worker is not self.eager or not output.exists():
            worker.run(image, output)
        return np.load(output)

    def noise(self, size: str) -> np.ndarray:
        """A normalised image of a size, `(1, 3, height, width)`."""
        height, width = map(int, size.split("x"))
        return np.random.default_rng(0).standard_normal((1, 3, height, width), dtype=np.float32)

    def time(self, worker: Worker, size: str) -> dict[str, Any]:
        """Seconds of both in turn, and their ratio."""
        image = self.folder / f"{size}.npy"
        if not image.exists():
            np.save(image, self.noise(size))
        self.eager.run(image)
        first = worker.run(image)
        pairs = [(self.eager.run(image), worker.run(image)) for _ in range(self.options.repeats)]
        found = {f"first_{name}": value for name, value in first._asdict().items()}  # a new size may be compiled again
        for name in Taken._fields:
            row = ratio_row(size, "seconds", [(getattr(a, name), getattr(b, name)) for a, b in pairs], "")
            found[f"speed_in_{name}"], found[f"middle_half_in_{name}"] = row["ratio"], row["middle_half"]
            found[name], found[f"eager_{name}"] = row["bare_seconds"], row["seconds"]
        return found

    def agreement(self, worker: Worker) -> dict[str, Any]:
        """Cosine of features and equal labels."""
        size = self.options.sizes[0]
        pair = [torch.from_numpy(self.features(one, size, self.noise(size))) for one in (worker, self.eager)]
        found: dict[str, Any] = {"cosine": float(torch.cosine_similarity(*pair, dim=1).mean())}
        if self.subject.segment is None:
            return found
        vocabularies = [Vocabulary.parse(words) for words in (parse_labels(PRESETS["everyday"]), "ade20k")]
        equal = []
        for number, image in enumerate(self.subject.images):
            asked = (f"image-{number}", image, vocabularies, image.shape[-2:])
            pairs = zip(self.labels(worker, *asked), self.labels(self.eager, *asked), strict=True)
            equal.append([float((ours == eager).mean()) for ours, eager in pairs])
        for vocabulary, shares in zip(vocabularies, zip(*equal, strict=True), strict=True):
            found[f"equal_{len(vocabulary.labels)}"] = {"mean": statistics.mean(shares), "least": min(shares)}
        return found

    def labels(
        self, worker: Worker, name: str, pixels: np.ndarray, vocabularies: Sequence[Vocabulary], size: tuple
    ) -> list[np.ndarray]:
        """Label maps of an image, one for each vocabulary; those of eager float32 are computed once."""
        if worker is self.eager and name in self._labels:
            return self._labels[name]
        features, working = self.features(worker, name, pixels), pixels.shape[-2:]
        found = [self.subject.labels(features, vocabulary, working, size) for vocabulary in vocabularies]
        if worker is self.eager:
            self._labels[name] = found
        return found

    def camvid(self, worker: Worker) -> dict[str, Any]:
        """mIoU on frames of CamVid, and that of eager float32."""
        data = open_folder(self.options.camvid, readable=True)
        vocabulary, classes = Vocabulary.parse({label: [label] for label in data.labels}), len(data.labels)
        counts = np.zeros((2, classes, classes), np.int64)
        step = max(1, len(data) // self.options.frames)
        for number in range(0, len(data), step)[: self.options.frames]:
            image, mask = data.read(number)
            pixels = self.subject.segment.preprocess(image)["pixel_values"].numpy()
            for count, one in zip(counts, (worker, self.eager), strict=True):
                (label_map,) = self.labels(one, f"frame-{number}", pixels, [vocabulary], mask.shape)
                count += count_pixels(label_map, mask, classes)
        ours, eager = (100 * area_scores(count)["mean_iou"] for count in counts)
        return {"miou": ours, "eager_miou": eager}


def measure(path: str, comparison: Comparison, row: dict[str, Any]) -> None:
    """Fill in what a row lacks; an error of this way is its entry `error`."""
    options, missing = comparison.options, PATHS[path].missing
    if missing:
        row["error"] = f"{', '.join(missing)} not installed"
        return
    try:
        with ExitStack() as stack:
            worker = comparison.eager
            if path != EAGER:
                worker = stack.enter_context(Worker(path, comparison.folder, options.threads))
            for size in options.sizes:
                if size not in row["sizes"]:
                    row["sizes"][size] = comparison.time(worker, size)
                    assert worker.start is not None  # it has run
                    for name, value in worker.start._asdict().items():
                        row.setdefault(f"start_{name}", value)
                    row["peak_mib"] = None if (peak := worker.peak_bytes()) is None else peak / 2**20
            if "cosine" not in row:
                row |= comparison.agreement(worker)
            if options.camvid and comparison.subject.segment is not None and "miou" not in row:
                row |= comparison.camvid(worker)
    except PathFailed as error:
        row["error"] = str(error)


def describe_machine(options: DeployOptions) -> dict[str, Any]:
    """What the figures depend on beside the options."""
    found = {**setting(), "threads": options.threads, "machine": platform.machine()}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        values = {name.strip(): value.strip() for name, value in lines.items()}
        found["processor"] = values.get("model name", "")
        found["instructions"] = [name for name in INSTRUCTIONS if name in values.get("flags", "").split()]
    return found


def open_report(options: DeployOptions) -> dict[str, Any]:
    """
    The report of an earlier command with the same settings, or an empty one.

    Raises:
        UsageError: the file was measured with other settings.
    """
    kept = {name: getattr(options, name) for name in ("repeats", "threads", "camvid", "frames", "tiny")}
    report = {"options": kept, "setting": describe_machine(options), "rows": []}
    path = Path(options.output) if options.output else None
    if path is None or not path.exists() or options.overwrite:
        return report
    try:
        earlier = json.loads(read_text(path))
        same = all(earlier[name] == report[name] for name in ("options", "setting"))
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UsageError(
            f"{path} was measured with other options or on another machine. Replace it with --overwrite, or name another "
            "--output."
        )
    return earlier


def save(report: dict[str, Any], options: DeployOptions) -> None:
    """Write the JSON file and the table beside it."""
    if options.output:
        path = Path(options.output)
        write_json(path, report)
        write_text(path.with_suffix(".md"), table(report))


def table(report: dict[str, Any]) -> str:
    """A Markdown table for each model."""
    machine, parts = report["setting"], []
    for model in dict.fromkeys(row["model"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["model"] == model]
        sizes = list(dict.fromkeys(size for row in rows for size in row["sizes"]))
        columns = ["way", *(f"{size.replace('x', '×')}" for size in sizes), "start, s", "peak, MiB", "cosine"]
        columns += ["equal labels, 21 words", "150 words"] if any("equal_150" in row for row in rows) else []
        columns += ["mIoU"] if any("miou" in row for row in rows) else []
        lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
        lines += [" | ".join(cells(row, sizes, columns, counted(machine))) for row in rows]
        parts.append(f"**{model}**\n\n" + "\n".join(f"| {line} |" for line in lines))
    where = f"{machine.get('processor') or machine['machine']}, {machine['threads']} of {machine['cores']} cores"
    kind = "CPU seconds" if counted(machine) == "cpu_seconds" else "seconds"
    note = f"How many times faster than eager fp32, and {kind}, of one image; medians of pairs in turn."
    return "\n\n".join([f"{note} {where}, torch {machine['torch']}.", *parts]) + "\n"


def counted(machine: dict[str, Any]) -> str:
    """What the table shows: for one thread seconds of computing, which other work on the machine disturbs little."""
    return "cpu_seconds" if machine["threads"] == 1 else "seconds"


def cells(row: dict[str, Any], sizes: Sequence[str], columns: Sequence[str], kind: str) -> list[str]:
    """The cells of a row, one for each column; `kind` is a field of [`Taken`]."""
    if "error" in row:
        return [row["path"], f"not measured: {row['error'][:80]}".replace("|", "/"), *[""] * (len(columns) - 2)]
    timed = [row["sizes"].get(size) for size in sizes]
    values = [row["path"]]
    values += ["" if one is None else f"{one[f'speed_in_{kind}']:.2f} × ({one[kind]:.2f} s)" for one in timed]
    values += [f"{row[f'start_{kind}']:.1f}", "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"]
    values.append(f"{row['cosine']:.5f}")
    if "equal labels, 21 words" in columns:
        equal = (row.get(f"equal_{words}") for words in (21, 150))
        values += ["" if one is None else f"{one['mean']:.2%} (≥ {one['least']:.1%})" for one in equal]
    if "mIoU" in columns:
        values.append(f"{row['miou']:.2f} ({row['miou'] - row['eager_miou']:+.2f})" if "miou" in row else "")
    return values


def run(options: DeployOptions) -> dict[str, Any]:
    """Measure what the report lacks."""
    report = open_report(options)
    rows = {(row["model"], row["path"]): row for row in report["rows"]}
    for name in options.models:
        mine = []
        for path in options.paths:
            row = rows.get((name, path)) or {"model": name, "path": path, "sizes": {}}
            done = "error" not in row and "cosine" in row and set(options.sizes) <= set(row["sizes"])
            mine += [] if done else [(path, row)]
        if not mine:
            continue
        with tempfile.TemporaryDirectory() as place:
            folder, subject = Path(place), open_subject(name, options)
            subject.vision.save_pretrained(folder / "model")
            SparImageProcessorPil().save_pretrained(folder / "model")
            wanted = {PATHS[path].export for path, _ in mine if PATHS[path].export and not PATHS[path].missing}
            failed = export_graphs(folder, wanted)
            with Worker(EAGER, folder, options.threads) as eager:
                comparison = Comparison(subject, folder, eager, options)
                for path, row in tqdm(mine, desc=name):
                    row.pop("error", None)
                    if reason := failed.get(PATHS[path].export):
                        row["error"] = reason
                    else:
                        measure(path, comparison, row)
                    if (name, path) not in rows:
                        rows[name, path] = row
                        report["rows"].append(row)
                    save(report, options)
    save(report, options)
    return report


def main(args: list[str] | None = None) -> dict[str, Any]:
    """The command: prints the table and returns what it writes."""
    (options,) = parse_dataclasses([DeployOptions], args, __doc__)
    report = run(options)
    Console().print(Markdown(table(report)))
    return report


if __name__ == "__main__":
    run_command(main)
