"""Arrays of jobs: shards that no two jobs share, jobs that can be repeated, and what is missing or damaged at the end."""

import json
import os

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel
from typer.testing import CliRunner

from spar_hf.batch.extractor import FeatureExtractor
from spar_hf.batch.parquet_files import ParquetFolder, open_features
from spar_hf.cli.main import app
from spar_hf.distillation.cache_teacher import main as cache_teacher
from spar_hf.distillation.teacher_cache import TeacherCache
from spar_hf.utils.errors import UsageError
from spar_hf.utils.remote_files import open_store
from spar_hf.utils.shards import ShardChoice


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def images(tmp_path):
    """Nine images of two sizes, one in a sub-folder, one of them broken."""
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a", "b", "c", "d", "e", "f", "g", "sub/h")):
        Image.fromarray(rng.integers(0, 256, (48 + 16 * (i % 2), 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:300])
    return folder


@pytest.mark.parametrize(
    ("shard", "shard_range"), [("2/2", None), ("x", None), ("1/0", None), (None, "3:3"), (None, "3"), ("0/2", "0:1")]
)
def test_malformed_shards_are_refused(shard, shard_range):
    with pytest.raises(UsageError, match="--shard"):
        ShardChoice(shard, shard_range)


def test_jobs_of_an_array_have_every_shard_once():
    shards = list(range(23))
    jobs = [ShardChoice(f"{i}/5") for i in range(5)]
    assert sorted(part for job in jobs for part in job.pick(shards)) == shards
    ranges = [ShardChoice(None, text) for text in ("0:10", "10:20", "20:30")]
    assert [part for job in ranges for part in job.pick(shards)] == shards
    assert len({job.name for job in (*jobs, *ranges, ShardChoice())}) == 9


@pytest.mark.parametrize("command", [["features"], ["segment", "--labels", "road; sky"]])
def test_a_job_without_an_image_says_so(images, tmp_path, command):
    assert "0 done" in run(*command, images / "a.png", "--shard", "1/2", "--output", tmp_path / "out")


@pytest.mark.parametrize("shards", [(), ("--shard-size", "0.02")])
def test_features_by_jobs_are_those_of_one_run(base_folder, images, tmp_path, shards):
    options = [images, "--model", base_folder, "--shortest-edge", 32, *shards]
    run("features", *options, "--output", tmp_path / "whole", status=1)
    output = tmp_path / "out"
    job = ["features", *options, "--output", output]
    assert "3 done" in run(*job, "--shard", "0/3")
    assert "3 done" in run(*job, "--shard", "1/3")
    assert "3 missing" in run("verify", output, images, status=1)
    assert "2 done, 1 failed" in run(*job, "--shard", "2/3", status=1)
    assert "3 skipped" in run(*job, "--shard", "1/3")  # a repeated job changes nothing
    text = run("verify", output, images, "--finish", status=1)
    assert "8 images are whole, 1 missing" in text and "missing: broken" in text
    (images / "broken.png").unlink()
    assert "8 images are whole" in run("verify", output, images, "--finish")
    index = "features.safetensors.index.json"
    found, expected = ({}, {}) if shards else (None, None)
    for folder, tensors in ((output, found), (tmp_path / "whole", expected)):
        if shards:
            for name, file in json.loads((folder / index).read_text())["weight_map"].items():
                tensors[name] = load_file(folder / file)[name]
    if shards:
        assert sorted(found) == sorted(expected)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in found)
    file = next(output.rglob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 20)
    assert f"damaged: {file.name}" in run("verify", output, images, "--delete-damaged", status=1)
    assert " done" in run(*job, "--skip-existing")
    run("verify", output, images)


def test_masks_by_jobs(base_folder, images, tmp_path):
    (images / "broken.png").unlink()
    output = tmp_path / "out"
    job = ["segment", images, "--labels", "road;sky", "--model", base_folder, "--shortest-edge", 32, "--output", output]
    job += ["--format", "map,coco"]
    assert "4 done" in run(*job, "--shard-range", "0:4")
    assert "4 missing" in run("verify", output, images, status=1)
    assert "4 done" in run(*job, "--shard-range", "4:100")
    assert "4 skipped" in run(*job, "--shard-range", "4:100")
    assert "8 skipped" in run(*job, "--skip-existing")  # of all jobs
    (output / "annotations.json").unlink()
    assert "of 8 images" in run("verify", output, images, "--finish")
    assert len(json.loads((output / "annotations.json").read_text())["images"]) == 8
    os.truncate(output / "c.map.png", 60)
    (output / "d.coco.json").unlink()
    text = run("verify", output, images, "--delete-damaged", status=1)
    assert "damaged: c.map.png" in text and "missing: d.coco.json" in text
    assert "2 done, 6 skipped" in run(*job, "--skip-existing")


