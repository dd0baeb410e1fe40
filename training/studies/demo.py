"""
Masks from words on real images, with no download: the embedded spar-tiny in one pass, next to its base in one pass and the
base as a sliding-window teacher, on one HTML page with pictures, legends and times.

    python training/studies/demo.py --output demo
    python training/studies/demo.py --output demo --packaged false --images IMAGES --vocabulary everyday
"""

import base64
import io
import logging
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spar_hf import SPAR_TINY, SPAR_TINY_BASE
from spar_hf.cli.overlays import overlay, palette
from spar_hf.cli.pipelines import load_pipeline, segment_timed
from spar_hf.model.image_input import read_rgb
from spar_hf.utils.atomic import write_text
from spar_hf.utils.errors import MissingFiles, UsageError, as_usage_errors, run_command
from spar_hf.utils.fields import option
from spar_hf.utils.image_files import InputImage, find_images, process_images
from spar_hf.utils.labels import parse_labels
from spar_hf.utils.options import parse_dataclasses

logger = logging.getLogger(__name__)

# images inside packages of the extra `demo`, and words for what they show
IMAGES: list[tuple[str, str, list[str]]] = [
    ("skimage.data", "astronaut.png", ["person, woman", "hair", "skin, face", "suit", "flag, banner", "wall"]),
    ("skimage.data", "chelsea.png", ["cat", "wall", "floor, rug"]),
    ("skimage.data", "coffee.png", ["cup", "spoon", "table", "wall"]),
    ("skimage.data", "rocket.jpg", ["sky", "pole, tower", "airplane", "building", "light"]),
    ("skimage.data", "motorcycle_left.png", ["motorcycle", "wall", "floor", "door", "shelf, cabinet"]),
    ("skimage.data", "hubble_deep_field.jpg", ["sky, night sky", "light", "snow"]),
    ("skimage.data", "retina.jpg", ["orange", "fruit", "background"]),
    ("sklearn.datasets.images", "china.jpg", ["building, temple", "sky", "tree", "stairs", "person", "pavement"]),
    ("sklearn.datasets.images", "flower.jpg", ["flower", "grass, leaves", "background"]),
    (
        "matplotlib.mpl-data.sample_data",
        "grace_hopper.jpg",
        ["person", "hat", "suit, jacket", "tie", "shirt", "banner"],
    ),
]

