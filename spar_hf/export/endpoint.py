"""Makes a model folder answer as a Hugging Face Inference Endpoint."""

from pathlib import Path

from spar_hf.export.deployment import check_two_towers, requirements, template
from spar_hf.utils.atomic import write_text
from spar_hf.utils.errors import UsageError
from spar_hf.utils.texts import read_text


def write_handler(folder: str | Path) -> list[Path]:
    """
    Write `handler.py` and `requirements.txt` beside a model. Inference Endpoints load the first and install the second.

    Args:
        folder: of a two-tower model, as `save_pretrained` writes it.

    Returns:
        The files that were written.

    Raises:
        MissingFiles: no model folder.
        UsageError: a model without text tower, or other files of these names.

    Example:

    ```python
    >>> import shutil
    >>> from spar_hf import SPAR_TINY

    >>> _ = shutil.copytree(SPAR_TINY, "model")
    >>> [path.name for path in write_handler("model")]
    ['handler.py', 'requirements.txt']
    ```"""
    folder = Path(folder)
    check_two_towers(folder)
    texts = {folder / "handler.py": template("handler.py"), folder / "requirements.txt": requirements("coco")}
    for path, text in texts.items():
        if path.exists() and read_text(path) != text:
            raise UsageError(f"{path} has other content. Remove it, or merge it by hand.")
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)