def test_a_teacher_cache_by_jobs(base_folder, image_folder, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "cache"
    options = ["--model", str(base_folder), "--images", str(image_folder), "--stride", "32", "--window_size", "64"]
    options += ["--views", "2", "--shard_maps", "2", "--holdout_every", "3"]
    expected = cache_teacher([*options, "--output", str(whole)])
    assert cache_teacher([*options, "--output", str(output), "--shard", "1/2"]) is None
    text = run("verify", output, "--finish", status=1)
    assert "2 shards are whole, 2 missing" in text and "maps-00000.safetensors" in text
    found = cache_teacher([*options, "--output", str(output), "--shard_range", "0:4"])  # also those of another job
    assert len(found) == len(expected) == 8
    assert all(torch.equal(found.target(i), expected.target(i)) for i in range(len(found)))
    shard, manifest = output / "maps-00002.safetensors", output / "manifest.json"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert "damaged: maps-00002" in run("verify", output, "--delete-damaged", status=1)
    assert cache_teacher([*options, "--output", str(output), "--shard", "0/2"]) is not None
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))  # the last job was killed
    assert "complete" in run("verify", output, "--finish")
    TeacherCache.open(output, model=AutoModel.from_pretrained(base_folder))


def test_other_readers_open_the_folder_also_one_begun_under_the_old_name(base_folder, images, tmp_path):
    output = tmp_path / "out.parquet"
    job = ["features", images / "a.png", "--model", base_folder, "--shortest-edge", 32, "--output", output]
    run(*job)
    assert pq.read_table(output)["image"].to_pylist() == ["a"]
    (manifest,) = output.glob("*.json")
    manifest.rename(output / "spar-hf.json")
    run("verify", output)
    assert "earlier run" in run(*job, status=2)
    assert "1 skipped" in run(*job, "--skip-existing")
    assert pq.read_table(output)["image"].to_pylist() == ["a"]


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_parquet_of_jobs_is_one_data_set(base_folder, images, tmp_path, store):
    source, output = images, f"{tmp_path}/out.parquet"
    if store == "memory":
        source, output = "memory://shards/in", "memory://shards/out.parquet"
        files, root = open_store(source)
        for file in images.rglob("*.png"):
            files.makedirs(os.path.dirname(f"{root}/{file.relative_to(images)}"), exist_ok=True)
            files.pipe_file(f"{root}/{file.relative_to(images)}", file.read_bytes())
    job = [
        "features",
        source,
        "--model",
        base_folder,
        "--shortest-edge",
        32,
        "--shard-images",
        2,
        "--layers",
        "1,features",
    ]
    job += ["--output", output]
    run(*job, "--shard", "0/2")
    assert "4 missing" in run("verify", output, source, status=1)
    run(*job, "--shard", "1/2", status=1)
    assert "earlier run" in run(*job, status=2)
    assert "dtype float32, now float16" in run(*job, "--shard", "1/2", "--dtype", "float16", status=2)
    text = run("verify", output, source, "--finish")
    assert "9 images are whole, 1 of their images could not be processed" in text and "failed: broken" in text
    folder = ParquetFolder(output)
    assert [sorted(folder.check(name)[0]) for name in folder.files()] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    with folder.store.open(f"{folder.root}/part-00003.parquet", "rb") as file:
        data = bytearray(file.read())
    data[len(data) // 3] ^= 0xFF  # one bit error, found by the checksum of its page
    folder.store.pipe_file(f"{folder.root}/part-00003.parquet", bytes(data))
    assert "damaged: part-00003" in run("verify", output, "--delete-damaged", status=1)
    assert "2 done, 6 skipped (already written), 1 failed" in run(*job, "--skip-existing", status=1)
    run("verify", output)
    if store == "memory":
        return
    rows = open_features(output)
    extract = FeatureExtractor(str(base_folder), shortest_edge=32, layers="1,features")
    for row in rows:
        assert bool(row["error"]) == (row["image"] == "broken")
        if not row["error"]:
            maps = extract.encode([extract.prepare(row["source"])])[0]
            for column, key in (("features", "feature_map"), ("layer_1", "layer_1")):
                assert np.allclose(np.array(row[column]), maps[key], rtol=1e-4, atol=1e-5)
    whole = pq.read_table(output)  # other readers open the folder
    assert sorted(whole["id"].to_pylist()) == list(range(9))
    plain = datasets.load_dataset("parquet", data_files=f"{output}/*.parquet", split="train")
    assert sorted(plain["id"]) == list(range(9))
    assert pq.read_schema(f"{output}/part-00000.parquet") == pq.read_schema(f"{output}/part-00004.parquet")


def test_a_folder_of_ray_is_not_continued_by_this_engine(base_folder, images, tmp_path):
    """Files of Ray hold any of the images, so all that this engine looks for would be made again."""
    output = tmp_path / "out.parquet"
    job = ["features", images / "a.png", images / "b.png", "--model", base_folder, "--shortest-edge", 32]
    job += ["--shard-images", 1, "--output", output]
    run(*job)
    assert "2 skipped" in run(*job, "--skip-existing")
    (output / "part-00001.parquet").rename(output / "7_000000_000000.parquet")
    assert "continue with --engine ray" in " ".join(run(*job, "--skip-existing", status=2).split())
    assert sorted(row["id"] for row in open_features(output)) == [0, 1]
