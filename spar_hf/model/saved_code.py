"""The code that a saved folder carries for `trust_remote_code=True`."""

import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files


def find_code(reference: str, folders: list[Path]) -> dict[str, Path]:
    """The module of `"module.Class"` and the siblings it imports, by file name, from the first folder that has them all."""
    for folder in folders:
        module = folder / f"{reference.split('.')[0]}.py"
        try:
            return {Path(file).name: Path(file) for file in (str(module), *get_relative_import_files(module))}
        except FileNotFoundError:
            continue
    return {}


def saved_code(model: Any) -> tuple[dict[str, str], dict[str, dict[str, Any]], dict[str, Path]]:
    """
    `auto_map` and `custom_pipelines` of the folder a model is saved to, and the code files they need, by name.

    Code loaded from a checkpoint's folder lies in a cache that may not have all of its files, so the folder itself is
    searched too. Entries whose code is nowhere are left out.
    """
    folders = [Path(__file__).parent, *([Path(model.name_or_path)] if model.name_or_path else [])]
    auto_map: dict[str, str] = {}
    pipelines: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    for auto_class, reference in model._auto_map.items():
        if found := find_code(reference, folders):
            auto_map[auto_class] = reference
            files.update(found)
    for task, pipeline in model._custom_pipelines.items():
        if found := find_code(pipeline["impl"], folders):
            pipelines[task] = pipeline
            files.update(found)
    return auto_map, pipelines, files


def copy_code(files: dict[str, Path], folder: Path) -> None:
    """Copy code files into a folder, unless they are those of the folder."""
    for name, path in files.items():
        if path.resolve() != (folder / name).resolve():
            shutil.copyfile(path, folder / name)
