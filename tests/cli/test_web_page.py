"""The web page over HTTP and in a real browser: masks and a legend from an image and words, and no other computer asked."""

import contextlib
import http.server
import importlib.util
import io
import json
import random
import re
import shutil
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from spar_hf.cli import web_page, web_segmentation
from spar_hf.cli.overlays import palette
from spar_hf.cli.pipelines import load_pipeline, segment_timed
from spar_hf.cli.web_view import colours_of, for_display, legend
from spar_hf.model.prompts import Vocabulary

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pandas, in Gradio's queue
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def result_of(label_map, labels, scores):
    return {"map": np.array(label_map), "labels": labels, "scores": scores, "background": -1}


def test_the_legend_lists_share_and_probability_of_every_class_found_and_escapes_words():
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


def test_the_legend_shows_the_background_in_grey_and_last_and_presence_if_computed():
    labels = ["sky", "background", "<i>dog</i>"]
    result = result_of([[1, 1], [1, 0]], labels, [0.5, 0.6, 0.0])
    result |= {"background": 1, "presence": [0.9, None, 0.03]}
    text = legend([("one pass", result)])
    rows = [re.sub("<[^>]*>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", text)]
    assert [row[0] for row in rows] == ["class", "sky", "background"]
    assert rows[1][-1] == "0.90" and rows[2][-1] == "–" and "rgb(140, 140, 140)" in text
    assert "1 class not found</summary>&lt;i&gt;dog&lt;/i&gt; (presence 0.03)</details>" in text


def test_the_page_reports_how_many_words_are_embedded(monkeypatch):
    pipe, said = load_pipeline(), []
    monkeypatch.setattr(web_segmentation, "NAMES_AT_ONCE", 20)
    embed, embedded = pipe.model.get_text_features, []
    monkeypatch.setattr(
        pipe.model, "get_text_features", lambda ids, **given: embedded.append(len(said)) or embed(ids, **given)
    )
    vocabulary = Vocabulary.parse(["zeppelin hangar", "dog"])
    web_segmentation.embed_words(pipe, vocabulary, "auto", True, lambda done, desc, unit: said.append((done, desc)))
    steps = [done for done, _ in said]
    assert steps[0][0] == 0 and len(steps) > 1 and len({desc for _, desc in said}) == 2
    assert embedded and min(embedded) > 0  # nothing is embedded before something is said
    monkeypatch.setattr(type(pipe.model), "get_text_features", None)  # everything is embedded
    monkeypatch.setattr(pipe.model, "get_text_features", None)
    options = {"background": "auto", "presence": True, "output": "map"}
    result = pipe(Image.new("RGB", (48, 48)), candidate_labels=vocabulary, **options)
    assert result["labels"] == ["zeppelin hangar", "dog", "background"]


def test_the_page_says_what_it_does_from_the_first_moment(monkeypatch):
    gr = pytest.importorskip("gradio", reason="the page needs Gradio (extra app)")
    said = []

    def fail(*_):
        raise ValueError(f"after {len(said)}")

    monkeypatch.setattr(web_segmentation, "read_words", fail)
    results = web_segmentation.Results(*web_segmentation.Results.__dataclass_fields__)
    run = web_segmentation.segmentation_handler(gr, None, results)
    given = (None, "", 64, 0, False, 96, True, 0, "no", 0.5, False, True, {})
    (shown,) = run(*given, progress=lambda done, desc: said.append(desc))
    assert len(said) == 1 and "after 1" in str(shown)


def test_large_pictures_are_reduced_together_with_their_masks():
    label_map = np.zeros((2000, 3000), np.int32)
    label_map[:, 1500:] = 1
    image, small = for_display(Image.new("RGB", (3000, 2000)), label_map)
    assert image.size == (1280, 853) and small.shape == (853, 1280)
    assert (small[:, :639] == 0).all() and (small[:, 641:] == 1).all()


