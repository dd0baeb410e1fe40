"""Exported folders: what their records say, and which graph to run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "spar_export.json"
FORMAT_VERSION = 1
DTYPES = ("fp32", "fp16", "bf16", "int8")
NO_EXPORT = "Write it with `spar-hf export MODEL --format onnx --head classmap --output DIR`."


@dataclass(frozen=True)
class ExportedFolder:
    """
    A folder that `spar-hf export` wrote.

    Attributes:
        path: of the folder.
        record: what the export says about its graphs.
        image_settings: the image processor's configuration.
    """

    path: Path
    record: dict[str, Any]
    image_settings: dict[str, Any]

    @classmethod
    def open(cls, path: Any) -> "ExportedFolder":
        """
        Read the record and the image processor's configuration.

        Raises:
            FileNotFoundError: no such folder, or no export in it.
            ValueError: a damaged file, or the record of a newer version.
        """
        folder = Path(path)
        if not (folder / RECORD).is_file():
            what = "has no spar_export.json, so it is no export" if folder.is_dir() else "is no folder"
            raise FileNotFoundError(f"{str(path)!r} {what}. {NO_EXPORT}")
        record = read_json(folder / RECORD)
        if record.get("format_version", 0) > FORMAT_VERSION:
            raise ValueError(f"{str(path)!r} was written by a newer spar-hf: `pip install --upgrade spar-hf`.")
        return cls(folder, record, read_json(folder / "preprocessor_config.json"))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.record["patch_size"])

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Labels of the classes that are part of the graph; `None` if words are an input."""
        classes = self.record.get("classes")
        return None if classes is None else tuple(entry["label"] for entry in classes)

    @property
    def background(self) -> int:
        """Number of the background's class among `labels`; -1: there is none."""
        number = self.record.get("background")
        return -1 if number is None else int(number)

    @property
    def background_hidden(self) -> bool:
        """Whether segments leave the background out: it is none of the classes that were asked for."""
        return self.background >= 0 and self.record.get("background_hidden") is not False  # older exports do not say it

    def graph(self, engine: str, dtype: str | None) -> tuple[Path, str]:
        """
        The file of the vision graph for an engine, and the dtype that it is computed in.

        Args:
            engine: ONNX Runtime reads `.onnx` only.
            dtype: one of `DTYPES`; by default the first of them that there is.

        Raises:
            FileNotFoundError: the folder has no such graph.
            ValueError: an unknown dtype.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"Unknown dtype {dtype!r}; use {', '.join(map(repr, DTYPES))} or None.")
        graphs = {kind: file for kind, file in self.record["graphs"].items() if is_readable(engine, file)}
        kind = next((kind for kind in ([dtype] if dtype else DTYPES) if kind in graphs), None)
        if kind is None and dtype == "bf16" and engine == "openvino" and "fp32" in graphs:
            return self.file(graphs["fp32"]), dtype  # computed in bfloat16 from weights in float32
        if kind is None:
            found = ", ".join(f"{file} ({kind})" for kind, file in self.record["graphs"].items())
            raise FileNotFoundError(
                f"{str(self.path)!r} has no graph for engine={engine!r} and dtype={dtype!r}, only {found}. Take another "
                f"engine or dtype, or export `--format {'openvino' if engine == 'openvino' else 'onnx'}` with the dtype."
            )
        return self.file(graphs[kind]), kind

    def text_graph(self, engine: str) -> Path:
        """
        The file of the text tower.

        Raises:
            FileNotFoundError: there is none that the engine reads.
        """
        file = self.record.get("text_graph")
        if file is None or not is_readable(engine, file):
            raise FileNotFoundError(
                f"{str(self.path)!r} has no text tower for {engine}, so it embeds no words. {NO_EXPORT}"
            )
        return self.file(file)

    def file(self, name: str) -> Path:
        """
        A file that the record names.

        Raises:
            FileNotFoundError: it is missing.
        """
        if not (self.path / name).is_file():
            raise FileNotFoundError(f"{str(self.path / name)!r} is missing. Copy the export again, or repeat it.")
        return self.path / name


def is_readable(engine: str, file: str) -> bool:
    """Whether an engine reads a file of this name."""
    return file.endswith((".onnx", ".xml") if engine == "openvino" else ".onnx")


def read_json(path: Path) -> dict[str, Any]:
    """
    An object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(path)!r} is missing. Copy the export again, or repeat it.") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}. Copy the export again, or repeat it.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object. Copy the export again, or repeat it.")
    return found
