"""Pieces that all cards of models and Spaces share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CardData


def short_name(path: str | Path) -> str:
    """
    How a record names a model or data set: a hub id as it is, of a path the last two parts. A card must not name the
    folders of one machine.

    Example:

    ```python
    >>> short_name("/home/me/runs/student"), short_name("google/siglip2-base-patch16-512")
    ('runs/student', 'google/siglip2-base-patch16-512')
    ```"""
    return "/".join(Path(path).parts[-2:])


def rows(values: Mapping[str, Any]) -> str:
    """
    The body of a two-column Markdown table.

    Example:

    ```python
    >>> print(rows({"steps": 10, "seed": 0}))
    | steps | 10 |
    | seed | 0 |
    ```"""
    return "\n".join(f"| {key} | {value} |" for key, value in values.items())


def model_card(title: str, text: str, data: CardData) -> str:
    """
    A card: front matter for the hub, a title, and the text.

    Example:

    ```python
    >>> from huggingface_hub import ModelCardData
    >>> print(model_card("student", "A SPAR student.", ModelCardData(library_name="transformers")))
    ---
    library_name: transformers
    ---
    # student
    <BLANKLINE>
    A SPAR student.
    <BLANKLINE>
    ```"""
    return f"---\n{data.to_yaml()}\n---\n# {title}\n\n{text.strip()}\n"
