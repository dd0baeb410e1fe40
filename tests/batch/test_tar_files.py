"""WebDataset shards of features and masks: what readers of the format find in them, and what a stopped run leaves."""

import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from spar_hf.batch.extractor import FeatureExtractor
from spar_hf.batch.tar_files import OpenTar, TarFolder
from spar_hf.cli.main import app
from spar_hf.utils.folders import Folder

LABELS = ["--labels", "road;sky", "--background", "none"]


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def images(tmp_path):
    """Six images of two sizes, one in a sub-folder, one with dots in its name, one of them broken."""
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a", "b.v2", "b%2Ev2", "c", "sub/a")):
        Image.fromarray(rng.integers(0, 256, (48 + 16 * (i % 2), 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:300])
    return folder


def samples(folder):
    """All samples by key, put together as WebDataset does: the ending starts at the first dot of a file name."""
    found = {}
    for name in folder.files():
        with tarfile.open(fileobj=io.BytesIO(folder.read(name))) as tar:
            for entry in tar:
                parent, _, last = entry.name.rpartition("/")
                stem, ending = last.split(".", 1)
                sample = found.setdefault(f"{parent}/{stem}".lstrip("/"), {})
                assert ending not in sample
                sample[ending] = tar.extractfile(entry).read()
    return found


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_features_in_shards(base_folder, images, tmp_path, store):
    output = f"{tmp_path}/out.tar" if store == "disk" else "memory://tar-files/out.tar"
    job = ["features", images, "--model", base_folder, "--shortest-edge", 32, "--layers", "1,features"]
    job += ["--dtype", "float16", "--shard-images", 2, "--workers", 0, "--output", output]
    assert "5 done, 1 failed" in run(*job, status=1)
    folder, extract = TarFolder(output), FeatureExtractor(str(base_folder), shortest_edge=32, layers="1,features")
    found = samples(folder)
    assert sorted(found) == ["a", "b%252Ev2", "b%2Ev2", "c", "sub/a"]
    for sample in found.values():
        record = json.loads(sample["json"])
        expected = extract.encode([extract.prepare(record["source"])])[0]
        for ending, key in (("npy", "feature_map"), ("layer_1.npy", "layer_1")):
            array = np.load(io.BytesIO(sample[ending]))
            assert array.dtype == np.float16 and np.allclose(array, expected[key], rtol=2e-3, atol=2e-3)
        assert record["working_size"] == list(extract.prepare(record["source"]).pixel_values.shape[-2:])

    assert "earlier run" in run(*job, status=2)
    assert "5 skipped (already written), 1 failed" in run(*job, "--skip-existing", status=1)
    assert "6 images are whole, 1 of their images could not be processed" in run("verify", output, images)
    data = bytearray(folder.read("part-00001.tar"))
    data[700] ^= 1  # one bit of a value
    folder.write("part-00001.tar", bytes(data))
    folder.delete("part-00002.tar")
    text = run("verify", output, images, "--delete-damaged", status=1)
    assert "2 images are whole, 4 missing, 1 damaged" in text and "part-00001.tar: its checksum" in text
    assert "3 done, 2 skipped (already written), 1 failed" in run(*job, "--shard", "0/1", status=1)
    run("verify", output)
    assert sorted(samples(folder)) == sorted(found)


def test_datasets_reads_features_and_masks(base_folder, images, tmp_path):
    (images / "broken.png").unlink()
    common = [images, "--model", base_folder, "--shortest-edge", 32, "--shard-images", 3, "--workers", 0, "--output"]
    run("features", *common, tmp_path / "features.tar")
    run("segment", *common, tmp_path / "masks.tar", *LABELS)
    run("segment", *common[:5], "--workers", 0, *LABELS, "--format", "map,json", "--output", tmp_path / "masks")

    def load(name):
        files = sorted(map(str, (tmp_path / name).glob("*.tar")))
        assert len(files) == 2
        return datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))

    features = load("features.tar")
    assert sorted(features["__key__"]) == ["a", "b%252Ev2", "b%2Ev2", "c", "sub/a"]
    extract = FeatureExtractor(str(base_folder), shortest_edge=32)
    for row in features:
        expected, _ = extract(row["json"]["source"])
        assert np.allclose(np.array(row["npy"]), expected, rtol=1e-4, atol=1e-5)
    for row in load("masks.tar"):
        stem = row["__key__"].replace("%2E", ".").replace("%25", "%")
        with Image.open(tmp_path / "masks" / f"{stem}.map.png") as expected:
            assert np.array_equal(np.array(row["png"]), np.array(expected))
        alone = json.loads((tmp_path / "masks" / f"{stem}.json").read_text())
        assert [one["label"] for one in row["json"]["segments"]] == [one["label"] for one in alone["segments"]]
    assert (tmp_path / "masks.tar" / "classes.txt").read_text() == (tmp_path / "masks" / "classes.txt").read_text()


