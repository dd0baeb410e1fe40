"""Words to embeddings with an exported text tower and the `tokenizers` package."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from logging import getLogger
from typing import Any

import numpy as np

from spar_hf.model.templates import TemplateChoice, read_templates, resolve_templates
from spar_hf.model.words import UNKNOWN_NAMES, Vocabulary, distinct_names, prompt_tokens, some_of, unknown_names
from spar_hf.runtime.engines import Graph
from spar_hf.runtime.folders import ExportedFolder, read_json

logger = getLogger(__name__)

MAX_NAMES = 50_000  # over all templates
PROMPTS_AT_ONCE = 256
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ExportedTokenizer:
    """
    The tokenizer of an exported folder, with what `spar_hf.model.words` asks of a tokenizer of transformers.

    Raises:
        ImportError: the package `tokenizers` is not installed.
    """

    def __init__(self, folder: ExportedFolder):
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise ImportError("Words need the package tokenizers: pip install 'spar-hf[onnx]'") from error
        settings = read_json(folder.path / "tokenizer_config.json")
        tokens = {kind: settings[kind] for kind in SPECIAL_TOKENS if settings.get(kind) is not None}
        # saved as text, or as an object with the text and how it is matched
        texts = {kind: token["content"] if isinstance(token, dict) else token for kind, token in tokens.items()}
        self.tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        ids = {kind: self.tokenizer.token_to_id(text) for kind, text in texts.items()}
        self.unk_token_id, self.all_special_ids = ids.get("unk_token"), set(ids.values())
        self.pad_token_id = int(folder.record["text"]["pad_token_id"])
        self.pads_left = folder.record["text"]["padding_side"] == "left"

    def __call__(
        self,
        texts: Sequence[str],
        padding: str | None = None,
        max_length: int = 0,
        truncation: bool = False,
        add_special_tokens: bool = True,
    ) -> dict[str, list[list[int]]]:
        """`input_ids` per text; with `padding="max_length"` filled up to `max_length`. Nothing is ever cut off."""
        rows = [
            encoded.ids for encoded in self.tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        ]
        if padding == "max_length":
            filled = [[self.pad_token_id] * (max_length - len(row)) for row in rows]
            rows = [pad + row if self.pads_left else row + pad for row, pad in zip(rows, filled, strict=True)]
        return {"input_ids": rows}

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """The text of a token."""
        return self.tokenizer.id_to_token(token)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that tokens stand for."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)


class ExportedTexts:
    """
    Embeddings of names, each computed once per set of templates: what [`TextEmbeddingCache`] is to the pipeline.

    Graph and tokenizer are opened when words are first asked for.
    """

    def __init__(self, folder: ExportedFolder, engine: str, threads: int | None):
        self.folder, self.engine, self.threads = folder, engine, threads
        self._rows: OrderedDict[tuple[tuple[str, ...], str], np.ndarray] = OrderedDict()
        self._remembered: dict[Hashable, Any] = {}
        self._lock = threading.RLock()

    @cached_property
    def graph(self) -> Graph:
        """The text tower."""
        return Graph(self.folder.text_graph(self.engine), self.engine, self.threads)

    @cached_property
    def tokenizer(self) -> ExportedTokenizer:
        """The folder's tokenizer."""
        return ExportedTokenizer(self.folder)

    def prompts(self, templates: str | Sequence[str] | None) -> tuple[str, ...]:
        """Templates, those of the model by default."""
        return resolve_templates(self.folder.record["text"]["templates"] if templates is None else templates)

    def get(
        self, names: Sequence[str], templates: str | Sequence[str] | None = None, check_weights: bool = False
    ) -> np.ndarray:
        """
        Embeddings `(names, dim)`, float32 of unit length. `check_weights` is for the weights of a model, which may change; a
        graph does not.

        Raises:
            ValueError: a prompt is longer than the text tower reads, or a name has no token.
        """
        choice = read_templates(templates)
        if isinstance(choice, TemplateChoice):
            return np.stack(choice.rows_of(names, lambda some, prompts: self.get(some, prompts)))
        prompts = self.prompts(choice)
        with self._lock:
            missing = [name for name in dict.fromkeys(names) if (prompts, name) not in self._rows]
            rows = dict(zip(missing, self.embed(missing, prompts), strict=True)) if missing else {}
            rows = {name: rows[name] if name in rows else self._rows[prompts, name] for name in names}
            for name, row in rows.items():
                self._rows[prompts, name] = row
                self._rows.move_to_end((prompts, name))
            while len(self._rows) > MAX_NAMES:
                self._rows.popitem(last=False)
        return np.stack([rows[name] for name in names])

    def embed(self, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """The mean of the normalised embeddings of a name's prompts, normalised again: `(names, dim)`."""
        if unknown := unknown_names(self.tokenizer, names):
            logger.warning(UNKNOWN_NAMES.format(some_of(unknown)))
        limit = int(self.folder.record["text"]["max_tokens"])
        rows = [row for part in prompt_tokens(self.tokenizer, names, templates, limit) for row in part]
        ids = np.array(rows, dtype=np.int64)
        parts = range(0, len(ids), PROMPTS_AT_ONCE)
        found = [self.graph(input_ids=ids[i : i + PROMPTS_AT_ONCE])["text_embeds"] for i in parts]
        mean = np.concatenate(found).reshape(len(names), len(templates), -1).mean(1)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    def distinct(
        self, vocabulary: Vocabulary, templates: str | Sequence[str] | None = None, gives_way: str | None = None
    ) -> Vocabulary:
        """As [`distinct_names`] with this tokenizer."""
        prompts = self.prompts(templates)
        key = ("distinct", vocabulary, prompts, gives_way)
        return self.remember(key, lambda: distinct_names(self.tokenizer, vocabulary, prompts, gives_way))

    def remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, kept under `key`; of the last 32 keys."""
        with self._lock:
            if key not in self._remembered:
                self._remembered[key] = make()
            while len(self._remembered) > 32:
                del self._remembered[next(iter(self._remembered))]
            return self._remembered[key]
