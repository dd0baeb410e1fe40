"""What servers take from clients: uploads and words within limits; anything else is refused in one line."""

import base64
import json
import math
import threading
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from spar_hf.cli.client_requests import FAILED, Limits, SegmentationServer, as_json, query_parameters, read_request
from spar_hf.utils.errors import UsageError

WORDS = ["road", "sky", "tree, grass"]


def file_of(image, kind="PNG"):
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def text_of(data):
    return base64.b64encode(data).decode()


SMALL = file_of(Image.new("RGB", (64, 48), "green"))


@pytest.fixture(scope="module")
def server(base_folder):
    return SegmentationServer(str(base_folder), limits=Limits(max_bytes=2**20, max_pixels=10**6, max_names=40))


def nested(depth):
    value = "road"
    for _ in range(depth):
        value = [value]
    return value


IMAGES = {
    "a path": "/etc/passwd",
    "a path that is base64": "/var/lib/dpkg/status0000",
    "a URL": "http://127.0.0.1:9/secret.png",
    "a data URL": "data:image/png;base64," + text_of(SMALL),
    "nothing": None,
    "an empty file": b"",
    "empty text": "",
    "text": b"GIF89a no image at all",
    "a cut file": SMALL[:40],
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "a list": [text_of(SMALL)],
    "an object": {"path": "/etc/passwd"},
    "a number": 7,
}
PARAMETERS = {
    "no words": {},
    "unknown": {"candidate_labels": WORDS, "urls": True},
    "an option of the pipeline": {"candidate_labels": WORDS, "tile": 64},
    "words of a wrong type": {"candidate_labels": 7},
    "numbers as words": {"candidate_labels": [1, 2]},
    "no words in the list": {"candidate_labels": []},
    "nested": {"candidate_labels": nested(900)},
    "too many words": {"candidate_labels": [f"word {i}" for i in range(10_000)]},
    "too many of one class": {"candidate_labels": [", ".join(f"n{i}" for i in range(41)), "sky"]},
    "too long a word": {"candidate_labels": ["x" * 100_000, "sky"]},
    "too many in the background": {"candidate_labels": WORDS, "background": [f"word {i}" for i in range(39)]},
    "an escape code": {"candidate_labels": ["\x1b[31mroad", "sky"]},
    "turned writing": {"candidate_labels": ["road\u202e", "sky"]},
    "half a character": {"candidate_labels": ["\ud800", "sky"]},
    "the same word twice": {"candidate_labels": ["sky", "Sky"]},
    "NaN": {"candidate_labels": WORDS, "threshold": float("nan")},
    "infinity": {"candidate_labels": WORDS, "threshold": math.inf},
    "a huge number": {"candidate_labels": WORDS, "threshold": 10**400},
    "below 0": {"candidate_labels": WORDS, "threshold": "-0.1"},
    "no number": {"candidate_labels": WORDS, "threshold": "high"},
    "a list as number": {"candidate_labels": WORDS, "threshold": [0.5]},
    "true": {"candidate_labels": WORDS, "threshold": True},
    "unknown output": {"candidate_labels": WORDS, "output": "logits"},
    "no output": {"candidate_labels": WORDS, "output": ["map"]},
    "background of a wrong type": {"candidate_labels": WORDS, "background": {"a": 1}},
    "a list": ["road"],
    "a text": "road",
}


def refused(call, *args):
    with pytest.raises(UsageError) as error:
        call(*args)
    message = str(error.value)
    assert message and "\n" not in message and "\x1b" not in message and len(message) < 500, message
    message.encode()
    return message


@pytest.mark.parametrize("inputs", IMAGES.values(), ids=IMAGES)
def test_only_uploaded_images_are_read(inputs):
    message = refused(read_request, inputs, {"candidate_labels": WORDS})
    assert "passwd" not in message and "dpkg" not in message


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_wrong_parameters_are_refused_before_the_image_is_decoded(parameters, monkeypatch):
    monkeypatch.setattr("spar_hf.cli.client_requests.decode_upload", None)
    refused(read_request, SMALL, parameters, Limits(max_names=40))


def test_repeated_words_of_a_query_are_all_classes():
    pairs = [("candidate_labels", "road, street"), ("candidate_labels", "sky; tree"), ("threshold", "0.5")]
    request = read_request(SMALL, query_parameters(pairs))
    assert request.vocabulary.names == (("road", "street"), ("sky",), ("tree",))
    assert request.options == (("threshold", 0.5),)
    assert "'threshold' is given more than once" in refused(query_parameters, [*pairs, ("threshold", "0.1")])


@pytest.mark.parametrize("threshold", ["0", 0, "0.0"])
def test_a_threshold_of_zero_makes_no_room_for_a_background_without_words(threshold):
    asked = {"candidate_labels": WORDS, "background": "other", "threshold": threshold}
    assert "No pixel gets the background 'other'" in refused(read_request, SMALL, asked)
    assert read_request(SMALL, {**asked, "threshold": "0.2"}).options == (("background", "other"), ("threshold", 0.2))


def test_a_wrong_number_is_shown_as_it_was_sent():
    sent = [("0,5", '"0,5"'), (True, "true"), ([0.5], "an array"), (10**5000, "a huge number"), (2, "2")]
    for threshold, shown in sent:
        message = refused(read_request, SMALL, {"candidate_labels": WORDS, "threshold": threshold})
        assert message == f"`threshold` must be a share from 0 to 1, got {shown}."


def test_files_of_too_many_bytes_or_pixels_are_refused_undecoded(monkeypatch):
    bomb = file_of(Image.new("1", (20_000, 10_000)))  # 200 million pixels in a few kB
    large = file_of(Image.new("1", (8000, 8000)))
    monkeypatch.setattr("spar_hf.cli.web_inputs.turn_upright", None)  # which decodes
    for data in (bomb, large):
        assert "million pixels" in refused(read_request, text_of(data), {"candidate_labels": WORDS})
    limits = Limits(max_bytes=1000)
    for data in (bytes(1001), text_of(bytes(1001)), "A" * 10**6):
        assert "MB" in refused(read_request, data, {"candidate_labels": WORDS}, limits)
    decoded = Image.new("RGB", (1000, 1001))
    assert "million pixels" in refused(read_request, decoded, {"candidate_labels": WORDS}, Limits(max_pixels=10**6))


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("x"), AttributeError("y")])
def test_a_decoder_that_breaks_is_no_failure_of_the_server(error, monkeypatch):
    def broken(*args):
        raise error

    monkeypatch.setattr("spar_hf.cli.client_requests.decode_upload", broken)
    assert "damaged" in refused(read_request, SMALL, {"candidate_labels": WORDS})


def test_an_answer_is_what_the_pipeline_finds(server, picture):
    data = file_of(picture)
    expected = server.pipe(picture, candidate_labels=WORDS)
    found = server.answer({"inputs": text_of(data), "parameters": {"candidate_labels": WORDS}})
    json.dumps(found, allow_nan=False)
    assert [segment["label"] for segment in found] == [segment["label"] for segment in expected]
    for segment, wanted in zip(found, expected, strict=True):
        mask = Image.open(BytesIO(base64.b64decode(segment["mask"])))
        assert mask.mode == "L" and np.array_equal(np.asarray(mask), np.asarray(wanted["mask"]))
        assert segment["score"] == pytest.approx(wanted["score"], abs=1e-6)


def test_a_class_map_and_run_lengths_hold_the_same_masks(server, picture):
    coco = pytest.importorskip("pycocotools.mask", reason="run lengths are pycocotools' (extra coco)")
    label_map = server.pipe(picture, candidate_labels=WORDS, output="map")["map"]
    asked = {"inputs": picture, "parameters": {"candidate_labels": WORDS, "output": "map"}}
    found = server.answer(asked)
    assert found["labels"] == ["road", "sky", "tree"] and found["background"] == -1
    assert np.array_equal(np.array(Image.open(BytesIO(base64.b64decode(found["map"])))), label_map)
    asked["parameters"]["output"] = "coco"
    for segment in server.answer(asked):
        mask = label_map == found["labels"].index(segment["label"])
        assert np.array_equal(coco.decode(segment["segmentation"]).astype(bool), mask)
        assert segment["area"] == mask.sum() and len(segment["bbox"]) == 4


