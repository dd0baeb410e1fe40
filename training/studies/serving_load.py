"""
Load test of `docs/serving/serve_app.py`: throughput beside a bare loop of pipeline calls in the same run, latencies, and
what clients see when the queue is full, when a replica is killed and when the server is stopped.

    python training/studies/serving_load.py --output serving.json

It starts a server of its own and stops it, or takes one that runs: `--url http://127.0.0.1:8000 --process PID`.
"""

import http.client
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import psutil
import torch
from rich.console import Console
from rich.table import Table

from demo import packaged_images
from spar_hf.cli.pipelines import load_pipeline
from spar_hf.utils.atomic import write_json
from spar_hf.utils.errors import UsageError, as_usage_errors, run_command
from spar_hf.utils.fields import option
from spar_hf.utils.labels import read_labels
from spar_hf.utils.options import parse_dataclasses

SERVER = Path(__file__).parents[2] / "docs" / "serving" / "serve_app.py"
REPLICA = "ray::ServeReplica"  # how Ray names the process
RETRIED = (429, 500, 502, 503)


@dataclass
class Options:
    """Options of the load test."""

    model: str | None = option(None, "Folder of the two-tower model. Default: the embedded spar-tiny.")
    labels: str = option("sky; building; tree; road; person; car; animal; food", "Words, as for `spar-hf segment`.")
    requests: int = option(64, "Requests of each round.")
    concurrency: int = option(8, "Clients that send them.")
    rounds: int = option(3, "Rounds of the bare loop and of the server, in turn; medians are reported.")
    burst: int = option(96, "Clients that ask at once, without a second try, for the full queue.")
    replicas: int = option(2, "Replicas of the server that is started.")
    threads: int = option(1, "Threads of each; the bare loop has as many as all replicas together.")
    max_waiting: int = option(16, "Requests that may wait in that server.")
    url: str | None = option(None, "Address of a server that runs already, started with these replicas and threads.")
    process: int | None = option(None, "Its process; a replica below it is killed. Without it none is.")
    output: str | None = option(None, "JSON file to write.")

    def __post_init__(self):
        if min(self.requests, self.concurrency, self.rounds, self.burst) < 1:
            raise UsageError("--requests, --concurrency, --rounds and --burst are at least 1.")


class Client:
    """Sends images to a server. All images have the same words."""

    def __init__(self, url: str, labels: str, images: list[bytes]):
        parts = urlsplit(url)
        self.host, self.port, self.images = parts.hostname or "127.0.0.1", parts.port or 80, images
        self.path = "/?" + urlencode({"candidate_labels": labels, "output": "map"})

    def send(self, body: bytes | None, path: str, timeout: float = 120) -> tuple[int, bytes]:
        """One request: its status and body; status 0 if the connection breaks."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            headers = {"content-type": "image/jpeg"}
            connection.request("GET" if body is None else "POST", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def ask(self, number: int, retries: int = 0) -> tuple[int, bytes, float, int]:
        """Status, body, seconds and tries of request `number`."""
        start, tries = time.perf_counter(), 0
        while True:
            status, body = self.send(self.images[number % len(self.images)], self.path)
            tries += 1
            if status not in (0, *RETRIED) or tries > retries:
                return status, body, time.perf_counter() - start, tries
            time.sleep(0.2)

    def is_up(self) -> bool:
        return self.send(None, "/health", 5)[0] == 200


def run_all(work: Callable[[int], Any], count: int, concurrency: int) -> dict[int, Any]:
    """Results of `work(0)` to `work(count - 1)` by their number."""
    with ThreadPoolExecutor(concurrency) as pool:
        return dict(zip(range(count), pool.map(work, range(count)), strict=True))


@dataclass
class Spent:
    """Seconds of a block: on the clock, of this process's processors, and of those of the server with all below it."""

    clock: float
    here: float
    server: float


@contextmanager
def spending(process: int | None) -> Iterator[Spent]:
    """Measures a block; its result is there when the block ends."""

    def now() -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), processor_seconds(process)

    start, spent = now(), Spent(0, 0, 0)
    yield spent
    spent.clock, spent.here, spent.server = (after - before for after, before in zip(now(), start, strict=True))


