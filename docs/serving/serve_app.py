"""
SPAR over HTTP with Ray Serve: `python serve_app.py --model DIR`. docs/serving.md describes requests and limits.

Ray's proxy imports this file for `gate`, so torch and what needs it are imported inside functions.
"""

import asyncio
import json
import logging
import os
import signal
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from spar_hf.utils.errors import UsageError, exit_with
from spar_hf.utils.fields import option

# how the proxy, another process, learns the limit on a request, and the file whose presence means that the server stops
LIMIT_VARIABLE, STOP_VARIABLE = "SPAR_MAX_BODY_BYTES", "SPAR_STOP_FILE"
# headers with which a client would change the timeouts of Ray's proxy
CLIENT_TIMEOUTS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
logger = logging.getLogger("ray.serve")


@dataclass
class Settings:
    """Options of the server; all replicas are on this machine."""

    model: str | None = option(None, "Folder or hub id of a two-tower model. Default: the embedded spar-tiny.")
    host: str = option("127.0.0.1", "Address to serve; 0.0.0.0 serves the whole network.")
    port: int = option(8000, "Port to serve.")
    replicas: int = option(1, "Processes with a model each.")
    threads: int | None = option(None, "Threads of each replica. Default: the processors, divided by the replicas.")
    gpus: float = option(0.0, "GPUs of each replica, perhaps a part of one.")
    batch_size: int = option(1, "Images that a replica segments together. Batches gain on GPUs, not on CPUs.")
    max_waiting: int = option(32, "Requests that may wait for a replica; further ones are answered with 503.")
    max_megabytes: float = option(16, "Size of an image file.")
    max_megapixels: float = option(25, "Pixels of an image.")
    max_names: int = option(256, "Names of classes in a request.")
    body_seconds: float = option(20, "Time for a client to send its request.")
    request_seconds: float = option(120, "Time for the whole request, waiting included.")
    drain_seconds: float = option(60, "After SIGTERM: time for the requests that have been accepted.")

    def __post_init__(self) -> None:
        if min(self.replicas, self.batch_size, self.max_waiting, 1 if self.threads is None else self.threads) < 1:
            raise UsageError("--replicas, --threads, --batch_size and --max_waiting are at least 1.")
        if self.model is not None and Path(self.model).exists():
            from spar_hf.export.deployment import check_two_towers

            check_two_towers(Path(self.model))
            self.model = str(Path(self.model).resolve())


def refusal(status: int, message: str, **more: Any) -> JSONResponse:
    """An error in one line. Where the request may not have been read to its end, the connection is closed."""
    headers = {"connection": "close"} if status in (408, 413, 503) else {}
    return JSONResponse({"error": message, **more}, status, headers | ({"retry-after": "1"} if status == 503 else {}))


class Gate:
    """
    Middleware of Ray's proxy, which would otherwise store requests of any length until a replica takes them, and drop those
    that still wait when the server stops. It refuses large requests, and all new ones once the server is stopping; and it
    removes headers that change the proxy's timeouts.
    """

    def __init__(self, app: Any, max_bytes: int, stop_file: str):
        self.app, self.max_bytes, self.stop_file, self.ongoing = app, max_bytes, stop_file, 0

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in CLIENT_TIMEOUTS]}
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if os.path.exists(self.stop_file):
            response = refusal(503, "The server is stopping. Send the request again.", ongoing=self.ongoing)
            await response(scope, receive, send)
        elif not length.isdigit() or int(length) > self.max_bytes:
            await self.too_large(scope, receive, send)
        else:
            self.ongoing += 1
            try:
                await self.counted(scope, receive, send)
            finally:
                self.ongoing -= 1

    async def too_large(self, scope: dict, receive: Any, send: Any) -> None:
        response = refusal(413, f"The request has more than {self.max_bytes:,} bytes. Reduce the image.")
        await response(scope, receive, send)

    async def counted(self, scope: dict, receive: Any, send: Any) -> None:
        """Pass a request on; one that does not say its length is cut off where it is too long."""
        received, answered = 0, False

        async def receive_counted() -> dict:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= self.max_bytes else {"type": "http.disconnect"}

        async def send_noted(message: dict) -> None:
            nonlocal answered
            answered = True
            await send(message)

        await self.app(scope, receive_counted, send_noted)
        if received > self.max_bytes and not answered:
            await self.too_large(scope, receive, send)


def gate() -> list[Middleware]:
    """What Ray's proxy calls when it starts: its middlewares."""
    limits = {"max_bytes": int(os.environ[LIMIT_VARIABLE]), "stop_file": os.environ[STOP_VARIABLE]}
    return [Middleware(Gate, **limits)]


