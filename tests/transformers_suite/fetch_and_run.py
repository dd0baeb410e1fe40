"""
Fetches the common tests of the installed transformers and runs them over the classes of this library.

The source distribution in the package registry holds `tests/test_*_common.py`, with the mixins that every model inside
transformers has to pass. They are unpacked into a cache (`SPAR_SUITE_CACHE`, else `~/.cache/spar_hf/transformers_suite`),
never into this project. The modules beside this file only configure them:

- `models.py`, `configurations.py`, `processing.py`: our classes, with tiny random configurations (`testers.py`).
- `refusals.py`: tests that we fail on purpose, each with its reason.
- `suite_plugin.py`: stands in for what the tests import and the source distribution lacks; counts and groups the outcomes.

Not run: `PipelineTesterMixin` (needs tiny models of the hub and `tests/pipelines`, which the distribution lacks), and the
mixins for export, text generation and several GPUs, for the same reason.

Usage: `tests/transformers_suite/run [arguments of pytest]`. `--suite-report FILE` writes the outcomes as JSON. Status 0:
all that fails is listed in `refusals.py`. Needs the network once per version of transformers, and some minutes.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = "transformers_tests"  # `tests` would be found anywhere
FILES = ("configurations.py", "models.py", "processing.py")


def cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SPAR_SUITE_CACHE") or base / "spar_hf" / "transformers_suite")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def fetch_tests(release: str, folder: Path) -> None:
    """Unpack `tests/` of the source distribution of transformers as the package `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        options = ("--no-deps", "--no-binary", "transformers", "--no-build-isolation")
        pip("download", *options, "--dest", temporary, f"transformers=={release}")
        unpacked = Path(temporary, "unpacked")
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            wanted = [member for member in archive.getmembers() if member.name.split("/")[1:2] == ["tests"]]
            archive.extractall(unpacked, members=wanted, filter="data")
        tests = next(unpacked.glob("*/tests"))
        (tests / "__init__.py").touch()  # a package: they import one another relatively
        tests.rename(folder)


def main() -> int:
    release = version("transformers")
    folder = cache_folder() / release
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PACKAGE).exists():
        fetch_tests(release, folder / PACKAGE)
    layer = folder / "site-packages"  # what the tests need and the project does not, kept out of its environment
    if not layer.exists():
        pip("install", "--no-deps", "--target", str(layer), "--requirement", str(HERE / "requirements.txt"))
    sys.stderr.write(f"Common tests of transformers {release} in {folder / PACKAGE}\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, ROOT, ROOT / "tests", layer, folder))),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RUN_SLOW": "1",  # nearly all of the slow ones need a GPU
    }
    # independent of the project's own tests: their configuration and fixtures are not read
    options = ("-c", os.devnull, "--rootdir", str(HERE), "--noconftest", "-p", "suite_plugin", "-p", "no:cacheprovider")
    arguments = sys.argv[1:]
    chosen = any(argument.split("::")[0].endswith(".py") for argument in arguments)
    files = [] if chosen else [str(HERE / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", *options, "-q", "--tb=no", *arguments, *files]
    return subprocess.run(command, env=environment, cwd=HERE).returncode


if __name__ == "__main__":
    raise SystemExit(main())
