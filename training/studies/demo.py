"""
The main job on real images, with no download: masks from words by the embedded spar-tiny in one pass, beside its untouched
base in one pass and the sliding-window teacher; one HTML page with pictures, legends and times.

    python training/demo.py --output demo
    python training/demo.py --output demo --packaged false --images IMAGES --vocabulary everyday
"""

import base64
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment
from PIL import Image
from transformers import HfArgumentParser

from spar_hf import SPAR_TINY, SPAR_TINY_BASE
from spar_hf.cli.labels import parse_labels
from spar_hf.cli.overlays import overlay, palette
from spar_hf.cli.pipelines import load_pipeline, segment_timed
from spar_hf.model.image_input import read_image, to_rgb
from spar_hf.utils.atomic import write_text
from spar_hf.utils.image_files import InputImage, find_images, process_images

logger = logging.getLogger("demo")

# images inside packages of the demo extra, and words for what one sees in them
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

# words for folders of images, by what is on them
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
<p>{{ model }}: the distilled student in one pass, its untouched base in one pass, and the base as a sliding-window teacher
(window {{ window }} px, stride {{ stride }} px), at a working short side of {{ shortest_edge }} px on {{ device }}.
Times are the vision forward alone, after a warm-up. “Like the teacher” is the share of pixels that get the teacher's class:
it says how well one pass replaces the window, not that either is right. {{ note }}</p>
<table><tr><th></th><th>seconds per image</th><th>× student</th><th>like the teacher</th></tr>
{% for name, seconds, ratio, agreement in summary %}<tr><td>{{ name }}</td><td>{{ "%.3f"|format(seconds) }}</td>
<td>{{ "%.1f"|format(ratio) }}</td><td>{{ "%.0f"|format(100 * agreement) }} %</td></tr>{% endfor %}</table>
{% for image in images %}<h2>{{ image.name }} ({{ image.width }}×{{ image.height }})</h2>
<p class="words">{{ image.words }}</p>
<div class="row"><figure><img src="{{ image.image }}" alt="photo"><figcaption>image</figcaption></figure>
{% for result in image.results %}<figure><img src="{{ result.image }}" alt="{{ result.name }}">
<figcaption><b>{{ result.name }}</b>, {{ "%.3f"|format(result.seconds) }} s ({{ "%.1f"|format(result.ratio) }} × student),
{{ "%.0f"|format(100 * result.agreement) }} % like the teacher
<div class="legend">{% for label, colour, share in result.legend %}<span><i style="background: rgb{{ colour }}"></i>
{{ label }} {{ "%.0f"|format(100 * share) }} %</span>{% endfor %}</div></figcaption></figure>{% endfor %}</div>{% endfor %}
{% if failed %}<h2>Failed</h2><ul>{% for source, message in failed %}<li>{{ message }}</li>{% endfor %}</ul>{% endif %}
</body></html>
"""
TINY = (
    "The model is tiny and was trained on few images of streets, people and everyday scenes: where it has never seen a "
    "thing, its masks are guesses."
)


@dataclass
class Options:
    """Options of the demo."""

    output: str = field(default="demo", metadata={"help": "Folder to write index.html to."})
    images: list[str] | None = field(
        default=None, metadata={"help": "Folders, files or patterns of further images.", "nargs": "+"}
    )
    vocabulary: str = field(
        default="everyday",
        metadata={
            "help": f"Words for --images: a preset ({', '.join(PRESETS)}), a built-in set (ade20k, voc21, ...) or one's "
            "own: 'road; car, automobile; sky'."
        },
    )
    max_images: int = field(default=10, metadata={"help": "Images of --images, evenly from each of them."})
    packaged: bool = field(default=True, metadata={"help": "Show the images inside scikit-image and others."})
    model: str = field(default=SPAR_TINY, metadata={"help": "The student: a two-tower SPAR folder."})
    base: str = field(default=SPAR_TINY_BASE, metadata={"help": "Its untouched base."})
    stride: int = field(default=24, metadata={"help": "Stride of the teacher in pixels."})
    shortest_edge: int = field(default=384, metadata={"help": "Shorter side of the working image in pixels."})


def packaged_images() -> dict[InputImage, str]:
    """The images that are installed, with the words for what is on them."""
    found = {}
    for package, name, words in IMAGES:
        root, _, rest = package.partition(".")
        path = resources.files(root).joinpath(*rest.split("."), name)
        if path.is_file():
            found[InputImage(str(path), name)] = "; ".join(words)
        else:
            logger.info("not installed, left out: %s/%s", package, name)
    return found


def own_images(arguments: list[str], limit: int, words: str) -> dict[InputImage, str]:
    """
    At most `limit` images, evenly from all arguments and evenly from each.

    Raises:
        FileNotFoundError: an argument gives no image.
    """
    found: dict[InputImage, str] = {}
    for i, argument in enumerate(arguments):
        images, problems = find_images([argument])
        if problems:
            raise FileNotFoundError(problems[0][1])
        count = min(len(images), (limit - len(found)) // (len(arguments) - i))
        found.update({images[j * len(images) // count]: words for j in range(count)})
    return found


def data_url(picture: Image.Image, width: int = 720) -> str:
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def legend(label_map: np.ndarray, labels: list[str]) -> list[tuple[str, tuple[int, ...], float]]:
    """Name, colour and share of the image of the classes that have pixels, largest first."""
    shares = np.bincount(label_map.ravel(), minlength=len(labels)) / label_map.size
    colours = palette(len(labels)).tolist()
    return [(labels[i], tuple(colours[i]), shares[i]) for i in np.argsort(-shares, kind="stable") if shares[i]]


def run(options: Options, report: Callable[[str], None] = logger.error) -> Path:
    """
    Segment every image three ways and write the page; returns its path.

    Raises:
        FileNotFoundError: an argument of `--images` gives no image.
        ValueError: malformed words, or not one image could be read.
    """
    words = PRESETS.get(options.vocabulary, options.vocabulary)
    found = packaged_images() if options.packaged else {}
    found.update(own_images(options.images or [], options.max_images, words))
    vocabularies = {text: parse_labels(text) for text in found.values()}
    teacher = f"base, sliding window at stride {options.stride}"
    ways = {
        "SPAR student, one pass": load_pipeline(options.model),
        "base, one pass": load_pipeline(options.base),
        teacher: load_pipeline(options.base, stride=options.stride),
    }
    size = {"shortest_edge": options.shortest_edge}
    for segment in ways.values():
        segment_timed(segment, Image.new("RGB", (64, 64)), ["image"])  # warm-up
    pages: list[dict] = []

    def show(item: InputImage) -> None:
        image, text = to_rgb(read_image(item.source)), found[item]
        results = {name: segment_timed(segment, image, vocabularies[text], size=size) for name, segment in ways.items()}
        first, last = next(iter(results.values())), results[teacher]
        shown = [
            {
                "name": name,
                "image": data_url(overlay(image, result["map"], result["labels"], legend=False)),
                "legend": legend(result["map"], result["labels"]),
                "seconds": result["forward_seconds"],
                "ratio": result["forward_seconds"] / first["forward_seconds"],
                "agreement": float((result["map"] == last["map"]).mean()),
            }
            for name, result in results.items()
        ]
        facts = {"name": item.name, "width": image.width, "height": image.height, "words": text}
        pages.append({**facts, "image": data_url(image), "results": shown})

    tally = process_images(list(found), show, report=report)
    if not pages:
        raise ValueError("There is no image to show. Give --images a folder, or install the extra `demo`.")
    columns = list(zip(*(page["results"] for page in pages), strict=True))
    seconds = [sum(result["seconds"] for result in column) / len(pages) for column in columns]
    agreement = [sum(result["agreement"] for result in column) / len(pages) for column in columns]
    summary = [(name, mean, mean / seconds[0], like) for name, mean, like in zip(ways, seconds, agreement, strict=True)]
    model = ways[teacher].model
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(
        images=pages,
        model=Path(options.model).name,
        stride=options.stride,
        window=model.vision_model.window_size,
        shortest_edge=options.shortest_edge,
        device=f"{torch.get_num_threads()} CPU threads" if model.device.type == "cpu" else str(model.device),
        note=TINY if options.model == SPAR_TINY else "",
        summary=summary,
        failed=tally.failed,
    )
    target = Path(options.output) / "index.html"
    write_text(target, html)
    for name, mean, ratio, like in summary:
        logger.info("%-36s %.3f s per image, %4.1f × student, %3.0f %% like the teacher", name, mean, ratio, 100 * like)
    return target


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    try:
        logger.info("page: %s", run(options).resolve())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
