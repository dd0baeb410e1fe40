"""Cache of text embeddings per name and templates, emptied when the text tower changes; can be saved and loaded."""

import contextlib
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file, logging

from .background import MEANING_TEMPLATES
from .file_modes import follow_umask
from .fingerprints import checksum, quick_fingerprint, text_fingerprint, tokenizer_state
from .prompts import Vocabulary, distinct_names, embed_names
from .templates import TemplateChoice, read_templates, resolve_templates
from .words import normalise_name

MAX_NAMES = 50_000  # over all templates: 150 MB of 768-dimensional embeddings
MAX_REMEMBERED = 32  # results of `remember`
FORMAT = "spar text embeddings, 1"
STORED_EMBEDDINGS = "text_embeddings.safetensors"  # beside a checkpoint

logger = logging.get_logger(__name__)
Result = TypeVar("Result")
Block = tuple[list[str], tuple[str, ...]]  # names and the templates they are embedded with


def stored_embeddings(model) -> Path | None:
    """The file of text embeddings beside the checkpoint that a model was loaded from, in a folder or on the hub."""
    name = str(model.name_or_path or "")
    try:
        found = (
            cached_file(name, STORED_EMBEDDINGS, revision=getattr(model.config, "_commit_hash", None)) if name else None
        )
    except (OSError, ValueError):  # there is none, no network, or no checkpoint of that name
        return None
    return None if found is None else Path(found)