# words for folders of images, by what they show
PRESETS: dict[str, str] = {
    "everyday": "person; cat; dog; bird; car, bus, truck; bicycle, motorcycle; sky; building, house; tree, bush; grass; "
    "flower; water, sea, river; mountain, hill; road, pavement; wall; floor; table; chair, couch; food, fruit; window; rock",
    "street": "road; pavement, sidewalk; building; car; bus, truck; bicycle, motorcycle; person; pole; traffic sign; "
    "traffic light; fence; tree, vegetation; sky",
    "landscape": "sky; cloud; mountain; hill; tree, forest; grass, field; water, lake, river; sea; sand, beach; rock; snow; "
    "road, path; building; flower",
    "people": "skin, face; hair; hat; glasses; shirt, t-shirt; jacket, coat; dress; skirt; pants, jeans; shoes; bag; tie; "
    "wall; floor",
}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>SPAR: masks from words in one pass</title>
<style>
body { font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #222; }
figure { margin: 0; } figcaption { font-size: .9rem; padding: .3rem 0; } img { width: 100%; display: block; }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1rem; margin-bottom: 1rem; align-items: start; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } h2 { margin: 2rem 0 .2rem; font-size: 1.1rem; }
.legend span { display: inline-block; margin-right: .8rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; border-radius: 2px; }
.words { margin: 0 0 .5rem; color: #666; font-size: .9rem; }
</style></head><body>
<h1>SPAR: masks from words in one pass</h1>
<p>{{ model }}: the distilled student in one pass, its base before distillation in one pass, and the base as a
sliding-window teacher (window {{ window }} px, stride {{ stride }} px), at a working short side of
{{ shortest_edge }} px on {{ device }}. Times are the vision forward alone, after a warm-up. “Like the teacher” is the share
of pixels that get the teacher's class: it tells how well one pass replaces the window, not whether either is right.
{{ note }}</p>
<table><tr><th></th><th>seconds per image</th><th>× student</th><th>like the teacher</th></tr>
{% for name, seconds, ratio, agreement in summary %}<tr><td>{{ name }}</td><td>{{ "%.3f"|format(seconds) }}</td>
<td>{{ "%.1f"|format(ratio) }}</td><td>{{ "%.0f"|format(100 * agreement) }} %</td></tr>{% endfor %}</table>
{% for image in images %}<h2>{{ image.name }} ({{ image.width }}×{{ image.height }})</h2>
<p class="words">{{ image.words }}</p>
<div class="row"><figure><img src="{{ image.image }}" alt="image"><figcaption>image</figcaption></figure>
{% for result in image.results %}<figure><img src="{{ result.image }}" alt="{{ result.name }}">
<figcaption><b>{{ result.name }}</b>, {{ "%.3f"|format(result.seconds) }} s ({{ "%.1f"|format(result.ratio) }} × student),
{{ "%.0f"|format(100 * result.agreement) }} % like the teacher
<div class="legend">{% for label, colour, share in result.legend %}<span><i style="background: rgb{{ colour }}"></i>
{{ label }} {{ "%.0f"|format(100 * share) }} %</span>{% endfor %}</div></figcaption></figure>{% endfor %}</div>{% endfor %}
{% if failed %}<h2>Failed</h2><ul>{% for source, message in failed %}<li>{{ message }}</li>{% endfor %}</ul>{% endif %}
</body></html>
"""
TINY = (
    "The model is tiny. It knows streets, people, cats, dogs, horses, cows and sheep a little: on all other things its "
    "masks are guesses."
)


@dataclass
class Options:
    """Options of the demo."""

    output: str = option("demo", "Folder to write index.html to.")
    images: list[str] | None = option(None, "Folders, files or patterns of further images.", nargs="+")
    vocabulary: str = option(
        "everyday",
        f"Words for --images: a preset ({', '.join(PRESETS)}), a built-in vocabulary (ade20k, voc21, ...) or "
        "classes such as 'road; car, automobile; sky'.",
    )
    max_images: int = option(10, "Most images of --images, taken evenly from each.", aliases=["--limit"])
    packaged: bool = option(True, "Show the images that come with scikit-image, scikit-learn and matplotlib.")
    model: str = option(SPAR_TINY, "The student: a two-tower SPAR folder.")
    base: str = option(SPAR_TINY_BASE, "The model that the student was distilled from.")
    stride: int = option(24, "Stride of the teacher in pixels.")
    shortest_edge: int = option(384, "Shorter side of the working image in pixels.")


def packaged_images() -> dict[InputImage, str]:
    """The installed images, with the words for what they show."""
    found = {}
    for package, name, words in IMAGES:
        root, _, rest = package.partition(".")
        path = resources.files(root).joinpath(*rest.split("."), name)
        if path.is_file():
            found[InputImage(str(path), name)] = "; ".join(words)
        else:
            logger.info("%s of %s is not installed and is left out.", name, package)
    return found


def own_images(arguments: list[str], limit: int, words: str) -> dict[InputImage, str]:
    """
    At most `limit` images: as many from each argument, and evenly spaced in each.

    Raises:
        MissingFiles: an argument gives no image.
    """
    found: dict[InputImage, str] = {}
    for i, argument in enumerate(arguments):
        images, problems = find_images([argument])
        if problems:
            raise MissingFiles(problems[0][1])
        count = min(len(images), (limit - len(found)) // (len(arguments) - i))
        found.update({images[j * len(images) // count]: words for j in range(count)})
    return found


def data_url(picture: Image.Image, width: int = 720) -> str:
    """A picture as a JPEG inside the page, `width` pixels wide."""
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def legend(label_map: np.ndarray, labels: list[str]) -> list[tuple[str, tuple[int, ...], float]]:
    """Name, colour and share of the image for each class that has pixels, largest first."""
    shares = np.bincount(label_map.ravel(), minlength=len(labels)) / label_map.size
    colours = palette(len(labels)).tolist()
    return [(labels[i], tuple(colours[i]), shares[i]) for i in np.argsort(-shares, kind="stable") if shares[i]]


def load_ways(options: Options) -> dict[str, Any]:
    """The three pipelines that segment every image, by name; the last is the teacher."""
    with as_usage_errors():
        ways = {
            "SPAR student, one pass": load_pipeline(options.model),
            "base, one pass": load_pipeline(options.base),
            f"base, sliding window at stride {options.stride}": load_pipeline(options.base, stride=options.stride),
        }
    for segment in ways.values():
        segment_timed(segment, Image.new("RGB", (64, 64)), ["image"])  # the first image would be slower
    return ways


def segment_all_ways(
    ways: dict[str, Any], image: Image.Image, vocabulary: Any, shortest_edge: int
) -> list[dict[str, Any]]:
    """What the page shows of an image: for each way the picture, legend, time, and agreement with the teacher."""
    size = {"shortest_edge": shortest_edge}
    results = {name: segment_timed(segment, image, vocabulary, size=size) for name, segment in ways.items()}
    student, *_, teacher = results.values()
    return [
        {
            "name": name,
            "image": data_url(overlay(image, result["map"], result["labels"], legend=False)),
            "legend": legend(result["map"], result["labels"]),
            "seconds": result["forward_seconds"],
            "ratio": result["forward_seconds"] / student["forward_seconds"],
            "agreement": float((result["map"] == teacher["map"]).mean()),
        }
        for name, result in results.items()
    ]


def summarise(images: list[dict[str, Any]]) -> list[tuple[str, float, float, float]]:
    """For each way: name, mean seconds per image, the same relative to the student, mean agreement with the teacher."""
    columns = list(zip(*(image["results"] for image in images), strict=True))
    seconds = [sum(result["seconds"] for result in column) / len(images) for column in columns]
    agreement = [sum(result["agreement"] for result in column) / len(images) for column in columns]
    names = [column[0]["name"] for column in columns]
    return [(name, s, s / seconds[0], like) for name, s, like in zip(names, seconds, agreement, strict=True)]


def run(options: Options) -> Path:
    """
    Segment every image three ways and write the page; returns its path.

    Raises:
        UsageError: an argument of `--images` gives no image, the words are malformed, or no image could be read.
    """
    words = PRESETS.get(options.vocabulary, options.vocabulary)
    found = packaged_images() if options.packaged else {}
    found.update(own_images(options.images or [], options.max_images, words))
    with as_usage_errors():
        vocabularies = {text: parse_labels(text) for text in found.values()}
    ways = load_ways(options)
    images: list[dict[str, Any]] = []

    def segment(item: InputImage) -> None:
        image, text = read_rgb(item.source), found[item]
        results = segment_all_ways(ways, image, vocabularies[text], options.shortest_edge)
        facts = {"name": item.name, "width": image.width, "height": image.height, "words": text}
        images.append({**facts, "image": data_url(image), "results": results})

    failed = process_images(list(found), segment, report=logger.error).failed
    if not images:
        raise UsageError("There is no image to show. Give --images a folder, or install the extra `demo`.")
    target, summary = Path(options.output) / "index.html", summarise(images)
    write_text(target, render(options, list(ways.values())[-1].model, images, summary, failed))
    for name, seconds, ratio, like in summary:
        text = "%-36s %.3f s per image, %4.1f × student, %3.0f %% like the teacher"
        logger.info(text, name, seconds, ratio, 100 * like)
    return target


def render(options: Options, teacher: Any, images: list[dict[str, Any]], summary: list[tuple], failed: list) -> str:
    """
    The page in HTML.

    Raises:
        UsageError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment
    except ModuleNotFoundError as error:
        raise UsageError("The page needs jinja2: pip install 'spar-hf[demo]'") from error
    cpu = teacher.device.type == "cpu"
    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(
        images=images,
        model=Path(options.model).name,
        stride=options.stride,
        window=teacher.vision_model.window_size,
        shortest_edge=options.shortest_edge,
        device=f"{torch.get_num_threads()} CPU threads" if cpu else str(teacher.device),
        note=TINY if options.model == SPAR_TINY else "",
        summary=summary,
        failed=failed,
    )


def main(args: list[str] | None = None) -> Path:
    """The command; returns the page."""
    (options,) = parse_dataclasses([Options], args, __doc__)
    page = run(options)
    logger.info("written: %s", page.resolve())
    return page


if __name__ == "__main__":
    run_command(main)
