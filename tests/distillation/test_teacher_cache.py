"""The teacher's maps on disk: equal to the teacher's, made once, and refused where they are not what is asked for."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import locked_elsewhere, reset_accelerate, signal_all
from PIL import Image

from spar_hf import SlidingWindowTeacher, SparImageProcessorPil, SparVisionModel
from spar_hf.data.order import Sample
from spar_hf.data.training_images import TrainingImages
from spar_hf.distillation.cache_teacher import CacheOptions, ShardMaker, main, make_cache
from spar_hf.distillation.teacher_cache import TeacherCache
from spar_hf.model.fingerprints import vision_fingerprint
from spar_hf.utils.errors import NotFinite, UsageError

SCRIPT = Path(__file__).parents[2] / "training" / "cache_teacher.py"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((150 + 11 * i, 110), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


@pytest.fixture
def base(tmp_path, vision_model):
    vision_model.save_pretrained(tmp_path / "base")
    SparImageProcessorPil(image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def cache_model(base):
    return SparVisionModel.from_pretrained(base)


@pytest.fixture
def options(base, pictures, tmp_path):
    return CacheOptions.from_flat(
        model=str(base),
        images=[str(pictures)],
        output=str(tmp_path / "cache"),
        views=2,
        stride=32,
        shard_maps=3,
        holdout_every=4,
    )


def changed(options, **values):
    return CacheOptions.from_flat(**(options.flat | values))


def test_several_fixed_views_of_an_image_are_refused():
    """They would all be the same."""
    for fixed in ({"fixed_views": True}, {"preset": "spar"}):
        with pytest.raises(UsageError, match=r"--views .*the same"):
            CacheOptions.from_flat(model="m", images=["x"], output="o", views=2, **fixed)
    assert CacheOptions.from_flat(model="m", images=["x"], output="o", preset="spar").views.fixed_views


def test_views_of_several_images_are_refused():
    with pytest.raises(UsageError, match="--cutmix_probability"):
        CacheOptions.from_flat(model="m", images=["x"], output="o", cutmix_probability=0.5)
    with pytest.raises(UsageError, match="--jitter_student_only"):
        CacheOptions.from_flat(model="m", images=["x"], output="o", jitter_probability=0.5, jitter_student_only=True)


def test_views_are_those_that_distillation_draws(options, pictures):
    """The first epoch of a training on the same images with the same seed, if it took them in the order of the cache."""
    options = changed(options, jitter_probability=0.5)
    cache = make_cache(options)
    drawn = TrainingImages([], cache.image_processor, cache.setting["window_size"], 16, options.views)
    jittered = [entry["crop"]["jitter"] is not None for shard in cache.shards for entry in shard["maps"]]
    assert set(jittered) == {True, False}
    for i in range(len(cache)):
        expected = drawn[Sample(i, cache.image(i).name, str(cache.image(i)), [])].pixel_values
        assert torch.equal(cache.pixel_values(i), expected)


def test_maps_are_the_teachers_and_half_the_size(options, vision_model, caplog):
    caplog.set_level("INFO")
    cache = make_cache(options)
    assert "times smaller than float32" in caplog.text
    # three of four images are not held out, twice; the views of one image differ
    assert len(cache) == 6 and [cache.image(i).stem for i in range(6)] == ["0", "1", "2"] * 2
    teacher = SlidingWindowTeacher(vision_model, stride=32)
    for i in range(6):
        pixel_values, target = cache[i]
        assert pixel_values.shape[:2] == (1, 3) and target.dtype == torch.float32
        expected = teacher(pixel_values).feature_map
        torch.testing.assert_close(target, expected, atol=2**-8 * float(expected.abs().max()), rtol=0)
        # normalised with the base's own statistics
        assert float(pixel_values.min()) >= -0.4 / 0.3 - 1e-4 and float(pixel_values.max()) <= 0.6 / 0.3 + 1e-4
    assert cache[0][0].shape != cache[3][0].shape or not torch.equal(cache[0][0], cache[3][0])
    stored = sum((Path(options.storage.output) / shard["file"]).stat().st_size for shard in cache.shards)
    assert stored < 0.55 * 4 * sum(cache.target(i).numel() for i in range(6))


def test_views_have_the_pixels_that_the_teacher_saw(options, base, vision_model):
    """As the folder says, whatever it says; else the student learns from other images than the teacher read."""
    SparImageProcessorPil(do_normalize=False, image_mean=0.4, max_tokens=30, patch_size=16).save_pretrained(base)
    cache = make_cache(options)
    teacher = SlidingWindowTeacher(vision_model, stride=32)
    for i in range(len(cache)):
        pixel_values, target = cache[i]
        assert 0 <= float(pixel_values.min()) < float(pixel_values.max()) <= 1
        expected = teacher(pixel_values).feature_map
        torch.testing.assert_close(target, expected, atol=2**-8 * float(expected.abs().max()), rtol=0)
    SparImageProcessorPil().save_pretrained(base)
    with pytest.raises(UsageError, match="do_normalize is False there and True here"):
        make_cache(options)


def test_going_on_makes_only_what_is_missing_or_damaged(options, base):
    cache = make_cache(options)
    targets = [cache.target(i) for i in range(6)]
    shards = sorted(Path(options.storage.output).glob("*.safetensors"))
    assert len(shards) == 2
    damaged = bytearray(shards[1].read_bytes())
    damaged[-1] ^= 1
    shards[1].write_bytes(damaged)
    before = [shard.stat().st_mtime_ns for shard in shards]

    model = cache_model(base)
    opened = TeacherCache.open(options.storage.output, model=model)
    opened.target(0)
    with pytest.raises(ValueError, match=r"00001.safetensors is damaged.*cache_teacher.py again"):
        opened.target(3)
    cache = make_cache(options)
    after = [shard.stat().st_mtime_ns for shard in shards]
    assert before[0] == after[0] and before[1] != after[1]
    assert all(torch.equal(cache.target(i), target) for i, target in enumerate(targets))
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match="is gone"):
        TeacherCache.open(options.storage.output, model=model).target(0)


@pytest.mark.parametrize("left", [b"", b"{}", b"\0" * 40], ids=["empty", "no keys", "zeros"])
def test_a_shard_whose_record_is_damaged_is_made_anew(options, base, left):
    cache = make_cache(options)
    targets = [cache.target(i) for i in range(6)]
    record = Path(options.storage.output) / "maps-00001.safetensors.json"
    record.write_bytes(left)
    with pytest.MonkeyPatch.context() as patch:  # a run that is killed leaves the cache as finished as it was
        patch.setattr(ShardMaker, "make", lambda maker, number: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_cache(options)
    assert len(TeacherCache.open(options.storage.output, model=cache_model(base))) == 6
    cache = make_cache(options)
    assert json.loads(record.read_text())["file"] == "maps-00001.safetensors"
    assert all(torch.equal(cache.target(i), target) for i, target in enumerate(targets))


def test_a_damaged_manifest_is_one_line(options, base):
    """The remedy that it names works: no shard is made again."""
    made = make_cache(options).shards
    manifest = Path(options.storage.output) / "manifest.json"
    manifest.write_bytes(b"")
    for use in (lambda: make_cache(options), lambda: TeacherCache.open(manifest.parent, model=cache_model(base))):
        with pytest.raises(UsageError, match=r"manifest.json is damaged. Delete it"):
            use()
    manifest.unlink()
    stamps = [path.stat().st_mtime_ns for path in manifest.parent.glob("maps*")]
    assert make_cache(options).shards == made
    assert [path.stat().st_mtime_ns for path in manifest.parent.glob("maps*")] == stamps


def test_another_setting_is_refused(options, base, pictures):
    make_cache(options)
    model = cache_model(base)
    with pytest.raises(ValueError, match=r"stride is 32 there and 24 here.*another folder"):
        TeacherCache.open(options.storage.output, model=model, stride=24)
    with pytest.raises(ValueError, match="window_size is 64 there and 48 here"):
        TeacherCache.open(options.storage.output, model=model, window_size=48)
    assert len(TeacherCache.open(options.storage.output, model=model, window_size=64, stride=32)) == 6
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        make_cache(changed(options, seed=1))
    with pytest.raises(ValueError, match="teacher_dtype is None there and 'bf16' here"):
        make_cache(changed(options, teacher_dtype="bf16"))
    same = vision_fingerprint(model)
    model.config.backbone_config.num_attention_heads *= 2  # leaves no trace in the weights
    assert vision_fingerprint(model) != same
    model.config.backbone_config.num_attention_heads //= 2
    model.config.position_extent = 128
    assert vision_fingerprint(model) != same
    model.config.position_extent = None
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert vision_fingerprint(model) != same
    with pytest.raises(ValueError, match="made with another setting: model"):
        TeacherCache.open(options.storage.output, model=model)


def test_a_teacher_in_half_precision_makes_a_cache_for_the_same_model(options, base):
    """It has the fingerprint of the model's own weights; a cache of an earlier version names no precision."""
    full = make_cache(options)
    found = make_cache(changed(options, teacher_dtype="bf16", output=f"{options.storage.output}-bf16"))
    assert found.setting["teacher_dtype"] == "bf16" and found.setting["model"] == vision_fingerprint(cache_model(base))
    for i in range(len(full)):
        error = (found.target(i) - full.target(i)).norm() / full.target(i).norm()
        assert 0 < float(error) < 0.03
    manifest = Path(options.storage.output) / "manifest.json"
    earlier = json.loads(manifest.read_text())
    del earlier["setting"]["teacher_dtype"]
    manifest.write_text(json.dumps(earlier))
    assert len(make_cache(options)) == len(full)
    with pytest.raises(ValueError, match="teacher_dtype is None there"):
        make_cache(changed(options, teacher_dtype="bf16"))


