"""Text that any terminal can show."""

import sys
import unicodedata
from typing import TextIO

# marks that change the direction of the text after them, and so hide what it says
DIRECTIONS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def is_harmful(letter: str) -> bool:
    """Whether a character controls a terminal, turns the direction of writing, or is half of a surrogate pair."""
    return letter in DIRECTIONS or (unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t")


def printable(text: str, stream: TextIO | None = None) -> str:
    r"""
    Text that does nothing to a terminal and that its encoding can show: control characters, marks that turn the direction
    of writing, and characters that the stream lacks are written as escapes. Line breaks and tabs stay.

    Example:

    ```python
    >>> print(printable("red \x1b[31m road"))
    red \x1b[31m road
    ```"""

    def escaped(letter: str) -> str:
        return letter.encode("unicode_escape").decode() if is_harmful(letter) else letter

    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return "".join(map(escaped, text)).encode(encoding, "backslashreplace").decode(encoding)
