"""The cards of the checkpoints are valid on the hub, and what they tell a user to do works."""

import re
import shutil

import pytest
from doc_pages import ROOT, blocks, run_page
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from official_checkpoints import write_official
from transformers.pipelines import PIPELINE_REGISTRY

from spar_hf.conversion import publishing

CARDS = sorted((ROOT / "model_cards").glob("*.md"))
OFFICIAL = {"spar-siglip2": "siglip2", "spar-openclip": "openclip", "spar-dinov3txt": "dinov3txt"}
PAGE = "https://naomikombol.github.io/SPAR/"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_metadata_is_valid_on_the_hub(path):
    card = ModelCard.load(path)  # refuses metadata that the hub could not read
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data
    assert data["library_name"] == "transformers" and data["pipeline_tag"] in PIPELINE_REGISTRY.get_supported_tasks()
    assert all(isinstance(tag, str) for tag in data["tags"])
    if "base_model" in data:
        validate_repo_id(data["base_model"])
    if data.get("license") == "other":
        assert re.fullmatch(r"[a-z0-9-]+", data["license_name"])
    assert re.search(rf"^# {path.stem}$", card.text, re.MULTILINE)


def test_the_card_of_an_upload_is_valid():
    text = publishing.card("me/student", "SPAR.ckpt", "siglip2", "google/siglip2-base-patch16-512", 16)
    data = ModelCard(text).data
    assert (data.base_model, data.pipeline_tag) == ("google/siglip2-base-patch16-512", "image-segmentation")


class Hub:
    """Takes uploads."""

    endpoint = "https://hub"

    def __init__(self):
        self.uploads = []

    def whoami(self):
        return {"name": "me"}

    def repo_exists(self, repo):
        return False

    def create_repo(self, repo, **options):
        assert options["private"]

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.uploads.append((repo_id, {path.name for path in folder_path.iterdir()}))


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_first_day(name, tmp_path, image_folder, monkeypatch):
    page = f"model_cards/{name}"
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8")
    file = re.search(rf"Download `(\S+)` from the authors' \[project page\]\({re.escape(PAGE)}\)", text)[1]
    family, _, _, more = write_official(tmp_path, OFFICIAL[name])
    assert f"--family {family} " in text
    (tmp_path / "official.ckpt").rename(tmp_path / file)
    shutil.copy(image_folder / "0.jpg", tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    monkeypatch.setattr(publishing, "HfApi", lambda: hub)
    tiny = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in more.items())
    substitutes = [
        (r"--base \S+ --output (\S+)", rf"--base base --output \1 {tiny}"),
        (r" \\\n *--tokenizer \S+ --text-heads \d+", ""),
        (r"(spar-hf doctor \S+)", r"\1 --stride 8"),
    ]
    assert run_page(page, monkeypatch, substitutes) == len(blocks(page)) >= 3
    ((repo, files),) = hub.uploads
    assert repo == f"ORG/{name}" and {"README.md", "model.safetensors", "modeling_spar.py"} <= files


def test_the_first_day_of_all_blocks_is_that_of_two():
    two, every = (f"model_cards/{name}" for name in ("spar-siglip2", "spar-siglip2-all"))
    as_two = [block.text.replace("SPAR_ALL_SIGLIP2", "SPAR_SIGLIP2").replace("-all", "") for block in blocks(every)]
    assert as_two == [block.text for block in blocks(two)]
