"""The web page over HTTP and in a real browser: masks and a legend from an image and words, and no other computer asked."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from spar_hf.cli.web_page import legend, picture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pandas, in Gradio's queue
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def result_of(label_map, labels, scores):
    return {"map": np.array(label_map), "labels": labels, "scores": scores}


def test_the_legend_lists_share_and_probability_of_every_class_and_escapes_words():
    first = result_of([[0, 0], [0, 1]], ["sky", "<b>car</b>", "dog"], [0.5, 0.75, 0.0])
    other = result_of([[0, 0], [2, 2]], ["sky", "<b>car</b>", "dog"], [0.6, 0.0, 0.25])
    rows = re.findall(r"<tr.*?</tr>", legend([("one pass", first), ("window", other)]))
    assert len(rows) == 4 and "one pass: share" in rows[0] and "window: share" in rows[0]
    cells = [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row)] for row in rows[1:]]
    assert cells == [
        ["sky", "75.0%", "0.50", "50.0%", "0.60"],
        ["&lt;b&gt;car&lt;/b&gt;", "25.0%", "0.75", "–", "–"],
        ["dog", "–", "–", "50.0%", "0.25"],
    ]


def test_large_pictures_are_reduced_together_with_their_masks():
    from PIL import Image

    label_map = np.zeros((2000, 3000), np.int32)
    label_map[:, 1500:] = 1
    shown = picture(Image.new("RGB", (3000, 2000)), result_of(label_map, ["left", "right"], [1, 1]))
    assert shown.size == (1280, 853)
    left, right = shown.getpixel((300, 400)), shown.getpixel((900, 400))
    assert left != right and left == shown.getpixel((630, 10)) and right == shown.getpixel((650, 840))


def test_without_gradio_the_command_names_the_extra(monkeypatch):
    from typer.testing import CliRunner

    from spar_hf.cli.main import app

    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    result = CliRunner().invoke(app, ["app"])
    assert result.exit_code == 1 and "pip install 'spar-hf[app]'" in result.output


@pytest.fixture(scope="module")
def address():
    """The page of the embedded model, served by this process."""
    pytest.importorskip("gradio", reason="the page needs Gradio (extra app)")
    from spar_hf.cli.web_page import build_page, launch_page

    page = build_page()
    yield launch_page(page, wait=False)
    page.close(verbose=False)


def test_the_page_over_http_answers_twice_and_reports_errors_as_text(address, tmp_path):
    from gradio_client import Client, handle_file
    from PIL import Image

    image, broken = tmp_path / "street.png", tmp_path / "broken.png"
    Image.new("RGB", (64, 48), "green").save(image)
    broken.write_bytes(image.read_bytes()[:60])
    client = Client(address, verbose=False)

    def run(source, words="road; <b>sky</b>"):
        job = client.submit(source and handle_file(source), words, 64, 0, True, 96, api_name="/run")
        job.result()
        return job.outputs()

    (_, picture, time, window_picture, _, table), (*_, window_time, both) = run(image)
    assert Image.open(picture).size == (64, 48) and window_picture is None and "vision forward" in time
    assert "one pass: share" in table and "&lt;b&gt;sky" in table and "sliding window" not in table
    assert "× one pass" in window_time and "sliding window: share" in both
    for arguments, word in (((None,), "no image"), ((image, "sky; sky"), "differ"), ((broken,), broken.name)):
        ((message, *_),) = run(*arguments)
        assert 'role="alert"' in message["value"] and word in message["value"]
        assert "gradio" not in message["value"]  # the folder of the uploads


@pytest.fixture
def tab(address):
    pytest.importorskip("playwright", reason="the browser is driven by playwright (extra dev)")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(90_000)
        tab.goto(address)
        tab.get_by_role("button", name="Segment").wait_for()
        yield tab
        browser.close()


def test_words_and_a_real_image_give_masks_and_legend(tab, address, tmp_path):
    datasets = pytest.importorskip("sklearn.datasets", reason="the image is scikit-learn's (extra demo)")
    image = Path(datasets.__file__).parent / "images" / "flower.jpg"
    asked = []
    tab.context.on("request", lambda request: asked.append(request.url))
    tab.reload()
    words = tab.get_by_label("Words")

    tab.get_by_role("button", name="Segment").click()
    tab.get_by_role("alert").get_by_text("There is no image yet").wait_for()

    broken = tmp_path / "broken.jpg"
    broken.write_bytes(image.read_bytes()[:3000])
    tab.set_input_files("input[type=file]", broken)
    tab.locator(".image-frame img").wait_for()
    tab.get_by_role("button", name="Segment").click()
    tab.get_by_role("alert").get_by_text("'broken.jpg' is no image").wait_for()

    tab.get_by_label("Remove Image").or_(tab.get_by_label("Clear")).first.click()
    tab.set_input_files("input[type=file]", image)
    tab.locator(".image-frame img").wait_for()
    words.fill("flower; flower")
    tab.get_by_role("button", name="Segment").click()
    tab.get_by_role("alert").get_by_text("Labels must differ").wait_for()

    words.fill("flower, blossom; grass, leaves; airplane")
    tab.get_by_label("number input for Working resolution").fill("96")
    tab.get_by_role("button", name="Segment").click()
    tab.locator(".spar-legend").wait_for()
    assert tab.get_by_role("alert").count() == 0
    rows = tab.locator(".spar-legend tbody tr td:first-child").all_inner_texts()
    assert sorted(row.strip() for row in rows) == ["airplane", "flower", "grass"]
    assert re.search(r"\d\.\d\d s vision forward", tab.locator("body").inner_text())
    one_pass = tab.locator(".image-frame img").last
    assert one_pass.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [640, 427]

    tab.get_by_label("Compare with the sliding window").check()
    tab.get_by_label("number input for Stride of the window").fill("96")
    tab.get_by_role("button", name="Segment").click()
    tab.locator(".spar-legend th", has_text="sliding window").wait_for()
    assert "× one pass" in tab.locator("body").inner_text()
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert asked and not elsewhere
