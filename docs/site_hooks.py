"""
What the site needs beyond MkDocs: the cards of checkpoints and the notebooks as pages, and docstrings without brackets
around names.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

CARDS = Path(__file__).parents[1] / "model_cards"
NOTEBOOKS = ("masks_from_words", "dense_features", "distil_a_student", "fine_tune_a_head", "deploy_to_onnx")
# as transformers writes references: [`SparVisionModel`], [`~spar_hf.teacher.copy_as`]
REFERENCE = re.compile(r"\[(`~?[\w.]+`)\](?![\[(])")
# and types of arguments: scales (`Sequence[float]`, *optional*, defaults to `(1.0,)`):
ARGUMENT = re.compile(r"^( +\w+ \()(`.+)(\):)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The section of cards lists all of them, spar-tiny first; that of notebooks lists all in the order above."""
    cards = sorted((path.stem for path in CARDS.glob("*.md")), key=lambda name: (name != "spar-tiny", name))
    for section in config.nav or ():
        if "Cards" in section:
            section["Cards"] = [*({name: f"cards/{name}.md"} for name in cards), *section["Cards"]]
        if "Notebooks" in section:
            section["Notebooks"] = [f"notebooks/{name}.md" for name in NOTEBOOKS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """
    Cards are pages of the folder `cards/`; links between them and `docs/` are those of the repository, rewritten. Each
    notebook is a page beside itself.
    """
    for path in sorted(CARDS.iterdir()):
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8").replace("](../docs/", "](../")
            files.append(File.generated(config, f"cards/{path.name}", content=text))
        else:
            files.append(File.generated(config, f"cards/{path.name}", abs_src_path=str(path)))
    for name in NOTEBOOKS:
        text, pictures = notebook_page(Path(__file__).parent / "notebooks" / f"{name}.ipynb")
        files.append(File.generated(config, f"notebooks/{name}.md", content=text))
        for file, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{file}", content=picture))
    return files


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its outputs as Markdown, and its pictures by their file names."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/jpeg" in data:
                file = f"{path.stem}-{len(pictures)}.jpg"
                pictures[file] = base64.b64decode("".join(data["image/jpeg"]))
                parts.append(f"![Picture {len(pictures)}, drawn by the cell above]({file})")
            else:
                printed = "".join(output.get("text") or data.get("text/plain", ()))
                parts.append(f"```text\n{printed.rstrip()}\n```")
    parts.append(f"[This page as a notebook]({path.name}), to run and to change.")
    return "\n\n".join(parts) + "\n", pictures


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from `docs/` to cards and notebooks."""
    markdown = re.sub(r"\]\(((?:\.\./)?notebooks/\w+)\.ipynb", r"](\1.md", markdown)
    return markdown.replace("](../../model_cards/", "](../cards/").replace("](../model_cards/", "](cards/")


class PlainReferences(griffe.Extension):
    """Names in docstrings without the brackets and the tilde of transformers, and types without its marks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            text = REFERENCE.sub(lambda found: found[1].replace("~", ""), obj.docstring.value)
            obj.docstring.value = ARGUMENT.sub(lambda found: found[1] + re.sub("[`*]", "", found[2]) + found[3], text)