def test_a_name_that_is_no_utf_8_stops_no_reader(base_folder, images, tmp_path):
    pytest.importorskip("pycocotools", reason="COCO's masks need pycocotools (extra coco)")
    (images / "broken.png").rename(images / "caf\udce9.png")
    (images / "caf\udce9.png").write_bytes((images / "a.png").read_bytes())
    run("segment", images, "--model", base_folder, "--shortest-edge", 32, "--workers", 0, *LABELS,
        "--format", "json,coco", "--output", tmp_path / "masks.tar")  # fmt: skip
    files = [str(tmp_path / "masks.tar/part-00000.tar")]
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    named = [(row["json"]["image"], row["coco.json"]["images"][0]["file_name"]) for row in rows]
    expected = ["a", "b.v2", "b%2Ev2", "c", "caf\\udce9", "sub/a"]
    assert sorted(named) == sorted((f"{images}/{name}.png",) * 2 for name in expected)


@pytest.mark.parametrize("tile", [(), ("--tile", 64)])
def test_masks_in_a_store_are_continued(base_folder, images, tile):
    output = f"memory://tar-files/masks-{len(tile)}.tar"
    job = ["segment", images, "--model", base_folder, *LABELS, "--shard-images", 2, "--workers", 0, "--output", output]
    job += [*(tile or ("--shortest-edge", 32)), "--format", "map"]
    assert "2 done" in run(*job, "--shard", "2/3")
    assert "4 missing" in run("verify", output, status=1)
    run(*job, "--skip-existing", status=1)
    found = samples(TarFolder(output))
    assert sorted(found) == ["a", "b%252Ev2", "b%2Ev2", "c", "sub/a"]
    assert all(list(sample) == ["png"] for sample in found.values())
    assert "failed: broken" in run("verify", output, images)
    assert "labels" in run(*job[:5], "road;tree", *job[6:], "--skip-existing", status=2)
    assert Folder(output).read("classes.txt").startswith(b"road\nsky\n")


def test_a_killed_run_leaves_no_shard_that_counts(base_folder, images, tmp_path):
    """It was killed between the shard and its record."""
    job = ["features", images, "--model", base_folder, "--shortest-edge", 32, "--workers", 0, "--shard-images", 3]
    job += ["--output", tmp_path / "out.tar"]
    run(*job, status=1)
    (tmp_path / "out.tar" / "part-00001.tar.json").unlink()
    assert "no record" in run("verify", tmp_path / "out.tar", status=1)
    (images / "broken.png").write_bytes((images / "a.png").read_bytes())
    assert "3 done, 3 skipped" in run(*job, "--skip-existing")
    run("verify", tmp_path / "out.tar")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process is forked")
def test_what_a_killed_process_left_half_written_is_removed_and_what_a_living_one_writes_stays(
    base_folder, images, tmp_path
):
    context, output = multiprocessing.get_context("fork"), tmp_path / "out.tar"
    output.mkdir()
    begun, end = context.Event(), context.Event()

    def write(die):
        part = OpenTar(output, dict)
        (output / part.folder.name / "content").touch()
        begun.set()
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        end.wait(60)

    processes = [context.Process(target=write, args=(die,)) for die in (True, False)]
    for process in processes:
        begun.clear()
        process.start()
        assert begun.wait(60)
    processes[0].join()
    left = list(output.glob(".partial-*"))
    assert len(left) == 2
    run("features", images / "a.png", "--model", base_folder, "--shortest-edge", 32, "--output", output)
    (stays,) = output.glob(".partial-*")
    assert (stays / "content").exists() and (output / "part-00000.tar").exists()
    end.set()
    processes[1].join()


def test_a_shard_whose_images_all_failed_is_a_record_alone(base_folder, images, tmp_path):
    job = ["features", images / "broken.png", "--model", base_folder, "--output", tmp_path / "out.tar"]
    run(*job, status=1)
    assert {path.name for path in (tmp_path / "out.tar").iterdir()} == {"_spar-hf.json", "part-00000.tar.json"}
    assert "1 images are whole, 1 of their" in run("verify", tmp_path / "out.tar")
    assert "0 done, 1 failed" in run(*job, "--skip-existing", status=1)


