"""What the site needs beyond MkDocs: the cards of checkpoints as pages, and docstrings without brackets around names."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

CARDS = Path(__file__).parents[1] / "model_cards"
# as transformers writes references: [`SparVisionModel`], [`~spar_hf.teacher.copy_as`]
REFERENCE = re.compile(r"\[(`~?[\w.]+`)\](?![\[(])")
# and types of arguments: scales (`Sequence[float]`, *optional*, defaults to `(1.0,)`):
ARGUMENT = re.compile(r"^( +\w+ \()(`.+)(\):)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The section of cards lists all of them, spar-tiny first."""
    cards = sorted((path.stem for path in CARDS.glob("*.md")), key=lambda name: (name != "spar-tiny", name))
    for section in config.nav or ():
        if "Cards" in section:
            section["Cards"] = [*({name: f"cards/{name}.md"} for name in cards), *section["Cards"]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Cards are pages of the folder `cards/`; links between them and `docs/` are those of the repository, rewritten."""
    for path in sorted(CARDS.iterdir()):
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8").replace("](../docs/", "](../")
            files.append(File.generated(config, f"cards/{path.name}", content=text))
        else:
            files.append(File.generated(config, f"cards/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from `docs/` to cards."""
    return markdown.replace("](../../model_cards/", "](../cards/").replace("](../model_cards/", "](cards/")


class PlainReferences(griffe.Extension):
    """Names in docstrings without the brackets and the tilde of transformers, and types without its marks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            text = REFERENCE.sub(lambda found: found[1].replace("~", ""), obj.docstring.value)
            obj.docstring.value = ARGUMENT.sub(lambda found: found[1] + re.sub("[`*]", "", found[2]) + found[3], text)
