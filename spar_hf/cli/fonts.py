"""Fonts for legends: one that has the letters of a label, among those installed."""

import importlib.util
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import ImageFont

logger = logging.getLogger(__name__)

SUFFIXES = (".ttf", ".otf", ".ttc")
STYLES = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "thin", "black")  # tried last
NOT_A_CHARACTER = "\U0010ffff"  # no font has it, so it is drawn as any missing letter
# first word of a letter's Unicode name -> font; other scripts have a Noto Sans of their name
FONTS = {"CJK": "Noto Sans CJK", "HIRAGANA": "Noto Sans CJK", "KATAKANA": "Noto Sans CJK", "HANGUL": "Noto Sans CJK"}


def font_folders() -> list[Path]:
    """The folders of installed fonts, and of the DejaVu fonts that matplotlib brings."""
    home = Path.home()
    if sys.platform == "win32":
        folders = [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"]
        folders += [Path(os.environ.get("LOCALAPPDATA", home)) / "Microsoft/Windows/Fonts"]
    elif sys.platform == "darwin":
        folders = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    else:
        data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        own = os.environ.get("XDG_DATA_HOME") or home / ".local/share"
        folders = [Path(folder) / "fonts" for folder in [own, *data.split(":")]] + [home / ".fonts"]
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin:
        folders.append(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf")
    return folders


@cache
def font_files() -> list[Path]:
    """The installed font files, plain styles first, DejaVu Sans before all others."""
    found = [
        Path(parent) / name
        for folder in font_folders()
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith("LastResort")  # draws the name of a script
    ]
    style = {path: any(word in path.stem.lower() for word in STYLES) for path in found}
    return sorted(found, key=lambda path: (path.stem != "DejaVuSans", style[path], path.name))


def fonts(size: int) -> Iterator[ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Pillow's own font, then the installed ones, in a size in pixels."""
    yield ImageFont.load_default(size)
    for path in font_files():
        try:
            yield ImageFont.truetype(path, size)
        except OSError:  # no font, or one of bitmaps
            continue


def missing_letters(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> str:
    """
    The letters of a text that a font does not have, each once.

    Example:

    ```python
    >>> missing_letters(ImageFont.load_default(12), "road 道路")
    '道路'
    ```"""
    missing = bytes(font.getmask(NOT_A_CHARACTER))
    shown = (letter for letter in text if letter.isprintable() and not letter.isspace())
    letters = dict.fromkeys(letter for letter in shown if unicodedata.category(letter) != "Mn")  # accents and the like
    return "".join(letter for letter in letters if bytes(font.getmask(letter)) == missing)


@cache
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """
    The first font that has all letters of a text, else the one that lacks the fewest; then a warning names a font to
    install.
    """
    best, least = ImageFont.load_default(size), text
    for font in fonts(size):
        missing = missing_letters(font, text)
        if not missing:
            return font
        if len(missing) < len(least):
            best, least = font, missing
    warn_of(least[0])
    return best


@cache
def warn_of(letter: str) -> None:
    """Say once that no installed font has a letter, and which font has it."""
    logger.warning("No installed font has the letter %r of the legend. Install %s.", letter, font_name(letter))


def font_name(letter: str) -> str:
    """
    A font that has a letter.

    Example:

    ```python
    >>> font_name("道"), font_name("क"), font_name("🐶")
    ('Noto Sans CJK', 'Noto Sans Devanagari', 'Noto Emoji')
    ```"""
    if not letter.isalpha():
        return "Noto Emoji"
    script = unicodedata.name(letter, "").partition(" ")[0]
    return FONTS.get(script) or f"Noto Sans {script.title()}".strip()
