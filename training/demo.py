"""
The main job on real photos, with no download: masks from words by the embedded spar-tiny in one pass, beside its untouched
base in one pass and the sliding-window teacher; one HTML page with pictures, legends and times.

    python training/demo.py --output demo
"""

import base64
import io
import logging
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from jinja2 import Environment
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, HfArgumentParser

from spar_hf import SPAR_TINY, SPAR_TINY_BASE, SlidingWindowTeacher, SparForOpenVocabSegmentation
from spar_hf.image_processing_spar import read_image, to_rgb
from spar_hf.prompts import Vocabulary, embed_names
from spar_hf.segmentation import decide
from spar_hf.visualization import overlay

logger = logging.getLogger("demo")

# photos inside packages of the demo extra, and words for what one sees in them
PHOTOS: list[tuple[str, str, list[str]]] = [
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

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>SPAR: masks from words in one pass</title>
<style>
body { font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; color: #222; }
figure { margin: 0; } figcaption { font-size: .9rem; padding: .3rem 0; } img { width: 100%; display: block; }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1rem; margin-bottom: 1rem; align-items: start; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } h2 { margin: 2rem 0 .4rem; font-size: 1.1rem; }
</style></head><body>
<h1>SPAR: masks from words in one pass</h1>
<p>{{ model }}: the distilled student in one pass, its untouched base in one pass, and the base as a sliding-window teacher
(window {{ window }} px, stride {{ stride }} px), at a working short side of {{ shortest_edge }} px on {{ threads }} CPU
threads. Times are the vision forward alone, after a warm-up. The model is tiny and was trained on few photos of streets,
people and everyday scenes: where it has never seen a thing, its masks are guesses.</p>
<table><tr><th></th><th>seconds per photo</th><th>× student</th></tr>
{% for name, seconds, ratio in summary %}<tr><td>{{ name }}</td><td>{{ "%.3f"|format(seconds) }}</td>
<td>{{ "%.1f"|format(ratio) }}</td></tr>{% endfor %}</table>
{% for photo in photos %}<h2>{{ photo.name }} ({{ photo.width }}×{{ photo.height }}) — {{ photo.words }}</h2>
<div class="row"><figure><img src="{{ photo.image }}" alt="photo"><figcaption>photo</figcaption></figure>
{% for result in photo.results %}<figure><img src="{{ result.image }}" alt="{{ result.name }}">
<figcaption><b>{{ result.name }}</b>, {{ "%.3f"|format(result.seconds) }} s ({{ "%.1f"|format(result.ratio) }} × student)
</figcaption></figure>{% endfor %}</div>{% endfor %}
</body></html>
"""


@dataclass
class Options:
    """Options of the demo."""

    output: str = field(default="demo", metadata={"help": "Folder to write index.html and the pictures to."})
    model: str = field(default=SPAR_TINY, metadata={"help": "The student: a two-tower SPAR folder."})
    base: str = field(default=SPAR_TINY_BASE, metadata={"help": "Its untouched base."})
    stride: int = field(default=24, metadata={"help": "Stride of the teacher in pixels."})
    shortest_edge: int = field(default=384, metadata={"help": "Shorter side of the working image in pixels."})


def find_photos() -> list[tuple[str, Image.Image, list[str]]]:
    """The photos that are installed and in colour."""
    found = []
    for package, name, words in PHOTOS:
        root, _, rest = package.partition(".")
        path = resources.files(root).joinpath(*rest.split("."), name)
        if not path.is_file():
            logger.info("not installed, left out: %s/%s", package, name)
            continue
        with resources.as_file(path) as file:
            found.append((name, to_rgb(read_image(file)), words))
    return found


def data_url(picture: Image.Image, width: int = 720) -> str:
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@torch.no_grad()
def run(options: Options) -> Path:
    """Segment every photo three ways and write the page; returns its path."""
    student = SparForOpenVocabSegmentation.from_pretrained(options.model).eval()
    base = SparForOpenVocabSegmentation.from_pretrained(options.base).eval()
    teacher = SlidingWindowTeacher(base.vision_model, stride=options.stride)
    ways = [
        ("SPAR student, one pass", student, student.vision_model),
        ("base, one pass", base, base.vision_model),
        (f"base, sliding window at stride {options.stride}", base, teacher),
    ]
    image_processor = AutoImageProcessor.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pages, totals = [], {name: 0.0 for name, _, _ in ways}
    bar = tqdm(find_photos(), desc="photos")
    for name, photo, words in bar:
        bar.set_postfix_str(name)
        vocabulary = Vocabulary.parse(words)
        inputs = image_processor(photo, size={"shortest_edge": options.shortest_edge}, return_tensors="pt")
        pixel_values = inputs["pixel_values"]
        if not pages:
            student.vision_model(pixel_values)  # warm-up
        results = []
        for way, model, encoder in ways:
            start = time.perf_counter()
            features = encoder(pixel_values).feature_map
            elapsed = time.perf_counter() - start
            totals[way] += elapsed
            logits = model.dense_logits(features, embed_names(model, tokenizer, vocabulary.all_names))[0]
            decision = decide(
                logits,
                vocabulary.name_to_class,
                model.config.patch_size,
                tuple(pixel_values.shape[-2:]),
                inputs["original_sizes"][0],
            )
            picture = overlay(photo, decision.labels.numpy(), vocabulary.labels)
            results.append({"name": way, "image": data_url(picture), "seconds": elapsed})
        for result in results:
            result["ratio"] = result["seconds"] / results[0]["seconds"]
        pages.append(
            {
                "name": name,
                "width": photo.width,
                "height": photo.height,
                "words": "; ".join(words),
                "image": data_url(photo),
                "results": results,
            }
        )
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    first = totals[ways[0][0]]
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(
        photos=pages,
        model=Path(options.model).name,
        stride=options.stride,
        window=teacher.window_size,
        shortest_edge=options.shortest_edge,
        threads=torch.get_num_threads(),
        summary=[(name, total / len(pages), total / first) for name, total in totals.items()],
    )
    target = output / "index.html"
    temporary = output / "index.html.partial"
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(target)
    for name, total in totals.items():
        logger.info("%-40s %.3f s per photo, %.1f × student", name, total / len(pages), total / first)
    return target


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    logger.info("page: %s", run(options).resolve())


if __name__ == "__main__":
    main()
