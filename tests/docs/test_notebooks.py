"""
The notebooks as they are kept: run in order without errors or noise, small, with nothing of the machine that ran them. No
test runs them, `make notebooks` does. What they import exists.
"""

import ast
import base64
import importlib
import io
import json
import re

import pytest
from doc_pages import ROOT, page_text
from PIL import Image

FOLDER = ROOT / "docs" / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
KINDS = {"markdown", "code"}
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code(book):
    """The cells of code, each as its text without the lines of IPython."""
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    return [(cell, re.sub(r"^%.*$", "", "".join(cell["source"]), flags=re.MULTILINE)) for cell in cells]


def outputs(book):
    return [output for cell, _ in code(book) for output in cell["outputs"]]


@each_notebook
def test_it_is_a_notebook_that_ran_in_order_without_errors(path):
    book = read(path)
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)  # cells of this version have ids
    assert {cell["cell_type"] for cell in book["cells"]} == KINDS
    names = [cell["id"] for cell in book["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in names)
    assert [cell["execution_count"] for cell, _ in code(book)] == list(range(1, len(code(book)) + 1))
    assert {output["output_type"] for output in outputs(book)} <= {"stream", "display_data", "execute_result"}
    assert {kind for output in outputs(book) for kind in output.get("data", {})} == {"image/jpeg", "text/plain"}
    assert {output["name"] for output in outputs(book) if output["output_type"] == "stream"} == {"stdout"}
    assert "".join(book["cells"][0]["source"]).startswith("# ")


@each_notebook
def test_it_holds_nothing_of_the_machine_that_ran_it(path):
    book = read(path)
    for cell in book["cells"]:
        assert cell["metadata"] == {}  # no times
        for output in cell.get("outputs", ()):
            for name in output.get("data", {}):
                output["data"][name] = output["data"][name] if name.startswith("text/") else ""
    text = json.dumps(book, ensure_ascii=False)
    assert re.findall(r"(?<![\w.:/)}*])/(?:home|root|tmp|usr|var|work|opt|mnt|Users|private)\b[^\"]*", text) == []
    assert re.findall(r"[A-Z]:\\\\|(?i:warning)|0x[0-9a-f]{6,}|it/s", text) == []
    assert set(book["metadata"]) == {"kernelspec", "language_info"}
    assert book["metadata"]["kernelspec"]["name"] == "python3"


@each_notebook
def test_its_pictures_are_small(path):
    pictures = [
        base64.b64decode(picture)
        for output in outputs(read(path))
        for name, picture in output.get("data", {}).items()
        if name.startswith("image/")
    ]
    assert pictures
    for picture in pictures:
        with Image.open(io.BytesIO(picture)) as image:
            assert image.format in ("JPEG", "PNG") and min(image.size) > 100
        assert len(picture) <= 100_000
    assert sum(other.stat().st_size for other in FOLDER.rglob("*") if other.is_file()) < 1_500_000


@each_notebook
def test_what_it_imports_from_here_exists(path):
    own = []
    for _, text in code(read(path)):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "spar_hf":
                own += [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "spar_hf":
                own.append(("spar_hf", node.attr))
    assert own
    assert [name for module, name in own if not hasattr(importlib.import_module(module), name)] == []


@each_notebook
def test_its_links_lead_to_pages_and_it_is_linked(path):
    text = "\n".join("".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    assert targets and [target for target in targets if not (FOLDER / target).exists()] == []
    for page in ("docs/index", "docs/get_started"):
        assert f"(notebooks/{path.name})" in page_text(page)


def test_the_site_has_every_notebook():
    hooks = ast.parse((ROOT / "docs" / "site_hooks.py").read_text(encoding="utf-8"))
    (listed,) = [
        ast.literal_eval(node.value)
        for node in hooks.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "NOTEBOOKS"
    ]
    assert sorted(listed) == [path.stem for path in PATHS] and len(PATHS) == 5