def test_a_word_keeps_its_colour_whatever_stands_beside_it():
    street = result_of([[0, 0, 0], [1, 1, 2]], ["road", "car", "sky", "dog"], [1, 1, 1, 0])
    colours, known = colours_of(street, {})
    assert (colours[:3] == palette(3)).all()
    other = result_of([[2, 2, 1], [2, 0, 3]], ["Sky", "cat", "rest", "Car"], [1, 1, 1, 1]) | {"background": 2}
    again, known = colours_of(other, known)
    assert (again[0] == colours[2]).all() and (again[3] == colours[1]).all()
    assert again[1].tolist() == palette(4)[3].tolist() and again[2].tolist() == [140, 140, 140]
    assert known == {"road": 0, "car": 1, "sky": 2, "cat": 3}


def test_absent_classes_are_folded_away():
    labels = ["sky", *(f"thing {i}" for i in range(149))]
    text = legend([("one pass", result_of([[0, 0]], labels, [0.9] + [0.0] * 149))])
    assert text.count("<tr>") == 2
    folded = re.search(r"<details[^>]*><summary>149 classes not found</summary>(.*?)</details>", text)
    assert folded and folded[1].split(", ") == labels[1:]


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

    page, said, printed = build_page(), [], io.StringIO()
    with contextlib.redirect_stdout(printed):
        url = launch_page(page, wait=False, say=said.append)
    assert said == [url] and not printed.getvalue()  # no advice to make the page public
    yield url
    page.close(verbose=False)


def test_the_page_over_http_answers_twice_and_reports_errors_as_text(address, tmp_path):
    from gradio_client import Client, handle_file

    image, broken = tmp_path / "street.png", tmp_path / "broken.png"
    Image.new("RGB", (64, 48), "green").save(image)
    broken.write_bytes(image.read_bytes()[:60])
    client = Client(address, verbose=False)

    def run(source, words="road; <b>sky</b>"):
        look = ("no", 0.5, False, True)
        job = client.submit(source and handle_file(source), words, 64, 0, True, 96, True, 0, *look, api_name="/run")
        job.result()
        return job.outputs()

    (_, picture, time, window_picture, _, table, *_), (_, _, _, _, window_time, both, *_) = run(image)
    assert Image.open(picture).size == (64, 48) and window_picture is None and "vision forward" in time
    assert "one pass: share" in table and "&lt;b&gt;sky" in table and "sliding window" not in table
    assert "× one pass" in window_time and "sliding window: share" in both
    for arguments, word in (((None,), "no image"), ((image, "sky; sky"), "differ"), ((broken,), broken.name)):
        ((message, *_),) = run(*arguments)
        assert 'role="alert"' in message["value"] and word in message["value"]
        assert "gradio" not in message["value"]  # the folder of the uploads


