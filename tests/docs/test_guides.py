"""
What the guides say is run, on small models and folders. `NOT_RUN` counts the blocks that are not, and why. The pages about
deployment have a test of their own, `test_commands.py`.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import tifffile
import yaml
from doc_pages import PROJECT, ROOT, blocks, page_text, reasons, run_page
from official_checkpoints import write_official
from PIL import Image
from transformers import pipeline
from videos import write_clip

import spar_hf
from spar_hf.cli.main import app

PAGES = (
    "README",
    "docs/segment",
    "docs/get_started",
    "docs/sizes",
    "docs/distil",
    "docs/backbones",
    "docs/measuring",
    "docs/heads",
    "docs/data",
    "docs/checkpoints",
    "docs/reproducibility",
    "docs/faq",
    "docs/masks",
    "docs/support",
    "docs/huge_images",
    "docs/video",
    "docs/many_images",
    "docs/scale",
    "docs/concepts/teacher",
    "docs/concepts/sampling",
    "docs/concepts/geometry",
    "docs/concepts/local_start",
    "docs/concepts/scores",
)
ELSEWHERE = {"deployment", "export", "runtime", "serving", "precision"}  # test_commands.py runs them
RECORDS = {"benchmarks", "spar-tiny-first", "spar-tiny-history"}  # what was run on data that is not here
NOT_RUN = {
    "docs/masks": {"tests/training runs the study on small folders": 1, "it writes into the package": 1},
    "docs/support": {"needs the sets; tests/training runs it on small folders": 1},
    "docs/benchmarks": {"needs the benchmarks; tests/evaluation and tests/data read small folders of their layouts": 1},
    "docs/segment": {"tests/cli drives it in a browser": 1},
    "docs/distil": {"tests/distillation starts several processes": 1},
    "docs/measuring": {
        "needs PASCAL VOC; tests/evaluation reads small folders of its layout": 1,
        "tests/training draws them from small folders": 1,
    },
    "docs/data": {"needs the hub": 1},
    "docs/video": {"needs CamVid": 1},
    "docs/many_images": {
        "tests/batch runs it on a local Ray, and kills a worker and the driver": 1,
        "needs a store; tests/batch and tests/distillation run it on memory:// and a local S3 server": 1,
    },
    "docs/scale": {"several minutes; tests/training runs it on a few images": 1},
    "docs/checkpoints": {"needs the hub; tests/conversion replaces it": 1},
}
PACKAGES = ("supervision", "trackio")  # recipes that need a package which the library does not
STAND_IN = "fiftyone"  # one that test_fiftyone_recipe.py runs with a stand-in
# what runs in place of what is written: a tiny model, few steps, small images
SUBSTITUTES = (
    (r"google/siglip2-base-patch16-512", "my-model"),
    (r"model=str\(spar_hf\.SPAR_TINY_BASE\)", 'model="my-model", workers=0'),
    (r"(spar-hf segment )(?!aerial|[^\n]*--model)", r"\1--model my-model --templates plain "),
    (r"(spar-hf (?:features|support) )", r"\1--model my-model "),
    (r"(spar-hf distill(?: \S+\.yaml)?)(?![^\n]*--dry_run)", r"\1 --workers 0 --picture_steps 0"),
    (r"(--base base)", r"\1 --vision-act gelu"),
    (
        r"(spar-hf panoptic )",
        r"\1--workers 0 --hidden_dim 16 --num_queries 5 --train_num_points 64 --decoder_layers 2 ",
    ),
    (r"(spar-hf probe )", r"\1--pixels 64 "),
    (r"(--(?:eval_)?steps |\bsteps[=:] ?)\d+", r"\g<1>2"),
    (r"(--shortest[_-]edge )\d+", r"\g<1>64"),
    (r'("shortest_edge": edge|in \(192, 384\))', lambda found: found[0].replace("192, 384", "64, 96")),
    (r"(base:sliding:)24", r"\g<1>16"),
    (r"(--stride )96", r"\g<1>16"),
    (r"--tile 768 --tile-overlap 192", "--tile 64 --tile-overlap 16"),
    (r'"size": 768, "overlap": 192', '"size": 64, "overlap": 16'),
    (r"words, 768\)", "words, 64)"),
    (r"--layers 3,6,9,features", "--layers 0,1,features"),
    (r"--model BASE", "--model my-model --window_size 64 --stride 32 --holdout_every 3"),
    (r"\$SLURM_ARRAY_TASK_ID/64", "0/1"),
    (r"photos --labels ade20k", 'photos --labels "road; car; sky"'),  # the tiny tokenizer does not know all its names
    (r"\(768, 42, 56\)", "(32, 30, 40)"),
    (r'SparFeatures\(size=448, layers="6,features"\)', 'SparFeatures("my-model", size=64, layers="1,features")'),
    (r", num_proc=2", ""),  # a pool of processes, each with a model
)


@pytest.fixture
def folder(tmp_path, base_folder, image_folder, monkeypatch):
    """What the pages expect: a model, an image, folders of images with and without masks, words, an official checkpoint."""
    shutil.copytree(base_folder, tmp_path / "my-model")
    shutil.copytree(image_folder, tmp_path / "photos")
    shutil.copytree(image_folder, tmp_path / "data" / "images")
    (tmp_path / "data" / "masks").mkdir()
    rng = np.random.default_rng(0)
    for path in (tmp_path / "data" / "images").iterdir():
        with Image.open(path) as image:
            mask = Image.fromarray(rng.integers(0, 3, (4, 5), dtype=np.uint8)).resize(
                image.size, Image.Resampling.NEAREST
            )
        mask.save(tmp_path / "data" / "masks" / f"{path.stem}.png")
    (tmp_path / "data" / "classes.txt").write_text("road\ncar\nsky\n")
    shutil.copytree(tmp_path / "data", tmp_path / "held_out")
    (tmp_path / "classes.txt").write_text("road\ncar, automobile\nsky\n")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC).save(tmp_path / "street.jpg")
    write_official(tmp_path, "siglip2")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(folder):
    """What a page takes for granted: a pipeline, an image, words, an array on a disk."""
    array = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    tifffile.imwrite(folder / "aerial.tif", array, tile=(64, 64), photometric="rgb")
    names = {"segment": pipeline("open-vocab-segmentation", model=str(folder / "my-model"))}
    return names | {"image": Image.fromarray(array), "words": ["road", "car", "sky"], "zarr_array": array}


class Engine:
    """What Ray Data and Spark do with a callable, in this process: tests/batch has a real Ray."""

    def __init__(self, folder):
        self.columns = {"image": [path.read_bytes() for path in sorted((folder / "photos").iterdir())]}

    def map_batches(self, kind, fn_constructor_kwargs, num_gpus):
        found = kind("my-model", **fn_constructor_kwargs)(self.columns)
        assert not any(found["error"]) and len(found["map"]) == len(self.columns["image"])

    def mapInPandas(self, function, schema):
        (found,) = function(iter([pandas.DataFrame(self.columns)]))
        assert not any(found["error"]) and set(schema) <= set(found.columns)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page(page, folder, monkeypatch):
    names = given(folder) if page in ("docs/masks", "docs/huge_images") else None
    if page == "docs/many_images":
        engine = Engine(folder)
        names = {"dataset": datasets.Dataset.from_dict(engine.columns), "images": engine, "frame": engine}
        names["schema"] = ["features", "layer_1", "shape", "error"]
    if page == "docs/video":
        (folder / "clips").mkdir()
        shutil.copy(write_clip(folder / "clip.mp4"), folder / "clips")
    assert run_page(page, monkeypatch, SUBSTITUTES, names) == sum(block.why is None for block in blocks(page)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_recipes(package, folder, monkeypatch):
    if package:
        pytest.importorskip(package, reason=f"pip install {package} to run its recipe")
        monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    assert run_page("docs/recipes", monkeypatch, SUBSTITUTES, recipe=package or None) == (1 if package else 2)
    if not package:
        shapes = json.loads(Path("annotations", "polygons.json").read_text())["annotations"]
        assert shapes and all(len(polygon) >= 6 for shape in shapes for polygon in shape["segmentation"])
        assert all(abs(area_of(shape["segmentation"]) - shape["area"]) <= 0.5 * shape["area"] + 20 for shape in shapes)


def area_of(polygons):
    """Area of polygons in pixels, less that of their holes, by the shoelace formula; holes run the other way round."""
    total = 0.0
    for polygon in polygons:
        x, y = np.array(polygon).reshape(-1, 2).T
        total += float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return abs(total)


def test_recipes_are_short_and_known():
    recipes = blocks("docs/recipes")
    assert all(len(block.text.splitlines()) <= 30 for block in recipes)
    assert {block.recipe for block in recipes} == {None, *PACKAGES, STAND_IN} and not reasons("docs/recipes")


@pytest.mark.parametrize("page", [*PAGES, "docs/benchmarks"])
def test_what_is_not_run_is_known(page):
    assert reasons(page) == NOT_RUN.get(page, {})


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_links_and_scripts_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []
    assert [name for name in re.findall(r"training/[\w/]+\.(?:py|yaml)", text) if not (ROOT / name).exists()] == []


def test_every_page_is_on_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {
        page for section in site["nav"] for entries in section.values() for one in entries for page in one.values()
    }
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == written  # cards come of themselves


def test_the_site_loads_nothing_from_other_servers():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False and not {"extra_javascript", "extra_css"} & site.keys()


def test_every_page_with_commands_is_run_or_named():
    pages = {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    with_blocks = {page for page in pages if blocks(page)}
    assert with_blocks - {*PAGES, "docs/recipes"} == {f"docs/{name}" for name in ELSEWHERE | RECORDS}


def test_every_public_name_has_a_reference():
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", written, re.MULTILINE)}
    assert set(spar_hf.__all__) - {"__version__"} <= listed


def test_every_command_and_extra_is_listed():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert [name for name in sorted(commands) if f"`spar-hf {name}`" not in page_text("docs/reference/commands")] == []
    extras = PROJECT["optional-dependencies"]
    assert [name for name in extras if f"`{name}`" not in page_text("docs/get_started")] == []


def test_the_readme_is_a_screen_and_a_half():
    assert len(page_text("README").splitlines()) <= 90


def test_questions_are_twenty_and_have_answers():
    parts = re.split(r"^### .+$", page_text("docs/faq"), flags=re.MULTILINE)[1:]
    assert len(parts) == 20 and all("```" in part for part in parts)


def test_figures_are_what_their_programme_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py", str(tmp_path)])
    source = (ROOT / "docs" / "figures.py").read_text(encoding="utf-8")
    exec(compile(source, "docs/figures.py", "exec"), {"__name__": "__main__"})
    drawn = sorted(tmp_path.iterdir())
    assert [path.name for path in drawn] == sorted(path.name for path in (ROOT / "docs" / "assets").iterdir())
    assert all(path.read_bytes() == (ROOT / "docs" / "assets" / path.name).read_bytes() for path in drawn)
    assert Path(tmp_path / "geometry.svg").read_text().count("window at") == 3
