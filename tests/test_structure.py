"""The rooms of the library: who may import whom, what travels with a checkpoint, and how long a file may be."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "spar_hf"
# Room: the rooms it may import. "spar_hf" is `from spar_hf import NAME`, which runs the registration.
BELOW_TRAINING = {"spar_hf", "registration", "model", "windows", "teacher", "utils", "data"}
ROOMS = {
    "model": set(),
    "windows": set(),
    "teacher": {"model", "windows"},
    "registration": {"model", "teacher"},
    "utils": {"model"},
    "conversion": {"model", "utils"},
    "runtime": {"model"},
    "export": {"spar_hf", "registration", "model", "utils", "runtime"},
    "batch": {"spar_hf", "registration", "model", "teacher", "utils"},
    "data": {"model", "utils"},
    "distillation": BELOW_TRAINING,
    "evaluation": BELOW_TRAINING,
    "pretraining": BELOW_TRAINING,
    "heads": {*BELOW_TRAINING, "distillation", "evaluation"},
    "doctor": {*BELOW_TRAINING, "conversion", "evaluation"},
}
ROOMS["cli"] = {"spar_hf", *ROOMS}
# What transformers installs or we require: a checkpoint's own code may ask for nothing else.
TRAVELS_WITH = {"torch", "transformers", "tokenizers", "safetensors", "PIL", "numpy"}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(file: Path) -> list[tuple[str, int, ast.stmt]]:
    """Modules that a file imports, also inside functions: full name, level of a relative import, statement."""
    package = file.relative_to(ROOT).parent.parts
    found: list[tuple[str, int, ast.stmt]] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            # `from spar_hf import model` names a room, `from .model import x` has it in front
            found += [(f"{module}.{alias.name}", node.level, node) for alias in node.names]
    return found


def room_of(module: str) -> str:
    """`spar_hf.data.order` -> `data`; a public name, as in `from spar_hf import SparConfig` -> `spar_hf`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "spar_hf"


def where(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@pytest.mark.parametrize("file", files(LIBRARY), ids=lambda file: str(file.relative_to(LIBRARY)))
def test_a_room_imports_only_rooms_below(file):
    inside = file.relative_to(LIBRARY).with_suffix("").parts
    if inside == ("__init__",):
        room, allowed = "spar_hf", {"registration", "model", "teacher"}
    else:
        room = inside[0]
        assert room in ROOMS, f"{file}: add the new room {room!r} and what it may import to ROOMS in {__file__}"
        allowed = ROOMS[room]
    for module, _, node in imports(file):
        if module.split(".")[0] == "spar_hf":
            target = room_of(module)
            assert target == room or target in allowed, f"{where(file, node)}: {room} must not import {target}"


@pytest.mark.parametrize("file", files(LIBRARY / "model"), ids=lambda file: file.name)
def test_code_that_travels_with_a_checkpoint_stands_alone(file):
    """
    Transformers copies these files by the text of their imports: siblings must be `from .name import …`, also inside
    functions, and nothing may be needed that a user of transformers has not got.
    """
    for module, level, node in imports(file):
        top = module.split(".")[0]
        if level:
            assert level == 1 and isinstance(node, ast.ImportFrom) and node.module, f"{where(file, node)}: one dot"
            sibling = LIBRARY / "model" / f"{node.module}.py"
            assert sibling.is_file(), f"{where(file, node)}: {sibling.name} is no file of spar_hf/model"
        elif top == "scipy":
            assert node.col_offset > 0, f"{where(file, node)}: SciPy is optional: import it inside a function"
        else:
            assert top in TRAVELS_WITH or top in sys.stdlib_module_names, f"{where(file, node)}: {top}"


def test_the_runtime_needs_neither_torch_nor_transformers():
    """Also not through what it shares with the models, whatever is imported inside functions that it does not call."""
    pending, seen = files(LIBRARY / "runtime"), set()
    while pending:
        file = pending.pop()
        seen.add(file)
        for module, _, node in imports(file):
            parts = module.split(".")
            if node.col_offset > 0 and parts[0] == "torch":
                continue
            assert parts[0] not in ("torch", "transformers", "safetensors"), f"{where(file, node)}: {module}"
            found = LIBRARY.parent.joinpath(*parts[:-1]).with_suffix(".py")
            pending += [found] if parts[0] == "spar_hf" and found.is_file() and found not in seen else []
    assert LIBRARY / "model" / "image_input.py" in seen and LIBRARY / "model" / "words.py" in seen


@pytest.mark.parametrize("file", files(LIBRARY), ids=lambda file: str(file.relative_to(LIBRARY)))
def test_library_files_are_short_and_print_nothing(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 500, f"{file}: give a part of it a file of its own"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{where(file, node)}: return it, log it or use the command's console"


@pytest.mark.parametrize("file", [*files(LIBRARY), *files(ROOT / "training")], ids=lambda file: file.name)
def test_nothing_changes_where_python_looks_for_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        path = isinstance(node, ast.Attribute) and node.attr == "path" and isinstance(node.value, ast.Name)
        assert not (path and node.value.id == "sys"), f"{where(file, node)}: import from spar_hf instead of sys.path"


@pytest.mark.parametrize("file", sorted((ROOT / "training").glob("*.py")), ids=lambda file: file.name)
def test_scripts_of_training_are_doors(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 30, f"{file}: what it does belongs in the library"
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(text)))


@pytest.mark.parametrize("room", sorted(path.parent.name for path in LIBRARY.glob("*/__init__.py")))
def test_a_room_says_what_it_is_for(room):
    assert ast.get_docstring(ast.parse((LIBRARY / room / "__init__.py").read_text()))


@pytest.mark.parametrize("file", files(ROOT / "tests"), ids=lambda file: file.name)
def test_tests_import_helpers_and_never_one_another(file):
    studies = {path.stem for path in (ROOT / "training").rglob("*.py")} - {"evaluate"}  # also the name of a package
    for module, _, node in imports(file):
        top = module.split(".")[0]
        assert not top.startswith("test_"), f"{where(file, node)}: move what is shared to a helper module in tests/"
        assert top not in studies, f"{where(file, node)}: launch the script as a process, or test the library"
