"""Images and Parquet in an S3 store of this machine, whose connections break in the middle of a file."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("s3fs", reason="pip install --group s3")
moto_server = pytest.importorskip("moto.server", reason="pip install --group s3")

import threading  # noqa: E402
from collections import Counter  # noqa: E402

import s3fs  # noqa: E402
from werkzeug.serving import make_server  # noqa: E402

from spar_hf.batch.extractor import FeatureExtractor  # noqa: E402
from spar_hf.batch.parquet_files import ParquetFolder, open_features  # noqa: E402
from spar_hf.batch.tar_files import TarFolder  # noqa: E402
from spar_hf.cli.main import app  # noqa: E402
from spar_hf.distillation.cache_teacher import main as cache_teacher  # noqa: E402

pytestmark = pytest.mark.slow
COUNT = 9


class Store:
    """An S3 server that cuts answers: `cuts` says how often for a file, -1 always; `asked` counts its requests."""

    def __init__(self):
        self.app = moto_server.DomainDispatcherApplication(moto_server.create_backend_app)
        self.cuts, self.asked = {}, Counter()
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, environ, start_response):
        body = self.app(environ, start_response)
        name = environ["PATH_INFO"].rsplit("/", 1)[-1]
        if environ["REQUEST_METHOD"] != "GET" or name not in self.cuts:
            return body
        self.asked[name] += 1
        return body if self.asked[name] > self.cuts[name] >= 0 else self.half(b"".join(body))

    @staticmethod
    def half(data):
        yield data[: len(data) // 2]
        raise ConnectionError("cut by the test")


@pytest.fixture
def store(monkeypatch):
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    store = Store()
    for name, value in (keys | {"AWS_ENDPOINT_URL": store.url}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield store
    store.server.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("workers", [0, 1])
def test_features_from_a_store_to_a_store_whose_connections_break(store, base_folder, tmp_path, workers):
    files, rng = s3fs.S3FileSystem(), np.random.default_rng(0)
    bucket = f"bucket-{workers}"  # the server forgets nothing
    files.mkdir(bucket)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        files.put_file(str(tmp_path / f"{i}.png"), f"{bucket}/in/{i}.png")
    store.cuts = {"4.png": 2, "7.png": -1}  # 4 is in the middle of a file of Parquet
    source, output = f"s3://{bucket}/in", f"s3://{bucket}/out.parquet"
    command = ["features", source, "--model", str(base_folder), "--shortest-edge", "32", "--output", output]
    result = CliRunner().invoke(app, [*command, "--shard-images", "3", "--workers", str(workers)])
    assert result.exit_code == 1 and f"{COUNT - 1} done, 1 failed" in result.output, result.output
    assert store.asked["4.png"] == 3  # the driver asked again

    folder = ParquetFolder(output)
    assert [folder.check(name)[0] for name in folder.files()] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    result = CliRunner().invoke(app, ["verify", output, source])
    assert result.exit_code == 0 and "failed: 7" in result.output, result.output
    extract = FeatureExtractor(str(base_folder), shortest_edge=32)
    files.get(output, str(tmp_path / "out.parquet"), recursive=True)
    rows = open_features(tmp_path / "out.parquet")
    assert isinstance(rows, datasets.Dataset) and [row["image"] for row in rows if row["error"]] == ["7"]
    for row in rows:
        if not row["error"]:
            (expected,) = extract.encode([extract.prepare(str(tmp_path / f"{row['image']}.png"))])
            torch.testing.assert_close(
                torch.tensor(np.array(row["features"])), expected["feature_map"], rtol=1e-4, atol=1e-5
            )


def test_masks_and_teacher_maps_in_a_store_whose_connections_break(store, base_folder, image_folder):
    files, bucket = s3fs.S3FileSystem(), "bucket-tar"
    files.mkdir(bucket)
    for image in image_folder.iterdir():
        files.put_file(str(image), f"{bucket}/in/{image.name}")
    source = f"s3://{bucket}/in"
    store.cuts = {"2.jpg": 1, "maps-00000.safetensors": 2}
    command = ["segment", source, "--model", str(base_folder), "--labels", "road;sky", "--background", "none"]
    command += [
        "--shortest-edge",
        "32",
        "--shard-images",
        "4",
        "--workers",
        "1",
        "--output",
        f"s3://{bucket}/masks.tar",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "6 done" in result.output, result.output
    folder = TarFolder(f"s3://{bucket}/masks.tar")
    assert [folder.check(name)[0] for name in folder.files()] == [[0, 1, 2, 3], [4, 5]]

    options = ["--model", str(base_folder), "--stride", "32", "--window_size", "64", "--shard_maps", "2"]
    options += ["--images", source, "--output", f"s3://{bucket}/cache"]
    cache = cache_teacher(options)
    maps = [cache.target(i) for i in range(6)]
    assert store.asked["maps-00000.safetensors"] > 2  # the driver asked again
    again = cache_teacher(options)
    assert len(again) == 6 and all(torch.equal(again.target(i), one) for i, one in enumerate(maps))
