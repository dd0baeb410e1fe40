"""
Commands and programmes on the pages of `docs/`, found and run.

A block of `sh` or `python` that cannot run has a comment above it, `<!-- not run: why -->`; one that needs a
package which the library does not need, `<!-- recipe: package -->`. Blocks of `yaml` are written to `recipe.yaml`.
"""

import os
import re
import runpy
import shlex
import tomllib
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from typer.testing import CliRunner

from spar_hf.cli.main import app

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMENT = r"(?:<!-- (?:not run: (?P<why>[^\n]+)|recipe: (?P<recipe>\w+)) -->\n)?"
BLOCK = re.compile(COMMENT + r" *```(?P<kind>sh|python|yaml)[^\n]*\n(?P<text>.*?)```", re.DOTALL)


class Block(NamedTuple):
    """A block of a page: its language, its text, why it is not run, if it is not, and the package that it needs."""

    kind: str
    text: str
    why: str | None
    recipe: str | None


def page_text(page: str) -> str:
    """A page by its path in the repository, without `.md`."""
    return (ROOT / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Every block of commands of a page, in order."""
    found = BLOCK.finditer(page_text(page))
    return [Block(one["kind"], dedent(one["text"].rstrip(" ")), one["why"], one["recipe"]) for one in found]


def reasons(page: str) -> dict[str, int]:
    """How many blocks are not run, by reason."""
    found = [block.why for block in blocks(page) if block.why is not None]
    return {why: found.count(why) for why in found}


def run_page(page: str, monkeypatch: pytest.MonkeyPatch, substitutes=(), names=None, recipe=None) -> int:
    """
    Run the blocks of a page in this folder, each with the names that earlier ones made.

    Args:
        page: path in the repository, without `.md`.
        monkeypatch: for the environment of single commands.
        substitutes: pairs of a pattern and what runs in place of it: small models, few steps.
        names: what the first block of Python finds.
        recipe: run only the blocks that need this package; by default those that need none.

    Returns:
        The number of blocks that ran.
    """
    names = {"__name__": "__main__"} | (names or {})
    ran = 0
    for kind, text, why, package in blocks(page):
        if why is not None or package != recipe:
            continue
        for written, instead in substitutes:
            text = re.sub(written, instead, text)
        if kind == "sh":
            run_shell(text, monkeypatch)
        elif kind == "yaml":
            Path("recipe.yaml").write_text(text, encoding="utf-8")
        else:
            exec(compile(text, f"{page}.md", "exec"), names)
        ran += 1
    return ran


def commands(text: str) -> list[list[str]]:
    """The lines of a block, each split into words; without comments, continued lines as one."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def run_shell(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of a block, in this process."""
    for words in commands(text):
        with monkeypatch.context() as patch:
            while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                patch.setenv(*words.pop(0).split("=", 1))
            if words[0] == "spar-hf":
                result = CliRunner().invoke(app, words[1:])
                assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"
            elif words[:2] == ["pip", "install"]:
                check_installation(words[2:])
            elif words[0] == "python" and words[1].startswith("training/"):
                script = ROOT / words[1]
                patch.setattr("sys.argv", words[1:])
                patch.syspath_prepend(script.parent)
                runpy.run_path(str(script), run_name="__main__")
            elif words[0] == "ls" and words[2:3] == [">"]:
                Path(words[3]).write_text("".join(f"{path}\n" for path in sorted(Path().glob(words[1]))))
            elif words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
            else:
                pytest.fail(f"{shlex.join(words)}: cannot be run here. Put `<!-- not run: why -->` above its block.")


def check_installation(arguments: list[str]) -> None:
    """
    Packages of the library have the extras that are named; others are installed here in that version, or in an older one,
    as where the lower bounds are tested.
    """
    for argument in arguments:
        if argument.startswith("-") or argument.startswith(".") or os.sep in argument:
            continue
        wanted = Requirement(argument)
        if canonicalize_name(wanted.name) == PROJECT["name"]:
            assert wanted.extras <= PROJECT["optional-dependencies"].keys(), argument
        else:
            found = version(wanted.name).split("+")[0]
            newer = [pin.version for pin in wanted.specifier if Version(pin.version) > Version(found)]
            assert wanted.specifier.contains(found) or newer, argument
