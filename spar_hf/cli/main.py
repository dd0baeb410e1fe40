"""`spar-hf`: the command line. Heavy imports stand inside the commands, so that `--help` is immediate."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from spar_hf.utils.atomic import write_text, writing_folder
from spar_hf.utils.image_files import (
    InputImage,
    RunSummary,
    check_distinct_targets,
    check_inputs_kept,
    find_images,
    process_images,
)

PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # what overlays are written as
OTHER_FILES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".json")  # no one means a folder of that name

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Inputs = Annotated[
    list[str], typer.Argument(help='Images: files, folders (with sub-folders), patterns ("in/*.jpg") and URLs.')
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; a graphics card where there is one.")]
ShortestEdge = Annotated[
    int | None, typer.Option(help="Shorter side of the working image in pixels; the checkpoint's by default.", min=16)
]
SkipExisting = Annotated[
    bool, typer.Option("--skip-existing", help="Leave out images whose results are there: a stopped run goes on.")
]


@app.callback()
def root() -> None:
    """Dense, open-vocabulary vision features in one pass at any resolution."""


def fail(message: object, status: int = 1) -> NoReturn:
    """One line on stderr. Exit status: 1 something failed, 2 wrong usage."""
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(status)


def report(message: str) -> None:
    """A line about an image that failed, above the progress bar."""
    from tqdm.auto import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        typer.secho(f"error: {message}", fg="red", err=True)


@app.command()
def segment(
    images: Inputs,
    labels: Annotated[
        str,
        typer.Option(
            help='Classes separated by ";", names of one class by ",": "road; car, automobile; sky"; or ade20k, voc21, …; '
            "or @FILE with a class per line."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="Picture to write for one image, or a folder for many, with the sub-folders of the input."),
    ],
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            help="overlay (image under its masks), map (class numbers as 8- or 16-bit PNG), coco (run-length masks, needs "
            "the extra coco), json (label, score, share and box per class); several with commas.",
        ),
    ] = "overlay",
    model: Annotated[str | None, typer.Option(help="Folder or hub id; the embedded spar-tiny by default.")] = None,
    templates: Annotated[
        str | None, typer.Option(help="Prompt templates: imagenet80, short or plain; the checkpoint's by default.")
    ] = None,
    shortest_edge: ShortestEdge = None,
    background: Annotated[
        str | None,
        typer.Option(
            help="Class for unsure pixels and tiny classes: one of the labels or a new one; or auto, common stuff words."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Pixels whose best probability is below it become background.", min=0, max=1),
    ] = None,
    min_area: Annotated[
        float | None,
        typer.Option(help="Classes below this share of all but background become background.", min=0, max=1),
    ] = None,
    refine: Annotated[
        str | None, typer.Option(help="Sharper masks: lposs, lposs+ or pamr (what they give: spar_hf/refine.py).")
    ] = None,
    map_output: Annotated[
        Path | None, typer.Option("--map", help="One image: also write the class numbers to this PNG.")
    ] = None,
    skip_existing: SkipExisting = False,
    device: Device = None,
) -> None:
    """Segment images by words. Exit status: 0 all good, 1 something failed, 2 wrong usage."""
    from spar_hf.cli.outputs import FORMATS, coco_encoder, merge_coco, write_results

    kinds = list(dict.fromkeys(kind.strip().lower() for kind in formats.split(",") if kind.strip()))
    if not kinds or set(kinds) - set(FORMATS):
        fail(f"--format {formats!r} must name some of {', '.join(FORMATS)}, with commas.", 2)
    try:
        vocabulary = read_labels(labels)
        found, problems = find_images(images, exclude=output)
        many = len(found) + len(problems) > 1
        targets = {item: result_paths(item, output, kinds, many, map_output) for item in found}
        files = [(path, item.source) for item, paths in targets.items() for path in paths.values()]
        check_distinct_targets(files)
        check_inputs_kept([path for path, _ in files], found)
        if "coco" in kinds:
            coco_encoder()
    except (ValueError, ImportError, OSError) as error:
        fail(error, 2)

    if not found:  # nothing to load a model for
        finish(process_images((), lambda item: None, report=report, problems=problems))

    from PIL import Image

    from spar_hf.cli.commands import load_pipeline, timed
    from spar_hf.model.image_input import read_image, to_rgb

    asked = {
        "templates": templates,
        "background": background,
        "threshold": threshold,
        "min_area": min_area,
        "refine": refine,
    }
    options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if shortest_edge is not None:
        options["size"] = {"shortest_edge": shortest_edge}
    try:
        pipe = load_pipeline(model, device)
    except ValueError as error:
        fail(error, 2)
    except (OSError, RuntimeError) as error:
        fail(error)
    try:  # what is wrong with the words or the options is said once, not for every image
        names = timed(pipe, Image.new("RGB", (32, 32)), vocabulary, **options)["labels"]
    except ValueError as error:
        fail(error, 2)
    if len(vocabulary.labels) == 1 and background is None:
        typer.secho(f"note: {about_one_class(labels)}", err=True)

    def work(item: InputImage) -> None:
        image = to_rgb(read_image(item.source))
        result = timed(pipe, image, vocabulary, **options)
        write_results(image, result, targets[item], item.source)
        if not many:
            show_classes(result)
            for path in targets[item].values():
                typer.echo(f"written: {path}")

    def is_done(item: InputImage) -> bool:
        return skip_existing and all(path.is_file() for path in targets[item].values())

    try:
        if not is_single(output, many):
            write_classes(output / "classes.txt", names, skip_existing)
        summary = process_images(found, work, is_done, report, problems)
        if "coco" in kinds and not is_single(output, many):
            parts = [paths["coco"] for paths in targets.values() if paths["coco"].is_file()]
            write_text(output / "annotations.json", json_text(merge_coco(parts)))
    except ValueError as error:
        fail(error, 2)
    except OSError as error:
        fail(error)
    finish(summary, str(summary) if many or summary.skipped else None)


def read_labels(labels: str):
    """
    The vocabulary of `--labels`: classes, the name of a built-in set, or `@FILE`.

    Raises:
        ValueError: no classes, malformed ones, or no such file.
    """
    from spar_hf.cli.commands import read_words

    if labels.startswith("@"):
        try:
            lines = Path(labels[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"Cannot read the labels of {labels[1:]!r}: {error}. It is a text, a class per line."
            ) from error
        labels = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return read_words(labels)


def about_one_class(labels: str) -> str:
    """Why the masks of one class say nothing, and what was perhaps meant."""
    from difflib import get_close_matches

    from spar_hf.model.vocabularies import VOCABULARIES

    text = "one class alone gets the whole image."
    if near := get_close_matches(labels.strip().lower(), VOCABULARIES, 1):
        return f"{text} Did you mean the built-in {near[0]}?"
    return f'{text} Put ";" between classes ("road; sky"; commas join names of one class), or name a --background.'


def is_single(output: Path, many: bool) -> bool:
    """Whether `--output` is the file of one image and not a folder."""
    return not many and not output.is_dir() and output.suffix.lower() in (*PICTURES, *OTHER_FILES)


def result_paths(
    item: InputImage, output: Path, kinds: list[str], many: bool, map_output: Path | None
) -> dict[str, Path]:
    """
    Where the results of an image go, by format.

    Raises:
        ValueError: an output that does not fit the formats or the number of images.
    """
    from spar_hf.cli.outputs import FORMATS

    suffix = output.suffix.lower()
    if not is_single(output, many):
        if output.is_file() or (many and suffix in PICTURES and not output.is_dir()):
            raise ValueError(f"--output {output} is the name of one file, but results of several images need a folder.")
        paths = {kind: output / f"{item.name}{FORMATS[kind]}" for kind in kinds}
    else:
        fitting = {"overlay": PICTURES, "map": (".png",)}.get(kinds[0], (".json",)) if len(kinds) == 1 else PICTURES
        if suffix not in fitting:
            raise ValueError(f"--output {output} must end in {' or '.join(fitting)} for --format {','.join(kinds)}.")
        alone = len(kinds) == 1
        # the picture is the overlay's; the others stand beside it
        paths = {kind: output if alone or kind == "overlay" else output.with_suffix(FORMATS[kind]) for kind in kinds}
    if map_output is not None:
        if many:
            raise ValueError("--map names the file of one image. For several, write --format overlay,map.")
        if map_output.suffix.lower() != ".png":
            raise ValueError(f"--map {map_output} must end in .png: class numbers bear no lossy format.")
        paths["map"] = map_output
    return paths


def write_classes(path: Path, names: list[str], going_on: bool) -> None:
    """
    A class per line: the line number, from 0, is the pixel value of the label maps.

    Raises:
        ValueError: a run that goes on finds results for other classes.
    """
    text = "".join(f"{name}\n" for name in names)
    if going_on and path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{path.parent} holds results for other classes ({path.name}). Name another --output, or leave out "
            "--skip-existing to write all anew."
        )
    write_text(path, text)


def show_classes(result: dict[str, Any]) -> None:
    """A line per class that has pixels, its share of the image and its score; and how many classes have none."""
    import numpy as np

    pixels = np.bincount(result["map"].ravel(), minlength=len(result["labels"]))
    for i in pixels.nonzero()[0].tolist():
        share = pixels[i] / result["map"].size
        shown = f"{share:.1%}" if share >= 0.0005 else "<0.1%"
        typer.echo(f"{result['labels'][i]:24} {shown:>7} of the image, score {result['scores'][i]:.2f}")
    if absent := int((pixels == 0).sum()):
        typer.echo(f"{absent} of {len(pixels)} classes not found")


def json_text(content: Any) -> str:
    import json

    return json.dumps(content, ensure_ascii=False) + "\n"


def finish(summary: RunSummary, line: str | None = None) -> NoReturn:
    """Print the line, if any, and leave with the run's exit status."""
    if line is not None:
        typer.echo(line)
    raise typer.Exit(summary.exit_status)


