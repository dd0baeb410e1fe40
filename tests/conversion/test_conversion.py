"""Converted checkpoints give the features of the published code, or nothing is written."""

import datetime
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from launching import HIDE
from official_checkpoints import (
    LENGTH,
    MAKERS,
    VOCAB,
    make_dinov3txt,
    make_siglip2,
    word_tokenizer,
    write_official,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    DINOv3ViTModel,
)
from typer.testing import CliRunner

from spar_hf import SlidingWindowTeacher, SparForOpenVocabSegmentation, SparProcessor, SparVisionModel
from spar_hf.cli.convert import Family
from spar_hf.cli.main import app
from spar_hf.conversion import convert
from spar_hf.conversion.checkpoint_tensors import read_tensors
from spar_hf.utils.errors import UsageError

converter = sys.modules["spar_hf.conversion.convert"]  # the package has a function of that name
SIZES = [(32, 32), (48, 24), (24, 64), (64, 48), (16, 64)]  # native, others, and as many patches in another shape


@pytest.fixture(scope="module", params=list(MAKERS))
def converted(request, tmp_path_factory):
    """Family, tensors of the checkpoint, reference model, folder with `base` and `out`, options, report."""
    folder = tmp_path_factory.mktemp(request.param)
    family, state, plain, options = write_official(folder, request.param)
    report = convert(folder / "official.ckpt", family, str(folder / "base"), folder / "out", **options)
    return family, state, plain, folder, options, report


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_features_equal_those_of_the_published_code(converted, size):
    family, _state, plain, folder, *_ = converted
    if size == (16, 64) and family == "openclip":
        pytest.skip("the published code takes the square table for any shape with as many patches, a known defect")
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    model = AutoModel.from_pretrained(folder / "out")
    torch.testing.assert_close(model(pixels).feature_map, plain.features(pixels), atol=5e-5, rtol=0)


@torch.no_grad()
def test_text_embeddings_equal_those_of_the_published_code(converted):
    _, state, plain, folder, *_ = converted
    ids = torch.randint(2, VOCAB - 1, (5, LENGTH), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(5), torch.tensor([3, 5, 7, 9, 11])] = VOCAB - 1
    model = SparForOpenVocabSegmentation.from_pretrained(folder / "out")
    torch.testing.assert_close(model.get_text_features(ids).pooler_output, plain.texts(ids), atol=5e-5, rtol=0)
    torch.testing.assert_close(model.logit_scale.detach(), state["logit_scale"].reshape(1))


@torch.no_grad()
def test_the_image_embedding_equals_that_of_the_published_code(converted):
    _, _, plain, folder, *_ = converted
    if not hasattr(plain, "pooled"):
        pytest.skip("SigLIP's pooling head is transformers' own")
    pixels = torch.randn(2, 3, 32, 32)
    pooled = AutoModel.from_pretrained(folder / "out")(pixels, output_pooled=True).pooler_output
    torch.testing.assert_close(pooled, plain.pooled(pixels), atol=5e-5, rtol=0)


@pytest.mark.parametrize("stride", [8, 16, 4, 12, 20])
@torch.no_grad()
def test_the_teacher_averages_the_published_features_of_its_windows(converted, stride):
    """With patches of 8 px these strides correspond to 16, 32, 8, 24 and 40 with patches of 16 px."""
    _, _, plain, folder, *_ = converted
    pixels = torch.randn(1, 3, 56, 48, generator=torch.Generator().manual_seed(3))
    found = SlidingWindowTeacher(AutoModel.from_pretrained(folder / "out"), 32, stride)(pixels).feature_map
    fine = 8 // math.gcd(stride, 8)  # sub-cells per patch
    total = count = None
    for top in sorted({*range(0, 56 - 32, stride), 56 - 32}):
        for left in sorted({*range(0, 48 - 32, stride), 48 - 32}):
            window = plain.features(pixels[:, :, top : top + 32, left : left + 32])
            if fine > 1:
                window = torch.nn.functional.interpolate(window, scale_factor=fine, mode="bilinear")
            if total is None:
                total = torch.zeros(1, window.shape[1], 7 * fine, 6 * fine)
                count = torch.zeros(7 * fine, 6 * fine)
            row, column, cells = top * fine // 8, left * fine // 8, 4 * fine
            total[:, :, row : row + cells, column : column + cells] += window
            count[row : row + cells, column : column + cells] += 1
    expected = total / count
    if fine > 1:
        expected = torch.nn.functional.interpolate(expected, size=(7, 6), mode="bilinear")
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_report_accounts_for_every_tensor(converted):
    family, state, _, _, _, report = converted
    assert report.used + len(report.skipped) == len(state)
    assert all("bias_mask" in name for name in report.skipped)
    checks = {"features 32×32", "features 48×24", "features 24×64", "texts"}
    assert set(report.differences) == checks | ({"pooled image"} if family == "dinov3txt" else set())
    assert max(report.differences.values()) < 1e-4
    assert str(report.output) in str(report)


