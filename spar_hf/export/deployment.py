"""What folders for hosting services share: text of their files, and a check of the model folder."""

import json
from importlib.resources import files
from pathlib import Path

from spar_hf import __version__
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.texts import read_text


def template(name: str) -> str:
    """A file of `spar_hf/export/templates`, whose names end in `.txt` since they are no modules of the library."""
    return (files("spar_hf.export") / "templates" / f"{name}.txt").read_text(encoding="utf-8")


def requirements(extra: str) -> str:
    """
    `requirements.txt` with this version of the library or a later one with the same interface.

    Example:

    ```python
    >>> print(requirements("app").splitlines()[-1].partition("~=")[0])
    spar-hf[app]
    ```"""
    where = "# where spar-hf is not in the package index: the URL of a wheel, or its path in this folder\n"
    return f"{where}spar-hf[{extra}]~={__version__}\n"


def check_two_towers(folder: Path) -> None:
    """
    Check that a folder holds a model with a text tower, without loading it.

    Raises:
        MissingFiles: no `config.json`.
        UsageError: a damaged one, or that of another kind of model.

    Example:

    ```python
    >>> write = Path("config.json").write_text('{"model_type": "spar_semantic"}')
    >>> check_two_towers(Path())
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: . is a 'spar_semantic' model without text tower. ...
    ```"""
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFiles(f"{folder} holds no model: {path} is missing. Name a folder that `save_pretrained` wrote.")
    try:
        config = json.loads(read_text(path))
        kind, has_text = config.get("model_type"), config.get("text_config") is not None
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{path} is no configuration of a model: {error}.") from None
    if not has_text:
        raise UsageError(
            f"{folder} is a {kind!r} model without text tower. Name a two-tower model; models with classes of their own run "
            'in `pipeline("image-segmentation")`, which hosting services load without further files.'
        )
