"""The examples in docstrings of the whole library run and print what they say."""

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import spar_hf

MODULES = ["spar_hf", *(info.name for info in pkgutil.walk_packages(spar_hf.__path__, "spar_hf.", onerror=str))]


def documented(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Name and docstring of a module, its functions, classes, methods and properties."""
    yield module.__name__, module.__doc__ or ""
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__ or not inspect.isroutine(value) | inspect.isclass(
            value
        ):
            continue
        yield f"{module.__name__}.{name}", value.__doc__ or ""
        for method, member in vars(value).items() if inspect.isclass(value) else ():
            function = getattr(member, "fget", None) or getattr(member, "func", None) or member
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function):
                yield f"{module.__name__}.{name}.{method}", function.__doc__ or ""


def examples() -> Iterator[tuple[str, str]]:
    """Name and docstring wherever there is an example; a module that cannot be imported is one whose test fails."""
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except Exception:
            yield name, ">>>"
            continue
        yield from ((owner, text) for owner, text in documented(module) if ">>>" in text)


@pytest.mark.parametrize(("name", "text"), [pytest.param(*found, id=found[0]) for found in examples()])
def test_example_runs(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(max((m for m in MODULES if f"{name}.".startswith(f"{m}.")), key=len))
    text = inspect.cleandoc(text).replace("```python", "").replace("```", "")
    test = doctest.DocTestParser().get_doctest(text, dict(vars(module)), "example", None, 0)
    assert test.examples
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)