class Segmenter:
    """A replica: it loads the model once, decodes uploads in threads, and segments one batch at a time."""

    def __init__(self, model: str | None, threads: int, batch_size: int, body_seconds: float, limits: dict[str, int]):
        import torch

        from spar_hf.cli.client_requests import Limits, SegmentationServer

        torch.set_num_threads(threads)
        self.body_seconds = body_seconds
        self.server = SegmentationServer(model, limits=Limits(**limits))
        self.worker = ThreadPoolExecutor(1)
        self.segment.set_max_batch_size(batch_size)

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/health":
            return JSONResponse({"status": "ok"})
        if request.url.path != "/" or request.method != "POST":
            return refusal(405 if request.url.path == "/" else 404, "POST an image to / or GET /health.")
        try:
            async with asyncio.timeout(self.body_seconds):
                body = await request.body()
        except TimeoutError:
            return refusal(408, f"The request did not arrive within {self.body_seconds:g} seconds.")
        except ClientDisconnect:
            return refusal(400, "The request is incomplete.")
        return await self.answer(body, request)

    async def answer(self, body: bytes, request: Request) -> Response:
        """The masks as JSON, or an error in one line."""
        from spar_hf.cli.client_requests import FAILED

        try:
            checked = await asyncio.to_thread(self.read, body, request)
            result = await self.segment(checked)
            if isinstance(result, Exception):
                raise result
            return await asyncio.to_thread(self.encode, result, checked)
        except UsageError as error:
            return refusal(400, str(error))
        except Exception:
            logger.exception("A request failed.")
            return refusal(500, FAILED)

    def read(self, body: bytes, request: Request) -> Any:
        """The checked request of a JSON object, or of an image with its parameters in the query."""
        from spar_hf.cli.client_requests import query_parameters

        if not request.headers.get("content-type", "").startswith("application/json"):
            return self.server.read(body, query_parameters(request.query_params.multi_items()))
        try:
            data = json.loads(body)
            return self.server.read(data["inputs"], data.get("parameters"))
        except UsageError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UsageError('The request must be a JSON object {"inputs": image, "parameters": {…}}.') from None

    def encode(self, result: Any, checked: Any) -> Response:
        from spar_hf.cli.client_requests import as_json

        return JSONResponse(as_json(result, checked))

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0)
    async def segment(self, requests: list) -> list:
        """Requests that wait while a batch is computed are the next batch; images of one size and words share a pass."""
        return await asyncio.get_running_loop().run_in_executor(self.worker, self.server.segment, requests)


def build(settings: Settings) -> Any:
    """The application for `serve.run`, once Ray has started."""
    threads = settings.threads or max(1, int(ray.cluster_resources()["CPU"]) // settings.replicas)
    limits = {
        "max_bytes": int(settings.max_megabytes * 2**20),
        "max_pixels": int(settings.max_megapixels * 1e6),
        "max_names": settings.max_names,
    }
    deployment = serve.deployment(
        name="segmenter",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": 0, "num_gpus": settings.gpus},  # the threads are stated; Ray need not count them
        max_ongoing_requests=2 * settings.batch_size + 2,  # one batch in the model, one being decoded
        max_queued_requests=settings.max_waiting,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        max_constructor_retry_count=2,
    )(Segmenter)
    return deployment.bind(settings.model, threads, settings.batch_size, settings.body_seconds, limits)


def start_ray(settings: Settings, stop_file: Path) -> None:
    """Start a Ray of this machine alone, without its dashboard, and the proxy with the limit on uploads."""
    here = str(Path(__file__).resolve().parent)
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{Path(__file__).stem}:gate",
        LIMIT_VARIABLE: str(int(settings.max_megabytes * 2**20 * 4 / 3) + 2**16),  # base64 in JSON
        STOP_VARIABLE: str(stop_file),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    ray.init(include_dashboard=False, object_store_memory=256 * 2**20)
    http = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=settings.request_seconds)
    serve.start(http_options=http)


def drain(settings: Settings, stop_file: Path) -> None:
    """Refuse new requests and wait until the proxy has answered all others."""
    stop_file.touch()
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    end = time.monotonic() + settings.drain_seconds
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://{host}:{settings.port}/health", timeout=5)
        except urllib.error.HTTPError as error:
            if json.load(error).get("ongoing") == 0:
                return
        except OSError:  # the proxy is too busy to answer
            continue
        time.sleep(0.2)


def main(args: list[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; then answer what has been accepted, and stop."""
    from spar_hf.utils.options import parse_dataclasses

    (settings,) = parse_dataclasses((Settings,), args, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        stop_file = Path(folder) / "stop"
        start_ray(settings, stop_file)
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())  # after `ray.init`, which takes SIGTERM for itself
        try:
            serve.run(build(settings))
        except RuntimeError as error:
            exit_with(1, f"The replicas do not start, the lines above say why. {error}")
        stopped.wait()
        drain(settings, stop_file)
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    from spar_hf.utils.errors import run_command

    run_command(main)
