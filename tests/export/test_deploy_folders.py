"""Folders that Hugging Face runs: an endpoint's handler, a Space with the page, a static Space."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from huggingface_hub import SpaceCard
from launching import ENVIRONMENT
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from typer.testing import CliRunner

from spar_hf import __version__
from spar_hf.cli.main import app

COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}  # that a Space may have
# loads a handler as Hugging Face's inference toolkit does: by its path, the folder of the model on sys.path
TOOLKIT = """
import importlib.util, json, sys
from io import BytesIO
from PIL import Image
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", f"{folder}/handler.py")
sys.path.insert(0, folder)
module = importlib.util.module_from_spec(spec)
sys.modules["handler.EndpointHandler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)
for line in sys.stdin:
    data = json.loads(line)
    if "decoded" in data:  # the toolkit decodes bodies of image types itself
        data["inputs"] = Image.new("RGB", data.pop("decoded"))
    try:
        answer = handler(data)
    except Exception as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(answer, allow_nan=False))
"""
# ZeroGPU calls a decorated function in another process: what it takes and yields is pickled
SPACES = """
import functools, pickle
def GPU(duration):
    def decorate(function):
        @functools.wraps(function)
        def run(*args):
            for values in function(*pickle.loads(pickle.dumps(args))):
                yield pickle.loads(pickle.dumps(values))
        return run
    return decorate
"""


def command(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


def requirement_in(folder):
    lines = (folder / "requirements.txt").read_text().splitlines()
    (line,) = [line for line in lines if not line.startswith("#")]
    return Requirement(line)


@pytest.fixture
def model(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "tiny")


def test_a_handler_answers_as_the_toolkit_loads_it(model):
    status, said = command("handler", model)
    assert status == 0 and "handler.py" in said
    requirement = requirement_in(model)
    assert requirement.name == "spar-hf" and Version(__version__) in requirement.specifier
    assert Version("0.3") not in requirement.specifier
    file = BytesIO()
    Image.new("RGB", (90, 60), "green").save(file, "PNG")
    image, words = base64.b64encode(file.getvalue()).decode(), {"candidate_labels": ["road", "sky"]}
    requests = [
        {"inputs": image, "parameters": words},
        {"decoded": [90, 60], "parameters": {**words, "output": "map"}},
        {"inputs": "/etc/passwd", "parameters": words},
        {"inputs": image},
        {"inputs": image, "parameters": {"candidate_labels": "road; sky", "threshold": "0.5", "background": "rest"}},
    ]
    lines = "\n".join(map(json.dumps, requests))
    run = [sys.executable, "-c", TOOLKIT, str(model)]
    process = subprocess.run(run, input=lines, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    masks, label_map, path, no_words, query = map(json.loads, process.stdout.splitlines())
    assert {segment["label"] for segment in masks} <= {"road", "sky"}
    for text in [*(segment["mask"] for segment in masks), label_map["map"]]:
        assert Image.open(BytesIO(base64.b64decode(text))).size == (90, 60)
    assert path["kind"] == "UsageError" and "passwd" not in path["error"]
    assert "candidate_labels" in no_words["error"] and isinstance(query, list)


def test_a_handler_replaces_nothing_and_needs_a_text_tower(model, tmp_path, vision_model):
    assert command("handler", model)[0] == 0 == command("handler", model)[0]
    (model / "handler.py").write_text("mine")
    status, said = command("handler", model)
    assert status == 2 and "handler.py has other content" in said and (model / "handler.py").read_text() == "mine"
    vision_model.save_pretrained(tmp_path / "vision")
    status, said = command("handler", tmp_path / "vision")
    assert status == 2 and "without text tower" in said and not (tmp_path / "vision" / "handler.py").exists()
    status, said = command("handler", tmp_path / "nowhere")
    assert status == 2 and "config.json is missing" in said


def check_card(folder):
    """The front matter of a Space: what Hugging Face's configuration reference allows."""
    data = SpaceCard.load(folder / "README.md").data.to_dict()
    assert {data["colorFrom"], data["colorTo"]} <= COLOURS and data["emoji"] and len(data["title"]) <= 60
    assert (folder / data["app_file"]).is_file()
    return data


def test_a_space_of_a_hub_model_names_it(tmp_path):
    assert command("space", "me/spar-siglip2", "--output", tmp_path / "space")[0] == 0
    data = check_card(tmp_path / "space")
    assert data["sdk"] == "gradio" and Version(data["sdk_version"]).major == 6 and data["models"] == ["me/spar-siglip2"]
    assert 'MODEL = "me/spar-siglip2"' in (tmp_path / "space" / "app.py").read_text()
    requirement = requirement_in(tmp_path / "space")
    assert requirement.extras == {"app"} and Version(__version__) in requirement.specifier


def test_a_space_finds_its_model_whatever_its_name(model, tmp_path):
    """Also with letters that JSON writes as two."""
    folder = shutil.copytree(model, tmp_path / 'm😀 "ä\\')
    assert command("space", folder, "--output", tmp_path / "space")[0] == 0
    (line,) = re.findall("^MODEL = (.*)$", (tmp_path / "space" / "app.py").read_text(encoding="utf-8"), re.MULTILINE)
    found = eval(line, {"Path": Path, "__file__": str(tmp_path / "space" / "app.py")})
    assert (Path(found) / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["nowhere", "../up", "a/b/c", "a b/c", 'a/b"; import os', ""])
def test_a_space_of_no_model_is_not_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said = command("space", name, "--output", "space")
    assert status == 2 and said.count("\n") == 1 and not list(tmp_path.glob("space*"))


def test_an_exported_page_becomes_a_static_space(tmp_path):
    web, space = tmp_path / "web", tmp_path / "space"
    (web / "onnx").mkdir(parents=True)
    status, said = command("space", web, "--static", "--output", space)
    assert status == 2 and "--format web" in said and not space.exists()
    (web / "index.html").write_text("<h1>Masks</h1>")
    (web / "onnx" / "vision_model.onnx").write_bytes(b"graph")
    assert command("space", web, "--static", "--output", space)[0] == 0
    data = check_card(space)
    assert data["sdk"] == "static" and data["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    assert (space / "onnx" / "vision_model.onnx").read_bytes() == b"graph"
    status, said = command("space", web, "--static", "--output", space)
    assert status == 2 and "exists" in said
    assert command("space", "--static", "--output", tmp_path / "other")[0] == 2


@pytest.mark.slow
def test_the_page_of_a_space_segments_an_image_also_with_zero_gpu(model, tmp_path):
    client = pytest.importorskip("gradio_client", reason="the page needs Gradio (extra app)")
    space = tmp_path / "space"
    assert command("space", model, "--output", space)[0] == 0
    (space / "spaces.py").write_text(SPACES)
    image = tmp_path / "street.png"
    Image.new("RGB", (64, 48), "green").save(image)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**ENVIRONMENT, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    environment["GRADIO_TEMP_DIR"] = str(tmp_path)
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=log, stderr=log)
        try:
            address, end = f"http://127.0.0.1:{port}/", time.monotonic() + 120
            while True:
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
                try:
                    httpx.get(address + "config")
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            page = client.Client(address, verbose=False)
            values = (client.handle_file(image), "road; sky", 64, 0, True, 32, False, 0)
            job = page.submit(*values, api_name="/run")
            job.result()
            one_pass, both = job.outputs()
            assert Image.open(one_pass[1]).size == (64, 48) and "vision forward" in one_pass[2]
            assert "one pass: share" in one_pass[5] and "sliding window: share" in both[5]
        finally:
            process.terminate()
            process.wait(20)
    assert os.listdir(space / "model") == ["tiny"]
