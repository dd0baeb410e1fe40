"""
How vocabularies are written, and which names a tokenizer can tell apart. The runtime without torch reads
words as the pipeline does, so this file imports neither torch nor transformers.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .templates import normalise_name, resolve_templates
from .vocabularies import STUFF_WORDS, VOCABULARIES, vocabulary_lines

if TYPE_CHECKING:
    import torch

UNKNOWN_NAMES = "The tokenizer knows none of the characters of {}. Results for such names are seldom right."
NAMES_AT_ONCE = 256  # that are tokenised: the tokenizer returns large lists of Python integers
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # of tokenizers that write unknown characters as bytes


CandidateLabels = str | Sequence[str | Sequence[str]] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Vocabulary:
    """
    Classes to look for, each with one or more names.

    Attributes:
        labels: one per class, used in results.
        names: per class, the words that are embedded.
    """

    labels: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]

    @property
    def all_names(self) -> list[str]:
        """Every name in the order of the classes; the rows of the text embeddings."""
        return [name for names in self.names for name in names]

    @property
    def name_to_class(self) -> "torch.Tensor":
        """The class of every name: `(names,)` int64."""
        import torch  # here, because the runtime reads vocabularies without it

        return torch.tensor(self.classes_of_names)

    @property
    def classes_of_names(self) -> list[int]:
        """The class of every name, as plain numbers."""
        return [label for label, names in enumerate(self.names) for _ in names]

    @classmethod
    def parse(cls, candidate_labels: "CandidateLabels | Vocabulary") -> "Vocabulary":
        r"""
        Parse candidate labels, in any of these forms:

        - A list with one string per class. Commas separate its names, `\,` is a comma: `["road", "car, automobile"]`.
        - A list of lists of names, which are never split: `[["road"], ["car", "automobile"]]`.
        - A dict maps labels to names: `{"vehicle": ["car", "bus"]}`.
        - A string is the name of a built-in vocabulary: `"ade20k"` (see `spar_hf/model/vocabularies.py`).

        Names are trimmed, and repeated names of a class dropped.

        Raises:
            ValueError: an unknown vocabulary; no classes; an empty name; two classes with the same label or name, ignoring
                case and spaces; anything but strings; a set, which has no order.

        Example:

        ```python
        >>> Vocabulary.parse(["road", "car, automobile"]).names
        (('road',), ('car', 'automobile'))
        ```"""
        if isinstance(candidate_labels, Vocabulary):
            return candidate_labels
        if isinstance(candidate_labels, str):
            name = candidate_labels.strip().lower()
            if name not in VOCABULARIES:
                raise ValueError(
                    f"{candidate_labels!r} is no vocabulary. Pass a list, names of one class separated by commas: "
                    f'["road", "car, automobile", "sky"]; or a built-in vocabulary: {", ".join(VOCABULARIES)}.'
                )
            candidate_labels = vocabulary_lines(name)
        if isinstance(candidate_labels, (set, frozenset)):
            raise ValueError(
                "A set has no order, so classes would have other numbers in every run. Pass `sorted(words)`."
            )
        if isinstance(candidate_labels, Mapping):
            entries = [(str(label).strip(), _names(names, split=False)) for label, names in candidate_labels.items()]
        elif isinstance(candidate_labels, Iterable):
            entries = [("", _names(item, split=True)) for item in candidate_labels]
        else:
            raise ValueError(
                f'Labels must be a list, ["road", "car, automobile"], a dict or the name of a vocabulary, got '
                f"{candidate_labels!r}."
            )
        if not entries:
            raise ValueError('No labels were given. Name at least one class, e.g. ["road", "sky"].')
        labels = []
        for label, names in entries:
            if not names or not all(names):
                raise ValueError(f"Class {label or names!r} has an empty name; every name needs a word.")
            labels.append(label or names[0])
        _refuse_twice(labels, "Labels must differ, but these stand twice")
        unique = [
            tuple({normalise_name(name): name for name in reversed(names)}.values())[::-1] for _, names in entries
        ]
        _refuse_twice(
            [name for names in unique for name in names],
            "Names must differ, but these stand for two classes or twice",
        )
        return cls(tuple(labels), tuple(unique))

    def other_stuff(self) -> list[str]:
        """The stuff words of the background in the published VOC21 evaluation, except those that are names of a class."""
        taken = {normalise_name(name) for name in self.all_names}
        return [word for word in STUFF_WORDS if normalise_name(word) not in taken]

    def with_background(self, background: str | Sequence[str], label: str = "background") -> "Vocabulary":
        """
        Add a background class of words that compete for every pixel.

        Args:
            background (`str` or `Sequence[str]`):
                Words. A word that is a label moves that class with all its names into the background; one that is another
                name of a class is left out. `"auto"`: those of `other_stuff`. (The pipeline also leaves out synonyms of
                classes, which only a model can tell.)
            label (`str`, *optional*, defaults to `"background"`):
                Label of the background class. If the vocabulary has it, the words are added to its names.

        Raises:
            ValueError: no words; an empty one; only words that are names of other classes; no class left beside the
                background.

        Example:

        ```python
        >>> vocabulary = Vocabulary.parse(["person", "sky", "tree"]).with_background(["sky", "wall"])
        >>> vocabulary.labels, vocabulary.names
        (('person', 'tree', 'background'), (('person',), ('tree',), ('sky', 'wall')))
        ```"""
        classes = dict(zip(self.labels, self.names, strict=True))
        own = next((given for given in classes if normalise_name(given) == normalise_name(label)), label)
        taken = {normalise_name(name) for name in self.all_names}
        if isinstance(background, str):
            background = self.other_stuff() if background == "auto" else [background]
        words = [str(word).strip() for word in background]
        if not words or not all(words):
            raise ValueError(
                f"The background needs words, got {list(background)}. Give some, or 'auto' for common stuff."
            )
        labels = {normalise_name(given): given for given in classes}
        names: list[str] = list(classes.get(own, ()))
        for word in words:
            given = labels.get(normalise_name(word))
            if given is None:
                names += [word] if normalise_name(word) not in taken else []
            elif given != own:
                names += classes.pop(given, ())
        if not names:
            raise ValueError(
                f"The background has no word of its own: {', '.join(words)} are names of other classes. Give other words, "
                "or the labels of the classes to move into the background."
            )
        classes[own] = tuple(names)  # keeps its position if the vocabulary had it
        if len(classes) == 1:
            raise ValueError(f"Every class is part of the background {words}; at least one must be left.")
        return Vocabulary.parse(classes)


def _refuse_twice(words: Sequence[str], complaint: str) -> None:
    """Raise `ValueError` if words occur twice after normalisation."""
    count = Counter(map(normalise_name, words))
    twice = sorted({word for word in words if count[normalise_name(word)] > 1})
    if twice:
        raise ValueError(f"{complaint}: {', '.join(twice)}. Merge or rename them.")


def _names(item: str | Sequence[str], split: bool) -> tuple[str, ...]:
    """The names of a class, trimmed; with `split` a string is split at its commas."""
    if isinstance(item, str):
        parts = re.split(r"(?<!\\),", item) if split else [item]
        return tuple(part.replace("\\,", ",").strip() for part in parts)
    if isinstance(item, Iterator):
        item = tuple(item)  # it can be read once only
    if isinstance(item, (set, frozenset)):
        raise ValueError(
            "A set has no order, so the class would have another label in every run. Pass `sorted(names)`."
        )
    if not isinstance(item, Iterable) or not all(isinstance(name, str) for name in item):
        raise ValueError(f"A class is a string or a list of strings, got {item!r}.")
    return tuple(name.strip() for name in item)


def distinct_names(
    tokenizer, vocabulary: Vocabulary, templates: str | Sequence[str], gives_way: str | None = None
) -> Vocabulary:
    """
    The vocabulary without names that the tokenizer cannot tell from another name of their class.

    Many tokenizers drop case, punctuation and invisible characters. Names with equal tokens have equal embeddings, so that
    one of two classes would get all pixels.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): that of the checkpoint.
        vocabulary ([`Vocabulary`]): classes and their names.
        templates (`str` or `Sequence[str]`): prompt templates. Names differ if their tokens differ in any of them.
        gives_way (`str`, *optional*): label of a class, the background, that loses names which another class has too.

    Raises:
        ValueError: two classes have names of the same tokens, or a name has no token.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from spar_hf import SPAR_TINY

    >>> vocabulary = Vocabulary.parse(["road, Road!", "sky"])
    >>> distinct_names(AutoTokenizer.from_pretrained(SPAR_TINY), vocabulary, "short").names
    (('road',), ('sky',))
    ```"""
    tokens = name_tokens(tokenizer, vocabulary.all_names, resolve_templates(templates))
    kept: dict[str, list[str]] = {label: [] for label in vocabulary.labels}
    owners: dict[Any, tuple[str, str]] = {}  # tokens -> label and name
    clashes = []
    # the class that gives way comes last, so that the names of all others are known
    for label, names in sorted(zip(vocabulary.labels, vocabulary.names, strict=True), key=lambda c: c[0] == gives_way):
        for name in names:
            owner, twin = owners.setdefault(tokens[name], (label, name))
            if twin == name:
                kept[label].append(name)
            elif label not in (owner, gives_way):
                clashes.append(f"{twin!r} of class {owner!r} and {name!r} of class {label!r}")
    if clashes:
        more = f", and {len(clashes) - 5} more" if len(clashes) > 5 else ""
        raise ValueError(
            f"These names have the same tokens, so the model cannot tell them apart: {'; '.join(clashes[:5])}{more}. "
            "Write them with other words (numbers or a word for a sign), or make them names of one class."
        )
    if gives_way is not None and not kept.get(gives_way, True):
        raise ValueError(
            f"The class {gives_way!r} has no word of its own: all have the tokens of other classes' names."
        )
    return Vocabulary(vocabulary.labels, tuple(tuple(kept[label]) for label in vocabulary.labels))


def name_tokens(tokenizer, names: Sequence[str], templates: Sequence[str]) -> dict[str, Any]:
    """
    A key for every name, equal for names whose prompts have equal tokens. Raises `ValueError` for names without a token.
    """
    words = list(dict.fromkeys(["", *names]))

    def tokens(template: str, some: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(ids) for ids in tokenizer([template.replace("{}", name) for name in some])["input_ids"]]

    # names that differ in one template need no look at the others, of which there may be 80
    keys: dict[str, Any] = dict(zip(words, tokens(templates[0], words), strict=True))
    count = Counter(keys.values())
    alike = [name for name in words if count[keys[name]] > 1]
    for template in templates[1:] if alike else ():
        for name, ids in zip(alike, tokens(template, alike), strict=True):
            keys[name] = hash((keys[name], ids))
    empty = [name for name in names if name and keys[name] == keys[""]]
    if empty:
        raise ValueError(
            f"The tokenizer has no token for {', '.join(map(repr, empty[:5]))}: the model cannot read it. Write it in words."
        )
    return keys


def unknown_names(tokenizer, names: Sequence[str]) -> list[str]:
    """
    The names that consist of unknown characters only, which the tokenizer writes as unknown or byte tokens. Text towers
    rarely understand them.
    """
    encoded = tokenizer(list(names), add_special_tokens=False)["input_ids"] if names else []
    unknown: dict[int, bool] = {}
    for token in {token for ids in encoded for token in ids}:
        text = str(tokenizer.convert_ids_to_tokens(token))
        decoded = tokenizer.decode([token])  # a byte of a longer character decodes to U+FFFD, a bare space to nothing
        unknown[token] = token == tokenizer.unk_token_id or bool(BYTE_TOKEN.fullmatch(text)) or "\ufffd" in decoded
        blank = not decoded.strip() and token not in tokenizer.all_special_ids
        if blank:
            unknown[token] = True
    return [name for name, ids in zip(names, encoded, strict=True) if ids and all(unknown[token] for token in ids)]


def some_of(names: Sequence[str]) -> str:
    """The first five names, for messages."""
    return f"{', '.join(map(repr, names[:5]))}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


def prompt_tokens(tokenizer, names: Sequence[str], templates: Sequence[str], limit: int) -> Iterator[list[list[int]]]:
    """
    Token ids of the prompts of names, padded to the text tower's length `limit`, for 256 names at once: all templates of the
    first name, then of the second, …

    Raises:
        ValueError: a prompt is longer than `limit`, or a name has no token.
    """
    name_tokens(tokenizer, names, templates)
    for start in range(0, len(names), NAMES_AT_ONCE):
        prompts = [
            template.replace("{}", name) for name in names[start : start + NAMES_AT_ONCE] for template in templates
        ]
        encoded = tokenizer(prompts, padding="max_length", max_length=limit, truncation=False)["input_ids"]
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) > limit:
                raise ValueError(
                    f"{prompt!r} has {len(ids)} tokens, but the text tower reads {limit}. Shorten the name."
                )
        yield encoded
