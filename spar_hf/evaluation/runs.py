"""Models and runs as the command line names them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spar_hf.model.refine import resolve_refinement
from spar_hf.utils.errors import UsageError, as_usage_errors

RUN_FORMS = "NAME:single or NAME:sliding:STRIDE, both also with +REFINEMENT, or NAME:sliding-logits:STRIDE"


@dataclass(frozen=True)
class Run:
    """
    A row of the table: a model, and how it is run.

    Attributes:
        model: name of the model.
        stride: step of the sliding window in pixels; `None` for a single pass.
        average: what the windows are averaged in: `"features"`, as in training (SPAR, section 3), or `"logits"`, as in the
            published evaluation of sliding windows.
        refinement: name of a refinement of the logits, see `spar_hf.model.refine`.
    """

    model: str
    stride: int | None = None
    average: str = "features"
    refinement: str | None = None

    @property
    def inference(self) -> str:
        """
        The way to run the model, in words.

        Example:

        ```python
        >>> Run("base", 24, refinement="lposs").inference
        'sliding, stride 24, lposs'
        ```"""
        way = "single pass" if self.stride is None else f"sliding, stride {self.stride}"
        if self.average == "logits":
            way += ", mean of logits"
        return way if self.refinement is None else f"{way}, {self.refinement}"


def parse_models(items: Sequence[str]) -> dict[str, str]:
    """
    Read `--model`: `NAME=FOLDER` or `FOLDER`, whose last part is then the name.

    Returns:
        `{name: folder or hub id}`.

    Raises:
        UsageError: two models have the same name, or a name is empty or has a colon.

    Example:

    ```python
    >>> parse_models(["base=some/folder", "org/student"])
    {'base': 'some/folder', 'student': 'org/student'}
    ```"""
    models: dict[str, str] = {}
    for item in items:
        name, separator, folder = item.partition("=")
        if not separator or Path(item).is_dir():  # the name of a folder may hold an equals sign
            name, folder = Path(item).name, item
        if name in models or ":" in name or not name or not folder:
            raise UsageError(
                f"Cannot call a model {name!r} in --model {item}: use NAME=FOLDER, with names that differ and have no colon."
            )
        models[name] = folder
    return models


def parse_runs(items: Sequence[str] | None, models: dict[str, str]) -> list[Run]:
    """
    Read `--runs`: `NAME:single`, `NAME:sliding:STRIDE` (mean of features) or `NAME:sliding-logits:STRIDE` (mean of logits).
    The first two may end in `+REFINEMENT`.

    Args:
        items: the runs; `None` for a single pass of every model.
        models: see [`parse_models`].

    Raises:
        UsageError: a run has another form, a stride of 0, an unknown refinement or model, or is given twice.

    Example:

    ```python
    >>> parse_runs(["base:sliding:24", "base:single+lposs"], {"base": "some/folder"})[1]
    Run(model='base', stride=None, average='features', refinement='lposs')
    ```"""
    runs: list[Run] = []
    for item in items or [f"{name}:single" for name in models]:
        run = _parse_run(item)
        if run.model not in models:
            raise UsageError(f"--runs {item} names no model of --model; there are {', '.join(sorted(models))}.")
        if run in runs:
            raise UsageError(f"--runs {item} is given twice.")
        runs.append(run)
    return runs


def _parse_run(item: str) -> Run:
    """One run."""
    name, _, way = item.partition(":")  # at the first colon: the name may hold a plus
    way, plus, refinement = way.partition("+")
    kind, *stride = way.split(":")
    sliding = kind in ("sliding", "sliding-logits") and len(stride) == 1 and stride[0].isdecimal()
    if not (way == "single" or sliding) or bool(plus) != bool(refinement):
        raise UsageError(f"Cannot read --runs {item}: write {RUN_FORMS}, for example base:sliding:24.")
    if kind == "sliding-logits" and refinement:
        raise UsageError(
            f"--runs {item}: a refinement needs features, and a mean of logits has none. Write {name}:sliding."
        )
    if sliding and int(stride[0]) < 1:
        raise UsageError(f"--runs {item}: the stride must be at least 1 pixel.")
    if refinement:
        with as_usage_errors():
            resolve_refinement(refinement)
    average = "logits" if kind == "sliding-logits" else "features"
    return Run(name, int(stride[0]) if sliding else None, average, refinement or None)
