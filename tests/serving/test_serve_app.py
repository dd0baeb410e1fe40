"""The deployment of docs/serving on a local Ray: masks, refusals, attacks, load, a killed replica, a graceful end."""

import base64
import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
from doc_pages import blocks, page_text
from launching import ENVIRONMENT, TRAINING
from PIL import Image

from spar_hf.cli.pipelines import load_pipeline

pytest.importorskip("ray", reason="the deployment needs Ray (extra serve)")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WORDS = ["road", "sky"]
LIMITS = {"max_megabytes": 1, "max_megapixels": 4, "max_names": 40, "body_seconds": 6, "max_waiting": 8}


class Server:
    """A running deployment."""

    def __init__(self, process, port, log):
        self.process, self.port, self.log = process, port, log

    def ask(self, body=None, kind="application/json", path="/", headers=(), method=None, timeout=60):
        """Status and body of a request; the body as JSON where it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, body, {"content-type": kind, **dict(headers)})
            response = connection.getresponse()
            text = response.read().decode()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text
        finally:
            connection.close()

    def is_up(self):
        try:
            return self.ask(path="/health", timeout=5) == (200, {"status": "ok"})
        except (OSError, http.client.HTTPException):
            return False


@pytest.fixture(scope="module")
def server(base_folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": base_folder, "port": port, "replicas": 2, "threads": 1, **LIMITS}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    # a token in the home folder is for clusters; and one that runs here already is not joined
    environment = {**ENVIRONMENT, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}
    with log.open("w") as file:
        command = [sys.executable, str(ROOT / "docs" / "serving" / "serve_app.py"), *arguments]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    running, end = Server(process, port, log), time.monotonic() + 240
    try:
        while not running.is_up():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        yield running
    finally:
        below = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for part in below:
            try:
                part.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()


def file_of(image, kind="PNG"):
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def request_of(image, **parameters):
    text = base64.b64encode(image).decode() if isinstance(image, bytes) else image
    return json.dumps({"inputs": text, "parameters": {"candidate_labels": WORDS, **parameters}})


SMALL = file_of(Image.new("RGB", (64, 48), "green"))
BAD = {
    "a path": request_of("/etc/passwd"),
    "a URL": request_of("http://127.0.0.1:9/secret.png"),
    "no JSON": "{",
    "a list": "[]",
    "a text": '"road"',
    "nested": "[" * 100_000,
    "no UTF-8": b"\xff\xfe{}",
    "no image": request_of(b"GIF89a no image"),
    "a cut image": request_of(SMALL[:60]),
    "200 million pixels": request_of(file_of(Image.new("1", (20_000, 10_000)))),
    "5 million pixels": request_of(file_of(Image.new("1", (2500, 2000)))),
    "10,000 words": request_of(SMALL, candidate_labels=[f"word {i}" for i in range(10_000)]),
    "NaN": request_of(SMALL, threshold=float("nan")),
    "a huge number": request_of(SMALL, threshold=0.5).replace("0.5", "1" * 4000),
    "an escape code": request_of(SMALL, candidate_labels=["\x1b[2Jroad", "sky"]),
    "half a character": request_of(SMALL, candidate_labels=["\ud800", "sky"]),
    "words of the same tokens": request_of(SMALL, candidate_labels=["zebra", "okapi"]),
    "unknown output": request_of(SMALL, output="logits"),
    "unknown parameter": request_of(SMALL, tile=64),
}


def test_masks_are_those_of_the_pipeline(server, base_folder, picture):
    expected = load_pipeline(str(base_folder))(picture, candidate_labels=WORDS, output="map")["map"]
    data = file_of(picture)
    in_json = server.ask(request_of(data, output="map"))
    as_file = server.ask(data, "image/png", "/?candidate_labels=road;sky&output=map")
    assert in_json == as_file and in_json[0] == 200
    assert np.array_equal(np.array(Image.open(BytesIO(base64.b64decode(in_json[1]["map"])))), expected)
    repeated = "/?candidate_labels=road&candidate_labels=sky&output=map"
    assert server.ask(data, "image/png", repeated) == as_file
    assert server.ask(data, "image/png", repeated + "&output=coco")[0] == 400
    status, segments = server.ask(request_of(data))
    assert status == 200 and {segment["label"] for segment in segments} <= set(WORDS)


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_bad_requests_get_one_line(server, body):
    status, answer = server.ask(body)
    assert status == 400 and set(answer) == {"error"}, answer
    assert answer["error"].count("\n") == 0 and len(answer["error"]) < 400 and "\x1b" not in answer["error"]


def test_the_guide_names_options_and_clients_that_work(server, picture, tmp_path, monkeypatch):
    written = [block.text.replace(":8000", f":{server.port}") for block in blocks("docs/serving")]
    (start,) = [
        line for text in written for line in text.splitlines() if line.startswith("python docs/serving/serve_app")
    ]
    fields = re.findall(
        r"^    (\w+): .*= option\(", (ROOT / "docs" / "serving" / "serve_app.py").read_text(), re.MULTILINE
    )
    assert set(re.findall(r"--(\w+)", start)) <= set(fields)
    assert set(re.findall(r"`--(\w+)`", page_text("docs/serving"))) <= set(fields)
    monkeypatch.chdir(tmp_path)
    picture.save("street.jpg")
    (program,) = [text for text in written if "import urllib" in text]
    found = {}
    exec(program, found)
    assert {"label", "score", "mask"} == set(found["segments"][0])
    (command,) = [text for text in written if text.startswith("curl")]
    if shutil.which("curl"):
        said = subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
        assert json.loads(said)["labels"] == ["road", "sky"]


def test_other_paths_and_methods_are_refused(server):
    assert server.ask(path="/")[0] == 405 == server.ask(method="DELETE")[0]
    assert server.ask("{}", path="/../etc")[0] == 404
    assert server.ask(b"", "image/png", "/?candidate_labels=road;sky")[0] == 400


def test_large_requests_are_refused_without_being_read(server):
    large = bytes(2**20 + 1)
    assert server.ask(large, "image/png", "/?candidate_labels=road;sky")[0] == 400  # within the limit of base64
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # closed before all was sent
        assert server.ask(bytes(2**21))[0] == 413
    assert server.ask(None, headers={"content-length": str(2**40)}, method="POST")[0] == 413

    def endless():
        for _ in range(10_000):
            yield bytes(2**16)

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    sent = 0
    try:
        connection.putrequest("POST", "/")
        connection.putheader("transfer-encoding", "chunked")
        connection.endheaders()
        for part in endless():
            connection.send(b"%x\r\n%s\r\n" % (len(part), part))
            sent += len(part)
    except OSError:
        assert sent < 2**27  # the server closed the connection
    else:
        pytest.fail("640 MB were taken")
    finally:
        connection.close()
    assert server.is_up()


def test_requests_that_are_cut_or_slow_hold_nothing_up(server):
    start = f"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: {len(SMALL)}\r\n"
    start += "x-request-timeout-seconds: 0\r\nx-request-disconnect-disabled: ?1\r\n\r\n"
    slow = []
    for i in range(24):  # more than may wait
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        connection.sendall(start.encode() + SMALL[:20])
        if i % 2:
            connection.close()
        else:
            slow.append(connection)
    statuses = {connection.recv(4096).split(b" ")[1] for connection in slow}
    assert statuses <= {b"408", b"503"} and b"408" in statuses
    for connection in slow:
        connection.close()
    assert server.is_up() and server.ask(request_of(SMALL))[0] == 200


def test_under_load_the_queue_is_limited_and_a_killed_replica_loses_nothing(server, base_folder, tmp_path):
    report = tmp_path / "load.json"
    options = ["--model", base_folder, "--url", f"http://127.0.0.1:{server.port}", "--process", server.process.pid]
    options += ["--labels", "road; sky", "--rounds", 1, "--requests", 30, "--burst", 64, "--output", report]
    script = [sys.executable, str(TRAINING / "studies" / "serving_load.py"), *map(str, options)]
    process = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:] + server.log.read_text()[-2000:]
    found = json.loads(report.read_text())
    assert found["throughput"]["answers_that_differ"] == 0 < found["throughput"]["ratio"]
    statuses = found["full_queue"]["statuses"]
    assert set(statuses) == {"200", "503"} and sum(statuses.values()) == 64 and found["full_queue"]["up_afterwards"]
    killed = found["killed_replica"]
    assert killed["answered_once"] == killed["requests"] == 30


def test_what_is_accepted_is_answered_before_the_server_ends(server):
    """The last test: it stops the server."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /?candidate_labels=road;sky HTTP/1.1\r\nhost: x\r\ncontent-length: {len(SMALL)}\r\n\r\n"
    connection.sendall(head.encode() + SMALL[:20])
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 30
    while server.is_up() and time.monotonic() < end:
        time.sleep(0.05)
    assert server.ask(path="/health")[0] == 503 == server.ask(request_of(SMALL))[0]
    connection.sendall(SMALL[20:])
    assert b"200 OK" in connection.recv(4096)
    connection.close()
    assert server.process.wait(60) == 0
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive
