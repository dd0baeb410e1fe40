"""The page for browsers: labels of Python from an image and words, in a real Chromium, and no other computer asked."""

import functools
import http.server
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from spar_hf.cli.overlays import palette
from spar_hf.export import web
from spar_hf.export.exporting import export
from spar_hf.runtime import OnnxSegmenter
from spar_hf.utils.errors import UsageError

IMAGES = Path(skimage.__file__).parent / "data"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# `npm install --prefix .npm` and the packages of `spar_hf.export.web.INSTALL`; hidden, so that linters pass over it
PACKAGES = Path(os.environ.get("SPAR_HF_NPM", Path(__file__).parents[2] / ".npm"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Files(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(classmap_folder, baked_folder, tmp_path_factory):
    """The page of spar-tiny with its packages, and below `/baked` that of an export with its classes in it."""
    try:
        web.find_packages(PACKAGES)
    except UsageError as error:
        pytest.skip(str(error))
    site = tmp_path_factory.mktemp("web") / "page"
    for source, folder in ((classmap_folder, site), (baked_folder, site / "baked")):
        shutil.copytree(source, folder)
        web.add_files(folder, OnnxSegmenter(folder).folder.record, PACKAGES)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def tab(address):
    """The page in a browser, at the size of a phone."""
    pytest.importorskip("playwright", reason="the browser is driven by playwright (extra dev)")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.set_default_timeout(120_000)
        tab.asked, tab.faults = [], []
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.on("pageerror", lambda error: tab.faults.append(str(error)))
        tab.goto(address)
        yield tab
        browser.close()


def run(tab, image, words):
    """Segment an image; returns what the page says at the end."""
    tab.locator("#words").fill(words)
    tab.evaluate("document.querySelector('#found').hidden = true, document.querySelector('#status').className = ''")
    tab.set_input_files("#file", image)
    tab.locator("#found, #status.error").filter(visible=True).first.wait_for()
    return tab.locator("#status").inner_text()


def labels(tab, path):
    """The label map that the page saves."""
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save labels").click()
    download.value.save_as(path)
    return Image.open(path)


@pytest.mark.parametrize(
    "name, words, background",
    [("coffee.png", "cup, mug\nspoon\ntable", True), ("rocket.jpg", "rocket; tower; sky", False)],
)
def test_labels_in_the_browser_are_those_of_python(name, words, background, tab, address, classmap_folder, tmp_path):
    tab.locator("#background").set_checked(background)
    said = run(tab, IMAGES / name, words)
    image = Image.open(IMAGES / name)
    assert said.startswith(f"{image.width} × {image.height} pixels") and not tab.faults
    saved = labels(tab, tmp_path / "labels.png")
    expected = OnnxSegmenter(classmap_folder)(
        IMAGES / name, re.split("[;\n] *", words), background="auto" if background else None, output="map"
    )
    assert saved.mode == "P" and saved.size == image.size
    assert (np.asarray(saved) == expected["map"]).mean() >= 0.999
    colours = palette(len(expected["labels"]), expected["background"])
    assert saved.getpalette()[: colours.size] == colours.flatten().tolist()
    found = np.bincount(expected["map"].ravel(), minlength=len(expected["labels"])).argsort()[::-1]
    legend = tab.locator("#legend li span").all_inner_texts()
    assert sorted(legend) == sorted(np.array(expected["labels"])[np.unique(expected["map"])].tolist())
    assert legend[0] == next(expected["labels"][i] for i in found if i != expected["background"])
    box = tab.locator("#overlay").bounding_box()
    assert box["width"] <= 390
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    centre = expected["map"][image.height // 2, image.width // 2]
    assert tab.locator("#hover").inner_text() == tab.locator("#legend li.here span").inner_text()
    assert tab.locator("#hover").inner_text() == expected["labels"][centre]
    others = [url for url in tab.asked if not url.startswith((address, "blob:", "data:"))]
    assert len(tab.asked) > 10 and not others


def test_alpha_orientation_and_sizes_are_read_as_in_python(tab, tmp_path):
    pixels = np.asarray(Image.open(IMAGES / "coffee.png").resize((150, 97)))
    # steps of 51: a canvas multiplies colours by alpha, which loses up to a level where alpha is small
    alpha = np.tile((np.arange(150) // 30 * 51 + 51).astype(np.uint8), (97, 1))
    Image.fromarray(np.dstack([pixels, alpha])).save(tmp_path / "clear.png")
    upright = Image.fromarray(pixels)
    exif = upright.getexif()
    exif[0x0112] = 6
    upright.save(tmp_path / "turned.jpg", exif=exif)
    decode = """async (bytes) => {
        const { decode } = await import("/images.js");
        const { pixels, size } = await decode(new Blob([Uint8Array.from(bytes)]));
        return [size, [...pixels]];
    }"""
    from spar_hf.model.image_input import read_rgb

    for name, tolerance in (("clear.png", 2), ("turned.jpg", 0)):
        expected = np.asarray(read_rgb(tmp_path / name)).astype(int)
        size, found = tab.evaluate(decode, list((tmp_path / name).read_bytes()))
        assert size == list(expected.shape[:2])
        assert np.abs(np.reshape(found, expected.shape) - expected).max() <= tolerance


@pytest.mark.parametrize("filter", web.FILTERS)
def test_images_are_resized_as_pillow_does(filter, tab):
    pixels = np.random.default_rng(filter).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    resize = """async ([values, from, to, filter]) => {
        const { resize } = await import("/images.js");
        return [...resize(Uint8Array.from(values), from, to, filter)];
    }"""
    for size in ((12, 100), (80, 9), (37, 20), (53, 53)):
        expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], filter))
        found = tab.evaluate(resize, [pixels.ravel().tolist(), list(pixels.shape[:2]), list(size), filter])
        assert np.array_equal(np.reshape(found, expected.shape), expected)


def test_working_sizes_are_those_of_python(tab):
    from spar_hf.model.image_pixels import working_size

    rules = [
        None,
        {"shortest_edge": 33},
        {"longest_edge": 100},
        {"shortest_edge": 384, "longest_edge": 500},
        {"height": 9, "width": 70},
    ]
    cases = [
        [h, w, rule, limit, 16] for h, w in ((97, 61), (50, 100), (3, 700)) for rule in rules for limit in (16384, 40)
    ]
    script = "async (cases) => { const m = await import('/images.js'); return cases.map((c) => m.workingSize(...c)); }"
    assert [tuple(size) for size in tab.evaluate(script, cases)] == [working_size(*case)[1] for case in cases]


def test_mistakes_are_answered_in_words(tab, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    assert "cannot read this file" in run(tab, broken, "cup")
    for words, answer in (
        ("", "at least one class"),
        ("cup; cup", "stands for two classes"),
        ("cup; cup!", "same tokens"),
        ("cup,,mug", "empty name"),
        ("the " * 40, "tokens"),
    ):
        assert answer in run(tab, IMAGES / "coffee.png", words)
    run(tab, IMAGES / "coffee.png", "cup")
    assert not tab.locator("#status.error").count() and not tab.faults


def test_classes_in_the_graph_are_not_asked_for(tab, address, baked_folder, tmp_path):
    tab.goto(f"{address}/baked/")
    tab.locator("form").wait_for(state="hidden")
    tab.set_input_files("#file", IMAGES / "coffee.png")
    tab.locator("#found").wait_for()
    assert not tab.locator("#words").is_visible() and not tab.locator("#run").is_visible()
    expected = OnnxSegmenter(baked_folder)(IMAGES / "coffee.png", output="map")["map"]
    assert (np.asarray(labels(tab, tmp_path / "labels.png")) == expected).mean() >= 0.999
    assert not any("text_model" in url for url in tab.asked if "/baked/" in url)


def test_without_packages_the_page_names_one_public_place(classmap_folder, tmp_path):
    folder = tmp_path / "page"
    shutil.copytree(classmap_folder, folder)
    segmenter = OnnxSegmenter(folder)
    web.add_files(folder, segmenter.folder.record)
    page = (folder / "page.json").read_text()
    assert page.count("https://") == 3 and "@1." in page and not (folder / "vendor").exists()
    for file in folder.glob("*.*s"):
        assert "https://" not in file.read_text()
    # the widened graph is the same one
    image = Image.open(IMAGES / "coffee.png").resize((90, 70))
    before, after = (run(image, ["cup", "table"], output="map") for run in (segmenter, OnnxSegmenter(folder)))
    assert (before["map"] == after["map"]).all()


def test_what_the_page_cannot_show_is_refused_before_the_export(tmp_path):
    for options, word in (
        ({"head": "logits"}, "--head classmap"),
        ({"vendor": tmp_path}, "npm install onnxruntime-web@"),
        ({"format": "onnx", "vendor": tmp_path}, "--vendor is for --format web"),
    ):
        with pytest.raises(UsageError, match=word):
            export("none", tmp_path / "page", **{"format": "web", **options})
