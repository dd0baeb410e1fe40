"""`spar-hf convert --push`: what reaches the hub, and what stops before the work begins. The hub itself is replaced."""

import socket
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from official_checkpoints import write_official
from tiny_models import tiny_config
from transformers import AutoModel
from typer.testing import CliRunner

from spar_hf.cli.main import app
from spar_hf.conversion import publishing


class Hub:
    """Keeps what is asked of it."""

    endpoint = "https://hub"

    def __init__(self, existing=(), login=True):
        self.existing, self.login, self.asked = set(existing), login, []

    def whoami(self):
        if not self.login:
            raise LocalTokenNotFoundError("no token")

    def repo_exists(self, repo):
        return repo in self.existing

    def create_repo(self, repo, **options):
        self.asked.append(SimpleNamespace(repo=repo, **options))

    def upload_folder(self, **options):
        files = {path.name for path in options["folder_path"].iterdir()}
        self.asked.append(SimpleNamespace(files=files, **options))


@pytest.fixture
def official(tmp_path):
    """Arguments that convert a tiny checkpoint."""
    family, _, _, more = write_official(tmp_path, "siglip2")
    assert not more.keys() - {"vision_act"}
    options = ["--vision-act", more["vision_act"]] if "vision_act" in more else []
    base, output = str(tmp_path / "base"), str(tmp_path / "out")
    return [
        "convert",
        str(tmp_path / "official.ckpt"),
        "--family",
        family,
        "--base",
        base,
        "--output",
        output,
        *options,
    ]


def run(monkeypatch, hub, *arguments):
    monkeypatch.setattr(publishing, "HfApi", lambda: hub)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("public", [False, True])
def test_the_folder_is_uploaded_with_its_code_and_a_valid_card(public, official, tmp_path, monkeypatch):
    hub = Hub()
    result = run(monkeypatch, hub, *official, "--push", "me/spar-siglip2", *(["--public"] if public else []))
    assert result.exit_code == 0, result.output
    assert "https://hub/me/spar-siglip2" in result.output
    made, uploaded = hub.asked
    assert made.repo == uploaded.repo_id == "me/spar-siglip2" and made.private is not public
    assert {"README.md", "model.safetensors", "config.json", "modeling_spar.py", "tokenizer.json"} <= uploaded.files
    assert uploaded.folder_path == tmp_path / "out"
    AutoModel.from_pretrained(tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "image-segmentation", None)
    text = (tmp_path / "out" / "README.md").read_text()
    patch = AutoModel.from_pretrained(tmp_path / "out").config.patch_size
    assert str(tmp_path) not in text and f"ceil(width / {patch})" in text


@pytest.mark.parametrize(
    ("repo", "hub", "told"),
    [
        ("me/taken", Hub(existing=["me/taken"]), "--overwrite"),
        ("me/new", Hub(login=False), "hf auth login"),
        ("new", Hub(), "OWNER/NAME"),
        ("a b/new", Hub(), "--push"),
    ],
)
def test_what_cannot_be_uploaded_stops_before_the_conversion(repo, hub, told, official, tmp_path, monkeypatch):
    result = run(monkeypatch, hub, *official, "--push", repo)
    assert result.exit_code == 2 and told in result.output, result.output
    assert not hub.asked and not (tmp_path / "out").exists()


def test_offline_is_told(official, tmp_path):
    result = CliRunner().invoke(app, [*official, "--push", "me/new"], env={"HF_TOKEN": "hf_none"})
    assert result.exit_code == 2 and "HF_HUB_OFFLINE" in result.output, result.output
    assert not (tmp_path / "out").exists()


@pytest.fixture
def unreachable(monkeypatch):
    """A hub at a port that nothing listens on. The tests run offline, so the client says that it is not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return lambda: HfApi(endpoint=endpoint, token="hf_none")


def test_a_hub_that_cannot_be_reached_is_one_line_before_the_conversion(official, unreachable, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "HfApi", unreachable)
    result = CliRunner().invoke(app, [*official, "--push", "me/new"])
    assert result.exit_code == 2 and "--push needs the hub" in result.output, result.output
    assert not (tmp_path / "out").exists()


def test_an_upload_that_does_not_reach_the_hub_says_how_to_repeat_it(unreachable, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "HfApi", unreachable)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ConnectionError, match="hf upload me/new"):
        publishing.publish(tmp_path, "me/new", "SPAR.ckpt", "siglip2", "base")
