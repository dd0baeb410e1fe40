"""`spar-hf doctor`: sound models pass, each kind of damage is found, and the report says what to do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from official_checkpoints import MAKERS, radio_head, write_official, write_radio
from PIL import Image
from safetensors.torch import save_file
from tiny_models import CONFIGS, randomise
from typer.testing import CliRunner

from spar_hf import SPAR_TINY_BASE, SparConfig, SparForOpenVocabSegmentation, SparVisionModel
from spar_hf.cli.main import app
from spar_hf.doctor.checks import check_backbone, check_resolution, check_teacher, check_weights, check_words
from spar_hf.doctor.examination import DoctorOptions, check_voc, examine, findings_of, load_subject
from spar_hf.teacher import SlidingWindowTeacher
from spar_hf.utils.errors import UsageError


def statuses(check, subject):
    return [finding.status for finding in check(subject)]


@pytest.fixture
def subject(base_folder):
    """A tiny random SigLIP pair."""
    return load_subject(str(base_folder), torch.device("cpu"))


@pytest.mark.parametrize("name", MAKERS)
def test_an_official_checkpoint_is_converted_and_passes(name, tmp_path):
    family, _, _, more = write_official(tmp_path, name)
    checkpoint, base = str(tmp_path / "official.ckpt"), str(tmp_path / "base")
    report = examine(DoctorOptions(model=checkpoint, family=family, base=base, conversion=more, stride=4, device="cpu"))
    assert not report.failed, report.markdown()
    found = {finding.check: finding for finding in report.findings if finding.status == "ok"}
    for check in ("layers equal transformers' own", "teacher at stride 4 equals one window at a time"):
        assert float(found[check].found) < 1e-4
    assert sum("conversion equals the published formulae" in check for check in found) >= 4
    assert not (tmp_path / "converted").exists()


def test_a_head_of_c_radio_is_chosen_by_its_adaptor(tmp_path):
    write_radio(tmp_path)
    save_file(radio_head("_heads.1.", torch.Generator().manual_seed(0)), tmp_path / "radio.safetensors")
    given = ["--family", "radio", "--base", tmp_path / "base", "--tokenizer", tmp_path / "text", "--device", "cpu"]
    arguments = [*map(str, ["doctor", tmp_path / "radio.safetensors", *given])]
    other = CliRunner().invoke(app, arguments)  # the head of the default is not there
    assert other.exit_code == 2 and "heads of 1, and none of siglip2-g" in other.output and "--adaptor" in other.output
    found = CliRunner().invoke(app, [*arguments, "--adaptor", "1"])
    assert found.exit_code == 0 and "conversion equals the published formulae" in found.output, found.output
    folder = CliRunner().invoke(app, ["doctor", str(tmp_path / "base"), "--adaptor", "1", "--tokenizer", "other"])
    assert folder.exit_code == 2 and "leave out --tokenizer, --adaptor" in folder.output


@pytest.mark.parametrize("readout", CONFIGS)
def test_every_read_out_passes(readout, tmp_path):
    config = SparConfig(backbone_config=CONFIGS[readout](), readout=readout)
    randomise(SparVisionModel(config)).save_pretrained(tmp_path)
    report = examine(DoctorOptions(model=str(tmp_path), device="cpu"))
    assert not report.failed, report.markdown()
    skipped = [finding.check for finding in report.findings if finding.status == "skipped"]
    assert skipped == (["layers equal transformers' own", "words"] if readout == "naflex" else ["words"])


@pytest.mark.parametrize("readout", ["siglip", "maskclip"])
def test_an_image_size_that_is_no_multiple_of_the_patch_passes_every_check(readout, tmp_path):
    """As SO400M/14 at 384 px, whose last 6 px transformers cuts off."""
    backbone = CONFIGS[readout]()
    backbone.image_size, backbone.patch_size = 60, 14
    randomise(SparVisionModel(SparConfig(backbone_config=backbone, readout=readout))).save_pretrained(tmp_path)
    report = examine(DoctorOptions(model=str(tmp_path), stride=60, device="cpu"))
    assert not report.failed, report.markdown()
    checks = {finding.check for finding in report.findings if finding.status != "skipped"}
    assert {"layers equal transformers' own", "teacher at stride 56 equals one window at a time"} <= checks
    assert any("over one pass" in check for check in checks) and "relative error in bfloat16" in checks
    assert [finding.check for finding in report.findings if finding.status == "skipped"] == ["words"]


def test_the_embedded_base_passes_and_its_words_fit(tmp_path):
    report = tmp_path / "report.md"
    arguments = ["doctor", str(SPAR_TINY_BASE), "--stride", "96", "--device", "cpu", "--output", str(report)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    text = report.read_text(encoding="utf-8")
    assert "10 of 10 words" in text and "| layers equal transformers' own | ok |" in text and "torch: " in text
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "--overwrite" in again.output
    report.unlink()
    report.mkdir()
    folder = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert folder.exit_code == 2 and "is a folder" in folder.output


def test_weights_that_are_not_finite(subject):
    assert statuses(check_weights, subject) == ["ok"]
    next(subject.vision.parameters()).data.view(-1)[0] = float("nan")
    assert statuses(check_weights, subject) == ["failed"]


def test_a_forward_that_differs_from_transformers(subject, monkeypatch):
    assert statuses(check_backbone, subject) == ["ok"]
    embed = type(subject.vision.backbone).embed
    monkeypatch.setattr(type(subject.vision.backbone), "embed", lambda *a, **k: 1.001 * embed(*a, **k))
    assert statuses(check_backbone, subject) == ["failed"]


def test_images_of_a_batch_that_disturb_each_other(subject, monkeypatch):
    assert statuses(check_resolution, subject) == ["ok", "ok"]
    embed = type(subject.vision.backbone).embed

    def mixed(*args, **kwargs):
        tokens = embed(*args, **kwargs)
        return tokens + 0.01 * tokens.mean(0)

    monkeypatch.setattr(type(subject.vision.backbone), "embed", mixed)
    assert statuses(check_resolution, subject) == ["failed", "failed"]


def test_a_teacher_that_counts_wrong(subject, monkeypatch):
    assert statuses(check_teacher, subject) == ["ok"]
    stitch = SlidingWindowTeacher.stitch

    def one_more(self, *args, **kwargs):
        sums, coverage = stitch(self, *args, **kwargs)
        return sums, coverage + 1

    monkeypatch.setattr(SlidingWindowTeacher, "stitch", one_more)
    assert statuses(check_teacher, subject) == ["failed"]


def test_a_tokenizer_of_another_model_is_noted(subject):
    (finding,) = check_words(subject)
    assert finding.status == "note" and "another model" in finding.found  # random text weights know no synonyms


def test_a_check_that_breaks_does_not_stop_the_others(base_folder, monkeypatch):
    def breaks(self, *args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(SlidingWindowTeacher, "forward", breaks)
    report = examine(DoctorOptions(model=str(base_folder), device="cpu"))
    assert {finding.check for finding in report.failed} == {"teacher", "precision", "speed"}
    assert all("no kernel" in finding.found for finding in report.failed)
    assert any(finding.status == "ok" for finding in report.findings)
    json.dumps(report.as_json())


def test_failure_is_the_exit_status(base_folder, monkeypatch):
    monkeypatch.setattr("spar_hf.doctor.checks.TOLERANCE", 0.0)
    result = CliRunner().invoke(app, ["doctor", str(base_folder), "--device", "cpu"])
    assert result.exit_code == 1 and "failed" in result.output


def test_a_vision_tower_alone(base_folder, tmp_path):
    SparVisionModel.from_pretrained(base_folder).save_pretrained(tmp_path / "vision")
    report = examine(DoctorOptions(model=str(tmp_path / "vision"), device="cpu"))
    assert not report.failed and [f.check for f in report.findings if f.status == "skipped"] == ["words"]


def test_voc_is_measured_by_the_published_protocol(tmp_path):
    """A devkit of one image, all pixels of one class."""
    root = tmp_path / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(root / "JPEGImages" / "a.jpg")
    Image.fromarray(np.full((48, 48), 3, np.uint8)).save(root / "SegmentationClass" / "a.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("a\n")
    subject = load_subject(str(SPAR_TINY_BASE), torch.device("cpu"), 96)
    (finding,) = check_voc(subject, str(SPAR_TINY_BASE), root)
    assert finding.status == "note" and "1 images" in finding.check and "no published figure" in finding.limit
    assert 0 <= float(finding.found.removesuffix(" %")) <= 100


def test_a_wrong_folder_of_voc_is_one_finding(subject, tmp_path):
    (finding,) = findings_of("voc20", lambda subject: check_voc(subject, str(SPAR_TINY_BASE), tmp_path), subject)
    assert finding.status == "failed" and str(tmp_path) in finding.found and "Error" not in finding.found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "{file}"}, "--family and --base"),
        ({"model": "{folder}", "family": "siglip2"}, "no checkpoint file"),
        ({"model": "{folder}", "conversion": {"text_heads": 4}}, "leave out --text-heads"),
        ({"model": "nowhere", "family": "siglip2", "base": "x"}, "does not exist"),
        ({"model": "{folder}", "voc": "nowhere"}, "--voc"),
        ({"model": "{folder}", "stride": 0}, "--stride"),
        ({"model": "{folder}", "voc": "{folder}", "device": "cuda:1"}, "ACCELERATE_USE_CPU"),
    ],
)
def test_wrong_options_are_named(options, message, tmp_path):
    (tmp_path / "official.ckpt").write_bytes(b"")
    given = {
        key: value.format(file=tmp_path / "official.ckpt", folder=tmp_path) if isinstance(value, str) else value
        for key, value in options.items()
    }
    if "voc" in given:
        given["voc"] = Path(given["voc"])
    with pytest.raises(UsageError, match=message):
        DoctorOptions(**given)


def test_a_folder_that_is_no_model_is_one_line(tmp_path):
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1


def test_two_towers_load_as_they_are(base_folder):
    assert isinstance(load_subject(str(base_folder), torch.device("cpu")).towers, SparForOpenVocabSegmentation)
