"""
A static page that runs an exported model in the browser: ONNX Runtime on WebGPU or WebAssembly, words embedded by the
exported text tower. It needs a server for files and nothing else.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from spar_hf.model.background import MEANING_TEMPLATES
from spar_hf.model.vocabularies import ANCHOR_WORDS, STUFF_WORDS
from spar_hf.runtime.folders import ExportedFolder, read_json
from spar_hf.runtime.texts import ExportedTexts
from spar_hf.utils.atomic import write_json
from spar_hf.utils.errors import UsageError

ASSETS = Path(__file__).parent / "web"
# package of npm -> its version, which is the tested one, and the files that the page loads
PACKAGES = {
    "onnxruntime-web": (
        "1.30.0",
        (
            "dist/ort.webgpu.bundle.min.mjs",
            "dist/ort-wasm-simd-threaded.asyncify.wasm",
            "dist/ort.wasm.bundle.min.mjs",
            "dist/ort-wasm-simd-threaded.wasm",
        ),
    ),
    "@huggingface/tokenizers": ("0.2.0", ("dist/tokenizers.min.mjs",)),
}
CDN = "https://cdn.jsdelivr.net/npm/{package}@{version}/{file}"  # unless the packages are given
INSTALL = "npm install " + " ".join(f"{package}@{version}" for package, (version, _) in PACKAGES.items())
WIDER = {
    TensorProto.UINT8: TensorProto.INT32,
    TensorProto.UINT16: TensorProto.INT32,
    TensorProto.FLOAT16: TensorProto.FLOAT,
}
FILTERS = (1, 2, 3, 4, 5)  # of Pillow that the page computes


def add_files(folder: Path, record: dict[str, Any], vendor: str | Path | None = None) -> None:
    """
    Add the page to an exported folder.

    Args:
        folder: with a graph of the head `classmap`.
        record: contents of its `spar_export.json`.
        vendor: folder with the packages, `node_modules` or what contains it. What the page loads of them is copied, 41 MB.
            Without, the page loads the same files from a public CDN.

    Raises:
        UsageError: as [`check`]; an image processor that the page cannot follow, or a graph that browsers cannot load.
    """
    exported = ExportedFolder(folder, record, read_json(folder / "preprocessor_config.json"))
    check(record["head"], vendor)
    check_files(exported)
    addresses = cdn_addresses() if vendor is None else copy_packages(Path(vendor), folder / "vendor")
    for file in sorted(ASSETS.iterdir()):
        shutil.copyfile(file, folder / file.name)
    for graph in record["graphs"].values():
        widen_outputs(folder / graph)
    for tensor in record["outputs"]:
        tensor["dtype"] = {"labels": "int32", "confidence": "float32"}[tensor["name"]]
    page = {"graph": exported.graph("onnxruntime", None)[0].relative_to(folder).as_posix(), **addresses}
    if record["classes"] is None:
        page["background"] = list(STUFF_WORDS)
        (folder / "background.bin").write_bytes(background_embeddings(exported).tobytes())
    write_json(folder / "page.json", page)


def check(head: str, vendor: str | Path | None) -> None:
    """
    What can be told before anything is exported.

    Raises:
        UsageError: another head than `classmap`, or packages are missing.
    """
    if head != "classmap":
        raise UsageError(f"--format web shows label maps, not {head}. Take --head classmap.")
    if vendor is not None:
        find_packages(Path(vendor))


def check_files(exported: ExportedFolder) -> None:
    """
    Raises:
        UsageError: the page cannot run this export.
    """
    if exported.image_settings.get("resample", 3) not in FILTERS:
        raise UsageError(
            "--format web resizes with Pillow's filters 1 to 5. Set `resample` of the image processor to 3."
        )
    if any(exported.path.glob("onnx/*_data")):
        raise UsageError("The graph is larger than 2 GB, which no browser loads. Take --dtype fp16 or a smaller model.")


def widen_outputs(path: Path) -> None:
    """
    Change labels of a graph to int32 and its confidence to float32: ONNX Runtime's build for WebGPU has no operation for
    other types, and would not load it.
    """
    model = onnx.load(path)
    loops = [attribute.g for node in model.graph.node for attribute in node.attribute if attribute.name == "body"]
    for body in loops:
        for node in body.node:
            if node.op_type == "Cast" and node.attribute[0].i in WIDER:
                node.attribute[0].i = WIDER[node.attribute[0].i]
    for value in (*model.graph.output, *(value for body in loops for value in body.output)):
        kind = value.type.tensor_type
        kind.elem_type = WIDER.get(kind.elem_type, kind.elem_type)
    onnx.save(model, path)


def background_embeddings(exported: ExportedFolder) -> np.ndarray:
    """
    What the page needs for a background: the mean of the bare anchor words, the bare stuff words, and the stuff words with
    the templates of the export, a row each: `(1 + 2 * words, dim)` float32.
    """
    texts = ExportedTexts(exported, "onnxruntime", None)
    centre = texts.get(ANCHOR_WORDS, MEANING_TEMPLATES).mean(0, keepdims=True)
    rows = [centre, texts.get(STUFF_WORDS, MEANING_TEMPLATES), texts.get(STUFF_WORDS)]
    return np.concatenate(rows).astype("<f4")


def addresses_of(place: dict[str, str]) -> dict[str, Any]:
    """Where the page finds its packages, from the address of every file."""
    return {
        "onnxruntime": {kind: place[f"dist/ort.{kind}.bundle.min.mjs"] for kind in ("webgpu", "wasm")},
        "tokenizers": place["dist/tokenizers.min.mjs"],
    }


def cdn_addresses() -> dict[str, Any]:
    """Addresses of the tested versions on a public CDN."""
    return addresses_of(
        {
            file: CDN.format(package=package, version=version, file=file)
            for package, (version, files) in PACKAGES.items()
            for file in files
        }
    )


def find_packages(vendor: Path) -> Path:
    """
    The folder `node_modules` of packages that were installed.

    Raises:
        UsageError: a package is missing, or of another version than the tested one.
    """
    root = vendor / "node_modules" if (vendor / "node_modules").is_dir() else vendor
    for package, (version, files) in PACKAGES.items():
        try:
            found = json.loads((root / package / "package.json").read_text(encoding="utf-8"))["version"]
        except (OSError, ValueError, KeyError):
            found = None
        if found != version or not all((root / package / file).is_file() for file in files):
            what = f"has {package} {found}, not {version}" if found not in (None, version) else f"lacks {package}"
            raise UsageError(f"--vendor {vendor} {what}. In that folder: {INSTALL}")
    return root


def copy_packages(vendor: Path, target: Path) -> dict[str, Any]:
    """Copy the files of the packages that the page loads, with their licences. Raises as [`find_packages`]."""
    root = find_packages(vendor)
    place = {}
    for package, (_, files) in PACKAGES.items():
        folder = target / package.rpartition("/")[2]
        folder.mkdir(parents=True)
        for file in (*files, *(path.name for path in (root / package).glob("LICENSE*"))):
            shutil.copyfile(root / package / file, folder / Path(file).name)
            place[file] = f"./vendor/{folder.name}/{Path(file).name}"
    return addresses_of(place)
