"""Which errors are reported in one line, and which are bugs and keep their traceback."""

import io

import pytest
import typer
from PIL import Image
from transformers import AutoConfig, get_scheduler

from spar_hf.cli.reporting import exit_on_error
from spar_hf.model.prompts import Vocabulary, resolve_templates
from spar_hf.utils.errors import UsageError, as_usage_errors


def load_folder(folder, text):
    (folder / "config.json").write_text(text)
    return AutoConfig.from_pretrained(folder)


REFUSALS = {
    "words": lambda folder: Vocabulary.parse("no-such-vocabulary"),
    "templates": lambda folder: resolve_templates("no-such-templates"),
    "schedule": lambda folder: get_scheduler("no-such-schedule", None, 0, 10),
    "model type": lambda folder: load_folder(folder, '{"model_type": "no-such-type"}'),
    "JSON": lambda folder: load_folder(folder, "{"),
    "image": lambda folder: Image.open(io.BytesIO(b"no image")),
    "text": lambda folder: b"\xff".decode(),
    "missing file": lambda folder: (folder / "none").read_bytes(),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_a_user_named_is_refused_in_one_line(kind, tmp_path):
    with pytest.raises(UsageError), as_usage_errors():
        REFUSALS[kind](tmp_path)
    with pytest.raises(typer.Exit), exit_on_error():
        REFUSALS[kind](tmp_path)


BUGS = ["int('many')", "first, second = [1]", "[].index(1)", "list(zip([1], [], strict=True))"]


@pytest.mark.parametrize("block", [as_usage_errors, exit_on_error])
@pytest.mark.parametrize(("package", "code"), [*(("spar_hf", bug) for bug in BUGS), ("numpy", "raise ValueError")])
def test_a_programming_error_keeps_its_traceback(package, code, block):
    with pytest.raises(ValueError) as caught, block():
        exec(code, {"__name__": f"{package}.module"})
    assert type(caught.value) is ValueError