@app.command()
def features(
    images: Inputs,
    output: Annotated[Path, typer.Option(help="Folder to write, with the sub-folders of the input.")],
    model: Annotated[
        str | None,
        typer.Option(help="SPAR model or untouched backbone: folder or hub id; the embedded spar-tiny by default."),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Give every patch's feature unit length.")] = False,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float32",
    shortest_edge: ShortestEdge = None,
    stride: Annotated[
        int | None, typer.Option(help="Run the sliding window with this step in pixels instead of one pass.", min=1)
    ] = None,
    window_size: Annotated[
        int | None, typer.Option(help="Side of the window in pixels; the model's own by default.", min=1)
    ] = None,
    shard_size: Annotated[
        float | None,
        typer.Option(help="Write shards of about so many MB and an index, not a file per image.", min=0.001),
    ] = None,
    skip_existing: SkipExisting = False,
    device: Device = None,
) -> None:
    """
    Write the dense features of images as safetensors. Exit status: 0 all good, 1 something failed, 2 wrong usage.

    Several processes share the images: accelerate launch -m spar_hf.cli.main features …
    """
    if output.is_file():
        fail(f"--output {output} is a file; features need a folder.", 2)
    try:
        found, problems = find_images(images, exclude=output)
    except ValueError as error:
        fail(error, 2)
    if not found:
        finish(process_images((), lambda item: None, report=report, problems=problems))

    from spar_hf.batch.features import (
        FeatureExtractor,
        FileWriter,
        ShardWriter,
        list_shards,
        processes,
        share,
        write_index,
    )

    with processes() as (process, count, own_device, wait):
        try:
            extract = FeatureExtractor(
                model, shortest_edge, normalize, dtype, stride, window_size, device or own_device
            )
        except ValueError as error:
            fail(error, 2)
        except (OSError, RuntimeError) as error:
            fail(error)
        try:
            writer: FileWriter | ShardWriter
            if shard_size is None:
                writer = FileWriter(output, extract.settings)
            else:
                if list_shards(output) and not skip_existing:
                    fail(f"{output} holds shards. Go on with --skip-existing, or name another folder.", 2)
                wait()  # nobody writes before all have looked
                writer = ShardWriter(output, extract.settings, int(shard_size * 1e6), process)
            mine = share(found, process, count)
            done = {item for item in mine if skip_existing and writer.is_done(item)}
        except ValueError as error:
            fail(error, 2)
        first = process == 0
        try:
            summary = process_images(
                mine,
                lambda item: writer.add(item, *extract(item.source)),
                done.__contains__,
                report,
                problems if first else (),
                progress_bar=first,
            )
            writer.close()
            wait()
            if first and shard_size is not None:
                write_index(output, extract.settings)
            wait()  # the first to leave with a failure has the others stopped
        except OSError as error:
            fail(error)
    finish(summary, f"process {process + 1} of {count}: {summary}" if count > 1 else str(summary))


@app.command("app")
def serve(
    model: Annotated[str | None, typer.Option(help="Folder or hub id; the embedded spar-tiny by default.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="What the sliding window runs: the embedded base for the embedded model, else the model itself."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve; 0.0.0.0 for the whole network.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; the first free one from 7860 on by default.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    device: Device = None,
) -> None:
    """Serve a page: drop an image, type words, see masks; one pass beside the sliding window."""
    try:
        from spar_hf.cli.app import build, launch

        launch(build(model, base, device), host, port, open_browser)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        fail(error)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Official checkpoint: .ckpt, .pt, .pth or .safetensors.")],
    family: Annotated[str, typer.Option(help="siglip2, openclip or dinov3txt.")],
    base: Annotated[str, typer.Option(help="Hub id or folder of the base in transformers' format.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer where the base has none (dinov3txt: CLIP's).")
    ] = None,
    text_heads: Annotated[
        int | None,
        typer.Option(help="Attention heads of the text tower (dinov3txt: 20 in the published ViT-L).", min=1),
    ] = None,
    image_mean: Annotated[
        tuple[float, float, float] | None, typer.Option(help="Image mean, where it is not the base's.")
    ] = None,
    image_std: Annotated[
        tuple[float, float, float] | None, typer.Option(help="Image standard deviation, where it is not the base's.")
    ] = None,
    vision_act: Annotated[
        str | None, typer.Option(help="Activation of SigLIP's vision tower: gelu or gelu_pytorch_tanh (see the card).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
) -> None:
    """Convert an official checkpoint into a folder that AutoModel and the pipeline load."""
    from spar_hf.cli.commands import quiet_transformers
    from spar_hf.conversion import convert as run

    try:
        quiet_transformers()
        written = run(
            checkpoint,
            family,
            base,
            output,
            tokenizer=tokenizer,
            text_heads=text_heads,
            image_mean=None if image_mean is None else list(image_mean),
            image_std=None if image_std is None else list(image_std),
            vision_act=vision_act,
            force=force,
        )
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    typer.echo(written)


@app.command()
def bake(
    labels: Annotated[
        str, typer.Option(help='Classes as of "segment": "road; car, automobile; sky", @FILE or ade20k, …')
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id; the embedded spar-tiny by default.")] = None,
    templates: Annotated[
        str | None, typer.Option(help="Prompt templates: imagenet80, short or plain; the checkpoint's by default.")
    ] = None,
) -> None:
    """Make a vision-only folder of a model and a vocabulary, for pipeline("image-segmentation")."""
    if output.exists():
        fail(f"{output} exists. Name another folder.", 2)
    try:
        vocabulary = read_labels(labels)
    except ValueError as error:
        fail(error, 2)

    from spar_hf.cli.commands import load_pipeline
    from spar_hf.model.modeling_spar_semantic import bake_vocabulary

    try:
        pipe = load_pipeline(model)
        baked = bake_vocabulary(pipe.model, pipe.tokenizer, vocabulary, templates)
        with writing_folder(output) as temporary:
            baked.save_pretrained(temporary)
            pipe.image_processor.save_pretrained(temporary)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    typer.echo(f"written: {output}, {baked.config.num_labels} classes of {len(baked.config.name_to_class)} names")


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
