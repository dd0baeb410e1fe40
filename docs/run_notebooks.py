"""
Runs the notebooks of `docs/notebooks/` and keeps their outputs. `make notebooks` calls it.

    python docs/run_notebooks.py
    python docs/run_notebooks.py docs/notebooks/dense_features.ipynb

Each runs in a fresh kernel and an empty folder, offline. Progress bars are not kept. A notebook is only written if every
cell ran, nothing was printed to the error stream, and its pictures are small.
"""

import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
SECONDS = 1800  # for one cell, on a busy computer too
LARGEST = 300_000  # bytes of a notebook, most of them pictures
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar: nothing without its process
SETTINGS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # of the kernel
QUIET = ["--IPKernelApp.log_level=40"]  # it warns that other users of the computer could read along
logger = logging.getLogger(__name__)


def run(path: Path) -> Any:
    """
    The notebook with the outputs of a new run, without times and the like.

    Raises:
        CellExecutionError: a cell fails.
        ValueError: a cell prints to the error stream, or the notebook is too large.
    """
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        settings = {"timeout": SECONDS, "startup_timeout": SECONDS, "record_timing": False, "coalesce_streams": True}
        NotebookClient(book, resources=resources, extra_arguments=QUIET, **settings).execute()
    book.metadata = {"kernelspec": book.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in book.cells:
        cell.metadata = {}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        noise = [output.text for output in cell.get("outputs", []) if output.get("name") == "stderr"]
        if noise:
            raise ValueError(f"{path.name} prints to the error stream: {''.join(noise)}")
    size = len(json.dumps(book))
    if size > LARGEST:
        raise ValueError(f"{path.name} has {size:,} bytes, more than {LARGEST:,}. Make its pictures smaller.")
    return book


def main(arguments: list[str]) -> None:
    """Run the given notebooks, by default all."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.update(SETTINGS)
    for path in [Path(name) for name in arguments] or sorted(FOLDER.glob("*.ipynb")):
        start = time.monotonic()
        book = run(path)
        temporary = path.with_suffix(".tmp")
        nbformat.write(book, temporary)
        temporary.replace(path)
        logger.info("%s: %.0f s, %d kB", path.name, time.monotonic() - start, path.stat().st_size // 1000)


if __name__ == "__main__":
    main(sys.argv[1:])
