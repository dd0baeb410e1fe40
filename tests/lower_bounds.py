"""
Prints the lower bounds of pyproject.toml as exact requirements, for `make lowest`.

The tools of the `dev` extra are printed as they are: they run the tests, the library does not use them.
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, leave_out: set[str]) -> list[str]:
    """`name==bound` for each dependency of the library and its extras, but those to be left out."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    used = [*project["dependencies"], *(line for extra, lines in extras.items() if extra != "dev" for line in lines)]
    lines = []
    for line in [line for line in used if not line.startswith(project["name"])]:
        name, bound = re.fullmatch(r"([\w.-]+(?:\[[\w,-]+\])?)>=([\w.]+)(?:,.*)?", line).groups()  # type: ignore[union-attr]
        if name not in leave_out:
            lines.append(f"{name}=={bound}")
    return [*lines, *(line for line in extras["dev"] if not line.startswith(project["name"]))]


if __name__ == "__main__":
    print("\n".join(requirements(Path(__file__).parents[1] / "pyproject.toml", set(sys.argv[1:]))))  # noqa: T201
