"""
Pytest plugin of the suite: what the tests of transformers import and their source distribution lacks, the expected
failures of `refusals.py`, and a summary that groups failures by test and message.
"""

import json
import re
import sys
import unittest
from collections import Counter, defaultdict
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import pytest
import torch
from refusals import REFUSALS

import spar_hf

TESTS = "transformers_tests"
LIBRARY = Path(spar_hf.__file__).parent


def stub(name: str, **attributes) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


# Imported by the common tests, not part of the source distribution. Empty mixins add no tests.
stub(f"{TESTS}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
stub(f"{TESTS}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
stub(f"{TESTS}.utils.test_configuration_utils", config_common_kwargs={})  # read for configurations without parts only
stub("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)  # of tests with chat templates, video or audio

# A part of a test that fails is a failure of the test: one outcome per test, and one message to group by.
unittest.TestCase.subTest = lambda self, *args, **kwargs: nullcontext()  # type: ignore[method-assign,assignment]


def register_names() -> None:
    """Name our classes where transformers looks up what kind of model a test has before it: base, backbone, with labels."""
    from transformers.models.auto import modeling_auto

    modeling_auto.MODEL_MAPPING_NAMES.update(spar="SparVisionModel", spar_semantic="SparSemanticModel")
    modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES.update(spar="SparBackbone")
    modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.update(spar_semantic="SparForSemanticSegmentation")


def cause(test: str, message: str) -> tuple[str, str]:
    """Test and message without what differs between the cases of one cause: parameters, numbers, folders, our classes."""
    words = re.sub(r"/tmp/\S+|\bSpar\w+|\d+", "…", message.splitlines()[0] if message else "")
    return re.sub(r"_\d+(_.*)?$", "", test), words[:160]


class Outcomes:
    """Collects one outcome per test."""

    def __init__(self, report: str | None):
        self.report = report
        self.outcomes: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.places: dict[str, str] = defaultdict(str)
        self.reasons: Counter[str] = Counter()
        self.unused: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        name = "::".join(report.nodeid.split("::")[1:])
        refused = hasattr(report, "wasxfail")
        self.outcomes[name] = "refused" if refused and report.skipped else report.outcome
        if self.outcomes[name] == "refused":
            self.reasons[report.wasxfail] += 1
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.messages[name] = crash.message if crash else str(report.longrepr)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo:  # of a unittest.TestCase it is set by the call above
            ours = [entry for entry in call.excinfo.traceback if Path(entry.path).is_relative_to(LIBRARY)]
            name = "::".join(item.nodeid.split("::")[1:])
            self.places[name] = f"{ours[-1].path.name}:{ours[-1].lineno + 1}" if ours else ""
        return report

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, outcome in self.outcomes.items():
            if outcome == "failed":
                case, test = name.split("::")
                groups[cause(test, self.messages[name])].append(f"{case} {self.places[name]}".strip())
        for (test, message), cases in sorted(groups.items()):
            write(f"FAILED {test} ({len(cases)}): {message}")
            write(f"    {', '.join(sorted(set(cases)))}")
        for reason, number in self.reasons.most_common():
            write(f"REFUSED ({number}): {reason}")
        for pattern in self.unused:
            write(f"UNUSED REFUSAL {pattern}: matches no test")
        counts = Counter(self.outcomes.values())
        write(", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "refused", "skipped")))
        if self.report:
            kinds = {"outcomes": self.outcomes, "messages": self.messages, "places": self.places}
            Path(self.report).write_text(json.dumps(kinds, indent=1))


def pytest_addoption(parser):
    parser.addoption("--suite-report", help="JSON file for the outcome and message of every test")


def pytest_configure(config):
    config.addinivalue_line("markers", "network: needs the network (here: once, for the source distribution)")
    config.addinivalue_line("filterwarnings", "ignore")
    config.pluginmanager.register(Outcomes(config.getoption("--suite-report")), "outcomes")
    torch.set_num_threads(1)
    register_names()


def pytest_collection_modifyitems(config, items):
    used = set()
    for item in items:
        item.add_marker(pytest.mark.network)
        name = "::".join(item.nodeid.split("::")[1:])
        for pattern, reason in REFUSALS.items():
            if fnmatchcase(name, pattern):
                used.add(pattern)
                # strict: a refusal that no longer fails has to go
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    if not config.getoption("keyword") and not any("::" in argument for argument in config.args):
        whole = {Path(argument).name for argument in config.args} >= {"configurations.py", "models.py", "processing.py"}
        if whole:
            config.pluginmanager.get_plugin("outcomes").unused = [p for p in REFUSALS if p not in used]


def pytest_sessionfinish(session, exitstatus):
    outcomes = session.config.pluginmanager.get_plugin("outcomes")
    if exitstatus == 0 and outcomes.unused:
        session.exitstatus = 1
