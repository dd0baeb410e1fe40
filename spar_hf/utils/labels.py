"""Classes as people type them: `"road; car, automobile; sky"`, the name of a vocabulary, or `@FILE`."""

from difflib import get_close_matches

from spar_hf.model.background import empty_background
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.vocabularies import VOCABULARIES
from spar_hf.utils.errors import UsageError
from spar_hf.utils.texts import read_text, storable


def parse_labels(text: str | None) -> Vocabulary:
    """
    Parse classes separated by `;` or line breaks, with `,` between the names of one class, or the name of a built-in
    vocabulary.

    Raises:
        ValueError: no class, or two classes of the same label.

    Example:

    ```python
    >>> parse_labels("road; car, automobile").labels
    ('road', 'car')
    >>> len(parse_labels("ade20k").labels)
    150
    ```"""
    if text and storable(text) != text:
        raise UsageError(f"The words {storable(text)!r} are no UTF-8. Write them in a UTF-8 file and name it as @FILE.")
    classes = [part.strip() for part in (text or "").replace("\n", ";").split(";") if part.strip()]
    built_in = len(classes) == 1 and classes[0].lower() in VOCABULARIES
    return Vocabulary.parse(classes[0] if built_in else classes)


def read_labels(labels: str) -> Vocabulary:
    """
    Parse the option `--labels`, which [`parse_labels`] and [`label_text`] describe.

    Raises:
        ValueError: no class, two classes of the same label, or no such file.
    """
    return parse_labels(label_text(labels))


def label_text(labels: str) -> str:
    """
    What an option of classes says, for [`parse_labels`]: the lines of the file if it is `@FILE`, a UTF-8 text file with a
    class per line, without lines that begin with `#`; otherwise the option itself.

    Raises:
        UsageError: no such file, or no UTF-8.
    """
    if not labels.startswith("@"):
        return labels
    try:
        lines = read_text(labels[1:]).splitlines()
    except (OSError, UsageError) as error:
        raise UsageError(
            f"Cannot read the labels in {labels[1:]!r}: {error}. It must be a UTF-8 text file with a class per line."
        ) from error
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def parse_background(text: str, vocabulary: Vocabulary, rules: bool) -> str | None:
    """
    The pipeline's `background` from the option: `none` is `None`, unless a class is called so.

    Args:
        text: the option.
        vocabulary: the classes.
        rules: whether there is a threshold or another rule that moves pixels to the background.

    Raises:
        UsageError: a background that no pixel gets.
    """
    if text == "none" and text not in vocabulary.labels:
        return None
    if not rules and (problem := empty_background(vocabulary.labels, text)):
        raise UsageError(problem)
    return text


def single_class_hint(labels: str, vocabulary: Vocabulary) -> str:
    """
    What was probably meant by one class alone; empty if nothing speaks against it.

    Example:

    ```python
    >>> single_class_hint("ade20", parse_labels("ade20"))
    'ade20 is taken for a word. Did you mean the built-in ade20k?'
    >>> single_class_hint("road, sky", parse_labels("road, sky"))
    'road, sky are names of one class. Separate classes by ";": "road; sky".'
    ```"""
    if len(vocabulary.labels) > 1:
        return ""
    if near := get_close_matches(labels.strip().lower(), VOCABULARIES, 1):
        return f"{vocabulary.labels[0]} is taken for a word. Did you mean the built-in {near[0]}?"
    if len(vocabulary.all_names) == 1:
        return ""
    return f'{", ".join(vocabulary.all_names[:5])} are names of one class. Separate classes by ";": "road; sky".'
