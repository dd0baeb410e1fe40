"""
No block of code in `docs/`, the README or a card is left out in silence: a test runs it, or a comment says why not.
"""

import ast
import re
from pathlib import Path

import pytest
from doc_pages import ROOT, blocks

PAGES = sorted(
    str(path.relative_to(ROOT).with_suffix(""))
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "model_cards").glob("*.md"))
)
RUN = ("sh", "python", "yaml")  # what doc_pages.py runs
AS_ANOTHER = {"model_cards/spar-siglip2-all"}  # the same commands as another card, which a test of the cards asserts


def constant(test: str, name: str):
    """The value of a constant of a test module."""
    for node in ast.parse((ROOT / "tests" / test).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    pytest.fail(f"{test} has no constant {name}.")


def pages_that_are_run() -> set[str]:
    """The pages that tests run all blocks of, but those with a reason."""
    commands = {f"docs/{page}" for group in constant("docs/test_commands.py", "GROUPS") for page in group}
    cards = {f"model_cards/{name}" for name in constant("test_model_cards.py", "OFFICIAL")}
    return {*constant("docs/test_guides.py", "PAGES"), "docs/recipes", *commands, *cards, *AS_ANOTHER}


def fences(page: str) -> list[tuple[str, str]]:
    """Language of every block of a page, and the line above it."""
    found, inside, above = [], False, ""
    for line in Path(ROOT / f"{page}.md").read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            if not inside:
                found.append((line.strip().removeprefix("```"), above.strip()))
            inside = not inside
        above = line
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page):
    silent = [] if page in pages_that_are_run() else [block.text for block in blocks(page) if block.why is None]
    assert silent == [], f"{page}.md: run it in tests/docs, or put `<!-- not run: why -->` above"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_that_is_run_or_is_text(page):
    found = fences(page)
    assert len([language for language, _ in found if language in RUN]) == len(blocks(page))
    others = [(language, above) for language, above in found if language not in RUN]
    silent = [language for language, above in others if not re.fullmatch(r"<!-- not run: .+ -->", above)]
    assert set(silent) <= {"text"}


def test_there_are_blocks_of_both_kinds():
    every = [block for page in PAGES for block in blocks(page)]
    assert len(every) > 100 and 10 < len([block for block in every if block.why]) < len(every) / 2
