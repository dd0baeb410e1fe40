"""
Installs a wheel into an empty environment with what it asks for and nothing else, and runs it in an empty folder, for
`make release`.

    python tests/wheel_smoke.py dist/spar_hf-….whl torch==…
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MAX_BYTES = 24 * 2**20  # of the wheel: spar-tiny and its base are 22 MB of it
EXTRAS = {"accelerate", "datasets", "gradio", "onnx", "scipy", "torchvision"}  # must not be needed
USE = """
import importlib.util, sys
from transformers import AutoImageProcessor, AutoModel, pipeline
import spar_hf

assert spar_hf.__file__.startswith(sys.prefix), spar_hf.__file__
present = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
assert not present, f"the base installation brought {present}"
segment = pipeline("open-vocab-segmentation")
found = segment("street.png", candidate_labels=["road", "car, automobile", "sky"], background="auto")
assert all(one["mask"].size == (150, 100) for one in found)
pixels = AutoImageProcessor.from_pretrained(spar_hf.SPAR_TINY)("street.png", return_tensors="pt")["pixel_values"]
features = AutoModel.from_pretrained(spar_hf.SPAR_TINY)(pixels).feature_map
assert features.shape[1] == 192 and features.isfinite().all()
print("features", tuple(features.shape), "classes", [one["label"] for one in found])
"""
IMAGE = "from PIL import Image; Image.radial_gradient('L').resize((150, 100)).convert('RGB').save('street.png')"


def check_size(wheel: Path) -> int:
    """
    The bytes of a wheel.

    Raises:
        SystemExit: they are more than the budget; the largest files are named.
    """
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        with zipfile.ZipFile(wheel) as files:
            largest = sorted(files.infolist(), key=lambda file: -file.compress_size)[:5]
        names = ", ".join(f"{file.filename} {file.compress_size}" for file in largest)
        raise SystemExit(f"{wheel.name} has {size} bytes, more than {MAX_BYTES}. The largest files: {names}")
    return size


def smoke_test(wheel: Path, requirements: list[str]) -> None:
    """Install and run. `requirements` are installed first: a build of torch that brings no CUDA along."""
    with tempfile.TemporaryDirectory() as temporary:
        environment, folder = Path(temporary, "environment"), Path(temporary, "empty")
        folder.mkdir()
        python, command = environment / "bin" / "python", environment / "bin" / "spar-hf"
        settings = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}

        def run(*arguments: object) -> None:
            subprocess.run([*map(str, arguments)], cwd=folder, env=settings, check=True)

        run(sys.executable, "-m", "venv", environment)
        for needed in (requirements, [wheel.resolve()]):
            if needed:
                run(python, "-m", "pip", "install", "--quiet", *needed)
        run(python, "-m", "pip", "check")
        run(python, "-c", IMAGE)
        run(command, "--version")
        run(command, "env")
        run(command, "segment", "street.png", "--labels", "road; sky", "--output", "masks.png")
        run(command, "features", "street.png", "--output", "features")
        run(python, "-c", USE, *sorted(EXTRAS))


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(f"{path.name}: {check_size(path) / 2**20:.1f} MiB of at most {MAX_BYTES / 2**20:.0f}")  # noqa: T201
    smoke_test(path, sys.argv[2:])
    print("The wheel works in an empty environment.")  # noqa: T201
