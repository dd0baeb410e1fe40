"""Feature maps of the teacher on disk: `cache_teacher.py` writes them, and distillation reads them instead of running it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from spar_hf import SparImageProcessorPil, SparVisionModel
from spar_hf.data.augmentation import Crop, Views
from spar_hf.model.fingerprints import vision_fingerprint
from spar_hf.model.image_input import read_rgb, set_pixel_limit
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.options import with_current_names

MANIFEST = "manifest.json"
COMMAND = "training/cache_teacher.py"


def sha256(path: Path) -> str:
    """Checksum of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class TeacherCache:
    """
    The maps of a finished cache, in a fixed order.

    `cache[i]` is `(pixel_values, target)`: the stored view of an image, `(1, 3, height, width)`, and the feature map that
    [`SlidingWindowTeacher`] made of it, `(1, dim, height / patch, width / patch)` float32. The checksum of a shard is
    compared when it is first read, that of an image whenever it is read. Workers of a `DataLoader` can receive a cache.

    Raises:
        UsageError: a damaged shard, or an image that changed.
        MissingFiles: a shard or image that is gone.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.setting, self.shards = folder, manifest["setting"], manifest["shards"]
        self.positions = [(s, row) for s, shard in enumerate(self.shards) for row in range(len(shard["maps"]))]
        self.checked: set[int] = set()
        self.image_processor = SparImageProcessorPil(
            image_mean=self.setting["image_mean"], image_std=self.setting["image_std"]
        )

    @classmethod
    def open(
        cls, folder: str | Path, *, model: SparVisionModel, window_size: int | None = None, stride: int | None = None
    ) -> "TeacherCache":
        """
        Open a cache for a teacher.

        Args:
            folder: that `cache_teacher.py` wrote.
            model: encoder of the teacher.
            window_size, stride: of its windows in pixels; compared if they are given.

        Raises:
            MissingFiles: no cache there.
            UsageError: an unfinished cache, or one made with another model, window or stride.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        asked = {"model": vision_fingerprint(model), "window_size": window_size, "stride": stride}
        check_setting(folder, manifest["setting"], {name: value for name, value in asked.items() if value is not None})
        if not manifest["complete"]:
            raise UsageError(
                f"The teacher cache {folder} is not finished. Run the same command of {COMMAND} again: it goes on where it "
                "stopped."
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pixel_values(index), self.target(index)

    def image(self, index: int) -> Path:
        """The file that a map was made from."""
        shard, row = self.positions[index]
        return Path(os.path.normpath(self.folder / self.shards[shard]["maps"][row]["image"]))

    def pixel_values(self, index: int) -> torch.Tensor:
        """The stored view of an image: `(1, 3, height, width)`."""
        shard, row = self.positions[index]
        entry, path = self.shards[shard]["maps"][row], self.image(index)
        mend = f"Put it back, or make the cache again with {COMMAND}."
        if not path.is_file():
            raise MissingFiles(f"The teacher cache {self.folder} needs {path}, which is gone. {mend}")
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            raise UsageError(f"{path} is not the image that {self.folder} was made from. {mend}")
        set_pixel_limit(self.setting.get("max_pixels"))
        view = Crop(**entry["crop"]).apply(read_rgb(path, self.setting.get("image_range"), urls=False))
        return self.image_processor(view, do_resize=False, return_tensors="pt")["pixel_values"]

    def target(self, index: int) -> torch.Tensor:
        """The teacher's map: `(1, dim, height / patch, width / patch)` float32."""
        shard, row = self.positions[index]
        path = self.folder / self.shards[shard]["file"]
        if shard not in self.checked:
            check_shard(path, self.shards[shard])
            self.checked.add(shard)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(str(row))[None].float()


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    The manifest of a cache, finished or not; its setting under the names of today.

    Raises:
        MissingFiles: there is none.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise MissingFiles(f"{folder} holds no {MANIFEST}. Make a cache with {COMMAND} --output {folder}.")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return manifest | {"setting": with_current_names(manifest["setting"], [Views])}


def check_setting(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """
    Compare the setting that a cache was made with to the one asked for.

    Raises:
        UsageError: they differ; the message names every difference.
    """
    differences = [
        "images differ" if name == "photos" else f"{name} is {found.get(name)!r} there and {value!r} here"
        for name, value in asked.items()
        if found.get(name) != value
    ]
    if differences:
        raise UsageError(
            f"The teacher cache {folder} was made with another setting: {'; '.join(differences)}. Use the setting of "
            f"the cache, or write one with the new setting to another folder with {COMMAND}."
        )


def check_shard(path: Path, record: dict[str, Any]) -> None:
    """
    Compare a shard's checksum with its record.

    Raises:
        MissingFiles: there is no such shard.
        UsageError: it is damaged.
    """
    mend = f"Run the same command of {COMMAND} again: it makes only this shard anew."
    if not path.is_file():
        raise MissingFiles(f"The shard {path} is gone. {mend}")
    if sha256(path) != record["sha256"]:
        raise UsageError(f"The shard {path} is damaged: its checksum is not the one in the manifest. {mend}")