def test_fingerprint__is_the_same_however_a_model_was_loaded(base, tmp_path):
    model = cache_model(base)
    model.save_pretrained(tmp_path / "copy")
    copies = [SparVisionModel.from_pretrained(tmp_path / "copy"), SparVisionModel.from_backbone(str(base))]
    assert {vision_fingerprint(copy) for copy in copies} == {vision_fingerprint(model)}


def test_a_changed_image_is_refused_and_an_unreadable_one_skipped(options, base, pictures, caplog):
    (pictures / "1.jpg").write_bytes(b"no image")
    cache = make_cache(options)
    assert len(cache) == 4 and "1.jpg" in caplog.text
    Image.new("RGB", (150, 110)).save(pictures / "0.jpg")
    with pytest.raises(ValueError, match=r"0.jpg is not the image"):
        cache[0]
    (pictures / "2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2.jpg, which is gone"):
        cache[1]


def test_a_cache_is_read_through_a_link_to_its_folder(options, tmp_path):
    (tmp_path / "far" / "away" / "disk").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away" / "disk")
    cache = make_cache(changed(options, output=str(tmp_path / "link")))
    assert cache.image(0).is_file() and cache.pixel_values(0).shape[1] == 3


def test_images_that_a_distillation_skips_are_in_no_cache(options, pictures, caplog):
    Image.new("RGB", (8, 8)).save(pictures / "icon.png")
    cache = make_cache(changed(options, min_side=16))
    assert "icon.png" not in {cache.image(i).name for i in range(len(cache))} and "--min_side is 16" in caplog.text
    with pytest.raises(UsageError, match="min_side is 16 there and 4 here"):
        make_cache(changed(options, min_side=4))