def test_processor_keeps_statistics_and_text_preprocessing(converted):
    family, _, _, folder, *_ = converted
    processor = SparProcessor.from_pretrained(folder / "out")
    mean = {"siglip2": 0.5, "openclip": 0.4, "dinov3txt": 0.45}[family]
    assert list(processor.image_processor.image_mean) == [mean] * 3
    assert list(processor.image_processor.image_std) == [0.25] * 3
    ids = AutoTokenizer.from_pretrained(folder / "out")(["An image, road."], padding="max_length")["input_ids"][0]
    assert len(ids) == LENGTH
    if family == "siglip2":  # lower case, no punctuation, padded on the right
        assert ids == word_tokenizer()("an image road")["input_ids"] + [0] * (LENGTH - 4)


def test_rope_periods_survive_half_precision(tmp_path, converted):
    family, state, _plain, folder, *_ = converted
    if family != "dinov3txt":
        pytest.skip("no RoPE")
    model = AutoModel.from_pretrained(folder / "out")
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=weights)
    periods = 1 / AutoModel.from_pretrained(tmp_path).backbone.rope_embeddings.inv_freq
    torch.testing.assert_close(periods, state["visual_model.backbone.rope_embed.periods"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_plain_state_dicts(tmp_path, suffix):
    state, _, _ = make_siglip2(tmp_path / "base")
    path = tmp_path / f"plain{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    report = convert(path, "siglip2", str(tmp_path / "base"), tmp_path / "out", vision_act="gelu")
    assert report.used == len(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("visual.trunk.blocks.1.mlp.fc2.bias"),
            r"missing in the checkpoint: visual.trunk.blocks.1.mlp.fc2",
        ),
        (lambda s: s.update(extra=torch.zeros(3)), "not in the model: extra"),
        (lambda s: s.update({"logit_scale": torch.zeros(2)}), "wrong shape: logit_scale is"),
        (
            lambda s: s.update({"text.ln_final.weight": torch.ones(31)}),
            r"wrong shape: text_model.final_layer_norm.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_stop_the_conversion(tmp_path, change, message):
    state, _, _ = make_siglip2(tmp_path / "base")
    change(state)
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "broken.pt", "siglip2", str(tmp_path / "base"), tmp_path / "out", vision_act="gelu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "broken.pt"]


class Code:
    def __reduce__(self):
        return (os.system, ("touch was_run",))


def test_code_in_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, _, _ = make_siglip2(tmp_path / "base")
    torch.save({"state_dict": state, "hyper_parameters": Code()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="never run"):
        convert(tmp_path / "evil.ckpt", "siglip2", str(tmp_path / "base"), tmp_path / "out")
    with (tmp_path / "bare.pt").open("wb") as file:
        pickle.dump({"code": Code()}, file, protocol=4)
    with pytest.raises(ValueError, match="never run"):
        read_tensors(tmp_path / "bare.pt")
    assert not (tmp_path / "was_run").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photo.jpg", "is not a checkpoint"),
        ("text.pt", "is not a checkpoint"),
        ("empty.pt", "is empty"),
        ("empty.safetensors", "is empty"),
        ("cut.safetensors", "is not a complete safetensors file"),
        ("zip.safetensors", "is not a complete safetensors file"),
        ("cut.pt", "is damaged or truncated"),
        ("cut_old.ckpt", "is damaged or truncated"),
        ("objects.pt", r"contains Python objects \(datetime.timedelta\)"),
        ("list.pt", "contains a list"),
        ("none.pt", "is not a file"),
    ],
)
def test_files_that_are_no_checkpoint_give_one_line_and_no_advice_to_run_code(tmp_path, recwarn, name, message):
    weights = {"weight": torch.zeros(1000)}
    save_file(weights, tmp_path / "whole.safetensors")
    torch.save(weights, tmp_path / "whole.pt")
    torch.save(weights, tmp_path / "whole_old.ckpt", _use_new_zipfile_serialization=False)
    for whole in ("whole.safetensors", "whole.pt", "whole_old.ckpt"):
        content = (tmp_path / whole).read_bytes()
        (tmp_path / whole.replace("whole", "cut")).write_bytes(content[: len(content) // 2])
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.jpg")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "empty.safetensors").touch()
    torch.save(weights, tmp_path / "zip.safetensors")
    torch.save({"state_dict": weights, "time": datetime.timedelta(1)}, tmp_path / "objects.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    command = [
        "convert",
        str(tmp_path / name),
        "--family",
        "siglip2",
        "--base",
        "base",
        "--output",
        str(tmp_path / "o"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    assert "weights_only" not in result.output and not recwarn.list
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / name)


def test_command_line_refuses_to_overwrite(tmp_path):
    state, _, _ = make_siglip2(tmp_path / "base")
    save_file(state, tmp_path / "plain.safetensors")
    command = ["convert", str(tmp_path / "plain.safetensors"), "--family", "siglip2", "--base", str(tmp_path / "base")]
    command += ["--output", str(tmp_path / "out"), "--vision-act", "gelu"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "largest difference, texts" in first.output and "0 skipped" in first.output
    assert {family.value for family in Family} == set(converter.FAMILIES)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "--overwrite" in again.output
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0  # its name in version 0.1
    kept = str(shutil.copy(tmp_path / "plain.safetensors", tmp_path / "out" / "plain.safetensors"))
    lost = CliRunner().invoke(app, ["convert", kept, *command[2:], "--overwrite"])
    assert lost.exit_code == 2 and "is read" in lost.output and Path(kept).is_file()


def test_wrong_base_is_refused(tmp_path):
    state, _, _ = make_siglip2(tmp_path / "base")
    torch.save(state, tmp_path / "plain.pt")
    make_dinov3txt(tmp_path / "dino")
    with pytest.raises(ValueError, match="must be one of siglip"):
        convert(tmp_path / "plain.pt", "siglip2", str(tmp_path / "dino"), tmp_path / "out")


def test_head_and_text_tower_of_dinotxt_take_the_backbone_of_the_base(tmp_path):
    state, _, options = make_dinov3txt(tmp_path / "base")
    head = {name: value for name, value in state.items() if not name.startswith("visual_model.backbone.")}
    torch.save(head, tmp_path / "head.pth")
    report = convert(tmp_path / "head.pth", "dinov3txt", str(tmp_path / "base"), tmp_path / "out", **options)
    assert "backbone weights from" in str(report)
    pixels = torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        tokens = DINOv3ViTModel.from_pretrained(tmp_path / "base").eval()(pixels).last_hidden_state[:, 5:]
        found = SparVisionModel.from_pretrained(tmp_path / "out")(pixels).feature_map
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, atol=5e-5, rtol=0)


def test_features_survive_a_fresh_process(converted, tmp_path):
    _, _, plain, folder, *_ = converted
    pixels = torch.randn(1, 3, 40, 24)
    save_file({"pixels": pixels}, tmp_path / "in.safetensors")
    code = (
        "import sys, torch, spar_hf; from transformers import AutoModel\n"
        "from safetensors.torch import load_file, save_file\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): out = model(load_file(sys.argv[2])['pixels']).feature_map.contiguous()\n"
        "save_file({'out': out}, sys.argv[3])"
    )
    arguments = [str(folder / "out"), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out.safetensors")["out"]
    torch.testing.assert_close(found, plain.features(pixels), atol=5e-5, rtol=0)


def test_settings_that_the_tensors_do_not_determine_are_required(tmp_path):
    state, _, _ = make_siglip2(tmp_path / "base")
    torch.save(state, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="--vision-act"):
        convert(tmp_path / "plain.pt", "siglip2", str(tmp_path / "base"), tmp_path / "out")
    make_dinov3txt(tmp_path / "dino")
    with pytest.raises(ValueError, match="--text-heads"):
        convert(tmp_path / "plain.pt", "dinov3txt", str(tmp_path / "dino"), tmp_path / "out", tokenizer="x")


def test_force_deletes_no_other_folder(tmp_path):
    state, _, _ = make_siglip2(tmp_path / "base")
    torch.save(state, tmp_path / "plain.pt")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    for config in (None, "[]", "{"):
        if config is not None:
            (tmp_path / "precious" / "config.json").write_text(config)
        with pytest.raises(FileExistsError, match="not a SPAR folder"):
            convert(tmp_path / "plain.pt", "siglip2", str(tmp_path / "base"), tmp_path / "precious", force=True)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_a_folder_written_by_the_console_script_loads_without_the_library(tmp_path):
    """The folder of `spar-hf convert` in a process where the package cannot be imported."""
    state, _, _ = make_siglip2(tmp_path / "base")
    save_file(state, tmp_path / "plain.safetensors")
    command = [str(Path(sys.executable).parent / "spar-hf"), "convert", str(tmp_path / "plain.safetensors")]
    command += ["--family", "siglip2", "--base", str(tmp_path / "base"), "--output", str(tmp_path / "out")]
    subprocess.run([*command, "--vision-act", "gelu"], check=True)
    code = HIDE + (
        "from transformers import AutoModel, AutoProcessor\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(processor).__name__, type(AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [sys.executable, "-c", code, str(tmp_path / "out")]
    said = subprocess.run(arguments, check=True, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
    assert said.split() == ["SparProcessor", "SparVisionModel"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tensors_that_are_not_finite_are_refused_by_name(tmp_path, value):
    state, _, options = make_siglip2(tmp_path / "base")
    name = next(name for name in state if name.endswith("attn.qkv.weight"))
    state[name].view(-1)[7] = value
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=re.escape(name)):
        convert(tmp_path / "x.pt", "siglip2", str(tmp_path / "base"), tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "x.pt"]


def test_a_difference_that_is_no_number_is_no_agreement(tmp_path, monkeypatch):
    state, _, options = make_siglip2(tmp_path / "base")
    torch.save(state, tmp_path / "x.pt")
    monkeypatch.setattr(converter, "compare", lambda *args: {"features": 1e-9, "texts": math.nan})
    with pytest.raises(RuntimeError, match="texts"):
        convert(tmp_path / "x.pt", "siglip2", str(tmp_path / "base"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_of_two_conversions_to_one_folder_the_second_is_refused(tmp_path, monkeypatch):
    state, _, options = make_siglip2(tmp_path / "base")
    torch.save(state, tmp_path / "x.pt")
    compare, refused = converter.compare, []

    def second(*args):
        def run():
            try:
                convert(tmp_path / "x.pt", "siglip2", str(tmp_path / "base"), tmp_path / "out", force=True, **options)
            except UsageError as error:
                refused.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return compare(*args)

    monkeypatch.setattr(converter, "compare", second)
    convert(tmp_path / "x.pt", "siglip2", str(tmp_path / "base"), tmp_path / "out", **options)
    assert len(refused) == 1 and "being written" in refused[0]
    AutoModel.from_pretrained(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "x.pt"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "x.pt").stat().st_mode
