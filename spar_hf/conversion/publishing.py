"""Uploads of converted checkpoints to the user's own repository on the hub, with a card that says where they come from."""

from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx, from huggingface_hub 2 on of httpx2
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from spar_hf.utils.atomic import write_text
from spar_hf.utils.errors import UsageError
from spar_hf.utils.model_cards import model_card, short_name

TEXT = """\
Dense vision features of an image of any size in one pass, in a space with text embeddings
([SPAR, arXiv 2604.02252](https://arxiv.org/abs/2604.02252)).

Converted from `{checkpoint}` (family `{family}`, base `{base}`) by `spar-hf convert`, which compared its outputs with the
published formulae.

```python
import spar_hf
from transformers import AutoImageProcessor, AutoModel, pipeline

segment = pipeline("open-vocab-segmentation", model="{repo}")
segment("street.jpg", candidate_labels=["road", "car, automobile", "sky"], background="auto")

model, processor = AutoModel.from_pretrained("{repo}"), AutoImageProcessor.from_pretrained("{repo}")
# (1, dim, ceil(height / {patch}), ceil(width / {patch}))
features = model(**processor("street.jpg", return_tensors="pt")).feature_map
```

Without `spar_hf`, pass `trust_remote_code=True`. The weights have the licence that their authors give them; add it here.
"""


def check_repository(repo: str, replace: bool = False) -> None:
    """
    Check before hours of work that a folder can be uploaded.

    Args:
        repo: `OWNER/NAME` on the hub.
        replace: whether the repository may exist.

    Raises:
        UsageError: no such name, no login, no network, or the repository exists.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push {repo}: {error}") from error
    if repo.count("/") != 1:
        raise UsageError(f"--push {repo}: name the owner too, as in OWNER/NAME.")
    api = HfApi()
    try:
        api.whoami()
        exists = api.repo_exists(repo)
    except LocalTokenNotFoundError as error:
        raise UsageError("--push needs a login: run `hf auth login` first, or set HF_TOKEN.") from error
    except OfflineModeIsEnabled as error:
        raise UsageError("--push needs the hub, but HF_HUB_OFFLINE is set. Unset it.") from error
    except HfHubHTTPError as error:
        raise UsageError(f"--push {repo}: the hub refused: {error}") from error
    except HTTPError as error:
        raise UsageError(
            f"--push needs the hub, which cannot be reached: {error}. Check the network and HF_ENDPOINT, or leave --push "
            "out and upload the folder later with `hf upload`."
        ) from error
    if exists and not replace:
        raise UsageError(
            f"--push {repo}: the repository exists. Name another one, or add a commit to it with --overwrite."
        )


def publish(folder: str | Path, repo: str, checkpoint: str | Path, family: str, base: str, private: bool = True) -> str:
    """
    Write a card into a converted folder, unless it has one, and upload the folder.

    Args:
        folder: as [`convert`] wrote it.
        repo: `OWNER/NAME` on the hub; it is made if it does not exist.
        checkpoint, family, base: what was converted, for the card.
        private: whether a repository that is made is private.

    Returns:
        The address of the repository.

    Raises:
        HfHubHTTPError: the hub refuses the upload.
        ConnectionError: the hub cannot be reached.
    """
    folder, api = Path(folder), HfApi()
    if not (folder / "README.md").exists():
        patch = AutoConfig.from_pretrained(folder).patch_size
        write_text(folder / "README.md", card(repo, checkpoint, family, base, patch))
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{family} checkpoint, converted by spar-hf")
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        raise ConnectionError(
            f"{folder} is converted but not uploaded, because the hub cannot be reached: {error}. Upload it later with "
            f"`hf upload {repo} {folder}`."
        ) from error
    return f"{api.endpoint}/{repo}"


def card(repo: str, checkpoint: str | Path, family: str, base: str, patch: int) -> str:
    """
    The card of a converted checkpoint of patches of `patch` pixels, with metadata for the hub.

    Example:

    ```python
    >>> text = card("me/spar-siglip2", "SPAR.ckpt", "siglip2", "google/siglip2-base-patch16-512", 16)
    >>> "base_model: google/siglip2-base-patch16-512" in text, 'model="me/spar-siglip2"' in text
    (True, True)
    ```"""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        base_model=None if Path(base).exists() else base,
        tags=["spar", "open-vocabulary-segmentation"],
    )
    text = TEXT.format(checkpoint=Path(checkpoint).name, family=family, base=short_name(base), repo=repo, patch=patch)
    return model_card(repo.rpartition("/")[2], text, data)