def test_no_cache_and_an_unfinished_one_are_refused(options, base, tmp_path):
    model = cache_model(base)
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        TeacherCache.open(tmp_path / "nothing", model=model)
    make_cache(options)
    manifest = Path(options.storage.output) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"complete": False, "shards": []}))
    with pytest.raises(ValueError, match="not finished"):
        TeacherCache.open(options.storage.output, model=model)


@pytest.mark.slow
def test_killed_processes_go_on_where_they_stopped(base, pictures, tmp_path):
    """Two processes are killed once a shard is there; one process finishes, and computes nothing twice."""
    output = tmp_path / "cache"
    script = [
        str(SCRIPT),
        "--model",
        base,
        "--images",
        pictures,
        "--output",
        output,
        "--stride",
        "8",
        "--shard_maps",
        "1",
    ]
    script += ["--views", "4", "--holdout_every", "5"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--multi_gpu", "--main_process_port", "0", "--num_processes", "2", *script]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(list(map(str, launch)), env=environment, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not list(output.glob("*.safetensors.json")):
        time.sleep(0.01)
    assert run.poll() is None, run.stderr.read()[-3000:]
    signal_all(run, signal.SIGKILL)
    run.wait()
    made = {path: path.stat().st_mtime_ns for path in output.glob("*.safetensors.json")}
    assert 0 < len(made) < 16, "the run was over before it could be killed"
    (output / "maps-00015.safetensors.1.partial").write_bytes(b"half")  # as a killed process may leave one
    options = CacheOptions.from_flat(
        model=str(base), images=[str(pictures)], output=str(output), views=4, holdout_every=5, stride=8, shard_maps=1
    )
    cache = make_cache(options)
    assert len(cache) == 16
    assert all(path.stat().st_mtime_ns == moment for path, moment in made.items())
    assert not list(output.glob("*.partial*"))


def test_help_is_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "--crop_probability" in capsys.readouterr().out


def test_a_signal_ends_the_work_after_a_shard_and_the_same_command_goes_on(options, monkeypatch):
    make, calls = ShardMaker.make, []

    def interrupted(maker, number):
        calls.append(number)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return make(maker, number)

    options.storage.shard_maps = 1
    monkeypatch.setattr(ShardMaker, "make", interrupted)
    with pytest.raises(SystemExit) as end:
        make_cache(options)
    assert end.value.code == 128 + signal.SIGTERM and calls == [0]
    reset_accelerate()
    cache = make_cache(options)
    assert calls == list(range(len(cache)))  # the first shard was kept


def test_maps_that_are_not_finite_are_not_stored(options, monkeypatch):
    monkeypatch.setattr(
        SlidingWindowTeacher,
        "forward",
        lambda teacher, pixels: SimpleNamespace(feature_map=torch.full((1, 4, 2, 2), float("nan"))),
    )
    with pytest.raises(NotFinite, match="--mixed_precision"):
        make_cache(options)
    assert not list(Path(options.storage.output).glob("maps*"))


def test_an_image_too_large_for_the_stride_is_a_usage_error(options, monkeypatch):
    monkeypatch.setattr("spar_hf.teacher.MAP_BYTES", 10**4)
    with pytest.raises(UsageError, match="Use a stride"):
        make_cache(changed(options, stride=7))


def test_a_second_maker_beside_a_living_one_is_refused(options):
    with locked_elsewhere(options.storage.output), pytest.raises(UsageError, match="being written"):
        make_cache(options)