@pytest.mark.parametrize(("suffix", "removed"), [(".tar", "part-00001.tar.json"), (".parquet", "part-00001.parquet")])
def test_a_continued_run_tells_of_images_that_failed_before(
    base_folder, images, tmp_path, monkeypatch, suffix, removed
):
    job = ["features", images, "--model", base_folder, "--shortest-edge", 32, "--workers", 0, "--shard-images", 3]
    job += ["--output", tmp_path / f"out{suffix}", "--skip-existing"]
    assert "5 done, 1 failed" in run(*job, status=1)
    opened = []

    def noted(method):
        return lambda folder, name, *part: opened.append(name) or method(folder, name, *part)

    for method in ("open", "read"):
        monkeypatch.setattr(Folder, method, noted(getattr(Folder, method)))
    again = run(*job, status=1)
    assert "0 done, 5 skipped (already written), 1 failed" in again
    assert opened.count(removed) == 1  # a request in a store
    assert "broken" in again and removed in again
    (images / "broken.png").write_bytes((images / "a.png").read_bytes())
    (tmp_path / f"out{suffix}" / removed).unlink()
    assert "3 done, 3 skipped" in run(*job)


def test_continued_masks_tell_of_images_that_failed_before(base_folder, images, tmp_path):
    job = ["segment", images, "--model", base_folder, *LABELS, "--shortest-edge", 32, "--workers", 0, "--skip-existing"]
    job += ["--output", tmp_path / "out.tar"]
    run(*job, status=1)
    assert "0 done, 5 skipped (already written), 1 failed" in run(*job, status=1)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("features", ["--dtype", "bfloat16"], "float16 or float32"),
        ("features", ["--engine", "ray"], ".parquet"),
        ("segment", [*LABELS, "--heatmap", "road"], "heat maps"),
        ("segment", [*LABELS, "--output", "s3://bucket/masks"], "DIR.tar"),
        ("segment", [*LABELS, "--output", "masks.parquet"], "DIR.tar"),
        ("segment", [*LABELS, "--output", "file.tar"], "is a file"),
        ("features", ["--output", "file.tar"], "is a file"),
        ("features", ["--output", "out", "--shard-images", "5"], "--shard-images is for"),
        ("segment", [*LABELS, "--output", "out", "--shard-images", "5"], "--shard-images is for"),
    ],
)
def test_options_that_do_not_fit_shards(images, tmp_path, monkeypatch, command, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.tar").touch()
    text = run(command, images, "--output", tmp_path / "out.tar", *options, status=2)
    assert message in text and not (tmp_path / "out.tar").exists()


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_images_in_tar_files_are_read_without_unpacking(base_folder, images, tmp_path, store):
    (images / "broken.png").unlink()
    source = str(tmp_path / "shards") if store == "disk" else "memory://tar-files/shards"
    folder = Folder(source)
    if store == "disk":
        (tmp_path / "shards").mkdir()
    for shard, names in (("000", ["a", "sub/a"]), ("001", ["a", "c"])):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in names:
                tar.add(images / f"{name}.png", f"./{name}.png")
                tar.addfile(tarfile.TarInfo(f"{name}.json"))
            tar.addfile(tarfile.TarInfo("._hidden.png"))
        folder.write(f"{shard}.tar", buffer.getvalue())
    job = ["features", "--model", base_folder, "--shortest-edge", 32, "--workers", 0, "--output", tmp_path / "out"]
    assert "4 done" in run(*job, source)
    assert "2 skipped" in run(*job, f"{source}/001.tar", "--skip-existing")
    extract = FeatureExtractor(str(base_folder), shortest_edge=32)
    for result, image in (("000/sub/a", "sub/a"), ("001/c", "c"), ("001/a", "a")):
        found = load_file(tmp_path / "out" / f"{result}.safetensors")["feature_map"]
        torch.testing.assert_close(found, extract(str(images / f"{image}.png"))[0], rtol=1e-4, atol=1e-5)
    if store == "disk":
        assert "4 skipped" in run(*job, f"{source}/0*.tar", "--skip-existing")
    folder.write("001.tar", b"no tar file" * 100)
    assert "no uncompressed tar file" in run(*job, f"{source}/001.tar", status=2)