def test_the_background_is_listed_only_if_it_was_asked_for(server, picture):
    for labels, listed in ((["road", "sky"], False), (["road", "sky", "rest"], True)):
        parameters = {"candidate_labels": labels, "background": "rest", "threshold": 0.99}
        found = {segment["label"] for segment in server.answer({"inputs": picture, "parameters": parameters})}
        assert ("rest" in found) is listed


def test_a_batch_of_unequal_requests_gives_what_each_gives_alone(server, picture):
    other = picture.resize((70, 120))
    asked = [(picture, "road; sky"), (other, "road; sky"), (picture, "dog; cat"), (picture, "road; sky")]
    requests = [server.read(image, {"candidate_labels": words, "output": "map"}) for image, words in asked]
    together = server.segment(requests)
    for request, result in zip(requests, together, strict=True):
        assert np.array_equal(result["map"], server.segment([request])[0]["map"])


def test_words_that_only_the_model_can_refuse_leave_the_others_of_the_batch_alone(server, picture):
    asked = [{"candidate_labels": ["road", "sky"]}, {"candidate_labels": ["zebra", "okapi"]}]  # the same unknown token
    good, bad = server.segment([server.read(picture, parameters) for parameters in asked])
    assert isinstance(bad, UsageError) and "token" in str(bad) and good["labels"] == ["road", "sky"]


def test_an_image_that_only_the_model_can_refuse_leaves_the_others_of_the_batch_alone(server, picture):
    images = [picture, Image.new("RGB", (1, 1)), picture]
    first, bad, last = server.segment([server.read(image, {"candidate_labels": WORDS}) for image in images])
    assert isinstance(bad, UsageError) and "1 × 1" in str(bad)
    expected = server.pipe(picture, candidate_labels=WORDS, output="map")["map"]
    assert np.array_equal(first["map"], expected) and np.array_equal(last["map"], expected)


def test_an_opened_image_is_read_as_its_file_is():
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    Image.effect_noise((64, 48), 80).convert("RGB").save(file, "PNG", exif=exif)
    found = [read_request(data, {"candidate_labels": WORDS}).image for data in (file.getvalue(), Image.open(file))]
    assert found[0].size == found[1].size == (48, 64) and found[0].tobytes() == found[1].tobytes()
    cut = Image.open(BytesIO(file.getvalue()[:300]))
    assert "damaged" in refused(read_request, cut, {"candidate_labels": WORDS})


def test_a_failure_of_the_server_tells_the_client_nothing(server, picture, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise OSError("/secret/path is full")

    monkeypatch.setattr(server, "pipe", broken)
    with pytest.raises(RuntimeError) as error:
        server.answer({"inputs": picture, "parameters": {"candidate_labels": WORDS}})
    assert str(error.value) == FAILED and "/secret" in caplog.text


@pytest.mark.parametrize("data", [None, [], "x", {}, {"parameters": {}}])
def test_requests_without_inputs_are_refused(server, data):
    refused(server.answer, data)


def test_threads_get_their_own_answers(server, picture):
    images = [picture.rotate(90 * i, expand=True) for i in range(4)]
    parameters = {"candidate_labels": WORDS, "output": "map"}
    expected = [server.answer({"inputs": image, "parameters": parameters})["map"] for image in images]
    found = {}

    def ask(i):
        found[i] = server.answer({"inputs": images[i % 4], "parameters": parameters})["map"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(8)] == [expected[i % 4] for i in range(8)]


def test_masks_of_more_than_a_gibibyte_are_refused(server, picture, monkeypatch):
    request = server.read(picture, {"candidate_labels": WORDS})
    (result,) = server.segment([request])
    monkeypatch.setattr("spar_hf.model.results.OUTPUT_BYTES", 10_000)
    assert "map" in refused(as_json, result, request)