def processor_seconds(process: int | None) -> float:
    """Processor time that a process and all below it have used."""
    if process is None:
        return 0.0
    top, total = psutil.Process(process), 0.0
    for part in [top, *top.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = part.cpu_times()
            total += times.user + times.system
    return total


def measure_throughput(client: Client, options: Options, process: int | None) -> dict[str, Any]:
    """
    Images per second of the bare loop and of the server in turn, their ratio, latencies of the server in milliseconds, and
    answers that differ from the first one to the same image. On a machine that others use too, the ratio of processor times
    says more than that on the clock.
    """
    torch.set_num_threads(options.replicas * options.threads)
    vocabulary = read_labels(options.labels)
    with as_usage_errors():
        pipe = load_pipeline(options.model)
    warm = max(len(client.images), 4 * options.replicas)  # every replica embeds the words
    run_all(client.ask, warm, options.concurrency)
    pipe(client.images[0], candidate_labels=vocabulary, output="map")
    bare: list[Spent] = []
    served: list[Spent] = []
    answers: list[tuple[int, tuple[int, bytes, float, int]]] = []
    for _ in range(options.rounds):
        with spending(process) as spent:
            for number in range(options.requests):
                pipe(client.images[number % len(client.images)], candidate_labels=vocabulary, output="map")
        bare.append(spent)
        with spending(process) as spent:
            answers += run_all(client.ask, options.requests, options.concurrency).items()
        served.append(spent)
    if failed := [answer for _, answer in answers if answer[0] != 200]:
        status, body, *_ = failed[0]
        raise UsageError(f"The server answered {status}: {body[:200]!r}.")
    first: dict[int, bytes] = {}
    differing = sum(first.setdefault(n % len(client.images), answer[1]) != answer[1] for n, answer in answers)
    centiles = statistics.quantiles([1000 * answer[2] for _, answer in answers], n=100, method="inclusive")
    pairs = list(zip(bare, served, strict=True))
    report = {
        "bare_images_per_second": statistics.median(options.requests / spent.clock for spent in bare),
        "served_images_per_second": statistics.median(options.requests / spent.clock for spent in served),
        "ratio": statistics.median(theirs.clock / ours.clock for theirs, ours in pairs),
        "p50_ms": centiles[49],
        "p99_ms": centiles[98],
        "answers_that_differ": differing,
    }
    if process is not None:
        idle = statistics.median(spent.server / spent.clock for spent in bare)
        report["processors_when_idle"] = idle
        report["processor_time_ratio"] = statistics.median(theirs.here / ours.server for theirs, ours in pairs)
        # where others slow the server down, what it takes without requests adds up for longer
        busy = [(theirs.here, ours.server - idle * ours.clock) for theirs, ours in pairs]
        report["processor_time_ratio_without_idle"] = statistics.median(theirs / ours for theirs, ours in busy)
    return report


def fill_queue(client: Client, options: Options) -> dict[str, Any]:
    """How often each status was answered when many ask at once, and whether the server is up afterwards."""
    answers = run_all(client.ask, options.burst, options.burst)
    return {"statuses": count(answers), "up_afterwards": client.is_up()}


def count(answers: dict[int, Any]) -> dict[str, int]:
    return {str(status): number for status, number in sorted(Counter(answer[0] for answer in answers.values()).items())}


def replicas_of(process: int) -> list[psutil.Process]:
    """The replicas that run below a process."""
    below = psutil.Process(process).children(recursive=True)
    return [child for child in below if any(part.startswith(REPLICA) for part in child.cmdline()[:1])]


def kill_replica(client: Client, options: Options, process: int) -> dict[str, Any]:
    """Kill a replica after a third of the requests. Clients repeat what failed: each number must be answered once."""
    done, killed, lock = 0, False, threading.Lock()
    answered: Counter[int] = Counter()

    def ask(number: int) -> tuple[int, bytes, float, int]:
        nonlocal done, killed
        answer = client.ask(number, retries=300)
        with lock:
            done += 1
            answered[number] += answer[0] == 200
            if not killed and done >= options.requests // 3:
                killed = True
                replicas_of(process)[0].kill()
        return answer

    answers = run_all(ask, options.requests, options.concurrency)
    return {
        "answered_once": sum(times == 1 for times in answered.values()),
        "requests": options.requests,
        "repeated": sum(answer[3] - 1 for answer in answers.values()),
        "longest_s": max(answer[2] for answer in answers.values()),
    }


def stop_server(client: Client, options: Options, server: subprocess.Popen) -> dict[str, Any]:
    """SIGTERM while requests are computed: they are answered, new ones are refused, the server ends."""
    with ThreadPoolExecutor(options.concurrency) as pool:
        asked = [pool.submit(client.ask, number) for number in range(options.concurrency)]
        time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        late, _ = client.send(client.images[0], client.path)
        statuses = count(dict(enumerate(future.result() for future in asked)))
    return {"accepted": statuses, "late": late, "exit_status": server.wait(120)}


@contextmanager
def started(options: Options) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server of its own: its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVER), "--port", str(port), "--replicas", str(options.replicas)]
    command += ["--threads", str(options.threads), "--max_waiting", str(options.max_waiting)]
    command += [] if options.model is None else ["--model", options.model]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def wait_until_up(client: Client, server: subprocess.Popen | None, seconds: float = 300) -> float:
    """Seconds until the server answers. Raises UsageError if it ends or does not answer in time."""
    start = time.perf_counter()
    while not client.is_up():
        ended = server is not None and server.poll() is not None
        if ended or time.perf_counter() - start > (seconds if server is not None else 10):
            raise UsageError(
                f"No server answers at {client.host}:{client.port}. Start it by hand to see why: {SERVER}."
            )
        time.sleep(0.2)
    return time.perf_counter() - start


def load_test(options: Options) -> dict[str, Any]:
    """All parts of the load test."""
    images = [Path(image.source).read_bytes() for image in packaged_images()]
    if options.url is not None:
        client = Client(options.url, options.labels, images)
        wait_until_up(client, None)
        return measure_server(client, options, options.process)
    with started(options) as (url, server):
        client = Client(url, options.labels, images)
        report = {"start_s": wait_until_up(client, server), **measure_server(client, options, server.pid)}
        return {**report, "stop": stop_server(client, options, server)}


def measure_server(client: Client, options: Options, process: int | None) -> dict[str, Any]:
    report = {"throughput": measure_throughput(client, options, process), "full_queue": fill_queue(client, options)}
    return report if process is None else {**report, "killed_replica": kill_replica(client, options, process)}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report as a table."""
    table = Table("part", "value", "result")
    for part, values in report.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            table.add_row(part, name, f"{value:.2f}" if isinstance(value, float) else str(value))
    console.print(table)


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run the load test; returns the report."""
    (options,) = parse_dataclasses((Options,), args, description=__doc__)
    report = load_test(options)
    show(report, Console())
    if options.output is not None:
        write_json(Path(options.output), {"options": vars(options), **report})
    return report


if __name__ == "__main__":
    run_command(main)
