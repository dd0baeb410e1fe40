"""Folders that are Hugging Face Spaces: the page of `spar-hf app`, or a static page that runs the model in the browser."""

import json
import shutil
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from spar_hf.export.deployment import check_two_towers, requirements, template
from spar_hf.utils.atomic import write_text, writing_folder
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.model_cards import model_card

OLDEST_GRADIO = "6.20.0"
# threads of WebAssembly need a page that no other page can reach
ISOLATION = {
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "cross-origin",
}
TEXT = "Drop an image, type words, see masks: open-vocabulary segmentation in one pass at any resolution with {}."


def write_space(model: str | None, output: str | Path) -> None:
    """
    Write a Space with the page of `spar-hf app`: `README.md` with its settings, `app.py`, `requirements.txt`, and the folder
    of a local model inside `model/`. It runs on CPUs, GPUs and ZeroGPU.

    Args:
        model: folder or hub id of a two-tower model; the embedded spar-tiny by default.
        output: folder to write; it must not exist.

    Raises:
        FileExistsError: `output` exists.
        UsageError: `model` is neither a folder of a two-tower model nor a valid hub id.

    Example:

    ```python
    >>> write_space("me/spar-siglip2", "space")
    >>> "models:\\n- me/spar-siglip2\\n" in Path("space/README.md").read_text()
    True
    ```"""
    card: dict[str, Any] = {"sdk": "gradio", "sdk_version": gradio_version(), "python_version": "3.11"}
    card["app_file"] = "app.py"
    folder = Path(model).resolve() if model is not None and Path(model).exists() else None
    if folder is not None:
        check_two_towers(folder)
        name, where = (
            folder.name,
            f'str(Path(__file__).parent / "model" / {json.dumps(folder.name, ensure_ascii=False)})',
        )
    elif model is not None:
        check_hub_id(model)
        name, where = model.rpartition("/")[2], json.dumps(model)
        card["models"] = [model]
    else:
        name, where = "spar-tiny", "None"
    with new_folder(Path(output)) as temporary:
        temporary.mkdir()
        if folder is not None:
            shutil.copytree(folder, temporary / "model" / name, ignore=shutil.ignore_patterns(".*", "checkpoint*"))
        write_text(temporary / "app.py", template("app.py").replace("__MODEL__", where))
        write_text(temporary / "requirements.txt", requirements("app"))
        write_text(temporary / "README.md", space_card(name, card))


def write_static_space(page: str | Path, output: str | Path) -> None:
    """
    Write a Space of a folder of web pages, as `spar-hf export --format web` writes it. It needs no server of its own.

    Args:
        page: folder with `index.html`.
        output: folder to write; it must not exist.

    Raises:
        MissingFiles: there is no `index.html`.
        FileExistsError: `output` exists.

    Example:

    ```python
    >>> write_text(Path("web/index.html"), "<h1>Masks</h1>")
    >>> write_static_space("web", "space")
    >>> sorted(path.name for path in Path("space").iterdir())
    ['README.md', 'index.html']
    ```"""
    page = Path(page)
    if not (page / "index.html").is_file():
        raise MissingFiles(f"{page} has no index.html. Write the page with `spar-hf export MODEL --format web`.")
    with new_folder(Path(output)) as temporary:
        shutil.copytree(page, temporary, ignore=shutil.ignore_patterns(".*"))
        card = {"sdk": "static", "app_file": "index.html", "custom_headers": ISOLATION}
        write_text(temporary / "README.md", space_card(page.resolve().name, card))


def new_folder(output: Path) -> AbstractContextManager[Path]:
    """[`writing_folder`] for a folder that must not exist."""
    if output.exists():
        raise FileExistsError(f"{output} exists. Name another folder.")
    return writing_folder(output)


def space_card(name: str, settings: dict[str, Any]) -> str:
    """`README.md` of a Space of the model `name`."""
    looks: dict[str, Any] = {"emoji": "🖼️", "colorFrom": "indigo", "colorTo": "green", "pinned": False}
    data = SpaceCardData(title=f"Masks from words: {name}"[:60], **looks, **settings)
    return model_card("Masks from words", TEXT.format(f"`{name}`"), data)


def check_hub_id(model: str) -> None:
    """Raises UsageError if a model is no id of the hub."""
    try:
        validate_repo_id(model)
        owner, _, name = model.partition("/")
    except HFValidationError:
        owner = name = ""
    if not (owner and name):
        raise UsageError(f"{model!r} is neither a folder nor a hub id such as OWNER/NAME.")


def gradio_version() -> str:
    """The version of Gradio that is installed, else the oldest that the page works with."""
    try:
        return version("gradio")
    except PackageNotFoundError:
        return OLDEST_GRADIO
