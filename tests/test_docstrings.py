"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import spar_hf


def examples():
    """Every docstring with an example: (name, text, the module's own names)."""
    for info in pkgutil.walk_packages(spar_hf.__path__, "spar_hf."):
        module = importlib.import_module(info.name)
        owners = [(info.name, module)]
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != info.name or not (
                inspect.isclass(value) or inspect.isfunction(value)
            ):
                continue
            owners.append((f"{info.name}.{name}", value))
            if inspect.isclass(value):
                members = [(n, getattr(m, "__func__", m)) for n, m in vars(value).items()]
                owners += [(f"{info.name}.{name}.{n}", m) for n, m in members if inspect.isfunction(m)]
        for name, owner in owners:
            if ">>>" in (owner.__doc__ or ""):
                yield pytest.param(inspect.cleandoc(owner.__doc__), module, id=name)


@pytest.mark.parametrize(("text", "module"), list(examples()))
def test_example_runs(text, module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = text.replace("```python", "").replace("```", "")
    test = doctest.DocTestParser().get_doctest(text, dict(vars(module)), "example", None, 0)
    assert test.examples
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)
