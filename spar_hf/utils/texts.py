"""Text files as people write them, and text that any file can hold."""

import codecs
import json
import os
from pathlib import Path
from typing import Any

from spar_hf.utils.errors import UsageError


def read_text(path: str | os.PathLike) -> str:
    """
    Read a text file in UTF-8, or in UTF-16 with a byte order mark, as some editors and consoles of Windows write it. The
    mark is dropped.

    Raises:
        UsageError: another encoding.
        OSError: the file cannot be read.

    Example:

    ```python
    >>> _ = Path("classes.txt").write_text("road", encoding="utf-8-sig")
    >>> read_text("classes.txt")
    'road'
    ```"""
    return decode_text(Path(path).read_bytes(), os.fspath(path))


def decode_text(data: bytes, name: str) -> str:
    """
    The text of a file's bytes, see [`read_text`].

    Raises:
        UsageError: another encoding; `name` is that of the file.
    """
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf_16 else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name!r} is no UTF-8 text ({error}). Save it as UTF-8.") from error


def read_yaml(path: str | os.PathLike) -> Any:
    """
    What a YAML file holds; `None` if it is empty.

    Raises:
        UsageError: it is no YAML, or has another encoding than [`read_text`] knows.
        OSError: the file cannot be read.

    Example:

    ```python
    >>> _ = Path("recipe.yaml").write_text("images: [photos")
    >>> read_yaml("recipe.yaml")
    Traceback (most recent call last):
    spar_hf.utils.errors.UsageError: recipe.yaml, line 1: expected ',' or ']', but got '<stream end>'. Write YAML: ...
    ```"""
    import yaml  # of the extra `train`; the other functions need nothing

    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        reason = getattr(error, "problem", None) or error
        raise UsageError(
            f"{os.fspath(path)}{place}: {reason}. Write YAML: `name: value` on each line, lists as `[a, b]`, and quotes "
            "around text with : or #."
        ) from error


def storable(text: str) -> str:
    """Text without the bytes of file names that are no UTF-8, which Python keeps as lone surrogates: they become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def json_text(value: Any, indent: int | None = None) -> str:
    """
    JSON with a line break at its end. Letters stay readable, except where a file name is no UTF-8: then all others are
    escaped too, and Python reads the same name back.

    Example:

    ```python
    >>> json_text({"image": "Straße.png"}), json_text({"image": "caf\\udce9.png"})
    ('{"image": "Straße.png"}\\n', '{"image": "caf\\\\udce9.png"}\\n')
    ```"""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    return text + "\n"
