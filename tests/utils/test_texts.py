"""Text files with and without byte order marks, and text for consoles, JSON and terminals."""

import io
import json

import pytest

from spar_hf.utils.atomic import write_json
from spar_hf.utils.errors import UsageError, run_command
from spar_hf.utils.terminal import printable
from spar_hf.utils.texts import json_text, read_text, storable


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_usual_encoding_is_read_without_its_mark(tmp_path, encoding):
    path = tmp_path / "classes.txt"
    path.write_bytes("Straße\r\nroad\n".encode(encoding))
    assert read_text(path) == "Straße\nroad\n"


def test_another_encoding_is_refused_by_name(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("Straße".encode("latin-1"))
    with pytest.raises(UsageError, match=r"classes\.txt.*UTF-8"):
        read_text(path)


@pytest.mark.parametrize("text", ["\x1b[31mred", "\x9b31mred", "\x07", "a\rb", "\u202egnp.exe", "caf\udce9", "\x7f"])
def test_nothing_harmful_reaches_a_terminal(text):
    shown = printable(text, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert shown.isprintable() and "\\" in shown and shown.encode()


def test_letters_that_a_console_lacks_are_escaped():
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    assert printable("Straße 640×480 道", console) == "Straße 640×480 \\u9053"
    assert printable("a\n\tb", console) == "a\n\tb"


def test_reports_hold_file_names_that_are_no_utf_8(tmp_path):
    write_json(tmp_path / "report.json", {"image": "caf\udce9.png", "loss": float("nan")})
    assert json.loads((tmp_path / "report.json").read_text()) == {"image": "caf\udce9.png", "loss": None}


def test_errors_of_training_commands_do_nothing_to_the_terminal(capsys):
    def main():
        raise UsageError("no class \x1b[41mroad")

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: no class \\x1b[41mroad\n"


def test_json_holds_every_file_name_and_gives_it_back():
    for name in ("Straße.png", "caf\udce9.png"):
        text = json_text({"image": name})
        assert text.encode() and json.loads(text) == {"image": name}
    assert storable("caf\udce9") == "caf\\udce9"