class TextEmbeddingCache:
    """
    Embeddings of names: each name is embedded once per set of templates, as long as text tower and tokenizer stay the same.

    Vocabularies share their names. Beyond `max_names`, the least recently used names are dropped. Threads may share it.

    Args:
        model ([`SparForOpenVocabSegmentation`]): its text tower embeds the names.
        tokenizer (`PreTrainedTokenizerBase`): that of the checkpoint.
        max_names (`int`, *optional*, defaults to 50,000): limit on the cached names, counted once per set of templates.
        stored (`Path`, *optional*): a file that `save` wrote, used from the first call on if it fits model and tokenizer.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from spar_hf import SPAR_TINY, SparForOpenVocabSegmentation
    >>> from spar_hf.model.text_embeddings import TextEmbeddingCache

    >>> model = SparForOpenVocabSegmentation.from_pretrained(SPAR_TINY)
    >>> cache = TextEmbeddingCache(model, AutoTokenizer.from_pretrained(SPAR_TINY))
    >>> cache.get(["road", "sky"], "plain").shape
    torch.Size([2, 192])
    >>> cache.save("words.safetensors", ["road", "sky"], "plain")
    >>> cache.load("words.safetensors")
    2
    ```"""

    def __init__(self, model, tokenizer, max_names: int = MAX_NAMES, stored: Path | None = None):
        self.model, self.tokenizer, self.max_names, self._stored = model, tokenizer, max_names, stored
        self._rows: OrderedDict[tuple[tuple[str, ...], str], torch.Tensor] = OrderedDict()
        self._remembered: OrderedDict[Hashable, Any] = OrderedDict()
        # what the rows were computed with; the objects are kept, so that no other one gets their address
        self._made_with: tuple | None = None
        self._checksum: int | None = None
        self._is_fixed = False
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}  # worker processes get a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()

    def get(self, names: Sequence[str], templates: Any = None, check_weights: bool = True) -> torch.Tensor:
        """
        Embeddings `(names, dim)`, float32 of unit length, on the model's device. Only names not cached yet are embedded.

        Args:
            names: words to embed.
            templates: as in [`embed_names`]; defaults to the checkpoint's.
            check_weights: whether to read all weights of the text tower to see whether they changed. Without, changes that
                PyTorch does not track (`weight.data[3] = …`) may be overlooked.

        Raises:
            ValueError: as [`embed_names`].
        """
        choice = read_templates(templates)
        if isinstance(choice, TemplateChoice):
            return torch.stack(choice.rows_of(names, lambda some, prompts: self.get(some, prompts, check_weights)))
        with self._lock:
            prompts = self._prompts(choice)
            self._forget_if_changed(check_weights)
            missing = [name for name in dict.fromkeys(names) if (prompts, name) not in self._rows]
            new = embed_names(self.model, self.tokenizer, missing, prompts) if missing else None
            # collected here first: a vocabulary may have more names than the cache holds
            rows = {} if new is None else {name: row.clone() for name, row in zip(missing, new, strict=True)}
            rows = {name: rows[name] if name in rows else self._rows[prompts, name] for name in names}
            self._keep(prompts, rows)
            return torch.stack([rows[name] for name in names]).to(self.model.device)

    def distinct(
        self, vocabulary: Vocabulary, templates: str | Sequence[str] | None = None, gives_way: str | None = None
    ) -> Vocabulary:
        """As [`distinct_names`] with the tokenizer of this cache; remembers the last vocabularies."""
        prompts = self._prompts(templates)
        return self.remember(
            ("distinct", vocabulary, prompts, gives_way),
            lambda: distinct_names(self.tokenizer, vocabulary, prompts, gives_way),
        )

    def remember(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """The result of `make`, kept under `key` until the text tower or the tokenizer changes; of the last 32 keys."""
        with self._lock:
            self._forget_if_changed(check_weights=False)
            if key not in self._remembered:
                self._remembered[key] = make()
            self._remembered.move_to_end(key)
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
            return self._remembered[key]

    def refresh(self) -> None:
        """Forget everything if any weight of the text tower, or the tokenizer, has changed."""
        with self._lock:
            self._forget_if_changed()

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """
        For the length of a `with` block, the caller says that nobody changes the text tower or the tokenizer: they are
        compared at its start and not for every image, which takes milliseconds for small towers, and 0.1 s per GB on CPUs.
        """
        with self._lock:
            self._forget_if_changed()
            before, self._is_fixed = self._is_fixed, True
        try:
            yield
        finally:
            self._is_fixed = before

    def save(self, path: str | os.PathLike, names: Sequence[str] | None = None, templates: Any = None) -> None:
        """
        Write embeddings to a safetensors file: the tensor `text_embeds` `(names, dim)`, and names, templates and the
        fingerprint of the text tower as metadata. `names` not cached yet are embedded; default: all cached names. Names
        with other templates of a [`TemplateChoice`] follow as `text_embeds_1`, …, and so do cached embeddings of bare
        words, which `background="auto"` and `presence` use.

        Raises:
            ValueError: no names given and none cached for these templates.
        """
        choice = read_templates(templates)
        if not isinstance(choice, TemplateChoice):
            choice = TemplateChoice(self._prompts(choice))
        with self._lock:
            self._forget_if_changed()
            groups: dict[tuple[str, ...], list[str]] = {}  # names by the templates that they share
            chosen = choice.by_name()
            for name in dict.fromkeys(names or [name for _, name in self._rows]):
                prompts = chosen.get(normalise_name(name), choice.default)
                if names or (prompts, name) in self._rows:
                    groups.setdefault(prompts, []).append(name)
            if not groups:
                raise ValueError(
                    "Nothing has been embedded with these templates yet. Segment an image first, or name the classes to "
                    "embed."
                )
            if choice.default != MEANING_TEMPLATES and (words := self._cached(MEANING_TEMPLATES)):
                groups[MEANING_TEMPLATES] = [*dict.fromkeys([*groups.get(MEANING_TEMPLATES, []), *words])]
            blocks = [(some, prompts) for prompts, some in groups.items()]
            tensors = {_tensor_name(i): self.get(*block).cpu().contiguous() for i, block in enumerate(blocks)}
        metadata = {
            "format": FORMAT,
            "names": json.dumps(blocks[0][0]),
            "templates": json.dumps(blocks[0][1]),
            "more": json.dumps(blocks[1:]),
            "fingerprint": text_fingerprint(self.model, self.tokenizer),
            "quick_fingerprint": self._quick_fingerprint(blocks),
        }
        target = Path(path)
        # short, since file systems limit the length of names
        temporary = target.with_name(f".{os.getpid()}-{threading.get_ident()}.partial")
        try:
            save_file(tensors, temporary, metadata=metadata)
            follow_umask(temporary)
            temporary.replace(target)
        except SafetensorError as error:  # a full disk, for example, which safetensors does not report as an OSError
            raise OSError(f"Cannot write {str(path)!r}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: str | os.PathLike) -> int:
        """
        Add the embeddings of a file written by `save` to the cache. Returns the number of its names.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, or one of another text tower, dtype or tokenizer.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{str(path)!r} does not exist. Write it with `save_text_embeddings`.")
        metadata, blocks, tensors = self._read(path)
        if metadata["fingerprint"] != text_fingerprint(self.model, self.tokenizer):
            raise ValueError(
                f"{str(path)!r} was made with another text tower, dtype or tokenizer, so its embeddings do not fit this "
                "model. Write it again with `save_text_embeddings` of this model."
            )
        with self._lock:
            self._forget_if_changed()
            self._keep_blocks(blocks, tensors)
        return len({name for names, _ in blocks for name in names})

    def _read(self, path: str | os.PathLike) -> tuple[dict[str, str], list[Block], list[torch.Tensor]]:
        """
        Metadata, blocks of names and their embeddings in a file.

        Raises:
            ValueError: another kind of file, a damaged one, or one whose tensors do not fit its names.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{str(path)!r} holds no text embeddings that `save_text_embeddings` wrote.")
                listed = [[json.loads(metadata["names"]), json.loads(metadata["templates"])]]
                listed += json.loads(metadata.get("more", "[]"))
                tensors = [file.get_tensor(_tensor_name(i)).float() for i in range(len(listed))]
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is not a safetensors file, or damaged: {error}. Write it again."
            ) from error
        blocks = [(names, tuple(templates)) for names, templates in listed]
        for (names, _), embeds in zip(blocks, tensors, strict=True):
            if embeds.shape != (len(names), self.model.config.projection_dim):
                raise ValueError(
                    f"{str(path)!r} holds embeddings of shape {tuple(embeds.shape)} for {len(names)} names."
                )
        return metadata, blocks, tensors

    def _read_stored(self) -> None:
        """Take the embeddings of the file beside the checkpoint, if they were made with these weights and this tokenizer."""
        path, self._stored = self._stored, None
        if path is None:
            return
        try:
            metadata, blocks, tensors = self._read(path)
        except (OSError, ValueError, KeyError) as error:  # results need no file, so a damaged one stops nothing
            logger.warning(f"Text embeddings beside the checkpoint are not used: {error}")
            return
        if metadata.get("quick_fingerprint") == self._quick_fingerprint(blocks):
            self._keep_blocks(blocks, tensors)
        else:
            logger.info(f"{path} was made with other weights, another dtype or another tokenizer, and is not used.")

    def _quick_fingerprint(self, blocks: Sequence[Block]) -> str:
        """
        SHA-256 of a sum of all weights of the text tower, the settings of the tokenizer and its tokens of the names: what
        their embeddings depend on. It takes milliseconds where [`text_fingerprint`] takes up to a second.
        """
        digest = hashlib.sha256(f"{checksum(self.model.text_model)} {tokenizer_state(self.tokenizer)}".encode())
        for names, templates in blocks:
            texts = [templates[0].replace("{}", name) for name in names]
            digest.update(json.dumps(self.tokenizer(texts)["input_ids"]).encode())
        return digest.hexdigest()

    def _cached(self, prompts: tuple[str, ...]) -> list[str]:
        """The names that are cached for these templates."""
        return [name for kept, name in self._rows if kept == prompts]

    def _keep_blocks(self, blocks: Sequence[Block], tensors: Sequence[torch.Tensor]) -> None:
        for (names, prompts), embeds in zip(blocks, tensors, strict=True):
            rows = embeds.to(self.model.device)
            self._keep(prompts, {name: row.clone() for name, row in zip(names, rows, strict=True)})

    def are_own(self, templates: Any) -> bool:
        """Whether templates are those of the checkpoint, for every name."""
        choice = read_templates(templates)
        return not getattr(choice, "names", None) and self._prompts(choice) == self._prompts(None)

    def _prompts(self, templates: str | Sequence[str] | None) -> tuple[str, ...]:
        return resolve_templates(self.model.config.templates if templates is None else templates)

    def _keep(self, prompts: tuple[str, ...], rows: dict[str, torch.Tensor]) -> None:
        for name, row in rows.items():
            self._rows[prompts, name] = row
            self._rows.move_to_end((prompts, name))
        while len(self._rows) > self.max_names:
            self._rows.popitem(last=False)

    def _forget_if_changed(self, check_weights: bool = True) -> None:
        if self._is_fixed:
            return
        text_model = self.model.text_model
        made_with = (self.tokenizer, tokenizer_state(self.tokenizer), text_model, quick_fingerprint(text_model))
        if made_with != self._made_with:
            self._rows.clear()
            self._remembered.clear()
            self._made_with, self._checksum = made_with, None
        if check_weights:
            total = checksum(text_model)
            if total != self._checksum and self._checksum is not None:
                self._rows.clear()
                self._remembered.clear()
            self._checksum = total
        self._read_stored()


def _tensor_name(block: int) -> str:
    return f"text_embeds_{block}" if block else "text_embeds"
