"""What visitors of the page give it: uploads and words, which are not trusted, and errors without paths of this computer."""

import atexit
import html
import math
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

from PIL import Image

from spar_hf.model.image_input import ImageRange, TooManyPixels, open_image, to_rgb, turn_upright
from spar_hf.model.prompts import Vocabulary
from spar_hf.utils.errors import UsageError
from spar_hf.utils.labels import parse_labels

MAX_UPLOAD = 64 * 2**20  # bytes of a file
MAX_PIXELS = 50_000_000  # of an image
MAX_LETTERS = 20_000  # in the field of words
MAX_NAMES = 1000  # in a vocabulary
NOT_UPLOADED = "The image must be uploaded on this page. Drop one on the left, or click there to choose a file."


@cache
def upload_folder() -> Path:
    """
    A folder for uploads and pictures of the pages of this process, removed when it ends. Gradio's own is shared with all
    other pages on this computer.
    """
    folder = tempfile.mkdtemp(prefix="spar-hf-app-", dir=os.environ.get("GRADIO_TEMP_DIR") or None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder).resolve()


def read_upload(path: str | None, image_range: ImageRange | None = None) -> Image.Image:
    """
    Read an uploaded image as upright RGB; `image_range` says what is black and white where it has more than 8 bits. The path
    comes from the browser, or from anyone who imitates one: URLs and files outside the folder of uploads are refused, all
    with the same words, so that nobody learns which files exist.

    Raises:
        UsageError: no upload, or a file of too many bytes.
        ValueError: as [`decode_upload`].
    """
    if not path:
        raise UsageError("There is no image yet. Drop one on the left, or click there to choose a file.")
    try:
        file = Path(path).resolve()
        inside = file.is_relative_to(upload_folder()) and file.is_file()
    except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links, a name that is too long
        inside = False
    if not inside:
        raise UsageError(NOT_UPLOADED)
    if file.stat().st_size > MAX_UPLOAD:
        raise UsageError(f"The file is larger than {MAX_UPLOAD >> 20} MB. Reduce the image and upload it again.")
    return decode_upload(file, image_range=image_range)


def decode_upload(
    source: bytes | Path, max_pixels: int = MAX_PIXELS, image_range: ImageRange | None = None
) -> Image.Image:
    """
    Decode an uploaded image to upright RGB. Its size is known, and limited, before any pixel is decoded.

    Raises:
        UsageError: too many pixels.
        ValueError: no image, or a damaged one.
    """
    try:
        image, name = open_image(source, urls=False)
    except TooManyPixels:
        pixels = math.inf
    else:
        pixels = image.width * image.height
    if pixels > max_pixels:
        limit = f"{max_pixels / 1e6:g} million pixels"
        raise UsageError(f"The image has more than {limit}. Reduce it and upload it again.")
    return to_rgb(turn_upright(image, name), image_range)


def read_words(words: str) -> Vocabulary:
    """
    Parse the field of words.

    Raises:
        ValueError: as [`parse_labels`], or too many words.
    """
    if len(words or "") > MAX_LETTERS:
        raise UsageError(f"The words have more than {MAX_LETTERS:,} letters. Name fewer classes.")
    vocabulary = parse_labels(words)
    if len(vocabulary.all_names) > MAX_NAMES:
        raise UsageError(f"There are more than {MAX_NAMES:,} names. Name fewer classes.")
    return vocabulary


def without_folder(text: str) -> str:
    """A message without the folder of the uploads on this computer."""
    return re.sub(re.escape(str(upload_folder())) + r"[/\\]*([0-9a-f]{32,}[/\\]+)?", "", text)


def alert(error: Exception) -> str:
    """An error as HTML."""
    return f'<p class="spar-error" role="alert">{html.escape(without_folder(str(error)))}</p>'
