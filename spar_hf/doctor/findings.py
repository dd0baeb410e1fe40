"""What a check found, and the report of all checks."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

OK, FAILED, NOTE, SKIPPED = "ok", "failed", "note", "skipped"
PACKAGES = ("spar-hf", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class Finding:
    """
    The result of one check.

    Attributes:
        check: what was checked.
        status: `"ok"`; `"failed"`: the model does not do what it should; `"note"`: a figure without a limit; `"skipped"`.
        found: the figure, or why the check was skipped.
        limit: what it should be; empty without a limit.
        remedy: what to do if the check failed.
    """

    check: str
    status: str
    found: str
    limit: str = ""
    remedy: str = ""


def within(check: str, difference: float, limit: float, remedy: str) -> Finding:
    """
    A finding about a difference that should be below a limit; NaN is above every limit.

    Example:

    ```python
    >>> within("features", 2e-6, 1e-4, "convert again").status, within("features", float("nan"), 1e-4, "").status
    ('ok', 'failed')
    ```"""
    status = OK if difference < limit else FAILED
    return Finding(check, status, f"{difference:.1e}", f"< {limit:.0e}", "" if status == OK else remedy)


@dataclass
class Report:
    """
    What all checks found.

    Attributes:
        model: folder, hub id or checkpoint, as given.
        setting: versions, device and kind of the model.
        findings: in the order of the checks.
        seconds: time of each check by its name.
    """

    model: str
    setting: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[Finding]:
        """The checks that failed."""
        return [finding for finding in self.findings if finding.status == FAILED]

    def as_json(self) -> dict[str, Any]:
        """The report for a JSON file."""
        return asdict(self)

    def markdown(self) -> str:
        """The report as text to attach to an issue."""
        rows = [[f.check, f.status, f.found, f.limit] for f in self.findings]
        lines = [["check", "result", "found", "expected"], ["---"] * 4, *rows]
        table = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
        setting = [f"- {name}: {value}" for name, value in self.setting.items()]
        remedies = [f"- {f.check}: {f.remedy}" for f in self.failed if f.remedy]
        took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        parts = [f"# spar-hf doctor: {self.model}", *setting, "", *table, ""]
        parts += ["What to do:", "", *remedies, ""] if remedies else []
        return "\n".join([*parts, f"Time: {took}.", ""])


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python, of the system and of packages; by default of those that decide what a model computes."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """A device in words: the name of a card, or the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