class Attacker:
    """Posts to the queue what no browser would, and reads the answers."""

    def __init__(self, address):
        self.root = address.rstrip("/") + "/gradio_api"
        config = httpx.get(address.rstrip("/") + "/config").json()
        self.function = next(entry["id"] for entry in config["dependencies"] if entry["api_name"] == "run")

    def upload(self, path, name=None):
        with open(path, "rb") as file:
            return httpx.post(self.root + "/upload", files={"files": (name or path.name, file)}, timeout=60)

    def join(self, image, words="road; sky", edge=64, session="attacker"):
        body = {
            "data": [image, words, edge, 0, False, 96, True, 0, "no", 0.5, False, True, None],
            "fn_index": self.function,
            "session_hash": session,
            "trigger_id": None,
        }
        return httpx.post(self.root + "/queue/join", json=body)

    def post(self, image, words="road; sky", edge=64):
        """All that the server answers to a request, as text."""
        session = f"attacker{random.random()}"
        joined = self.join(image, words, edge, session)
        if joined.status_code != 200:
            return joined.text
        lines = []
        with httpx.stream("GET", self.root + "/queue/data", params={"session_hash": session}, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if "process_completed" in line or "close_stream" in line:
                    break
        return "\n".join(lines)


class Listener(http.server.BaseHTTPRequestHandler):
    """A service of the private network that notes who asks it."""

    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def private_service():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    Listener.asked.clear()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/secret.png"
    server.shutdown()


def message(text):
    """The answer without ids, times and the like."""
    return re.findall(r'"(?:value|error|title)": ?(?:"(?:[^"\\\\]|\\\\.)*"|null)', text)


def test_an_attacker_reads_no_file_and_reaches_no_service(address, tmp_path, private_service):
    attacker = Attacker(address)
    secret, outside = tmp_path / "secret.png", Path.home() / f".spar-hf-test-{random.random()}.png"
    Image.new("RGB", (64, 48), "red").save(secret)
    shutil.copy(secret, outside)
    uploaded = attacker.upload(secret, "mine.png").json()[0]
    link = Path(uploaded).with_name("link.png")
    link.symlink_to(secret)
    climbing = str(Path(uploaded).parent / ".." / ".." / ".." / Path(*secret.parts[1:]))
    climbing_far = str(Path(uploaded).parent) + "/.." * 12 + str(secret)
    sources = [str(secret), str(outside), str(link), climbing, climbing_far, f"file://{secret}", private_service]
    sources += [private_service.replace("http", "HTTP"), " " + private_service, "data:image/png;base64,iVBORw0KGgo="]
    sources += ["a\0b", "x" * 5000, "/proc/self/environ", "/dev/zero", str(Path(uploaded).parent), "."]
    missing = "/nonexistent/secret.png"
    try:
        for meta in ({}, {"meta": {"_type": "gradio.FileData"}}):
            forms = [{"path": source} for source in sources]
            forms += [{"path": source, "url": source} for source in (str(secret), private_service)]
            forms += [
                {"url": source} for source in (str(secret), private_service, "data:image/png;base64,iVBORw0KGgo=")
            ]
            for form in forms:
                text = attacker.post({**form, **meta, "is_stream": False})
                assert ".webp" not in text and "vision forward" not in text, (form, text[:2000])
                assert "No such file" not in text and "is a folder" not in text
            # whether a file exists is not told
            answers = [message(attacker.post({"path": path, **meta})) for path in (missing, str(outside))]
            assert answers[0] and answers[0] == answers[1]
        assert Listener.asked == []
        assert "vision forward" in attacker.post({"path": uploaded, "meta": {"_type": "gradio.FileData"}})
        for path in (secret, outside, Path("/etc/passwd")):
            assert httpx.get(f"{attacker.root}/file={path}").status_code in (403, 404)
        direct = httpx.post(
            f"{attacker.root}/run/run", json={"data": [None, "road", 64, 0, False, 96, True, 0, "no", 0.5, False, True]}
        )
        assert direct.status_code != 200  # nothing runs beside the queue
    finally:
        outside.unlink()


def test_uploads_words_and_the_queue_are_limited(address, tmp_path, monkeypatch):
    attacker = Attacker(address)
    small, bomb, large = tmp_path / "small.png", tmp_path / "bomb.png", tmp_path / "large.png"
    Image.new("RGB", (64, 48)).save(small)
    Image.new("1", (13_000, 13_000)).save(bomb)
    Image.new("1", (8000, 8000)).save(large)
    meta = {"meta": {"_type": "gradio.FileData"}}
    for path in (bomb, large):
        assert "million pixels" in attacker.post({"path": attacker.upload(path).json()[0], **meta})
    mine = {"path": attacker.upload(small).json()[0], **meta}
    assert "fewer classes" in attacker.post(mine, "; ".join(f"n{i}" for i in range(1001)))
    assert "fewer classes" in attacker.post(mine, "x" * 20_001)
    assert "token" in attacker.post(mine, "C++; C#")
    assert ".webp" not in attacker.post(mine, edge=10**7)
    assert "does not know" in attacker.post(mine, "道路; sky")
    heavy = tmp_path / "heavy.png"
    with heavy.open("wb") as file:
        file.truncate(web_page.MAX_UPLOAD + 1000)
    assert attacker.upload(heavy).status_code == 413
    started, go_on = threading.Event(), threading.Event()

    def slow(*_):
        started.set()
        go_on.wait(30)
        raise ValueError("slow")

    monkeypatch.setattr(web_segmentation, "read_upload", slow)
    try:
        attacker.join(mine)
        assert started.wait(20)
        codes = [attacker.join(mine).status_code for _ in range(web_page.MAX_WAITING + 4)]
        assert codes.count(200) <= web_page.MAX_WAITING and codes[-1] == 503
    finally:
        go_on.set()


def test_a_sliding_window_that_takes_too_long_is_stopped(monkeypatch):
    report = web_segmentation.limited(lambda *args, **kwargs: None)
    report(1, 100)
    monkeypatch.setattr(web_segmentation.time, "monotonic", lambda: float("inf"))
    with pytest.raises(TimeoutError, match="1 of 100 windows"):
        report(1, 100)


@pytest.fixture
def browser():
    pytest.importorskip("playwright", reason="the browser is driven by playwright (extra dev)")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_tab(browser, address, **options):
    tab = browser.new_page(**options)
    tab.set_default_timeout(90_000)
    tab.goto(address)
    tab.get_by_role("button", name="Segment").wait_for()
    return tab


@pytest.fixture
def tab(address, browser):
    return open_tab(browser, address)


@pytest.fixture
def phone(address, browser):
    return open_tab(browser, address, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)


def shown_picture(tab, change):
    """The picture of one pass after a change of the controls."""
    image = tab.locator("#spar-results .image-frame img").first
    before = image.get_attribute("src")
    change()
    tab.wait_for_function(
        "before => document.querySelector('#spar-results .image-frame img').src != before", arg=before
    )
    return Image.open(io.BytesIO(httpx.get(image.get_attribute("src")).content)).convert("RGB")


def saved_file(tab, name, folder):
    with tab.expect_download() as download:
        tab.get_by_role("button", name=name, exact=True).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def view_and_downloads(tab, image, folder):
    """How the masks are drawn is up to the visitor, and each download is what the command would write."""
    original = Image.open(image).convert("RGB")
    assert not tab.locator("#spar-file").is_visible()
    path = saved_file(tab, "Label PNG", folder)
    labels = Image.open(path)
    classes = ["flower", "grass", "airplane", "background"]
    expected = segment_timed(
        load_pipeline(), original, ["flower, blossom", "grass, leaves", "airplane"], size={"shortest_edge": 336},
        background="auto",
    )  # fmt: skip
    assert labels.mode == "P" and (np.asarray(labels) == expected["map"]).all() and expected["labels"] == classes
    mask = np.asarray(Image.open(saved_file(tab, "Mask of the class", folder)))
    found = np.bincount(expected["map"].ravel(), minlength=4)[:3].argmax()
    assert ((mask == 255) == (expected["map"] == found)).all() and set(np.unique(mask)) == {0, 255}
    content = json.loads(saved_file(tab, "JSON", folder).read_text())
    assert content["labels"] == classes and content["image"] == "flower.jpg" and content["width"] == 640
    assert Image.open(saved_file(tab, "Overlay PNG", folder)).size == (640, 427)
    if importlib.util.find_spec("pycocotools"):
        coco = json.loads(saved_file(tab, "COCO", folder).read_text())
        assert coco["annotations"][0]["area"] == int((expected["map"] == 0).sum())

    # one by one: each change draws the picture anew
    shown_picture(tab, tab.get_by_label("Names in the regions").uncheck)
    shown_picture(tab, tab.get_by_label("Outlines only").check)
    shown_picture(tab, tab.get_by_role("checkbox", name="flower", exact=True).uncheck)
    heat = shown_picture(tab, tab.get_by_label("Heat map of the class").check)
    assert heat.height > 427  # with its scale
    plain = shown_picture(tab, tab.get_by_label("Heat map of the class").uncheck)
    inside = np.asarray(expected["map"] == 0)
    difference = np.abs(np.asarray(plain, int) - np.asarray(original, int)).max(2)
    assert np.median(difference[inside]) < 16  # neither painted nor, but for noise of compression, changed
    picture = tab.locator("#spar-picture-0 img")
    picture.hover()
    tab.locator("#spar-tip").wait_for()
    name, probability = tab.locator("#spar-tip").inner_text().split(", ")
    assert name == classes[expected["map"][427 // 2, 640 // 2]] and 0 < float(probability) <= 1
    picture.click()
    tab.get_by_text("where you clicked").wait_for()
    shown_picture(tab, tab.get_by_role("checkbox", name="flower", exact=True).check)
    shown_picture(tab, tab.get_by_label("Outlines only").uncheck)
    shown_picture(tab, lambda: tab.get_by_label("number input for Opacity").fill("0.1"))


def test_on_a_phone_the_page_fits_and_goes_to_the_result(phone):
    phone.get_by_role("button", name="Segment").click()
    phone.get_by_role("alert").wait_for()
    phone.wait_for_function("document.getElementById('spar-results').getBoundingClientRect().top < 400")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    phone.locator("table tr", has_text="tower; sky; tree").first.click()
    phone.locator(".image-frame img").first.wait_for()
    phone.get_by_label("number input for Working resolution").fill("128")
    phone.evaluate("scrollTo(0, 0)")
    phone.get_by_role("button", name="Segment").click()
    phone.locator(".spar-legend").get_by_text("sky").wait_for()
    phone.wait_for_function("document.getElementById('spar-results').getBoundingClientRect().top < 400")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390


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
    tab.get_by_label("number input for Working resolution").fill("336")
    tab.get_by_role("button", name="Segment").click()
    tab.locator(".spar-legend").wait_for()
    assert tab.get_by_role("alert").count() == 0
    rows = [row.strip() for row in tab.locator(".spar-legend tbody tr td:first-child").all_inner_texts()]
    assert "flower" in rows and set(rows) <= {"airplane", "flower", "grass", "background"}
    assert re.search(r"\d\.\d\d s vision forward", tab.locator("body").inner_text())
    one_pass = tab.locator(".image-frame img").last
    assert one_pass.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [640, 427]

    view_and_downloads(tab, image, tmp_path)

    # with refined edges it is another picture, and the first one comes back at a click
    assert not tab.locator("#spar-history").is_visible()
    before = tab.locator("#spar-results .image-frame img").first.get_attribute("src")
    tab.get_by_label("Refine the edges").click()
    tab.get_by_role("option", name="pamr").click()
    words.fill("flower; grass, leaves")
    refined = shown_picture(tab, tab.get_by_role("button", name="Segment").click)
    tab.locator("#spar-history").wait_for()
    thumbnails = tab.locator("#spar-history button.thumbnail-item")
    assert thumbnails.count() == 2
    earlier = shown_picture(tab, thumbnails.nth(1).click)
    assert earlier.size == refined.size and before
    assert words.input_value() == "flower, blossom; grass, leaves; airplane"
    content = json.loads(saved_file(tab, "JSON", tmp_path).read_text())
    assert "airplane" in content["labels"]  # downloads are those of the result that is shown

    tab.get_by_label("Compare with the sliding window").check()
    tab.get_by_label("number input for Stride of the window").fill("96")
    tab.get_by_role("button", name="Segment").click()
    tab.locator(".spar-legend th", has_text="sliding window").wait_for()
    tab.get_by_text("× one pass").first.wait_for()
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert asked and not elsewhere
