"""The parser of all commands."""

from dataclasses import dataclass

import pytest

from spar_hf.utils.fields import option
from spar_hf.utils.options import parse_dataclasses


@dataclass
class Run:
    steps: int = option(10, "Optimizer steps.")
    shuffle: bool = option(True, "Shuffle the images.")
    seed: int | None = option(None, "Default: that of the clock.")


def test_help_keeps_the_lines_of_the_description_and_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_dataclasses([Run], ["--help"], description="Trains.\n\n    run.py --steps 3\n    run.py --steps 4")
    shown = capsys.readouterr().out
    assert "\n    run.py --steps 3\n    run.py --steps 4\n" in shown and "(default: 10)" in shown
    assert shown.count("Shuffle the images.") == 1 and "Turns --shuffle off." in shown and "None" not in shown
